//! What each operation means: slow, obvious, on plain slices.
//!
//! Sums are f64. Where engines must agree to the bit (`delta`, `add_low_rank`), the steps are the definition; elsewhere
//! an engine may round more, within bounds that the tests derive from the arithmetic.

use half::{bf16, f16};

use crate::{Dtype, Shape};

/// The element of index `i` in stored weights, exact.
pub fn widen(bytes: &[u8], dtype: Dtype, i: usize) -> f64 {
    let at = |k: usize| bytes[i * dtype.bytes() + k];
    match dtype {
        Dtype::F64 => f64::from_le_bytes(std::array::from_fn(at)),
        Dtype::F32 => f64::from(f32::from_le_bytes(std::array::from_fn(at))),
        Dtype::F16 => f16::from_le_bytes(std::array::from_fn(at)).to_f64(),
        Dtype::Bf16 => bf16::from_le_bytes(std::array::from_fn(at)).to_f64(),
        Dtype::F8E5M2 => f16::from_le_bytes([0, at(0)]).to_f64(),
        Dtype::F8E4M3 => {
            let (sign, rest) = (f64::from(at(0) >> 7), at(0) & 0x7f);
            let size = match (rest >> 3, f64::from(rest & 7) / 8.0) {
                _ if rest == 0x7f => f64::NAN,
                (0, fraction) => fraction * 2.0f64.powi(-6),
                (exponent, fraction) => (1.0 + fraction) * 2.0f64.powi(i32::from(exponent) - 7),
            };
            size * (1.0 - 2.0 * sign)
        }
    }
}

/// `x` rounded to `dtype`, little-endian; nothing for the formats that are read only.
pub fn round(x: f64, dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F64 => x.to_le_bytes().to_vec(),
        Dtype::F32 => (x as f32).to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(x as f32).to_le_bytes().to_vec(),
        Dtype::Bf16 => bf16::from_f32(x as f32).to_le_bytes().to_vec(),
        Dtype::F8E4M3 | Dtype::F8E5M2 => Vec::new(),
    }
}

/// The difference of one pair of elements.
pub fn delta(aligned: f64, degraded: f64) -> f32 {
    (aligned - degraded) as f32
}

/// `A B`, or `A^T B` where `a` is stored with `a_shape`.
pub fn gemm(a: &[f32], a_shape: Shape, a_transposed: bool, b: &[f32], b_cols: usize) -> Vec<f64> {
    let (rows, depth) =
        if a_transposed { (a_shape.cols, a_shape.rows) } else { (a_shape.rows, a_shape.cols) };
    let mut out = vec![0.0; rows * b_cols];
    for i in 0..rows {
        for j in 0..b_cols {
            for k in 0..depth {
                let a = if a_transposed { a[k * rows + i] } else { a[i * depth + k] };
                out[i * b_cols + j] += f64::from(a) * f64::from(b[k * b_cols + j]);
            }
        }
    }
    out
}

/// `Y^T Y`.
pub fn gram(y: &[f32], shape: Shape) -> Vec<f64> {
    gemm(y, shape, true, y, shape.cols)
}

/// `Y W`, W with `cols` columns.
pub fn apply_right(y: &[f32], shape: Shape, w: &[f64], cols: usize) -> Vec<f64> {
    let mut out = vec![0.0; shape.rows * cols];
    for i in 0..shape.rows {
        for j in 0..cols {
            for k in 0..shape.cols {
                out[i * cols + j] += f64::from(y[i * shape.cols + k]) * w[k * cols + j];
            }
        }
    }
    out
}

/// The sum of the squares of `delta - B A`.
pub fn residual(delta: &[f32], shape: Shape, b: &[f32], a: &[f32], rank: usize) -> f64 {
    let product = gemm(b, Shape { rows: shape.rows, cols: rank }, false, a, shape.cols);
    delta.iter().zip(&product).map(|(&d, &p)| (f64::from(d) - p).powi(2)).sum()
}

/// One element of stored weights plus a chain of `(c, b, a)` products.
pub fn add_low_rank(bytes: &[u8], dtype: Dtype, i: usize, products: &[(f32, f32, f32)]) -> Vec<u8> {
    let s = products.iter().fold(0.0f32, |s, &(c, b, a)| (c * b).mul_add(a, s));
    if s == 0.0 {
        let size = dtype.bytes();
        return bytes[i * size..(i + 1) * size].to_vec();
    }
    let w = widen(bytes, dtype, i);
    match dtype {
        Dtype::F64 => round(w + f64::from(s), dtype),
        _ => round(f64::from(w as f32 + s), dtype),
    }
}
