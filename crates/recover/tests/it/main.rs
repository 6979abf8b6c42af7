//! Methods on models small enough to be worked out by hand.

#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests are tests

mod arithmetic;
mod bad_input;
mod decoder;
mod few_shot;
mod folders;
mod gram;
mod low_rank;
mod running;
mod safe_delta;
mod safe_lora;
mod safe_merge;
mod salora;
mod support;
mod table;
