//! Losses over answer positions: what a prompt's answer costs, and how far a model has moved.
//!
//! Both are means over the tokens of a row, then over rows (nat per token), unless a batch is of whole answers (sums over
//! tokens: nat per answer).

use crate::attach::Attachments;
use crate::error::ModelError;
use crate::model::{Batch, Model};
use crate::ops;
use candle_core::Tensor;
use std::sync::Arc;

/// One prompt with its answer, as token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The rendered prompt.
    pub prompt: Vec<u32>,
    /// The answer, closed with the end-of-turn token, or how it opens.
    pub answer: Vec<u32>,
}

/// Rows laid out for one forward pass.
#[derive(Debug, Clone)]
pub struct AnswerBatch {
    batch: Batch,
    predictors: Vec<u32>,
    targets: Arc<Vec<u32>>,
    weights: Arc<Vec<f32>>,
    /// Of each row the place of its first answer token among the predictors.
    firsts: Vec<u32>,
}

impl AnswerBatch {
    /// Pads `rows` behind with `pad`. Rows must have a prompt and an answer.
    pub fn new(rows: &[Row], pad: u32) -> Self {
        let full: Vec<Vec<u32>> =
            rows.iter().map(|r| r.prompt.iter().chain(&r.answer).copied().collect()).collect();
        let batch = Batch::pad_behind(&full, pad);
        let (mut predictors, mut targets, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        let mut firsts = Vec::with_capacity(rows.len());
        for (i, row) in rows.iter().enumerate() {
            let first = i * batch.tokens + row.prompt.len() - 1;
            firsts.push(predictors.len() as u32);
            let weight = 1.0 / (row.answer.len() as f64 * rows.len() as f64);
            for (k, &id) in row.answer.iter().enumerate() {
                predictors.push((first + k) as u32);
                targets.push(id);
                weights.push(weight as f32);
            }
        }
        Self { batch, predictors, targets: Arc::new(targets), weights: Arc::new(weights), firsts }
    }

    /// [`Self::new`] with losses that are sums over the tokens of an answer, means over rows.
    pub fn summed(rows: &[Row], pad: u32) -> Self {
        let mut batch = Self::new(rows, pad);
        batch.weights = Arc::new(vec![1.0 / rows.len() as f32; batch.weights.len()]);
        batch
    }

    /// Prompts and answers as one padded batch.
    pub fn batch(&self) -> &Batch {
        &self.batch
    }

    /// Places of `hidden` that predict an answer token, in the order of [`Self::logits`].
    pub fn predictors(&self) -> &[u32] {
        &self.predictors
    }

    /// The rows of `[rows * tokens, width]` that predict an answer token.
    pub fn at_predictors(&self, states: &Tensor) -> Result<Tensor, ModelError> {
        let rows = Tensor::from_slice(&self.predictors, self.predictors.len(), states.device())?;
        Ok(states.index_select(&rows, 0)?)
    }

    /// Of [`Self::logits`], the rows that predict a first answer token: `[rows, vocab]`.
    pub fn first_logits(&self, logits: &Tensor) -> Result<Tensor, ModelError> {
        let firsts = Tensor::from_slice(&self.firsts, self.firsts.len(), logits.device())?;
        Ok(logits.index_select(&firsts, 0)?)
    }

    /// Logits `[answer tokens, vocab]` at the positions that predict an answer token.
    pub fn logits(&self, model: &Model, attachments: &Attachments) -> Result<Tensor, ModelError> {
        let hidden = model.hidden(&self.batch, attachments, None, None)?;
        model.logits(&hidden, &self.predictors)
    }

    /// Mean over rows of the mean over answer tokens of −log p, shape `[1]`.
    pub fn cross_entropy(&self, model: &Model, attachments: &Attachments) -> Result<Tensor, ModelError> {
        self.cross_entropy_of(&self.logits(model, attachments)?)
    }

    /// Log-probabilities `[answer tokens, vocab]` of a model, to measure divergence from.
    pub fn reference(&self, model: &Model, attachments: &Attachments) -> Result<Arc<Vec<f32>>, ModelError> {
        log_probabilities(&self.logits(model, attachments)?.detach())
    }

    /// `Σ_i w_i · KL(reference_i ‖ softmax(logits_i))`, the weights being those of [`Self::kl`].
    pub fn kl_of(&self, logits: &Tensor, reference: &Arc<Vec<f32>>) -> Result<Tensor, ModelError> {
        Ok(ops::kl(logits, reference.clone(), self.weights.clone())?)
    }

    /// [`Self::cross_entropy`] of given logits.
    pub fn cross_entropy_of(&self, logits: &Tensor) -> Result<Tensor, ModelError> {
        Ok(ops::cross_entropy(logits, self.targets.clone(), self.weights.clone())?)
    }

    /// Mean over rows of the mean over answer tokens of KL(reference ‖ model), shape `[1]`.
    pub fn kl(
        &self,
        model: &Model,
        attachments: &Attachments,
        reference: &Arc<Vec<f32>>,
    ) -> Result<Tensor, ModelError> {
        self.kl_of(&self.logits(model, attachments)?, reference)
    }
}

/// Row-wise log-softmax of `[n, vocab]`, as plain values.
pub fn log_probabilities(logits: &Tensor) -> Result<Arc<Vec<f32>>, ModelError> {
    let vocab = logits.dim(1)?;
    let mut logp = logits.flatten_all()?.to_vec1::<f32>()?;
    let mut out = vec![0f32; vocab];
    for row in logp.chunks_mut(vocab) {
        ops::log_softmax(row, &mut out);
        row.copy_from_slice(&out);
    }
    Ok(Arc::new(logp))
}
