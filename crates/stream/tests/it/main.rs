//! Genes extracted from small model folders, and fused into others.

#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests are tests

mod extract;
mod folders;
mod fuse;
mod inputs;
mod peer_bugs;
mod work;
