//! Genes, expressions and adapters as folders.

// Helpers outside `#[test]` functions fail by panicking too.
#![allow(clippy::unwrap_used, clippy::panic)]

mod adapter;
mod expression;
mod family;
mod gene;
mod hostile;
mod made;
mod support;
