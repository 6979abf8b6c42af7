//! What this machine can do at best: reading files, copying memory, multiplying matrices.
//!
//! Each is the median of three, on all threads of the rayon pool it is called from, with buffers far larger than caches
//! and numbers that are not zero.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use kernels::{CpuEngine, Engine, Shape};
use rayon::prelude::*;
use serde::Serialize;

use crate::BenchError;

/// Bytes of one read.
const BLOCK_BYTES: u64 = 16 << 20;
/// Bytes of an engine's memory that a thread reads into.
const LENT_BYTES: usize = 128 << 20;
/// Bytes that each thread copies.
const COPY_BYTES: usize = 256 << 20;

/// Limits of a machine. Gigabytes are 10^9 bytes.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Ceilings {
    /// Bytes read from the files at hand into memory, wherever the system has them: cache or disk.
    pub read_gb_s: f64,
    /// Bytes copied from memory to memory (each is read once and written once).
    pub copy_gb_s: f64,
    /// f32 multiplications and additions in a product of 2048 x 2048 by 2048 x 512.
    pub gemm_gf_s: f64,
}

impl Ceilings {
    /// Measures; the read rate is that of these files, in 16 MB blocks, from the disk if `cold`.
    pub fn measure(files: &[PathBuf], cold: bool) -> Result<Ceilings, BenchError> {
        let read = median(|| {
            if cold {
                forget(files)?;
            }
            read(files)
        })?;
        let copy = median(|| Ok(copy()))?;
        let gemm = median(gemm)?;
        Ok(Ceilings { read_gb_s: read / 1e9, copy_gb_s: copy / 1e9, gemm_gf_s: gemm / 1e9 })
    }
}

/// Takes files out of the page cache.
pub fn forget(files: &[PathBuf]) -> Result<(), BenchError> {
    let io = |path: &PathBuf| {
        let path = path.clone();
        move |source| BenchError::Io { path, source }
    };
    files.iter().try_for_each(|path| checkpoint::forget(path).map_err(io(path)))
}

/// Has the system write everything that it still holds back, so that it does not do so later, beside what is measured.
pub fn flush_all() {
    rustix::fs::sync();
}

/// The share of files that is in the page cache, about.
pub fn cached_share(files: &[PathBuf]) -> f64 {
    let shares = files.iter().map(|path| checkpoint::cached_share_of(path).unwrap_or(1.0));
    shares.sum::<f64>() / files.len().max(1) as f64
}

fn median(rate: impl Fn() -> Result<f64, BenchError>) -> Result<f64, BenchError> {
    let mut rates = [rate()?, rate()?, rate()?];
    rates.sort_by(f64::total_cmp);
    Ok(rates[1])
}

/// Files cut into what is read at once: path, start and length.
fn blocks_of(files: &[PathBuf]) -> Result<Vec<(&PathBuf, u64, u64)>, BenchError> {
    let mut blocks = Vec::new();
    for path in files {
        let io = |source| BenchError::Io { path: path.clone(), source };
        let bytes = std::fs::metadata(path).map_err(io)?.len();
        let starts = (0..bytes).step_by(BLOCK_BYTES as usize);
        blocks.extend(starts.map(|start| (path, start, BLOCK_BYTES.min(bytes - start))));
    }
    Ok(blocks)
}

/// Bytes a second.
fn read(files: &[PathBuf]) -> Result<f64, BenchError> {
    let blocks = blocks_of(files)?;
    let total: u64 = blocks.iter().map(|(.., bytes)| bytes).sum();
    let start = Instant::now();
    blocks.par_iter().try_for_each_init(Vec::new, |buffer, (path, start, bytes)| {
        let io = |source| BenchError::Io { path: (*path).clone(), source };
        buffer.resize(BLOCK_BYTES as usize, 0u8);
        let file = File::open(path).map_err(io)?;
        file.read_exact_at(&mut buffer[..*bytes as usize], *start).map_err(io)
    })?;
    Ok(total as f64 / start.elapsed().as_secs_f64().max(1e-9))
}

/// Gigabytes a second that `readers` threads read from files into memory of an engine, such as a device takes weights from;
/// the median of three. `None` where the engine has no such memory.
pub fn read_for<E: Engine>(engine: &E, files: &[PathBuf], readers: usize) -> Result<Option<f64>, BenchError> {
    let buffers: Vec<_> =
        (0..readers.max(1)).filter_map(|_| engine.buffer(LENT_BYTES)).map(Mutex::new).collect();
    if buffers.is_empty() {
        return Ok(None);
    }
    let blocks = blocks_of(files)?;
    let total: u64 = blocks.iter().map(|(.., bytes)| bytes).sum();
    let rate = median(|| {
        let next = AtomicUsize::new(0);
        let start = Instant::now();
        std::thread::scope(|threads| {
            let work = buffers.iter().map(|buffer| {
                let (next, blocks) = (&next, &blocks);
                threads.spawn(move || -> Result<(), BenchError> {
                    let mut buffer = buffer.lock().unwrap_or_else(PoisonError::into_inner);
                    // Each block into another part, so that no cache holds what is written.
                    let parts = LENT_BYTES as u64 / BLOCK_BYTES;
                    loop {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        let Some((path, start, bytes)) = blocks.get(at) else { return Ok(()) };
                        let io = |source| BenchError::Io { path: (*path).clone(), source };
                        let into = (at as u64 % parts * BLOCK_BYTES) as usize;
                        let part = &mut (**buffer).as_mut()[into..into + *bytes as usize];
                        File::open(path).and_then(|file| file.read_exact_at(part, *start)).map_err(io)?;
                    }
                })
            });
            let work: Vec<_> = work.collect();
            work.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
        })?;
        Ok(total as f64 / start.elapsed().as_secs_f64().max(1e-9))
    })?;
    Ok(Some(rate / 1e9))
}

/// Bytes a second.
fn copy() -> f64 {
    let threads = rayon::current_num_threads();
    let mut pairs: Vec<(Vec<u8>, Vec<u8>)> =
        (0..threads).map(|i| (vec![i as u8 | 1; COPY_BYTES], vec![2; COPY_BYTES])).collect();
    let start = Instant::now();
    pairs.par_iter_mut().for_each(|(from, to)| to.copy_from_slice(from));
    let seconds = start.elapsed().as_secs_f64();
    std::hint::black_box(&pairs);
    (threads * COPY_BYTES) as f64 / seconds
}

/// Operations a second.
fn gemm() -> Result<f64, BenchError> {
    let (engine, n, cols) = (CpuEngine::new(), 2048, 512);
    let a = engine.sketch(Shape { rows: n, cols: n }, 1, 1)?;
    let b = engine.sketch(Shape { rows: n, cols }, 1, 2)?;
    engine.gemm(&a, false, &b)?;
    let start = Instant::now();
    std::hint::black_box(engine.gemm(&a, false, &b)?);
    Ok(2.0 * (n * n * cols) as f64 / start.elapsed().as_secs_f64())
}
