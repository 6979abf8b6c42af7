//! The decoder as a whole: gradients, batching, cache, attachments, templates.

#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests are tests

mod chat;
mod decoder;
mod recompute;
