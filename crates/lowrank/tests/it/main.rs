//! Factors and certificates against the f64 singular value decomposition of faer.

#![allow(clippy::unwrap_used)] // the helpers of tests are tests

mod bounds;
mod dense;
mod products;

use faer::Mat;
use kernels::{Shape, philox4x32_10};

/// Numbers in [-1, 1), from a counter.
fn noise(seed: u32, n: usize) -> Vec<f32> {
    (0..n.div_ceil(4) as u32)
        .flat_map(|i| philox4x32_10([i, 0, 0, 0], [seed, 77]))
        .map(|word| word as i32 as f32 / 2.0f32.powi(31))
        .take(n)
        .collect()
}

fn matrix(data: &[f32], rows: usize, cols: usize) -> Mat<f64> {
    Mat::from_fn(rows, cols, |i, j| f64::from(data[i * cols + j]))
}

/// A matrix with these singular values, rounded to f32.
fn with_spectrum(shape: Shape, seed: u32, singular: &[f64]) -> Vec<f32> {
    let orthonormal =
        |rows, seed| matrix(&noise(seed, rows * singular.len()), rows, singular.len()).qr().compute_thin_Q();
    let (u, v) = (orthonormal(shape.rows, seed), orthonormal(shape.cols, seed + 1));
    let scaled = Mat::from_fn(shape.rows, singular.len(), |i, j| u[(i, j)] * singular[j]);
    let product = scaled * v.transpose();
    (0..shape.rows * shape.cols).map(|at| product[(at / shape.cols, at % shape.cols)] as f32).collect()
}

fn sum_of_squares(values: &[f64]) -> f64 {
    values.iter().map(|value| value * value).sum()
}

/// The squared norm of `delta - B A`, brute force.
fn brute_residual(delta: &Mat<f64>, b: &[f32], a: &[f32], rank: usize) -> f64 {
    let (rows, cols) = (delta.nrows(), delta.ncols());
    (delta - matrix(b, rows, rank) * matrix(a, rank, cols)).squared_norm_l2()
}
