//! The products that methods ask of an engine, for any engine behind one reference.
//!
//! `V` is always the difference of two stored sides. Products are f32, norms f64.

use kernels::{Engine, KernelError, Shape, Weights};
use lowrank::{Factor, LowRank, LowRankError, Rank};

/// Columns of a dense matrix that go through `V` at once.
pub(crate) const PANEL_COLS: usize = 512;

/// Two stored sides of one matrix: what is meant is `one - other`.
#[derive(Debug, Clone)]
pub struct Difference {
    /// What is subtracted from.
    pub one: Weights,
    /// What is subtracted.
    pub other: Weights,
}

/// Products with a difference of stored weights. Every [`Engine`] offers them.
pub trait Algebra: Send + Sync {
    /// The best factors of a rank of `V`, and the squared norm of `V`; `None` where both sides are equal.
    fn factor(
        &self,
        v: Difference,
        key: u64,
        rank: usize,
        seed: u64,
    ) -> Result<Option<(LowRank, f64)>, LowRankError>;

    /// `V V^T B / |V|` for a `B` of `cols` columns, row-major; `None` where `V` is zero.
    fn through(&self, v: Difference, b: &[f32], cols: usize) -> Result<Option<Vec<f32>>, KernelError>;

    /// `V` in f32.
    fn dense(&self, v: Difference) -> Result<Vec<f32>, KernelError>;

    /// `A B` of row-major matrices.
    fn product(&self, a: &[f32], a_shape: Shape, b: &[f32], b_cols: usize) -> Result<Vec<f32>, KernelError>;

    /// `A^T B` of row-major matrices.
    fn product_of_transposed(
        &self,
        a: &[f32],
        a_shape: Shape,
        b: &[f32],
        b_cols: usize,
    ) -> Result<Vec<f32>, KernelError>;
}

impl<E: Engine> Algebra for E {
    fn factor(
        &self,
        v: Difference,
        key: u64,
        rank: usize,
        seed: u64,
    ) -> Result<Option<(LowRank, f64)>, LowRankError> {
        let pair = self.pair(v.one, v.other)?;
        let (found, stats) = lowrank::factor(self, &pair, key, &Factor::new(Rank::Fixed(rank), seed))?;
        Ok(found.map(|low_rank| (low_rank, stats.sumsq)))
    }

    fn through(&self, v: Difference, b: &[f32], cols: usize) -> Result<Option<Vec<f32>>, KernelError> {
        let shape = v.one.shape();
        let pair = self.pair(v.one, v.other)?;
        let norm = self.stats(&pair)?.sumsq.sqrt();
        if norm == 0.0 {
            return Ok(None);
        }
        let mut out = vec![0.0; b.len()];
        // In panels, so that what a wide B takes beside itself stays small.
        for first in (0..cols).step_by(PANEL_COLS) {
            let width = PANEL_COLS.min(cols - first);
            let panel: Vec<f32> =
                b.chunks_exact(cols).flat_map(|row| row[first..first + width].iter().copied()).collect();
            let panel = self.matrix(&panel, Shape { rows: shape.rows, cols: width })?;
            let (through, _) = self.sweep(&pair, &self.back(&pair, &panel)?, None)?;
            let through = self.read(&through)?;
            for (out, row) in out.chunks_exact_mut(cols).zip(through.chunks_exact(width)) {
                for (out, &x) in out[first..first + width].iter_mut().zip(row) {
                    *out = (f64::from(x) / norm) as f32;
                }
            }
        }
        Ok(Some(out))
    }

    fn dense(&self, v: Difference) -> Result<Vec<f32>, KernelError> {
        let pair = self.pair(v.one, v.other)?;
        self.read(&self.delta(&pair)?.0)
    }

    fn product(&self, a: &[f32], a_shape: Shape, b: &[f32], b_cols: usize) -> Result<Vec<f32>, KernelError> {
        let (a, b) = (self.matrix(a, a_shape)?, self.matrix(b, Shape { rows: a_shape.cols, cols: b_cols })?);
        self.read(&self.gemm(&a, false, &b)?)
    }

    fn product_of_transposed(
        &self,
        a: &[f32],
        a_shape: Shape,
        b: &[f32],
        b_cols: usize,
    ) -> Result<Vec<f32>, KernelError> {
        let (a, b) = (self.matrix(a, a_shape)?, self.matrix(b, Shape { rows: a_shape.rows, cols: b_cols })?);
        self.read(&self.gemm(&a, true, &b)?)
    }
}
