//! Calibration on a small random decoder, against an exhaustive search; genes of every layout on models.

#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests are tests

mod calibrate;
mod distillation;
mod layouts;
mod select;
