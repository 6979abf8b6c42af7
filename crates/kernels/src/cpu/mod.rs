//! The engine that every machine has: host memory, rayon threads and the `gemm` crate.
//!
//! Work is cut into panels of a size that depends on the shape only, and sums over panels are added in panel order,
//! so results are the same bits for any thread count. It runs on the rayon pool of its caller. A difference is a pair of
//! stored sides; passes over it make it panel by panel in the second cache, with the widest vectors that the processor
//! has, and never store it.

mod fuse;
mod pass;
mod product;
mod rows;
mod tile;

use rayon::prelude::*;

use crate::engine::{check_factors, same_shape};
use crate::philox::{entry, sketch_words};
use crate::weights::Weights;
use crate::{AddStats, DeltaStats, Demand, Dtype, Engine, KernelError, Result, Shape};
pub use rows::CpuPair;

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
    type Pair = CpuPair;
    type Matrix = CpuMatrix;

    fn name(&self) -> String {
        "cpu".to_owned()
    }

    fn demand(&self) -> Demand {
        // Readers of both sides of a pair, and of the next one.
        Demand { callers: rayon::current_num_threads(), readers: 2, bytes: None }
    }

    fn pair(&self, aligned: Weights, degraded: Weights) -> Result<CpuPair> {
        same_shape("pair", aligned.shape, degraded.shape)?;
        Ok(CpuPair { shape: aligned.shape, aligned, degraded })
    }

    fn pair_shape(&self, pair: &CpuPair) -> Shape {
        pair.shape
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

    fn beside(&self, matrices: &[&CpuMatrix]) -> Result<CpuMatrix> {
        let Some(first) = matrices.first() else { return CpuMatrix::zeros(Shape { rows: 0, cols: 0 }) };
        if let Some(other) = matrices.iter().find(|m| m.shape.rows != first.shape.rows) {
            return Err(KernelError::ShapeMismatch { what: "beside", left: first.shape, right: other.shape });
        }
        let shape = Shape { rows: first.shape.rows, cols: matrices.iter().map(|m| m.shape.cols).sum() };
        let mut data = Vec::with_capacity(shape.len()?);
        for row in 0..shape.rows {
            for m in matrices {
                data.extend_from_slice(&m.data[row * m.shape.cols..][..m.shape.cols]);
            }
        }
        Ok(CpuMatrix { data, shape })
    }

    fn delta(&self, pair: &CpuPair) -> Result<(CpuMatrix, DeltaStats)> {
        pass::delta(pair)
    }

    fn stats(&self, pair: &CpuPair) -> Result<DeltaStats> {
        pass::stats(pair)
    }

    fn back(&self, pair: &CpuPair, q: &CpuMatrix) -> Result<CpuMatrix> {
        if q.shape.rows != pair.shape.rows {
            return Err(KernelError::ShapeMismatch { what: "back", left: pair.shape, right: q.shape });
        }
        pass::back(pair, q)
    }

    fn sweep(
        &self,
        pair: &CpuPair,
        z: &CpuMatrix,
        stats: Option<&mut DeltaStats>,
    ) -> Result<(CpuMatrix, CpuMatrix)> {
        if z.shape.rows != pair.shape.cols {
            return Err(KernelError::ShapeMismatch { what: "sweep", left: pair.shape, right: z.shape });
        }
        pass::sweep(pair, z, stats)
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

    fn residual(&self, pair: &CpuPair, b: &CpuMatrix, a: &CpuMatrix) -> Result<f64> {
        check_factors("residual", pair.shape, b.shape, a.shape)?;
        pass::residual(pair, b, a)
    }

    fn add_low_rank(
        &self,
        w: &mut [u8],
        dtype: Dtype,
        shape: Shape,
        terms: &[(f32, &CpuMatrix, &CpuMatrix)],
    ) -> Result<AddStats> {
        let need = shape.bytes(dtype)?;
        if w.len() != need {
            return Err(KernelError::Length { what: "bytes of weights", shape, need, found: w.len() });
        }
        if !dtype.is_written() {
            return Err(KernelError::NotWritten { what: "add_low_rank", dtype });
        }
        for (_, b, a) in terms {
            check_factors("add_low_rank", shape, b.shape, a.shape)?;
        }
        fuse::add_low_rank(w, dtype, shape, terms)
    }

    fn pack(&self, matrix: &CpuMatrix, dtype: Dtype) -> Result<Vec<u8>> {
        if !dtype.is_written() {
            return Err(KernelError::NotWritten { what: "pack", dtype });
        }
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

/// A sum in eight interleaved parts: a fixed order that vector units can follow.
#[derive(Clone, Copy, Default)]
struct LaneSum([f64; 8]);

impl LaneSum {
    /// Adds the squares of `values`, number i to part i mod 8.
    #[inline(always)]
    fn squares<T: Copy + Into<f64>>(&mut self, values: &[T]) {
        let (whole, rest) = values.as_chunks::<8>();
        let mut sum = self.0;
        for values in whole {
            for lane in 0..8 {
                let x: f64 = values[lane].into();
                sum[lane] += x * x;
            }
        }
        for (sum, &x) in sum.iter_mut().zip(rest) {
            let x: f64 = x.into();
            *sum += x * x;
        }
        self.0 = sum;
    }

    fn add(&mut self, other: &LaneSum) {
        self.0.iter_mut().zip(other.0).for_each(|(sum, x)| *sum += x);
    }

    fn total(self) -> f64 {
        let [a, b, c, d, e, f, g, h] = self.0;
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }
}
