//! Truncated singular value decomposition by block Krylov iteration.
//!
//! A block `Z_k` of orthonormal columns is swept through the difference `D`, which gives `Y_k = D Z_k` and the next
//! block, `Z_k+1 = orth(D^T Y_k)` against all blocks before it. The basis is all blocks but the random one at the start;
//! since their images are known from the sweeps, the projection `Y = D Z` costs nothing more, and the f64 Gram matrix of
//! `Y` gives singular values and vectors. Two blocks serve a fixed rank; where the rank is what is looked for, blocks
//! are added until it is found. Where the shorter side is hardly longer than two blocks the basis is the whole side and
//! the result the optimum.
//!
//! Products with `D` are f32, Gram matrices and everything small are f64. Singular values below about 1e-6 of the
//! largest are rounding noise of the products and are cut.

use kernels::{DeltaStats, Engine, Shape, philox4x32_10};

use crate::small::{Eigen, whitening};
use crate::{LowRankError, Result};

/// Gaussian probes for the norm of what the basis leaves out: the bound fails with probability 1e-10 a matrix.
const PROBES: usize = 10;
/// A side this much longer than a block is still decomposed whole.
const WHOLE_MARGIN: usize = 8;
/// Squared norms within this range cannot leave f32 when multiplied twice.
const COMFORTABLE: std::ops::Range<f64> = 1e-16..1e16;
/// The width of a block without the oversampling where the rank is not known.
const UNKNOWN_RANK: usize = 16;

/// Which rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rank {
    /// This one, or less where the difference has less.
    Fixed(usize),
    /// The smallest that leaves at most this share of the squared norm, as far as the singular values found show it
    /// (they never show too much), but not more than `max`.
    Residual {
        /// The share.
        share: f64,
        /// The largest rank.
        max: usize,
    },
    /// As many singular values as stand above what rounding the degraded weights alone would make, but not more than
    /// `max`: above `(sqrt m + sqrt n) sqrt(F / (m n))`, the edge of an m x n matrix of that noise, F being a twelfth of
    /// the sum of the squared units in the last place. May be 0.
    Noise {
        /// The largest rank.
        max: usize,
    },
}

impl Rank {
    fn max(self) -> usize {
        match self {
            Rank::Fixed(rank) => rank,
            Rank::Residual { max, .. } | Rank::Noise { max } => max,
        }
    }

    /// How many of these singular values, largest first, to keep.
    pub(crate) fn choose(self, theta: &[f64], shape: Shape, stats: &DeltaStats) -> usize {
        let chosen = match self {
            Rank::Fixed(rank) => rank,
            Rank::Residual { share, .. } => {
                let goal = (1.0 - share) * stats.sumsq;
                let mut sum = 0.0;
                let reached = theta.iter().position(|value| {
                    sum += value * value;
                    sum >= goal
                });
                reached.map_or(usize::MAX, |last| last + 1)
            }
            Rank::Noise { .. } => {
                let (m, n) = (shape.rows as f64, shape.cols as f64);
                let edge = (m.sqrt() + n.sqrt()) * (stats.ulp_sumsq / 12.0 / (m * n)).sqrt();
                theta.iter().take_while(|&&value| value > edge).count()
            }
        };
        chosen.min(self.max()).min(theta.len())
    }
}

/// How to factor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Factor {
    /// The rank.
    pub rank: Rank,
    /// Columns of a block beyond the rank.
    pub oversample: usize,
    /// Blocks of the basis, at least 1; more where the rank is not fixed.
    pub blocks: usize,
    /// The seed of the sketch.
    pub seed: u64,
}

impl Factor {
    /// The defaults: 8 more columns than the rank, two blocks.
    pub fn new(rank: Rank, seed: u64) -> Factor {
        Factor { rank, oversample: 8, blocks: 2, seed }
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
    /// The rank that was chosen: 0 where nothing stands out of the noise.
    pub rank: usize,
    /// The singular values of the factors, largest first.
    pub singular: Vec<f64>,
    /// The squared norm of what lies outside of the basis that the factors were found in.
    pub outside_sumsq: f64,
    /// A bound on its 2-norm, squared; fails with probability 1e-10.
    pub outside_norm_sq: f64,
    /// What no factorisation of this rank can exceed in captured squared norm, but for rounding.
    pub best_sumsq_upper: f64,
}

impl LowRank {
    /// The same with a smaller rank.
    pub fn truncated(&self, rank: usize) -> LowRank {
        let rank = rank.min(self.rank);
        let b = self.b.chunks_exact(self.rank.max(1)).flat_map(|row| row[..rank].iter().copied()).collect();
        let singular = self.singular[..rank].to_vec();
        let best_sumsq_upper = best(&singular, self.outside_sumsq, self.outside_norm_sq);
        LowRank { b, a: self.a[..rank * self.cols].to_vec(), rank, singular, best_sumsq_upper, ..*self }
    }
}

/// The bound of Ky Fan on the first term of `D D^T = D Z (D Z)^T + R R^T`, and of Weyl on the second.
fn best(theta: &[f64], outside_sumsq: f64, outside_norm_sq: f64) -> f64 {
    let inside: f64 = theta.iter().map(|value| value * value).sum();
    inside + outside_sumsq.min(theta.len() as f64 * outside_norm_sq)
}

/// Factors of a difference, and its sums; `None` where both sides are equal in every element. `key` tells one tensor's
/// sketch from another's.
pub fn factor<E: Engine>(
    engine: &E,
    pair: &E::Pair,
    key: u64,
    options: &Factor,
) -> Result<(Option<LowRank>, DeltaStats)> {
    let shape = engine.pair_shape(pair);
    if options.rank.max() == 0 {
        return Err(LowRankError::RankZero);
    }
    if shape.is_empty() {
        return Ok((None, DeltaStats::default()));
    }
    let width = match options.rank {
        Rank::Fixed(rank) => rank,
        rank => rank.max().min(UNKNOWN_RANK),
    } + options.oversample;
    let mut map = Map { engine, pair, shape, stats: DeltaStats::default() };
    let basis = match shape.rows.min(shape.cols) <= width + WHOLE_MARGIN {
        true => map.whole()?,
        false => map.krylov(width, key, options)?,
    };
    let stats = map.stats;
    let Some(basis) = basis else { return Ok((None, stats)) };
    let Found { theta, eigen, long, short, tall, outside: (outside_sumsq, outside_norm_sq) } = basis;
    let rank = options.rank.choose(&theta, shape, &stats);
    let long = engine.apply_right(&long, &eigen.scaled(rank, |_| 1.0, |j| 1.0 / theta[j].sqrt()), rank)?;
    let short_factor = engine.apply_right(&short, &eigen.scaled(rank, |_| 1.0, |j| theta[j].sqrt()), rank)?;
    let (b, a) = if tall { (long, short_factor) } else { (short_factor, long) };
    let singular = theta[..rank].to_vec();
    let best_sumsq_upper = best(&singular, outside_sumsq, outside_norm_sq);
    Ok((
        Some(LowRank {
            b: engine.read(&b)?,
            a: transposed(&engine.read(&a)?, rank),
            rows: shape.rows,
            cols: shape.cols,
            rank,
            singular,
            outside_sumsq,
            outside_norm_sq,
            best_sumsq_upper,
        }),
        stats,
    ))
}

/// The projection on a basis of one side: `long = D short` for orthonormal columns `short`, decomposed.
struct Found<M> {
    /// Singular values of the projection above rounding, largest first.
    theta: Vec<f64>,
    eigen: Eigen,
    long: M,
    short: M,
    /// Whether `short` lies on the side of the columns.
    tall: bool,
    /// What the basis leaves out: squared norm, and a bound on the squared 2-norm.
    outside: (f64, f64),
}

/// A difference being factored.
struct Map<'a, E: Engine> {
    engine: &'a E,
    pair: &'a E::Pair,
    shape: Shape,
    stats: DeltaStats,
}

impl<E: Engine> Map<'_, E> {
    /// The decomposition of the whole difference, on its shorter side.
    fn whole(&mut self) -> Result<Option<Found<E::Matrix>>> {
        let (delta, stats) = self.engine.delta(self.pair)?;
        self.stats = stats;
        if self.is_zero()? {
            return Ok(None);
        }
        let tall = self.shape.rows >= self.shape.cols;
        let n = self.shape.rows.min(self.shape.cols);
        let mut identity = vec![0.0; n * n];
        identity.iter_mut().step_by(n + 1).for_each(|x| *x = 1.0);
        let identity = self.engine.matrix(&identity, Shape { rows: n, cols: n })?;
        let long = if tall { delta } else { self.engine.gemm(&delta, true, &identity)? };
        let (theta, eigen) = self.decompose(&long, &self.gram(&long, "projection")?, n)?;
        Ok(Some(Found { theta, eigen, long, short: identity, tall, outside: (0.0, 0.0) }))
    }

    /// The decomposition of the projection on a block Krylov basis.
    fn krylov(&mut self, width: usize, key: u64, options: &Factor) -> Result<Option<Found<E::Matrix>>> {
        let engine = self.engine;
        let side = self.shape.cols;
        let start = engine.sketch(Shape { rows: side, cols: width }, options.seed, key)?;
        let mut stats = DeltaStats::default();
        let (_, mut w) = engine.sweep(self.pair, &start, Some(&mut stats))?;
        self.stats = stats;
        if self.is_zero()? {
            return Ok(None);
        }
        if !COMFORTABLE.contains(&stats.sumsq) {
            w = engine.sweep(self.pair, &self.times(&start, 1.0 / stats.sumsq.sqrt())?, None)?.1;
        }
        let Some(mut z) = self.orthonormal(None, &w)? else {
            // What is there is too small for f32 products to see; its sums are known all the same.
            return Ok(None);
        };
        let mut basis: Option<(E::Matrix, E::Matrix)> = None;
        let probes =
            engine.matrix(&gaussian(side * PROBES, options.seed, key), Shape { rows: side, cols: PROBES })?;
        let mut probed = None;
        for block in 1.. {
            let last = matches!(options.rank, Rank::Fixed(_)) && block >= options.blocks.max(1);
            let columns = engine.shape(&z).cols;
            let (y, next) = if last {
                // The probes go through with the last block, in the same read.
                let y = engine.forward(self.pair, &engine.beside(&[&z, &probes])?)?;
                probed = Some(engine.columns(&y, columns..columns + PROBES)?);
                (engine.columns(&y, 0..columns)?, None)
            } else if COMFORTABLE.contains(&stats.sumsq) {
                let (y, w) = engine.sweep(self.pair, &z, None)?;
                (y, Some(w))
            } else {
                let norm = stats.sumsq.sqrt();
                let (y, w) = engine.sweep(self.pair, &self.times(&z, 1.0 / norm)?, None)?;
                (self.times(&y, norm)?, Some(w))
            };
            let (all_z, all_y) = match &basis {
                None => (z, y),
                Some((before_z, before_y)) => {
                    (engine.beside(&[before_z, &z])?, engine.beside(&[before_y, &y])?)
                }
            };
            let l = engine.shape(&all_z).cols;
            let following = match next {
                Some(w) if !self.settled(&all_y, l, columns, block, options)? => {
                    self.orthonormal(Some(&all_z), &w)?
                }
                _ => None,
            };
            if let Some(following) = following {
                basis = Some((all_z, all_y));
                z = following;
                continue;
            }
            let probed = match probed {
                Some(probed) => probed,
                None => engine.forward(self.pair, &probes)?,
            };
            let gram = self.gram(&all_y, "projection")?;
            let outside = self.outside(&all_z, &all_y, &probes, &probed, &gram)?;
            let (theta, eigen) = self.decompose(&all_y, &gram, l)?;
            return Ok(Some(Found { theta, eigen, long: all_y, short: all_z, tall: true, outside }));
        }
        Ok(None)
    }

    /// Whether the rank that is looked for is found in a basis of `l` columns, the last `columns` of them new.
    fn settled(
        &self,
        y: &E::Matrix,
        l: usize,
        columns: usize,
        block: usize,
        options: &Factor,
    ) -> Result<bool> {
        if block < options.blocks.max(1) {
            return Ok(false);
        }
        let (theta, _) = self.decompose(y, &self.gram(y, "projection")?, l)?;
        // The last block is the coarsest; a rank that needs none of it is trusted.
        Ok(options.rank.choose(&theta, self.shape, &self.stats) + columns <= l
            || l >= options.rank.max() + columns)
    }

    /// Whether both sides are equal; sums that are no numbers are an error.
    fn is_zero(&self) -> Result<bool> {
        if !self.stats.sumsq.is_finite() {
            return Err(LowRankError::NotFinite { what: "squared norm", shape: self.shape });
        }
        Ok(self.stats.nonzero == 0 || self.stats.sumsq <= 0.0)
    }

    /// Singular values and right vectors of `y` from its Gram matrix; values that are rounding of products are cut.
    fn decompose(&self, y: &E::Matrix, gram: &[f64], l: usize) -> Result<(Vec<f64>, Eigen)> {
        let eigen = Eigen::new(gram, l)?;
        let theta: Vec<f64> = eigen.values.iter().map(|value| value.max(0.0).sqrt()).collect();
        let largest = theta.first().copied().unwrap_or(0.0);
        if largest <= 0.0 {
            return Err(LowRankError::NotFinite { what: "projection", shape: self.engine.shape(y) });
        }
        // A product in f32 disturbs every singular value by a few epsilons of the largest.
        let cut = 4.0 * f64::from(f32::EPSILON) * (l as f64).sqrt() * largest;
        Ok((theta.into_iter().take_while(|&value| value > cut).collect(), eigen))
    }

    /// An orthonormal basis of what the columns of `w` add to the orthonormal ones of `before`; `None` if nothing that
    /// stands out of the rounding of `w`. The last of its passes leaves an error of a few f32 epsilons.
    fn orthonormal(&self, before: Option<&E::Matrix>, w: &E::Matrix) -> Result<Option<E::Matrix>> {
        let engine = self.engine;
        let known = before.map_or(0, |z| engine.shape(z).cols);
        // The known columns are orthonormal to an f32 epsilon, so what is left of W beside them is not in the Gram matrix
        // of both, where it drowns in that epsilon: it is made, and only then are its columns made orthonormal.
        let passes: &[bool] = if known > 0 { &[false, true, true] } else { &[true, true] };
        let mut found: Option<E::Matrix> = None;
        for &whiten in passes {
            let new = found.as_ref().unwrap_or(w);
            let all = before.map(|before| engine.beside(&[before, new])).transpose()?;
            let all = all.as_ref().unwrap_or(new);
            let l = engine.shape(all).cols;
            let count = l - known;
            let gram = self.gram(all, "Gram matrix")?;
            let at = |i: usize, j: usize| gram[i * l + j];
            let (mut white, mut kept) = (vec![0.0; count * count], count);
            if whiten {
                // S = W^T W - C^T C with C = Z^T W.
                let mut rest = vec![0.0; count * count];
                for i in 0..count {
                    for j in 0..count {
                        let inside: f64 = (0..known).map(|k| at(k, known + i) * at(k, known + j)).sum();
                        rest[i * count + j] = at(known + i, known + j) - inside;
                    }
                }
                if known > 0 && count == engine.shape(w).cols {
                    // Columns came from unit length: one that lay in the known ones, but for their own epsilon, is
                    // dropped.
                    let rounding = (2.0 * f64::from(f32::EPSILON)).powi(2);
                    for i in (0..count).filter(|&i| at(known + i, known + i) <= rounding) {
                        (0..count).for_each(|j| (rest[i * count + j], rest[j * count + i]) = (0.0, 0.0));
                    }
                }
                (white, kept) = whitening(&rest, count)?;
            } else {
                for i in 0..count {
                    let square = at(known + i, known + i);
                    white[i * count + i] = if square > 0.0 { 1.0 / square.sqrt() } else { 0.0 };
                }
            }
            if kept == 0 {
                return Ok(None);
            }
            // [Z W] [-C; 1] white
            let mut coefficients = vec![0.0; l * kept];
            for k in 0..known {
                for j in 0..kept {
                    coefficients[k * kept + j] =
                        -(0..count).map(|i| at(k, known + i) * white[i * kept + j]).sum::<f64>();
                }
            }
            coefficients[known * kept..].copy_from_slice(&white);
            found = Some(engine.apply_right(all, &coefficients, kept)?);
        }
        Ok(found)
    }

    /// What the basis leaves out, `R = D (1 - Z Z^T)`: its squared norm, and a bound on its squared 2-norm from its
    /// action on Gaussian vectors (Halko, Martinsson and Tropp, lemma 4.1).
    fn outside(
        &self,
        z: &E::Matrix,
        y: &E::Matrix,
        probes: &E::Matrix,
        probed: &E::Matrix,
        gram: &[f64],
    ) -> Result<(f64, f64)> {
        let engine = self.engine;
        let l = engine.shape(z).cols;
        let trace: f64 = (0..l).map(|i| gram[i * l + i]).sum();
        // R w = D w - Y (Z^T w)
        let inside = engine.read(&engine.gemm(z, true, probes)?)?;
        let mut coefficients: Vec<f64> = inside.iter().map(|&x| -f64::from(x)).collect();
        for i in 0..PROBES {
            coefficients.extend((0..PROBES).map(|j| f64::from(u8::from(i == j))));
        }
        let image = engine.apply_right(&engine.beside(&[y, probed])?, &coefficients, PROBES)?;
        let gram = self.gram(&image, "probe")?;
        let longest_sq = (0..PROBES).map(|i| gram[i * PROBES + i]).fold(0.0, f64::max);
        let norm_sq = 100.0 * std::f64::consts::FRAC_2_PI * longest_sq;
        Ok(((self.stats.sumsq - trace).max(0.0), norm_sq))
    }

    fn times(&self, y: &E::Matrix, factor: f64) -> Result<E::Matrix> {
        let l = self.engine.shape(y).cols;
        let mut scale = vec![0.0; l * l];
        scale.iter_mut().step_by(l + 1).for_each(|x| *x = factor);
        Ok(self.engine.apply_right(y, &scale, l)?)
    }

    fn gram(&self, y: &E::Matrix, what: &'static str) -> Result<Vec<f64>> {
        let gram = self.engine.gram(y)?;
        if gram.iter().all(|x| x.is_finite()) {
            Ok(gram)
        } else {
            Err(LowRankError::NotFinite { what, shape: self.shape })
        }
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
