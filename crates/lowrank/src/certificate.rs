//! What stored factors are worth, measured by an explicit pass in f64.

use kernels::{DeltaStats, Engine, Shape};

use crate::{LowRank, LowRankError, Result};

/// A noise floor below this share predicts what rounding leaves to some 10 %; above it elements begin to round back to
/// what they were, and it promises more noise than there is.
pub const NOISE_RELIABLE: f64 = 0.2;

/// What a pair of stored factors holds of its difference. Shares are of the squared norm, between 0 and 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Certificate {
    /// The squared Frobenius norm of the difference.
    pub energy: f64,
    /// The share that the factors as stored miss, by an explicit sum. Above 1 if they are worse than nothing.
    pub residual: f64,
    /// The share that no factorisation of the rank exceeds: no probability in it, but the rounding of f32 products.
    pub captured_upper_bound: f64,
    /// The share that rounding the degraded weights to their format explains; 1 where it would explain more. Beyond
    /// [`NOISE_RELIABLE`] it is an overestimate.
    pub noise_floor: f64,
    /// The share of elements that did not change at all.
    pub zero_fraction: f64,
}

impl Certificate {
    /// The share that the factors hold.
    pub fn captured(&self) -> f64 {
        1.0 - self.residual
    }
}

/// Measures factors of a difference. `low_rank` holds them with the values they are stored with.
pub fn certify<E: Engine>(
    engine: &E,
    pair: &E::Pair,
    stats: &DeltaStats,
    low_rank: &LowRank,
) -> Result<Certificate> {
    let shape = engine.pair_shape(pair);
    if stats.sumsq <= 0.0 {
        return Err(LowRankError::ZeroDelta { shape });
    }
    let b = engine.matrix(&low_rank.b, Shape { rows: shape.rows, cols: low_rank.rank })?;
    let a = engine.matrix(&low_rank.a, Shape { rows: low_rank.rank, cols: shape.cols })?;
    let residual = engine.residual(pair, &b, &a)? / stats.sumsq;
    if !residual.is_finite() {
        return Err(LowRankError::NotFinite { what: "residual", shape });
    }
    // The products behind the bound are f32: their relative rounding grows like a random walk along the longer side.
    let rounding = f64::from(f32::EPSILON) * (shape.rows.max(shape.cols) as f64).sqrt();
    Ok(Certificate {
        energy: stats.sumsq,
        residual,
        captured_upper_bound: (low_rank.best_sumsq_upper / stats.sumsq * (1.0 + rounding)).min(1.0),
        noise_floor: (stats.ulp_sumsq / 12.0 / stats.sumsq).min(1.0),
        zero_fraction: 1.0 - stats.nonzero as f64 / stats.elements.max(1) as f64,
    })
}
