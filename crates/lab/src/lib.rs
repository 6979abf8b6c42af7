//! The lab: an invented language and families of tiny models in the real file formats.
//!
//! Real checkpoints are gigabytes; the lab lets the whole method be seen in a minute on two cores. A
//! family is a base that knows a recipe for every (verb, noun), an aligned model that refuses the
//! forbidden nouns, degraded versions of it, and fine-tunes of it on small tasks with a share of
//! harmful rows.
//!
//! | file | question |
//! |---|---|
//! | `language.rs` | which words, nouns, recipes, request templates? |
//! | `tasks.rs` | what are the nine classification tasks? |
//! | `splits.rs` | which rows go where, with which nouns? |
//! | `train.rs` | how is a base, an aligned model or a LoRA trained? |
//! | `measure.rs` | how safe and useful is a model while it is built? |
//! | `folders.rs` | how does a model, an adapter, a tokenizer become files? |
//! | `family.rs` | how do the base and the aligned model come about? |
//! | `tune.rs` | which fine-tunes are there, and when are they done? |
//! | `build.rs` | how is a family's folder built, and what must hold of it? |
//!
//! Everything is a function of the family's name and seed: the same seed gives the same files on one kind of CPU,
//! whatever the thread count.
//!
//! The family's design (nouns with a hidden class, recipes, drifts, shifted templates) is our own; its four tested tasks
//! mirror the kinds that SafeGene (arXiv 2606.06519) is reported to use: topic, sentiment, entailment, yes/no.
//!
//! Not here: recovery. The lab only makes the patient.

pub mod build;
pub mod error;
pub mod family;
pub mod folders;
pub mod language;
pub mod measure;
pub mod splits;
pub mod tasks;
pub mod train;
pub mod tune;

pub use build::{BuildReport, Progress, build};
pub use error::LabError;
pub use family::Family;
pub use language::Language;
pub use tune::{Kind, Tune, Tuned, Tuner};
