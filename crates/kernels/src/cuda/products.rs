//! Sums over a difference and over matrices: products, squares and residuals.

use std::sync::Arc;

use super::kernel::{CHAIN_TILE, Kernel, SQUARES, Sums};
use super::memory::Block;
use super::pair::{CudaPair, Held};
use super::program::Track;
use super::steps::{halves, in_a_grid, tiles, write_reduce};
use super::{CudaEngine, CudaMatrix};
use crate::{Result, Shape};

impl CudaEngine {
    /// Writes `A B` or `A^T B` into `out`: `a` is the address of [rows, depth], or [depth, rows], of stride `lda`.
    pub(super) fn write_product(
        &self,
        track: &Track,
        transposed: bool,
        (rows, cols, depth): (u32, u32, u32),
        (a, lda): (u64, u32),
        b: u64,
        out: u64,
    ) -> Result<()> {
        if rows == 0 || cols == 0 {
            return Ok(());
        }
        let len = u64::from(rows) * u64::from(cols);
        if depth == 0 {
            track.write(|program| program.fill(out, 0, len * 4));
            return Ok(());
        }
        let splits = in_a_grid(self.shared.gemm.parts(depth), depth)?;
        let parts = if splits > 1 { Some(self.block(track, u64::from(splits) * len * 4)?) } else { None };
        let into = parts.as_ref().map_or(out, |parts| parts.address);
        track.write(|program| {
            self.shared.gemm.write(program, transposed, (rows, cols, depth), (a, lda), b, into);
            if parts.is_some() {
                write_reduce(program, (into, 0, out), len, splits, (true, true));
            }
        });
        Ok(())
    }

    /// `D^T Q` after the passes before, and `D Z` on the way if it is asked for.
    pub(super) fn products(
        &self,
        track: &Arc<Track>,
        pair: &CudaPair,
        z: Option<&CudaMatrix>,
        q: Option<&CudaMatrix>,
        l: usize,
    ) -> Result<(CudaMatrix, CudaMatrix)> {
        let Shape { rows, cols } = pair.shape;
        let y = match q {
            None => self.fresh(track, Shape { rows, cols: l })?,
            Some(q) => CudaMatrix { block: q.block.clone(), shape: q.shape, track: track.clone() },
        };
        let w = self.fresh(track, Shape { rows: cols, cols: l })?;
        for operand in [z, q].into_iter().flatten() {
            track.write(|program| program.keep(&operand.block));
        }
        if l == 0 || pair.shape.is_empty() {
            track.write(|program| {
                // The operand is no result.
                if q.is_none() {
                    program.fill(y.block.address, 0, (rows * l * 4) as u64);
                }
                program.fill(w.block.address, 0, (cols * l * 4) as u64);
            });
            return Ok((y, w));
        }
        let (columns, l) = (cols as u32, l as u32);
        let most = match &pair.held {
            Held::Whole(..) => rows as u32,
            Held::Panels(height) => *height,
        };
        let once = most as usize >= rows;
        let gemm = &*self.shared.gemm;
        let across = in_a_grid(gemm.parts(columns), columns)?;
        let down = in_a_grid(gemm.parts(most), most)?;
        let (y_len, w_len) = (most as u64 * u64::from(l), cols as u64 * u64::from(l));
        let y_parts = match z {
            Some(_) if across > 1 => Some(self.block(track, u64::from(across) * y_len * 4)?),
            _ => None,
        };
        let direct = once && down == 1;
        let w_parts = if direct { None } else { Some(self.block(track, u64::from(down) * w_len * 4)?) };
        let sum = if once { None } else { Some(self.block(track, w_len * 8)?) };
        // Owned until all steps that name it are written.
        let sum_at = sum.as_ref().map_or(0, |sum| sum.address);
        self.pass(track, pair, None, &mut |program, first, count, d, ld| {
            let rows_at = y.block.address + u64::from(first) * u64::from(l) * 4;
            if let Some(z) = z {
                let into = y_parts.as_ref().map_or(rows_at, |parts| parts.address);
                gemm.write(program, false, (count, l, columns), (d, ld), z.block.address, into);
                if y_parts.is_some() {
                    let len = u64::from(count) * u64::from(l);
                    write_reduce(program, (into, 0, rows_at), len, across, (true, true));
                }
            }
            let into = w_parts.as_ref().map_or(w.block.address, |parts| parts.address);
            gemm.write(program, true, (columns, l, count), (d, ld), rows_at, into);
            if w_parts.is_some() {
                let last = first + count == rows as u32;
                let at = (into, sum_at, w.block.address);
                write_reduce(program, at, w_len, gemm.parts(count), (first == 0, last));
            }
        })?;
        Ok((y, w))
    }

    /// The sum of the squares of a matrix, as parts, reduced.
    pub(super) fn squares(&self, track: &Track, x: &CudaMatrix) -> Result<Arc<Block>> {
        let parts = self.block(track, u64::from(SQUARES) * size_of::<Sums>() as u64)?;
        let len = halves(x.shape.len()? as u64);
        track.write(|program| {
            program.keep(&x.block);
            let slots = [x.block.address, parts.address];
            program.launch(Kernel::Squares, (SQUARES, 1), 1, &slots, &len);
        });
        self.reduce(track, &parts, SQUARES)
    }

    pub(super) fn residual_in(
        &self,
        track: &Track,
        pair: &CudaPair,
        b: &CudaMatrix,
        a: &CudaMatrix,
        kernel: Kernel,
    ) -> Result<Arc<Block>> {
        let Shape { rows, cols } = pair.shape;
        let (down, across) = ((rows as u32).div_ceil(CHAIN_TILE), (cols as u32).div_ceil(CHAIN_TILE));
        let count = tiles(down, across, pair.shape)?;
        let parts = self.block(track, u64::from(count) * size_of::<Sums>() as u64)?;
        let rank = b.shape.cols as u32;
        track.write(|program| {
            program.keep(&b.block);
            program.keep(&a.block);
        });
        self.pass(track, pair, None, &mut |program, first, rows, d, ld| {
            let b_rows = b.block.address + u64::from(first) * u64::from(rank) * 4;
            let slots = [d, b_rows, a.block.address, parts.address];
            let grid = (rows.div_ceil(CHAIN_TILE) * across, 1);
            program.launch(kernel, grid, 1, &slots, &[rows, cols as u32, rank, ld, first, 0]);
        })?;
        self.reduce(track, &parts, count)
    }
}
