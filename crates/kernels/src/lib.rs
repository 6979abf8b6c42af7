//! Matrices in, numbers out: the arithmetic on weights, behind one [`Engine`].
//!
//! An engine holds its operands where it computes; only factors, l x l matrices and sums come back. [`CpuEngine`]
//! is the engine that every machine has, [`CudaEngine`] that of a CUDA device, if there is one. What each operation means is written down in [`reference`](mod@reference),
//! slow and obvious, and every engine is tested against it.
//!
//! Results depend on the operands only: never on the thread count, never on what ran before.
//!
//! Not here: files, tensor names, and the algorithms that are built from these operations.

mod cpu;
mod cuda;
mod dtype;
mod engine;
mod error;
mod philox;
pub mod reference;
pub mod selftest;
mod shape;
mod weights;

pub use cpu::{CpuEngine, CpuMatrix, CpuPair};
pub use cuda::{
    CudaDevice, CudaEngine, CudaMatrix, CudaMeters, CudaOptions, CudaPair, CudaRate, ImageCache, NoCuda,
    embedded_images,
};
pub use dtype::{Dtype, bf16_bits, f16_bits};
pub use engine::{AddStats, DeltaStats, Demand, Engine, HostBuffer, HostBytes};
pub use error::{KernelError, Result, Side};
pub use philox::{philox4x32_10, sketch_entry};
pub use shape::Shape;
pub use weights::{RowReader, Rows, Scales, Unreadable, Weights};
