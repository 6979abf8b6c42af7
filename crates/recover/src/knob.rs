//! How a method's knob is chosen, on shots.
//!
//! Among the settings tried, the one of least KL whose safety loss is at most δ and whose KL is within the limit; else the
//! one of least loss within the limit; else the one of least KL. KL is the sum of both; the limit is on each. Ties go to the
//! earlier one.

use serde::{Deserialize, Serialize};

/// Loss and divergences at one setting. KL is nat per token; the loss has the caller's unit, and so has δ.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Cross-entropy of the refusals on the safety shots.
    pub loss: f64,
    /// KL on the task shots.
    pub kl_task: f64,
    /// KL on the benign shots; none without benign shots.
    pub kl_benign: Option<f64>,
}

impl Measured {
    /// The larger of the two divergences.
    pub fn kl_max(&self) -> f64 {
        self.kl_task.max(self.kl_benign.unwrap_or(0.0))
    }

    fn kl(&self) -> f64 {
        self.kl_task + self.kl_benign.unwrap_or(0.0)
    }
}

/// Index of the setting to take; `None` if nothing was tried or nothing is finite.
pub fn choose(tried: &[Measured], max_kl: f64, delta: f64) -> Option<usize> {
    let finite = |m: &Measured| m.loss.is_finite() && m.kl().is_finite();
    let least = |fits: &dyn Fn(&Measured) -> bool, by: &dyn Fn(&Measured) -> f64| {
        let all = tried.iter().enumerate().filter(|(_, m)| finite(m) && fits(m));
        all.min_by(|a, b| by(a.1).total_cmp(&by(b.1))).map(|(i, _)| i)
    };
    least(&|m| m.kl_max() <= max_kl && m.loss <= delta, &Measured::kl)
        .or_else(|| least(&|m| m.kl_max() <= max_kl, &|m| m.loss))
        .or_else(|| least(&|_| true, &Measured::kl))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn m(loss: f64, kl_task: f64, kl_benign: f64) -> Measured {
        Measured { loss, kl_task, kl_benign: Some(kl_benign) }
    }

    #[test]
    fn safe_enough_and_cheapest_then_safest_then_nearest() {
        let safe = [m(0.001, 0.019, 0.0), m(0.002, 0.004, 0.003), m(0.5, 0.0, 0.0)];
        assert_eq!(choose(&safe, 0.02, 0.003), Some(1));
        let within = [m(0.9, 0.01, 0.0), m(0.4, 0.02, 0.02), m(0.001, 0.021, 0.0)];
        assert_eq!(choose(&within, 0.02, 0.003), Some(1));
        let far = [m(0.001, 0.5, 0.5), m(0.9, 0.3, 0.0)];
        assert_eq!(choose(&far, 0.02, 0.003), Some(1));
    }

    #[test]
    fn no_benign_shots_are_no_divergence_and_ties_go_to_the_earlier() {
        let none = Measured { loss: 0.001, kl_task: 0.01, kl_benign: None };
        assert_eq!(choose(&[m(0.001, 0.01, 0.001), none], 0.02, 0.003), Some(1));
        assert_eq!(choose(&[none, none], 0.02, 0.003), Some(0));
    }

    #[test]
    fn what_is_not_finite_is_never_taken() {
        assert_eq!(choose(&[m(f64::NAN, 0.0, 0.0)], 0.02, 0.003), None);
        assert_eq!(choose(&[m(f64::NAN, 0.0, 0.0), m(1.0, 9.0, 9.0)], 0.02, 0.003), Some(1));
        assert_eq!(choose(&[], 0.02, 0.003), None);
    }
}
