//! Truncated singular value decomposition by block Krylov iteration.
//!
//! A block `Z_k` is swept through the difference `D`, which gives `Y_k = D Z_k` and `W_k = D^T Y_k`; the next block is
//! what `W_k` adds to the blocks before it, orthonormal. With `Q = Y T` an orthonormal basis of all `Y` together, the
//! projection `Q^T D = T^T W^T` is known without another product, so k sweeps give what 2k products can. Its singular
//! values and vectors come from f64 Gram matrices of `Y` and `W`. Three blocks serve a fixed rank; where the rank is what
//! is looked for, blocks are added until it is found. Where the shorter side is hardly longer than a block the basis is
//! the whole side and the result the optimum.
//!
//! Products with `D` are f32, Gram matrices and everything small are f64. `W` carries an error of about an f32 epsilon of
//! the largest values, which `T` enlarges where columns of `Y` are nearly dependent: directions that drown in it are cut,
//! and where they are needed, or what is left would count beside the residual, the projection is made by one more
//! product. Singular values below about 1e-6 of the largest are rounding noise of the products and are cut.
//!
//! Measured at rank 16 against blocks of 8 more than the rank, two sweeps and a projection (240 operations an element, here
//! 216): the residual exceeds the optimum by about 0.1 % with either where 64 values fall as i^-0.7, and by 0.3 % instead
//! of 0.7 % where 768 fall as i^-0.3.

use faer::MatRef;
use kernels::{DeltaStats, Engine, Shape};

use crate::small::{Directions, Eigen, whitening};
use crate::{LowRankError, Result};

/// A side this much longer than a block is still decomposed whole.
const WHOLE_MARGIN: usize = 8;
/// Squared norms within this range cannot leave f32 when multiplied twice.
const COMFORTABLE: std::ops::Range<f64> = 1e-16..1e16;
/// The rank that blocks are made for where it is not known.
const UNKNOWN_RANK: usize = 16;
/// Columns of a block are a multiple of this: what the innermost loops take at a time.
const WIDTH_STEP: usize = 6;
/// Blocks of a chain whose first block, the random one, is part of the basis.
const SHORT_CHAIN: usize = 4;
/// The squared error of a column of `W` in relation to the squared norms of `D` and of its column of `Y`: sums of f32
/// products, each of some roundings, in parts.
const PRODUCT_ERROR: f64 = 1.4e-14; // (2^-23)^2

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

    /// The rank that a block is made for.
    fn aimed(self) -> usize {
        match self {
            Rank::Fixed(rank) => rank,
            rank => rank.max().min(UNKNOWN_RANK),
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
    /// Columns of a block beyond the rank, at least.
    pub oversample: usize,
    /// Blocks of the basis, at least 1; more where the rank is not fixed.
    pub blocks: usize,
    /// The seed of the sketch.
    pub seed: u64,
}

impl Factor {
    /// The defaults: three blocks, of two more columns than the rank and one for each 32 of it.
    pub fn new(rank: Rank, seed: u64) -> Factor {
        Factor { rank, oversample: 2 + rank.aimed() / 32, blocks: 3, seed }
    }

    /// Columns of a block.
    pub fn width(&self) -> usize {
        (self.rank.aimed() + self.oversample).next_multiple_of(WIDTH_STEP)
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
    /// A bound on the squared norm of what lies outside of the basis that the factors were found in.
    pub outside_sumsq: f64,
    /// What no factorisation of this rank can exceed in captured squared norm, but for rounding.
    pub best_sumsq_upper: f64,
}

impl LowRank {
    /// The same with a smaller rank.
    pub fn truncated(&self, rank: usize) -> LowRank {
        let rank = rank.min(self.rank);
        let b = self.b.chunks_exact(self.rank.max(1)).flat_map(|row| row[..rank].iter().copied()).collect();
        let singular = self.singular[..rank].to_vec();
        let best_sumsq_upper = best(&singular, self.outside_sumsq);
        LowRank { b, a: self.a[..rank * self.cols].to_vec(), rank, singular, best_sumsq_upper, ..*self }
    }
}

/// With orthonormal `Q` and `R = (1 - Q Q^T) D`, `D^T D = (Q^T D)^T (Q^T D) + R^T R`, and by Ky Fan the sum of the first
/// squared singular values of `D` is at most that of `Q^T D` and all of `R`.
fn best(theta: &[f64], outside_sumsq: f64) -> f64 {
    theta.iter().map(|value| value * value).sum::<f64>() + outside_sumsq
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
    let mut map = Map { engine, pair, shape, stats: DeltaStats::default() };
    let basis = match shape.rows.min(shape.cols) <= options.width() + WHOLE_MARGIN {
        true => map.whole()?,
        false => map.krylov(key, options)?,
    };
    let stats = map.stats;
    let Some(Found { theta, left, right, to_left, to_right, outside_sumsq, .. }) = basis else {
        return Ok((None, stats));
    };
    let rank = options.rank.choose(&theta, shape, &stats);
    let b = engine.apply_right(&left, &to_left.columns(rank, |j| theta[j].sqrt()), rank)?;
    let a = engine.apply_right(&right, &to_right.columns(rank, |j| 1.0 / theta[j].sqrt()), rank)?;
    let singular = theta[..rank].to_vec();
    let best_sumsq_upper = best(&singular, outside_sumsq);
    Ok((
        Some(LowRank {
            b: engine.read(&b)?,
            a: transposed(&engine.read(&a)?, rank),
            rows: shape.rows,
            cols: shape.cols,
            rank,
            singular,
            outside_sumsq,
            best_sumsq_upper,
        }),
        stats,
    ))
}

/// A projection `Q^T D`, decomposed: `D` is about `(left to_left) theta^-1 (right to_right)^T`, with singular vectors
/// `left to_left` and, times the singular values, `right to_right`.
struct Found<M> {
    /// Singular values above rounding, largest first.
    theta: Vec<f64>,
    left: M,
    right: M,
    to_left: Coefficients,
    to_right: Coefficients,
    /// A bound on the squared norm of what the basis leaves out.
    outside_sumsq: f64,
    /// Columns of the basis, and whether any were cut that more precise products would have kept.
    columns: usize,
    cut: bool,
    /// The squared norm of the error of the projection.
    error_sumsq: f64,
}

/// A small row-major matrix.
struct Coefficients {
    rows: usize,
    cols: usize,
    data: Vec<f64>,
}

impl Coefficients {
    /// The first columns, each times `factor(j)`.
    fn columns(&self, count: usize, factor: impl Fn(usize) -> f64) -> Vec<f64> {
        let at = |i: usize| (0..count).map(move |j| (i, j));
        (0..self.rows).flat_map(at).map(|(i, j)| self.data[i * self.cols + j] * factor(j)).collect()
    }

    fn times(&self, other: &Coefficients) -> Coefficients {
        let mat = |c: &Coefficients| MatRef::from_row_major_slice(&c.data, c.rows, c.cols).to_owned();
        let product = mat(self) * mat(other);
        let at = |i: usize| (0..other.cols).map(move |j| (i, j));
        let data = (0..self.rows).flat_map(at).map(|at| product[at]).collect();
        Coefficients { rows: self.rows, cols: other.cols, data }
    }
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
        let engine = self.engine;
        let (delta, stats) = engine.delta(self.pair)?;
        self.stats = stats;
        if self.is_zero()? {
            return Ok(None);
        }
        let n = self.shape.rows.min(self.shape.cols);
        let mut identity = vec![0.0; n * n];
        identity.iter_mut().step_by(n + 1).for_each(|x| *x = 1.0);
        let identity = engine.matrix(&identity, Shape { rows: n, cols: n })?;
        let wide = self.shape.rows <= self.shape.cols;
        let long = if wide { engine.gemm(&delta, true, &identity)? } else { delta };
        let (theta, eigen) = self.decompose(&self.gram(&long, "projection")?, n)?;
        let count = theta.len();
        let vectors = |col: &dyn Fn(usize) -> f64| Coefficients {
            rows: n,
            cols: count,
            data: eigen.scaled(count, |_| 1.0, col),
        };
        let plain = |_| 1.0;
        // `D V` or `D^T U` have the singular values in them; the identity has not.
        let (left, right, to_left, to_right) = match wide {
            true => (identity, long, vectors(&plain), vectors(&plain)),
            false => (long, identity, vectors(&|j| 1.0 / theta[j]), vectors(&|j| theta[j])),
        };
        let found = Found {
            left,
            right,
            to_left,
            to_right,
            outside_sumsq: 0.0,
            columns: n,
            cut: false,
            error_sumsq: 0.0,
            theta,
        };
        Ok(Some(found))
    }

    /// The decomposition of the projection on a block Krylov basis.
    fn krylov(&mut self, key: u64, options: &Factor) -> Result<Option<Found<E::Matrix>>> {
        let (engine, width) = (self.engine, options.width());
        let mut z = engine.sketch(Shape { rows: self.shape.cols, cols: width }, options.seed, key)?;
        let mut stats = DeltaStats::default();
        let (mut y, mut w) = engine.sweep(self.pair, &z, Some(&mut stats))?;
        self.stats = stats;
        if self.is_zero()? {
            return Ok(None);
        }
        let scale = if COMFORTABLE.contains(&stats.sumsq) { 1.0 } else { 1.0 / stats.sumsq.sqrt() };
        if scale != 1.0 {
            (y, w) = engine.sweep(self.pair, &self.times(&z, scale)?, None)?;
        }
        let mut blocks = vec![(y, w)];
        // The random block is no part of it.
        let mut orthonormal: Option<E::Matrix> = None;
        for block in 1.. {
            let last = matches!(options.rank, Rank::Fixed(_)) && block >= options.blocks.max(1);
            if !last {
                if block >= options.blocks.max(1) {
                    let found = self.project(&blocks)?;
                    if let Some(found) = found.filter(|found| self.settled(found, width, options)) {
                        return self.refined(found, &blocks, options).map(Some);
                    }
                }
                let Some((_, w)) = blocks.last() else { break };
                if let Some(next) = self.orthonormal(orthonormal.as_ref(), w)? {
                    z = next;
                    blocks.push(match scale == 1.0 {
                        true => engine.sweep(self.pair, &z, None)?,
                        false => engine.sweep(self.pair, &self.times(&z, scale)?, None)?,
                    });
                    orthonormal = Some(match orthonormal {
                        None => z,
                        Some(before) => engine.beside(&[&before, &z])?,
                    });
                    continue;
                }
            }
            // What is there may be too small for f32 products to see; its sums are known all the same.
            let Some(found) = self.project(&blocks)? else { return Ok(None) };
            return self.refined(found, &blocks, options).map(Some);
        }
        Ok(None)
    }

    /// Whether the rank that is looked for is found.
    fn settled(&self, found: &Found<E::Matrix>, width: usize, options: &Factor) -> bool {
        // The last block is the coarsest; a rank that needs none of it is trusted.
        let rank = options.rank.choose(&found.theta, self.shape, &self.stats);
        rank + width <= found.columns
            || found.columns >= (options.rank.max() + width).min(self.shape.rows.min(self.shape.cols))
    }

    /// The blocks that make the basis, side by side. The image of the random block adds what a sweep would cost, but in a
    /// long chain it is spanned by the others, ever more nearly, and that is no basis to compute with.
    fn basis(&self, blocks: &[(E::Matrix, E::Matrix)]) -> Result<(E::Matrix, E::Matrix)> {
        let from = usize::from(blocks.len() > SHORT_CHAIN);
        let left: Vec<&E::Matrix> = blocks[from..].iter().map(|(y, _)| y).collect();
        let right: Vec<&E::Matrix> = blocks[from..].iter().map(|(_, w)| w).collect();
        Ok((self.engine.beside(&left)?, self.engine.beside(&right)?))
    }

    /// The projection on what the images of all blocks span, from the sweeps alone; `None` if they span nothing.
    fn project(&self, blocks: &[(E::Matrix, E::Matrix)]) -> Result<Option<Found<E::Matrix>>> {
        let engine = self.engine;
        let (left, right) = self.basis(blocks)?;
        let l = engine.shape(&left).cols;
        let (gram, right_gram) = (self.gram(&left, "projection")?, self.gram(&right, "projection")?);
        let basis = Whitened::new(&gram, l)?;
        let Some(_) = basis.values.first() else { return Ok(None) };
        // The squared norms of the rows of `Q^T D` in this basis, and of their errors.
        let rows = basis.gram(&right_gram);
        let size = basis.values.len();
        let error = |j: usize| PRODUCT_ERROR * self.stats.sumsq / basis.values[j];
        let kept: Vec<usize> = (0..size).filter(|&j| rows[j * size + j] > 16.0 * error(j)).collect();
        let error_sumsq = kept.iter().map(|&j| error(j)).sum();
        if kept.is_empty() {
            return Ok(None);
        }
        let to_basis = basis.columns(&kept);
        let small: Vec<f64> = kept
            .iter()
            .flat_map(|&i| kept.iter().map(move |&j| (i, j)))
            .map(|(i, j)| rows[i * size + j])
            .collect();
        let mut found = self.decomposed(left, right, &to_basis, &small, error_sumsq)?;
        found.columns = l;
        found.cut = kept.len() < size;
        Ok(Some(found))
    }

    /// The same with a projection by a product of its own, where that of the sweeps is not good enough.
    fn refined(
        &self,
        found: Found<E::Matrix>,
        blocks: &[(E::Matrix, E::Matrix)],
        options: &Factor,
    ) -> Result<Found<E::Matrix>> {
        let rank = options.rank.choose(&found.theta, self.shape, &self.stats);
        let held: f64 = found.theta[..rank].iter().map(|value| value * value).sum();
        let short = found.cut && rank >= found.theta.len() && rank < options.rank.max();
        if !short && found.error_sumsq <= 1e-4 * (self.stats.sumsq - held) {
            return Ok(found);
        }
        let engine = self.engine;
        let (left, _) = self.basis(blocks)?;
        let basis = Whitened::new(&self.gram(&left, "projection")?, engine.shape(&left).cols)?;
        let all = basis.columns(&(0..basis.values.len()).collect::<Vec<_>>());
        let q = engine.apply_right(&left, &all.data, all.cols)?;
        let right = engine.back(self.pair, &q)?;
        let gram = self.gram(&right, "projection")?;
        let same: Vec<f64> =
            (0..all.cols * all.cols).map(|at| f64::from(u8::from(at % (all.cols + 1) == 0))).collect();
        let same = Coefficients { rows: all.cols, cols: all.cols, data: same };
        let error_sumsq = PRODUCT_ERROR * self.stats.sumsq * all.cols as f64;
        let refined = self.decomposed(q, right, &same, &gram, error_sumsq)?;
        Ok(Found { columns: found.columns, ..refined })
    }

    /// Decomposes `Q^T D` with `Q = left to_basis` and `D^T Q = right to_basis`, whose Gram matrix is `gram`.
    fn decomposed(
        &self,
        left: E::Matrix,
        right: E::Matrix,
        to_basis: &Coefficients,
        gram: &[f64],
        error_sumsq: f64,
    ) -> Result<Found<E::Matrix>> {
        let (theta, eigen) = self.decompose(gram, to_basis.cols)?;
        let count = theta.len();
        let vectors =
            Coefficients { rows: to_basis.cols, cols: count, data: eigen.scaled(count, |_| 1.0, |_| 1.0) };
        let to_left = to_basis.times(&vectors);
        let to_right = Coefficients { data: to_left.data.clone(), ..to_left };
        let inside: f64 = (0..to_basis.cols).map(|j| gram[j * to_basis.cols + j]).sum();
        // A projection that is off by e may hold up to 2 e |D| less than it seems to.
        let slack = 2.0 * (error_sumsq * inside).sqrt() + error_sumsq;
        let outside_sumsq = (self.stats.sumsq - inside).max(0.0) + slack;
        Ok(Found {
            theta,
            left,
            right,
            to_left,
            to_right,
            outside_sumsq,
            columns: to_basis.cols,
            cut: false,
            error_sumsq,
        })
    }

    /// Whether both sides are equal; sums that are no numbers are an error.
    fn is_zero(&self) -> Result<bool> {
        if !self.stats.sumsq.is_finite() {
            return Err(LowRankError::NotFinite { what: "squared norm", shape: self.shape });
        }
        Ok(self.stats.nonzero == 0 || self.stats.sumsq <= 0.0)
    }

    /// Singular values and vectors from the Gram matrix of a projection; values that are rounding of products are cut.
    fn decompose(&self, gram: &[f64], l: usize) -> Result<(Vec<f64>, Eigen)> {
        let eigen = Eigen::new(gram, l)?;
        let theta: Vec<f64> = eigen.values.iter().map(|value| value.max(0.0).sqrt()).collect();
        let largest = theta.first().copied().unwrap_or(0.0);
        if largest <= 0.0 {
            return Err(LowRankError::NotFinite { what: "projection", shape: self.shape });
        }
        // A product in f32 disturbs every singular value by a few epsilons of the largest.
        let cut = 4.0 * f64::from(f32::EPSILON) * (l as f64).sqrt() * largest;
        Ok((theta.into_iter().take_while(|&value| value > cut).collect(), eigen))
    }

    /// An orthonormal basis of what the columns of `w` add to the orthonormal ones of `before`; `None` if nothing.
    fn orthonormal(&self, before: Option<&E::Matrix>, w: &E::Matrix) -> Result<Option<E::Matrix>> {
        let columns = |m: &E::Matrix| self.engine.shape(m).cols;
        let found = self.added(before, w)?;
        // What is left of `w` carries the error of the known columns as often enlarged as it is shorter. That is harmless
        // once, but not block after block.
        match (found, before) {
            (Some(found), Some(before)) if columns(before) > columns(w) => self.added(Some(before), &found),
            (found, _) => Ok(found),
        }
    }

    /// The same but for errors of some f32 epsilons of the length of `w`.
    fn added(&self, before: Option<&E::Matrix>, w: &E::Matrix) -> Result<Option<E::Matrix>> {
        let engine = self.engine;
        let known = before.map_or(0, |z| engine.shape(z).cols);
        let all = before.map(|before| engine.beside(&[before, w])).transpose()?;
        let all = all.as_ref().unwrap_or(w);
        let l = engine.shape(all).cols;
        let count = l - known;
        let gram = self.gram(all, "Gram matrix")?;
        let at = |i: usize, j: usize| gram[i * l + j];
        // S = W^T W - C^T C with C = Z^T W.
        let mut rest = vec![0.0; count * count];
        for i in 0..count {
            for j in 0..count {
                let inside: f64 = (0..known).map(|k| at(k, known + i) * at(k, known + j)).sum();
                rest[i * count + j] = at(known + i, known + j) - inside;
            }
        }
        // A column that lies in the known ones, but for the epsilon to which they are orthonormal, adds nothing.
        let rounding = (8.0 * f64::from(f32::EPSILON)).powi(2);
        let inside = |i: &usize| rest[i * count + i] <= rounding * at(known + i, known + i);
        for i in (0..count).filter(inside).collect::<Vec<_>>() {
            (0..count).for_each(|j| (rest[i * count + j], rest[j * count + i]) = (0.0, 0.0));
        }
        let (white, kept) = whitening(&rest, count)?;
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
        Ok(Some(engine.apply_right(all, &coefficients, kept)?))
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

/// An orthonormal basis `Q = Y T` of the columns of a matrix, from its Gram matrix: the eigenvectors of that of its
/// columns at unit length, with the eigenvalues, largest first, down to what f32 columns can tell.
struct Whitened {
    values: Vec<f64>,
    /// Row-major, a row for each column of `Y`.
    to_basis: Coefficients,
}

impl Whitened {
    fn new(gram: &[f64], l: usize) -> Result<Whitened> {
        let directions = Directions::new(gram, l)?;
        let eps = f64::from(f32::EPSILON);
        let values = directions.above(l as f64 * eps * eps).to_vec();
        let (cols, data) = (values.len(), directions.to_basis(values.len()));
        Ok(Whitened { values, to_basis: Coefficients { rows: l, cols, data } })
    }

    /// `T^T G T`.
    fn gram(&self, gram: &[f64]) -> Vec<f64> {
        let Coefficients { rows, cols, data } = &self.to_basis;
        let transposed =
            (0..*cols).flat_map(|j| (0..*rows).map(move |i| (i, j))).map(|(i, j)| data[i * cols + j]);
        let transposed = Coefficients { rows: *cols, cols: *rows, data: transposed.collect() };
        let gram = Coefficients { rows: *rows, cols: *rows, data: gram.to_vec() };
        transposed.times(&gram.times(&self.to_basis)).data
    }

    /// Some columns of `T`.
    fn columns(&self, kept: &[usize]) -> Coefficients {
        let Coefficients { rows, cols, data } = &self.to_basis;
        let data = (0..*rows).flat_map(|i| kept.iter().map(move |&j| data[i * cols + j])).collect();
        Coefficients { rows: *rows, cols: kept.len(), data }
    }
}

/// A row-major matrix of `cols` columns, transposed.
fn transposed(data: &[f32], cols: usize) -> Vec<f32> {
    (0..cols).flat_map(|j| data.iter().skip(j).step_by(cols).copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposed_of_a_small_matrix() {
        assert_eq!(transposed(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    }
}
