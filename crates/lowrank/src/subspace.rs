//! Truncated singular value decomposition by block subspace iteration with kept blocks.
//!
//! Blocks `Z` live on the shorter side of the difference `D`; a sweep is `Z <- orth(D^T (D Z))` (or with `D` and `D^T`
//! exchanged). The last blocks together are the basis of the projection `Y = D Z`, whose f64 Gram matrix gives singular
//! values and vectors. Where the shorter side is hardly longer than a block, the basis is the whole side and the
//! result the optimum.
//!
//! Products are f32, Gram matrices and everything small are f64. Singular values below about 1e-6 of the largest are
//! rounding noise of the products and are cut.

use kernels::{Engine, Shape, philox4x32_10};

use crate::small::{Eigen, whitening};
use crate::{LowRankError, Result};

/// Gaussian probes for the norm of what the basis leaves out: the bound fails with probability 1e-10 a matrix.
const PROBES: usize = 10;
/// A side this much longer than a block is still decomposed whole.
const WHOLE_MARGIN: usize = 8;
/// Squared norms within this range cannot leave f32 when multiplied twice.
const COMFORTABLE: std::ops::Range<f64> = 1e-16..1e16;

/// How to factor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Factor {
    /// The rank asked for.
    pub rank: usize,
    /// Columns of a block beyond the rank.
    pub oversample: usize,
    /// Sweeps over the difference before the projection, at least 1.
    pub sweeps: usize,
    /// Blocks in the basis, the last ones, at least 1.
    pub kept: usize,
    /// The seed of the sketch.
    pub seed: u64,
}

impl Factor {
    /// The defaults: 8 more columns than the rank, two sweeps, both blocks kept.
    pub fn new(rank: usize, seed: u64) -> Factor {
        Factor { rank, oversample: 8, sweeps: 2, kept: 2, seed }
    }
}

/// Factors `B A` of a difference, `B = U sqrt(S)` and `A = sqrt(S) V^T`.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank {
    /// `rows` x `rank`, row-major.
    pub b: Vec<f32>,
    /// `rank` x `cols`, row-major.
    pub a: Vec<f32>,
    /// Rows of the difference.
    pub rows: usize,
    /// Columns of the difference.
    pub cols: usize,
    /// The rank: what was asked for, or less where the difference has less.
    pub rank: usize,
    /// The singular values of the factors, largest first.
    pub singular: Vec<f64>,
    /// What no factorisation of the rank asked for can exceed in captured squared norm, but for rounding.
    pub best_sumsq_upper: f64,
}

/// Factors of `delta`, whose squared norm is `energy`; `key` tells one tensor's sketch from another's.
pub fn factor<E: Engine>(
    engine: &E,
    delta: &E::Matrix,
    energy: f64,
    key: u64,
    options: &Factor,
) -> Result<LowRank> {
    let shape = engine.shape(delta);
    if !energy.is_finite() {
        return Err(LowRankError::NotFinite { what: "squared norm", shape });
    }
    if energy <= 0.0 || shape.is_empty() {
        return Err(LowRankError::ZeroDelta { shape });
    }
    if options.rank == 0 {
        return Err(LowRankError::RankZero);
    }
    let map = Map { engine, delta, shape, tall: shape.rows >= shape.cols };
    let whole = map.short() <= options.rank + options.oversample + WHOLE_MARGIN;
    let basis = if whole { map.identity()? } else { map.krylov(energy, key, options)? };
    let projected = map.forward(&basis)?;

    let l = engine.shape(&basis).cols;
    let gram = map.finite_gram(&projected, "projection")?;
    let eigen = Eigen::new(&gram, l)?;
    let theta: Vec<f64> = eigen.values.iter().map(|value| value.max(0.0).sqrt()).collect();
    let largest = theta.first().copied().unwrap_or(0.0);
    if largest <= 0.0 {
        return Err(LowRankError::ZeroDelta { shape });
    }
    // A product in f32 disturbs every singular value by a few epsilons of the largest.
    let cut = 4.0 * f64::from(f32::EPSILON) * (l as f64).sqrt() * largest;
    let rank = theta.iter().take(options.rank).take_while(|&&value| value > cut).count();

    let long =
        engine.apply_right(&projected, &eigen.scaled(rank, |_| 1.0, |j| 1.0 / theta[j].sqrt()), rank)?;
    let short = engine.apply_right(&basis, &eigen.scaled(rank, |_| 1.0, |j| theta[j].sqrt()), rank)?;
    let (b, a) = if map.tall { (long, short) } else { (short, long) };

    let captured: f64 = theta.iter().take(options.rank).map(|value| value * value).sum();
    let missed = if whole {
        0.0
    } else {
        let trace: f64 = (0..l).map(|i| gram[i * l + i]).sum();
        let norm = map.missed_norm_upper(&basis, key, options.seed)?;
        (energy - trace).max(0.0).min(options.rank as f64 * norm * norm)
    };
    Ok(LowRank {
        b: engine.read(&b)?,
        a: transposed(&engine.read(&a)?, rank),
        rows: shape.rows,
        cols: shape.cols,
        rank,
        singular: theta[..rank].to_vec(),
        best_sumsq_upper: captured + missed,
    })
}

/// A difference as a map from its shorter side to its longer one.
struct Map<'a, E: Engine> {
    engine: &'a E,
    delta: &'a E::Matrix,
    shape: Shape,
    tall: bool,
}

impl<E: Engine> Map<'_, E> {
    fn short(&self) -> usize {
        self.shape.rows.min(self.shape.cols)
    }

    /// From the shorter side to the longer.
    fn forward(&self, z: &E::Matrix) -> Result<E::Matrix> {
        Ok(self.engine.gemm(self.delta, !self.tall, z)?)
    }

    /// From the longer side to the shorter.
    fn back(&self, y: &E::Matrix) -> Result<E::Matrix> {
        Ok(self.engine.gemm(self.delta, self.tall, y)?)
    }

    fn identity(&self) -> Result<E::Matrix> {
        let n = self.short();
        let mut data = vec![0.0; n * n];
        data.iter_mut().step_by(n + 1).for_each(|x| *x = 1.0);
        Ok(self.engine.matrix(&data, Shape { rows: n, cols: n })?)
    }

    /// An orthonormal basis from the last blocks of a subspace iteration.
    fn krylov(&self, energy: f64, key: u64, options: &Factor) -> Result<E::Matrix> {
        let width = options.rank + options.oversample;
        let mut z = self.engine.sketch(Shape { rows: self.short(), cols: width }, options.seed, key)?;
        let mut kept: Vec<(Vec<f32>, usize)> = Vec::new();
        for _ in 0..options.sweeps.max(1) {
            let mut y = self.forward(&z)?;
            if !COMFORTABLE.contains(&energy) {
                let l = self.engine.shape(&y).cols;
                let mut scale = vec![0.0; l * l];
                scale.iter_mut().step_by(l + 1).for_each(|x| *x = 1.0 / energy.sqrt());
                y = self.engine.apply_right(&y, &scale, l)?;
            }
            z = self.orthonormal(self.back(&y)?, 1)?;
            kept.push((self.engine.read(&z)?, self.engine.shape(&z).cols));
            if kept.len() > options.kept.max(1) {
                kept.remove(0);
            }
        }
        let cols = kept.iter().map(|(_, cols)| cols).sum();
        let mut all = Vec::with_capacity(self.short() * cols);
        for row in 0..self.short() {
            for (block, cols) in &kept {
                all.extend_from_slice(&block[row * cols..][..*cols]);
            }
        }
        self.orthonormal(self.engine.matrix(&all, Shape { rows: self.short(), cols })?, 2)
    }

    /// An orthonormal basis of the columns of `y`; two passes leave an error of a few f32 epsilons.
    fn orthonormal(&self, mut y: E::Matrix, passes: usize) -> Result<E::Matrix> {
        for _ in 0..passes {
            let l = self.engine.shape(&y).cols;
            let (w, kept) = whitening(&self.finite_gram(&y, "Gram matrix")?, l)?;
            if kept == 0 {
                return Err(LowRankError::ZeroDelta { shape: self.shape });
            }
            y = self.engine.apply_right(&y, &w, kept)?;
        }
        Ok(y)
    }

    fn finite_gram(&self, y: &E::Matrix, what: &'static str) -> Result<Vec<f64>> {
        let gram = self.engine.gram(y)?;
        if gram.iter().all(|x| x.is_finite()) {
            Ok(gram)
        } else {
            Err(LowRankError::NotFinite { what, shape: self.shape })
        }
    }

    /// A bound on the 2-norm of what the basis leaves out, `D (I - Z Z^T)`, from its action on Gaussian vectors
    /// (Halko, Martinsson and Tropp, lemma 4.1).
    fn missed_norm_upper(&self, basis: &E::Matrix, key: u64, seed: u64) -> Result<f64> {
        let shape = Shape { rows: self.short(), cols: PROBES };
        let mut probes = gaussian(shape.rows * shape.cols, seed, key);
        let inside = self.engine.gemm(basis, true, &self.engine.matrix(&probes, shape)?)?;
        let inside = self.engine.read(&self.engine.gemm(basis, false, &inside)?)?;
        for (probe, inside) in probes.iter_mut().zip(inside) {
            *probe -= inside;
        }
        let image = self.forward(&self.engine.matrix(&probes, shape)?)?;
        let gram = self.finite_gram(&image, "probe")?;
        let longest = (0..PROBES).map(|i| gram[i * PROBES + i]).fold(0.0, f64::max).sqrt();
        Ok(10.0 * std::f64::consts::FRAC_2_PI.sqrt() * longest)
    }
}

/// `n` standard normal numbers, of another stream than the sketches.
fn gaussian(n: usize, seed: u64, key: u64) -> Vec<f32> {
    let unit = |word: u32| (f64::from(word) + 0.5) / 2.0f64.powi(32);
    (0..n.div_ceil(4) as u64)
        .flat_map(|i| {
            let counter = [i as u32, (i >> 32) as u32, key as u32, (key >> 32) as u32];
            let words = philox4x32_10(counter, [seed as u32, (seed >> 32) as u32 ^ 0x6761_7573]);
            [[words[0], words[1]], [words[2], words[3]]]
        })
        .flat_map(|[a, b]| {
            let radius = (-2.0 * unit(a).ln()).sqrt();
            let (sin, cos) = (std::f64::consts::TAU * unit(b)).sin_cos();
            [(radius * cos) as f32, (radius * sin) as f32]
        })
        .take(n)
        .collect()
}

/// A row-major matrix of `cols` columns, transposed.
fn transposed(data: &[f32], cols: usize) -> Vec<f32> {
    (0..cols).flat_map(|j| data.iter().skip(j).step_by(cols).copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaussian_moments() {
        let x: Vec<f64> = gaussian(100_001, 3, 9).iter().map(|&x| f64::from(x)).collect();
        assert_eq!(x.len(), 100_001);
        let mean = |power: i32| x.iter().map(|x| x.powi(power)).sum::<f64>() / x.len() as f64;
        // Five standard errors: sqrt(1/n), sqrt(2/n), sqrt(96/n).
        assert!(mean(1).abs() < 0.016 && (mean(2) - 1.0).abs() < 0.023 && (mean(4) - 3.0).abs() < 0.16);
    }

    #[test]
    fn transposed_of_a_small_matrix() {
        assert_eq!(transposed(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    }
}
