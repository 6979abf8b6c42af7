//! Folders of safetensors seen as named tensors, and the way back.
//!
//! A [`Checkpoint`] is a model folder, or a PEFT LoRA folder over one; it answers with names, shapes and values of the
//! model that the folder stands for. Its [`Unit`]s are the same model in canonical form: experts taken apart, their
//! matrices [out, in], fp8 scales with their weights. A [`FolderWriter`] makes a new folder appear whole or not at all.
//! Everything read here came from somebody else: lengths, offsets, shapes, names and links are checked before anything
//! is allocated, and a refusal names the tensor and the file.
//!
//! Not here: GPUs, matrix algebra beyond adding an adapter to its weight, printing, downloading, and the environment.

mod adapter;
mod catalogue;
mod config;
mod content;
mod dtype;
mod error;
mod experts;
mod files;
mod header;
mod io;
mod layout;
mod model;
mod quantized;
mod scales;
mod shards;
mod units;
mod values;
mod write;

pub use adapter::{Adapter, AdapterConfig, AdapterModule, Factors};
pub use catalogue::{Role, module_of, role};
pub use config::ModelConfig;
pub use content::{content_line, content_of};
pub use dtype::Dtype;
pub use error::{CheckpointError, HeaderError, Result, printable};
pub use files::{JSON_BYTES_MAX, open_inside, read_json};
pub use header::{HEADER_BYTES_MAX, Header, HeaderEntry, parse_header};
pub use io::{cached_share_of, forget};
pub use layout::{INDEX_FILE, MODEL_FILE, ShardPlan, aligned_order, index_json, shard_plan};
pub use model::Checkpoint;
pub use shards::{ShardSet, TensorInfo};
pub use units::{BlockScale, Slice, Unit};
pub use values::{pack_f32, widen_f32};
pub use write::{
    FolderWriter, PARTIAL_MARKER, PartialFolder, PlacedShard, ShardWriter, TensorSpec, default_metadata,
    safetensors_bytes, safetensors_header,
};
