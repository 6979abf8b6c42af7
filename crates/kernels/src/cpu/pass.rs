//! Passes over the difference: each reads both sides once, panel by panel, and never stores the difference.
//!
//! Panels are a few rows, as many as fit the second cache; consecutive panels form groups, of a number that depends on
//! the shape only. Groups run in parallel, and what they sum is added in their order.

use std::cell::RefCell;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::rows::{Buffers, CpuPair, Sums, add_stats};
use super::tile::{self, Lines, ROWS};
use super::{CpuMatrix, LaneSum};
use crate::engine::f32_chains_do;
use crate::{DeltaStats, Result, Shape};

/// Elements of a panel: 256 KB of f32, which leaves room in a second cache of 512 KB.
const PANEL_ELEMENTS: usize = 64 << 10;
/// Groups at most: a block of partial sums is held for each.
const GROUPS: usize = 4;
/// Elements of a group at least, so that small matrices are one.
const GROUP_ELEMENTS: usize = 256 << 10;

/// How the rows of a shape are cut.
#[derive(Clone, Copy)]
struct Cut {
    /// Rows of a panel, a multiple of [`ROWS`].
    panel: usize,
    /// Rows of a group, a multiple of `panel`.
    group: usize,
    ld: usize,
}

impl Cut {
    fn new(shape: Shape) -> Cut {
        let ld = tile::stride(shape.cols);
        let most = shape.rows.next_multiple_of(ROWS).max(ROWS);
        let panel = (PANEL_ELEMENTS / ld / ROWS * ROWS).clamp(ROWS, 128).min(most);
        let least = (GROUP_ELEMENTS / shape.cols.max(1)).max(1);
        let group = shape.rows.div_ceil(GROUPS).max(least).next_multiple_of(panel);
        Cut { panel, group, ld }
    }
}

/// What one thread uses again and again.
#[derive(Default)]
struct Scratch {
    buffers: Buffers,
    panel: Lines,
    y: Vec<f32>,
}

thread_local! {
    // Borrowed only inside a group, which runs on one thread from its beginning to its end.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// What a pass does with a panel.
trait Visit: Send {
    /// `rows` valid rows from `first` on; the panel is padded with zero rows to a multiple of [`ROWS`].
    fn panel<S: Simd>(&mut self, simd: S, first: usize, rows: usize, cut: Cut, scratch: &mut Scratch);
}

struct Group<'a, V> {
    pair: &'a CpuPair,
    cut: Cut,
    first: usize,
    visit: &'a mut V,
    sums: Option<&'a mut Sums>,
    scratch: &'a mut Scratch,
}

impl<V: Visit> WithSimd for Group<'_, V> {
    type Output = Result<()>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Result<()> {
        let Group { pair, cut, first, visit, mut sums, scratch } = self;
        let end = (first + cut.group).min(pair.shape.rows);
        let mut row = first;
        while row < end {
            let rows = cut.panel.min(end - row);
            let padded = rows.next_multiple_of(ROWS);
            scratch.panel.reserve(padded * cut.ld);
            let panel = &mut scratch.panel.as_mut()[..padded * cut.ld];
            for line in panel.chunks_exact_mut(cut.ld).take(rows) {
                line[pair.shape.cols..].fill(0.0);
            }
            panel[rows * cut.ld..].fill(0.0);
            pair.panel(row, rows, (panel, cut.ld), &mut scratch.buffers, sums.as_deref_mut())?;
            visit.panel(simd, row, rows, cut, scratch);
            row += rows;
        }
        Ok(())
    }
}

/// Runs a pass: `visits` are made one for each group, in order, and come back in order.
fn pass<V: Visit>(
    pair: &CpuPair,
    visits: Vec<V>,
    cut: Cut,
    stats: Option<&mut DeltaStats>,
) -> Result<Vec<V>> {
    let arch = Arch::new();
    let wanted = stats.is_some();
    let done: Vec<Result<(V, DeltaStats)>> = visits
        .into_par_iter()
        .enumerate()
        .map(|(group, mut visit)| {
            let mut sums = Sums::default();
            SCRATCH.with(|scratch| {
                let scratch = &mut *scratch.borrow_mut();
                let first = group * cut.group;
                let sums = wanted.then_some(&mut sums);
                arch.dispatch(Group { pair, cut, first, visit: &mut visit, sums, scratch })
            })?;
            Ok((visit, sums.stats()))
        })
        .collect();
    let mut total = DeltaStats::default();
    let mut visits = Vec::with_capacity(done.len());
    for group in done {
        let (visit, part) = group?;
        add_stats(&mut total, &part);
        visits.push(visit);
    }
    if let Some(stats) = stats {
        *stats = total;
    }
    Ok(visits)
}

/// Nothing but the sums.
struct Nothing;

impl Visit for Nothing {
    #[inline(always)]
    fn panel<S: Simd>(&mut self, _: S, _: usize, _: usize, _: Cut, _: &mut Scratch) {}
}

pub(super) fn stats(pair: &CpuPair) -> Result<DeltaStats> {
    let mut stats = DeltaStats::default();
    if !pair.shape.is_empty() {
        let cut = Cut::new(pair.shape);
        let groups = (0..pair.shape.rows.div_ceil(cut.group)).map(|_| Nothing).collect();
        pass(pair, groups, cut, Some(&mut stats))?;
    }
    Ok(stats)
}

/// The difference itself.
struct Dense<'a> {
    out: &'a mut [f32],
    cols: usize,
    first: usize,
}

impl Visit for Dense<'_> {
    #[inline(always)]
    fn panel<S: Simd>(&mut self, _: S, first: usize, rows: usize, cut: Cut, scratch: &mut Scratch) {
        let out = &mut self.out[(first - self.first) * self.cols..][..rows * self.cols];
        for (out, line) in out.chunks_exact_mut(self.cols).zip(scratch.panel.as_slice().chunks_exact(cut.ld))
        {
            out.copy_from_slice(&line[..self.cols]);
        }
    }
}

pub(super) fn delta(pair: &CpuPair) -> Result<(CpuMatrix, DeltaStats)> {
    let mut out = CpuMatrix::zeros(pair.shape)?;
    let mut stats = DeltaStats::default();
    if !pair.shape.is_empty() {
        let (cut, cols) = (Cut::new(pair.shape), pair.shape.cols);
        let groups = out.data.chunks_mut(cut.group * cols).enumerate();
        let groups = groups.map(|(g, out)| Dense { out, cols, first: g * cut.group }).collect();
        pass(pair, groups, cut, Some(&mut stats))?;
    }
    Ok((out, stats))
}

/// `D Z` and `D^T D Z`.
struct Sweep<'a> {
    zt: &'a [f32],
    l: usize,
    cols: usize,
    /// Rows of the group.
    y: &'a mut [f32],
    first: usize,
    wt: Lines,
}

impl Visit for Sweep<'_> {
    #[inline(always)]
    fn panel<S: Simd>(&mut self, simd: S, first: usize, rows: usize, cut: Cut, scratch: &mut Scratch) {
        let (l, padded) = (self.l, rows.next_multiple_of(ROWS));
        let d = scratch.panel.as_slice();
        scratch.y.clear();
        scratch.y.resize(padded * l, 0.0);
        tile::forward(simd, (padded, self.cols, l), (d, cut.ld), (self.zt, cut.ld), &mut scratch.y);
        tile::backward(simd, (rows, self.cols, l), (d, cut.ld), &scratch.y, (self.wt.as_mut(), cut.ld));
        self.y[(first - self.first) * l..][..rows * l].copy_from_slice(&scratch.y[..rows * l]);
    }
}

/// `D Z` and `D^T D Z` of fitting shapes.
pub(super) fn sweep(
    pair: &CpuPair,
    z: &CpuMatrix,
    stats: Option<&mut DeltaStats>,
) -> Result<(CpuMatrix, CpuMatrix)> {
    let (Shape { rows, cols }, l) = (pair.shape, z.shape.cols);
    let mut y = CpuMatrix::zeros(Shape { rows, cols: l })?;
    if pair.shape.is_empty() || l == 0 {
        if let Some(stats) = stats {
            *stats = self::stats(pair)?;
        }
        return Ok((y, CpuMatrix::zeros(z.shape)?));
    }
    let cut = Cut::new(pair.shape);
    let mut zt = Lines::zeros(l * cut.ld);
    transpose(&z.data, l, zt.as_mut(), cut.ld);
    let groups = y.data.chunks_mut(cut.group * l).enumerate();
    let groups: Vec<Sweep<'_>> = groups
        .map(|(g, y)| Sweep {
            zt: zt.as_slice(),
            l,
            cols: cols.next_multiple_of(tile::ALIGN),
            y,
            first: g * cut.group,
            wt: Lines::zeros(l * cut.ld),
        })
        .collect();
    let done = pass(pair, groups, cut, stats)?;
    let w = summed(done.into_iter().map(|group| group.wt), cut, z.shape)?;
    Ok((y, w))
}

/// `D^T Q`.
struct Back<'a> {
    q: &'a [f32],
    l: usize,
    cols: usize,
    wt: Lines,
}

impl Visit for Back<'_> {
    #[inline(always)]
    fn panel<S: Simd>(&mut self, simd: S, first: usize, rows: usize, cut: Cut, scratch: &mut Scratch) {
        let (d, q) = (scratch.panel.as_slice(), &self.q[first * self.l..]);
        tile::backward(simd, (rows, self.cols, self.l), (d, cut.ld), q, (self.wt.as_mut(), cut.ld));
    }
}

/// `D^T Q` of fitting shapes.
pub(super) fn back(pair: &CpuPair, q: &CpuMatrix) -> Result<CpuMatrix> {
    let (Shape { rows, cols }, l) = (pair.shape, q.shape.cols);
    let shape = Shape { rows: cols, cols: l };
    if pair.shape.is_empty() || l == 0 {
        return CpuMatrix::zeros(shape);
    }
    let cut = Cut::new(pair.shape);
    let cols = cols.next_multiple_of(tile::ALIGN);
    let groups = (0..rows.div_ceil(cut.group))
        .map(|_| Back { q: &q.data, l, cols, wt: Lines::zeros(l * cut.ld) })
        .collect();
    summed(pass(pair, groups, cut, None)?.into_iter().map(|group| group.wt), cut, shape)
}

/// Parts of a transposed matrix added in their order, and turned.
fn summed(mut parts: impl Iterator<Item = Lines>, cut: Cut, shape: Shape) -> Result<CpuMatrix> {
    let mut out = CpuMatrix::zeros(shape)?;
    if let Some(mut sum) = parts.next() {
        for part in parts {
            sum.as_mut().iter_mut().zip(part.as_slice()).for_each(|(sum, x)| *sum += x);
        }
        untranspose(sum.as_slice(), cut.ld, &mut out.data, shape.cols);
    }
    Ok(out)
}

/// The rest of a product of factors, squared, with elements in `T`.
struct Residual<'a, T> {
    /// Negative.
    b: &'a [T],
    rank: usize,
    a: &'a [T],
    cols: usize,
    /// A block of the rest.
    rest: Vec<T>,
    sum: LaneSum,
}

/// Rows and columns of the rest that are looked at together: 24 or 48 KB.
const REST: (usize, usize) = (12, 512);

/// What the elements of a rest are computed in.
trait Element: Copy + Default + From<f32> + Into<f64> + Send + Sync {
    /// [`tile::chain`] for this type, whatever the vectors.
    fn chain<S: Simd>(
        simd: S,
        sides: (usize, usize, usize),
        b: &[Self],
        a: (&[Self], usize),
        s: (&mut [Self], usize),
    );
}

impl Element for f32 {
    #[inline(always)]
    fn chain<S: Simd>(
        simd: S,
        sides: (usize, usize, usize),
        b: &[f32],
        a: (&[f32], usize),
        s: (&mut [f32], usize),
    ) {
        tile::chain(simd, sides, b, a, s);
    }
}

impl Element for f64 {
    #[inline(always)]
    fn chain<S: Simd>(
        simd: S,
        sides: (usize, usize, usize),
        b: &[f64],
        a: (&[f64], usize),
        s: (&mut [f64], usize),
    ) {
        tile::chain(simd, sides, b, a, s);
    }
}

impl<T: Element> Visit for Residual<'_, T> {
    #[inline(always)]
    fn panel<S: Simd>(&mut self, simd: S, first: usize, rows: usize, cut: Cut, scratch: &mut Scratch) {
        let (d, rank) = (scratch.panel.as_slice(), self.rank);
        for row in (0..rows).step_by(REST.0) {
            let rows = REST.0.min(rows - row);
            let b = &self.b[(first + row) * rank..][..rows * rank];
            for start in (0..self.cols).step_by(REST.1) {
                let width = REST.1.min(self.cols - start);
                let a = (&self.a[start.min(self.a.len())..], cut.ld);
                let lines = d[row * cut.ld..].chunks_exact(cut.ld).take(rows);
                for (rest, d) in self.rest.chunks_exact_mut(REST.1).zip(lines) {
                    for (rest, &x) in rest[..width].iter_mut().zip(&d[start..][..width]) {
                        *rest = T::from(x);
                    }
                }
                T::chain(simd, (rows, width, rank), b, a, (&mut self.rest, REST.1));
                for line in self.rest.chunks_exact(REST.1).take(rows) {
                    self.sum.squares(&line[..width]);
                }
            }
        }
    }
}

/// The squared norm of `D - B A`, of fitting shapes.
pub(super) fn residual(pair: &CpuPair, b: &CpuMatrix, a: &CpuMatrix) -> Result<f64> {
    if pair.shape.is_empty() {
        return Ok(0.0);
    }
    let found = residual_in::<f32>(pair, b, a)?;
    let squares = |x: &CpuMatrix| x.data.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
    if f32_chains_do(found, b.shape.cols, squares(b), squares(a)) {
        Ok(found)
    } else {
        residual_in::<f64>(pair, b, a)
    }
}

fn residual_in<T: Element>(pair: &CpuPair, b: &CpuMatrix, a: &CpuMatrix) -> Result<f64> {
    let (cut, rank) = (Cut::new(pair.shape), b.shape.cols);
    let mut padded = vec![T::default(); rank * cut.ld];
    for (padded, a) in padded.chunks_exact_mut(cut.ld).zip(a.data.chunks_exact(pair.shape.cols)) {
        padded.iter_mut().zip(a).for_each(|(padded, &x)| *padded = T::from(x));
    }
    let b: Vec<T> = b.data.iter().map(|&x| T::from(-x)).collect();
    let cols = pair.shape.cols.next_multiple_of(tile::ALIGN);
    let groups = (0..pair.shape.rows.div_ceil(cut.group))
        .map(|_| Residual {
            b: &b,
            rank,
            a: &padded,
            cols,
            rest: vec![T::default(); REST.0 * REST.1],
            sum: LaneSum::default(),
        })
        .collect();
    Ok(pass(pair, groups, cut, None)?.into_iter().map(|group| group.sum.total()).sum())
}

/// Rows of `l` elements to `l` rows of stride `ld`.
fn transpose(from: &[f32], l: usize, to: &mut [f32], ld: usize) {
    for (block, rows) in from.chunks(16 * l).enumerate() {
        for (at, row) in rows.chunks_exact(l).enumerate() {
            for (j, &x) in row.iter().enumerate() {
                to[j * ld + block * 16 + at] = x;
            }
        }
    }
}

/// The way back.
fn untranspose(from: &[f32], ld: usize, to: &mut [f32], l: usize) {
    for (block, rows) in to.chunks_mut(16 * l).enumerate() {
        for (at, row) in rows.chunks_exact_mut(l).enumerate() {
            for (j, x) in row.iter_mut().enumerate() {
                *x = from[j * ld + block * 16 + at];
            }
        }
    }
}
