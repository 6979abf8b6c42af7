//! What a device does at best, and what the kernels do beside it.
//!
//! Every rate is the median of five, of launches that follow one another without a pause and are waited for once; the first
//! is a warm-up. Numbers are random, never zeros, and buffers are far larger than caches.

use std::sync::Arc;
use std::time::Instant;

use super::gemm::{Cublas, Gemm32, Own};
use super::kernel::{Kernel, Sums};
use super::program::{Program, Source, Track};
use super::steps::{stride, write_reduce};
use super::{CudaEngine, CudaMatrix};
use crate::{Dtype, Engine, Result, Scales, Shape, Weights};

/// One rate.
#[derive(Debug, Clone, PartialEq)]
pub struct CudaRate {
    /// What was done.
    pub what: &'static str,
    /// To what.
    pub shape: String,
    /// Seconds for one of them.
    pub seconds: f64,
    /// Bytes of device memory that have to be read and written, each once (or sent, or copied on the host).
    pub bytes: f64,
    /// Multiplications and additions.
    pub operations: f64,
}

impl CudaRate {
    /// Gigabytes (10^9) a second.
    pub fn gb_s(&self) -> f64 {
        self.bytes / self.seconds / 1e9
    }

    /// Gigaflops.
    pub fn gf_s(&self) -> f64 {
        self.operations / self.seconds / 1e9
    }
}

const ROUNDS: usize = 5;

impl CudaEngine {
    /// Measures on matrices of this shape: 4096 x 11008 is a layer of a 7B model. Hands over each rate as it is known.
    pub fn rates(&self, shape: Shape, report: &mut dyn FnMut(CudaRate)) -> Result<()> {
        let engine = self;
        let track = engine.track();
        let n = shape.len()? as f64;
        let mut rate =
            |what, shape: String, count: u32, bytes: f64, operations: f64, write: &dyn Fn(&mut Program)| {
                let seconds = timed(engine, &track, count, write)?;
                report(CudaRate { what, shape, seconds, bytes, operations });
                Result::Ok(())
            };

        let bytes = 4 * shape.len()? as u64;
        let (from, to) = (engine.block(&track, bytes)?, engine.block(&track, bytes)?);
        // Random bits, made on the device.
        let noise = engine.sketch(Shape { rows: shape.rows, cols: shape.cols }, 1, 1)?;
        track.write(|program| {
            program.keep(&noise.block);
            program.copy(noise.block.address, from.address, bytes);
        });
        engine.finish(&track)?;
        rate("device copy", format!("{bytes} B"), 8, 2.0 * bytes as f64, 0.0, &|program| {
            program.keep(&from);
            program.keep(&to);
            program.copy(from.address, to.address, bytes);
        })?;

        let sent = (bytes as usize).min(256 << 20);
        let mut seed = 1u32;
        let mut fill = |out: &mut [u8]| {
            for out in out.chunks_mut(4) {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                out.copy_from_slice(&seed.to_le_bytes()[..out.len()]);
            }
        };
        if let Some(mut pinned) = engine.buffer(sent) {
            fill((*pinned).as_mut());
            let address = (*pinned).as_ref().as_ptr() as u64;
            rate("host to device, pinned", format!("{sent} B"), 8, sent as f64, 0.0, &|program| {
                program.keep(&to);
                program.upload(Source::Address(address), to.address, sent as u64);
            })?;
            rate("device to host, pinned", format!("{sent} B"), 8, sent as f64, 0.0, &|program| {
                program.keep(&to);
                program.download(to.address, address, sent as u64);
            })?;
        }

        for (what, dtype, scaled) in [
            ("delta bf16", Dtype::Bf16, false),
            ("delta f32", Dtype::F32, false),
            ("delta e4m3 with scales", Dtype::F8E4M3, true),
        ] {
            let side = |key: u64| -> Result<Weights> {
                let x = engine.sketch(shape, 2, key)?;
                let stored = match dtype {
                    // Codes of small numbers, none of them NaN.
                    Dtype::F8E4M3 => engine.read(&x)?.iter().map(|x| (x + 40.0) as u8).collect(),
                    dtype => engine.pack(&x, dtype)?,
                };
                let weights = Weights::copied(&stored, dtype, shape)?;
                let cols = shape.cols.div_ceil(128);
                let grid = vec![0.01; shape.rows.div_ceil(128) * cols];
                match scaled {
                    true => {
                        weights.scaled(Scales { grid, grid_cols: cols, block: [128, 128], origin: [0, 0] })
                    }
                    false => Ok(weights),
                }
            };
            let pair = engine.make_pair(side(1)?, side(2)?)?;
            let ld = stride(shape.cols as u32);
            let Some([a, b, d]) = engine.room(&track, &pair, shape.rows as u32)? else { continue };
            let parts = engine.block(&track, pair.parts_bytes())?;
            let at = [a.address, b.address, d.address, parts.address];
            // Both sides are sent once, then only subtracted.
            track.write(|program| CudaEngine::write_delta(program, &pair, (0, shape.rows as u32), at, ld));
            engine.finish(&track)?;
            let moved = n * (2 * dtype.bytes() + 4) as f64;
            rate(what, shape.to_string(), 8, moved, 0.0, &|program| {
                [&a, &b, &d, &parts].into_iter().for_each(|block| program.keep(block));
                CudaEngine::write_subtraction(program, &pair, (0, shape.rows as u32), at, ld);
            })?;
        }

        let random = |shape: Shape, key: u64| engine.sketch(shape, 3, key);
        let rounded = Shape { rows: shape.rows, cols: shape.cols.next_multiple_of(4) };
        let d = random(rounded, 9)?;
        let own: Box<dyn Gemm32> = Box::new(Own);
        let cublas = Cublas::find().map(|cublas| Box::new(cublas) as Box<dyn Gemm32>);
        for l in [18usize, 72, 138] {
            let z = random(Shape { rows: rounded.cols, cols: l }, 4)?;
            let y = random(Shape { rows: shape.rows, cols: l }, 5)?;
            let (forth, back) = ((rounded.rows, rounded.cols), (rounded.cols, rounded.rows));
            for (what, gemm, transposed, (rows, depth), b) in [
                ("D Z", Some(&own), false, forth, &z),
                ("D^T Y", Some(&own), true, back, &y),
                ("D Z by cuBLAS", cublas.as_ref(), false, forth, &z),
                ("D^T Y by cuBLAS", cublas.as_ref(), true, back, &y),
            ] {
                let Some(gemm) = gemm else { continue };
                let splits = gemm.parts(depth as u32);
                let out = engine.fresh(&track, Shape { rows, cols: l })?;
                let parts = engine.block(&track, u64::from(splits) * (rows * l * 4) as u64)?;
                let operations = 2.0 * n * l as f64;
                rate(what, format!("{rounded}, {l} columns"), 4, 4.0 * n, operations, &|program| {
                    let blocks = [&d.block, &b.block, &out.block, &parts];
                    blocks.into_iter().for_each(|block| program.keep(block));
                    let sides = (rows as u32, l as u32, depth as u32);
                    let a = (d.block.address, rounded.cols as u32);
                    gemm.write(program, transposed, sides, a, b.block.address, parts.address);
                    let to = (parts.address, 0, out.block.address);
                    write_reduce(program, to, (rows * l) as u64, splits, (true, true));
                })?;
            }
        }
        let (b, a) = (
            random(Shape { rows: shape.rows, cols: 64 }, 6)?,
            random(Shape { rows: 64, cols: shape.cols }, 7)?,
        );
        let tiles = shape.rows.div_ceil(64) * shape.cols.div_ceil(64);
        let parts = engine.block(&track, (tiles * size_of::<Sums>()) as u64)?;
        for (what, kernel) in
            [("residual in f32", Kernel::ResidualF32), ("residual in f64", Kernel::ResidualF64)]
        {
            rate(what, format!("{shape}, rank 64"), 4, 4.0 * n, 128.0 * n, &|program| {
                keep_all(program, &[&d, &b, &a]);
                program.keep(&parts);
                let slots = [d.block.address, b.block.address, a.block.address, parts.address];
                let words = [shape.rows as u32, shape.cols as u32, 64, rounded.cols as u32, 0, 0];
                program.launch(kernel, (tiles as u32, 1), 1, &slots, &words);
            })?;
        }
        let w = engine.block(&track, 2 * shape.len()? as u64)?;
        track.write(|program| program.copy(from.address, w.address, 2 * n as u64));
        rate("add_low_rank bf16", format!("{shape}, rank 64"), 4, 4.0 * n, 128.0 * n, &|program| {
            keep_all(program, &[&b, &a]);
            program.keep(&w);
            program.keep(&parts);
            let slots = [w.address, b.block.address, a.block.address, parts.address];
            let words = [shape.rows as u32, shape.cols as u32, 64, 0];
            program.launch(Kernel::AddBf16, (tiles as u32, 1), 1, &slots, &words);
        })?;
        Ok(())
    }
}

fn keep_all(program: &mut Program, matrices: &[&CudaMatrix]) {
    matrices.iter().for_each(|matrix| program.keep(&matrix.block));
}

/// Seconds for one of `count` in a row.
fn timed(engine: &CudaEngine, track: &Arc<Track>, count: u32, write: &dyn Fn(&mut Program)) -> Result<f64> {
    let mut seconds = Vec::new();
    for _ in 0..=ROUNDS {
        engine.finish(track)?;
        track.write(|program| (0..count).for_each(|_| write(program)));
        let start = Instant::now();
        engine.finish(track)?;
        seconds.push(start.elapsed().as_secs_f64() / f64::from(count));
    }
    let warm = &mut seconds[1..];
    warm.sort_by(f64::total_cmp);
    Ok(warm[ROUNDS / 2])
}
