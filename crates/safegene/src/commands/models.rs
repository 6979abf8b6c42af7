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
    /// The folder whose weights a checkpoint is run over, and what it adds to them: an adapter of low-rank sums stands
    /// over its base, anything else by itself.
    pub(super) fn weights_of(checkpoint: &Checkpoint) -> Result<(&Path, Attachments), Failure> {
        let own = checkpoint.adapter().map(Attachments::of_adapter).transpose()?.flatten();
        Ok(match own {
            Some(own) => (checkpoint.base_dir(), own),
            None => (checkpoint.dir(), Attachments::none()),
        })
    }

    /// Opens a checkpoint; weights that several are run over are opened once.
    pub(super) fn open(&mut self, checkpoint: &Checkpoint) -> Result<Slot, Failure> {
        let (folder, own) = Self::weights_of(checkpoint)?;
        let name = canonical(folder);
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

    /// Lets go of everything but the weights in these folders; slots of what went, or came after it, are void.
    pub(super) fn keep_only(&mut self, folders: &[PathBuf]) {
        self.models.retain(|(path, _)| folders.contains(path));
    }
}

/// One name for a folder, however it is written.
pub(super) fn canonical(folder: &Path) -> PathBuf {
    std::fs::canonicalize(folder).unwrap_or_else(|_| folder.to_path_buf())
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
