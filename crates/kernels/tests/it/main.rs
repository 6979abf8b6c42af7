//! Every engine against the references, over odd shapes and thread counts.

#![allow(clippy::unwrap_used)] // the helpers of tests are tests

mod add;
mod delta;
mod product;
mod sketch;

use kernels::{Dtype, Engine, Shape, Weights, philox4x32_10, reference};

const DTYPES: [Dtype; 4] = [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::Bf16];

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

/// Numbers in [-1, 1), from a counter.
fn noise(seed: u32, n: usize) -> Vec<f32> {
    (0..n.div_ceil(4) as u32)
        .flat_map(|i| philox4x32_10([i, 0, 0, 0], [seed, 77]))
        .map(|word| word as i32 as f32 / 2.0f32.powi(31))
        .take(n)
        .collect()
}

/// `values` as stored weights.
fn stored(values: &[f32], dtype: Dtype) -> Vec<u8> {
    values.iter().flat_map(|&x| reference::round(f64::from(x), dtype)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// A pair of stored sides on an engine.
fn pair<E: Engine>(engine: &E, aligned: (&[u8], Dtype), degraded: (&[u8], Dtype), shape: Shape) -> E::Pair {
    let side = |(bytes, dtype): (&[u8], Dtype)| Weights::copied(bytes, dtype, shape).unwrap();
    engine.pair(side(aligned), side(degraded)).unwrap()
}
