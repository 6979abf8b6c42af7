//! The two streams: checkpoints to a gene ([`extract`]), and a gene into a checkpoint ([`fuse`]).
//!
//! Weights pass tensor by tensor, as many at a time as a limit of memory allows. What headers show to be wrong is refused before an output is begun, and outputs appear whole or not at all. A
//! finished output of the same inputs and options is reported and left as it is. The same inputs and options give the
//! same bytes for any thread count.
//!
//! Not here: running a model, choosing coefficients, printing.

mod assemble;
mod budget;
mod difference;
mod error;
mod extract;
mod flow;
mod fuse;
mod make;
mod merge;
mod pairing;
mod parts;
mod plan;
mod pool;
mod progress;
mod verify;

pub use assemble::{Assembled, assemble};
pub use error::{Result, StreamError};
pub use extract::{Extract, ExtractReport, Ranks, extract};
pub use flow::Stages;
pub use fuse::{Expressed, Form, Fuse, FuseReport, RECORD_FILE, fuse, fused_genes};
pub use parts::Worker;
pub use plan::{Becomes, Plan, Planned, plan};
pub use progress::{NoProgress, Progress};
pub use verify::{VerifyReport, verify};
