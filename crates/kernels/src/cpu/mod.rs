//! The engine that every machine has: host memory, rayon threads and the `gemm` crate.
//!
//! Work is cut into panels of a size that depends on the shape only, and sums over panels are added in panel order,
//! so results are the same bits for any thread count. It runs on the rayon pool of its caller.
//!
//! Not here yet: a panel kernel of our own for skinny products.

mod delta;
mod fuse;
mod product;

use rayon::prelude::*;

use crate::philox::{entry, sketch_words};
use crate::{AddStats, DeltaStats, Dtype, Engine, KernelError, Result, Shape};

/// Rows (or columns) of a panel.
const PANEL: usize = 128;

/// The engine of the host's cores.
#[derive(Debug, Clone, Copy, Default)]
pub struct CpuEngine;

impl CpuEngine {
    /// An engine on the rayon pool it is called from.
    pub fn new() -> CpuEngine {
        CpuEngine
    }
}

/// Stored weights in host memory.
#[derive(Debug, Clone)]
pub struct CpuRaw {
    bytes: Vec<u8>,
    dtype: Dtype,
    shape: Shape,
}

/// An f32 matrix in host memory.
#[derive(Debug, Clone)]
pub struct CpuMatrix {
    data: Vec<f32>,
    shape: Shape,
}

impl CpuMatrix {
    fn zeros(shape: Shape) -> Result<CpuMatrix> {
        Ok(CpuMatrix { data: vec![0.0; shape.len()?], shape })
    }
}

impl Engine for CpuEngine {
    type Raw = CpuRaw;
    type Matrix = CpuMatrix;

    fn name(&self) -> String {
        "cpu".to_owned()
    }

    fn raw(&self, bytes: &[u8], dtype: Dtype, shape: Shape) -> Result<CpuRaw> {
        let need = shape.bytes(dtype)?;
        if bytes.len() != need {
            return Err(KernelError::Length { what: "bytes of weights", shape, need, found: bytes.len() });
        }
        Ok(CpuRaw { bytes: bytes.to_vec(), dtype, shape })
    }

    fn matrix(&self, data: &[f32], shape: Shape) -> Result<CpuMatrix> {
        let need = shape.len()?;
        if data.len() != need {
            return Err(KernelError::Length { what: "elements of a matrix", shape, need, found: data.len() });
        }
        Ok(CpuMatrix { data: data.to_vec(), shape })
    }

    fn read(&self, matrix: &CpuMatrix) -> Result<Vec<f32>> {
        Ok(matrix.data.clone())
    }

    fn shape(&self, matrix: &CpuMatrix) -> Shape {
        matrix.shape
    }

    fn delta(&self, aligned: &CpuRaw, degraded: &CpuRaw) -> Result<(CpuMatrix, DeltaStats)> {
        same_shape("delta", aligned.shape, degraded.shape)?;
        delta::delta(aligned, degraded)
    }

    fn sketch(&self, shape: Shape, seed: u64, key: u64) -> Result<CpuMatrix> {
        if u32::try_from(shape.rows).is_err() || u32::try_from(shape.cols).is_err() {
            return Err(KernelError::ShapeOverflow { shape });
        }
        let mut out = CpuMatrix::zeros(shape)?;
        out.data.par_chunks_mut(shape.cols.max(1)).enumerate().for_each(|(row, line)| {
            for (block, four) in line.chunks_mut(4).enumerate() {
                let words = sketch_words(seed, key, row as u32, block as u32);
                for (x, word) in four.iter_mut().zip(words) {
                    *x = entry(word);
                }
            }
        });
        Ok(out)
    }

    fn gemm(&self, a: &CpuMatrix, a_transposed: bool, b: &CpuMatrix) -> Result<CpuMatrix> {
        let a_shape = if a_transposed { a.shape.transposed() } else { a.shape };
        if a_shape.cols != b.shape.rows {
            return Err(KernelError::ShapeMismatch { what: "gemm", left: a_shape, right: b.shape });
        }
        product::gemm(a, a_transposed, b)
    }

    fn gram(&self, y: &CpuMatrix) -> Result<Vec<f64>> {
        product::gram(y)
    }

    fn apply_right(&self, y: &CpuMatrix, w: &[f64], cols: usize) -> Result<CpuMatrix> {
        let shape = Shape { rows: y.shape.cols, cols };
        let need = shape.len()?;
        if w.len() != need {
            return Err(KernelError::Length { what: "elements of a matrix", shape, need, found: w.len() });
        }
        product::apply_right(y, w, cols)
    }

    fn residual(&self, delta: &CpuMatrix, b: &CpuMatrix, a: &CpuMatrix) -> Result<f64> {
        check_factors("residual", delta.shape, b, a)?;
        Ok(product::residual(delta, b, a))
    }

    fn add_low_rank(
        &self,
        w: &CpuRaw,
        terms: &[(f32, &CpuMatrix, &CpuMatrix)],
    ) -> Result<(Vec<u8>, AddStats)> {
        for (_, b, a) in terms {
            check_factors("add_low_rank", w.shape, b, a)?;
        }
        fuse::add_low_rank(w, terms)
    }

    fn pack(&self, matrix: &CpuMatrix, dtype: Dtype) -> Result<Vec<u8>> {
        let size = dtype.bytes();
        let mut out = vec![0u8; matrix.shape.bytes(dtype)?];
        for (index, (&x, out)) in matrix.data.iter().zip(out.chunks_exact_mut(size)).enumerate() {
            if dtype.store(x, out).is_infinite() && x.is_finite() {
                return Err(KernelError::Overflow { what: "pack", index: index as u64 });
            }
        }
        Ok(out)
    }
}

fn same_shape(what: &'static str, left: Shape, right: Shape) -> Result<()> {
    if left == right { Ok(()) } else { Err(KernelError::ShapeMismatch { what, left, right }) }
}

fn check_factors(what: &'static str, shape: Shape, b: &CpuMatrix, a: &CpuMatrix) -> Result<()> {
    if b.shape.cols != a.shape.rows {
        return Err(KernelError::ShapeMismatch { what, left: b.shape, right: a.shape });
    }
    same_shape(what, shape, Shape { rows: b.shape.rows, cols: a.shape.cols })
}

/// A sum in eight interleaved parts: a fixed order that vector units can follow.
#[derive(Clone, Copy, Default)]
struct LaneSum([f64; 8]);

impl LaneSum {
    /// Adds the terms `f(0)`, .., `f(len - 1)`, term i to part i mod 8.
    #[inline(always)]
    fn extend(&mut self, len: usize, f: impl Fn(usize) -> f64) {
        let whole = len / 8 * 8;
        for start in (0..whole).step_by(8) {
            for (lane, sum) in self.0.iter_mut().enumerate() {
                *sum += f(start + lane);
            }
        }
        for i in whole..len {
            self.0[i - whole] += f(i);
        }
    }

    fn total(self) -> f64 {
        let [a, b, c, d, e, f, g, h] = self.0;
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }
}
