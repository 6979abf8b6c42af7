//! The house, and the program as a user meets it.

#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests are tests

mod bad_input;
mod chain;
mod device;
mod house;
mod models;
mod recover;
mod support;
mod weight_path;
