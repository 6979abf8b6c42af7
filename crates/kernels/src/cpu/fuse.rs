//! Low-rank terms added to stored weights, with one rounding.

use rayon::prelude::*;

use super::{CpuMatrix, CpuRaw, LaneSum, PANEL};
use crate::{AddStats, Dtype, KernelError, Result, Side};

/// Columns summed at a time: 8 KB of sums, and `A` in the second cache for the ranks in use.
const COLS: usize = 2048;

/// `w + sum c B A` of fitting shapes.
pub(super) fn add_low_rank(
    w: &CpuRaw,
    terms: &[(f32, &CpuMatrix, &CpuMatrix)],
) -> Result<(Vec<u8>, AddStats)> {
    let cols = w.shape.cols;
    let mut out = w.bytes.clone();
    if out.is_empty() {
        return Ok((out, AddStats::default()));
    }
    // [c_1 B_1 | c_2 B_2 | ...], each coefficient folded in once, and [A_1; A_2; ...] as rows.
    let rank: usize = terms.iter().map(|(_, b, _)| b.shape.cols).sum();
    let mut left = Vec::with_capacity(w.shape.rows.saturating_mul(rank));
    for row in 0..w.shape.rows {
        for (c, b, _) in terms {
            left.extend(b.data[row * b.shape.cols..][..b.shape.cols].iter().map(|b| c * b));
        }
    }
    let right: Vec<&[f32]> = terms.iter().flat_map(|(_, _, a)| a.data.chunks_exact(cols)).collect();

    let size = w.dtype.bytes();
    let arch = pulp::Arch::new();
    let panels: Vec<Result<AddStats>> = out
        .par_chunks_mut(PANEL * cols * size)
        .enumerate()
        .map(|(panel, out)| {
            arch.dispatch(Panel {
                dtype: w.dtype,
                cols,
                rank,
                first: panel * PANEL,
                left: &left,
                right: &right,
                out,
            })
        })
        .collect();
    let mut stats = AddStats::default();
    for panel in panels {
        let panel = panel?;
        stats.changed += panel.changed;
        stats.intended_sumsq += panel.intended_sumsq;
        stats.realised_sumsq += panel.realised_sumsq;
    }
    Ok((out, stats))
}

/// One panel of rows; a type, so that it is compiled once for each instruction set, with `fma` as one instruction
/// where there is one.
struct Panel<'a> {
    dtype: Dtype,
    cols: usize,
    rank: usize,
    first: usize,
    left: &'a [f32],
    right: &'a [&'a [f32]],
    out: &'a mut [u8],
}

impl pulp::WithSimd for Panel<'_> {
    type Output = Result<AddStats>;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> Self::Output {
        let Panel { dtype, cols, rank, first, left, right, out } = self;
        let size = dtype.bytes();
        let width = COLS.min(cols);
        let (mut sums, mut old, mut new) = (vec![0.0f32; width], vec![0.0f64; width], vec![0.0f64; width]);
        let (mut intended, mut realised) = (LaneSum::default(), LaneSum::default());
        let mut changed = 0u64;
        // The lowest flat index at fault, and what is wrong with it.
        let mut fault: Option<(usize, KernelError)> = None;
        for start in (0..cols).step_by(COLS) {
            let width = COLS.min(cols - start);
            let (sums, old, new) = (&mut sums[..width], &mut old[..width], &mut new[..width]);
            for (i, line) in out.chunks_exact_mut(cols * size).enumerate() {
                let row = first + i;
                sums.fill(0.0);
                for (&l, a) in left[row * rank..][..rank].iter().zip(right) {
                    for (s, &a) in sums.iter_mut().zip(&a[start..][..width]) {
                        *s = l.mul_add(a, *s);
                    }
                }
                let bytes = &mut line[start * size..][..width * size];
                dtype.widen_f64(bytes, old);
                store(dtype, old, sums, new, bytes);
                changed += old.iter().zip(new.iter()).map(|(old, new)| u64::from(old != new)).sum::<u64>();
                intended.extend(width, |j| f64::from(sums[j]) * f64::from(sums[j]));
                realised.extend(width, |j| (new[j] - old[j]) * (new[j] - old[j]));
                if let Some(j) = (0..width).find(|&j| !old[j].is_finite() || !new[j].is_finite()) {
                    let at = row * cols + start + j;
                    if fault.as_ref().is_none_or(|(lowest, _)| at < *lowest) {
                        let index = at as u64;
                        fault = Some(match old[j].is_finite() {
                            false => (at, KernelError::NonFinite { side: Side::Target, index }),
                            true => (at, KernelError::Overflow { what: "add_low_rank", index }),
                        });
                    }
                }
            }
        }
        match fault {
            Some((_, error)) => Err(error),
            None => {
                Ok(AddStats { changed, intended_sumsq: intended.total(), realised_sumsq: realised.total() })
            }
        }
    }
}

/// Rounds `old + sums` into `bytes`, and gives the stored values; a sum of 0 leaves the bytes alone.
#[inline(always)]
fn store(dtype: Dtype, old: &[f64], sums: &[f32], new: &mut [f64], bytes: &mut [u8]) {
    let size = dtype.bytes();
    for (((&old, &s), new), bytes) in old.iter().zip(sums).zip(new).zip(bytes.chunks_exact_mut(size)) {
        *new = if s == 0.0 {
            old
        } else if dtype == Dtype::F64 {
            let sum = old + f64::from(s);
            bytes.copy_from_slice(&sum.to_le_bytes());
            sum
        } else {
            f64::from(dtype.store(old as f32 + s, bytes))
        };
    }
}
