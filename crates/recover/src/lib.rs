//! The other ways to make a fine-tuned model safe again, each behind one [`Method`], so that they stand in one table.
//!
//! [`METHODS`] lists them: name, paper, formula, what each needs, its options and where it departs from its source. A
//! method with its options is made by [`MethodInfo::build`] from [`Settings`]; [`recover`] opens the [`Inputs`] that it
//! needs, and writes a folder and a [`Report`].
//!
//! | file | question |
//! |---|---|
//! | `registry.rs` | which methods are there, and what does each need? |
//! | `method.rs` | what does a method get, and what does it give? |
//! | `run.rs` | how does a folder come of it, whole or not at all? |
//! | `side.rs` | which values has a checkpoint in these rows? |
//! | `rewrite.rs` | how is a model folder written in which some values are others? |
//! | `peft.rs` | how is an adapter written in which some factors are others? |
//! | `added.rs` | how are trained factors added to a target? |
//! | `running.rs` | how is a checkpoint run? |
//! | `gram.rs` | what do the modules of a model read? |
//! | `lora.rs` | what do the trained methods share? |
//! | `algebra.rs` | which products does a method ask of an engine? |
//! | `alignment.rs` | what does alignment say about an update? |
//! | `resta.rs`, `wise_ft.rs`, `low_rank.rs`, `safe_lora.rs`, `safe_merge.rs` | what does the method do? |
//! | `knob.rs` | which of several settings is taken? |
//! | `safe_delta.rs`, `few_shot.rs`, `salora.rs` | what does the method do to one module, or to a model in memory? |
//! | `safe_delta/method.rs`, `few_shot/method.rs`, `salora/method.rs` | how is it applied to folders? |
//!
//! Weights pass tensor by tensor or in blocks of rows: f32 values, f64 norms and cosines, one rounding to the target's
//! format. What a method does not touch keeps its bytes, and is counted.
//!
//! Not here: genes and coefficients (`distill`), printing, reading data files, and the environment.

pub mod few_shot;
pub mod gram;
pub mod knob;
pub mod lora;
pub mod run_error;
pub mod safe_delta;
pub mod salora;

mod added;
mod algebra;
mod alignment;
mod error;
mod low_rank;
mod method;
mod peft;
mod registry;
mod report;
mod resta;
mod rewrite;
mod run;
mod running;
mod safe_lora;
mod safe_merge;
mod settings;
mod side;
mod wise_ft;

pub use algebra::{Algebra, Difference};
pub use error::{RecoverError, Result};
pub use few_shot::FewShotLora;
pub use gram::{Gram, Grams, Positions, grams};
pub use lora::ModuleFactors;
pub use low_rank::{LowRankRestore, Lox};
pub use method::{Form, Inputs, Job, Method, Models, Outcome, Outputs, Shot, Shots};
pub use registry::{METHODS, MethodInfo, Need, OptionInfo, When, by_name};
pub use report::{Action, ModuleReport, Report, Tensors};
pub use resta::Resta;
pub use run::recover;
pub use run_error::RunError;
pub use safe_delta::SafeDelta;
pub use safe_lora::{SafeLora, SafeLoraVariant, Select};
pub use safe_merge::{SafeMerge, SafeMergeVariant};
pub use salora::SaLora;
pub use settings::Settings;
pub use side::Side;
pub use wise_ft::WiseFt;
