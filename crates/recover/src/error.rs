//! Why a recovery was refused.

use std::path::{Path, PathBuf};

use checkpoint::{CheckpointError, Dtype, printable};
use gene::GeneError;
use kernels::KernelError;
use lowrank::LowRankError;

use crate::registry::{METHODS, Need};
use crate::run_error::RunError;

/// The result of a recovery.
pub type Result<T> = std::result::Result<T, RecoverError>;

fn shown(path: &Path) -> String {
    printable(&path.to_string_lossy())
}

/// Why a recovery was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecoverError {
    /// A folder could not be read or written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// An adapter's config could not be made.
    #[error(transparent)]
    Gene(#[from] GeneError),
    /// No method has this name.
    #[error("there is no method `{}`", printable(.name))]
    UnknownMethod {
        /// The name.
        name: String,
    },
    /// A method was not given what it needs.
    #[error("`{method}` needs {need}")]
    Missing {
        /// The method.
        method: &'static str,
        /// What it needs.
        need: Need,
    },
    /// An option has a value that makes no sense.
    #[error("`{option}` of `{method}` is {value}, which is not {allowed}")]
    Option {
        /// The method.
        method: &'static str,
        /// The option.
        option: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        allowed: &'static str,
    },
    /// An option that belongs to other methods.
    #[error("`{method}` has no option `{option}`")]
    UnusedOption {
        /// The method.
        method: &'static str,
        /// The option.
        option: &'static str,
    },
    /// A method that writes models was asked for an adapter.
    #[error("`{method}` cannot write an adapter{}", if *.of_model { " of a target that is a whole model" } else { "" })]
    NoAdapter {
        /// The method.
        method: &'static str,
        /// Whether it could, had the target been an adapter.
        of_model: bool,
    },
    /// A whole model where only an adapter will do.
    #[error("`{}` is a whole model; `{method}` needs an adapter as {role}", shown(.dir))]
    NotAnAdapter {
        /// The method.
        method: &'static str,
        /// The folder.
        dir: PathBuf,
        /// Which input it is.
        role: &'static str,
    },
    /// An adapter that is not over the aligned model.
    #[error("adapter `{}` is over `{}`, which is not the aligned model `{}`", shown(.adapter), shown(.base), shown(.aligned))]
    OtherBase {
        /// The adapter.
        adapter: PathBuf,
        /// Its base.
        base: PathBuf,
        /// The aligned model.
        aligned: PathBuf,
    },
    /// Two inputs that are not of one architecture.
    #[error("`{}` is {one_kind}, `{}` is {other_kind}", shown(.one), shown(.other))]
    OtherArchitecture {
        /// A folder.
        one: PathBuf,
        /// Its architecture.
        one_kind: String,
        /// Another.
        other: PathBuf,
        /// Its architecture.
        other_kind: String,
    },
    /// A tensor that another input lacks.
    #[error("tensor `{}` of `{}` is missing from `{}`", printable(.tensor), shown(.file), shown(.missing_from))]
    OneSided {
        /// The tensor.
        tensor: String,
        /// The file that holds it.
        file: PathBuf,
        /// The folder that does not.
        missing_from: PathBuf,
    },
    /// A tensor that has one shape here and another there.
    #[error("tensor `{}` is {shape:?} in `{}` and {other_shape:?} in `{}`", printable(.tensor), shown(.file), shown(.other_file))]
    OtherShape {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
        /// The file of that.
        file: PathBuf,
        /// Its other shape.
        other_shape: Vec<u64>,
        /// The file of that.
        other_file: PathBuf,
    },
    /// The safety adapter does not change a module that has to be merged.
    #[error("safety adapter `{}` has no factors of module `{}`, which is to be merged", shown(.adapter), printable(.module))]
    NotInSafetyAdapter {
        /// The safety adapter.
        adapter: PathBuf,
        /// The module.
        module: String,
    },
    /// Factors of two adapters that cannot be averaged one by one.
    #[error("factors of module `{}` cannot be averaged one by one: {problem}", printable(.module))]
    NoAverage {
        /// The module.
        module: String,
        /// Why.
        problem: String,
    },
    /// Aligned and base are equal where they were to be compared.
    #[error("`{}` and `{}` are equal in every module that the update changes", shown(.aligned), shown(.base))]
    NothingDiffers {
        /// The aligned model.
        aligned: PathBuf,
        /// The base.
        base: PathBuf,
    },
    /// A number format that cannot be computed with, or not be written.
    #[error("tensor `{}` in `{}` is {dtype}, which cannot be {what}", printable(.tensor), shown(.file))]
    UnsupportedDtype {
        /// The tensor.
        tensor: String,
        /// Its file.
        file: PathBuf,
        /// Its format.
        dtype: Dtype,
        /// `computed with` or `written`.
        what: &'static str,
    },
    /// A weight is NaN or infinite.
    #[error("tensor `{}` in `{}`: element {index} is not finite", printable(.tensor), shown(.file))]
    NonFinite {
        /// The tensor.
        tensor: String,
        /// Its file.
        file: PathBuf,
        /// The flat index of the first such element.
        index: u64,
    },
    /// A new value that the target's format cannot hold.
    #[error("tensor `{}`: the new value of element {index} does not fit into {dtype}", printable(.tensor))]
    Overflow {
        /// The tensor.
        tensor: String,
        /// The flat index of the first such element.
        index: u64,
        /// The format.
        dtype: Dtype,
    },
    /// One module alone needs more memory than there may be.
    #[error("module `{}` alone needs {need_bytes} bytes, the limit is {limit_bytes}", printable(.module))]
    Memory {
        /// The module.
        module: String,
        /// What it needs.
        need_bytes: u64,
        /// What there may be.
        limit_bytes: u64,
    },
    /// An operation on a tensor failed.
    #[error("cannot compute with tensor `{}`", printable(.tensor))]
    Kernel {
        /// The tensor.
        tensor: String,
        /// What failed.
        source: KernelError,
    },
    /// A difference could not be factored.
    #[error("cannot factor tensor `{}`", printable(.tensor))]
    LowRank {
        /// The tensor.
        tensor: String,
        /// What failed.
        source: LowRankError,
    },
    /// A model could not be run, or what is made of it came to nothing.
    #[error("cannot run model `{}`", shown(.dir))]
    Run {
        /// Its folder.
        dir: PathBuf,
        /// Why.
        source: Box<RunError>,
    },
    /// Told to stop.
    #[error("interrupted")]
    Interrupted,
}

impl RecoverError {
    /// A failure to run the model of a folder.
    pub(crate) fn run(dir: &Path, source: impl Into<RunError>) -> RecoverError {
        match source.into() {
            RunError::Stopped => RecoverError::Interrupted,
            source => RecoverError::Run { dir: dir.to_path_buf(), source: Box::new(source) },
        }
    }

    /// Whether the device, not an input, is at fault.
    pub fn is_of_device(&self) -> bool {
        let source = match self {
            RecoverError::Kernel { source, .. } => source,
            RecoverError::LowRank { source: LowRankError::Kernel(source), .. } => source,
            _ => return false,
        };
        matches!(source, KernelError::Device { .. } | KernelError::DeviceMemory { .. })
    }

    /// What to do about it, if there is something to say.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            RecoverError::Checkpoint(error) => return error.hint(),
            RecoverError::Gene(error) => return error.hint(),
            RecoverError::Run { source, .. } => return source.hint(),
            RecoverError::UnknownMethod { .. } => {
                let names: Vec<&str> = METHODS.iter().map(|method| method.name).collect();
                return Some(format!(
                    "there are {}; `safegene recover --list` says what each needs",
                    names.join(", ")
                ));
            }
            RecoverError::Missing { need, .. } => return Some(format!("give {}", need.argument())),
            RecoverError::Option { option: "gamma" | "coefficient", .. } => {
                "safety is only ever added, never subtracted"
            }
            RecoverError::UnusedOption { .. } => {
                "`safegene recover --list` says which options each method has"
            }
            RecoverError::NoAdapter { of_model: true, .. } => "write it `--as merged`",
            RecoverError::NoAdapter { .. } => {
                "write it `--as merged`; the change of `low-rank-restore` as an adapter is `extract`, then `fuse --as adapter`"
            }
            RecoverError::NotAnAdapter { .. } => "train it as a LoRA adapter over the aligned model",
            RecoverError::OtherBase { .. } => {
                "the method is about an update of the aligned model; name the folder that the adapter was trained on"
            }
            RecoverError::OtherArchitecture { .. } | RecoverError::OtherShape { .. } => {
                "all checkpoints have to be fine-tunes of one model"
            }
            RecoverError::OneSided { .. } => "the folder may be a partial download",
            RecoverError::NotInSafetyAdapter { .. } => {
                "train the safety adapter on the same modules as the target's"
            }
            RecoverError::NoAverage { .. } => "leave out `--variant published`: ranks are concatenated then",
            RecoverError::NothingDiffers { .. } => "`--base` is the model before it was aligned",
            RecoverError::UnsupportedDtype { .. } => "convert the checkpoint to bf16 first",
            RecoverError::NonFinite { .. } => "the checkpoint is damaged, or its training diverged",
            RecoverError::Overflow { .. } => {
                "a smaller coefficient stays in range, or convert the target to bf16"
            }
            RecoverError::Memory { .. } => "raise `--memory-budget`",
            error if error.is_of_device() => {
                "another program may hold the device's memory; `--device cpu` needs none of it"
            }
            _ => return None,
        };
        Some(hint.to_owned())
    }
}
