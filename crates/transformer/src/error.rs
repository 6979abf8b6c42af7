//! Why a model could not be built, read or run.

use std::path::PathBuf;

/// Why a model could not be built, read or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The configuration names a layout this decoder does not have.
    #[error("model type `{model_type}` is not supported: {reason}")]
    Unsupported {
        /// `model_type` of config.json.
        model_type: String,
        /// What exactly is missing.
        reason: String,
    },
    /// A key of config.json is missing or has the wrong type.
    #[error("config.json: `{key}` {problem}")]
    Config {
        /// The key.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A weight has another shape than the configuration asks for.
    #[error("tensor `{tensor}`: config.json asks for shape {need:?}, the file has {found:?}")]
    Shape {
        /// Tensor name.
        tensor: String,
        /// Shape that follows from the configuration.
        need: Vec<usize>,
        /// Shape found.
        found: Vec<usize>,
    },
    /// The checkpoint could not be read.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::CheckpointError),
    /// The tokenizer or its template could not be read.
    #[error("cannot read `{}`: {problem}", path.display())]
    Chat {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The chat template failed on a prompt.
    #[error("the chat template failed: {0}")]
    Template(String),
    /// An answer or prompt that encodes to no token.
    #[error("{what} encodes to no token: `{text}`")]
    Empty {
        /// Prompt or answer.
        what: &'static str,
        /// The text.
        text: String,
    },
    /// A refusal that the tokenizer does not give back as one.
    #[error("the answer `{text}` never opens like a refusal as this tokenizer decodes it")]
    NoOpening {
        /// What it decodes to.
        text: String,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl ModelError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unsupported { .. } => {
                let layouts = crate::architecture::LAYOUTS.join("`, `");
                Some(format!("supported layouts are `{layouts}`; extract and fuse work on any layout"))
            }
            Self::Chat { .. } => {
                Some("the model folder must hold tokenizer.json and a chat template (chat_template.jinja or tokenizer_config.json)".into())
            }
            Self::NoOpening { .. } => Some("name how it opens, as decoded, with --refusals".into()),
            Self::Checkpoint(e) => e.hint(),
            _ => None,
        }
    }
}
