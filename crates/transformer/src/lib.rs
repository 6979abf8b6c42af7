//! One decoder for the layouts of Llama, Mistral, Qwen2, Qwen3, GLM and GLM-4, with low-rank attachments.
//!
//! A [`Model`] holds frozen (or trainable) weights in f32; what a fine-tune or a gene adds stands apart in
//! [`Attachments`] and is passed to each forward pass, so that one copy of the weights serves many
//! adapters at once: `y = x Wᵀ + bias + Σ_k s_k · (x A_kᵀ) B_kᵀ`. Gradients reach every `A`, `B` and `s`, and
//! never a frozen weight.
//!
//! Every op whose stock version cuts gradients (softmax, RMS norm, rotary embedding) is our own, with
//! a backward: see [`ops`].
//!
//! Not here: what to train, data files, judging answers, writing checkpoints.

pub mod architecture;
pub mod attach;
pub mod chat;
pub mod error;
pub mod generate;
pub mod loss;
pub mod model;
pub mod ops;
pub mod optimise;
pub mod recompute;
pub mod refusal;

pub use architecture::{Architecture, LinearShape};
pub use attach::{Attachment, Attachments, ModuleFactors, ModuleKind, VectorKind};
pub use chat::Chat;
pub use error::ModelError;
pub use generate::generate;
pub use loss::{AnswerBatch, Row};
pub use model::{Batch, Model, ModuleTap, Taps, WeightSource};
pub use refusal::Openings;
