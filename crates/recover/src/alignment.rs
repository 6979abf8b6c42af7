//! What alignment says about an update: SafeLoRA's `C`, the cosine it gives, and the update seen through it.
//!
//! `V = W_a − W_base` is the step that alignment made. `C = V Vᵀ / |V|` is no projector: its scale is that of `V`, so that
//! an update seen through it shrinks with `V`, or grows. `C = U_k U_kᵀ`, with the first left singular vectors of `V`, is one.
//!
//! For factors `B A` only `C B` is made, as `V (Vᵀ B) / |V|`: no square matrix. Cosine and norms come from Gram matrices of
//! the rank, in f64: `⟨C B A, B A⟩ = tr((C B)ᵀ B · A Aᵀ)`. A whole model's update is a matrix, and so is what `C` makes of it.

use checkpoint::{Checkpoint, Factors, Unit, module_of};
use kernels::Shape;

use crate::algebra::PANEL_COLS;
use crate::error::{RecoverError, Result};
use crate::method::{Job, Models};
use crate::side::{Scope, Side, Step, key_of};

/// Which `C`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Through {
    /// `V Vᵀ / |V|`.
    Published,
    /// `U_k U_kᵀ`.
    Orthonormal { rank: usize, seed: u64 },
}

/// What fine-tuning did to one module.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Update {
    /// `scale B A`.
    Factors(Factors),
    /// A matrix.
    Dense(Vec<f32>),
}

/// An update, and what `C` makes of it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Seen {
    /// The update.
    pub(crate) update: Update,
    /// `C B` of factors (their scale stays outside), else `C` times the matrix. `None` where `V` is zero.
    pub(crate) through: Option<Vec<f32>>,
    /// How the two stand to each other.
    pub(crate) angle: Angle,
}

/// How an update stands to what `C` makes of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Angle {
    /// The norm of the update.
    pub(crate) norm: f64,
    /// The cosine between the two; `None` where one of them is zero.
    pub(crate) cosine: Option<f64>,
    /// The norm through `C`, over that of the update; `None` where the update or `V` is zero.
    pub(crate) norm_ratio: Option<f64>,
}

/// Looks at the modules of a target.
pub(crate) struct Alignment<'a> {
    pub(crate) target: &'a Side,
    aligned: &'a Side,
    base: &'a Side,
    through: Through,
    job: &'a Job<'a>,
}

impl<'a> Alignment<'a> {
    pub(crate) fn new(models: &'a Models, through: Through, job: &'a Job<'a>) -> Result<Alignment<'a>> {
        let (aligned, base) = (models.aligned()?, models.base()?);
        Ok(Alignment { target: &models.target, aligned, base, through, job })
    }

    /// The modules that have an update: a target adapter's, or every linear module of a whole model.
    pub(crate) fn modules(&self) -> Vec<&'a Unit> {
        match self.target.checkpoint().adapter() {
            None => self.target.linear().collect(),
            Some(adapter) => self
                .target
                .linear()
                .filter(|unit| {
                    let module = module_of(&unit.tensor).and_then(|module| adapter.modules().get(module));
                    module.is_some_and(|module| !module.transposed)
                })
                .collect(),
        }
    }

    /// Looks at all of them, one after the other.
    pub(crate) fn see_all(&self, mut look: impl FnMut(&Unit, Seen) -> Result<()>) -> Result<()> {
        let modules = self.modules();
        let bytes =
            |unit: &Unit| unit.rows().saturating_mul(unit.cols()).saturating_mul(unit.dtype.bits() / 8);
        self.job.progress.stage("comparing", modules.iter().map(|unit| bytes(unit)).sum());
        let mut differs = modules.is_empty();
        for unit in modules {
            self.job.check_stop()?;
            let seen = self.see(unit)?;
            differs |= seen.through.is_some();
            look(unit, seen)?;
            self.job.progress.advance(bytes(unit), &unit.name);
        }
        if differs {
            return Ok(());
        }
        Err(RecoverError::NothingDiffers {
            aligned: self.aligned.checkpoint().dir().to_path_buf(),
            base: self.base.checkpoint().dir().to_path_buf(),
        })
    }

    /// What is left alone.
    pub(crate) fn notes(&self) -> Vec<String> {
        let Some(adapter) = self.target.checkpoint().adapter() else {
            return vec!["what is no linear module of a layer keeps the target's values".to_owned()];
        };
        let others = adapter.modules().len() - self.modules().len();
        let mut notes = Vec::new();
        if others > 0 {
            notes.push(format!("{others} modules of the adapter are no linear modules of layers and stay"));
        }
        if !adapter.saved().is_empty() {
            notes.push(format!("{} tensors that the adapter saved whole stay", adapter.saved().len()));
        }
        notes
    }

    /// The update of a module, and what `C` makes of it.
    pub(crate) fn see(&self, unit: &Unit) -> Result<Seen> {
        let shape = Shape { rows: unit.rows() as usize, cols: unit.cols() as usize };
        let algebra = self.job.algebra;
        let adapter = self.target.checkpoint().adapter();
        let factors = match adapter.zip(module_of(&unit.tensor)) {
            Some((adapter, module)) => adapter.factors(module)?,
            None => None,
        };
        // What is f32 beside the two sides: the update, what C makes of it, and a panel on its way.
        let (update, beside_bytes) = match factors {
            Some(factors) => (Update::Factors(factors), 0),
            None => {
                let (rows, cols) = (unit.rows(), unit.cols());
                let panel = 2 * (rows + cols).saturating_mul(cols.min(PANEL_COLS as u64));
                let beside_bytes =
                    rows.saturating_mul(cols).saturating_mul(2).saturating_add(panel).saturating_mul(4);
                let step = Step::new(self.target, self.aligned, &unit.name)?;
                let delta = algebra.dense(step.difference(self.job, beside_bytes)?);
                (Update::Dense(delta.map_err(|error| step.kernel_error(error))?), beside_bytes)
            }
        };
        let (b, cols) = match &update {
            Update::Factors(factors) => (&factors.b, factors.rank),
            Update::Dense(delta) => (delta, shape.cols),
        };
        let step = Step::new(self.aligned, self.base, &unit.name)?;
        let at = |error| step.kernel_error(error);
        let through = match self.through {
            _ if b.iter().all(|&x| x == 0.0) => Some(vec![0.0; b.len()]),
            Through::Published => {
                algebra.through(step.difference(self.job, beside_bytes)?, b, cols).map_err(at)?
            }
            Through::Orthonormal { rank, seed } => {
                let v = step.difference(self.job, beside_bytes)?;
                let found = algebra.factor(v, key_of(&unit.name), rank, seed);
                match found.map_err(|error| step.factor_error(error))? {
                    None => None,
                    Some((low_rank, _)) => {
                        let side = Shape { rows: shape.rows, cols: low_rank.rank };
                        let u = unit_columns(&low_rank.b, low_rank.rank);
                        let inside = algebra.product_of_transposed(&u, side, b, cols).map_err(at)?;
                        Some(algebra.product(&u, side, &inside, cols).map_err(at)?)
                    }
                }
            }
        };
        let angle = match &update {
            Update::Factors(factors) => angle_of_factors(factors, through.as_deref()),
            Update::Dense(delta) => angle(delta, through.as_deref()),
        };
        Ok(Seen { update, through, angle })
    }
}

/// Refuses what the headers show to be wrong for a method that looks at updates of the aligned model; an adapter has to be
/// over it.
pub(crate) fn check(models: &Models) -> Result<()> {
    let (aligned, base) = (models.aligned()?, models.base()?);
    models.target.check_family(aligned, Scope::Linear)?;
    aligned.check_family(base, Scope::Linear)?;
    check_over(&models.target, aligned)
}

/// Refuses an adapter that is over another model than the aligned one.
pub(crate) fn check_over(adapter: &Side, aligned: &Side) -> Result<()> {
    let (checkpoint, whole) = (adapter.checkpoint(), aligned.checkpoint());
    if checkpoint.adapter().is_none() {
        return Ok(());
    }
    let same_folder = match (checkpoint.base_dir().canonicalize(), whole.dir().canonicalize()) {
        (Ok(base), Ok(aligned)) => base == aligned,
        _ => false,
    };
    if same_folder || Checkpoint::open(checkpoint.base_dir(), None)?.content()? == whole.content()? {
        return Ok(());
    }
    Err(RecoverError::OtherBase {
        adapter: checkpoint.dir().to_path_buf(),
        base: checkpoint.base_dir().to_path_buf(),
        aligned: whole.dir().to_path_buf(),
    })
}

/// The norm of the difference of two updates.
pub(crate) fn distance(one: &Factors, other: &Factors) -> f64 {
    let rank = one.rank + other.rank;
    let scaled = |b: &[f32], scale: f64| b.iter().map(|&x| f64::from(x) * scale).collect::<Vec<_>>();
    let (left, right) = (scaled(&one.b, one.scale), scaled(&other.b, -other.scale));
    let rows = left.chunks_exact(one.rank).zip(right.chunks_exact(other.rank));
    let b: Vec<f64> = rows.flat_map(|(l, r)| l.iter().chain(r).copied()).collect();
    let a = [&one.a[..], &other.a[..]].concat();
    inner(&b, &b, &gram_of_rows(&a, rank), rank).max(0.0).sqrt()
}

/// `A Aᵀ`.
fn gram_of_rows(a: &[f32], rank: usize) -> Vec<f64> {
    let cols = a.len() / rank.max(1);
    let row = |i: usize| &a[i * cols..(i + 1) * cols];
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
    (0..rank * rank).map(|at| dot(row(at / rank), row(at % rank))).collect()
}

/// `⟨L A, R A⟩ = tr(Lᵀ R · A Aᵀ)`.
fn inner(left: &[f64], right: &[f64], of_a: &[f64], rank: usize) -> f64 {
    let rows = left.chunks_exact(rank).zip(right.chunks_exact(rank));
    rows.map(|(l, r)| {
        let pairs =
            l.iter().enumerate().flat_map(|(i, &l)| r.iter().enumerate().map(move |(j, &r)| (i, j, l * r)));
        pairs.map(|(i, j, product)| product * of_a[i * rank + j]).sum::<f64>()
    })
    .sum()
}

/// Columns brought to length 1.
fn unit_columns(b: &[f32], rank: usize) -> Vec<f32> {
    let mut norms = vec![0f64; rank];
    for row in b.chunks_exact(rank) {
        for (norm, &x) in norms.iter_mut().zip(row) {
            *norm += f64::from(x) * f64::from(x);
        }
    }
    let inverse: Vec<f64> =
        norms.iter().map(|&norm| if norm > 0.0 { 1.0 / norm.sqrt() } else { 0.0 }).collect();
    b.chunks_exact(rank)
        .flat_map(|row| row.iter().zip(&inverse).map(|(&x, inverse)| (f64::from(x) * inverse) as f32))
        .collect()
}

fn angle_from(sumsq: f64, through: Option<(f64, f64)>) -> Angle {
    let norm = sumsq.max(0.0).sqrt();
    let (cosine, norm_ratio) = match through {
        Some((dot, through_sumsq)) if norm > 0.0 => {
            let through_norm = through_sumsq.max(0.0).sqrt();
            let cosine = (through_norm > 0.0).then(|| (dot / norm / through_norm).clamp(-1.0, 1.0));
            (cosine, Some(through_norm / norm))
        }
        _ => (None, None),
    };
    Angle { norm, cosine, norm_ratio }
}

fn angle(delta: &[f32], through: Option<&[f32]>) -> Angle {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    angle_from(dot(delta, delta), through.map(|through| (dot(delta, through), dot(through, through))))
}

fn angle_of_factors(factors: &Factors, through: Option<&[f32]>) -> Angle {
    let rank = factors.rank;
    let of_a = gram_of_rows(&factors.a, rank);
    let wide = |b: &[f32]| b.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
    let b = wide(&factors.b);
    let through = through
        .map(wide)
        .map(|through| (inner(&through, &b, &of_a, rank), inner(&through, &through, &of_a, rank)));
    let angle = angle_from(inner(&b, &b, &of_a, rank), through);
    Angle { norm: angle.norm * factors.scale.abs(), ..angle }
}
