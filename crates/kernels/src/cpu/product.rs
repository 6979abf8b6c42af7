//! Matrix products, in panels of fixed size, through the `gemm` crate.
//!
//! The one call into that crate takes raw pointers; `multiply` checks every length before it.

use rayon::prelude::*;

use super::{CpuMatrix, PANEL};
use crate::{Result, Shape};

/// Panels of a Gram matrix at most, so that their partial sums stay small.
const GRAM_PANELS: usize = 16;

/// Rows of a Gram matrix that are computed together.
const GRAM_BLOCK: usize = 24;

/// `A B` or `A^T B` of fitting shapes.
pub(super) fn gemm(a: &CpuMatrix, a_transposed: bool, b: &CpuMatrix) -> Result<CpuMatrix> {
    let (rows, depth, n) = match a_transposed {
        false => (a.shape.rows, a.shape.cols, b.shape.cols),
        true => (a.shape.cols, a.shape.rows, b.shape.cols),
    };
    let mut out = CpuMatrix::zeros(Shape { rows, cols: n })?;
    if out.data.is_empty() || depth == 0 {
        return Ok(out);
    }
    let stride = a.shape.cols;
    let b = View { data: &b.data, row_stride: n, col_stride: 1 };
    out.data.par_chunks_mut(PANEL * n).enumerate().for_each(|(panel, out)| {
        let first = panel * PANEL;
        let a = match a_transposed {
            false => View { data: &a.data[first * stride..], row_stride: stride, col_stride: 1 },
            true => View { data: &a.data[first..], row_stride: 1, col_stride: stride },
        };
        multiply(out, (out.len() / n, n, depth), a, b);
    });
    Ok(out)
}

/// `Y^T Y` in f64.
pub(super) fn gram(y: &CpuMatrix) -> Result<Vec<f64>> {
    let (rows, l) = (y.shape.rows, y.shape.cols);
    let mut sum = vec![0.0f64; Shape { rows: l, cols: l }.len()?];
    if y.data.is_empty() {
        return Ok(sum);
    }
    let panel_rows = PANEL * rows.div_ceil(PANEL * GRAM_PANELS);
    let parts: Vec<Vec<f64>> = y
        .data
        .par_chunks(panel_rows * l)
        .map(|panel| {
            let mut part = vec![0.0; l * l];
            let mut wide = vec![0.0f64; PANEL * l];
            let mut block = vec![0.0f64; GRAM_BLOCK * l];
            for rows in panel.chunks(PANEL * l) {
                for (wide, &x) in wide.iter_mut().zip(rows) {
                    *wide = f64::from(x);
                }
                let (wide, depth) = (&wide[..rows.len()], rows.len() / l);
                // Blocks of rows from the diagonal on; the rest mirrors them.
                for first in (0..l).step_by(GRAM_BLOCK) {
                    let (high, n) = (GRAM_BLOCK.min(l - first), l - first);
                    let left = View { data: &wide[first..], row_stride: 1, col_stride: l };
                    let right = View { data: &wide[first..], row_stride: l, col_stride: 1 };
                    multiply(&mut block[..high * n], (high, n, depth), left, right);
                    for (i, line) in block[..high * n].chunks_exact(n).enumerate() {
                        add(&mut part[(first + i) * l + first..][..n], line);
                    }
                }
            }
            part
        })
        .collect();
    for part in &parts {
        add(&mut sum, part);
    }
    for i in 0..l {
        for j in 0..i {
            sum[i * l + j] = sum[j * l + i];
        }
    }
    Ok(sum)
}

/// `Y W` in f64, rounded once.
pub(super) fn apply_right(y: &CpuMatrix, w: &[f64], cols: usize) -> Result<CpuMatrix> {
    let depth = y.shape.cols;
    let mut out = CpuMatrix::zeros(Shape { rows: y.shape.rows, cols })?;
    if out.data.is_empty() || depth == 0 {
        return Ok(out);
    }
    let w = View { data: w, row_stride: cols, col_stride: 1 };
    out.data.par_chunks_mut(PANEL * cols).zip(y.data.par_chunks(PANEL * depth)).for_each(|(out, y)| {
        let wide: Vec<f64> = y.iter().map(|&x| f64::from(x)).collect();
        let mut product = vec![0.0f64; out.len()];
        let y = View { data: &wide, row_stride: depth, col_stride: 1 };
        multiply(&mut product, (out.len() / cols, cols, depth), y, w);
        for (out, x) in out.iter_mut().zip(product) {
            *out = x as f32;
        }
    });
    Ok(out)
}

fn add(sum: &mut [f64], part: &[f64]) {
    for (sum, x) in sum.iter_mut().zip(part) {
        *sum += x;
    }
}

/// A matrix inside a slice, by its strides in elements.
#[derive(Clone, Copy)]
struct View<'a, T> {
    data: &'a [T],
    row_stride: usize,
    col_stride: usize,
}

impl<T> View<'_, T> {
    /// Whether every element of a `rows` x `cols` matrix lies inside the slice.
    fn holds(&self, rows: usize, cols: usize) -> bool {
        let last = |n: usize, stride: usize| n.checked_sub(1).and_then(|n| n.checked_mul(stride));
        match (last(rows, self.row_stride), last(cols, self.col_stride)) {
            (Some(row), Some(col)) => row.checked_add(col).is_some_and(|last| last < self.data.len()),
            _ => false,
        }
    }
}

/// The two types that `multiply` may be given: gemm has kernels for both.
trait Scalar: Copy + From<u8> + 'static {}
impl Scalar for f32 {}
impl Scalar for f64 {}

/// `out = left * right`, `out` row-major with `m` rows and `n` columns, summed over `depth`; one thread.
fn multiply<T: Scalar>(
    out: &mut [T],
    (m, n, depth): (usize, usize, usize),
    left: View<'_, T>,
    right: View<'_, T>,
) {
    assert!(m.checked_mul(n) == Some(out.len()), "{m}x{n} product into {} elements", out.len());
    assert!(left.holds(m, depth) && right.holds(depth, n), "{m}x{depth} by {depth}x{n} past its operands");
    // SAFETY:
    // - `out` is a unique borrow of exactly m * n elements (first assert), so every write (i, j) -> i * n + j with
    //   i < m, j < n lies inside it and overlaps neither operand, which are shared borrows;
    // - `holds` (second assert) bounds the largest index read from each operand, and strides are not negative;
    // - strides are below a slice length, hence below `isize::MAX`, so the casts keep their value;
    // - `T` is f32 or f64 (`Scalar` is private to this file), types that gemm has kernels for;
    // - `read_dst` is false: the old contents of `out`, which are initialised anyway, are not used.
    unsafe {
        gemm::gemm(
            m,
            n,
            depth,
            out.as_mut_ptr(),
            1,
            n as isize,
            false,
            left.data.as_ptr(),
            left.col_stride as isize,
            left.row_stride as isize,
            right.data.as_ptr(),
            right.col_stride as isize,
            right.row_stride as isize,
            T::from(0),
            T::from(1),
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
