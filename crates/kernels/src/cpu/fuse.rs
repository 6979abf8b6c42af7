//! Low-rank terms added to stored weights, with one rounding.

use std::cell::RefCell;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::tile::{self, Lines};
use super::{CpuMatrix, LaneSum};
use crate::dtype::{bf16_bits, f16_bits};
use crate::{AddStats, Dtype, KernelError, Result, Shape, Side};

/// Rows of a panel at most.
const ROWS: usize = 48;
/// Elements of the sums of a panel: 256 KB.
const SUMS: usize = 64 << 10;

thread_local! {
    static SUM: RefCell<Lines> = RefCell::default();
}

/// `w + sum c B A` of fitting shapes, in place.
pub(super) fn add_low_rank(
    w: &mut [u8],
    dtype: Dtype,
    shape: Shape,
    terms: &[(f32, &CpuMatrix, &CpuMatrix)],
) -> Result<AddStats> {
    if shape.is_empty() {
        return Ok(AddStats::default());
    }
    let (cols, ld) = (shape.cols, tile::stride(shape.cols));
    // [c_1 B_1 | c_2 B_2 | ...], each coefficient folded in once, and [A_1; A_2; ...] as rows.
    let rank: usize = terms.iter().map(|(_, b, _)| b.shape.cols).sum();
    let mut left = Vec::with_capacity(shape.rows.saturating_mul(rank));
    for row in 0..shape.rows {
        for (c, b, _) in terms {
            left.extend(b.data[row * b.shape.cols..][..b.shape.cols].iter().map(|b| c * b));
        }
    }
    let mut right = Lines::zeros(rank * ld);
    let lines = terms.iter().flat_map(|(_, _, a)| a.data.chunks_exact(cols));
    for (out, a) in right.as_mut().chunks_exact_mut(ld).zip(lines) {
        out[..cols].copy_from_slice(a);
    }

    let size = dtype.bytes();
    let panel = (SUMS / ld).clamp(1, ROWS);
    let arch = Arch::new();
    let right = right.as_slice();
    let panels: Vec<Result<AddStats>> = w
        .par_chunks_mut(panel * cols * size)
        .enumerate()
        .map(|(at, bytes)| {
            let first = at * panel;
            let left = &left[first * rank..];
            SUM.with(|sums| {
                let sums = &mut *sums.borrow_mut();
                arch.dispatch(Panel { dtype, cols, ld, rank, first, left, right, bytes, sums })
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
    Ok(stats)
}

/// A few rows; a type, so that it is compiled once for each instruction set.
struct Panel<'a> {
    dtype: Dtype,
    cols: usize,
    ld: usize,
    rank: usize,
    first: usize,
    left: &'a [f32],
    right: &'a [f32],
    bytes: &'a mut [u8],
    sums: &'a mut Lines,
}

impl WithSimd for Panel<'_> {
    type Output = Result<AddStats>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        let Panel { dtype, cols, ld, rank, first, left, right, bytes, sums } = self;
        let row_bytes = cols * dtype.bytes();
        let rows = bytes.len() / row_bytes;
        sums.reserve(rows * ld);
        let sums = &mut sums.as_mut()[..rows * ld];
        sums.fill(0.0);
        tile::chain(simd, (rows, cols.next_multiple_of(tile::ALIGN), rank), left, (right, ld), (sums, ld));
        let mut total = Total::default();
        for (row, bytes) in bytes.chunks_exact_mut(row_bytes).enumerate() {
            let s = &sums[row * ld..][..cols];
            let fault = match dtype {
                Dtype::Bf16 => total.row(s, bytes.as_chunks_mut::<2>().0, |w, s| {
                    let old = f32::from_bits(u32::from(u16::from_le_bytes(*w)) << 16);
                    let bits = if s == 0.0 { u16::from_le_bytes(*w) } else { bf16_bits(old + s) };
                    *w = bits.to_le_bytes();
                    (f64::from(old), f64::from(f32::from_bits(u32::from(bits) << 16)))
                }),
                Dtype::F16 => total.row(s, bytes.as_chunks_mut::<2>().0, |w, s| {
                    let old = half::f16::from_le_bytes(*w);
                    let bits = if s == 0.0 { old.to_bits() } else { f16_bits(old.to_f32() + s) };
                    *w = bits.to_le_bytes();
                    (old.to_f64(), half::f16::from_bits(bits).to_f64())
                }),
                Dtype::F32 => total.row(s, bytes.as_chunks_mut::<4>().0, |w, s| {
                    let old = f32::from_le_bytes(*w);
                    let new = if s == 0.0 { old } else { old + s };
                    *w = new.to_le_bytes();
                    (f64::from(old), f64::from(new))
                }),
                _ => total.row(s, bytes.as_chunks_mut::<8>().0, |w, s| {
                    let old = f64::from_le_bytes(*w);
                    let new = if s == 0.0 { old } else { old + f64::from(s) };
                    *w = new.to_le_bytes();
                    (old, new)
                }),
            };
            if let Some((col, was_finite)) = fault {
                let index = ((first + row) * cols + col) as u64;
                return Err(match was_finite {
                    false => KernelError::NonFinite { side: Side::Target, index },
                    true => KernelError::Overflow { what: "add_low_rank", index },
                });
            }
        }
        Ok(AddStats {
            changed: total.changed,
            intended_sumsq: total.intended.total(),
            realised_sumsq: total.realised.total(),
        })
    }
}

#[derive(Default)]
struct Total {
    changed: u64,
    intended: LaneSum,
    realised: LaneSum,
}

impl Total {
    /// Adds one row; `add` gives the old and the new value. Returns the first column at fault, and whether its weight
    /// was finite before.
    #[inline(always)]
    fn row<const N: usize>(
        &mut self,
        s: &[f32],
        w: &mut [[u8; N]],
        add: impl Fn(&mut [u8; N], f32) -> (f64, f64),
    ) -> Option<(usize, bool)> {
        let mut changed = 0u32;
        let (mut old, mut new) = ([0.0f64; 256], [0.0f64; 256]);
        for (at, (s, w)) in s.chunks(256).zip(w.chunks_mut(256)).enumerate() {
            let len = s.len();
            for i in 0..len {
                (old[i], new[i]) = add(&mut w[i], s[i]);
            }
            let (old, new) = (&old[..len], &new[..len]);
            for i in 0..len {
                changed += u32::from(old[i] != new[i]);
            }
            let mut moved = [0.0f64; 256];
            for i in 0..len {
                moved[i] = new[i] - old[i];
            }
            let mut realised = LaneSum::default();
            realised.squares(&moved[..len]);
            self.intended.squares(s);
            self.realised.add(&realised);
            // Of 256 finite differences of 8-byte numbers the squares may overflow, so the elements decide.
            if realised.0.iter().any(|x| !x.is_finite())
                && let Some(i) = (0..len).find(|&i| !old[i].is_finite() || !new[i].is_finite())
            {
                return Some((at * 256 + i, old[i].is_finite()));
            }
        }
        self.changed += u64::from(changed);
        None
    }
}
