//! The driver's calls, each with a `Result`, and a device with its context.
//!
//! [`Device::open`] asks whether the driver library is there, and has every symbol that is called here, before the first
//! call: cudarc resolves symbols when they are first used and panics where one is missing.
//!
//! Not here: who owns memory, streams and events, and for how long.

use std::ffi::{CString, c_void};
use std::fmt;
use std::sync::OnceLock;

use cudarc::driver::{DriverError, result, sys};

use crate::{KernelError, Result};

/// Every symbol of the driver that is called here.
const SYMBOLS: [&str; 33] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDeviceTotalMem_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent",
    "cuMemGetInfo_v2",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemsetD8Async",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuEventDestroy_v2",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuModuleUnload",
    "cuFuncGetAttribute",
    "cuLaunchKernel",
];

/// Why there is no engine on a CUDA device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoCuda {
    /// The driver's library is not on this machine.
    #[error("no CUDA driver: libcuda.so.1 is not found")]
    NoDriver,
    /// The driver is too old.
    #[error("the CUDA driver has no `{symbol}`")]
    OldDriver {
        /// What it lacks.
        symbol: &'static str,
    },
    /// The driver is there, but no device.
    #[error("the CUDA driver sees no device")]
    NoDevice,
    /// There are devices, but not this one.
    #[error("there is no CUDA device {device}: the driver sees {count}")]
    NoSuchDevice {
        /// The one asked for.
        device: usize,
        /// How many there are.
        count: usize,
    },
    /// No kernels for this device.
    #[error("no kernels for `{name}` of compute capability {major}.{minor}: {why}")]
    NoKernels {
        /// The device.
        name: String,
        /// Its compute capability.
        major: i32,
        /// Its compute capability.
        minor: i32,
        /// What was tried.
        why: String,
    },
    /// A call of the driver failed.
    #[error(transparent)]
    Driver(#[from] KernelError),
}

impl NoCuda {
    /// What to do about it.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            NoCuda::NoDriver => {
                "install the NVIDIA driver (in a container: run it with the GPU), or use `--device cpu`"
            }
            NoCuda::OldDriver { .. } => {
                "a driver of the 525 series or newer is needed; `--device cpu` needs none"
            }
            NoCuda::NoDevice => {
                "look at CUDA_VISIBLE_DEVICES and at the devices of the container, or use `--device cpu`"
            }
            NoCuda::NoSuchDevice { .. } => "`safegene doctor` lists the devices",
            NoCuda::NoKernels { .. } => {
                "use a build with kernels in it (scripts/gpu/bundle), or put the folder of libnvrtc.so into LD_LIBRARY_PATH"
            }
            NoCuda::Driver(_) => "`nvidia-smi` says whether the driver works; `--device cpu` needs none",
        })
    }
}

/// A call of the driver as a result.
pub(super) fn check<T>(call: &'static str, result: std::result::Result<T, DriverError>) -> Result<T> {
    result.map_err(|error| {
        // The names come from the driver, which is there: it has just answered.
        let name = error.error_name().ok().map(|name| name.to_string_lossy().into_owned());
        let text = error.error_string().ok().map(|text| text.to_string_lossy().into_owned());
        KernelError::Device {
            call,
            code: error.0 as u32,
            message: format!("{} ({})", name.unwrap_or_default(), text.unwrap_or_default()),
        }
    })
}

/// Whether an error is that memory has run out.
pub(super) fn is_out_of_memory(error: &KernelError) -> bool {
    matches!(error, KernelError::Device { code, .. } if *code == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY as u32)
}

/// Looks for the driver, once.
fn probe() -> std::result::Result<(), NoCuda> {
    static FOUND: OnceLock<std::result::Result<(), NoCuda>> = OnceLock::new();
    FOUND
        .get_or_init(|| {
            // SAFETY: only opens the library, whose initialisers the driver's vendor wrote to run in any process.
            if !unsafe { sys::is_culib_present() } {
                return Err(NoCuda::NoDriver);
            }
            // SAFETY: the library was found one line above, so this does not panic.
            let library = unsafe { sys::culib() };
            for symbol in SYMBOLS {
                let Ok(name) = CString::new(symbol) else { continue };
                // SAFETY: the symbol is looked up and not called; its type is of no matter.
                if unsafe { library.get::<unsafe extern "C" fn()>(name.as_bytes_with_nul()) }.is_err() {
                    return Err(NoCuda::OldDriver { symbol });
                }
            }
            match check("cuInit", result::init()) {
                Ok(()) => Ok(()),
                Err(KernelError::Device { code, .. })
                    if code == sys::CUresult::CUDA_ERROR_NO_DEVICE as u32 =>
                {
                    Err(NoCuda::NoDevice)
                }
                Err(error) => Err(error.into()),
            }
        })
        .clone()
}

/// What there is to know about a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaDevice {
    /// Its number.
    pub ordinal: usize,
    /// As it calls itself.
    pub name: String,
    /// Its compute capability.
    pub capability: (i32, i32),
    /// Its memory.
    pub memory_bytes: u64,
    /// Its multiprocessors.
    pub multiprocessors: i32,
    /// The version of CUDA that the driver speaks: 13000 for 13.0.
    pub driver: i32,
}

impl fmt::Display for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.capability;
        write!(f, "{}, compute capability {major}.{minor}", self.name)
    }
}

impl CudaDevice {
    /// Every device that the driver sees.
    pub fn all() -> std::result::Result<Vec<CudaDevice>, NoCuda> {
        probe()?;
        let count = check("cuDeviceGetCount", result::device::get_count())?;
        (0..count).map(|ordinal| Ok(Self::facts(ordinal)?.1)).collect()
    }

    fn facts(ordinal: i32) -> Result<(sys::CUdevice, CudaDevice)> {
        let handle = check("cuDeviceGet", result::device::get(ordinal))?;
        let attribute = |which| {
            // SAFETY: the handle comes from `cuDeviceGet`, and the attribute is one of the driver's.
            check("cuDeviceGetAttribute", unsafe { result::device::get_attribute(handle, which) })
        };
        use sys::CUdevice_attribute_enum as A;
        let major = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let multiprocessors = attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let mut driver = 0;
        // SAFETY: writes one int to a live local.
        check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut driver) }.result())?;
        // SAFETY: the handle comes from `cuDeviceGet`.
        let memory = check("cuDeviceTotalMem_v2", unsafe { result::device::total_mem(handle) })?;
        let name = check("cuDeviceGetName", result::device::get_name(handle))?;
        let facts = CudaDevice {
            ordinal: ordinal as usize,
            name,
            capability: (major, minor),
            memory_bytes: memory as u64,
            multiprocessors,
            driver,
        };
        Ok((handle, facts))
    }
}

/// A device whose primary context is held.
pub(super) struct Device {
    pub(super) facts: CudaDevice,
    handle: sys::CUdevice,
    context: sys::CUcontext,
}

// SAFETY: the handle is a number, and a context may be made current on any thread; the driver locks what it shares.
unsafe impl Send for Device {}
// SAFETY: as above; no method here changes the struct.
unsafe impl Sync for Device {}

impl Device {
    pub(super) fn open(ordinal: usize) -> std::result::Result<Device, NoCuda> {
        let devices = CudaDevice::all()?;
        let Some(facts) = devices.get(ordinal).cloned() else {
            return Err(match devices.len() {
                0 => NoCuda::NoDevice,
                count => NoCuda::NoSuchDevice { device: ordinal, count },
            });
        };
        let handle = check("cuDeviceGet", result::device::get(ordinal as i32))?;
        // SAFETY: the handle comes from `cuDeviceGet`; what is retained is released in `drop`.
        let context = check("cuDevicePrimaryCtxRetain", unsafe { result::primary_ctx::retain(handle) })?;
        let device = Device { facts, handle, context };
        device.enter()?;
        Ok(device)
    }

    /// Makes the context that of the calling thread, as every call below needs.
    pub(super) fn enter(&self) -> Result<()> {
        // SAFETY: the context is retained until `drop`.
        check("cuCtxSetCurrent", unsafe { result::ctx::set_current(self.context) })
    }

    /// Bytes of device memory that are free, of all.
    pub(super) fn memory(&self) -> Result<(u64, u64)> {
        self.enter()?;
        let (free, total) = check("cuMemGetInfo_v2", result::mem_get_info())?;
        Ok((free as u64, total as u64))
    }

    pub(super) fn load(&self, image: &[u8]) -> Result<Module> {
        self.enter()?;
        // A cubin states its own length; PTX ends with a zero, which the caller has put there.
        // SAFETY: the image is complete, in memory for the length of the call, and zero-terminated where it is text.
        let module =
            check("cuModuleLoadData", unsafe { result::module::load_data(image.as_ptr() as *const c_void) })?;
        Ok(Module(module))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Nothing can be done about an error here.
        // SAFETY: the context was retained in `open` and nothing uses it any more: streams, events, modules and memory
        // hold the device alive.
        let _ = unsafe { result::primary_ctx::release(self.handle) };
    }
}

/// Loaded kernels.
pub(super) struct Module(sys::CUmodule);

impl Module {
    pub(super) fn function(&self, name: &str) -> Result<Function> {
        let name = CString::new(name).unwrap_or_default();
        // SAFETY: the module is loaded; the caller keeps it for as long as the function.
        let function = check("cuModuleGetFunction", unsafe { result::module::get_function(self.0, name) })?;
        Ok(Function(function))
    }

    /// # Safety
    /// No function of it may be used any more.
    pub(super) unsafe fn unload(&self) {
        // SAFETY: as the caller promises.
        let _ = unsafe { result::module::unload(self.0) };
    }
}

/// A kernel of a module.
#[derive(Clone, Copy)]
pub(super) struct Function(sys::CUfunction);

// SAFETY: a handle that the driver lets any thread use.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}
// SAFETY: as for functions.
unsafe impl Send for Module {}
// SAFETY: as for functions.
unsafe impl Sync for Module {}

/// A stream, in which work is done in order.
pub(super) struct Stream(sys::CUstream);

// SAFETY: a handle that the driver lets any thread use.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    pub(super) fn new() -> Result<Stream> {
        let kind = result::stream::StreamKind::NonBlocking;
        Ok(Stream(check("cuStreamCreate", result::stream::create(kind))?))
    }

    /// The driver's own handle, for libraries that stand on it.
    pub(super) fn raw(&self) -> sys::CUstream {
        self.0
    }

    /// Waits for all work.
    pub(super) fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream lives until `drop`.
        check("cuStreamSynchronize", unsafe { result::stream::synchronize(self.0) })
    }

    /// # Safety
    /// `from` must stay as it is, and `to` must be device memory of this length, until the stream has passed this call.
    pub(super) unsafe fn upload(&self, from: &[u8], to: u64) -> Result<()> {
        // SAFETY: as the caller promises.
        check("cuMemcpyHtoDAsync_v2", unsafe { result::memcpy_htod_async(to, from, self.0) })
    }

    /// # Safety
    /// `from` must be device memory of `len` bytes, and nothing else may touch `to..to + len` of the host, until the
    /// stream has passed this call.
    pub(super) unsafe fn download(&self, from: u64, to: u64, len: usize) -> Result<()> {
        // SAFETY: as the caller promises; the address belongs to memory of at least `len` bytes.
        let to = unsafe { std::slice::from_raw_parts_mut(to as *mut u8, len) };
        // SAFETY: as the caller promises.
        check("cuMemcpyDtoHAsync_v2", unsafe { result::memcpy_dtoh_async(to, from, self.0) })
    }

    /// # Safety
    /// Both must be device memory of `len` bytes until the stream has passed this call.
    pub(super) unsafe fn copy(&self, from: u64, to: u64, len: usize) -> Result<()> {
        // SAFETY: as the caller promises.
        check("cuMemcpyDtoDAsync_v2", unsafe { result::memcpy_dtod_async(to, from, len, self.0) })
    }

    /// # Safety
    /// `to` must be device memory of `len` bytes until the stream has passed this call.
    pub(super) unsafe fn fill(&self, to: u64, value: u8, len: usize) -> Result<()> {
        // SAFETY: as the caller promises.
        check("cuMemsetD8Async", unsafe { result::memset_d8_async(to, value, len, self.0) })
    }

    /// # Safety
    /// `args` must be laid out as the kernel's struct of arguments, and every address in it be device memory as large as
    /// the kernel reads and writes for this grid, until the stream has passed this call.
    pub(super) unsafe fn launch(
        &self,
        function: Function,
        grid: (u32, u32, u32),
        threads: u32,
        args: &mut [u64],
    ) -> Result<()> {
        let mut params = [args.as_mut_ptr() as *mut c_void];
        // SAFETY: as the caller promises; the driver copies the struct before the call returns.
        check("cuLaunchKernel", unsafe {
            result::launch_kernel(function.0, grid, (threads, 1, 1), 0, self.0, &mut params)
        })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: destroyed once; the driver lets its work end.
        let _ = unsafe { result::stream::destroy(self.0) };
    }
}

/// A mark in a stream.
pub(super) struct Event(sys::CUevent);

// SAFETY: a handle that the driver lets any thread use.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    pub(super) fn new() -> Result<Event> {
        // Without times, and whoever waits sleeps: the cores have other work.
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32
            | sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32;
        let mut event = std::ptr::null_mut();
        // SAFETY: writes one handle to a live local; the flags are the driver's.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&mut event, flags) }.result())?;
        Ok(Event(event))
    }

    /// Marks what the stream has been given so far.
    pub(super) fn record(&self, stream: &Stream) -> Result<()> {
        // SAFETY: both live.
        check("cuEventRecord", unsafe { result::event::record(self.0, stream.0) })
    }

    /// Waits until the stream has passed the mark; at once if there is none.
    pub(super) fn wait(&self) -> Result<()> {
        // SAFETY: the event lives.
        check("cuEventSynchronize", unsafe { result::event::synchronize(self.0) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: destroyed once.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

/// Device memory; `None` where there is not enough.
pub(super) fn device_alloc(bytes: u64) -> Result<Option<u64>> {
    // SAFETY: what it returns is freed once, by `device_free`.
    none_if_out_of_memory(check("cuMemAlloc_v2", unsafe { result::malloc_sync(bytes as usize) }))
}

/// # Safety
/// `address` must come from [`device_alloc`], and nothing may use it any more.
pub(super) unsafe fn device_free(address: u64) {
    // SAFETY: as the caller promises.
    let _ = unsafe { result::free_sync(address) };
}

/// Pinned memory of the host, readable at full speed (not write-combined); `None` where there is not enough.
pub(super) fn pinned_alloc(bytes: u64) -> Result<Option<u64>> {
    let flags = sys::CU_MEMHOSTALLOC_PORTABLE;
    // SAFETY: what it returns is freed once, by `pinned_free`.
    let found = check("cuMemHostAlloc", unsafe { result::malloc_host(bytes as usize, flags) });
    Ok(none_if_out_of_memory(found)?.map(|pointer| pointer as u64))
}

/// # Safety
/// `address` must come from [`pinned_alloc`], and nothing may use it any more.
pub(super) unsafe fn pinned_free(address: u64) {
    // SAFETY: as the caller promises.
    let _ = unsafe { result::free_host(address as *mut c_void) };
}

fn none_if_out_of_memory<T>(found: Result<T>) -> Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if is_out_of_memory(&error) => Ok(None),
        Err(error) => Err(error),
    }
}
