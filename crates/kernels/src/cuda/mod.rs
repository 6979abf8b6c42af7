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
mod gemm;
mod host;
mod image;
mod kernel;
mod lanes;
mod memory;
mod ops;
mod pair;
mod products;
mod program;
mod rates;
mod steps;

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

pub use driver::{CudaDevice, NoCuda};
pub use image::{ImageCache, embedded_images};
pub use pair::CudaPair;
pub use rates::CudaRate;

use driver::{Device, Module};
use gemm::{Cublas, Gemm32, Own};
use host::{Landing, Pinned};
use kernel::{Kernel, Sums};
use lanes::Lanes;
use memory::{Block, Heap, Kind};
use program::{Source, Track};
use steps::{side, write_reduce_sums};

use crate::{Dtype, Engine, KernelError, Result, Shape};

/// Bytes of a segment of device memory.
const DEVICE_SEGMENT: u64 = 256 << 20;
/// Bytes of a segment of pinned memory.
const PINNED_SEGMENT: u64 = 64 << 20;

/// How long to wait for memory that others use.
const PATIENCE: Duration = Duration::from_secs(2);

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
    /// Multiply by cuBLAS, if its library is there. Results are not the same bits then on every device and version.
    pub cublas: bool,
    /// Fill new device memory with NaN, so that what a kernel forgets to write shows.
    pub poison: bool,
}

impl CudaOptions {
    /// Eight lanes and up to 4 GiB of pinned memory on a device.
    pub fn new(device: usize) -> CudaOptions {
        CudaOptions {
            device,
            lanes: 8,
            pinned_bytes: 4 << 30,
            device_bytes: u64::MAX,
            cache: None,
            cublas: false,
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
    gemm: Box<dyn Gemm32>,
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
        let cublas = if options.cublas { Cublas::find() } else { None };
        let gemm: Box<dyn Gemm32> = match cublas {
            Some(cublas) => Box::new(cublas),
            None => Box::new(Own),
        };
        let shared = Shared {
            id: IDS.fetch_add(1, Ordering::Relaxed),
            lanes,
            memory,
            pinned,
            module,
            device,
            kernels,
            gemm,
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
            other.finish_for_another(|program| self.shared.lanes.run(program))?;
        }
        Ok(own)
    }

    fn finish(&self, track: &Track) -> Result<()> {
        track.finish(|program| self.shared.lanes.run(program))
    }

    /// Device memory that lives until the program of `track` is done, and for as long as it is owned.
    fn block(&self, track: &Track, bytes: u64) -> Result<Arc<Block>> {
        self.patient(bytes, || self.try_block(track, bytes))
    }

    /// What `get` gets, as soon as there is memory for it: others give back what they have when their programs are done.
    fn patient<T>(&self, bytes: u64, mut get: impl FnMut() -> Result<Option<T>>) -> Result<T> {
        let start = Instant::now();
        loop {
            if let Some(found) = get()? {
                return Ok(found);
            }
            if start.elapsed() > PATIENCE || !self.shared.memory.wait(PATIENCE / 10) {
                return Err(self.out_of_memory(bytes));
            }
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
        side(shape.rows, shape)?;
        side(shape.cols, shape)?;
        Ok(CudaMatrix { block: self.block(track, bytes)?, shape, track: track.clone() })
    }

    /// Memory of the host for `len` bytes of results.
    fn landing(&self, len: usize) -> Result<Arc<Landing>> {
        let block = self.shared.pinned.take(len as u64)?;
        let words = if block.is_some() { 0 } else { len.div_ceil(8) };
        let own = (0..words).map(|_| AtomicU64::new(0)).collect();
        Ok(Arc::new(Landing { block, own, len, done: Arc::default() }))
    }

    /// Has the program of `track` done, with `bytes` from the device at its end.
    fn fetch(&self, track: &Track, from: u64, len: usize) -> Result<Vec<u8>> {
        let landing = self.landing(len)?;
        track.write(|program| landing.fill(program, from));
        self.finish(track)?;
        Ok(landing.bytes()?.to_vec())
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
