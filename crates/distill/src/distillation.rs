//! One gene from several separate drifts.
//!
//! A *drift* is the aligned model after an ordinary fine-tune that happened to wear its safety off. The same factors hang
//! on every drift and are trained until each answers harmful requests as the aligned model does, and moves nowhere else:
//!
//! ```text
//! L = E_k [ E_{x∈safety} mean_t τ²·KL( p_a ‖ p_{d_k⊕gene} )  +  λ_keep · E_{x∈tasks ∪ benign} mean_t KL( p_{d_k} ‖ p_{d_k⊕gene} )
//!         + λ_margin · E_{x∈safety} max(0, m − refusal log-odds of d_k⊕gene at the first answer token)
//!         + λ_hid · Σ_l E ‖h_l^a − h_l^{d_k⊕gene}‖² / ‖h_l^a‖² ]  +  λ_wd · Σ_m ‖B_m A_m‖_F²
//! ```
//!
//! Most of the task rows are of the drift's own task `k`, a part is of the *other* drifts' tasks: a target's task is none of the drifts', and what is kept of tasks a
//! drift was not trained on is what is kept of a target's.
//!
//! That factors are refined by an aligned-degraded distillation loss is reported of SafeGene (arXiv 2606.06519); this loss
//! and that the degraded models be drifts are our own. So is that the aligned model takes its turn among them
//! (`d_k = θ_a`, keep rows as for a drift each time another): factors that were only ever trained where safety is gone
//! push a target that still refuses into refusing everything. Refusal log-odds are `log P(R) − log(1 − P(R))`, R the first
//! tokens of refusals. Teacher and drifts are frozen; one model a step; AdamW on f32 factors, clipped, linear decay;
//! activations by block ([`transformer::recompute`]).
//!
//! A step depends on the seed and its own number only, so a run that was interrupted goes on to the same factors.
//!
//! Not here: files, gates on what a drift must be like, choosing rows.

use crate::gene::Frozen;
use candle_core::{Device, Tensor, Var};
use rand::RngExt;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::cell::Cell;
use std::sync::Arc;
use transformer::loss::log_probabilities;
use transformer::optimise::{AdamW, Moments, Optimiser};
use transformer::recompute::gradients;
use transformer::{AnswerBatch, Attachment, Attachments, Model, ModelError, Row, Taps, ops};

pub use transformer::ModuleFactors;

/// Why nothing was distilled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DistillError {
    /// A model could not be run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// There is no drift.
    #[error("there is no drift to distil on")]
    NoDrift,
    /// A kind of rows is empty.
    #[error("there are no {what} rows{}", drift.as_ref().map(|d| format!(" for `{d}`")).unwrap_or_default())]
    NoRows {
        /// Which kind.
        what: &'static str,
        /// Whose, if they are one drift's.
        drift: Option<String>,
    },
    /// An option makes no sense.
    #[error("`{name}` is {value}; it must be {need}")]
    Setting {
        /// Name of the option.
        name: &'static str,
        /// Its value.
        value: f64,
        /// What it must be.
        need: &'static str,
    },
    /// The loss is not finite.
    #[error(
        "the loss of step {step} on `{drift}` is not finite; a smaller rate may help, or its weights are unsound"
    )]
    NotFinite {
        /// The step, from 1.
        step: usize,
        /// The drift.
        drift: String,
    },
    /// No token opens a refusal, or all do.
    #[error("none of the refusal openings begins with a token of this model's tokenizer")]
    NoRefusalToken,
    /// A saved state is of another run.
    #[error("the saved state holds {found} values, this run needs {need}")]
    OtherState {
        /// Values of all factors.
        need: usize,
        /// Values in the state.
        found: usize,
    },
    /// The caller gave up.
    #[error("stopped after {0} steps; run it again to go on")]
    Stopped(usize),
}

impl From<candle_core::Error> for DistillError {
    fn from(e: candle_core::Error) -> Self {
        Self::Model(e.into())
    }
}

/// A degraded model that looks like a target.
#[derive(Debug, Clone)]
pub struct Drift<'a> {
    /// For messages.
    pub name: String,
    /// The model.
    pub frozen: Frozen<'a>,
    /// Rows of its own task, with answers: what must not move.
    pub task: Vec<Row>,
}

/// Rows that all drifts share.
#[derive(Debug, Clone, Copy)]
pub struct CommonRows<'a> {
    /// Harmful prompts with the teacher's answers.
    pub safety: &'a [Row],
    /// Harmless prompts with answers.
    pub benign: &'a [Row],
}

/// Weights of the loss and the schedule.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Steps; each sees one drift, or the aligned model.
    pub steps: usize,
    /// Safety rows in a step, and as many rows to keep.
    pub rows: usize,
    /// First learning rate; falls linearly to zero.
    pub rate: f64,
    /// Temperature τ of the safety divergence.
    pub tau: f64,
    /// λ_keep.
    pub keep: f64,
    /// λ_margin.
    pub margin_weight: f64,
    /// Margin m, nats.
    pub margin: f64,
    /// λ_hid.
    pub hidden: f64,
    /// λ_wd.
    pub decay: f64,
    /// Turns of the aligned model itself in each round of the drifts; 0 for none. Without one, the gene makes a target
    /// that is safe already refuse everything.
    pub aligned_turns: usize,
    /// Share of the rows to keep that are of the drift's own task.
    pub own_share: f64,
    /// Share of the rows to keep that are of the other drifts' tasks, of its own where there is no other; what is left is benign.
    pub other_share: f64,
    /// Seed of the choice of rows and of fresh factors.
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            steps: 300,
            rows: 16,
            rate: 1e-3,
            tau: 1.0,
            keep: 30.0,
            margin_weight: 1.0,
            margin: 7.0,
            hidden: 0.0,
            decay: 0.0,
            aligned_turns: 1,
            own_share: 0.48,
            other_share: 0.12,
            seed: 0,
        }
    }
}

/// More turns of the aligned model would leave hardly any to the drifts.
const TURNS_MAX: usize = 16;

impl Settings {
    fn check(&self) -> Result<(), DistillError> {
        let bad = |name, value, need| Err(DistillError::Setting { name, value, need });
        for (name, value) in [("rate", self.rate), ("tau", self.tau)] {
            if !(value.is_finite() && value > 0.0) {
                return bad(name, value, "a positive number");
            }
        }
        for (name, value) in [
            ("keep", self.keep),
            ("margin-weight", self.margin_weight),
            ("hidden", self.hidden),
            ("decay", self.decay),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return bad(name, value, "zero or more");
            }
        }
        if self.aligned_turns > TURNS_MAX {
            return bad("aligned-turns", self.aligned_turns as f64, "at most 16");
        }
        if !self.margin.is_finite() {
            return bad("margin", self.margin, "finite");
        }
        for (name, value) in [("own-share", self.own_share), ("other-share", self.other_share)] {
            if !(0.0..=1.0).contains(&value) {
                return bad(name, value, "between 0 and 1");
            }
        }
        // Shares that make up all of the rows may miss 1 by a rounding.
        let both = self.own_share + self.other_share;
        if both > 1.0 + 1e-9 {
            return bad("own-share + other-share", both, "at most 1");
        }
        for (name, value) in [("steps", self.steps), ("rows", self.rows)] {
            if value == 0 {
                return bad(name, 0.0, "at least 1");
            }
        }
        Ok(())
    }
}

/// The parts of a loss, each before its weight.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Parts {
    /// Divergence from the teacher on safety rows, nat per token (times τ²).
    pub safety: f64,
    /// Divergence from the drift on the rows to keep, nat per token.
    pub keep: f64,
    /// What refusal log-odds lack of the margin, nats.
    pub margin: f64,
    /// Relative squared distance of hidden states at answer positions, summed over layers; 0 where it has no weight.
    pub hidden: f64,
}

impl Parts {
    /// The weighted sum, without the decay.
    pub fn loss(&self, s: &Settings) -> f64 {
        self.safety + s.keep * self.keep + s.margin_weight * self.margin + s.hidden * self.hidden
    }

    fn mean(all: &[Parts]) -> Parts {
        let n = all.len().max(1) as f64;
        let sum = |f: fn(&Parts) -> f64| all.iter().map(f).sum::<f64>() / n;
        Parts {
            safety: sum(|p| p.safety),
            keep: sum(|p| p.keep),
            margin: sum(|p| p.margin),
            hidden: sum(|p| p.hidden),
        }
    }
}

/// What a run is after some steps; enough to go on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Steps done.
    pub step: usize,
    /// Values and moments of the factors.
    pub moments: Moments,
    /// Parts of the loss on held-out rows at the start.
    pub start: Parts,
}

/// Hears how a run goes.
pub trait Watch {
    /// `step` of `steps` is done, on drift `drift`.
    fn step(&mut self, step: usize, steps: usize, drift: &str, parts: &Parts);
    /// The state after a step, if the caller wants it; `true` ends the run with [`DistillError::Stopped`].
    fn state(
        &mut self,
        step: usize,
        state: &dyn Fn() -> Result<State, DistillError>,
    ) -> Result<bool, DistillError>;
}

/// Nobody listens.
#[derive(Debug, Clone, Copy)]
pub struct Unwatched;

impl Watch for Unwatched {
    fn step(&mut self, _: usize, _: usize, _: &str, _: &Parts) {}
    fn state(&mut self, _: usize, _: &dyn Fn() -> Result<State, DistillError>) -> Result<bool, DistillError> {
        Ok(false)
    }
}

/// Factors and what they reach.
#[derive(Debug, Clone)]
pub struct Distilled {
    /// Factors by layer and module.
    pub factors: Vec<ModuleFactors>,
    /// Parts on held-out rows before training, mean over drifts.
    pub start: Parts,
    /// The same after it.
    pub end: Parts,
}

/// Fresh factors for every linear module: `A` normal with deviation `1/√in`, `B` zero.
pub fn fresh_factors(model: &Model, rank: usize, seed: u64) -> Vec<ModuleFactors> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x6765_6e65);
    let normal = |rng: &mut ChaCha8Rng| -> f32 {
        let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
        ((-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()) as f32
    };
    let mut out = Vec::new();
    for layer in 0..model.architecture().layers {
        for module in model.architecture().modules() {
            let (kind, rows, cols) = (module.kind, module.out, module.into);
            let rank = rank.min(rows).min(cols);
            let std = 1.0 / (cols as f32).sqrt();
            let a = (0..rank * cols).map(|_| normal(&mut rng) * std).collect();
            out.push(ModuleFactors { layer, kind, rank, b: vec![0.0; rows * rank], a });
        }
    }
    out
}

struct Trained {
    factors: Vec<ModuleFactors>,
    vars: Vec<(Var, Var)>,
    attachments: Attachments,
}

impl Trained {
    fn new(factors: Vec<ModuleFactors>) -> Result<Self, DistillError> {
        let dev = &Device::Cpu;
        let one = Tensor::from_slice(&[1f32], 1, dev)?;
        let (mut vars, mut attachments) = (Vec::new(), Attachments::none());
        for f in &factors {
            let rank = f.rank;
            let b = Var::from_tensor(&Tensor::from_slice(&f.b, (f.b.len() / rank, rank), dev)?)?;
            let a = Var::from_tensor(&Tensor::from_slice(&f.a, (rank, f.a.len() / rank), dev)?)?;
            let at = Attachment { a: a.as_tensor().clone(), b: b.as_tensor().clone(), scale: one.clone() };
            attachments.add(f.layer, f.kind, at);
            vars.push((b, a));
        }
        Ok(Self { factors, vars, attachments })
    }

    fn flat(&self) -> Vec<Var> {
        self.vars.iter().flat_map(|(b, a)| [b.clone(), a.clone()]).collect()
    }

    /// Adds the gradient of `λ Σ ‖BA‖_F²`: `2λ B (A Aᵀ)` and `2λ (Bᵀ B) A`.
    fn decay(&self, weight: f64, grads: &mut [Vec<f32>]) -> Result<(), DistillError> {
        for ((b, a), pair) in self.vars.iter().zip(grads.chunks_mut(2)) {
            let (b, a) = (b.as_tensor().detach(), a.as_tensor().detach());
            let of_b = b.matmul(&a.matmul(&a.t()?)?)?;
            let of_a = b.t()?.contiguous()?.matmul(&b)?.matmul(&a)?;
            for (grad, more) in pair.iter_mut().zip([of_b, of_a]) {
                for (g, m) in grad.iter_mut().zip(more.flatten_all()?.to_vec1::<f32>()?) {
                    *g += (2.0 * weight) as f32 * m;
                }
            }
        }
        Ok(())
    }

    fn take(self) -> Result<Vec<ModuleFactors>, DistillError> {
        let Self { mut factors, vars, .. } = self;
        for (f, (b, a)) in factors.iter_mut().zip(&vars) {
            f.b = b.flatten_all()?.to_vec1()?;
            f.a = a.flatten_all()?.to_vec1()?;
        }
        Ok(factors)
    }
}

/// What comes out of each block.
fn outputs(taps: &Taps<'_>) -> candle_core::Result<Vec<Tensor>> {
    taps.inputs.iter().zip(&taps.outputs).map(|(i, o)| i + o).collect()
}

/// Mean over positions of `‖y − x‖² / ‖x‖²`: `[1]`.
fn relative_distance(y: &Tensor, x: &Tensor) -> candle_core::Result<Tensor> {
    let apart = (y - x)?.sqr()?.sum(1)?;
    let norm = x.sqr()?.sum(1)?.maximum(1e-12)?;
    (apart / norm)?.mean_all()?.reshape(1)
}

struct Run<'a> {
    teacher: &'a Frozen<'a>,
    settings: &'a Settings,
    refusal: Arc<Vec<bool>>,
    pad: u32,
}

impl Run<'_> {
    /// Parts on safety rows, with gradients if `vars` are given.
    fn safety(
        &self,
        frozen: &Frozen<'_>,
        rows: &[Row],
        student: &Attachments,
        vars: &[Var],
    ) -> Result<(Parts, Vec<Vec<f32>>), DistillError> {
        let s = self.settings;
        let batch = AnswerBatch::new(rows, self.pad);
        let mut taps = (s.hidden > 0.0).then(Taps::default);
        let hidden = self.teacher.model.hidden(batch.batch(), &self.teacher.own, None, taps.as_mut())?;
        let logits = self.teacher.model.logits(&hidden, batch.predictors())?.detach();
        let wanted = log_probabilities(&(logits / s.tau)?)?;
        let parts = Cell::new(Parts::default());
        let number =
            |t: &Tensor| -> Result<f64, ModelError> { Ok(f64::from(t.sum_all()?.to_scalar::<f32>()?)) };
        let loss = |logits: &Tensor| -> Result<Tensor, ModelError> {
            let kl = (batch.kl_of(&(logits / s.tau)?, &wanted)? * (s.tau * s.tau))?;
            let odds = ops::log_odds(&batch.first_logits(logits)?, &self.refusal)?;
            let lack = odds.affine(-1.0, s.margin)?.relu()?.mean_all()?.reshape(1)?;
            parts.set(Parts { safety: number(&kl)?, margin: number(&lack)?, ..parts.get() });
            Ok((kl + (lack * s.margin_weight)?)?)
        };
        let wanted_states = taps.map(|t| outputs(&t)).transpose()?;
        let distance = |layer: usize, y: &Tensor| -> Result<Tensor, ModelError> {
            let wanted = wanted_states.as_ref().map(|o| o[layer].detach()).unwrap_or(y.detach());
            let relative = relative_distance(&batch.at_predictors(y)?, &batch.at_predictors(&wanted)?)?;
            parts.set(Parts { hidden: parts.get().hidden + number(&relative)?, ..parts.get() });
            Ok((relative * s.hidden)?)
        };
        if vars.is_empty() {
            let mut taps = wanted_states.is_some().then(Taps::default);
            let states = frozen.model.hidden(batch.batch(), student, None, taps.as_mut())?;
            loss(&frozen.model.logits(&states, batch.predictors())?)?;
            for (layer, y) in taps.map(|t| outputs(&t)).transpose()?.iter().flatten().enumerate() {
                distance(layer, y)?;
            }
            return Ok((parts.get(), Vec::new()));
        }
        let hidden: Option<transformer::recompute::HiddenLoss<'_>> =
            if s.hidden > 0.0 { Some(&distance) } else { None };
        let (_, grads) = gradients(frozen.model, &batch, student, vars, &loss, hidden)?;
        Ok((parts.get(), grads))
    }

    /// Divergence from the drift itself on the rows to keep, with gradients if `vars` are given.
    fn keep(
        &self,
        frozen: &Frozen<'_>,
        rows: &[Row],
        student: &Attachments,
        vars: &[Var],
    ) -> Result<(f64, Vec<Vec<f32>>), DistillError> {
        let model = frozen.model;
        let batch = AnswerBatch::new(rows, self.pad);
        let itself = batch.reference(model, &frozen.own)?;
        if vars.is_empty() {
            let kl = batch.kl(model, student, &itself)?;
            return Ok((f64::from(kl.to_vec1::<f32>()?[0]), Vec::new()));
        }
        let loss = |logits: &Tensor| batch.kl_of(logits, &itself);
        Ok(gradients(model, &batch, student, vars, &loss, None)?)
    }

    /// Mean over drifts of the parts on held-out rows.
    fn held_out(
        &self,
        drifts: &[Drift<'_>],
        rows: CommonRows<'_>,
        gene: &Attachments,
    ) -> Result<Parts, DistillError> {
        let gene = gene.detached();
        let mut all = Vec::new();
        for drift in drifts {
            let student = drift.frozen.with(&gene);
            let (mut parts, _) = self.safety(&drift.frozen, rows.safety, &student, &[])?;
            let kept: Vec<Row> = drift.task.iter().chain(rows.benign).cloned().collect();
            parts.keep = self.keep(&drift.frozen, &kept, &student, &[])?.0;
            all.push(parts);
        }
        Ok(Parts::mean(&all))
    }
}

fn pick(list: &[Row], rng: &mut ChaCha8Rng) -> Row {
    list[rng.random_range(0..list.len())].clone()
}

/// Where the next row to keep is from, in a turn of the drift whose task is `tasks[own]`.
fn list_to_keep<'a>(
    s: &Settings,
    tasks: &[&'a [Row]],
    own: usize,
    benign: &'a [Row],
    rng: &mut ChaCha8Rng,
) -> &'a [Row] {
    let share = rng.random::<f64>();
    if share >= s.own_share + s.other_share {
        benign
    } else if share < s.own_share || tasks.len() == 1 {
        tasks[own]
    } else {
        tasks[(own + rng.random_range(1..tasks.len())) % tasks.len()]
    }
}

/// Trains `factors` on `drifts`. `held_out` rows are only measured, at the start and at the end: its drifts hold the
/// task rows. `refusal` are the first tokens of refusals. `state` goes on with an earlier run of the same inputs.
pub fn distill(
    teacher: &Frozen<'_>,
    drifts: &[Drift<'_>],
    rows: CommonRows<'_>,
    held_out: (&[Drift<'_>], CommonRows<'_>),
    factors: Vec<ModuleFactors>,
    settings: &Settings,
    (refusal, pad): (&[u32], u32),
    state: Option<State>,
    watch: &mut dyn Watch,
) -> Result<Distilled, DistillError> {
    settings.check()?;
    if drifts.is_empty() {
        return Err(DistillError::NoDrift);
    }
    for (list, what) in [
        (rows.safety, "safety"),
        (rows.benign, "benign"),
        (held_out.1.safety, "held-out safety"),
        (held_out.1.benign, "held-out benign"),
    ] {
        if list.is_empty() {
            return Err(DistillError::NoRows { what, drift: None });
        }
    }
    if let Some(d) = drifts.iter().chain(held_out.0).find(|d| d.task.is_empty()) {
        return Err(DistillError::NoRows { what: "task", drift: Some(d.name.clone()) });
    }
    let inside = ops::token_set(refusal, teacher.model.architecture().vocab);
    if !inside.contains(&true) || !inside.contains(&false) {
        return Err(DistillError::NoRefusalToken);
    }
    let run = Run { teacher, settings, refusal: inside, pad };
    let trained = Trained::new(factors)?;
    let vars = trained.flat();
    let mut optimiser = Optimiser::new(vars.clone(), AdamW::default());
    let (first, start) = match state {
        Some(state) => {
            if !optimiser.restore(&state.moments)? {
                let found = state.moments.values.iter().map(|v| v[0].len()).sum();
                let need = vars.iter().map(|v| v.elem_count()).sum();
                return Err(DistillError::OtherState { need, found });
            }
            (state.step, state.start)
        }
        None => (0, run.held_out(held_out.0, held_out.1, &trained.attachments)?),
    };
    let turns = drifts.len() + settings.aligned_turns;
    for step in first..settings.steps {
        let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
        rng.set_stream(step as u64 + 1);
        let (round, turn) = (step / turns, step % turns);
        // In the turns behind those of the drifts the aligned model is the student, on rows of a drift each time another.
        let (name, frozen, own) = match drifts.get(turn) {
            Some(drift) => (drift.name.as_str(), &drift.frozen, turn),
            None => {
                let nth = round * settings.aligned_turns + (turn - drifts.len());
                ("aligned", teacher, nth % drifts.len())
            }
        };
        let safety: Vec<Row> = (0..settings.rows).map(|_| pick(rows.safety, &mut rng)).collect();
        let tasks: Vec<&[Row]> = drifts.iter().map(|d| d.task.as_slice()).collect();
        let keep: Vec<Row> = (0..settings.rows)
            .map(|_| pick(list_to_keep(settings, &tasks, own, rows.benign, &mut rng), &mut rng))
            .collect();
        let student = frozen.with(&trained.attachments);
        let (a, b) = rayon::join(
            || run.safety(frozen, &safety, &student, &vars),
            || run.keep(frozen, &keep, &student, &vars),
        );
        let ((mut parts, mut grads), (kept, other)) = (a?, b?);
        parts.keep = kept;
        for (g, o) in grads.iter_mut().zip(&other) {
            for (g, o) in g.iter_mut().zip(o) {
                *g += settings.keep as f32 * o;
            }
        }
        if settings.decay > 0.0 {
            trained.decay(settings.decay, &mut grads)?;
        }
        if !parts.loss(settings).is_finite() || !grads.iter().flatten().all(|g| g.is_finite()) {
            return Err(DistillError::NotFinite { step: step + 1, drift: name.into() });
        }
        optimiser.step(grads, settings.rate * (1.0 - step as f64 / settings.steps as f64))?;
        watch.step(step + 1, settings.steps, name, &parts);
        let now = || Ok(State { step: step + 1, moments: optimiser.moments()?, start });
        if watch.state(step + 1, &now)? {
            return Err(DistillError::Stopped(step + 1));
        }
    }
    let end = run.held_out(held_out.0, held_out.1, &trained.attachments)?;
    Ok(Distilled { factors: trained.take()?, start, end })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_to_keep_come_in_their_shares() {
        let rows = |id: u32| vec![Row { prompt: vec![id], answer: vec![0] }];
        let lists = [0, 1, 2, 3].map(rows);
        let tasks: Vec<&[Row]> = lists[..3].iter().map(Vec::as_slice).collect();
        let settings = Settings { own_share: 0.5, other_share: 0.2, ..Settings::default() };
        let count = |tasks: &[&[Row]], own: usize| -> [usize; 4] {
            let mut rng = ChaCha8Rng::seed_from_u64(1);
            let mut seen = [0; 4];
            for _ in 0..10_000 {
                let list = list_to_keep(&settings, tasks, own, &lists[3], &mut rng);
                seen[list[0].prompt[0] as usize] += 1;
            }
            seen
        };
        // Five standard deviations of a count are at most 250.
        let near = |seen: [usize; 4], want: [usize; 4]| {
            assert!(
                seen.iter().zip(want).all(|(s, w)| s.abs_diff(w) <= w.min(250)),
                "{seen:?}, not {want:?}"
            );
        };
        near(count(&tasks, 1), [1000, 5000, 1000, 3000]);
        near(count(&tasks, 2), [1000, 1000, 5000, 3000]);
        // A drift without others keeps more of its own task.
        near(count(&tasks[..1], 0), [7000, 0, 0, 3000]);
    }
}
