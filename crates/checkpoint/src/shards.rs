//! Many safetensors files seen as one set of tensors.
//!
//! Either `model.safetensors` alone, or the shards that `model.safetensors.index.json` names. The index decides, and it
//! is checked both ways against the headers: each entry is in the shard it names, and each tensor of a shard is in the
//! index. Files that the index does not name are ignored. Headers are read at `open`; tensors by positioned reads of
//! their bytes (`io`), never through a mapping, so that a file that shrinks is an error and not a signal.
//!
//! Not here: values and dtypes as numbers (`values`), adapters (`adapter`).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use crate::dtype::{Dtype, elements};
use crate::error::{CheckpointError, Result};
use crate::files::{has_ending, is_pickle, names, open_inside, read_json};
use crate::header::{Header, read_header};
use crate::io::{Source, Windows};
use crate::layout::{INDEX_FILE, MODEL_FILE};

/// Where a tensor lies and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Tensor name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Sides, empty for a scalar.
    pub shape: Vec<u64>,
    /// The file that holds it, as a path under the folder that was opened.
    pub file: PathBuf,
    /// First byte in that file.
    pub offset: u64,
    /// Length.
    pub bytes: u64,
}

impl TensorInfo {
    /// Number of elements. The shape was checked against `bytes`, so it fits.
    pub fn elements(&self) -> u64 {
        elements(&self.shape).unwrap_or(0)
    }
}

/// The tensors of one folder.
#[derive(Debug)]
pub struct ShardSet {
    dir: PathBuf,
    files: Vec<PathBuf>,
    metadata: BTreeMap<String, String>,
    open: HashMap<PathBuf, Source>,
    windows: Arc<Windows>,
    tensors: Vec<TensorInfo>,
}

impl ShardSet {
    /// Opens the model weights of a folder and checks every header.
    pub fn open(dir: &Path) -> Result<ShardSet> {
        let index: Option<Index> = read_json(dir, INDEX_FILE)?;
        let single = open_inside(dir, Path::new(MODEL_FILE))?.is_some();
        match (index, single) {
            (Some(index), single) => {
                let only_the_single = index.weight_map.iter().all(|(_, file)| file == MODEL_FILE);
                if single && !only_the_single {
                    return Err(CheckpointError::Ambiguous {
                        dir: dir.to_path_buf(),
                        detail: "`model.safetensors` lies beside an index of other shards",
                    });
                }
                Self::open_indexed(dir, index)
            }
            (None, true) => Self::open_file(dir, MODEL_FILE),
            (None, false) => Err(no_weights(dir)?),
        }
    }

    /// Opens one safetensors file of a folder as a set of its own.
    pub fn open_file(dir: &Path, name: &str) -> Result<ShardSet> {
        let path = dir.join(name);
        let Some(file) = open_inside(dir, Path::new(name))? else {
            return Err(CheckpointError::Io {
                action: "read",
                path,
                source: std::io::Error::from(std::io::ErrorKind::NotFound),
            });
        };
        let mut set = ShardSet::empty(dir);
        let header = read_header(&file, &path)?;
        set.add(path, file, header);
        set.sorted()
    }

    fn open_indexed(dir: &Path, index: Index) -> Result<ShardSet> {
        let index_path = dir.join(INDEX_FILE);
        if index.weight_map.is_empty() {
            return Err(CheckpointError::Json { file: index_path, detail: "`weight_map` is empty".into() });
        }
        let mut placed: HashMap<&str, &str> = HashMap::with_capacity(index.weight_map.len());
        for (tensor, shard) in &index.weight_map {
            if !is_plain_shard(shard) {
                return Err(CheckpointError::ShardPath { index: index_path, shard: shard.clone() });
            }
            if placed.insert(tensor, shard).is_some() {
                return Err(CheckpointError::DuplicateTensor {
                    tensor: tensor.clone(),
                    first: index_path.clone(),
                    second: index_path,
                });
            }
        }

        let mut set = ShardSet::empty(dir);
        let shards: BTreeSet<&str> = placed.values().copied().collect();
        for shard in shards {
            let path = dir.join(shard);
            let Some(file) = open_inside(dir, Path::new(shard))? else {
                return Err(CheckpointError::MissingShard { index: index_path, shard: path });
            };
            let header = read_header(&file, &path)?;
            for entry in &header.entries {
                match placed.get(entry.name.as_str()) {
                    Some(&place) if place == shard => {}
                    Some(&place) => {
                        return Err(CheckpointError::DuplicateTensor {
                            tensor: entry.name.clone(),
                            first: dir.join(place),
                            second: path,
                        });
                    }
                    None => {
                        return Err(CheckpointError::UnindexedTensor {
                            tensor: entry.name.clone(),
                            file: path,
                        });
                    }
                }
            }
            set.add(path, file, header);
        }

        let set = set.sorted()?;
        for (tensor, shard) in &index.weight_map {
            if set.get(tensor).is_none() {
                return Err(CheckpointError::AbsentTensor { tensor: tensor.clone(), file: dir.join(shard) });
            }
        }
        Ok(set)
    }

    fn empty(dir: &Path) -> ShardSet {
        ShardSet {
            dir: dir.to_path_buf(),
            files: Vec::new(),
            metadata: BTreeMap::new(),
            open: HashMap::new(),
            windows: Arc::default(),
            tensors: Vec::new(),
        }
    }

    fn add(&mut self, path: PathBuf, file: File, header: Header) {
        for entry in header.entries {
            self.tensors.push(TensorInfo {
                name: entry.name,
                dtype: entry.dtype,
                shape: entry.shape,
                file: path.clone(),
                offset: header.data_offset + entry.start,
                bytes: entry.end - entry.start,
            });
        }
        self.metadata.extend(header.metadata);
        self.files.push(path.clone());
        self.open.insert(path, Source::new(file, &self.windows));
    }

    fn sorted(mut self) -> Result<ShardSet> {
        self.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        for pair in self.tensors.windows(2) {
            if pair[0].name == pair[1].name {
                return Err(CheckpointError::DuplicateTensor {
                    tensor: pair[0].name.clone(),
                    first: pair[0].file.clone(),
                    second: pair[1].file.clone(),
                });
            }
        }
        self.files.sort();
        Ok(self)
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// All tensors, sorted by name.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        let found = self.tensors.binary_search_by(|info| info.name.as_str().cmp(name)).ok()?;
        self.tensors.get(found)
    }

    /// The files that hold the tensors, sorted.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// `__metadata__` of all files together; a later file wins.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The tensors of one of [`files`](Self::files), in the order of their bytes.
    pub fn in_file(&self, file: &Path) -> Vec<&TensorInfo> {
        let mut found: Vec<_> = self.tensors.iter().filter(|info| info.file == file).collect();
        found.sort_by_key(|info| (info.offset, info.bytes));
        found
    }

    /// Whether some of the files are read past the page cache; their first reads decide.
    pub fn is_direct(&self) -> bool {
        self.open.values().any(Source::is_direct)
    }

    /// The bytes of one tensor.
    pub fn read(&self, info: &TensorInfo) -> Result<Vec<u8>> {
        self.known(info)?;
        let mut bytes = vec![0u8; info.bytes as usize];
        self.read_at(info, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Fills `into` with the tensor's bytes from `start` on, both inside the tensor.
    pub fn read_at(&self, info: &TensorInfo, start: u64, into: &mut [u8]) -> Result<()> {
        let file = self.known(info)?;
        let end = start.checked_add(into.len() as u64).filter(|&end| end <= info.bytes);
        let source = match end {
            Some(_) => match file.read_exact_at(into, info.offset + start) {
                Ok(()) => return Ok(()),
                Err(source) => source,
            },
            None => std::io::Error::from(std::io::ErrorKind::UnexpectedEof),
        };
        Err(CheckpointError::Io { action: "read", path: info.file.clone(), source })
    }

    /// The open file of a tensor that is one of this set's own.
    fn known(&self, info: &TensorInfo) -> Result<&Source> {
        match self.open.get(&info.file) {
            Some(file) if self.get(&info.name) == Some(info) => Ok(file),
            _ => Err(CheckpointError::UnknownTensor { tensor: info.name.clone(), dir: self.dir.clone() }),
        }
    }
}

/// A relative path of plain components that ends in `.safetensors`.
fn is_plain_shard(name: &str) -> bool {
    let path = Path::new(name);
    !name.is_empty()
        && !name.contains(['\\', '\0'])
        && path.extension().is_some_and(|ending| ending == "safetensors")
        && path.components().all(|part| matches!(part, Component::Normal(_)))
}

/// The error for a folder without safetensors weights.
fn no_weights(dir: &Path) -> Result<CheckpointError> {
    let names = names(dir)?;
    let find = |is: fn(&str) -> bool| names.iter().find(|name| is(name)).cloned();
    let dir = dir.to_path_buf();
    Ok(match (find(is_pickle), find(|name| has_ending(name, &["gguf"]))) {
        (Some(file), _) => CheckpointError::PickleOnly { dir, file },
        (None, Some(file)) => {
            CheckpointError::Quantized { tensor: None, file: dir.join(file), format: "GGUF".into() }
        }
        (None, None) => CheckpointError::NoWeights { dir },
    })
}

/// The index file. `metadata.total_size` is often wrong in the wild and is not used.
#[derive(Deserialize)]
struct Index {
    #[serde(deserialize_with = "pairs")]
    weight_map: Vec<(String, String)>,
}

/// Keys as written, so that a name given twice is seen.
fn pairs<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<(String, String)>, D::Error> {
    struct Pairs;

    impl<'de> serde::de::Visitor<'de> for Pairs {
        type Value = Vec<(String, String)>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("an object from tensor names to file names")
        }

        fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut pairs = Vec::new();
            while let Some(pair) = map.next_entry()? {
                pairs.push(pair);
            }
            Ok(pairs)
        }
    }

    deserializer.deserialize_map(Pairs)
}
