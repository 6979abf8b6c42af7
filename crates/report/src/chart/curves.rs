//! Trade-off curves: the loss that stands for ASR while tuning, against the limit on KL.

use super::{px, tick};
use crate::record::TradeOff;
use crate::text;
use std::collections::BTreeMap;
use std::fmt::Write as _;

const WIDTH: f64 = 360.0;
const HEIGHT: f64 = 250.0;
const LEFT: f64 = 48.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 40.0;
/// Losses below are drawn here: the axis is a logarithm.
const LOSS_LEAST: f64 = 1e-5;

/// One target's curve.
pub(crate) struct Curve<'a> {
    pub(crate) name: String,
    pub(crate) points: &'a [TradeOff],
}

/// Marks at 1, 2 and 5 times powers of ten, or at the powers only, within a range.
fn marks(low: f64, high: f64, only_powers: bool) -> Vec<f64> {
    let steps: &[f64] = if only_powers { &[1.0] } else { &[1.0, 2.0, 5.0] };
    let (from, to) = (low.log10().floor() as i32, high.log10().ceil() as i32);
    (from..=to)
        .flat_map(|e| steps.iter().map(move |s| s * 10f64.powi(e)))
        .filter(|m| *m >= low * 0.999 && *m <= high * 1.001)
        .collect()
}

fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    if values.len() % 2 == 1 { values[half] } else { (values[half - 1] * values[half]).sqrt() }
}

/// All targets thin, their median thick where at least half of them were run.
pub(crate) fn curves(caption: &str, curves: &[Curve]) -> String {
    let shown = |p: &TradeOff| (p.max_kl, p.loss.max(LOSS_LEAST));
    let all: Vec<(f64, f64)> = curves.iter().flat_map(|c| c.points.iter().map(shown)).collect();
    if all.is_empty() {
        return String::new();
    }
    let range = |values: &mut dyn Iterator<Item = f64>| {
        let (a, b) = values.fold((f64::INFINITY, 0.0f64), |(a, b), v| (a.min(v), b.max(v)));
        if b > a { (a, b) } else { (a / 2.0, a * 2.0) }
    };
    let (k0, k1) = range(&mut all.iter().map(|p| p.0));
    let (l0, l1) = range(&mut all.iter().map(|p| p.1));
    let x = |v: f64| LEFT + (v / k0).ln() / (k1 / k0).ln() * (WIDTH - LEFT - RIGHT);
    let y = |v: f64| TOP + (l1 / v).ln() / (l1 / l0).ln() * (HEIGHT - TOP - BOTTOM);

    let mut out = format!(
        "<figure><figcaption>{0}</figcaption><svg class=\"plot small\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{0}\">\n",
        text::html(caption)
    );
    let few = |low: f64, high: f64| marks(low, high, (high / low).log10() > 2.5);
    for m in few(k0, k1) {
        let _ = write!(
            out,
            "<path class=\"rule\" d=\"M{0} {1}V{2}\"/><text class=\"tick\" x=\"{0}\" y=\"{3}\" text-anchor=\"middle\">{4}</text>",
            px(x(m)),
            px(TOP),
            px(HEIGHT - BOTTOM),
            px(HEIGHT - BOTTOM + 14.0),
            tick(m)
        );
    }
    for m in few(l0, l1) {
        let _ = write!(
            out,
            "<path class=\"rule\" d=\"M{} {1}H{2}\"/><text class=\"tick\" x=\"{3}\" y=\"{4}\" text-anchor=\"end\">{5}</text>",
            px(LEFT),
            px(y(m)),
            px(WIDTH - RIGHT),
            px(LEFT - 5.0),
            px(y(m) + 4.0),
            tick(m)
        );
    }
    let _ = writeln!(
        out,
        "<text class=\"name\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">limit on KL, nat/token</text>\
         <text class=\"name\" transform=\"translate(11 {}) rotate(-90)\" text-anchor=\"middle\">safety loss</text>",
        px((LEFT + WIDTH - RIGHT) / 2.0),
        px(HEIGHT - 7.0),
        px((TOP + HEIGHT - BOTTOM) / 2.0)
    );
    let line = |points: &[(f64, f64)]| {
        let at: Vec<String> = points.iter().map(|p| format!("{} {}", px(x(p.0)), px(y(p.1)))).collect();
        format!("M{}", at.join("L"))
    };
    let mut at: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
    for curve in curves {
        let mut points: Vec<(f64, f64)> = curve.points.iter().map(shown).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        for p in &points {
            // Positive numbers are ordered as their bits are.
            at.entry(p.0.to_bits()).or_default().push(p.1);
        }
        if !points.is_empty() {
            let _ = writeln!(
                out,
                "<path class=\"thin\" d=\"{}\"><title>{}</title></path>",
                line(&points),
                text::html(&curve.name)
            );
        }
    }
    let middles: Vec<(f64, f64)> = at
        .into_iter()
        .filter(|(_, losses)| 2 * losses.len() >= curves.len())
        .map(|(kl, losses)| (f64::from_bits(kl), middle(losses)))
        .collect();
    if !middles.is_empty() && curves.len() > 1 {
        let _ = write!(out, "<path class=\"thick\" d=\"{}\"/>", line(&middles));
        for p in &middles {
            let _ = write!(
                out,
                "<circle class=\"full own\" cx=\"{}\" cy=\"{}\" r=\"3\"/>",
                px(x(p.0)),
                px(y(p.1))
            );
        }
    }
    out.push_str("</svg></figure>\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_of_two_decades() {
        let got: Vec<String> = marks(0.004, 0.2, false).into_iter().map(tick).collect();
        assert_eq!(got, ["0.005", "0.01", "0.02", "0.05", "0.1", "0.2"]);
        assert_eq!(marks(0.004, 0.2, true).len(), 2);
    }

    #[test]
    fn middle_is_the_median_in_logarithms() {
        assert_eq!(middle(vec![9.0, 1.0, 2.0]), 2.0);
        assert_eq!(middle(vec![8.0, 2.0]), 4.0);
    }

    #[test]
    fn one_point_and_zero_loss_are_drawn() {
        let points = [TradeOff { max_kl: 0.02, loss: 0.0, kl: 0.0 }];
        let got = curves("fake", &[Curve { name: "fake".into(), points: &points }]);
        assert!(
            got.contains("<path class=\"thin\"") && !got.contains("NaN") && !got.contains("inf"),
            "{got}"
        );
        assert_eq!(curves("fake", &[]), "");
    }
}
