//! What an extraction will do, from headers alone.
//!
//! Every tensor of both sides is paired and counted as what it can become: factors, an exact difference, rows, or a
//! buffer that is left out if it changed. Which are unchanged only their values tell. Bytes of the gene are an upper
//! bound: every linear module at its full rank, and nothing unchanged.
//!
//! Not here: reading a value.

use checkpoint::{Checkpoint, Role};
use lowrank::Factor;
use serde::Serialize;

use crate::pairing::{Pair, float, pairs};
use crate::{Ranks, Result};

/// What a tensor can become if it changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Becomes {
    /// Low-rank factors.
    Factors,
    /// Its exact difference.
    Exact,
    /// The rows that changed.
    Rows,
    /// Nothing: a computed buffer.
    Buffer,
}

/// One tensor of both sides.
#[derive(Debug, Clone, Serialize)]
pub struct Planned {
    /// Canonical name.
    pub name: String,
    /// [out, in] for matrices; the aligned side's.
    pub shape: Vec<u64>,
    /// What it can become.
    pub becomes: Becomes,
    /// Bytes of both sides.
    pub bytes: u64,
    /// Whether the two sides are stored in other layouts, formats or row counts.
    pub differs: Option<String>,
}

/// What an extraction will do.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// Sorted by name.
    pub tensors: Vec<Planned>,
    /// Stored tensors of the aligned and the degraded side that are scales of others.
    pub scale_tensors: [u64; 2],
    /// Stored tensors of each side: what is planned comes from them.
    pub stored_tensors: [u64; 2],
    /// Bytes of weights of both sides.
    pub input_bytes: u64,
    /// Elements of linear modules of one side.
    pub linear_elements: u64,
    /// f32 factors of all linear modules at the largest rank.
    pub factor_bytes_max: u64,
    /// f32 differences of everything that is no linear module.
    pub rest_bytes_max: u64,
    /// Multiplications and additions for the factors and their certificates.
    pub operations: f64,
    /// Bytes that the largest single tensor needs under way, rows read when needed where that is more than the budget.
    pub largest_bytes: u64,
    /// Linear modules, and columns of the widest.
    pub modules: u64,
}

/// Plans an extraction. Refuses what the headers show to be wrong.
pub fn plan(aligned: &Checkpoint, degraded: &Checkpoint, ranks: Ranks) -> Result<Plan> {
    let pairs = pairs(aligned, degraded)?;
    let rank = ranks.max() as u64;
    let factor = Factor::new(ranks.of_module(), 0);
    let mut plan = Plan {
        tensors: Vec::with_capacity(pairs.len()),
        scale_tensors: [aligned.scale_tensors()?.len() as u64, degraded.scale_tensors()?.len() as u64],
        stored_tensors: [aligned.tensors().len() as u64, degraded.tensors().len() as u64],
        input_bytes: 0,
        linear_elements: 0,
        factor_bytes_max: 0,
        rest_bytes_max: 0,
        operations: 0.0,
        largest_bytes: 0,
        modules: 0,
    };
    for pair in &pairs {
        let elements: u64 = pair.aligned.shape.iter().product();
        let becomes = becomes(pair);
        plan.input_bytes += pair.bytes();
        if becomes == Becomes::Factors {
            let kept = rank.min(pair.aligned.shape[0]).min(pair.aligned.shape[1]);
            plan.modules += 1;
            plan.linear_elements += elements;
            plan.factor_bytes_max += 4 * kept * (pair.aligned.shape[0] + pair.aligned.shape[1]);
            // Sweeps are two products with a block each; the residual is one with the factors.
            let sweeps = 2 * (factor.blocks * factor.width()) as u64;
            plan.operations += 2.0 * elements as f64 * (sweeps + rank) as f64;
            plan.largest_bytes = plan.largest_bytes.max(pair.bytes());
        } else if becomes != Becomes::Buffer {
            plan.rest_bytes_max += 4 * elements;
        }
        plan.tensors.push(Planned {
            name: pair.name.clone(),
            shape: pair.aligned.shape.clone(),
            becomes,
            bytes: pair.bytes(),
            differs: differs(pair),
        });
    }
    Ok(plan)
}

fn becomes(pair: &Pair) -> Becomes {
    match pair.role {
        Role::Buffer => Becomes::Buffer,
        Role::Linear { .. } if float(pair.aligned.dtype).is_some() => Becomes::Factors,
        Role::Embedding | Role::Head => Becomes::Rows,
        _ => Becomes::Exact,
    }
}

/// How the two sides are stored differently, if they are.
fn differs(pair: &Pair) -> Option<String> {
    let (a, d) = (&pair.aligned, &pair.degraded);
    if a.shape != d.shape {
        return Some(format!("{} rows, {} rows", a.rows(), d.rows()));
    }
    if a.dtype != d.dtype {
        return Some(format!("{}, {}", a.dtype, d.dtype));
    }
    (a.tensor != d.tensor || a.slice != d.slice).then(|| format!("in `{}`, in `{}`", a.tensor, d.tensor))
}
