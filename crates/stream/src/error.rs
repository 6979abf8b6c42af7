//! Why an extraction or a fuse was refused.

use std::path::{Path, PathBuf};

use checkpoint::{CheckpointError, Dtype, printable};
use gene::GeneError;
use kernels::KernelError;
use lowrank::LowRankError;

/// The result of a stream.
pub type Result<T> = std::result::Result<T, StreamError>;

fn shown(path: &Path) -> String {
    printable(&path.to_string_lossy())
}

/// Why an extraction or a fuse was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// A folder could not be read or written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A gene could not be read or written, or does not fit.
    #[error(transparent)]
    Gene(#[from] GeneError),
    /// The two checkpoints are not of one architecture.
    #[error("`{}` is {aligned_kind}, `{}` is {degraded_kind}", shown(.aligned), shown(.degraded))]
    OtherArchitecture {
        /// The aligned folder.
        aligned: PathBuf,
        /// Its architecture.
        aligned_kind: String,
        /// The degraded folder.
        degraded: PathBuf,
        /// Its architecture.
        degraded_kind: String,
    },
    /// A tensor has one shape here and another there.
    #[error(
        "tensor `{}` is {aligned:?} in `{}` and {degraded:?} in `{}`",
        printable(.tensor), shown(.aligned_file), shown(.degraded_file)
    )]
    OtherShape {
        /// The tensor.
        tensor: String,
        /// Its aligned shape.
        aligned: Vec<u64>,
        /// The file of that.
        aligned_file: PathBuf,
        /// Its degraded shape.
        degraded: Vec<u64>,
        /// The file of that.
        degraded_file: PathBuf,
    },
    /// A tensor is in one checkpoint only.
    #[error("tensor `{}` of `{}` is missing from `{}`", printable(.tensor), shown(.file), shown(.missing_from))]
    OneSided {
        /// The tensor.
        tensor: String,
        /// The file that holds it.
        file: PathBuf,
        /// The folder that does not.
        missing_from: PathBuf,
    },
    /// A number format that cannot be subtracted or added to.
    #[error("tensor `{}` in `{}` is {dtype}, which cannot be computed with", printable(.tensor), shown(.file))]
    UnsupportedDtype {
        /// The tensor.
        tensor: String,
        /// Its file.
        file: PathBuf,
        /// Its format.
        dtype: Dtype,
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
    /// An operation on a tensor failed.
    #[error("cannot compute with tensor `{}` of `{}`", printable(.tensor), shown(.file))]
    Kernel {
        /// The tensor.
        tensor: String,
        /// Its file.
        file: PathBuf,
        /// What failed.
        source: KernelError,
    },
    /// A tensor could not be factored.
    #[error("cannot factor tensor `{}`", printable(.tensor))]
    LowRank {
        /// The tensor.
        tensor: String,
        /// What failed.
        source: LowRankError,
    },
    /// Weights with scales cannot be added to in place.
    #[error("tensor `{}` in `{}` is stored in 8 bits with scales, which cannot be added to", printable(.tensor), shown(.file))]
    ScaledTarget {
        /// The tensor.
        tensor: String,
        /// Its file.
        file: PathBuf,
    },
    /// A header could not be made.
    #[error("cannot write a file like `{}`: {problem}", shown(.file))]
    Layout {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Shares of an output that cannot be shared.
    #[error("only a merged model is made in shares, not an adapter")]
    NoShares,
    /// Told to stop.
    #[error("interrupted after {done} of {of} tensors")]
    Interrupted {
        /// Finished in this run.
        done: u64,
        /// Of those that were left.
        of: u64,
    },
    /// Not all workers are done.
    #[error("{missing} of {of} tensors are not there yet, such as `{}`", printable(.example))]
    Incomplete {
        /// How many.
        missing: u64,
        /// Of all.
        of: u64,
        /// One of them.
        example: String,
    },
    /// Journals of different work beside one output.
    #[error("`{}` is about other inputs or options than the journals beside it", shown(.journal))]
    OtherWork {
        /// The journal.
        journal: PathBuf,
    },
    /// Factors of something that is no linear module.
    #[error("tensor `{}` is no linear module", printable(.tensor))]
    NotLinear {
        /// The tensor.
        tensor: String,
    },
    /// Nothing to put together.
    #[error("there is no unfinished work for `{}`", shown(.out))]
    NoWork {
        /// The output.
        out: PathBuf,
    },
    /// The two checkpoints are equal.
    #[error("`{}` and `{}` are equal in every tensor", shown(.aligned), shown(.degraded))]
    NothingDiffers {
        /// The aligned folder.
        aligned: PathBuf,
        /// The degraded folder.
        degraded: PathBuf,
    },
    /// A fuse that would leave every weight as it was.
    #[error("fusing the gene into `{}` changes no weight", shown(.target))]
    NothingChanged {
        /// The target folder.
        target: PathBuf,
    },
    /// The gene holds changes that an adapter cannot hold.
    #[error("an adapter cannot hold {count} of the gene's tensors, such as `{}`", printable(.example))]
    RestInAdapter {
        /// How many.
        count: usize,
        /// One of them.
        example: String,
    },
    /// The gene changes a tensor that the target does not have in that shape.
    #[error("the gene changes tensor `{}` of shape {shape:?}, which `{}` does not have", printable(.tensor), shown(.target))]
    NoSuchTarget {
        /// The tensor.
        tensor: String,
        /// Its shape in the gene.
        shape: Vec<u64>,
        /// The target folder.
        target: PathBuf,
    },
    /// A coefficient for what is outside the layers that is negative or no number.
    #[error("coefficient {value} for what is outside the layers is not a number of 0 or more")]
    OutsideCoefficient {
        /// The coefficient.
        value: f32,
    },
}

impl StreamError {
    /// An engine's error, with the tensor and its file; an element that is not finite has a variant of its own.
    pub(crate) fn kernel(tensor: &str, file: &Path, source: KernelError) -> StreamError {
        let (tensor, file) = (tensor.to_owned(), file.to_path_buf());
        match source {
            KernelError::NonFinite { index, .. } => StreamError::NonFinite { tensor, file, index },
            source => StreamError::Kernel { tensor, file, source },
        }
    }

    /// Whether the device, not an input, is at fault: its memory has run out, or a call of its driver failed.
    pub fn is_of_device(&self) -> bool {
        let source = match self {
            StreamError::Kernel { source, .. } => source,
            StreamError::LowRank { source: LowRankError::Kernel(source), .. } => source,
            _ => return false,
        };
        matches!(source, KernelError::Device { .. } | KernelError::DeviceMemory { .. })
    }

    /// What to do about it, if there is something to say.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            StreamError::Checkpoint(error) => return error.hint(),
            StreamError::Gene(error) => return error.hint(),
            error if error.is_of_device() => {
                "another program may hold the device's memory; a smaller `--memory-budget` needs less of it, and `--device cpu` none"
            }
            StreamError::OtherArchitecture { .. } | StreamError::OtherShape { .. } => {
                "both checkpoints have to be fine-tunes of one model"
            }
            StreamError::OneSided { .. } => "the folder may be a partial download",
            StreamError::UnsupportedDtype { .. } => "convert the checkpoint to bf16 first",
            StreamError::NonFinite { .. } => "the checkpoint is damaged, or its training diverged",
            StreamError::ScaledTarget { .. } => {
                "fuse with `--dequantize` (the output is bf16), or as an adapter"
            }
            StreamError::NoShares => "leave `--worker` out, or fuse `--as merged`",
            StreamError::Interrupted { .. } => "the same command goes on where it stopped",
            StreamError::Incomplete { .. } => "run the workers that are missing, then assemble again",
            StreamError::OtherWork { .. } => "remove the partial folder, or run the workers again",
            StreamError::NothingDiffers { .. } => "check that the two folders are not the same model",
            StreamError::NothingChanged { .. } => {
                "the coefficients may be too small for the number format of the target"
            }
            StreamError::RestInAdapter { .. } => {
                "fuse as merged, or leave these changes out with `--drop-rest`"
            }
            StreamError::OutsideCoefficient { .. } => "a gene is only ever added",
            _ => return None,
        };
        Some(hint.to_owned())
    }
}
