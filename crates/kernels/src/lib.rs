//! Matrices in, numbers out: the arithmetic on weights, behind one [`Engine`].
//!
//! An engine holds its operands where it computes; only factors, l x l matrices and sums come back. [`CpuEngine`]
//! is the engine that every machine has. What each operation means is written down in [`reference`](mod@reference),
//! slow and obvious, and every engine is tested against it.
//!
//! Results depend on the operands only: never on the thread count, never on what ran before.
//!
//! Not here: files, tensor names, and the algorithms that are built from these operations.

mod cpu;
mod dtype;
mod engine;
mod error;
mod philox;
pub mod reference;
mod shape;
mod weights;

pub use cpu::{CpuEngine, CpuMatrix, CpuPair};
pub use dtype::{Dtype, bf16_bits, f16_bits};
pub use engine::{AddStats, DeltaStats, Engine};
pub use error::{KernelError, Result, Side};
pub use philox::{philox4x32_10, sketch_entry};
pub use shape::Shape;
pub use weights::{RowReader, Rows, Scales, Unreadable, Weights};
