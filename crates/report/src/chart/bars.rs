//! Scores of a gene's layers.

use super::{px, tick};
use crate::record::LayerScores;
use crate::text;
use std::fmt::Write as _;

const WIDTH: f64 = 300.0;
const HEIGHT: f64 = 132.0;
const SIDE: f64 = 8.0;
const TOP: f64 = 16.0;
const BOTTOM: f64 = 32.0;

/// About three digits that matter.
fn short(value: f64) -> String {
    let size = value.abs();
    let digits = if size >= 100.0 {
        0
    } else if size >= 10.0 {
        1
    } else if size >= 1.0 {
        2
    } else {
        3
    };
    let text = text::number(value, digits, false);
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_string() } else { text }
}

/// One chart: a bar a layer, selected ones filled, the largest and the least with their number.
pub(crate) fn bars(scores: &LayerScores) -> String {
    let name = format!("{}, seed {} · {}", scores.family, scores.seed, scores.score);
    let mut layers = scores.layers.clone();
    layers.sort_by_key(|l| l.layer);
    let selected = layers.iter().filter(|l| l.selected).count();
    let caption = format!("{name} · {selected} of {} selected", layers.len());
    let mut out = format!("<figure><figcaption>{}</figcaption>", text::html(&caption));
    let (least, most) = layers.iter().fold((0.0f64, 0.0f64), |(a, b), l| (a.min(l.value), b.max(l.value)));
    let range = if most > least { most - least } else { 1.0 };
    let y = |v: f64| TOP + (most - v) / range * (HEIGHT - TOP - BOTTOM);
    let step = (WIDTH - 2.0 * SIDE) / layers.len().max(1) as f64;
    let wide = (step * 0.72).min(26.0);
    let _ = write!(
        out,
        "<svg class=\"plot small\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">",
        text::html(&caption)
    );
    let every = layers.len().div_ceil(12).max(1);
    // The first of the largest and of the least.
    let first = |v: f64| layers.iter().position(|l| l.value == v);
    let (top, bottom) = (first(most), first(least).filter(|_| least < 0.0));
    for (i, l) in layers.iter().enumerate() {
        let x = SIDE + step * (i as f64 + 0.5);
        let (a, b) = (y(l.value.max(0.0)), y(l.value.min(0.0)));
        let class = if l.selected { "full own" } else { "faint" };
        let _ = write!(
            out,
            "<rect class=\"{class}\" x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"><title>layer {}: {}{}</title></rect>",
            px(x - wide / 2.0),
            px(a),
            px(wide),
            px((b - a).max(0.5)),
            l.layer,
            short(l.value),
            if l.selected { ", selected" } else { "" }
        );
        if Some(i) == top || Some(i) == bottom {
            let below = Some(i) == bottom;
            let at = x.clamp(SIDE + 14.0, WIDTH - SIDE - 14.0);
            let _ = write!(
                out,
                "<text class=\"tick\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                px(at),
                px(if below { b + 11.0 } else { a - 4.0 }),
                short(l.value)
            );
        }
        if i % every == 0 {
            let _ = write!(
                out,
                "<text class=\"tick\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                px(x),
                px(HEIGHT - 4.0),
                tick(f64::from(l.layer))
            );
        }
    }
    let _ = write!(out, "<path class=\"axis\" d=\"M{} {}H{}\"/>", px(SIDE), px(y(0.0)), px(WIDTH - SIDE));
    out.push_str("</svg></figure>\n");
    out
}
