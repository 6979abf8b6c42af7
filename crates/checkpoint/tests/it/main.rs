//! Everything that needs a folder: hostile inputs, adapters, writing, and the oracle for headers.

// Helpers outside `#[test]` functions fail by panicking too.
#![allow(clippy::unwrap_used, clippy::panic)]

mod adapter;
mod folders;
mod headers;
mod oracle;
mod quantized;
mod scales;
mod support;
mod units;
mod values;
mod writer;
