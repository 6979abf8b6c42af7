//! The operations of an engine, written down for the device.

use std::sync::Arc;

use super::host::Landing;
use super::kernel::{CHAIN_TILE, GRAM_TILE, Kernel, NONE, PACKED, PANEL_ROWS, SPLIT, Sums};
use super::pair::{CudaPair, Held};
use super::program::{Source, Track};
use super::steps::{blocks, code, halves, in_a_grid, side, tiles, write_place, write_reduce_sums};
use super::{CudaEngine, CudaMatrix};
use crate::engine::{Demand, HostBuffer, check_factors, f32_chains_do};
use crate::{AddStats, DeltaStats, Dtype, Engine, KernelError, Result, Shape, Side, Weights};

/// Callers for each core that wait for the device most of the time.
const CALLERS_PER_CORE: usize = 4;

impl Engine for CudaEngine {
    type Pair = CudaPair;
    type Matrix = CudaMatrix;

    fn name(&self) -> String {
        format!("cuda:{} ({})", self.device().ordinal, self.device().name)
    }

    fn demand(&self) -> Demand {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let (free, _) = self.shared.device.memory().unwrap_or((0, 0));
        Demand {
            callers: (CALLERS_PER_CORE * cores).clamp(4, 64),
            // They copy and hash at some 5 GB/s each, beside a link of ten times that.
            readers: (cores * 3 / 4).clamp(2, 24),
            // What is under way lies in device memory as it is stored and as f32 (up to four times that), with blocks beside.
            bytes: Some(self.shared.memory.limit().min(free + self.shared.memory.bytes()) / 6),
        }
    }

    fn buffer(&self, len: usize) -> Option<HostBuffer> {
        Some(Box::new(self.pinned(len).ok()??))
    }

    fn pair(&self, aligned: Weights, degraded: Weights) -> Result<CudaPair> {
        self.make_pair(aligned, degraded)
    }

    fn pair_shape(&self, pair: &CudaPair) -> Shape {
        pair.shape
    }

    fn matrix(&self, data: &[f32], shape: Shape) -> Result<CudaMatrix> {
        let need = shape.len()?;
        if data.len() != need {
            return Err(KernelError::Length { what: "elements of a matrix", shape, need, found: data.len() });
        }
        side(shape.rows, shape)?;
        side(shape.cols, shape)?;
        let track = self.track();
        let block = self.put(&track, bytemuck::cast_slice(data))?;
        Ok(CudaMatrix { block, shape, track })
    }

    fn read(&self, matrix: &CudaMatrix) -> Result<Vec<f32>> {
        let track = self.track_after(&[&matrix.track])?;
        track.write(|program| program.keep(&matrix.block));
        let bytes = self.fetch(&track, matrix.block.address, matrix.shape.bytes(Dtype::F32)?)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect())
    }

    fn shape(&self, matrix: &CudaMatrix) -> Shape {
        matrix.shape
    }

    fn beside(&self, matrices: &[&CudaMatrix]) -> Result<CudaMatrix> {
        let tracks: Vec<&Arc<Track>> = matrices.iter().map(|m| &m.track).collect();
        let track = self.track_after(&tracks)?;
        let rows = matrices.first().map_or(0, |m| m.shape.rows);
        if let Some(other) = matrices.iter().find(|m| m.shape.rows != rows) {
            let left = matrices[0].shape;
            return Err(KernelError::ShapeMismatch { what: "beside", left, right: other.shape });
        }
        let shape = Shape { rows, cols: matrices.iter().map(|m| m.shape.cols).sum() };
        let out = self.fresh(&track, shape)?;
        let mut at = 0;
        for m in matrices {
            let to = out.block.address + at as u64 * 4;
            track.write(|program| {
                program.keep(&m.block);
                write_place(program, m.block.address, (m.shape, m.shape.cols), (to, shape.cols), 1.0)
            });
            at += m.shape.cols;
        }
        Ok(out)
    }

    fn delta(&self, pair: &CudaPair) -> Result<(CudaMatrix, DeltaStats)> {
        let stats = self.known(pair)?;
        let track = self.track_after(&[&pair.track])?;
        if let Held::Whole(d, ld) = &pair.held
            && *ld as usize == pair.shape.cols
        {
            return Ok((CudaMatrix { block: d.clone(), shape: pair.shape, track }, stats));
        }
        let out = self.fresh(&track, pair.shape)?;
        let cols = pair.shape.cols;
        if !pair.shape.is_empty() {
            self.pass(&track, pair, None, &mut |program, first, rows, d, ld| {
                let to = out.block.address + u64::from(first) * cols as u64 * 4;
                let shape = Shape { rows: rows as usize, cols };
                write_place(program, d, (shape, ld as usize), (to, cols), 1.0);
            })?;
        }
        Ok((out, stats))
    }

    fn stats(&self, pair: &CudaPair) -> Result<DeltaStats> {
        self.known(pair)
    }

    fn sketch(&self, shape: Shape, seed: u64, key: u64) -> Result<CudaMatrix> {
        let track = self.track();
        let out = self.fresh(&track, shape)?;
        let (rows, cols) = (shape.rows as u32, shape.cols as u32);
        let grid = (blocks(u64::from(rows) * u64::from(cols.div_ceil(4)), 128, shape)?, 1);
        let [low, high] = halves(seed);
        let words = [low, high, rows, cols];
        track.write(|p| p.launch(Kernel::Sketch, grid, 1, &[out.block.address, key], &words));
        Ok(out)
    }

    fn back(&self, pair: &CudaPair, q: &CudaMatrix) -> Result<CudaMatrix> {
        if q.shape.rows != pair.shape.rows {
            return Err(KernelError::ShapeMismatch { what: "back", left: pair.shape, right: q.shape });
        }
        let track = self.track_after(&[&pair.track, &q.track])?;
        Ok(self.products(&track, pair, None, Some(q), q.shape.cols)?.1)
    }

    fn sweep(
        &self,
        pair: &CudaPair,
        z: &CudaMatrix,
        stats: Option<&mut DeltaStats>,
    ) -> Result<(CudaMatrix, CudaMatrix)> {
        if z.shape.rows != pair.shape.cols {
            return Err(KernelError::ShapeMismatch { what: "sweep", left: pair.shape, right: z.shape });
        }
        let track = self.track_after(&[&pair.track, &z.track])?;
        let found = self.products(&track, pair, Some(z), None, z.shape.cols)?;
        if let Some(stats) = stats {
            *stats = self.known(pair)?;
        }
        Ok(found)
    }

    fn gemm(&self, a: &CudaMatrix, a_transposed: bool, b: &CudaMatrix) -> Result<CudaMatrix> {
        let a_shape = if a_transposed { a.shape.transposed() } else { a.shape };
        if a_shape.cols != b.shape.rows {
            return Err(KernelError::ShapeMismatch { what: "gemm", left: a_shape, right: b.shape });
        }
        let track = self.track_after(&[&a.track, &b.track])?;
        let out = self.fresh(&track, Shape { rows: a_shape.rows, cols: b.shape.cols })?;
        track.write(|program| {
            program.keep(&a.block);
            program.keep(&b.block);
        });
        let sides = (a_shape.rows as u32, b.shape.cols as u32, a_shape.cols as u32);
        let left = (a.block.address, a.shape.cols as u32);
        self.write_product(&track, a_transposed, sides, left, b.block.address, out.block.address)?;
        Ok(out)
    }

    fn gram(&self, y: &CudaMatrix) -> Result<Vec<f64>> {
        let (rows, cols) = (y.shape.rows as u32, y.shape.cols as u32);
        let shape = Shape { rows: y.shape.cols, cols: y.shape.cols };
        let len = shape.len()?;
        if y.shape.is_empty() {
            return Ok(vec![0.0; len]);
        }
        let track = self.track_after(&[&y.track])?;
        let splits = in_a_grid(rows.div_ceil(SPLIT), rows)?;
        let bytes = shape.bytes(Dtype::F64)? as u64;
        let parts = self.block(&track, u64::from(splits) * bytes)?;
        let out = self.block(&track, bytes)?;
        let tiles = cols.div_ceil(GRAM_TILE);
        track.write(|program| {
            program.keep(&y.block);
            let slots = [y.block.address, parts.address];
            program.launch(Kernel::Gram, (tiles * (tiles + 1) / 2, splits), 1, &slots, &[rows, cols]);
            let grid = ((len as u64).div_ceil(128) as u32, 1);
            program.launch(Kernel::GramSum, grid, 1, &[parts.address, out.address], &[splits, cols]);
        });
        let bytes = self.fetch(&track, out.address, bytes as usize)?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|x| f64::from_le_bytes(*x)).collect())
    }

    fn apply_right(&self, y: &CudaMatrix, w: &[f64], cols: usize) -> Result<CudaMatrix> {
        let shape = Shape { rows: y.shape.cols, cols };
        let need = shape.len()?;
        if w.len() != need {
            return Err(KernelError::Length { what: "elements of a matrix", shape, need, found: w.len() });
        }
        let track = self.track_after(&[&y.track])?;
        let out = self.fresh(&track, Shape { rows: y.shape.rows, cols })?;
        let w = self.put(&track, bytemuck::cast_slice(w))?;
        let (rows, depth, cols) = (y.shape.rows as u32, y.shape.cols as u32, cols as u32);
        track.write(|program| {
            program.keep(&y.block);
            let slots = [y.block.address, w.address, out.block.address];
            let grid = (rows.div_ceil(64), cols.div_ceil(32));
            program.launch(Kernel::Apply, grid, 1, &slots, &[rows, depth, cols, 0]);
        });
        Ok(out)
    }

    fn residual(&self, pair: &CudaPair, b: &CudaMatrix, a: &CudaMatrix) -> Result<f64> {
        check_factors("residual", pair.shape, b.shape, a.shape)?;
        if pair.shape.is_empty() {
            return Ok(0.0);
        }
        let track = self.track_after(&[&pair.track, &b.track, &a.track])?;
        let found = self.residual_in(&track, pair, b, a, Kernel::ResidualF32)?;
        let (b_squares, a_squares) = (self.squares(&track, b)?, self.squares(&track, a)?);
        let (b_landing, a_landing) = (self.landing(size_of::<Sums>())?, self.landing(size_of::<Sums>())?);
        track.write(|program| {
            b_landing.fill(program, b_squares.address);
            a_landing.fill(program, a_squares.address);
        });
        let found = self.fetch_sums(&track, &found)?.x;
        let squares = |landing: &Landing| -> Result<f64> {
            Ok(bytemuck::pod_read_unaligned::<Sums>(landing.bytes()?).x)
        };
        if f32_chains_do(found, b.shape.cols, squares(&b_landing)?, squares(&a_landing)?) {
            return Ok(found);
        }
        let found = self.residual_in(&track, pair, b, a, Kernel::ResidualF64)?;
        Ok(self.fetch_sums(&track, &found)?.x)
    }

    fn add_low_rank(
        &self,
        w: &mut [u8],
        dtype: Dtype,
        shape: Shape,
        terms: &[(f32, &CudaMatrix, &CudaMatrix)],
    ) -> Result<AddStats> {
        let need = shape.bytes(dtype)?;
        if w.len() != need {
            return Err(KernelError::Length { what: "bytes of weights", shape, need, found: w.len() });
        }
        let kernel = match dtype {
            Dtype::Bf16 => Kernel::AddBf16,
            Dtype::F16 => Kernel::AddF16,
            Dtype::F32 => Kernel::AddF32,
            Dtype::F64 => Kernel::AddF64,
            _ => return Err(KernelError::NotWritten { what: "add_low_rank", dtype }),
        };
        for (_, b, a) in terms {
            check_factors("add_low_rank", shape, b.shape, a.shape)?;
        }
        if shape.is_empty() {
            return Ok(AddStats::default());
        }
        let tracks: Vec<&Arc<Track>> = terms.iter().flat_map(|(_, b, a)| [&b.track, &a.track]).collect();
        let track = self.track_after(&tracks)?;
        let (rows, cols) = (side(shape.rows, shape)?, side(shape.cols, shape)?);
        let rank: usize = terms.iter().map(|(_, b, _)| b.shape.cols).sum();
        // [c_1 B_1 | c_2 B_2 | ...], each coefficient folded in once, and [A_1; A_2; ...].
        let left = self.fresh(&track, Shape { rows: shape.rows, cols: rank })?;
        let right = self.fresh(&track, Shape { rows: rank, cols: shape.cols })?;
        let mut at = 0;
        for (c, b, a) in terms {
            track.write(|program| {
                program.keep(&b.block);
                program.keep(&a.block);
                let to = left.block.address + at as u64 * 4;
                write_place(program, b.block.address, (b.shape, b.shape.cols), (to, rank), *c);
                let to = right.block.address + (at * shape.cols) as u64 * 4;
                program.copy(a.block.address, to, (a.shape.rows * a.shape.cols) as u64 * 4);
            });
            at += b.shape.cols;
        }
        let row_bytes = (shape.cols * dtype.bytes()) as u64;
        let mut height = rows;
        let room = loop {
            if let Some(block) = self.try_block(&track, u64::from(height) * row_bytes)? {
                break block;
            }
            if height <= PANEL_ROWS {
                return Err(self.out_of_memory(u64::from(height) * row_bytes));
            }
            height = (height / 2).next_multiple_of(PANEL_ROWS);
        };
        let across = cols.div_ceil(CHAIN_TILE);
        let count = tiles(rows.div_ceil(CHAIN_TILE), across, shape)?;
        let parts = self.block(&track, u64::from(count) * size_of::<Sums>() as u64)?;
        let out = self.block(&track, size_of::<Sums>() as u64)?;
        let landing = self.landing(size_of::<Sums>())?;
        // All memory is there: from here on nothing returns before the program is done, which reads and writes `w`.
        let host = w.as_mut_ptr() as u64;
        track.write(|program| {
            let mut first = 0;
            while first < rows {
                let some = height.min(rows - first);
                let (at, len) = (host + u64::from(first) * row_bytes, u64::from(some) * row_bytes);
                program.upload(Source::Address(at), room.address, len);
                let b_rows = left.block.address + u64::from(first) * rank as u64 * 4;
                let slots = [room.address, b_rows, right.block.address, parts.address];
                let grid = (some.div_ceil(CHAIN_TILE) * across, 1);
                program.launch(kernel, grid, 1, &slots, &[some, cols, rank as u32, first]);
                program.download(room.address, at, len);
                first += some;
            }
            write_reduce_sums(program, &parts, count, &out);
            landing.fill(program, out.address);
        });
        self.finish(&track)?;
        let sums: Sums = bytemuck::pod_read_unaligned(landing.bytes()?);
        if sums.first != NONE {
            let index = sums.first / 2;
            return Err(match sums.first % 2 {
                0 => KernelError::NonFinite { side: Side::Target, index },
                _ => KernelError::Overflow { what: "add_low_rank", index },
            });
        }
        Ok(AddStats { changed: sums.count, intended_sumsq: sums.x, realised_sumsq: sums.y })
    }

    fn pack(&self, matrix: &CudaMatrix, dtype: Dtype) -> Result<Vec<u8>> {
        if !dtype.is_written() {
            return Err(KernelError::NotWritten { what: "pack", dtype });
        }
        let (bytes, len) = (matrix.shape.bytes(dtype)?, matrix.shape.len()? as u64);
        if len == 0 {
            return Ok(Vec::new());
        }
        let track = self.track_after(&[&matrix.track])?;
        let out = self.block(&track, bytes as u64)?;
        let count = blocks(len, PACKED, matrix.shape)?;
        let parts = self.block(&track, u64::from(count) * size_of::<Sums>() as u64)?;
        let [low, high] = halves(len);
        track.write(|program| {
            program.keep(&matrix.block);
            let slots = [matrix.block.address, out.address, parts.address];
            program.launch(Kernel::Pack, (count, 1), 1, &slots, &[low, high, code(dtype), 0]);
        });
        let sums = self.reduce(&track, &parts, count)?;
        let landing = self.landing(bytes)?;
        track.write(|program| landing.fill(program, out.address));
        match self.fetch_sums(&track, &sums)?.first {
            NONE => Ok(landing.bytes()?.to_vec()),
            index => Err(KernelError::Overflow { what: "pack", index }),
        }
    }
}
