//! What a small LoRA trained on the same shots reaches under the same limit: the strongest simple rival of a gene.
//!
//! Nobody's paper: this is what a careful user would do with the shots that a gene is calibrated on. A LoRA (arXiv 2106.09685)
//! of rank 8, α = 16, on all seven linear modules of the target `θ_t`, trained by AdamW on all shots at every step to
//!
//! ```text
//! minimise   CE_safety + penalty · ( KL_task + KL_benign ),     KL = KL( p_t ‖ p_{t⊕LoRA} ),   penalty = 1
//! such that  KL_task ≤ ε  and  KL_benign ≤ ε                    ε = 0.02 nat per token
//! ```
//!
//! `CE` and `KL` are means over rows of means over answer tokens. It learns whole refusals, where calibration of a gene looks at how
//! they open: on openings alone it went further from the target on the lab's dev split (benches/results/recipe-3/calibration-dev). Task
//! and benign shots enter by divergence from the target, not by cross-entropy: they are there to change nothing, and
//! their answers are not taught again. Without benign shots their term and their limit fall away.
//!
//! The rate rises over a twentieth of the steps and falls to zero (300 steps at most; 3e-4 or 1e-3, or whichever of
//! the two [`best_rate`] takes). Every iterate is measured where its gradient is taken. Training ends
//!
//! * before it begins, where the safety loss is at most δ = 0.001;
//! * at the first iterate within the limit whose safety loss is at most δ;
//! * after `patience` iterates in a row above the limit;
//! * when the steps are spent.
//!
//! What is returned is the best of two: the iterate of least safety loss within the limit, and the iterate of least safety
//! loss above it, scaled towards zero by bisection until it is within (as calibration does with what ends above). Both are
//! measured again as they are returned. The LoRA that adds nothing is within any limit, so there always is a result, and
//! never one above the limit. The loss, the early stop and the scaling back are ours.
//!
//! The start depends on the seed and the module's name only; the result does not depend on threads.
//!
//! Not here: choosing shots, judging answers. Folders are [`FewShotLora`]'s.

mod method;

pub use method::FewShotLora;
pub(crate) use method::INFO;

pub use crate::knob::Measured;

use crate::knob::choose;
use crate::lora::{ModuleFactors, Schedule, Trained};
use crate::run_error::RunError;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Instant;
use transformer::optimise::{AdamW, Optimiser};
use transformer::{AnswerBatch, Attachments, Model, ModelError, ModuleKind, Row};

/// Token rows to train on, or to choose by.
#[derive(Debug, Clone, Default)]
pub struct Shots {
    /// Harmful prompts, each with a refusal.
    pub safety: Vec<Row>,
    /// Rows of the target's task.
    pub task: Vec<Row>,
    /// Harmless requests like the harmful ones in form; may be empty.
    pub benign: Vec<Row>,
}

/// How to train, and what may be spent.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Rank of every module.
    pub rank: usize,
    /// Scale times rank.
    pub alpha: f64,
    /// Largest learning rate.
    pub rate: f64,
    /// ε: limit on KL, nat per token, on the task shots and again on the benign shots.
    pub max_kl: f64,
    /// δ: safety loss that is enough, nat per token.
    pub delta: f64,
    /// Weight of the divergences in the loss.
    pub penalty: f64,
    /// Optimiser steps.
    pub steps_max: usize,
    /// Iterates in a row above the limit that end the training.
    pub patience: usize,
    /// Of the random start.
    pub seed: u64,
    /// Modules of every layer that get factors.
    pub modules: Vec<ModuleKind>,
}

/// The two learning rates that are tried.
pub const RATES: [f64; 2] = [3e-4, 1e-3];

impl Default for Options {
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 16.0,
            rate: RATES[0],
            max_kl: 0.02,
            delta: 0.001,
            penalty: 1.0,
            steps_max: 300,
            patience: 50,
            seed: 0,
            modules: ModuleKind::ALL.to_vec(),
        }
    }
}

impl Options {
    fn check(&self) -> Result<(), RunError> {
        RunError::check_positive("rank", self.rank as f64)?;
        RunError::check_positive("alpha", self.alpha)?;
        RunError::check_positive("max-kl", self.max_kl)?;
        RunError::check_positive("delta", self.delta)?;
        RunError::check_not_negative("penalty", self.penalty)?;
        RunError::check_positive("patience", self.patience as f64)
    }
}

/// Why training ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stopped {
    /// The target was safe already: nothing was trained.
    AlreadySafe,
    /// The safety asked for was reached within the limit.
    Safe,
    /// Too many iterates in a row above the limit.
    Limit,
    /// The steps were spent.
    Steps,
}

/// What was reached, and at what price.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Safety loss of the target, nat per token.
    pub loss_before: f64,
    /// What the result does on the shots.
    pub reached: Measured,
    /// Learning rate.
    pub rate: f64,
    /// Seed of the start.
    pub seed: u64,
    /// Optimiser steps made.
    pub steps: usize,
    /// Steps after which the result stood.
    pub step: usize,
    /// What the iterate was scaled by to be within the limit; 1 where it was within.
    pub scale: f64,
    /// Why training ended.
    pub stopped: Stopped,
    /// Wall time.
    pub seconds: f64,
}

/// A trained LoRA over a target.
#[derive(Debug, Clone, PartialEq)]
pub struct FewShot {
    /// By layer and module; what they add to the target, scales folded in.
    pub factors: Vec<ModuleFactors>,
    /// What was reached.
    pub report: Report,
}

struct Set {
    batch: AnswerBatch,
    reference: Arc<Vec<f32>>,
}

/// Shots with the target's own answers to measure divergence from.
struct Meter<'a> {
    model: &'a Model,
    base: &'a Attachments,
    safety: AnswerBatch,
    task: Set,
    benign: Option<Set>,
}

/// The three numbers of a point as tensors: gradients can be asked for.
struct Point {
    loss: Tensor,
    task: Tensor,
    benign: Option<Tensor>,
    values: Measured,
}

impl<'a> Meter<'a> {
    fn new(model: &'a Model, base: &'a Attachments, shots: &Shots, pad: u32) -> Result<Self, RunError> {
        RunError::check_rows("safety", &shots.safety)?;
        RunError::check_rows("task", &shots.task)?;
        if !shots.benign.is_empty() {
            RunError::check_rows("benign", &shots.benign)?;
        }
        let set = |rows: &[Row]| -> Result<Set, RunError> {
            let batch = AnswerBatch::new(rows, pad);
            let reference = batch.reference(model, base)?;
            Ok(Set { batch, reference })
        };
        Ok(Self {
            model,
            base,
            safety: AnswerBatch::new(&shots.safety, pad),
            task: set(&shots.task)?,
            benign: if shots.benign.is_empty() { None } else { Some(set(&shots.benign)?) },
        })
    }

    /// `at` holds the base's attachments too.
    fn point(&self, at: &Attachments, step: usize) -> Result<Point, RunError> {
        let number = |t: &Tensor, what| -> Result<f64, RunError> {
            let x = f64::from(t.to_vec1::<f32>()?[0]);
            // A KL of nothing may round to just below zero.
            if x.is_finite() { Ok(x.max(0.0)) } else { Err(RunError::Diverged { what, step }) }
        };
        let loss = self.safety.cross_entropy(self.model, at)?;
        let task = self.task.batch.kl(self.model, at, &self.task.reference)?;
        let benign = self.benign.as_ref().map(|s| s.batch.kl(self.model, at, &s.reference)).transpose()?;
        let values = Measured {
            loss: number(&loss, "safety")?,
            kl_task: number(&task, "task")?,
            kl_benign: benign.as_ref().map(|t| number(t, "benign")).transpose()?,
        };
        Ok(Point { loss, task, benign, values })
    }

    fn of_factors(&self, factors: &[ModuleFactors], step: usize) -> Result<Measured, RunError> {
        let mut at = self.base.clone();
        at.extend(&ModuleFactors::attachments(factors)?);
        Ok(self.point(&at, step)?.values)
    }
}

/// Loss and divergences of factors over the target `model` with `base` attached.
pub fn measure(
    model: &Model,
    base: &Attachments,
    factors: &[ModuleFactors],
    shots: &Shots,
    pad: u32,
) -> Result<Measured, RunError> {
    Meter::new(model, base, shots, pad)?.of_factors(factors, 0)
}

struct Iterate {
    factors: Vec<ModuleFactors>,
    values: Measured,
    step: usize,
    scale: f64,
}

/// Trains a LoRA over the target: `model` with `base` attached.
pub fn few_shot(
    model: &Model,
    base: &Attachments,
    shots: &Shots,
    options: &Options,
    pad: u32,
) -> Result<FewShot, RunError> {
    few_shot_while(model, base, shots, options, pad, &mut |_| true)
}

/// The same while `go_on`, asked before each step with the steps made, says so; else it ends as [`RunError::Stopped`].
pub fn few_shot_while(
    model: &Model,
    base: &Attachments,
    shots: &Shots,
    options: &Options,
    pad: u32,
    go_on: &mut dyn FnMut(usize) -> bool,
) -> Result<FewShot, RunError> {
    let began = Instant::now();
    options.check()?;
    let meter = Meter::new(model, base, shots, pad)?;
    let trained = Trained::new(model, &options.modules, options.rank, options.alpha, options.seed, base)?;
    let schedule = Schedule { steps: options.steps_max, rows: shots.safety.len(), rate: options.rate };
    schedule.check()?;
    let mut optimiser = Optimiser::new(trained.vars(), AdamW::default());

    let (mut within, mut above): (Option<Iterate>, Option<Iterate>) = (None, None);
    let (mut steps, mut in_a_row, mut loss_before) = (0, 0, f64::NAN);
    let stopped = loop {
        if !go_on(steps) {
            return Err(RunError::Stopped);
        }
        let point = meter.point(trained.attachments(), steps)?;
        let values = point.values;
        if steps == 0 {
            loss_before = values.loss;
        }
        let is_within = values.kl_max() <= options.max_kl;
        let best = if is_within { &mut within } else { &mut above };
        if best.as_ref().is_none_or(|b| values.loss < b.values.loss) {
            *best = Some(Iterate { factors: trained.factors()?, values, step: steps, scale: 1.0 });
        }
        in_a_row = if is_within { 0 } else { in_a_row + 1 };
        if is_within && values.loss <= options.delta {
            break if steps == 0 { Stopped::AlreadySafe } else { Stopped::Safe };
        }
        if in_a_row >= options.patience {
            break Stopped::Limit;
        }
        if steps == options.steps_max {
            break Stopped::Steps;
        }
        let mut moved = point.task;
        if let Some(benign) = point.benign {
            moved = (moved + benign)?;
        }
        let objective = (point.loss + (moved * options.penalty)?)?;
        let grads = optimiser.gradients(&objective.backward()?)?;
        optimiser.step(grads, schedule.rate_at(steps)).map_err(ModelError::from)?;
        steps += 1;
    };

    let mut result: Option<Iterate> = None;
    for iterate in [within, above].into_iter().flatten() {
        let settled = settle(&meter, iterate, options.max_kl)?;
        if result.as_ref().is_none_or(|r| settled.values.loss < r.values.loss) {
            result = Some(settled);
        }
    }
    let Iterate { factors, values, step, scale } = result.ok_or(RunError::NoModule)?;
    let report = Report {
        loss_before,
        reached: values,
        rate: options.rate,
        seed: options.seed,
        steps,
        step,
        scale,
        stopped,
        seconds: began.elapsed().as_secs_f64(),
    };
    Ok(FewShot { factors, report })
}

/// The iterate, measured as it will be returned; scaled towards zero where it is above the limit.
fn settle(meter: &Meter<'_>, iterate: Iterate, max_kl: f64) -> Result<Iterate, RunError> {
    let at = |scale: f64| -> Result<Iterate, RunError> {
        let mut factors = iterate.factors.clone();
        for f in &mut factors {
            f.b.iter_mut().for_each(|b| *b = (f64::from(*b) * scale) as f32);
        }
        let values = meter.of_factors(&factors, iterate.step)?;
        Ok(Iterate { factors, values, step: iterate.step, scale })
    };
    let whole = at(1.0)?;
    if whole.values.kl_max() <= max_kl {
        return Ok(whole);
    }
    let mut held = at(0.0)?;
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..8 {
        let middle = at(0.5 * (low + high))?;
        if middle.values.kl_max() <= max_kl {
            low = middle.scale;
            held = middle;
        } else {
            high = middle.scale;
        }
    }
    Ok(held)
}

/// Trains at each of `rates` and takes one by [`choose`], on the shots themselves: all that was given. The reports are of
/// every rate in its order; their time is part of the method's price. `go_on` as in [`few_shot_while`].
pub fn best_rate(
    model: &Model,
    base: &Attachments,
    shots: &Shots,
    rates: &[f64],
    options: &Options,
    pad: u32,
    go_on: &mut dyn FnMut(usize) -> bool,
) -> Result<(FewShot, Vec<Report>), RunError> {
    let mut tried = Vec::with_capacity(rates.len());
    for &rate in rates {
        tried.push(few_shot_while(model, base, shots, &Options { rate, ..options.clone() }, pad, go_on)?);
    }
    let reports: Vec<Report> = tried.iter().map(|t| t.report).collect();
    let measured: Vec<Measured> = reports.iter().map(|r| r.reached).collect();
    let need = "at least one learning rate";
    let best = choose(&measured, options.max_kl, options.delta);
    let best = best.ok_or(RunError::Setting { name: "rates", value: 0.0, need })?;
    Ok((tried.swap_remove(best), reports))
}
