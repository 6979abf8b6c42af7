//! How a LoRA is trained that cannot write into the directions of safety: SaLoRA (ICLR 2025, arXiv 2501.01765).
//!
//! For one linear module `W [out, in]` of the *aligned* model:
//!
//! ```text
//! V_s = top r_s right singular vectors of X_safe Wᵀ      [out, r_s]    C = I − V_s V_sᵀ     (fixed)
//! V_t = top r_t right singular vectors of X_task Wᵀ      [out, r_t]
//! W ≈ U S Vᵀ, its best rank r:   B₀ = V_t V_tᵀ U √S,   A₀ = √S Vᵀ
//! forward:  (W − C B₀ A₀) x + C B A x,   A and B trained from A₀ and B₀
//! ```
//!
//! so training starts at `W`, and at no time do `B` and `A` change the outputs along `V_s`. `X` are the inputs of the module
//! at the answers' own tokens (or at all: [`Settings::positions`]), 128 rows of each kind; `V` come from the Gram matrix of the outputs, `W (Σ x xᵀ) Wᵀ`, whose
//! eigenvectors they are. A bias is left out of the outputs.
//!
//! What the paper calls a task-specific start is taken from the authors' code (`homles11/SaLoRA`, read for its arithmetic):
//! the directions come from *activations* of the module on task rows and from `W` itself, no gradient is used. Rank
//! 16, r_s = r_t = 32, scale 1 (α = r), AdamW, as there.
//!
//! What is ours:
//!
//! * All seven linear modules instead of `q` and `v`, so that a SaLoRA holds what the LoRA of a target holds; see
//!   [`Settings::modules`].
//! * Ranks are cut to what there is: `r ≤ min(out, in)`, and directions that vanish to rounding are dropped.
//!   Where safety fills the whole output space, `C = 0` and the module is not trained at all; [`Start::free`] tells.
//! * The shift is attached, `[C·B, −C·B₀]·[A; A₀]`, and `W` stays as it is. That is the same sum, it is what a stock base needs
//!   (the trained pair alone fits the shifted `W` only, while the authors' export is `C·B` and `A` over a base that must be
//!   shifted first), and `W − C B₀ A₀` is never rounded to a narrow type. The two halves nearly cancel: store them in f32.
//! * `C·B = B − V_s(V_sᵀB)`: no `out × out` matrix.
//!
//! Not here: which rows, when to stop. Folders are [`SaLora`]'s.

mod method;

pub(crate) use method::INFO;
pub use method::SaLora;

use crate::gram::{Gram, Positions, grams};
use crate::lora::{ModuleFactors, Schedule};
use crate::run_error::RunError;
use candle_core::{Device, Tensor, Var};
use faer::{Mat, MatRef, Side};
use rayon::prelude::*;
use transformer::optimise::{AdamW, Optimiser};
use transformer::{AnswerBatch, Attachment, Attachments, Model, ModelError, ModuleKind, Row};

/// Sizes of a SaLoRA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Rank of the trained pair; the export has twice this.
    pub rank: usize,
    /// Directions of safety, r_s.
    pub safety_rank: usize,
    /// Directions of the task, r_t.
    pub task_rank: usize,
    /// Modules of every layer that get one; the authors' code has `[Q, V]`.
    pub modules: Vec<ModuleKind>,
    /// Tokens whose outputs give the directions; the authors' code has the answers'.
    pub positions: Positions,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            rank: 16,
            safety_rank: 32,
            task_rank: 32,
            modules: ModuleKind::ALL.to_vec(),
            positions: Positions::Answer,
        }
    }
}

impl Settings {
    fn check(&self) -> Result<(), RunError> {
        RunError::check_positive("rank", self.rank as f64)?;
        RunError::check_positive("safety-rank", self.safety_rank as f64)?;
        RunError::check_positive("task-rank", self.task_rank as f64)
    }
}

/// Orthonormal directions in a module's output space.
#[derive(Debug, Clone, PartialEq)]
pub struct Directions {
    out: usize,
    rank: usize,
    /// `[out, rank]`, row-major.
    v: Vec<f64>,
}

impl Directions {
    /// How many.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// `[out, rank]`, row-major.
    pub fn values(&self) -> &[f64] {
        &self.v
    }

    /// `V Vᵀ m` of a row-major `m [out, columns]`.
    pub fn within(&self, m: &[f64], columns: usize) -> Vec<f64> {
        let (v, m) =
            (MatRef::from_row_major_slice(&self.v, self.out, self.rank), dense(m, self.out, columns));
        let inside = v * (v.transpose() * m);
        row_major(inside.as_ref())
    }

    /// `C m = m − V Vᵀ m` of a row-major `m [out, columns]`.
    pub fn outside(&self, m: &[f64], columns: usize) -> Vec<f64> {
        m.iter().zip(self.within(m, columns)).map(|(m, inside)| m - inside).collect()
    }
}

fn dense(m: &[f64], rows: usize, columns: usize) -> MatRef<'_, f64> {
    MatRef::from_row_major_slice(m, rows, columns)
}

fn row_major(m: MatRef<'_, f64>) -> Vec<f64> {
    (0..m.nrows() * m.ncols()).map(|e| m[(e / m.ncols(), e % m.ncols())]).collect()
}

/// Top right singular vectors of `X Wᵀ`, at most `rank_max`, from the Gram matrix of `X`; `weight` is `[out, in]`.
pub fn output_directions(
    module: &str,
    weight: &[f32],
    out: usize,
    gram: &Gram,
    rank_max: usize,
) -> Result<Directions, RunError> {
    let inn = gram.width();
    RunError::check_size(module, "the weight", out.saturating_mul(inn), weight.len())?;
    RunError::check_finite(module, "the weight", weight)?;
    if !gram.sums().iter().all(|v| v.is_finite()) {
        return Err(RunError::NotFinite { module: module.into(), what: "the Gram matrix" });
    }
    let w = Mat::from_fn(out, inn, |i, j| f64::from(weight[i * inn + j]));
    let half = w.as_ref() * dense(gram.sums(), inn, inn);
    let outputs = half.as_ref() * w.transpose();
    let what = "the outputs on its rows";
    let eigen = outputs
        .self_adjoint_eigen(Side::Lower)
        .map_err(|_| RunError::NoConvergence { module: module.into(), what })?;
    // Ascending. A Gram matrix in f64 knows eigenvalues down to about `out` epsilons of the largest.
    let largest = (0..out).map(|i| eigen.S()[i]).fold(0.0, f64::max);
    let floor = largest * 4.0 * out as f64 * f64::EPSILON;
    let rank = (0..out).rev().take_while(|&i| eigen.S()[i] > floor).take(rank_max).count();
    let mut v = Vec::with_capacity(out * rank);
    for i in 0..out {
        v.extend((0..rank).map(|k| eigen.U()[(i, out - 1 - k)]));
    }
    Ok(Directions { out, rank, v })
}

/// Where the training of one module starts.
#[derive(Debug, Clone)]
pub struct Start {
    /// Decoder block.
    pub layer: usize,
    /// Module in it.
    pub kind: ModuleKind,
    /// Rank of the trained pair.
    pub rank: usize,
    /// `V_s`.
    pub safety: Directions,
    /// `B₀ [out, rank]`, row-major, not folded.
    pub b: Vec<f32>,
    /// `A₀ [rank, in]`, row-major.
    pub a: Vec<f32>,
    v: Tensor,
    shift: Tensor,
}

impl Start {
    /// From a weight `[out, in]`, the directions of safety to keep out of, and those of the task to begin with.
    pub fn new(
        (layer, kind): (usize, ModuleKind),
        weight: &[f32],
        safety: Directions,
        task: &Directions,
        rank: usize,
    ) -> Result<Self, RunError> {
        let module = kind.module(layer);
        let out = safety.out;
        let inn = weight.len() / out.max(1);
        RunError::check_size(&module, "the weight", out * inn, weight.len())?;
        RunError::check_size(&module, "a direction of the task", out, task.out)?;
        RunError::check_finite(&module, "the weight", weight)?;
        let rank = rank.min(out).min(inn);
        let w = Mat::from_fn(out, inn, |i, j| f64::from(weight[i * inn + j]));
        let svd = w
            .thin_svd()
            .map_err(|_| RunError::NoConvergence { module: module.clone(), what: "the weight" })?;
        let root: Vec<f64> = (0..rank).map(|k| svd.S()[k].max(0.0).sqrt()).collect();
        let columns: Vec<f64> =
            (0..out * rank).map(|e| svd.U()[(e / rank, e % rank)] * root[e % rank]).collect();
        let b: Vec<f32> = task.within(&columns, rank).into_iter().map(|x| x as f32).collect();
        let a: Vec<f32> =
            (0..rank * inn).map(|e| (svd.V()[(e % inn, e / inn)] * root[e / inn]) as f32).collect();
        let v: Vec<f32> = safety.v.iter().map(|&x| x as f32).collect();
        let v = Tensor::from_vec(v, (out, safety.rank), &Device::Cpu)?;
        let shift = fold(&Tensor::from_slice(&b, (out, rank), &Device::Cpu)?, &v)?.neg()?;
        Ok(Self { layer, kind, rank, safety, b, a, v, shift })
    }

    /// Output directions that training can reach: `out − r_s`.
    pub fn free(&self) -> usize {
        self.safety.out - self.safety.rank
    }

    /// `[C·B, −C·B₀]` and `[A; A₀]` of a trained pair: what fits the stock base.
    pub fn export(&self, b: &[f32], a: &[f32]) -> Result<ModuleFactors, RunError> {
        let (out, rank) = (self.safety.out, self.rank);
        let module = self.kind.module(self.layer);
        RunError::check_size(&module, "the trained B", self.b.len(), b.len())?;
        RunError::check_size(&module, "the trained A", self.a.len(), a.len())?;
        RunError::check_finite(&module, "the trained B", b)?;
        RunError::check_finite(&module, "the trained A", a)?;
        let folded = fold(&Tensor::from_slice(b, (out, rank), &Device::Cpu)?, &self.v)?;
        let b = Tensor::cat(&[&folded, &self.shift], 1)?.flatten_all()?.to_vec1::<f32>()?;
        let a = [a, &self.a].concat();
        Ok(ModuleFactors { layer: self.layer, kind: self.kind, rank: 2 * rank, b, a })
    }
}

/// `C·B = B − V(VᵀB)`; gradients pass.
fn fold(b: &Tensor, v: &Tensor) -> candle_core::Result<Tensor> {
    if v.dim(1)? == 0 { Ok(b.clone()) } else { b - v.matmul(&v.t()?.matmul(b)?)? }
}

/// Starts of all modules of `model`, the aligned one, which must be frozen.
pub fn prepare(
    model: &Model,
    safety: &[Row],
    task: &[Row],
    pad: u32,
    settings: &Settings,
) -> Result<Vec<Start>, RunError> {
    settings.check()?;
    let none = Attachments::none();
    let wanted = |_, kind| settings.modules.contains(&kind);
    let safety = grams(model, &none, "safety", safety, pad, settings.positions, &wanted)?;
    let task = grams(model, &none, "task", task, pad, settings.positions, &wanted)?;
    let modules: Vec<_> = safety.modules().collect();
    modules
        .into_par_iter()
        .map(|(layer, kind)| {
            let module = kind.module(layer);
            let weight = model.weight(layer, kind)?;
            let out = weight.dim(0)?;
            let weight = weight.flatten_all()?.to_vec1::<f32>()?;
            let directions = |grams: &crate::gram::Grams, what, rank| {
                let gram = grams
                    .get(layer, kind)
                    .ok_or_else(|| RunError::NotMeasured { module: module.clone(), what })?;
                output_directions(&module, &weight, out, gram, rank)
            };
            let keep_out = directions(&safety, "safety", settings.safety_rank)?;
            let begin = directions(&task, "task", settings.task_rank)?;
            Start::new((layer, kind), &weight, keep_out, &begin, settings.rank)
        })
        .collect()
}

struct Slot<'a> {
    start: &'a Start,
    a: Var,
    b: Var,
    fixed: Attachment,
}

/// The shift and `C·B·A` of every module, `C·B` computed from `B` so that gradients reach it.
fn attach(slots: &[Slot<'_>], scale: &Tensor) -> Result<Attachments, RunError> {
    let mut out = Attachments::none();
    for slot in slots {
        let (layer, kind) = (slot.start.layer, slot.start.kind);
        out.add(layer, kind, slot.fixed.clone());
        let b = fold(slot.b.as_tensor(), &slot.start.v)?;
        out.add(layer, kind, Attachment { a: slot.a.as_tensor().clone(), b, scale: scale.clone() });
    }
    Ok(out)
}

/// Trains on rows from `next`, cross-entropy of their answers; `stop` is asked after each step with the steps made, the
/// loss before the step and the state after it (additions to the stock `model`), and may end the training early.
///
/// Deterministic: the start has no random number in it.
pub fn train<E: From<RunError>>(
    model: &Model,
    starts: &[Start],
    schedule: Schedule,
    pad: u32,
    next: &mut dyn FnMut() -> Result<Row, E>,
    stop: &mut dyn FnMut(usize, f32, &Attachments) -> Result<bool, E>,
) -> Result<Vec<ModuleFactors>, E> {
    schedule.check()?;
    let (slots, scale) = slots(starts)?;
    let vars = slots.iter().flat_map(|s| [s.a.clone(), s.b.clone()]).collect();
    let mut optimiser = Optimiser::new(vars, AdamW::default());
    let mut attachments = attach(&slots, &scale)?;
    for step in 0..schedule.steps {
        let rows = (0..schedule.rows).map(|_| next()).collect::<Result<Vec<_>, _>>()?;
        RunError::check_rows("training", &rows)?;
        let loss = one_step(model, &rows, pad, &attachments, &mut optimiser, schedule.rate_at(step), step)?;
        attachments = attach(&slots, &scale)?;
        if stop(step + 1, loss, &attachments)? {
            break;
        }
    }
    let values = |v: &Var| -> Result<Vec<f32>, RunError> { Ok(v.flatten_all()?.to_vec1::<f32>()?) };
    let export = |s: &Slot<'_>| s.start.export(&values(&s.b)?, &values(&s.a)?);
    Ok(slots.iter().map(export).collect::<Result<Vec<_>, RunError>>()?)
}

fn slots(starts: &[Start]) -> Result<(Vec<Slot<'_>>, Tensor), RunError> {
    if starts.is_empty() {
        return Err(RunError::NoModule);
    }
    let dev = &Device::Cpu;
    let scale = Tensor::from_slice(&[1f32], 1, dev)?;
    let mut slots = Vec::with_capacity(starts.len());
    for start in starts {
        let (out, rank) = (start.safety.out, start.rank);
        let a = Tensor::from_slice(&start.a, (rank, start.a.len() / rank.max(1)), dev)?;
        let b = Tensor::from_slice(&start.b, (out, rank), dev)?;
        let fixed = Attachment { a: a.clone(), b: start.shift.clone(), scale: scale.clone() };
        slots.push(Slot { start, a: Var::from_tensor(&a)?, b: Var::from_tensor(&b)?, fixed });
    }
    Ok((slots, scale))
}

fn one_step(
    model: &Model,
    rows: &[Row],
    pad: u32,
    attachments: &Attachments,
    optimiser: &mut Optimiser,
    rate: f64,
    step: usize,
) -> Result<f32, RunError> {
    let loss = AnswerBatch::new(rows, pad).cross_entropy(model, attachments)?;
    let value = loss.to_vec1::<f32>()?[0];
    if !value.is_finite() {
        return Err(RunError::Diverged { what: "training", step });
    }
    let grads = optimiser.gradients(&loss.backward()?)?;
    optimiser.step(grads, rate).map_err(ModelError::from)?;
    Ok(value)
}
