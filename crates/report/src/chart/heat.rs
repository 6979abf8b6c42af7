//! Coefficients: layers × targets, as a table whose cells are tinted.

use crate::text;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

/// Tint of the largest coefficient: text on it stays readable in light and dark.
const TINT_MOST: f64 = 0.62;

/// One line a target. A layer without a coefficient is left blank: it was not selected.
pub(crate) fn heat(lines: &[(String, &BTreeMap<u32, f64>)]) -> String {
    let layers: BTreeSet<u32> = lines.iter().flat_map(|(_, c)| c.keys().copied()).collect();
    let most = lines.iter().flat_map(|(_, c)| c.values().copied()).fold(0.0, f64::max);
    let mut out =
        String::from("<div class=\"wide\"><table class=\"heat\"><thead><tr><th scope=\"col\">Target</th>");
    for l in &layers {
        let _ = write!(out, "<th scope=\"col\">{l}</th>");
    }
    out.push_str("</tr></thead><tbody>\n");
    for (name, coefficients) in lines {
        let _ = write!(out, "<tr><th scope=\"row\">{}</th>", text::html(name));
        for l in &layers {
            match coefficients.get(l) {
                Some(&c) => {
                    let tint = if most > 0.0 { TINT_MOST * (c / most) } else { 0.0 };
                    let _ = write!(
                        out,
                        "<td style=\"--tint:{:.1}%\">{}</td>",
                        100.0 * tint,
                        text::number(c, if c >= 100.0 { 0 } else { 1 }, false)
                    );
                }
                None => out.push_str("<td></td>"),
            }
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody></table></div>\n");
    out
}
