//! Tests of the report from outside: fake records in, text out.

#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests are tests

mod fake;

mod aggregates;
mod hostile;
mod looks;
mod refused;
