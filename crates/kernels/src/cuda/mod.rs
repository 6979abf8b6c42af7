//! The engine of a CUDA device.
//!
//! A pair is uploaded once and subtracted into f32 in device memory, where every pass finds it; one that does not fit is cut
//! into panels of rows that are uploaded for each pass. Calls are written down and done when a result is asked for
//! (`program`, `lanes`), so that matrices of one shape that many threads work on share their launches.
//!
//! Results depend on the operands only: grids and the order of sums follow from shapes, never from the device, the size of
//! panels or what else runs. `delta`, `sketch` and `add_low_rank` are bit for bit those of the CPU.
//!
//! Not here: what is computed with it, and where kernels are cached.

mod driver;
mod image;
mod kernel;
mod lanes;
mod memory;
mod program;

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

pub use driver::{CudaDevice, NoCuda};
pub use image::{ImageCache, embedded_images};

use driver::{Device, Module};
use kernel::{
    CHAIN_TILE, DELTA_ROWS, GRAM_TILE, Kernel, NONE, PACKED, PANEL_ROWS, SPLIT, SQUARES, Sums, TILE_ROWS,
};
use lanes::Lanes;
use memory::{Block, Heap, Kind};
use program::{Program, Source, Track};

use crate::engine::{Demand, HostBuffer};
use crate::weights::{Rows, Scales, blame};
use crate::{AddStats, DeltaStats, Dtype, Engine, KernelError, Result, Shape, Side, Weights};

/// Bytes of a segment of device memory.
const DEVICE_SEGMENT: u64 = 256 << 20;
/// Bytes of a segment of pinned memory.
const PINNED_SEGMENT: u64 = 64 << 20;
/// Columns of a difference at most: a few rows of them are counted in 32 bits.
const COLS_MAX: usize = 1 << 27;
/// The share of the roundings of f32 chains that a residual may hold, as on the CPU.
const RESIDUAL_ERROR: f64 = 1e-6;
/// Callers for each core that wait for the device most of the time.
const CALLERS_PER_CORE: usize = 4;

/// How to open an engine.
#[derive(Clone)]
pub struct CudaOptions {
    /// The device's number.
    pub device: usize,
    /// Streams.
    pub lanes: usize,
    /// Pinned memory of the host at most.
    pub pinned_bytes: u64,
    /// Device memory at most, besides what the driver leaves free.
    pub device_bytes: u64,
    /// Keeps kernels that had to be compiled.
    pub cache: Option<Arc<dyn ImageCache>>,
    /// Fill new device memory with NaN, so that what a kernel forgets to write shows.
    pub poison: bool,
}

impl CudaOptions {
    /// Four lanes and up to 4 GiB of pinned memory on a device.
    pub fn new(device: usize) -> CudaOptions {
        CudaOptions {
            device,
            lanes: 4,
            pinned_bytes: 4 << 30,
            device_bytes: u64::MAX,
            cache: None,
            poison: false,
        }
    }
}

/// What an engine has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct CudaMeters {
    /// Programs of threads, and how many times some of them were done together.
    pub programs: u64,
    /// See `programs`.
    pub batches: u64,
    /// Launches of kernels.
    pub launches: u64,
    /// Bytes that went to the device straight from pinned memory.
    pub uploaded_pinned_bytes: u64,
    /// Bytes that were copied into pinned memory first.
    pub uploaded_staged_bytes: u64,
    /// Bytes that came back.
    pub downloaded_bytes: u64,
    /// Seconds that threads waited for the device, summed.
    pub waited_s: f64,
    /// Seconds that threads copied or read into pinned memory of the engine, summed.
    pub staged_s: f64,
    /// Device memory held.
    pub device_bytes: u64,
    /// Pinned memory held.
    pub pinned_bytes: u64,
}

/// What the parts of an engine share, in the order in which they go.
struct Shared {
    id: usize,
    lanes: Lanes,
    memory: Arc<Heap>,
    pinned: Arc<Heap>,
    module: Module,
    device: Arc<Device>,
    kernels: String,
    poison: bool,
    panels: AtomicU64,
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.device.enter().is_ok() {
            // SAFETY: lanes wait for their work before they return, and no lane is at work: this is the last owner.
            unsafe { self.module.unload() };
        }
    }
}

/// The engine of one CUDA device.
#[derive(Clone)]
pub struct CudaEngine {
    shared: Arc<Shared>,
}

/// An f32 matrix in device memory, row-major.
pub struct CudaMatrix {
    block: Arc<Block>,
    shape: Shape,
    track: Arc<Track>,
}

/// A difference of stored weights.
pub struct CudaPair {
    shape: Shape,
    weights: [Weights; 2],
    /// Scales of each side in device memory.
    grids: [Option<Arc<Block>>; 2],
    held: Held,
    /// The sums: where they will be, then themselves.
    sums: Mutex<Known>,
    track: Arc<Track>,
}

enum Held {
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

/// Memory of the host that results come to.
struct Landing {
    block: Option<Block>,
    own: Box<[AtomicU64]>,
    len: usize,
}

impl Landing {
    fn address(&self) -> u64 {
        self.block.as_ref().map_or(self.own.as_ptr() as u64, |block| block.address)
    }

    /// Writes down that it is filled from the device.
    fn fill(self: &Arc<Landing>, program: &mut Program, from: u64) {
        program.keep(self);
        program.download(from, self.address(), self.len as u64);
    }

    /// # Safety
    /// The program that writes here must be done.
    unsafe fn bytes(&self) -> &[u8] {
        // SAFETY: the block, or what is there instead, has at least `len` bytes, which the finished program wrote.
        unsafe { std::slice::from_raw_parts(self.address() as *const u8, self.len) }
    }
}

/// Pinned memory that weights are read into.
struct Pinned {
    block: Block,
    len: usize,
}

impl AsRef<[u8]> for Pinned {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the block has at least `len` bytes, which the system gave out as zeros, and is borrowed as `self` is.
        unsafe { std::slice::from_raw_parts(self.block.address as *const u8, self.len) }
    }
}

impl AsMut<[u8]> for Pinned {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; `&mut self` says that nobody else borrows it.
        unsafe { std::slice::from_raw_parts_mut(self.block.address as *mut u8, self.len) }
    }
}

/// Sides as the kernels take them.
fn side(n: usize, shape: Shape) -> Result<u32> {
    u32::try_from(n).map_err(|_| KernelError::ShapeOverflow { shape })
}

fn code(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F64 => 0,
        Dtype::F32 => 1,
        Dtype::F16 => 2,
        Dtype::Bf16 => 3,
        Dtype::F8E4M3 => 4,
        Dtype::F8E5M2 => 5,
    }
}

/// The two halves of a number.
fn halves(n: u64) -> [u32; 2] {
    [n as u32, (n >> 32) as u32]
}

/// Blocks for `n` things, `each` to a block.
fn blocks(n: u64, each: u64, shape: Shape) -> Result<u32> {
    i32::try_from(n.div_ceil(each)).map(|n| n as u32).map_err(|_| KernelError::ShapeOverflow { shape })
}

impl CudaEngine {
    /// Opens a device and loads the kernels.
    pub fn open(options: &CudaOptions) -> std::result::Result<CudaEngine, NoCuda> {
        static IDS: AtomicUsize = AtomicUsize::new(0);
        let device = Arc::new(Device::open(options.device)?);
        let (module, kernels) = image::load(&device, options.cache.as_ref())?;
        let functions = Kernel::ALL.iter().map(|kernel| module.function(kernel.name()));
        let functions = functions.collect::<Result<Vec<_>>>()?;
        let (free, _) = device.memory()?;
        // The driver, and others on the device, need some.
        let limit = options.device_bytes.min(free - free / 16);
        let memory = Heap::new(Kind::Device, device.clone(), DEVICE_SEGMENT.min(limit / 8), limit);
        let pinned = Heap::new(Kind::Pinned, device.clone(), PINNED_SEGMENT, options.pinned_bytes);
        let lanes = Lanes::new(device.clone(), pinned.clone(), functions, options.lanes)?;
        let shared = Shared {
            id: IDS.fetch_add(1, Ordering::Relaxed),
            lanes,
            memory,
            pinned,
            module,
            device,
            kernels,
            poison: options.poison,
            panels: AtomicU64::new(0),
        };
        Ok(CudaEngine { shared: Arc::new(shared) })
    }

    /// The device.
    pub fn device(&self) -> &CudaDevice {
        &self.shared.device.facts
    }

    /// How the kernels were obtained.
    pub fn kernels(&self) -> &str {
        &self.shared.kernels
    }

    /// Pairs that did not fit in device memory as a whole.
    pub fn pairs_in_panels(&self) -> u64 {
        self.shared.panels.load(Ordering::Relaxed)
    }

    /// What was done so far.
    pub fn meters(&self) -> CudaMeters {
        let m = &self.shared.lanes.meters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CudaMeters {
            programs: get(&m.programs),
            batches: get(&m.batches),
            launches: get(&m.launches),
            uploaded_pinned_bytes: get(&m.uploaded_pinned),
            uploaded_staged_bytes: get(&m.uploaded_staged),
            downloaded_bytes: get(&m.downloaded),
            waited_s: get(&m.waited_ns) as f64 / 1e9,
            staged_s: get(&m.staged_ns) as f64 / 1e9,
            device_bytes: self.shared.memory.bytes(),
            pinned_bytes: self.shared.pinned.bytes(),
        }
    }

    /// Copies inside the device, `rounds` times `bytes`, and waits: what the device's memory does at best.
    pub fn copy_inside(&self, bytes: u64, rounds: u32) -> Result<()> {
        let track = self.track();
        let (from, to) = (self.block(&track, bytes)?, self.block(&track, bytes)?);
        track.write(|program| {
            (program.keep(&from), program.keep(&to));
            (0..rounds).for_each(|_| program.copy(from.address, to.address, bytes));
        });
        self.finish(&track)
    }

    /// Sends `bytes` to the device, `rounds` times, and waits: what the link does at best, if they are pinned.
    pub fn send(&self, bytes: &[u8], rounds: u32) -> Result<()> {
        let track = self.track();
        let to = self.block(&track, bytes.len() as u64)?;
        track.write(|program| {
            program.keep(&to);
            for _ in 0..rounds {
                program.upload(Source::Address(bytes.as_ptr() as u64), to.address, bytes.len() as u64);
            }
        });
        self.finish(&track)
    }

    /// The program that this thread writes.
    fn track(&self) -> Arc<Track> {
        thread_local! {
            static TRACKS: RefCell<Vec<(usize, Arc<Track>)>> = const { RefCell::new(Vec::new()) };
        }
        TRACKS.with(|tracks| {
            let mut tracks = tracks.borrow_mut();
            if let Some((_, track)) = tracks.iter().find(|(id, _)| *id == self.shared.id) {
                return track.clone();
            }
            // Those of engines that are gone are held by nobody else.
            tracks.retain(|(_, track)| Arc::strong_count(track) > 1);
            let track = Arc::<Track>::default();
            tracks.push((self.shared.id, track.clone()));
            track
        })
    }

    /// This thread's program, after everything that others still have to do to its operands.
    fn track_after(&self, operands: &[&Arc<Track>]) -> Result<Arc<Track>> {
        let own = self.track();
        for other in operands.iter().filter(|other| !Arc::ptr_eq(other, &own)) {
            self.finish(other)?;
        }
        Ok(own)
    }

    fn finish(&self, track: &Track) -> Result<()> {
        track.finish(|program| self.shared.lanes.run(program))
    }

    /// Device memory that lives until the program of `track` is done, and for as long as it is owned.
    fn block(&self, track: &Track, bytes: u64) -> Result<Arc<Block>> {
        match self.try_block(track, bytes)? {
            Some(block) => Ok(block),
            None => Err(self.out_of_memory(bytes)),
        }
    }

    fn try_block(&self, track: &Track, bytes: u64) -> Result<Option<Arc<Block>>> {
        let mut found = self.shared.memory.take(bytes)?;
        if found.is_none() {
            // What was dropped but is still written about becomes free when that is done.
            self.finish(track)?;
            found = self.shared.memory.take(bytes)?;
        }
        Ok(found.map(|block| {
            let block = Arc::new(block);
            track.write(|program| {
                program.keep(&block);
                if self.shared.poison {
                    program.fill(block.address, 0xff, bytes);
                }
            });
            block
        }))
    }

    fn out_of_memory(&self, bytes: u64) -> KernelError {
        let free = self.shared.device.memory().map_or(0, |(free, _)| free);
        KernelError::DeviceMemory { need_bytes: bytes, free_bytes: free }
    }

    /// A matrix with anything in it.
    fn fresh(&self, track: &Arc<Track>, shape: Shape) -> Result<CudaMatrix> {
        let bytes = shape.bytes(Dtype::F32)? as u64;
        (side(shape.rows, shape)?, side(shape.cols, shape)?);
        Ok(CudaMatrix { block: self.block(track, bytes)?, shape, track: track.clone() })
    }

    /// Memory of the host for `len` bytes of results.
    fn landing(&self, len: usize) -> Result<Arc<Landing>> {
        let block = self.shared.pinned.take(len as u64)?;
        let words = if block.is_some() { 0 } else { len.div_ceil(8) };
        let own = (0..words).map(|_| AtomicU64::new(0)).collect();
        Ok(Arc::new(Landing { block, own, len }))
    }

    /// Has the program of `track` done, with `bytes` from the device at its end.
    fn fetch(&self, track: &Track, from: u64, len: usize) -> Result<Vec<u8>> {
        let landing = self.landing(len)?;
        track.write(|program| landing.fill(program, from));
        self.finish(track)?;
        // SAFETY: the program is done.
        Ok(unsafe { landing.bytes() }.to_vec())
    }

    /// Bytes of the host in device memory; they are copied before this returns.
    fn put(&self, track: &Track, bytes: &[u8]) -> Result<Arc<Block>> {
        let block = self.block(track, bytes.len() as u64)?;
        let staged: Arc<dyn AsRef<[u8]> + Send + Sync> = match self.pinned(bytes.len())? {
            Some(mut pinned) => {
                pinned.as_mut().copy_from_slice(bytes);
                Arc::new(pinned)
            }
            None => Arc::new(bytes.to_vec()),
        };
        track.write(|program| {
            program.upload(Source::Bytes { bytes: staged, start: 0 }, block.address, bytes.len() as u64)
        });
        Ok(block)
    }

    fn pinned(&self, len: usize) -> Result<Option<Pinned>> {
        let Some(block) = self.shared.pinned.take(len as u64)? else { return Ok(None) };
        Ok(Some(Pinned { block, len }))
    }

    /// One record for many.
    fn reduce(&self, track: &Track, parts: &Block, count: u32) -> Result<Arc<Block>> {
        let out = self.block(track, size_of::<Sums>() as u64)?;
        track.write(|program| write_reduce_sums(program, parts, count, &out));
        Ok(out)
    }

    fn fetch_sums(&self, track: &Track, sums: &Block) -> Result<Sums> {
        let bytes = self.fetch(track, sums.address, size_of::<Sums>())?;
        Ok(bytemuck::pod_read_unaligned(&bytes))
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
    fn write_delta(
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
    fn pass(
        &self,
        track: &Track,
        pair: &CudaPair,
        parts: Option<&Block>,
        f: &mut dyn FnMut(&mut Program, u32, u32, u64, u32),
    ) -> Result<()> {
        let rows = pair.shape.rows as u32;
        let height = match &pair.held {
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
        let [a, b, d] =
            self.room(track, pair, height)?.ok_or_else(|| self.out_of_memory(pair.bytes(height)))?;
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
    fn room(&self, track: &Track, pair: &CudaPair, rows: u32) -> Result<Option<[Arc<Block>; 3]>> {
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
    fn known(&self, pair: &CudaPair) -> Result<DeltaStats> {
        if pair.shape.is_empty() {
            return Ok(DeltaStats::default());
        }
        let mut known = pair.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let sums: Sums = match &*known {
            Known::Here(stats) => return stats.clone(),
            Known::Coming(landing) => {
                self.finish(&pair.track)?;
                // SAFETY: the program that the landing was written in is done.
                bytemuck::pod_read_unaligned(unsafe { landing.bytes() })
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

    /// Writes `A B` or `A^T B` into `out`: `a` is the address of [rows, depth], or [depth, rows], of stride `lda`.
    fn write_product(
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
        let splits = splits(depth)?;
        let parts = if splits > 1 { Some(self.block(track, u64::from(splits) * len * 4)?) } else { None };
        let into = parts.as_ref().map_or(out, |parts| parts.address);
        track.write(|program| {
            write_gemm(program, transposed, (rows, cols, depth), (a, lda), b, into);
            if parts.is_some() {
                write_reduce(program, (into, 0, out), len, splits, (true, true));
            }
        });
        Ok(())
    }

    /// `D^T Q` after the passes before, and `D Z` on the way if it is asked for.
    fn products(
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
        if l == 0 || cols == 0 {
            return Ok((y, w));
        }
        if rows == 0 {
            track.write(|program| program.fill(w.block.address, 0, (cols * l * 4) as u64));
            return Ok((y, w));
        }
        let (columns, l) = (cols as u32, l as u32);
        let most = match &pair.held {
            Held::Whole(..) => rows as u32,
            Held::Panels(height) => *height,
        };
        let once = most as usize >= rows;
        let (across, down) = (splits(columns)?, splits(most)?);
        let (y_len, w_len) = (most as u64 * u64::from(l), cols as u64 * u64::from(l));
        let y_parts = match z {
            Some(_) if across > 1 => Some(self.block(track, u64::from(across) * y_len * 4)?),
            _ => None,
        };
        let direct = once && down == 1;
        let w_parts = if direct { None } else { Some(self.block(track, u64::from(down) * w_len * 4)?) };
        let sum = if once { None } else { Some(self.block(track, w_len * 8)?) };
        let sum = sum.map_or(0, |sum| sum.address);
        self.pass(track, pair, None, &mut |program, first, count, d, ld| {
            let rows_at = y.block.address + u64::from(first) * u64::from(l) * 4;
            if let Some(z) = z {
                let into = y_parts.as_ref().map_or(rows_at, |parts| parts.address);
                write_gemm(program, false, (count, l, columns), (d, ld), z.block.address, into);
                if y_parts.is_some() {
                    let len = u64::from(count) * u64::from(l);
                    write_reduce(program, (into, 0, rows_at), len, across, (true, true));
                }
            }
            let into = w_parts.as_ref().map_or(w.block.address, |parts| parts.address);
            write_gemm(program, true, (columns, l, count), (d, ld), rows_at, into);
            if w_parts.is_some() {
                let last = first + count == rows as u32;
                let at = (into, sum, w.block.address);
                write_reduce(program, at, w_len, count.div_ceil(SPLIT), (first == 0, last));
            }
        })?;
        Ok((y, w))
    }

    /// The sum of the squares of a matrix, as parts, reduced.
    fn squares(&self, track: &Track, x: &CudaMatrix) -> Result<Arc<Block>> {
        let parts = self.block(track, u64::from(SQUARES) * size_of::<Sums>() as u64)?;
        let len = halves(x.shape.len()? as u64);
        track.write(|program| {
            program.keep(&x.block);
            let slots = [x.block.address, parts.address];
            program.launch(Kernel::Squares, (SQUARES, 1), 1, &slots, &len);
        });
        self.reduce(track, &parts, SQUARES)
    }

    fn residual_in(
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
        track.write(|program| (program.keep(&b.block), program.keep(&a.block)));
        self.pass(track, pair, None, &mut |program, first, rows, d, ld| {
            let b_rows = b.block.address + u64::from(first) * u64::from(rank) * 4;
            let slots = [d, b_rows, a.block.address, parts.address];
            let grid = (rows.div_ceil(CHAIN_TILE) * across, 1);
            program.launch(kernel, grid, 1, &slots, &[rows, cols as u32, rank, ld, first, 0]);
        })?;
        self.reduce(track, &parts, count)
    }
}

impl std::fmt::Debug for CudaEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CudaEngine({})", self.name())
    }
}

impl std::fmt::Debug for CudaMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CudaMatrix({})", self.shape)
    }
}

impl std::fmt::Debug for CudaPair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CudaPair({})", self.shape)
    }
}

impl CudaPair {
    /// Records that the subtraction of all rows writes.
    fn parts(&self) -> u32 {
        (self.shape.rows as u32).div_ceil(DELTA_ROWS)
    }

    fn parts_bytes(&self) -> u64 {
        u64::from(self.parts()) * size_of::<Sums>() as u64
    }

    /// Bytes that so many rows take in device memory.
    fn bytes(&self, rows: u32) -> u64 {
        let stored: usize = self.weights.iter().map(|weights| weights.dtype.bytes()).sum();
        u64::from(rows) * (self.shape.cols * stored + stride(self.shape.cols as u32) as usize * 4) as u64
    }
}

/// Parts that a sum over `depth` is cut into: no more than a dimension of a grid has blocks.
fn splits(depth: u32) -> Result<u32> {
    let splits = depth.div_ceil(SPLIT);
    let shape = Shape { rows: depth as usize, cols: 1 };
    if splits <= lanes::GRID_Z_MAX { Ok(splits) } else { Err(KernelError::ShapeOverflow { shape }) }
}

/// Tiles of a chain, as many as a launch can have.
fn tiles(down: u32, across: u32, shape: Shape) -> Result<u32> {
    blocks(u64::from(down) * u64::from(across), 1, shape)
}

/// Elements between rows of a difference: whole vectors of four.
fn stride(cols: u32) -> u32 {
    cols.next_multiple_of(4)
}

/// The kernel that subtracts two sides fastest.
fn delta_kernel(a: &Weights, b: &Weights, cols: usize, ld: u32) -> Kernel {
    let plain = a.scales.is_none() && b.scales.is_none();
    let of_16 = |scales: &Option<Arc<Scales>>| {
        scales.as_ref().is_some_and(|s| s.block[1].is_multiple_of(16) && s.origin[1].is_multiple_of(16))
    };
    match (a.dtype, b.dtype) {
        _ if ld as usize != cols => Kernel::DeltaAny,
        (Dtype::Bf16, Dtype::Bf16) if plain && cols.is_multiple_of(8) => Kernel::DeltaBf16,
        (Dtype::F16, Dtype::F16) if plain && cols.is_multiple_of(8) => Kernel::DeltaF16,
        (Dtype::F32, Dtype::F32) if plain => Kernel::DeltaF32,
        (Dtype::F8E4M3, Dtype::F8E4M3) if cols.is_multiple_of(16) && of_16(&a.scales) && of_16(&b.scales) => {
            Kernel::DeltaE4m3
        }
        _ => Kernel::DeltaAny,
    }
}

/// A product in parts of the depth, one after the other.
fn write_gemm(
    program: &mut Program,
    transposed: bool,
    (rows, cols, depth): (u32, u32, u32),
    (a, lda): (u64, u32),
    b: u64,
    parts: u64,
) {
    let (kernel, tile) = Kernel::gemm(transposed, cols);
    let splits = depth.div_ceil(SPLIT);
    let grid = (rows.div_ceil(TILE_ROWS), cols.div_ceil(tile));
    program.launch(kernel, grid, splits, &[a, b, parts], &[rows, cols, depth, lda, splits, 0]);
}

/// One record for many.
fn write_reduce_sums(program: &mut Program, parts: &Block, count: u32, out: &Block) {
    program.launch(Kernel::ReduceSums, (1, 1), 1, &[parts.address, out.address], &[count, 0]);
}

/// The sum of parts, between `first` and `last`.
fn write_reduce(
    program: &mut Program,
    (parts, sum, out): (u64, u64, u64),
    len: u64,
    count: u32,
    (first, last): (bool, bool),
) {
    let [low, high] = halves(len);
    let words = [low, high, count, first.into(), last.into(), 0];
    let grid = (len.div_ceil(256) as u32, 1);
    program.launch(Kernel::ReduceParts, grid, 1, &[parts, sum, out], &words);
}

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
            readers: (cores / 2).clamp(2, 8),
            // What is under way lies in device memory as it is stored and as f32, with blocks beside it.
            bytes: Some((free + self.shared.memory.bytes()) / 4),
        }
    }

    fn buffer(&self, len: usize) -> Option<HostBuffer> {
        Some(Box::new(self.pinned(len).ok()??))
    }

    fn pair(&self, aligned: Weights, degraded: Weights) -> Result<CudaPair> {
        if aligned.shape != degraded.shape {
            let (left, right) = (aligned.shape, degraded.shape);
            return Err(KernelError::ShapeMismatch { what: "pair", left, right });
        }
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
            if self.room(&track, &pair, height)?.is_some() {
                // The products need memory, too.
                pair.held = Held::Panels((height / 2).next_multiple_of(PANEL_ROWS));
                self.shared.panels.fetch_add(1, Ordering::Relaxed);
                self.finish(&track)?;
                return Ok(pair);
            }
            if height <= PANEL_ROWS {
                return Err(self.out_of_memory(pair.bytes(PANEL_ROWS)));
            }
        }
    }

    fn pair_shape(&self, pair: &CudaPair) -> Shape {
        pair.shape
    }

    fn matrix(&self, data: &[f32], shape: Shape) -> Result<CudaMatrix> {
        let need = shape.len()?;
        if data.len() != need {
            return Err(KernelError::Length { what: "elements of a matrix", shape, need, found: data.len() });
        }
        (side(shape.rows, shape)?, side(shape.cols, shape)?);
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
        track.write(|program| (program.keep(&a.block), program.keep(&b.block)));
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
        let splits = splits(rows)?;
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
        check_factors("residual", pair.shape, b, a)?;
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
        // SAFETY: the program is done.
        let squares = |landing: &Landing| unsafe { bytemuck::pod_read_unaligned::<Sums>(landing.bytes()).x };
        // As on the CPU: the squares of the roundings of f32 chains add to the result, and nothing else does.
        let largest = squares(&b_landing) * squares(&a_landing) + found;
        let error = b.shape.cols as f64 * (f64::from(f32::EPSILON) / 2.0).powi(2) * largest;
        if error <= RESIDUAL_ERROR * found {
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
            check_factors("add_low_rank", shape, b, a)?;
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
                (program.keep(&b.block), program.keep(&a.block));
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
        // SAFETY: the program is done.
        let sums: Sums = bytemuck::pod_read_unaligned(unsafe { landing.bytes() });
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
            // SAFETY: the program is done.
            NONE => Ok(unsafe { landing.bytes() }.to_vec()),
            index => Err(KernelError::Overflow { what: "pack", index }),
        }
    }
}

fn check_factors(what: &'static str, shape: Shape, b: &CudaMatrix, a: &CudaMatrix) -> Result<()> {
    if b.shape.cols != a.shape.rows {
        return Err(KernelError::ShapeMismatch { what, left: b.shape, right: a.shape });
    }
    let product = Shape { rows: b.shape.rows, cols: a.shape.cols };
    if product == shape {
        Ok(())
    } else {
        Err(KernelError::ShapeMismatch { what, left: shape, right: product })
    }
}

/// A matrix of its own stride into another, times a factor.
fn write_place(
    program: &mut Program,
    from: u64,
    (shape, ld): (Shape, usize),
    (to, ld_out): (u64, usize),
    factor: f32,
) {
    let len = shape.rows as u64 * shape.cols as u64;
    let [low, high] = halves(len);
    let words = [low, high, shape.cols as u32, ld as u32, ld_out as u32, factor.to_bits()];
    program.launch(Kernel::Place, (len.div_ceil(256) as u32, 1), 1, &[from, to], &words);
}
