//! Why a family could not be built.

/// Why a family could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabError {
    /// A model could not be built or run.
    #[error(transparent)]
    Model(#[from] transformer::ModelError),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// A folder could not be written.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::CheckpointError),
    /// The family's name is not one the lab knows.
    #[error("the lab has no family `{0}`")]
    UnknownFamily(String),
    /// A built model is not what the lab promises.
    #[error("`{model}`: {what} is {value:.3}, the lab needs {need}")]
    Unsound {
        /// Which model of the family.
        model: String,
        /// Which quantity.
        what: &'static str,
        /// Its value.
        value: f64,
        /// The gate, in words.
        need: &'static str,
    },
    /// A training thread ended without a result.
    #[error("a training thread panicked while building `{0}`")]
    Thread(String),
}
