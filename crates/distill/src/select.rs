//! Which layers carry the safety of a gene: what each layer's factors do *alone*, in a reference model.
//!
//! | score of layer l | formula |
//! |---|---|
//! | price | `(CE_0 − CE_l) / √KL_l` at coefficient 3: loss of the refusals saved, for the square root of its price |
//! | insertion | `mean_harmful[Δ refusal log-odds at the first answer token] − β · mean_benign KL(ref ‖ ref ⊕ gene_l)` |
//! | activation | `mean_harmful δ_l − β · mean_benign δ_l`, `δ_l = ‖f_l(x; θ ⊕ gene_l) − f_l(x; θ)‖ / ‖f_l(x; θ)‖` |
//!
//! `β = 1`; `f_l` is what the block adds to the residual stream, at the positions that predict an answer token: the stream
//! itself would favour late layers. That layers are selected by a layer-wise activation contrast is reported of SafeGene
//! (arXiv 2606.06519); these formulas are our own.
//!
//! What comes before layer l is the same with and without it, so every layer starts from the reference's own stream: one
//! pass for the reference and, over all layers, half a pass each.
//!
//! Not here: files, what to do with the layers that are chosen.

use crate::gene::{Frozen, GeneAttachments};
use candle_core::Tensor;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use transformer::{AnswerBatch, ModelError, Row, Taps, ops};

/// How layers are ranked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Score {
    /// Loss saved for the square root of the divergence.
    #[default]
    Price,
    /// Refusal log-odds gained, less the divergence on benign rows.
    Insertion,
    /// Contrast of what the block adds.
    Activation,
}

impl Score {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Price, Self::Insertion, Self::Activation];
}

/// How many layers are kept.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// The K best.
    Top(usize),
    /// The smallest set whose positive scores reach this share of their sum.
    Mass(f64),
}

/// All scores of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LayerScore {
    /// The layer.
    pub layer: u32,
    /// [`Score::Price`].
    pub price: f64,
    /// [`Score::Insertion`].
    pub insertion: f64,
    /// [`Score::Activation`].
    pub activation: f64,
}

impl LayerScore {
    /// The score of that kind.
    pub fn get(&self, score: Score) -> f64 {
        match score {
            Score::Price => self.price,
            Score::Insertion => self.insertion,
            Score::Activation => self.activation,
        }
    }
}

/// Weight of what happens on benign rows.
const BETA: f64 = 1.0;
/// Coefficient at which the price is taken.
const PRICE_AT: f64 = 3.0;
/// Divergences below this are rounding.
const KL_FLOOR: f64 = 1e-8;

/// Why nothing was scored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SelectError {
    /// A model could not be run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A kind of rows is empty.
    #[error("there are no {0} rows")]
    NoRows(&'static str),
    /// The gene has no layer to choose from.
    #[error("the gene has no layer with a low-rank module")]
    NoLayer,
    /// No layer is chosen, or more than there are.
    #[error("cannot keep {keep}: the gene has {layers} layers")]
    Keep {
        /// What was asked.
        keep: String,
        /// Layers of the gene.
        layers: usize,
    },
    /// The model overflows with the gene in one layer.
    #[error("the {score:?} score of layer {layer} is not finite: are the gene's factors sound?")]
    NotFinite {
        /// The layer.
        layer: u32,
        /// Which score.
        score: Score,
    },
    /// No layer does any good alone.
    #[error("no layer has a positive score, so no share of their sum can be reached")]
    NothingPositive,
}

impl From<candle_core::Error> for SelectError {
    fn from(e: candle_core::Error) -> Self {
        Self::Model(e.into())
    }
}

struct Side {
    batch: AnswerBatch,
    /// What goes into each block.
    inputs: Vec<Tensor>,
    /// What each block adds, at the predicting positions.
    added: Vec<Tensor>,
    logits: Tensor,
    reference: Arc<Vec<f32>>,
}

fn number(t: &Tensor) -> Result<f64, SelectError> {
    Ok(f64::from(t.sum_all()?.to_scalar::<f32>()?))
}

impl Side {
    fn new(model: &Frozen<'_>, rows: &[Row], pad: u32) -> Result<Self, SelectError> {
        let batch = AnswerBatch::new(rows, pad);
        let mut taps = Taps::default();
        let hidden = model.model.hidden(batch.batch(), &model.own, None, Some(&mut taps))?;
        let logits = model.model.logits(&hidden, batch.predictors())?;
        let reference = transformer::loss::log_probabilities(&logits)?;
        let at = |t: &Tensor| batch.at_predictors(t);
        let added = taps.outputs.iter().map(at).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { batch, inputs: taps.inputs, added, logits, reference })
    }

    /// Logits with `gene` at `c` in `layer` alone.
    fn logits(
        &self,
        model: &Frozen<'_>,
        gene: &GeneAttachments,
        layer: u32,
        c: f64,
    ) -> Result<Tensor, SelectError> {
        let with = model.with(&gene.at(&BTreeMap::from([(layer, c)]))?);
        let input = &self.inputs[layer as usize];
        let hidden = model.model.hidden_from(self.batch.batch(), layer as usize, input, &with)?;
        Ok(model.model.logits(&hidden, self.batch.predictors())?)
    }

    /// Mean over predicting positions of how much what the block adds changes.
    fn change(&self, model: &Frozen<'_>, gene: &GeneAttachments, layer: u32) -> Result<f64, SelectError> {
        let l = layer as usize;
        let with = model.with(&gene.at(&BTreeMap::from([(layer, 1.0)]))?);
        let out = model.model.block_alone(self.batch.batch(), l, &self.inputs[l], &with)?;
        let added = self.batch.at_predictors(&(out - &self.inputs[l]).map_err(ModelError::from)?)?;
        let norms = |t: &Tensor| -> Result<Vec<f32>, SelectError> { Ok(t.sqr()?.sum(1)?.sqrt()?.to_vec1()?) };
        let (apart, before) = (norms(&(added - &self.added[l])?)?, norms(&self.added[l])?);
        let ratios = apart.iter().zip(&before).map(|(a, b)| f64::from(*a) / f64::from(*b).max(1e-12));
        Ok(ratios.sum::<f64>() / before.len().max(1) as f64)
    }

    fn kl(&self, logits: &Tensor) -> Result<f64, SelectError> {
        Ok(number(&self.batch.kl_of(logits, &self.reference)?)?.max(0.0))
    }
}

/// Scores of all layers of `gene` in `reference`: `harmful` rows are answered by refusals, `benign` ones as they should be;
/// `refusal` are the first tokens of refusals.
pub fn scores(
    reference: &Frozen<'_>,
    gene: &GeneAttachments,
    harmful: &[Row],
    benign: &[Row],
    (refusal, pad): (&[u32], u32),
) -> Result<Vec<LayerScore>, SelectError> {
    for (rows, what) in [(harmful, "harmful"), (benign, "benign")] {
        if rows.is_empty() {
            return Err(SelectError::NoRows(what));
        }
    }
    if gene.layers().is_empty() {
        return Err(SelectError::NoLayer);
    }
    let inside = ops::token_set(refusal, reference.model.architecture().vocab);
    let (bad, good) = (Side::new(reference, harmful, pad)?, Side::new(reference, benign, pad)?);
    let odds = |logits: &Tensor| -> Result<f64, SelectError> {
        number(&ops::log_odds(&bad.batch.first_logits(logits)?, &inside)?.mean_all()?)
    };
    let loss = |logits: &Tensor| number(&bad.batch.cross_entropy_of(logits)?);
    let (odds_before, loss_before) = (odds(&bad.logits)?, loss(&bad.logits)?);
    let one = |&layer: &u32| -> Result<LayerScore, SelectError> {
        let at_one = bad.logits(reference, gene, layer, 1.0)?;
        let insertion =
            odds(&at_one)? - odds_before - BETA * good.kl(&good.logits(reference, gene, layer, 1.0)?)?;
        let saved = loss_before - loss(&bad.logits(reference, gene, layer, PRICE_AT)?)?;
        let kl = good.kl(&good.logits(reference, gene, layer, PRICE_AT)?)?;
        let activation = bad.change(reference, gene, layer)? - BETA * good.change(reference, gene, layer)?;
        let score = LayerScore { layer, price: saved / kl.max(KL_FLOOR).sqrt(), insertion, activation };
        match Score::ALL.into_iter().find(|&s| !score.get(s).is_finite()) {
            Some(score) => Err(SelectError::NotFinite { layer, score }),
            None => Ok(score),
        }
    };
    gene.layers().par_iter().map(one).collect()
}

/// The layers to keep, ascending. Equal scores go to the earlier layer.
pub fn choose(scores: &[LayerScore], score: Score, keep: Keep) -> Result<Vec<u32>, SelectError> {
    let mut order: Vec<&LayerScore> = scores.iter().collect();
    order.sort_by(|a, b| b.get(score).total_cmp(&a.get(score)).then(a.layer.cmp(&b.layer)));
    let n = match keep {
        Keep::Top(k) if (1..=scores.len()).contains(&k) => k,
        Keep::Top(k) => return Err(SelectError::Keep { keep: format!("{k} layers"), layers: scores.len() }),
        Keep::Mass(share) if share > 0.0 && share <= 1.0 => {
            let positive = |s: &&LayerScore| s.get(score).max(0.0);
            let sum: f64 = order.iter().map(positive).sum();
            if sum <= 0.0 {
                return Err(SelectError::NothingPositive);
            }
            let mut reached = 0.0;
            let enough = order.iter().position(|s| {
                reached += positive(s);
                // The sum is made in the same order, so that a share of 1 is reached.
                reached >= share * sum
            });
            enough.map_or(scores.len(), |last| last + 1)
        }
        Keep::Mass(share) => {
            return Err(SelectError::Keep { keep: format!("a share of {share}"), layers: scores.len() });
        }
    };
    let mut out: Vec<u32> = order[..n].iter().map(|s| s.layer).collect();
    out.sort_unstable();
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some(values: &[f64]) -> Vec<LayerScore> {
        let one =
            |(i, &v): (usize, &f64)| LayerScore { layer: i as u32, price: v, insertion: -v, activation: 0.0 };
        values.iter().enumerate().map(one).collect()
    }

    #[test]
    fn best_layers_in_order_and_ties_to_the_earlier() {
        let s = some(&[0.1, 0.5, 0.5, -1.0]);
        assert_eq!(choose(&s, Score::Price, Keep::Top(1)).unwrap(), [1]);
        assert_eq!(choose(&s, Score::Price, Keep::Top(3)).unwrap(), [0, 1, 2]);
        assert_eq!(choose(&s, Score::Insertion, Keep::Top(2)).unwrap(), [0, 3]);
        assert_eq!(choose(&s, Score::Activation, Keep::Top(2)).unwrap(), [0, 1]);
    }

    #[test]
    fn smallest_set_that_reaches_the_share() {
        // Positive scores 4, 3, 2, 1: 0.4 of them is 4 alone, 0.41 needs two, all need four; the negative never counts.
        let s = some(&[2.0, 4.0, -5.0, 1.0, 3.0]);
        assert_eq!(choose(&s, Score::Price, Keep::Mass(0.4)).unwrap(), [1]);
        assert_eq!(choose(&s, Score::Price, Keep::Mass(0.41)).unwrap(), [1, 4]);
        assert_eq!(choose(&s, Score::Price, Keep::Mass(1.0)).unwrap(), [0, 1, 3, 4]);
    }

    #[test]
    fn senseless_numbers_of_layers_are_refused() {
        let s = some(&[1.0, 2.0]);
        for keep in [Keep::Top(0), Keep::Top(3), Keep::Mass(0.0), Keep::Mass(1.5), Keep::Mass(f64::NAN)] {
            assert!(matches!(choose(&s, Score::Price, keep), Err(SelectError::Keep { .. })), "{keep:?}");
        }
        assert!(matches!(
            choose(&some(&[-1.0, 0.0]), Score::Price, Keep::Mass(0.5)),
            Err(SelectError::NothingPositive)
        ));
    }
}
