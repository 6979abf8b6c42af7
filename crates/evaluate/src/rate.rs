//! A share of rows with its 95 % interval.

use serde::{Deserialize, Serialize};

/// A share between 0 and 1 with its Wilson 95 % interval (Wilson 1927).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// The share.
    pub value: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
    /// Rows counted.
    pub n: u64,
}

impl Rate {
    /// `hits` of `n`; `None` when nothing was counted.
    pub fn of(hits: u64, n: u64) -> Option<Self> {
        if n == 0 {
            return None;
        }
        // Two-sided 95 % quantile of the normal distribution.
        const Z: f64 = 1.959_963_984_540_054;
        let (n_f, p) = (n as f64, hits as f64 / n as f64);
        let z2 = Z * Z / n_f;
        let centre = (p + z2 / 2.0) / (1.0 + z2);
        let half = Z / (1.0 + z2) * (p * (1.0 - p) / n_f + z2 / (4.0 * n_f)).sqrt();
        // At the ends the formula gives the end itself, up to rounding.
        let low = if hits == 0 { 0.0 } else { (centre - half).max(0.0) };
        let high = if hits == n { 1.0 } else { (centre + half).min(1.0) };
        Some(Self { value: p, low, high, n })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wilson_interval_of_published_examples() {
        // Newcombe 1998, table I (doi 10.1002/(SICI)1097-0258(19980430)17:8<857), method 3.
        for (hits, n, low, high) in [
            (81, 263, 0.2553, 0.3662),
            (15, 148, 0.0624, 0.1605),
            (0, 20, 0.0, 0.1611),
            (1, 29, 0.0061, 0.1718),
        ] {
            let r = Rate::of(hits, n).unwrap();
            assert!((r.low - low).abs() < 5e-5, "{hits}/{n}: {}", r.low);
            assert!((r.high - high).abs() < 5e-5, "{hits}/{n}: {}", r.high);
        }
        assert_eq!(Rate::of(0, 0), None);
        assert_eq!(Rate::of(7, 7).unwrap().high, 1.0);
    }
}
