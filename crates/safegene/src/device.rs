//! Which engine does the work: `--device auto|cpu|cuda|cuda:N`.
//!
//! `auto` takes the first CUDA device if there is one, and never fails for lack of it. Kernels that had to be compiled are
//! kept in `$XDG_CACHE_HOME/safegene/kernels`, else `~/.cache/safegene/kernels`, by a hash of their source and compiler.

use crate::fail::{Code, Failure};
use crate::ui::Ui;
use kernels::{CpuEngine, CudaEngine, CudaOptions, Demand, Engine, ImageCache, NoCuda};
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    Auto,
    Cpu,
    Cuda(usize),
}

/// `auto`, `cpu`, `cuda` or `cuda:1`.
pub(crate) fn wanted(text: &str) -> Result<Wanted, String> {
    let number = text.strip_prefix("cuda:").and_then(|number| number.parse().ok());
    match (text, number) {
        ("auto", _) => Ok(Wanted::Auto),
        ("cpu", _) => Ok(Wanted::Cpu),
        ("cuda", _) => Ok(Wanted::Cuda(0)),
        (_, Some(number)) => Ok(Wanted::Cuda(number)),
        _ => Err("write auto, cpu, cuda or cuda:N".into()),
    }
}

/// An engine.
pub(crate) enum Device {
    Cpu(CpuEngine),
    Cuda(CudaEngine),
}

/// Runs something on whichever engine it is.
macro_rules! on_device {
    ($device:expr, |$engine:ident| $body:expr) => {
        match $device {
            $crate::device::Device::Cpu($engine) => $body,
            $crate::device::Device::Cuda($engine) => $body,
        }
    };
}
pub(crate) use on_device;

impl Device {
    pub(crate) fn open(wanted: Wanted, memory_bytes: u64, ui: &Ui) -> Result<Device, Failure> {
        let ordinal = match wanted {
            Wanted::Cpu => return Ok(Device::Cpu(CpuEngine::new())),
            Wanted::Auto => 0,
            Wanted::Cuda(ordinal) => ordinal,
        };
        match CudaEngine::open(&options(ordinal, memory_bytes)) {
            Ok(engine) => {
                ui.say(&format!("on {}", engine.name()));
                Ok(Device::Cuda(engine))
            }
            Err(NoCuda::NoDriver | NoCuda::NoDevice) if wanted == Wanted::Auto => {
                Ok(Device::Cpu(CpuEngine::new()))
            }
            Err(error) if wanted == Wanted::Auto => {
                ui.warn(&format!("{error}; the CPU is used"));
                Ok(Device::Cpu(CpuEngine::new()))
            }
            Err(error) => Err(error.into()),
        }
    }

    pub(crate) fn name(&self) -> String {
        on_device!(self, |engine| engine.name())
    }

    /// Threads that are best at work: the callers that an engine wants, where nothing else was asked for.
    pub(crate) fn threads(&self, asked: usize, cores: usize) -> usize {
        match (asked, self) {
            (0, Device::Cpu(_)) => cores,
            (0, Device::Cuda(engine)) => {
                let Demand { callers, .. } = engine.demand();
                callers.max(cores)
            }
            (asked, _) => asked,
        }
    }
}

/// How an engine of a device is opened.
pub(crate) fn options(device: usize, memory_bytes: u64) -> CudaOptions {
    let cache: Option<Arc<dyn ImageCache>> = cache_folder().map(|dir| Arc::new(Cache(dir)) as _);
    CudaOptions { pinned_bytes: memory_bytes, cache, ..CudaOptions::new(device) }
}

impl From<NoCuda> for Failure {
    fn from(error: NoCuda) -> Failure {
        let code = if matches!(error, NoCuda::Driver(_)) { Code::Temporary } else { Code::Usage };
        let hint = error.hint().map(str::to_owned);
        Failure { code, message: error.to_string(), causes: Vec::new(), hint }
    }
}

fn cache_folder() -> Option<PathBuf> {
    let folder = |value: Option<OsString>| value.map(PathBuf::from).filter(|path| path.is_absolute());
    let base = folder(std::env::var_os("XDG_CACHE_HOME"))
        .or_else(|| folder(std::env::var_os("HOME")).map(|home| home.join(".cache")))?;
    Some(base.join("safegene").join("kernels"))
}

/// Kernels in files.
struct Cache(PathBuf);

impl ImageCache for Cache {
    fn get(&self, key: &str) -> Option<Vec<u8>> {
        std::fs::read(self.0.join(format!("{key}.cubin"))).ok()
    }

    fn put(&self, key: &str, image: &[u8]) {
        // Whole or not at all; a cache that cannot be written to only costs time.
        let own = self.0.join(format!("{key}.{}", std::process::id()));
        let written = std::fs::create_dir_all(&self.0).and_then(|()| std::fs::write(&own, image));
        if written.and_then(|()| std::fs::rename(&own, self.0.join(format!("{key}.cubin")))).is_err() {
            let _ = std::fs::remove_file(&own);
        }
    }
}
