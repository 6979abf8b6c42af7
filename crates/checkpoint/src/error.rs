//! Why a folder was refused or could not be written.
//!
//! Variants carry the tensor, the file and both numbers. Names from files are shown with control characters escaped and
//! cut at 200 characters. Advice is never part of the message: see [`CheckpointError::hint`].

use std::io;
use std::path::{Path, PathBuf};

use crate::dtype::Dtype;

/// What this crate returns.
pub type Result<T, E = CheckpointError> = std::result::Result<T, E>;

/// A name from a file, fit for a terminal: control and direction characters escaped, at most 200 characters kept.
pub fn printable(name: &str) -> String {
    const KEPT_MAX: usize = 200;
    let mut shown = String::with_capacity(name.len().min(KEPT_MAX));
    for (n, c) in name.chars().enumerate() {
        if n == KEPT_MAX {
            shown.push('…');
            break;
        }
        let steers_text = matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
        if c.is_control() || steers_text {
            shown.extend(c.escape_unicode());
        } else {
            shown.push(c);
        }
    }
    shown
}

fn shown(path: &Path) -> String {
    printable(&path.to_string_lossy())
}

fn quantized(tensor: Option<&str>, file: &Path, format: &str) -> String {
    let (file, format) = (shown(file), printable(format));
    match tensor {
        Some(tensor) => {
            format!("tensor `{}` in `{file}` is stored as {format}, which is not read", printable(tensor))
        }
        None => format!("weights stored as {format} are not read (`{file}`)"),
    }
}

/// What to do with a folder in a quantized format; `seen` if a tensor showed the format, not only the config.
fn way_out(seen: bool, format: &str) -> String {
    let hint = match format {
        "GGUF" => return "use the safetensors folder that the GGUF file was made from".to_owned(),
        "MXFP4" => {
            "dequantize it to bf16 first: load it with transformers and `Mxfp4Config(dequantize=True)`, then save it"
        }
        "bitsandbytes" => {
            "dequantize it to bf16 first: load it with transformers, call `dequantize()`, then save it"
        }
        "NVFP4" | "F4" | "F6" => {
            "dequantize it to bf16 first, or use the checkpoint that it was quantized from"
        }
        _ => "dequantize it to bf16 first, for example by loading it with transformers and saving it",
    };
    if seen {
        return hint.to_owned();
    }
    format!("{hint}; if the weights are plain already, take `quantization_config` out of config.json")
}

/// Why the header of one safetensors file was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Fewer than the eight bytes of the header length.
    #[error("file has {file_bytes} bytes, a header length alone needs 8")]
    TooShort {
        /// Length of the file.
        file_bytes: u64,
    },
    /// The header claims more than the format's limit.
    #[error("header length {header_bytes} is over the limit of {limit_bytes} bytes")]
    TooLong {
        /// Claimed length.
        header_bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// The header ends after the file does.
    #[error("header of {header_bytes} bytes does not fit in a file of {file_bytes} bytes")]
    PastEnd {
        /// Claimed length.
        header_bytes: u64,
        /// Length of the file.
        file_bytes: u64,
    },
    /// The header is not the JSON object that the format asks for.
    #[error("header is not valid: {detail}")]
    Json {
        /// What the JSON reader said, escaped.
        detail: String,
    },
    /// A name occurs twice.
    #[error("name `{}` occurs twice in the header", printable(.tensor))]
    DuplicateName {
        /// The name.
        tensor: String,
    },
    /// A dtype that the format does not have.
    #[error("tensor `{}`: dtype `{}` is unknown", printable(.tensor), printable(.dtype))]
    UnknownDtype {
        /// The tensor.
        tensor: String,
        /// What the header says.
        dtype: String,
    },
    /// Shape and dtype give a size that does not fit in 64 bits or is no whole number of bytes.
    #[error("tensor `{}`: shape {shape} of {dtype} is no possible number of bytes", printable(.tensor))]
    ShapeOverflow {
        /// The tensor.
        tensor: String,
        /// Its shape, as text.
        shape: String,
        /// Its dtype.
        dtype: Dtype,
    },
    /// The byte range is not the size that dtype and shape ask for.
    #[error("tensor `{}`: dtype and shape need {need_bytes} bytes, header range holds {range_bytes}", printable(.tensor))]
    SizeMismatch {
        /// The tensor.
        tensor: String,
        /// From dtype and shape.
        need_bytes: u64,
        /// From the offsets.
        range_bytes: u64,
    },
    /// A range that ends before it starts.
    #[error("tensor `{}`: range {start}..{end} ends before it starts", printable(.tensor))]
    RangeReversed {
        /// The tensor.
        tensor: String,
        /// First byte.
        start: u64,
        /// One past the last.
        end: u64,
    },
    /// A range that begins inside the one before.
    #[error("tensor `{}`: range starts at {start}, inside the tensor before it, which ends at {expected}", printable(.tensor))]
    Overlap {
        /// The tensor.
        tensor: String,
        /// Where it starts.
        start: u64,
        /// Where it should.
        expected: u64,
    },
    /// Bytes that belong to no tensor.
    #[error("tensor `{}`: range starts at {start}, the tensor before it ends at {expected}", printable(.tensor))]
    Gap {
        /// The tensor after the gap.
        tensor: String,
        /// Where it starts.
        start: u64,
        /// Where it should.
        expected: u64,
    },
    /// The tensors do not end where the file does.
    #[error("header describes {need_bytes} bytes of tensors, file holds {data_bytes}")]
    DataLength {
        /// From the header.
        need_bytes: u64,
        /// What the file has after its header.
        data_bytes: u64,
    },
}

/// Why a checkpoint was refused or an output could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The operating system said no.
    #[error("cannot {action} `{}`", shown(.path))]
    Io {
        /// `read`, `write`, `create`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// A file's header is not valid.
    #[error("cannot read `{}`", shown(.file))]
    Header {
        /// The file.
        file: PathBuf,
        /// What is wrong in it.
        source: HeaderError,
    },
    /// Neither a model nor an adapter.
    #[error("folder `{}` holds no weights", shown(.dir))]
    NoWeights {
        /// The folder.
        dir: PathBuf,
    },
    /// Only pickles, which are never opened.
    #[error("folder `{}` holds weights only as pickles (`{}`), which are never opened", shown(.dir), printable(.file))]
    PickleOnly {
        /// The folder.
        dir: PathBuf,
        /// One of them.
        file: String,
    },
    /// Two layouts in one folder that do not say the same.
    #[error("folder `{}` is ambiguous: {detail}", shown(.dir))]
    Ambiguous {
        /// The folder.
        dir: PathBuf,
        /// Which two.
        detail: &'static str,
    },
    /// A file that the index names is not there.
    #[error("shard `{}` named by `{}` is missing", shown(.shard), shown(.index))]
    MissingShard {
        /// The index.
        index: PathBuf,
        /// The shard.
        shard: PathBuf,
    },
    /// A shard name that is absolute, climbs, or is no safetensors file.
    #[error("shard name `{}` in `{}` is not a plain path to a safetensors file inside the folder", printable(.shard), shown(.index))]
    ShardPath {
        /// The index.
        index: PathBuf,
        /// The name.
        shard: String,
    },
    /// The index names a tensor that its shard lacks.
    #[error("tensor `{}` is in the index but not in `{}`", printable(.tensor), shown(.file))]
    AbsentTensor {
        /// The tensor.
        tensor: String,
        /// The shard the index names.
        file: PathBuf,
    },
    /// A shard holds a tensor that the index does not place there.
    #[error("tensor `{}` in `{}` is not in the index", printable(.tensor), shown(.file))]
    UnindexedTensor {
        /// The tensor.
        tensor: String,
        /// The shard.
        file: PathBuf,
    },
    /// One tensor in two shards.
    #[error("tensor `{}` is in `{}` and in `{}`", printable(.tensor), shown(.first), shown(.second))]
    DuplicateTensor {
        /// The tensor.
        tensor: String,
        /// One shard.
        first: PathBuf,
        /// Another.
        second: PathBuf,
    },
    /// A link whose target is neither in the folder nor in its Hub cache.
    #[error("`{}` is a link that leads out of its folder, to `{}`", shown(.file), shown(.target))]
    LinkOut {
        /// The link.
        file: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },
    /// A folder, a pipe or a device where a file should be.
    #[error("`{}` is not a regular file", shown(.file))]
    NotAFile {
        /// What was found.
        file: PathBuf,
    },
    /// A JSON file that is not what its reader needs.
    #[error("`{}` is not valid: {detail}", shown(.file))]
    Json {
        /// The file.
        file: PathBuf,
        /// What is wrong, escaped.
        detail: String,
    },
    /// A small file that is not small.
    #[error("`{}` has {bytes} bytes, over the limit of {limit_bytes}", shown(.file))]
    TooLarge {
        /// The file.
        file: PathBuf,
        /// Its length.
        bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// A config lacks a key or has it in a wrong form.
    #[error("`{}`: {problem}", shown(.file))]
    Config {
        /// The file.
        file: PathBuf,
        /// What is wrong, escaped.
        problem: String,
    },
    /// An adapter of a kind that cannot be expressed as low-rank factors.
    #[error("adapter `{}` is not supported: {what}", shown(.file))]
    UnsupportedAdapter {
        /// The adapter's config or weights.
        file: PathBuf,
        /// The key and its value, escaped.
        what: String,
    },
    /// A tensor of an adapter that is no LoRA factor.
    #[error("tensor `{}` in `{}` is no factor that can be read: {what}", printable(.tensor), shown(.file))]
    AdapterTensor {
        /// The tensor.
        tensor: String,
        /// The adapter's weights.
        file: PathBuf,
        /// Why.
        what: String,
    },
    /// The adapter's base folder cannot be found.
    #[error("base `{}` of adapter `{}` is no folder here", printable(.base), shown(.adapter))]
    NoBase {
        /// The adapter folder.
        adapter: PathBuf,
        /// What it or the caller named, empty if nothing.
        base: String,
    },
    /// The folder given as a base is itself an adapter.
    #[error("base `{}` of adapter `{}` is itself an adapter", shown(.base), shown(.adapter))]
    BaseIsAdapter {
        /// The adapter folder.
        adapter: PathBuf,
        /// Its base.
        base: PathBuf,
    },
    /// The adapter does not fit its base.
    #[error("adapter `{}` is for another base than `{}`: tensor `{}` {detail}", shown(.adapter), shown(.base), printable(.tensor))]
    AdapterOtherBase {
        /// The adapter folder.
        adapter: PathBuf,
        /// The base folder.
        base: PathBuf,
        /// The tensor of the base.
        tensor: String,
        /// What does not fit.
        detail: String,
    },
    /// No such tensor in the checkpoint.
    #[error("no tensor `{}` in `{}`", printable(.tensor), shown(.dir))]
    UnknownTensor {
        /// The tensor.
        tensor: String,
        /// The folder.
        dir: PathBuf,
    },
    /// A dtype without a plain numeric reading.
    #[error("tensor `{}` in `{}` is {dtype}, which is not read as numbers", printable(.tensor), shown(.file))]
    UnsupportedDtype {
        /// The tensor.
        tensor: String,
        /// Its file.
        file: PathBuf,
        /// Its dtype.
        dtype: Dtype,
    },
    /// A NaN or an infinity in a weight.
    #[error("tensor `{}` in `{}` is not finite at flat index {index}", printable(.tensor), shown(.file))]
    NonFinite {
        /// The tensor.
        tensor: String,
        /// Its file.
        file: PathBuf,
        /// Row-major index of the first.
        index: u64,
    },
    /// Codes of a quantized format that is not read.
    #[error("{}", quantized(.tensor.as_deref(), .file, .format))]
    Quantized {
        /// The tensor that gave it away; `None` if it was the config or the kind of file.
        tensor: Option<String>,
        /// The tensor's file, the config, or the weights.
        file: PathBuf,
        /// The format's name.
        format: String,
    },
    /// An fp8 weight whose scale is missing, of the wrong shape, or not the only one.
    #[error("scale of tensor `{}` in `{}` {}", printable(.tensor), shown(.file), printable(.problem))]
    Scale {
        /// The weight.
        tensor: String,
        /// The weight's file.
        file: PathBuf,
        /// What is wrong, to be read after "scale of …".
        problem: String,
    },
    /// A scale that is no positive finite number.
    #[error("scale in tensor `{}` in `{}` is not finite and above zero at flat index {index}", printable(.tensor), shown(.file))]
    ScaleValue {
        /// The tensor with the scales.
        tensor: String,
        /// Its file.
        file: PathBuf,
        /// Row-major index of the first.
        index: u64,
    },
    /// A tensor of a layer whose matrices cannot be told apart.
    #[error("tensor `{}` in `{}` cannot be taken apart for model type `{}`: {problem}", printable(.tensor), shown(.file), printable(.model_type))]
    Layout {
        /// The tensor.
        tensor: String,
        /// Its file.
        file: PathBuf,
        /// `model_type` of the config, and of its `text_config` if that differs.
        model_type: String,
        /// What is wrong or unknown.
        problem: String,
    },
    /// Rows or a buffer that do not fit the unit they are for.
    #[error("unit `{}` cannot be read: {}", printable(.unit), printable(.problem))]
    UnitRange {
        /// The unit.
        unit: String,
        /// What does not fit.
        problem: String,
    },
    /// The output is already there.
    #[error("output `{}` exists", shown(.out))]
    OutputExists {
        /// The output.
        out: PathBuf,
    },
    /// What is in the way was not written by this tool, so it is not removed even with force.
    #[error("`{}` is in the way and does not look like an output of this tool", shown(.found))]
    OutputForeign {
        /// What is in the way.
        found: PathBuf,
    },
    /// Another process is writing the same output.
    #[error("output `{}` is being written by another process", shown(.out))]
    OutputBusy {
        /// The output.
        out: PathBuf,
    },
    /// An output path without a last component.
    #[error("output `{}` has no folder name", shown(.out))]
    OutputName {
        /// The output.
        out: PathBuf,
    },
    /// A file name for the output folder that is no plain name.
    #[error("`{}` is no plain file name", printable(.name))]
    FileName {
        /// The name.
        name: String,
    },
    /// What the caller writes is not what it announced.
    #[error("`{}`: {problem}", shown(.file))]
    WriteOrder {
        /// The file.
        file: PathBuf,
        /// Which rule was broken.
        problem: String,
    },
}

impl CheckpointError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CheckpointError {
        move |source| CheckpointError::Io { action, path: path.to_path_buf(), source }
    }

    pub(crate) fn config(file: &Path, problem: impl AsRef<str>) -> CheckpointError {
        CheckpointError::Config { file: file.to_path_buf(), problem: printable(problem.as_ref()) }
    }

    pub(crate) fn json(file: &Path, error: &serde_json::Error) -> CheckpointError {
        CheckpointError::Json { file: file.to_path_buf(), detail: printable(&error.to_string()) }
    }

    /// What to do about it, if anything short can be said.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            CheckpointError::Header {
                source:
                    HeaderError::TooShort { .. } | HeaderError::PastEnd { .. } | HeaderError::DataLength { .. },
                ..
            } => "the file may be a partial download; compare its length with the published one",
            CheckpointError::Header { source: HeaderError::TooLong { .. }, .. } => {
                "the file is probably no safetensors file; a Git LFS pointer or an error page looks like this"
            }
            CheckpointError::NoWeights { .. } => {
                "a model folder has `model.safetensors` or `model.safetensors.index.json`; an adapter folder has \
                 `adapter_config.json`"
            }
            CheckpointError::PickleOnly { .. } => {
                "convert the weights to safetensors first, in a sandbox if you do not trust them"
            }
            CheckpointError::MissingShard { .. } => "the download may be incomplete",
            CheckpointError::AbsentTensor { .. }
            | CheckpointError::UnindexedTensor { .. }
            | CheckpointError::DuplicateTensor { .. } => {
                "the folder may mix two sets of shards; download it again into an empty folder"
            }
            CheckpointError::LinkOut { .. } => {
                "links may point inside the folder or, in a Hub cache, to `blobs/`; copy the file instead"
            }
            CheckpointError::NoBase { .. } => "name the base folder with `--base DIR`; nothing is downloaded",
            CheckpointError::BaseIsAdapter { .. } => {
                "merge the inner adapter first, then use the merged folder as base"
            }
            CheckpointError::AdapterOtherBase { .. } => {
                "check `base_model_name_or_path`; an adapter that resized or untied the embeddings must be merged first"
            }
            CheckpointError::UnsupportedAdapter { .. } => "merge the adapter into its base first",
            CheckpointError::Quantized { tensor, format, .. } => {
                return Some(way_out(tensor.is_some(), format));
            }
            CheckpointError::Scale { .. } | CheckpointError::ScaleValue { .. } => {
                "each fp8 weight needs one scale tensor, and blocks need `quantization_config.weight_block_size` in \
                 config.json; compare with the published folder, or dequantize it to bf16 first"
            }
            CheckpointError::Layout { .. } => {
                "save it so that every expert has matrices of its own, for example by loading it with transformers and \
                 saving it"
            }
            CheckpointError::UnsupportedDtype { .. } => "convert the checkpoint to bf16, f16 or f32 first",
            CheckpointError::OutputExists { .. } => "use another path, or `--force` to replace it",
            CheckpointError::OutputForeign { .. } => "move it away yourself, or use another path",
            CheckpointError::OutputBusy { .. } => "wait for the other process, or use another path",
            CheckpointError::Io { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull => "free some space; the inputs are untouched",
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                    "check the permissions of the folder"
                }
                _ => return None,
            },
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn printable_escapes_terminal_control() {
        assert_eq!(printable("a\u{1b}[2Jb\nc"), "a\\u{1b}[2Jb\\u{a}c");
        assert_eq!(printable("safe\u{202e}txt"), "safe\\u{202e}txt");
        assert_eq!(printable("größe.层"), "größe.层");
    }

    #[test]
    fn printable_cuts_long_names() {
        assert_eq!(printable(&"x".repeat(5000)).chars().count(), 201);
    }

    #[test]
    fn messages_escape_the_names_they_carry() {
        let error = HeaderError::DuplicateName { tensor: "w\u{1b}]0;x\u{7}".into() };
        assert!(!error.to_string().chars().any(char::is_control));
    }
}
