//! Pictures as SVG text.
//!
//! Written by hand: colours are classes of the page, so one picture serves light, dark and paper, which a plotting library's
//! fixed colours do not; and labels stand at their points. Nothing is told by colour alone.

mod bars;
mod curves;
mod heat;
mod scatter;

pub(crate) use bars::bars;
pub(crate) use curves::{Curve, curves};
pub(crate) use heat::heat;
pub(crate) use scatter::{Dot, XAxis, scatter, shape_key};

/// A coordinate, short and the same everywhere.
fn px(value: f64) -> String {
    let text = format!("{value:.1}");
    let text = text.strip_suffix(".0").unwrap_or(&text);
    if text == "-0" { "0".into() } else { text.into() }
}

/// A tick's number: as few digits as it needs.
fn tick(value: f64) -> String {
    crate::text::number(value, 6, false).trim_end_matches('0').trim_end_matches('.').to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coordinates_and_ticks_are_short() {
        assert_eq!(px(12.04), "12");
        assert_eq!(px(-0.01), "0");
        assert_eq!(px(12.36), "12.4");
        assert_eq!(tick(0.005), "0.005");
        assert_eq!(tick(10.0), "10");
        assert_eq!(tick(0.0), "0");
        assert_eq!(tick(-5.0), "−5");
    }
}
