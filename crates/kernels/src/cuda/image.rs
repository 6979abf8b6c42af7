//! Machine code of the kernels for a device: embedded when this was built, or compiled by NVRTC when it runs.
//!
//! What is tried, in this order: an embedded cubin of the device's major version, embedded PTX (which the driver compiles), a
//! compiled cubin that the caller's [`ImageCache`] has, and NVRTC, if its library is there. Embedded images are made from
//! exactly these sources (the build script compares them), so all compute the same.

use std::ffi::CString;
use std::sync::Arc;

use cudarc::nvrtc::{result as nvrtc, sys as nvrtc_sys};
use xxhash_rust::xxh3::xxh3_128;

use super::driver::{Device, Module, NoCuda};

/// The sources, one translation unit.
pub(super) const SOURCE: &str = concat!(
    include_str!("../../../../kernels/common.cu"),
    include_str!("../../../../kernels/sums.cu"),
    include_str!("../../../../kernels/delta.cu"),
    include_str!("../../../../kernels/sketch.cu"),
    include_str!("../../../../kernels/product.cu"),
    include_str!("../../../../kernels/gram.cu"),
    include_str!("../../../../kernels/low_rank.cu"),
    include_str!("../../../../kernels/pack.cu"),
);

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// Options of the compiler besides the architecture: multiply-adds are fused only where they are written.
const OPTIONS: [&str; 2] = ["--fmad=false", "--std=c++17"];

/// Every symbol of NVRTC that is called here.
const SYMBOLS: [&str; 8] = [
    "nvrtcVersion",
    "nvrtcCreateProgram",
    "nvrtcCompileProgram",
    "nvrtcDestroyProgram",
    "nvrtcGetProgramLogSize",
    "nvrtcGetProgramLog",
    "nvrtcGetCUBINSize",
    "nvrtcGetCUBIN",
];

/// Keeps compiled kernels between runs.
pub trait ImageCache: Send + Sync {
    /// What was put under this key.
    fn get(&self, key: &str) -> Option<Vec<u8>>;
    /// Keeps an image; may fail silently.
    fn put(&self, key: &str, image: &[u8]);
}

/// Names of the embedded images, for people.
pub fn embedded_images() -> Vec<&'static str> {
    EMBEDDED.iter().map(|(name, _)| *name).collect()
}

/// Loads the kernels; says how they were obtained.
pub(super) fn load(
    device: &Device,
    cache: Option<&Arc<dyn ImageCache>>,
) -> std::result::Result<(Module, String), NoCuda> {
    let (major, minor) = device.facts.capability;
    let mut tried = Vec::new();
    let cubins = EMBEDDED.iter().filter_map(|(name, image)| Some((cubin_of(name)?, *name, *image)));
    // Machine code runs on later minor versions of its major version.
    let best = cubins.filter(|((a, b), ..)| *a == major && *b <= minor).max_by_key(|(version, ..)| *version);
    if let Some((_, name, image)) = best {
        match device.load(image) {
            Ok(module) => return Ok((module, format!("embedded {name}"))),
            Err(error) => tried.push(format!("embedded {name}: {error}")),
        }
    }
    let ptx = EMBEDDED.iter().filter_map(|(name, image)| Some((ptx_of(name)?, *name, *image)));
    if let Some((_, name, image)) = ptx.filter(|(version, ..)| *version <= (major, minor)).max_by_key(|p| p.0)
    {
        let text: Vec<u8> = image.iter().copied().chain([0]).collect();
        match device.load(&text) {
            Ok(module) => return Ok((module, format!("embedded {name}, compiled by the driver"))),
            Err(error) => tried.push(format!("embedded {name}: {error}")),
        }
    }
    if best.is_none() {
        tried.push(match EMBEDDED.len() {
            0 => "none is embedded".to_owned(),
            _ => format!("none of {} is for it", embedded_images().join(", ")),
        });
    }
    match compiled(device, cache) {
        Ok(found) => Ok(found),
        Err(why) => {
            tried.push(why);
            let name = device.facts.name.clone();
            Err(NoCuda::NoKernels { name, major, minor, why: tried.join("; ") })
        }
    }
}

/// The version in `sm_90.cubin`.
fn cubin_of(name: &str) -> Option<(i32, i32)> {
    version(name.strip_prefix("sm_")?.strip_suffix(".cubin")?)
}

/// The version in `compute_75.ptx`.
fn ptx_of(name: &str) -> Option<(i32, i32)> {
    version(name.strip_prefix("compute_")?.strip_suffix(".ptx")?)
}

fn version(digits: &str) -> Option<(i32, i32)> {
    let number: i32 = digits.parse().ok()?;
    Some((number / 10, number % 10))
}

/// Kernels out of the cache, or from NVRTC.
fn compiled(
    device: &Device,
    cache: Option<&Arc<dyn ImageCache>>,
) -> std::result::Result<(Module, String), String> {
    let (major, minor) = device.facts.capability;
    let arch = format!("sm_{major}{minor}");
    let compiler = Nvrtc::find()?;
    let about = format!("{SOURCE}\n{arch} {} NVRTC {}", OPTIONS.join(" "), compiler.version);
    let key = format!("{arch}-{:032x}", xxh3_128(about.as_bytes()));
    let how = format!("compiled by NVRTC {} for {arch}", compiler.version);
    if let Some(image) = cache.and_then(|cache| cache.get(&key))
        && let Ok(module) = device.load(&image)
    {
        return Ok((module, format!("{how}, cached")));
    }
    let image = compiler.compile(&arch)?;
    let module = device.load(&image).map_err(|error| format!("{how}: {error}"))?;
    if let Some(cache) = cache {
        cache.put(&key, &image);
    }
    Ok((module, how))
}

/// NVRTC, whose library is there.
struct Nvrtc {
    version: String,
}

impl Nvrtc {
    fn find() -> std::result::Result<Nvrtc, String> {
        // SAFETY: only opens the library.
        if !unsafe { nvrtc_sys::is_culib_present() } {
            return Err("libnvrtc.so is not found".to_owned());
        }
        // SAFETY: the library was found above, so this does not panic.
        let library = unsafe { nvrtc_sys::culib() };
        for symbol in SYMBOLS {
            let name = CString::new(symbol).unwrap_or_default();
            // SAFETY: the symbol is looked up and not called.
            if unsafe { library.get::<unsafe extern "C" fn()>(name.as_bytes_with_nul()) }.is_err() {
                return Err(format!("libnvrtc.so has no `{symbol}`"));
            }
        }
        let (mut major, mut minor) = (0, 0);
        // SAFETY: writes two ints to live locals.
        unsafe { nvrtc_sys::nvrtcVersion(&mut major, &mut minor) }
            .result()
            .map_err(|error| format!("nvrtcVersion: {:?}", error.0))?;
        Ok(Nvrtc { version: format!("{major}.{minor}") })
    }

    fn compile(&self, arch: &str) -> std::result::Result<Vec<u8>, String> {
        let failed = |call: &str, error: nvrtc::NvrtcError| {
            format!("NVRTC {} for {arch}: {call}: {:?}", self.version, error.0)
        };
        let source = CString::new(SOURCE).map_err(|error| error.to_string())?;
        let program = nvrtc::create_program(&source, Some(c"safegene.cu"))
            .map_err(|error| failed("nvrtcCreateProgram", error))?;
        let mut options = vec![format!("--gpu-architecture={arch}")];
        options.extend(OPTIONS.map(str::to_owned));
        // SAFETY: the program was made above and is destroyed once, below; the sizes come from NVRTC itself.
        unsafe {
            let compiled = nvrtc::compile_program(program, &options).map_err(|error| {
                let log = nvrtc::get_program_log(program).unwrap_or_default();
                let log: Vec<u8> = log.into_iter().map(|c| c as u8).take_while(|c| *c != 0).collect();
                let first = String::from_utf8_lossy(&log).lines().next().unwrap_or_default().to_owned();
                format!("{}: {first}", failed("nvrtcCompileProgram", error))
            });
            let image = compiled.and_then(|()| {
                let mut len = 0;
                nvrtc_sys::nvrtcGetCUBINSize(program, &mut len)
                    .result()
                    .map_err(|error| failed("nvrtcGetCUBINSize", error))?;
                let mut image = vec![0u8; len];
                nvrtc_sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast())
                    .result()
                    .map_err(|error| failed("nvrtcGetCUBIN", error))?;
                Ok(image)
            });
            let _ = nvrtc::destroy_program(program);
            image
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_in_their_order() {
        let order = include_str!("../../../../kernels/ORDER");
        let starts: Vec<usize> = order
            .lines()
            .map(|name| {
                let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../kernels/");
                let text = std::fs::read_to_string(format!("{path}{name}")).unwrap();
                SOURCE.find(&text).unwrap()
            })
            .collect();
        assert!(starts.is_sorted() && starts.len() == 8, "{starts:?}");
    }

    #[test]
    fn names_of_images() {
        assert_eq!(cubin_of("sm_120.cubin"), Some((12, 0)));
        assert_eq!(ptx_of("compute_75.ptx"), Some((7, 5)));
        assert_eq!((cubin_of("compute_75.ptx"), ptx_of("sm_90.cubin")), (None, None));
    }
}
