//! Models that share weights: adapters over one base are run over one copy of it.

use crate::commands::evaluate::chat_of;
use crate::fail::{Code, Failure};
use checkpoint::Checkpoint;
use distill::Frozen;
use std::path::{Path, PathBuf};
use transformer::{Attachments, Chat, Model};

/// Copies of weights, by the folder that they came from.
#[derive(Default)]
pub(super) struct Shelf {
    models: Vec<(PathBuf, Model)>,
}

/// A model on the shelf.
pub(super) struct Slot {
    at: usize,
    own: Attachments,
}

impl Shelf {
    /// Opens a checkpoint: an adapter of low-rank sums over its base, which is opened once; anything else by itself.
    pub(super) fn open(&mut self, checkpoint: &Checkpoint) -> Result<Slot, Failure> {
        let own = checkpoint.adapter().map(Attachments::of_adapter).transpose()?.flatten();
        let (folder, own) = match own {
            Some(own) => (checkpoint.base_dir(), own),
            None => (checkpoint.dir(), Attachments::none()),
        };
        let name = std::fs::canonicalize(folder).unwrap_or_else(|_| folder.to_path_buf());
        if let Some(at) = self.models.iter().position(|(path, _)| *path == name) {
            return Ok(Slot { at, own });
        }
        let model = match folder == checkpoint.dir() {
            true => Model::open(checkpoint)?,
            false => Model::open(&Checkpoint::open(folder, None)?)?,
        };
        self.models.push((name, model));
        Ok(Slot { at: self.models.len() - 1, own })
    }

    /// The model of a slot.
    pub(super) fn frozen(&self, slot: &Slot) -> Frozen<'_> {
        Frozen { model: &self.models[slot.at].1, own: slot.own.clone() }
    }

    /// Copies of weights that are held.
    pub(super) fn len(&self) -> usize {
        self.models.len()
    }
}

/// All checkpoints have to speak the same language: tokens are shared.
pub(super) fn same_tokenizer(first: &Checkpoint, others: &[(&Path, &Checkpoint)]) -> Result<Chat, Failure> {
    let chat = chat_of(first)?;
    for (path, other) in others {
        let theirs = chat_of(other)?;
        if theirs.fingerprint() != chat.fingerprint() {
            return Err(Failure {
                code: Code::Input,
                message: format!(
                    "`{}` and `{}` have different tokenizers or chat templates",
                    path.display(),
                    first.dir().display()
                ),
                causes: Vec::new(),
                hint: Some("models of one family share both".into()),
            });
        }
    }
    Ok(chat)
}
