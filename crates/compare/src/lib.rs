//! Every method in one table: families × seeds × targets × methods × sets of prompts, on the lab.
//!
//! | file | question |
//! |---|---|
//! | `plan.rs` | which targets are there, and which methods with which shots stand on each? |
//! | `ground.rs` | what do all methods of a family and seed share: models, drifts, genes? |
//! | `roster.rs` | how does a method make a target safe again, and what was it given? |
//! | `tuning.rs` | what does a rival's setting do on the shots? |
//! | `cell.rs` | what do the methods reach on one target? |
//! | `judge.rs` | what does a model do on the test split? |
//! | `claims.rs` | what is claimed of the gene, and do the records hold it? |
//! | `study.rs` | how are studies of the main targets run beside the table? |
//! | `halves.rs` | does selection earn its place among all halves of the layers? |
//! | `rounds.rs` | does the same gene hold over rounds of fine-tuning? |
//! | `store.rs` | which records are there already? |
//! | `run.rs` | in which order is it done? |
//!
//! Whatever is tuned, in genes or rivals, sees the same shots and the same limit on KL. A rival tries 7 to 15 settings, calibration may take
//! 96 gradients and mostly takes 10 to 30, the few-shot LoRA is trained twice for at most 300 steps. Safety is how
//! refusals open; the few-shot LoRA alone learns whole refusals, with a δ of its own. A gene's coefficients are near 1 and cost
//! little KL, each as far as it makes safer, a rival's setting is the one of least KL that is safe enough. Records say what each was given. Nothing is tuned on a test split: [`plan::check_splits`] refuses splits that share a prompt.
//!
//! A comparison that was cut off goes on: trained models lie in the work folder, records in its `records.jsonl`.
//!
//! Not here: printing, the pages (`report`).

pub mod cell;
pub mod claims;
pub mod error;
pub mod ground;
pub mod halves;
pub mod judge;
pub mod plan;
pub mod roster;
pub mod rounds;
pub mod run;
pub mod store;
pub mod study;
pub mod tuning;

pub use error::CompareError;
pub use plan::{Plan, Settings};
pub use run::{Distillation, Outcome, Progress, run};
