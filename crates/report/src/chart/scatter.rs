//! Attack success rate against what it costs.
//!
//! Both axes are square roots, so that values near 0 keep their distance and 0 itself has a place. Bars are 95 % intervals.
//! A method that refuses much says so at its point.

use super::{px, tick};
use crate::mean::Mean;
use crate::record::Label;
use crate::text;
use std::fmt::Write as _;

const WIDTH: f64 = 780.0;
const HEIGHT: f64 = 470.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 44.0;
/// Width of a letter of a label, on the wide side.
const LETTER: f64 = 6.3;
const LINE: f64 = 13.0;

/// A method in the plane.
pub(crate) struct Dot {
    pub(crate) x: Mean,
    pub(crate) y: Mean,
    pub(crate) name: String,
    /// All that is known, for whoever points at it.
    pub(crate) title: String,
    pub(crate) label: Label,
    pub(crate) own: bool,
}

/// What the picture is drawn over.
pub(crate) struct XAxis {
    pub(crate) name: &'static str,
    /// Numbers are shown times this.
    pub(crate) scale: f64,
    /// Ticks that may be shown, as shown.
    pub(crate) ticks: &'static [f64],
}

/// Ticks of the upright axis, in percent.
const PERCENT: [f64; 10] = [0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0, 80.0, 100.0];

fn root(v: f64) -> f64 {
    v.signum() * v.abs().sqrt()
}

struct Scale {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Scale {
    fn at(&self, v: f64) -> f64 {
        let share = (root(v) - root(self.low)) / (root(self.high) - root(self.low));
        self.from + share.clamp(0.0, 1.0) * (self.to - self.from)
    }
}

/// From the largest tick not above all values to the smallest not below them.
fn bounds(values: &[f64], ticks: &[f64]) -> (f64, f64) {
    let (least, most) = values.iter().fold((0.0f64, 0.0f64), |(a, b), &v| (a.min(v), b.max(v)));
    let low = ticks.iter().rev().find(|&&t| t <= least).copied().unwrap_or(least);
    let above = ticks.iter().find(|&&t| t >= most).copied().unwrap_or(most);
    let high = if above > low { above } else { ticks.last().copied().unwrap_or(1.0) };
    (low, high)
}

#[derive(Clone, Copy)]
struct Box {
    x: f64,
    y: f64,
    w: f64,
    h: f64,
}

impl Box {
    /// Area shared with another.
    fn shared(&self, o: &Self) -> f64 {
        let w = (self.x + self.w).min(o.x + o.w) - self.x.max(o.x);
        let h = (self.y + self.h).min(o.y + o.h) - self.y.max(o.y);
        if w > 0.0 && h > 0.0 { w * h } else { 0.0 }
    }

    /// Length of a line inside, by points along it.
    fn crossed(&self, a: (f64, f64), b: (f64, f64)) -> f64 {
        const STEPS: u32 = 24;
        let inside = |k: &u32| {
            let t = f64::from(*k) / f64::from(STEPS);
            let (x, y) = (a.0 + t * (b.0 - a.0), a.1 + t * (b.1 - a.1));
            x > self.x && x < self.x + self.w && y > self.y && y < self.y + self.h
        };
        let length = ((b.0 - a.0).powi(2) + (b.1 - a.1).powi(2)).sqrt();
        length * f64::from((0..=STEPS).filter(inside).count() as u32) / f64::from(STEPS)
    }
}

/// What labels have to stay in.
const FRAME: Box = Box { x: LEFT, y: TOP, w: WIDTH - LEFT - RIGHT, h: HEIGHT - TOP - BOTTOM };

/// Where labels go: as near as may be without covering points, bars and each other.
///
/// Each looks for the best place among those that have one; then all look again, now that everyone is there.
fn places(points: &[(f64, f64)], bars: &[[(f64, f64); 2]], widths: &[f64], order: &[usize]) -> Vec<Box> {
    const PASSES: usize = 6;
    let dots: Vec<Box> =
        points.iter().map(|p| Box { x: p.0 - 6.0, y: p.1 - 6.0, w: 12.0, h: 12.0 }).collect();
    let mut placed: Vec<Option<Box>> = vec![None; points.len()];
    for &i in order.iter().cycle().take(PASSES * order.len()) {
        let others: Vec<(usize, Box)> = placed
            .iter()
            .enumerate()
            .filter(|&(k, _)| k != i)
            .filter_map(|(k, b)| Some((k, (*b)?)))
            .collect();
        let cost = |r: f64, b: &Box| {
            let leader = (points[i], nearest(b, points[i]));
            let mut cost = r + 100.0 * (b.w * b.h - b.shared(&FRAME));
            for (k, dot) in dots.iter().enumerate() {
                cost += 4.0 * dot.shared(b);
                if k != i {
                    cost += 3.0 * dot.crossed(leader.0, leader.1);
                }
            }
            for (k, other) in &others {
                let theirs = (points[*k], nearest(other, points[*k]));
                cost += 20.0 * other.shared(b);
                cost += 8.0 * (other.crossed(leader.0, leader.1) + b.crossed(theirs.0, theirs.1));
                if crossing(leader, theirs) {
                    cost += 25.0;
                }
            }
            cost + bars.iter().map(|l| 0.6 * b.crossed(l[0], l[1])).sum::<f64>()
        };
        let mut best: Option<(f64, Box)> = None;
        for ring in 0..16 {
            let r = 9.0 + 11.0 * f64::from(ring);
            for turn in 0..16 {
                let angle = f64::from(turn) * std::f64::consts::TAU / 16.0;
                let (cx, cy) = (points[i].0 + r * angle.cos(), points[i].1 + r * angle.sin());
                // The side of the box that looks at the point touches the ring.
                let b = Box {
                    x: cx - widths[i] * (1.0 - angle.cos()) / 2.0,
                    y: cy - LINE * (1.0 - angle.sin()) / 2.0,
                    w: widths[i],
                    h: LINE,
                };
                let cost = cost(r, &b);
                if best.is_none_or(|(least, _)| cost < least) {
                    best = Some((cost, b));
                }
            }
        }
        placed[i] = best.map(|(_, b)| b);
    }
    placed.into_iter().flatten().collect()
}

/// Whether two lines cross.
fn crossing(a: ((f64, f64), (f64, f64)), b: ((f64, f64), (f64, f64))) -> bool {
    let side =
        |p: (f64, f64), q: (f64, f64), r: (f64, f64)| (q.0 - p.0) * (r.1 - p.1) - (q.1 - p.1) * (r.0 - p.0);
    side(a.0, a.1, b.0) * side(a.0, a.1, b.1) < 0.0 && side(b.0, b.1, a.0) * side(b.0, b.1, a.1) < 0.0
}

fn nearest(b: &Box, p: (f64, f64)) -> (f64, f64) {
    (p.0.clamp(b.x, b.x + b.w), p.1.clamp(b.y, b.y + b.h))
}

/// A mark of its own for each label, hollow until benign shots fill it.
fn shape(label: Label, x: f64, y: f64) -> String {
    match label {
        Label::Zero => format!("<circle class=\"hollow\" cx=\"{}\" cy=\"{}\" r=\"4.5\"/>", px(x), px(y)),
        Label::Task => format!("<path class=\"hollow\" d=\"M{} {}l5 9h-10z\"/>", px(x), px(y - 5.5)),
        Label::SafetyTask => format!(
            "<rect class=\"hollow\" x=\"{}\" y=\"{}\" width=\"8\" height=\"8\"/>",
            px(x - 4.0),
            px(y - 4.0)
        ),
        Label::SafetyTaskBenign => {
            format!("<circle class=\"full\" cx=\"{}\" cy=\"{}\" r=\"4.5\"/>", px(x), px(y))
        }
    }
}

/// The marks and what they mean.
pub(crate) fn shape_key(labels: &[Label]) -> String {
    let mut out = String::from("<p class=\"key\">");
    for &label in labels {
        let _ = write!(
            out,
            "<span><svg width=\"14\" height=\"14\" viewBox=\"0 0 14 14\" aria-hidden=\"true\">{}</svg>{}</span>",
            shape(label, 7.0, 7.0),
            crate::names::label(label)
        );
    }
    out.push_str("</p>\n");
    out
}

/// Draws `dots`; empty when there are none.
pub(crate) fn scatter(title: &str, axis: &XAxis, dots: &[Dot]) -> String {
    if dots.is_empty() {
        return String::new();
    }
    let ends = |m: &Mean| [m.value, m.low.unwrap_or(m.value), m.high.unwrap_or(m.value)];
    // An interval may run out of the picture; a point may not.
    let xs: Vec<f64> = dots.iter().map(|d| d.x.value * axis.scale).collect();
    let ys: Vec<f64> = dots.iter().flat_map(|d| ends(&d.y)).map(|v| v * 100.0).collect();
    let (low, high) = bounds(&xs, axis.ticks);
    let sx = Scale { low, high, from: LEFT + 10.0, to: WIDTH - RIGHT - 10.0 };
    let (low, high) = bounds(&ys, &PERCENT);
    let sy = Scale { low, high, from: HEIGHT - BOTTOM, to: TOP + 6.0 };

    let mut out = format!(
        "<div class=\"wide\"><svg class=\"plot\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">\n",
        text::html(title)
    );
    let (x0, x1, y0, y1) = (LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM, TOP);
    let mut last = f64::INFINITY;
    for t in PERCENT.into_iter().filter(|t| (sy.low..=sy.high).contains(t)) {
        let y = sy.at(t);
        let _ = write!(out, "<path class=\"rule\" d=\"M{} {}H{}\"/>", px(x0), px(y), px(x1));
        if last - y >= 12.0 {
            let _ = write!(
                out,
                "<text class=\"tick\" x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
                px(x0 - 7.0),
                px(y + 4.0),
                tick(t)
            );
            last = y;
        }
    }
    let mut last = f64::NEG_INFINITY;
    for &t in axis.ticks.iter().filter(|t| (sx.low..=sx.high).contains(*t)) {
        let x = sx.at(t);
        let _ = write!(out, "<path class=\"rule\" d=\"M{} {}V{}\"/>", px(x), px(y0), px(y1));
        let shown = tick(t);
        let width = LETTER * shown.chars().count() as f64;
        if x - width / 2.0 - last >= 8.0 {
            let _ = write!(
                out,
                "<text class=\"tick\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{shown}</text>",
                px(x),
                px(y0 + 16.0)
            );
            last = x + width / 2.0;
        }
    }
    let _ = writeln!(
        out,
        "\n<text class=\"name\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>\
         <text class=\"name\" transform=\"translate(13 {}) rotate(-90)\" text-anchor=\"middle\">attack success rate, %</text>",
        px((x0 + x1) / 2.0),
        px(HEIGHT - 8.0),
        axis.name,
        px((y0 + y1) / 2.0)
    );

    let points: Vec<(f64, f64)> =
        dots.iter().map(|d| (sx.at(d.x.value * axis.scale), sy.at(d.y.value * 100.0))).collect();
    let mut bars = Vec::new();
    for (dot, &(x, y)) in dots.iter().zip(&points) {
        if let (Some(low), Some(high)) = (dot.x.low, dot.x.high) {
            bars.push([(sx.at(low * axis.scale), y), (sx.at(high * axis.scale), y)]);
        }
        if let (Some(low), Some(high)) = (dot.y.low, dot.y.high) {
            bars.push([(x, sy.at(low * 100.0)), (x, sy.at(high * 100.0))]);
        }
    }
    let widths: Vec<f64> = dots.iter().map(|d| LETTER * d.name.chars().count() as f64 + 2.0).collect();
    // Our own first, then from the lower left, where room is scarce and interest great.
    let mut order: Vec<usize> = (0..dots.len()).collect();
    order.sort_by(|&a, &b| {
        let far = |i: usize| (points[i].0 - x0) - (points[i].1 - y0);
        dots[b].own.cmp(&dots[a].own).then(far(a).total_cmp(&far(b))).then(a.cmp(&b))
    });
    let boxes = places(&points, &bars, &widths, &order);

    for bar in &bars {
        let _ = write!(
            out,
            "<path class=\"bar\" d=\"M{} {}L{} {}\"/>",
            px(bar[0].0),
            px(bar[0].1),
            px(bar[1].0),
            px(bar[1].1)
        );
    }
    out.push('\n');
    for (&p, b) in points.iter().zip(&boxes) {
        let end = nearest(b, p);
        if (end.0 - p.0).hypot(end.1 - p.1) > 13.0 {
            let _ = write!(
                out,
                "<path class=\"leader\" d=\"M{} {}L{} {}\"/>",
                px(p.0),
                px(p.1),
                px(end.0),
                px(end.1)
            );
        }
    }
    out.push('\n');
    // Our own last, on top.
    order.sort_by_key(|&i| (dots[i].own, i));
    for i in order {
        let (dot, (x, y), b) = (&dots[i], points[i], boxes[i]);
        let class = if dot.own { " class=\"own\"" } else { "" };
        let _ = writeln!(
            out,
            "<g{class}><title>{}</title>{}<text class=\"label\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text></g>",
            text::html(&dot.title),
            shape(dot.label, x, y),
            px(b.x + b.w / 2.0),
            px(b.y + LINE - 3.0),
            text::html(&dot.name)
        );
    }
    out.push_str("</svg></div>\n");
    out
}
