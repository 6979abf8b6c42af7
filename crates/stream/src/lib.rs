//! The two streams: checkpoints to a gene ([`extract`]), and a gene into a checkpoint ([`fuse`]).
//!
//! Weights pass tensor by tensor; at most one pair of tensors, its difference and its factors are held at a time.
//! What headers show to be wrong is refused before an output is begun, and outputs appear whole or not at all. A
//! finished output of the same inputs and options is reported and left as it is. The same inputs and options give the
//! same bytes for any thread count.
//!
//! Not here: running a model, choosing coefficients, printing.

mod difference;
mod error;
mod extract;
mod fuse;
mod merge;
mod pairing;
mod progress;

pub use error::{Result, StreamError};
pub use extract::{Extract, ExtractReport, extract};
pub use fuse::{Form, Fuse, FuseReport, RECORD_FILE, fuse};
pub use progress::{NoProgress, Progress};
