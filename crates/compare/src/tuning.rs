//! How a rival's knob is chosen: by the rule that calibration follows, on the same shots.
//!
//! Among the settings tried, the one of least KL whose safety loss is at most δ and whose KL is within the limit; else the
//! one of least loss within the limit; else the one of least KL. No rival tries more settings than calibration may take
//! gradients.

use crate::error::CompareError;
use distill::{Frozen, Shots};
use std::sync::Arc;
use transformer::{AnswerBatch, Attachments, Model, Row};

/// Loss and divergences on the shots, nat per token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// Loss of the refusals on the safety shots.
    pub loss: f64,
    /// Divergence from the target on the task shots.
    pub kl_task: f64,
    /// The same on the benign shots; 0 without benign shots.
    pub kl_benign: f64,
}

impl Measured {
    fn within(&self, max_kl: f64) -> bool {
        self.kl_task <= max_kl && self.kl_benign <= max_kl
    }

    fn kl(&self) -> f64 {
        self.kl_task + self.kl_benign
    }
}

/// Index of the setting to take; `None` if nothing was tried or nothing is finite.
pub fn choose(tried: &[Measured], max_kl: f64, delta: f64) -> Option<usize> {
    let finite = |m: &Measured| m.loss.is_finite() && m.kl().is_finite();
    let least = |fits: &dyn Fn(&Measured) -> bool, by: &dyn Fn(&Measured) -> f64| {
        let all = tried.iter().enumerate().filter(|(_, m)| finite(m) && fits(m));
        all.min_by(|a, b| by(a.1).total_cmp(&by(b.1))).map(|(i, _)| i)
    };
    least(&|m| m.within(max_kl) && m.loss <= delta, &Measured::kl)
        .or_else(|| least(&|m| m.within(max_kl), &|m| m.loss))
        .or_else(|| least(&|_| true, &Measured::kl))
}

/// Divergence from a target on some rows.
#[derive(Debug)]
pub struct Divergence {
    parts: Vec<(AnswerBatch, Arc<Vec<f32>>, f64)>,
}

/// Rows of one forward pass.
const BATCH: usize = 96;

impl Divergence {
    /// From `target` on `rows`.
    pub fn new(target: &Frozen<'_>, rows: &[Row], pad: u32) -> Result<Self, CompareError> {
        let part = |some: &[Row]| -> Result<_, CompareError> {
            let batch = AnswerBatch::new(some, pad);
            let reference = batch.reference(target.model, &target.own)?;
            Ok((batch, reference, some.len() as f64 / rows.len() as f64))
        };
        Ok(Self { parts: rows.chunks(BATCH).map(part).collect::<Result<_, _>>()? })
    }

    /// Of a model, nat per token; `None` without rows.
    pub fn of(&self, model: &Model, at: &Attachments) -> Result<Option<f64>, CompareError> {
        let mut sum = 0.0;
        for (batch, reference, share) in &self.parts {
            sum += share * f64::from(batch.kl(model, at, reference)?.to_vec1::<f32>()?[0]).max(0.0);
        }
        Ok((!self.parts.is_empty()).then_some(sum))
    }
}

/// Measures models on the shots of one target.
#[derive(Debug)]
pub struct Meter {
    safety: AnswerBatch,
    task: Divergence,
    benign: Divergence,
}

impl Meter {
    /// On these shots of `target`.
    pub fn new(target: &Frozen<'_>, shots: &Shots, pad: u32) -> Result<Self, CompareError> {
        Ok(Self {
            safety: AnswerBatch::new(&shots.safety, pad),
            task: Divergence::new(target, &shots.task, pad)?,
            benign: Divergence::new(target, &shots.benign, pad)?,
        })
    }

    /// Of a model.
    pub fn of(&self, model: &Model, at: &Attachments) -> Result<Measured, CompareError> {
        let loss = f64::from(self.safety.cross_entropy(model, at)?.to_vec1::<f32>()?[0]);
        let kl = |d: &Divergence| Ok::<f64, CompareError>(d.of(model, at)?.unwrap_or(0.0));
        Ok(Measured { loss, kl_task: kl(&self.task)?, kl_benign: kl(&self.benign)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn m(loss: f64, kl_task: f64, kl_benign: f64) -> Measured {
        Measured { loss, kl_task, kl_benign }
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
    fn what_is_not_finite_is_never_taken() {
        assert_eq!(choose(&[m(f64::NAN, 0.0, 0.0)], 0.02, 0.003), None);
        assert_eq!(choose(&[m(f64::NAN, 0.0, 0.0), m(1.0, 9.0, 9.0)], 0.02, 0.003), Some(1));
        assert_eq!(choose(&[], 0.02, 0.003), None);
    }
}
