//! Methods that run models, against examples worked by hand.

#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests are tests

mod few_shot;
mod gram;
mod safe_delta;
mod salora;
mod support;
