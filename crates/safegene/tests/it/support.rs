//! The shipped family, copies of it that may be broken, and calls of the program.

use assert_cmd::Command;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A file or folder of the shipped family.
pub(crate) fn lab(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../lab/llama").canonicalize().unwrap().join(name)
}

/// The same as an argument.
pub(crate) fn lab_arg(name: &str) -> String {
    lab(name).to_str().unwrap().to_string()
}

/// What one call of the program did.
pub(crate) struct Outcome {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Calls `safegene`.
pub(crate) fn safegene(args: &[&str]) -> Outcome {
    let output = Command::cargo_bin("safegene").unwrap().args(args).output().unwrap();
    Outcome {
        code: output.status.code().unwrap(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

impl Outcome {
    /// Done, with nothing to complain about.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, 0, "{}", self.stderr);
        self
    }

    /// Refused with this code; stderr says all of `words`; nothing stands at or beside `out`.
    #[track_caller]
    pub(crate) fn refused(&self, code: i32, words: &[&str], out: &Path) {
        assert_eq!(self.code, code, "{}", self.stderr);
        assert!(self.stderr.starts_with("error: "), "{}", self.stderr);
        for word in words {
            assert!(self.stderr.contains(word), "stderr lacks `{word}`:\n{}", self.stderr);
        }
        assert_eq!(self.stdout, "", "stdout is data");
        assert!(!out.exists(), "`{}` was created", out.display());
        let beside = PathBuf::from(format!("{}.partial", out.display()));
        assert!(!beside.exists(), "`{}` was left", beside.display());
    }
}

/// A folder in which things may be broken.
pub(crate) struct Bench {
    dir: TempDir,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A path as an argument.
    pub(crate) fn arg(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_string()
    }

    /// A copy of one of the family's folders.
    pub(crate) fn copy(&self, from: &str, to: &str) -> PathBuf {
        let to = self.path(to);
        fs::create_dir_all(&to).unwrap();
        for entry in fs::read_dir(lab(from)).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
        to
    }

    /// A copy of a model folder as two shards with an index.
    pub(crate) fn sharded(&self, from: &str, to: &str) -> PathBuf {
        let to = self.copy(from, to);
        let tensors = read_tensors(&to.join("model.safetensors"));
        fs::remove_file(to.join("model.safetensors")).unwrap();
        let half = tensors.len() / 2;
        let mut map = BTreeMap::new();
        for (file, part) in SHARDS.into_iter().zip([&tensors[..half], &tensors[half..]]) {
            write_tensors(&to.join(file), part);
            map.extend(part.iter().map(|t| (t.name.clone(), file)));
        }
        write_json(&to.join(INDEX), &json!({"metadata": {}, "weight_map": map}));
        to
    }

    /// A data file of these lines.
    pub(crate) fn rows(&self, name: &str, lines: &[Value]) -> String {
        let text: String = lines.iter().map(|l| format!("{l}\n")).collect();
        fs::write(self.path(name), text).unwrap();
        self.arg(name)
    }

    /// `extract` from the aligned model and this degraded one to `gene`.
    pub(crate) fn extract(&self, degraded: &Path) -> Outcome {
        self.extract_pair(&lab("aligned"), degraded)
    }

    pub(crate) fn extract_pair(&self, aligned: &Path, degraded: &Path) -> Outcome {
        safegene(&[
            "--quiet",
            "extract",
            "--aligned",
            aligned.to_str().unwrap(),
            "--degraded",
            degraded.to_str().unwrap(),
            "--rank",
            "4",
            "--out",
            &self.arg("gene"),
        ])
    }

    /// A good gene at `gene`.
    pub(crate) fn gene(&self) -> String {
        self.extract(&lab("degraded-strong")).ok();
        self.arg("gene")
    }
}

pub(crate) const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// A tensor of a file.
#[derive(Clone)]
pub(crate) struct Named {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

/// Sorted by name.
pub(crate) fn read_tensors(file: &Path) -> Vec<Named> {
    let bytes = fs::read(file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut out: Vec<Named> = tensors
        .iter()
        .map(|(name, t)| Named {
            name: name.into(),
            dtype: t.dtype(),
            shape: t.shape().to_vec(),
            bytes: t.data().to_vec(),
        })
        .collect();
    out.sort_by(|a, b| a.name.cmp(&b.name));
    out
}

pub(crate) fn write_tensors(file: &Path, tensors: &[Named]) {
    let views = tensors
        .iter()
        .map(|t| (t.name.clone(), TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
    fs::write(file, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// Changes the tensors of `model.safetensors`.
pub(crate) fn edit_tensors(dir: &Path, edit: impl FnOnce(&mut Vec<Named>)) {
    let file = dir.join("model.safetensors");
    let mut tensors = read_tensors(&file);
    edit(&mut tensors);
    write_tensors(&file, &tensors);
}

/// Changes the header of `model.safetensors` and leaves the data as it is.
pub(crate) fn edit_header(dir: &Path, edit: impl FnOnce(&mut serde_json::Map<String, Value>)) {
    let file = dir.join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
    edit(header.as_object_mut().unwrap());
    let text = header.to_string();
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(text.as_bytes());
    out.extend_from_slice(&bytes[8 + n..]);
    fs::write(file, out).unwrap();
}

pub(crate) fn read_json(file: &Path) -> Value {
    serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
}

pub(crate) fn write_json(file: &Path, value: &Value) {
    fs::write(file, value.to_string()).unwrap();
}
