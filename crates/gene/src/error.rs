//! Why a gene or an expression was refused.
//!
//! Names from files are shown escaped. Advice is never part of the message: see [`GeneError::hint`].

use std::io;
use std::path::{Path, PathBuf};

use checkpoint::{CheckpointError, printable};

/// What this crate returns.
pub type Result<T, E = GeneError> = std::result::Result<T, E>;

fn shown(path: &Path) -> String {
    printable(&path.to_string_lossy())
}

/// Why a gene or an expression was refused or could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GeneError {
    /// A folder or a file below it was refused.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The operating system said no.
    #[error("cannot {action} `{}`", shown(.path))]
    Io {
        /// `read`, `write`, `create`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// The folder has no `gene.json`.
    #[error("`{}` is no gene: it has no `gene.json`", shown(.dir))]
    NotAGene {
        /// The folder.
        dir: PathBuf,
    },
    /// A JSON file is not what it should be.
    #[error("`{}` is not valid: {problem}", shown(.file))]
    Json {
        /// The file.
        file: PathBuf,
        /// What is wrong, escaped.
        problem: String,
    },
    /// A schema of another version of the tool.
    #[error("`{}` has schema {found}, this version reads {read}", shown(.file))]
    Schema {
        /// The file.
        file: PathBuf,
        /// What it says.
        found: u32,
        /// What is read here.
        read: u32,
    },
    /// `gene.json` and the weights beside it do not agree.
    #[error("gene `{}`: `{}` {problem}", shown(.dir), printable(.name))]
    Inconsistent {
        /// The gene's folder.
        dir: PathBuf,
        /// Module or tensor.
        name: String,
        /// What does not agree, escaped.
        problem: String,
    },
    /// The gene has no such module, or no factors for it.
    #[error("gene `{}` holds no factors of `{}`", shown(.dir), printable(.module))]
    NoFactors {
        /// The gene's folder.
        dir: PathBuf,
        /// The module.
        module: String,
    },
    /// The gene has no such tensor in its rest.
    #[error("gene `{}` holds no difference of `{}`", shown(.dir), printable(.tensor))]
    NoRest {
        /// The gene's folder.
        dir: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A NaN or an infinity among the values.
    #[error("`{}` is not finite at flat index {index}", printable(.name))]
    NonFinite {
        /// Module or tensor.
        name: String,
        /// Row-major index of the first.
        index: u64,
    },
    /// What the caller hands over does not fit together.
    #[error("`{}`: {problem}", printable(.name))]
    Part {
        /// Module, tensor or field.
        name: String,
        /// What does not fit.
        problem: String,
    },
    /// A gene without a difference.
    #[error("the gene would hold no difference")]
    Empty,
    /// An adapter without a module.
    #[error("the adapter would hold no module")]
    EmptyAdapter,
    /// The gene would be subtracted.
    #[error("coefficient {value} of layer {layer} is below zero")]
    NegativeCoefficient {
        /// The layer.
        layer: u32,
        /// Its coefficient.
        value: f64,
    },
    /// A coefficient that is no number an `f32` can hold.
    #[error("coefficient {value} of layer {layer} is no finite number of 32 bits")]
    CoefficientRange {
        /// The layer.
        layer: u32,
        /// Its coefficient.
        value: f64,
    },
    /// A coefficient that would have no effect.
    #[error("layer {layer} has a coefficient, but the gene holds nothing of it")]
    UnknownLayer {
        /// The layer.
        layer: u32,
    },
    /// The model is of another family.
    #[error(
        "gene of family `{}` does not fit a target of family `{}`: {first_difference}",
        printable(.gene_type),
        printable(.target_type)
    )]
    OtherFamily {
        /// `model_type` of the gene.
        gene_type: String,
        /// `model_type` of the target.
        target_type: String,
        /// The first module that differs, escaped.
        first_difference: String,
    },
    /// An expression that was made for another gene.
    #[error("the expression was made for gene `{}`, this one is `{}`", printable(.expected), printable(.found))]
    OtherGene {
        /// Content hash in the expression.
        expected: String,
        /// Content hash of the gene.
        found: String,
    },
    /// An expression that was made for another target.
    #[error("the expression was made for target `{}`, this one is `{}`", printable(.expected), printable(.found))]
    OtherTarget {
        /// Content hash in the expression.
        expected: String,
        /// Content hash of the target.
        found: String,
    },
    /// Something an adapter cannot say.
    #[error("`{}` cannot be part of an adapter: {problem}", printable(.name))]
    NoAdapter {
        /// The module.
        name: String,
        /// Why.
        problem: &'static str,
    },
}

impl GeneError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> GeneError {
        move |source| GeneError::Io { action, path: path.to_path_buf(), source }
    }

    pub(crate) fn json(file: &Path, error: &serde_json::Error) -> GeneError {
        GeneError::Json { file: file.to_path_buf(), problem: printable(&error.to_string()) }
    }

    pub(crate) fn part(name: &str, problem: impl Into<String>) -> GeneError {
        GeneError::Part { name: name.to_owned(), problem: problem.into() }
    }

    /// What to do about it, if anything short can be said.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            GeneError::Checkpoint(error) => return error.hint(),
            GeneError::NotAGene { .. } => "a gene is made by `safegene extract` or `safegene distill`",
            GeneError::Schema { .. } => "use the version of the tool that wrote it",
            GeneError::Empty => "the two checkpoints are equal; check that the right folders were named",
            GeneError::NegativeCoefficient { .. } => "a gene is only added, never subtracted",
            GeneError::OtherFamily { .. } => "extract a gene from checkpoints of the target's own family",
            GeneError::OtherGene { .. } | GeneError::OtherTarget { .. } => {
                "calibrate again for this pair, or use `--force`"
            }
            GeneError::NoAdapter { .. } => "fuse with `--as merged` instead",
            _ => return None,
        };
        Some(hint.to_owned())
    }
}
