//! Bytes that somebody else wrote, fed to the readers that have to survive them.
//!
//! A target takes the bytes of one file, puts it where a reader expects it, beside small valid files, and reads. It
//! returns whether the bytes were accepted, and panics where the reader breaks a promise: no panic of its own, no more
//! than [`PEAK_BYTES`] and [`PEAK_PER_BYTE`] of memory, and what is accepted is what it says (a header's tensors tile the
//! file and can be read, a gene's modules can be read or give an ordinary error).
//!
//! Folders are made once per thread, under the system's folder for temporary files.
//!
//! Not here: where the bytes come from; see `tests/replay.rs` and `harness/`.

// A target is a row of assertions, and what it builds by itself has to work.
#![allow(clippy::unwrap_used, clippy::panic)]

mod adapter;
mod checkpoint_file;
mod gene_file;
mod index;
mod memory;
mod mutate;
mod rows;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use checkpoint::{Dtype, TensorSpec, default_metadata, pack_f32, safetensors_bytes};
use serde_json::Value;
use tempfile::TempDir;

pub use adapter::adapter_config;
pub use checkpoint_file::header;
pub use gene_file::gene_manifest;
pub use index::index;
pub use memory::{PEAK_BYTES, PEAK_PER_BYTE};
pub use mutate::{Random, mutated, repaired_header};
pub use rows::data_rows;

/// Longest input that is looked at; longer ones are left out, as they find nothing that short ones do not.
pub const INPUT_BYTES_MAX: usize = 1 << 18;

/// A function of the bytes of one file; whether they were accepted.
pub type Target = fn(&[u8]) -> bool;

/// Every target by name, which is also that of its folder in `corpus/`.
pub const TARGETS: [(&str, Target); 5] = [
    ("header", header),
    ("index", index),
    ("adapter_config", adapter_config),
    ("gene_manifest", gene_manifest),
    ("data_rows", data_rows),
];

/// A folder that lives as long as its thread, with what `fill` puts there.
fn folder(fill: impl FnOnce(&Path)) -> TempDir {
    let dir = TempDir::with_prefix("safegene-fuzz-").unwrap();
    fill(dir.path());
    dir
}

/// Puts an input where a reader expects it. In place: a file that is cut to nothing and written again goes to the disk at
/// once on common file systems, and thousands of inputs would wait for it.
fn put(path: &Path, bytes: &[u8]) {
    let mut file = File::options().write(true).create(true).truncate(false).open(path).unwrap();
    file.write_all(bytes).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
}

type Tensor = (TensorSpec, Vec<u8>);

/// A tensor of values that differ from each other and are exact in bf16.
fn tensor(name: &str, dtype: Dtype, shape: &[u64], start: f32) -> Tensor {
    let values: Vec<f32> = (0..shape.iter().product()).map(|n: u64| start + n as f32 * 0.25).collect();
    ((name.to_owned(), dtype, shape.to_vec()), pack_f32(&values, dtype).unwrap())
}

const Q: &str = "model.layers.0.self_attn.q_proj";
const UP: &str = "model.layers.1.mlp.up_proj";
const NORM: &str = "model.layers.1.input_layernorm.weight";
const EMBED: &str = "model.embed_tokens.weight";

/// A model of two layers: [4, 6], [5, 6], a norm of 6, an embedding of [8, 6].
fn model() -> Vec<Tensor> {
    vec![
        tensor(EMBED, Dtype::F32, &[8, 6], 0.0),
        tensor(&format!("{Q}.weight"), Dtype::F32, &[4, 6], -2.0),
        tensor(NORM, Dtype::F32, &[6], 1.0),
        tensor(&format!("{UP}.weight"), Dtype::F32, &[5, 6], -3.0),
    ]
}

fn save(dir: &Path, file: &str, tensors: &[Tensor]) -> PathBuf {
    fs::create_dir_all(dir).unwrap();
    let path = dir.join(file);
    fs::write(&path, safetensors_bytes(&default_metadata(), tensors).unwrap()).unwrap();
    path
}

fn save_json(dir: &Path, file: &str, value: &Value) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join(file), value.to_string()).unwrap();
}
