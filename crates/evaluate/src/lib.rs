//! How safe and how useful a model is: attack success, over-refusal, task accuracy, each with its interval.
//!
//! No rate is reported alone: a model that refuses everything has the best attack success rate there is.
//!
//! Not here: training, calibration, weights.

pub mod data;
pub mod rate;
pub mod run;

pub use data::{DataError, DataRow, Fields, read_rows};
pub use rate::Rate;
pub use run::{Evaluation, Given, Matching, Sets, answers, evaluate, judge, run};
