//! Calibration on a small random decoder, against an exhaustive search.

#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests are tests

mod calibrate;
