//! Stages that run models: a gene distilled from drifts, its layers selected, its coefficients calibrated in a target.
//!
//! | file | question |
//! |---|---|
//! | `sqp.rs` | what is the best point of a few smooth functions over a box? |
//! | `gene.rs` | how does a gene hang on a model? |
//! | `distillation.rs` | which factors make several drifts refuse again, and move nothing else? |
//! | `select.rs` | which layers carry it? |
//! | `calibrate.rs` | which coefficients does a target need? |
//!
//! Not here: files, printing, choosing shots.

pub mod calibrate;
pub mod distillation;
pub mod gene;
pub mod select;
pub mod sqp;

pub use calibrate::{
    Aim, Calibration, CalibrationError, Freedom, Goal, LayerEffect, Limits, Shots, Solver, TradeOff,
    calibrate, check_safety_shots, layer_effects, trade_off,
};
pub use gene::{Frozen, GeneAttachments};
