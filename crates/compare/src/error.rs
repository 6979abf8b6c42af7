//! Why a comparison could not be made.

use std::path::PathBuf;

/// Why a comparison could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompareError {
    /// A lab model could not be trained or read.
    #[error(transparent)]
    Lab(#[from] lab::LabError),
    /// A model could not be run.
    #[error(transparent)]
    Model(#[from] transformer::ModelError),
    /// A folder could not be read or written.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::CheckpointError),
    /// A gene could not be extracted.
    #[error(transparent)]
    Stream(#[from] stream::StreamError),
    /// A gene could not be read or written.
    #[error(transparent)]
    Gene(#[from] gene::GeneError),
    /// Nothing was distilled.
    #[error(transparent)]
    Distill(#[from] distill::distillation::DistillError),
    /// Layers could not be scored.
    #[error(transparent)]
    Select(#[from] distill::select::SelectError),
    /// No coefficients were found.
    #[error(transparent)]
    Calibration(#[from] distill::CalibrationError),
    /// A rival could not be run.
    #[error(transparent)]
    Recover(#[from] recover::RecoverError),
    /// A rival that runs the model could not be run.
    #[error(transparent)]
    Rival(#[from] recover::RunError),
    /// A drift is not what a drift must be.
    #[error("`{drift}` of family `{family}`, seed {seed}: {what} is {value:.3}; a drift needs {need}")]
    Gate {
        /// Family.
        family: String,
        /// Seed.
        seed: u64,
        /// The drift.
        drift: String,
        /// Which rate.
        what: &'static str,
        /// Its value.
        value: f64,
        /// What it needs to be.
        need: &'static str,
    },
    /// Two splits share a prompt.
    #[error("the splits `{a}` and `{b}` share the prompt `{prompt}`")]
    Leak {
        /// A split.
        a: String,
        /// Another.
        b: String,
        /// What they share.
        prompt: String,
    },
    /// The roots of a family are not there.
    #[error("`{}` holds no `base` and `aligned` of the family `{family}`", folder.display())]
    NoRoots {
        /// The family.
        family: String,
        /// Where they were looked for.
        folder: PathBuf,
    },
    /// A work folder belongs to other roots than the lab's.
    #[error("the {model} model in `{}` is not the one in `{}`", folder.display(), lab.display())]
    OtherLab {
        /// `base` or `aligned`.
        model: &'static str,
        /// The family in the lab.
        lab: PathBuf,
        /// The family in the work folder.
        folder: PathBuf,
    },
    /// A folder was made by other settings.
    #[error("`{}` was made by other settings", folder.display())]
    OtherWork {
        /// The folder.
        folder: PathBuf,
    },
    /// Records came from another base or aligned model.
    #[error(
        "the records of `{family}`, seed {seed}, came from another base or aligned model than the lab has"
    )]
    OtherRoots {
        /// Family.
        family: String,
        /// Seed.
        seed: u64,
    },
    /// A report lacks records of what it says is finished.
    #[error("`{}` says that `{family}`, seed {seed}, is finished, and lacks records of it", folder.display())]
    NotWhole {
        /// The folder.
        folder: PathBuf,
        /// Family.
        family: String,
        /// Seed.
        seed: u64,
    },
    /// A folder is no report to go on from.
    #[error("`{}` is no report of a comparison: it has no `recipe.json`", folder.display())]
    NoReport {
        /// The folder.
        folder: PathBuf,
    },
    /// A file of the work folder could not be used.
    #[error("cannot {action} `{}`: {problem}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What went wrong.
        problem: String,
    },
    /// It was told to stop.
    #[error("stopped; run it again to go on")]
    Stopped,
}

impl From<candle_core::Error> for CompareError {
    fn from(e: candle_core::Error) -> Self {
        Self::Model(e.into())
    }
}

impl CompareError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoRoots { family, .. } => {
                Some(format!("`safegene lab build --roots-only --family {family} --seed 1` makes them"))
            }
            Self::OtherWork { .. } => {
                Some("records of two recipes are never mixed: name another folder, or remove this one".into())
            }
            Self::OtherRoots { .. } | Self::OtherLab { .. } => {
                Some("name the lab they were made with, or begin another work folder".into())
            }
            Self::NotWhole { .. } => Some("copy the whole report again".into()),
            Self::NoReport { .. } => Some("--from takes the --out folder of an earlier comparison".into()),
            _ => None,
        }
    }
}
