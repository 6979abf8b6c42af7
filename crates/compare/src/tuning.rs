//! What a rival's setting does on the shots, for the rule that chooses among settings ([`recover::knob`]).
//!
//! No rival tries more settings than calibration may take gradients.

use crate::error::CompareError;
use distill::{Frozen, Shots};
use recover::knob::Measured;
use std::sync::Arc;
use transformer::{AnswerBatch, Attachments, Model, Row};

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
            safety: AnswerBatch::summed(&shots.safety, pad),
            task: Divergence::new(target, &shots.task, pad)?,
            benign: Divergence::new(target, &shots.benign, pad)?,
        })
    }

    /// Of a model.
    pub fn of(&self, model: &Model, at: &Attachments) -> Result<Measured, CompareError> {
        let loss = f64::from(self.safety.cross_entropy(model, at)?.to_vec1::<f32>()?[0]);
        let kl_task = self.task.of(model, at)?.unwrap_or(0.0);
        Ok(Measured { loss, kl_task, kl_benign: self.benign.of(model, at)? })
    }
}
