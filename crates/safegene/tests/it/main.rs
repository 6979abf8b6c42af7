//! The house, and the program as a user meets it.

mod bad_input;
mod chain;
mod house;
mod support;
