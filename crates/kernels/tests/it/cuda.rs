//! The CUDA engine of these tests: of a real device, or of the fake driver that the tests build.

use std::sync::OnceLock;

use kernels::{CudaEngine, CudaOptions};

/// The engine, if there is a device. `REQUIRE_GPU=1` makes its absence a failure.
pub(crate) fn engine() -> Option<&'static CudaEngine> {
    static ENGINE: OnceLock<Option<CudaEngine>> = OnceLock::new();
    ENGINE.get_or_init(|| open(&CudaOptions { poison: true, ..CudaOptions::new(0) })).as_ref()
}

fn open(options: &CudaOptions) -> Option<CudaEngine> {
    match CudaEngine::open(options) {
        Ok(engine) => Some(engine),
        Err(error) => {
            let required = std::env::var_os("REQUIRE_GPU").is_some_and(|value| value != "0");
            assert!(!required, "no CUDA engine: {error}");
            eprintln!("not run on CUDA: {error}");
            None
        }
    }
}
