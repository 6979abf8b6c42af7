//! Every engine against the references, over odd shapes and thread counts.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)] // the helpers of tests are tests; what was not run is said

mod add;
mod compile;
mod cuda;
mod delta;
mod product;
mod sketch;

use kernels::selftest::{DTYPES, noise, stored};
use kernels::{Dtype, Engine, Shape, selftest};

/// Runs something on every engine there is: that of the CPU, and that of a CUDA device.
macro_rules! on_engines {
    (|$engine:ident| $body:expr) => {{
        {
            let $engine = &kernels::CpuEngine::new();
            $body
        }
        if let Some($engine) = crate::cuda::engine() {
            $body
        }
    }};
}
pub(crate) use on_engines;

/// Runs a self-test on every engine, for any number of threads.
macro_rules! check {
    (|$engine:ident| $found:expr) => {
        crate::on_engines!(|$engine| {
            crate::on_any_threads(|| $found).unwrap();
        })
    };
}
pub(crate) use check;

/// Runs `f` on pools of 1, 2 and 7 threads and asks for the same answer, bit for bit.
#[track_caller]
fn on_any_threads<T: PartialEq + std::fmt::Debug + Send>(f: impl Fn() -> T + Sync) -> T {
    let run = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(&f);
    let one = run(1);
    for threads in [2, 7] {
        assert!(run(threads) == one, "{threads} threads and 1 thread differ");
    }
    one
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// A pair of stored sides on an engine.
fn pair<E: Engine>(engine: &E, aligned: (&[u8], Dtype), degraded: (&[u8], Dtype), shape: Shape) -> E::Pair {
    selftest::pair(engine, aligned, degraded, shape).unwrap()
}
