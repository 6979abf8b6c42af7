//! Differentiable CPU ops that candle lacks or whose stock versions cut gradients.
//!
//! | op | inputs | gradient to |
//! |---|---|---|
//! | [`frozen_linear`] | x `[n, in]`; W `[out, in]` and a bias `[out]`, constants | x |
//! | [`low_rank_linear`] | the same, and A `[rank, in]`, B `[out, rank]`, s `[1]` | x, A, B, s |
//! | [`linear`] | x `[n, in]`, W `[out, in]` | both |
//! | [`rms_norm`] | x `[n, d]`, w `[d]` | x, w |
//! | [`rope`] | x `[b, t, h, d]` | x |
//! | [`attention`] | q `[b, t, h, d]`, k and v `[b, s, g, d]`, `g` divides `h` | q, k, v |
//! | [`swiglu`] | gate, up `[n, f]` | both |
//! | [`swiglu_fused`] | gate beside up `[n, 2 f]` | it |
//! | [`cross_entropy`], [`kl`], [`log_odds`] | logits `[n, v]` | logits |
//!
//! All f32, row-major; sums inside a row are in a fixed order, so results do not depend on the thread
//! count. Each backward is checked against central differences beside it.

mod attention;
mod linear;
mod logits;
mod norm;
mod rope;
pub(crate) mod simd;
mod swiglu;
#[cfg(test)]
mod testing;

pub use attention::attention;
pub use linear::{Weight, frozen_linear, linear, low_rank_linear};
pub(crate) use logits::log_softmax;
pub use logits::{cross_entropy, kl, log_odds, token_set};
pub use norm::rms_norm;
pub use rope::{RopeForm, RopeTable, rope};
pub use swiglu::{swiglu, swiglu_fused};

use candle_core::{CpuStorage, Layout, Result, Shape, Storage, Tensor, bail};
use std::ops::Deref;

fn view<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (layout.contiguous_offsets(), storage) {
        (Some((from, to)), CpuStorage::F32(data)) => Ok(&data[from..to]),
        (None, _) => bail!("operand is not contiguous"),
        _ => bail!("operand is not f32"),
    }
}

/// A tensor's values in place, while this lives.
struct Read<'a, S> {
    storage: S,
    layout: &'a Layout,
}

fn read(t: &Tensor) -> Read<'_, impl Deref<Target = Storage>> {
    let (storage, layout) = t.storage_and_layout();
    Read { storage, layout }
}

impl<S: Deref<Target = Storage>> Read<'_, S> {
    /// Of a contiguous f32 tensor on the CPU.
    fn values(&self) -> Result<&[f32]> {
        match &*self.storage {
            Storage::Cpu(storage) => view(storage, self.layout),
            _ => bail!("operand is not on the CPU"),
        }
    }
}

fn values(t: &Tensor) -> Result<Vec<f32>> {
    t.flatten_all()?.to_vec1::<f32>()
}

fn own(data: Vec<f32>, shape: impl Into<Shape>) -> (CpuStorage, Shape) {
    (CpuStorage::F32(data), shape.into())
}

/// Rows per unit of parallel work: small enough to spread, large enough to be worth a task.
const ROWS: usize = 64;
