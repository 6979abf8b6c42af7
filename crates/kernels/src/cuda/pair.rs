//! A difference on the device: uploaded and subtracted once, or panel by panel for each pass.
//!
//! Panels are halved until they fit. Their heights are multiples of what any sum is cut into, so no result depends on them.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use super::CudaEngine;
use super::host::Landing;
use super::kernel::{DELTA_ROWS, Kernel, NONE, PANEL_ROWS, Sums};
use super::memory::Block;
use super::program::{Program, Source, Track};
use super::steps::{code, side, stride};
use crate::engine::same_shape;
use crate::weights::{Rows, Scales, blame};
use crate::{DeltaStats, Dtype, KernelError, Result, Shape, Side, Weights};

/// Columns of a difference at most: a few rows of them are counted in 32 bits.
const COLS_MAX: usize = 1 << 27;

/// A difference of stored weights.
pub struct CudaPair {
    pub(super) shape: Shape,
    weights: [Weights; 2],
    /// Scales of each side in device memory.
    grids: [Option<Arc<Block>>; 2],
    pub(super) held: Held,
    /// The sums: where they will be, then themselves.
    sums: Mutex<Known>,
    pub(super) track: Arc<Track>,
}

pub(super) enum Held {
    /// All of it, with this stride.
    Whole(Arc<Block>, u32),
    /// Nothing: it is made in panels of so many rows for each pass.
    Panels(u32),
}

enum Known {
    Coming(Arc<Landing>),
    Here(Result<DeltaStats>),
    No,
}

impl std::fmt::Debug for CudaPair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CudaPair({})", self.shape)
    }
}

impl CudaPair {
    /// Records that the subtraction of all rows writes.
    pub(super) fn parts(&self) -> u32 {
        (self.shape.rows as u32).div_ceil(DELTA_ROWS)
    }

    pub(super) fn parts_bytes(&self) -> u64 {
        u64::from(self.parts()) * size_of::<Sums>() as u64
    }

    /// Bytes that so many rows take in device memory.
    pub(super) fn bytes(&self, rows: u32) -> u64 {
        let stored: usize = self.weights.iter().map(|weights| weights.dtype.bytes()).sum();
        u64::from(rows) * (self.shape.cols * stored + stride(self.shape.cols as u32) as usize * 4) as u64
    }
}

impl CudaEngine {
    /// Two sides, whole where they fit.
    pub(super) fn make_pair(&self, aligned: Weights, degraded: Weights) -> Result<CudaPair> {
        same_shape("pair", aligned.shape, degraded.shape)?;
        let shape = aligned.shape;
        side(shape.rows, shape)?;
        if shape.cols > COLS_MAX {
            return Err(KernelError::ShapeOverflow { shape });
        }
        let track = self.track();
        let mut grids = [None, None];
        for (grid, weights) in grids.iter_mut().zip([&aligned, &degraded]) {
            if let Some(scales) = &weights.scales {
                *grid = Some(self.put(&track, bytemuck::cast_slice(&scales.grid))?);
            }
        }
        let (weights, held) = ([aligned, degraded], Held::Panels(0));
        let mut pair = CudaPair { shape, weights, grids, held, sums: Mutex::new(Known::No), track };
        let track = pair.track.clone();
        if shape.is_empty() {
            pair.held = Held::Whole(self.block(&track, 0)?, stride(shape.cols as u32));
            return Ok(pair);
        }
        let rows = shape.rows as u32;
        if let Some([a, b, d]) = self.room(&track, &pair, rows)? {
            let parts = self.block(&track, pair.parts_bytes())?;
            let ld = stride(shape.cols as u32);
            let at = [a.address, b.address, d.address, parts.address];
            track.write(|program| Self::write_delta(program, &pair, (0, rows), at, ld));
            let sums = self.reduce(&track, &parts, pair.parts())?;
            let landing = self.landing(size_of::<Sums>())?;
            track.write(|program| landing.fill(program, sums.address));
            pair.held = Held::Whole(d, ld);
            pair.sums = Mutex::new(Known::Coming(landing));
            return Ok(pair);
        }
        // Half of what is left, until it fits.
        let mut height = rows.next_multiple_of(PANEL_ROWS);
        loop {
            height = (height / 2).next_multiple_of(PANEL_ROWS);
            let fits = if height > PANEL_ROWS {
                self.room(&track, &pair, height)?.is_some()
            } else {
                self.patient(pair.bytes(height), || self.room(&track, &pair, height)).map(|_| true)?
            };
            if fits {
                // The products need memory, too.
                pair.held = Held::Panels((height / 2).next_multiple_of(PANEL_ROWS));
                self.shared.panels.fetch_add(1, Ordering::Relaxed);
                self.finish(&track)?;
                return Ok(pair);
            }
        }
    }

    /// Where rows of one side come from.
    fn rows_of(weights: &Weights, which: Side, first: usize) -> Source {
        let row_bytes = weights.shape().cols * weights.dtype.bytes();
        match &weights.rows {
            Rows::Held(bytes) => Source::Bytes { bytes: bytes.clone(), start: first * row_bytes },
            Rows::Read(_) => Source::Rows { weights: weights.clone(), side: which, first },
        }
    }

    /// Writes the upload of some rows of a pair and their subtraction into `d`.
    pub(super) fn write_delta(
        program: &mut Program,
        pair: &CudaPair,
        (first, rows): (u32, u32),
        [a, b, d, parts]: [u64; 4],
        ld: u32,
    ) {
        let cols = pair.shape.cols;
        for (weights, which, to) in
            [(&pair.weights[0], Side::Aligned, a), (&pair.weights[1], Side::Degraded, b)]
        {
            let len = rows as u64 * (cols * weights.dtype.bytes()) as u64;
            program.upload(Self::rows_of(weights, which, first as usize), to, len);
        }
        Self::write_subtraction(program, pair, (first, rows), [a, b, d, parts], ld);
    }

    /// Writes the subtraction of rows that are there.
    pub(super) fn write_subtraction(
        program: &mut Program,
        pair: &CudaPair,
        (first, rows): (u32, u32),
        [a, b, d, parts]: [u64; 4],
        ld: u32,
    ) {
        let cols = pair.shape.cols;
        pair.grids.iter().flatten().for_each(|grid| program.keep(grid));
        let [x, y] = [&pair.weights[0], &pair.weights[1]];
        let kernel = delta_kernel(x, y, cols, ld);
        let scales = |i: usize| pair.grids[i].as_ref().map_or(0, |block| block.address);
        let mut words = vec![rows, cols as u32, ld, first, code(x.dtype), code(y.dtype)];
        for weights in [x, y] {
            words.extend(weights.scales.as_ref().map_or([0, 1, 1, 0, 0], |s| {
                [s.grid_cols, s.block[0], s.block[1], s.origin[0], s.origin[1]].map(|n| n as u32)
            }));
        }
        let slots = [a, b, scales(0), scales(1), d, parts];
        program.launch(kernel, (rows.div_ceil(DELTA_ROWS), 1), 1, &slots, &words);
    }

    /// The rows of a pair, all at once or panel by panel: `f` writes what is done to rows `first..first + rows` at this
    /// address. Parts of the sums come to `parts`, if the difference is made on the way.
    pub(super) fn pass(
        &self,
        track: &Track,
        pair: &CudaPair,
        parts: Option<&Block>,
        f: &mut dyn FnMut(&mut Program, u32, u32, u64, u32),
    ) -> Result<()> {
        let rows = pair.shape.rows as u32;
        let mut height = match &pair.held {
            Held::Whole(d, ld) => {
                track.write(|program| {
                    program.keep(d);
                    f(program, 0, rows, d.address, *ld);
                });
                return Ok(());
            }
            Held::Panels(height) => *height,
        };
        let own;
        let parts = match parts {
            Some(parts) => parts,
            None => {
                own = self.block(track, pair.parts_bytes())?;
                &*own
            }
        };
        let ld = stride(pair.shape.cols as u32);
        // Others may have taken memory since the pair was made; no result depends on the height.
        let [a, b, d] = loop {
            match self.room(track, pair, height)? {
                Some(room) => break room,
                None if height <= PANEL_ROWS => {
                    break self.patient(pair.bytes(height), || self.room(track, pair, height))?;
                }
                None => height = (height / 2).next_multiple_of(PANEL_ROWS),
            }
        };
        track.write(|program| {
            let mut first = 0;
            while first < rows {
                let count = height.min(rows - first);
                let at = [a.address, b.address, d.address, parts.address];
                Self::write_delta(program, pair, (first, count), at, ld);
                f(program, first, count, d.address, ld);
                first += count;
            }
        });
        Ok(())
    }

    /// Memory for both sides and the difference of so many rows.
    pub(super) fn room(&self, track: &Track, pair: &CudaPair, rows: u32) -> Result<Option<[Arc<Block>; 3]>> {
        let cols = pair.shape.cols as u64;
        let bytes = |i: usize| rows as u64 * cols * pair.weights[i].dtype.bytes() as u64;
        let Some(d) = self.try_block(track, rows as u64 * u64::from(stride(cols as u32)) * 4)? else {
            return Ok(None);
        };
        let Some(a) = self.try_block(track, bytes(0))? else { return Ok(None) };
        let Some(b) = self.try_block(track, bytes(1))? else { return Ok(None) };
        Ok(Some([a, b, d]))
    }

    /// The sums of a pair.
    pub(super) fn known(&self, pair: &CudaPair) -> Result<DeltaStats> {
        if pair.shape.is_empty() {
            return Ok(DeltaStats::default());
        }
        let mut known = pair.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let sums: Sums = match &*known {
            Known::Here(stats) => return stats.clone(),
            Known::Coming(landing) => {
                self.finish(&pair.track)?;
                bytemuck::pod_read_unaligned(landing.bytes()?)
            }
            Known::No => {
                let track = self.track_after(&[&pair.track])?;
                let parts = self.block(&track, pair.parts_bytes())?;
                self.pass(&track, pair, Some(&parts), &mut |_, _, _, _, _| {})?;
                let sums = self.reduce(&track, &parts, pair.parts())?;
                self.fetch_sums(&track, &sums)?
            }
        };
        let stats = if sums.first == NONE {
            Ok(DeltaStats {
                sumsq: sums.x,
                ulp_sumsq: sums.y,
                max_abs: f32::from_bits(sums.max),
                nonzero: sums.count,
                elements: pair.shape.len()? as u64,
            })
        } else {
            Err(blame(&pair.weights[0], &pair.weights[1], sums.first))
        };
        *known = Known::Here(stats.clone());
        stats
    }
}

/// The kernel that subtracts two sides fastest.
fn delta_kernel(a: &Weights, b: &Weights, cols: usize, ld: u32) -> Kernel {
    let plain = a.scales.is_none() && b.scales.is_none();
    let in_fours = |scales: &Option<Arc<Scales>>| {
        scales.as_ref().is_some_and(|s| s.block[1].is_multiple_of(4) && s.origin[1].is_multiple_of(4))
    };
    match (a.dtype, b.dtype) {
        // A stride longer than the columns: these are no multiple of four.
        _ if ld as usize != cols => Kernel::DeltaAny,
        (Dtype::Bf16, Dtype::Bf16) if plain => Kernel::DeltaBf16,
        (Dtype::F16, Dtype::F16) if plain => Kernel::DeltaF16,
        (Dtype::F32, Dtype::F32) if plain => Kernel::DeltaF32,
        (Dtype::F8E4M3, Dtype::F8E4M3) if in_fours(&a.scales) && in_fours(&b.scales) => Kernel::DeltaE4m3,
        _ => Kernel::DeltaAny,
    }
}
