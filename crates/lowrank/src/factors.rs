//! Factors of a difference that is itself a sum of low-rank products, such as two adapters over one base.
//!
//! With the products side by side, `D = L R^T`, thin QR of `L` and `R` leaves a core of the size of their ranks; the
//! dense difference is never formed. Everything is f64 from the given f32 factors, so where products cancel, the
//! error is about 1e-15 of the *products'* norm: two adapters that agree to 1e-6 still give their difference to 1e-9
//! of itself, and the f32 of the result (6e-8) is what limits it.

use faer::Mat;
use kernels::{DeltaStats, Shape};

use crate::{Certificate, LowRank, LowRankError, Rank, Result};

/// One product `scale * B A`.
#[derive(Debug, Clone, Copy)]
pub struct Term<'a> {
    /// `rows` x `rank`, row-major.
    pub b: &'a [f32],
    /// `rank` x `cols`, row-major.
    pub a: &'a [f32],
    /// Rows of the product.
    pub rows: usize,
    /// Columns of the product.
    pub cols: usize,
    /// Columns of `b` and rows of `a`.
    pub rank: usize,
    /// What the product is multiplied by.
    pub scale: f64,
}

/// The best factors of the sum of `terms`; of rank 0 where the terms cancel to rounding. Nothing was rounded to a weight
/// format here, so [`Rank::Noise`] takes all that there is.
pub fn factor_factors(terms: &[Term<'_>], rank: Rank) -> Result<LowRank> {
    let core = Core::new(terms)?;
    let Shape { rows, cols } = core.shape;
    if matches!(rank, Rank::Fixed(0) | Rank::Residual { max: 0, .. } | Rank::Noise { max: 0 }) {
        return Err(LowRankError::RankZero);
    }
    let size = core.core.nrows().min(core.core.ncols());
    let svd = core.core.thin_svd().map_err(|_| LowRankError::NoConvergence { size })?;
    let sigma: Vec<f64> = (0..size).map(|i| svd.S()[i]).collect();
    let largest = sigma.first().copied().unwrap_or(0.0);
    // Below the first the products are known no better; below the second an f32 cannot tell beside the largest.
    let cut = core.noise.max(largest * f64::from(f32::EPSILON) / 2.0);
    let known = sigma.iter().take_while(|&&value| value > cut).count();
    let sums = DeltaStats { sumsq: sigma.iter().map(|value| value * value).sum(), ..DeltaStats::default() };
    let kept = rank.choose(&sigma[..known], core.shape, &sums);
    let half = |j: usize| sigma[j].sqrt();
    let u = Mat::from_fn(core.core.nrows(), kept, |i, j| svd.U()[(i, j)] * half(j));
    let v = Mat::from_fn(core.core.ncols(), kept, |i, j| svd.V()[(i, j)] * half(j));
    let (b, a) = (&core.left * u, &core.right * v);
    let best_sumsq_upper = sigma.iter().take(kept).map(|value| value * value).sum();
    Ok(LowRank {
        b: (0..rows).flat_map(|i| (0..kept).map(move |j| (i, j))).map(|at| b[at] as f32).collect(),
        a: (0..kept).flat_map(|j| (0..cols).map(move |i| (i, j))).map(|at| a[at] as f32).collect(),
        rows,
        cols,
        rank: kept,
        singular: sigma[..kept].to_vec(),
        outside_sumsq: 0.0,
        best_sumsq_upper,
    })
}

/// Measures stored factors of the sum of `terms`, through the small core, in f64. Nothing was rounded to a weight
/// format here, so there is no noise floor, and no count of zero elements either.
pub fn certify_factors(terms: &[Term<'_>], low_rank: &LowRank) -> Result<Certificate> {
    let core = Core::new(terms)?;
    let energy = core.core.squared_norm_l2();
    if core.core.norm_l2() <= core.noise {
        return Err(LowRankError::ZeroDelta { shape: core.shape });
    }
    let LowRank { b, a, rows, cols, rank, .. } = low_rank;
    let mut with_stored = terms.to_vec();
    with_stored.push(Term { b, a, rows: *rows, cols: *cols, rank: *rank, scale: -1.0 });
    let residual = Core::new(&with_stored)?.core.squared_norm_l2() / energy;
    Ok(Certificate {
        energy,
        residual,
        // A few hundred f64 roundings.
        captured_upper_bound: (low_rank.best_sumsq_upper / energy * (1.0 + 1e-12)).min(1.0),
        noise_floor: 0.0,
        zero_fraction: 0.0,
    })
}

/// `D = left core right^T` with orthonormal `left` and `right`.
struct Core {
    shape: Shape,
    left: Mat<f64>,
    core: Mat<f64>,
    right: Mat<f64>,
    /// The norm below which the core is rounding.
    noise: f64,
}

impl Core {
    fn new(terms: &[Term<'_>]) -> Result<Core> {
        let shape =
            terms.first().map_or(Shape { rows: 0, cols: 0 }, |t| Shape { rows: t.rows, cols: t.cols });
        for (index, t) in terms.iter().enumerate() {
            let fits = Shape { rows: t.rows, cols: t.cols } == shape
                && t.rows.checked_mul(t.rank) == Some(t.b.len())
                && t.cols.checked_mul(t.rank) == Some(t.a.len());
            if !fits {
                return Err(LowRankError::TermShape { index, expected: shape });
            }
        }
        // Column k of the concatenation is column `at` of term `t`.
        let columns: Vec<(&Term<'_>, usize)> =
            terms.iter().flat_map(|t| (0..t.rank).map(move |at| (t, at))).collect();
        let left = Mat::from_fn(shape.rows, columns.len(), |i, k| {
            let (t, at) = columns[k];
            t.scale * f64::from(t.b[i * t.rank + at])
        });
        let right = Mat::from_fn(shape.cols, columns.len(), |i, k| {
            let (t, at) = columns[k];
            f64::from(t.a[at * t.cols + i])
        });
        let noise = 4.0 * columns.len() as f64 * f64::EPSILON * left.norm_l2() * right.norm_l2();
        if !noise.is_finite() {
            return Err(LowRankError::NotFinite { what: "norm", shape });
        }
        let (left, right) = (left.qr(), right.qr());
        let core = left.thin_R() * right.thin_R().transpose();
        Ok(Core { shape, left: left.compute_thin_Q(), core, right: right.compute_thin_Q(), noise })
    }
}
