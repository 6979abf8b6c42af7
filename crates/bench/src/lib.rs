//! What a throughput figure needs beside it: synthetic checkpoints of any size, and the machine's own limits.
//!
//! [`synthesize`] writes a pair of checkpoints with random weights and a low-rank change; [`Ceilings`] measures what the
//! machine can do at best in the same run. Nothing here knows what is being measured.
//!
//! Not here: printing, and the streams themselves.

mod ceiling;
mod machine;
mod synth;

pub use ceiling::{Ceilings, cached_share, flush_all, forget, read_for};
pub use machine::{Machine, peak_rss_bytes};
pub use synth::{BenchError, Kind, Model, Synth, synthesize};
