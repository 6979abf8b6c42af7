//! A checkpoint that a method runs: weights in f32, and its own tokenizer for the rows.
//!
//! An adapter is run over its base with its product added to the weights, in f32. That takes four bytes a weight whatever
//! the stored format. Layouts that the decoder does not have, and a missing tokenizer or template, are refused from
//! headers and small files alone, before anything is hashed or written.

use std::path::PathBuf;

use transformer::{Architecture, Chat, Model, ModelError, Row};

use crate::error::{RecoverError, Result};
use crate::method::Shot;
use crate::run_error::RunError;
use crate::side::Side;

/// An opened model with its tokenizer.
pub(crate) struct Running {
    dir: PathBuf,
    pub(crate) model: Model,
    chat: Chat,
}

/// Refuses what could not be run, and rows that could not be read.
pub(crate) fn check_runs(side: &Side, rows: &[&[Shot]]) -> Result<()> {
    let checkpoint = side.checkpoint();
    let at = |source: ModelError| RecoverError::run(checkpoint.dir(), source);
    Architecture::from_config(&checkpoint.config().raw).map_err(at)?;
    let chat = Chat::of(checkpoint).map_err(at)?;
    rows.iter().try_for_each(|rows| encode(&chat, rows).map(|_| ()).map_err(at))
}

impl Running {
    pub(crate) fn open(side: &Side) -> Result<Running> {
        let dir = side.checkpoint().dir().to_path_buf();
        let at = |source: ModelError| RecoverError::run(&dir, source);
        let chat = Chat::of(side.checkpoint()).map_err(at)?;
        let model = Model::open(side.checkpoint()).map_err(at)?;
        Ok(Running { dir, model, chat })
    }

    /// Rows as tokens, answers closed.
    pub(crate) fn rows(&self, shots: &[Shot]) -> Result<Vec<Row>> {
        self.named(encode(&self.chat, shots).map_err(RunError::from))
    }

    /// What fills rows up; nothing reads it.
    pub(crate) fn pad(&self) -> u32 {
        self.chat.end()
    }

    /// The result of a run, the model's folder named where it failed.
    pub(crate) fn named<T>(&self, result: std::result::Result<T, RunError>) -> Result<T> {
        result.map_err(|source| RecoverError::run(&self.dir, source))
    }
}

fn encode(chat: &Chat, shots: &[Shot]) -> std::result::Result<Vec<Row>, ModelError> {
    shots.iter().map(|shot| chat.row(&shot.prompt, &shot.answer)).collect()
}
