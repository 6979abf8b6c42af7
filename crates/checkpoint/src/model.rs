//! A checkpoint: a model folder, or an adapter folder over one, as the one model that it stands for.
//!
//! Names, shapes and dtypes are the base's. A value is the base's tensor or the adapter's saved copy of it, widened to
//! `f32`, plus `scale * B A` summed in `f32` over ascending rank, scale folded into B once. NaN and infinities are
//! refused with tensor, file and flat index, in what is read and in the sum.
//!
//! Not here: merging to disk, which rounds once in the stored dtype; that is `stream`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rayon::prelude::*;

use crate::adapter::{Adapter, CONFIG_FILE, Factors, WEIGHTS_FILE, read_finite};
use crate::catalogue::module_of;
use crate::config::ModelConfig;
use crate::content::{content_lines, content_of};
use crate::error::{CheckpointError, Result};
use crate::layout::{INDEX_FILE, MODEL_FILE};
use crate::shards::{ShardSet, TensorInfo};
use crate::values::first_non_finite;

/// An opened model or adapter folder.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    shards: ShardSet,
    adapter: Option<Adapter>,
    content: OnceLock<String>,
}

impl Checkpoint {
    /// Opens a folder. `base` is used only if it is an adapter folder; without it the adapter's
    /// `base_model_name_or_path` is read as a path from its folder, else from the working folder.
    pub fn open(dir: &Path, base: Option<&Path>) -> Result<Checkpoint> {
        if !is_adapter(dir)? {
            return Self::assemble(dir, dir, None);
        }
        let adapter = Adapter::open(dir)?;
        let base = find_base(&adapter, base)?;
        if is_adapter(&base)? {
            return Err(CheckpointError::BaseIsAdapter { adapter: dir.to_path_buf(), base });
        }
        Self::assemble(dir, &base, Some(adapter))
    }

    fn assemble(dir: &Path, base: &Path, adapter: Option<Adapter>) -> Result<Checkpoint> {
        let shards = ShardSet::open(base)?;
        let config = ModelConfig::open(base)?;
        let adapter =
            adapter.map(|mut adapter| adapter.fit(&shards, &config).map(|()| adapter)).transpose()?;
        Ok(Checkpoint { dir: dir.to_path_buf(), config, shards, adapter, content: OnceLock::new() })
    }

    /// The folder that was opened.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The folder of the full weights: the same, or the adapter's base.
    pub fn base_dir(&self) -> &Path {
        self.shards.dir()
    }

    /// The model's config (an adapter's: its base's).
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The base's tensors.
    pub fn shards(&self) -> &ShardSet {
        &self.shards
    }

    /// The adapter, if this is one.
    pub fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref()
    }

    /// Names, shapes and dtypes of the model, sorted by name. Files and offsets are the base's.
    pub fn tensors(&self) -> &[TensorInfo] {
        self.shards.tensors()
    }

    /// The adapter's factors of a module (`model.layers.0.self_attn.q_proj`), if it has any.
    pub fn factors(&self, module: &str) -> Result<Option<Factors>> {
        self.adapter.as_ref().map_or(Ok(None), |adapter| adapter.factors(module))
    }

    /// The tensor's bytes in the base, whatever an adapter says.
    pub fn read_base(&self, name: &str) -> Result<(TensorInfo, Vec<u8>)> {
        let info = self.info(name)?;
        Ok((info.clone(), self.shards.read(info)?))
    }

    /// The tensor's bytes before any factors are added: the adapter's saved copy, else the base's.
    ///
    /// The copy's dtype may differ from the base's.
    pub fn read_stored(&self, name: &str) -> Result<(TensorInfo, Vec<u8>)> {
        let (shards, info) = self.stored(name)?;
        Ok((info.clone(), shards.read(info)?))
    }

    /// The tensor of the model that this folder stands for, in `f32`, every value finite.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let (shards, info) = self.stored(name)?;
        let mut values = read_finite(shards, info)?;
        let factors = match module_of(name) {
            Some(module) => self.factors(module)?,
            None => None,
        };
        if let Some(factors) = factors {
            add_product(&mut values, &factors);
            if let Some(index) = first_non_finite(&values) {
                return Err(CheckpointError::NonFinite {
                    tensor: name.to_owned(),
                    file: self.dir.clone(),
                    index,
                });
            }
        }
        Ok(values)
    }

    /// The content hash: the same for the same tensors, however they are spread over files.
    ///
    /// An adapter's lines are its base's, its own tensors', and one `module scale S` per module, because alpha changes
    /// the model and is in no tensor. Reads every byte the first time.
    pub fn content(&self) -> Result<String> {
        self.content_from(&BTreeMap::new())
    }

    /// [`content`](Self::content) from what is known already: the xxh3_128 of base tensors, by name.
    ///
    /// Tensors of the base that `digests` lacks are read, an adapter's own always. The digests are believed.
    pub fn content_from(&self, digests: &BTreeMap<String, u128>) -> Result<String> {
        if let Some(name) = digests.keys().find(|name| self.shards.get(name).is_none()) {
            return Err(CheckpointError::UnknownTensor { tensor: name.clone(), dir: self.dir.clone() });
        }
        if let Some(content) = self.content.get() {
            return Ok(content.clone());
        }
        let mut lines = content_lines(&self.shards, digests)?;
        if let Some(adapter) = &self.adapter {
            lines.extend(content_lines(adapter.shards(), &BTreeMap::new())?);
            lines.extend(
                adapter.modules().iter().map(|(name, module)| format!("{name} scale {}", module.scale)),
            );
        }
        Ok(self.content.get_or_init(|| content_of(lines)).clone())
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.shards
            .get(name)
            .ok_or_else(|| CheckpointError::UnknownTensor { tensor: name.to_owned(), dir: self.dir.clone() })
    }

    /// Where the values of a tensor lie before any factors are added: the adapter's saved copy, else the base's.
    pub(crate) fn stored(&self, name: &str) -> Result<(&ShardSet, &TensorInfo)> {
        let base = self.info(name)?;
        let copy =
            self.adapter.as_ref().and_then(|adapter| Some((adapter.shards(), adapter.saved().get(name)?)));
        Ok(copy.unwrap_or((&self.shards, base)))
    }
}

/// Adds `scale * B A`; rows are independent, so the result does not depend on the thread count.
fn add_product(values: &mut [f32], factors: &Factors) {
    let Factors { b, a, cols, rank, scale, .. } = factors;
    if *cols == 0 {
        return;
    }
    let rows = values.par_chunks_mut(*cols).zip(b.par_chunks(*rank));
    rows.for_each_init(
        || vec![0f32; *cols],
        |sum, (row, b)| {
            sum.fill(0.0);
            for (&b, a) in b.iter().zip(a.chunks(*cols)) {
                let b = (f64::from(b) * scale) as f32;
                for (sum, &a) in sum.iter_mut().zip(a) {
                    *sum += b * a;
                }
            }
            for (value, &sum) in row.iter_mut().zip(sum.iter()) {
                *value += sum;
            }
        },
    );
}

/// Whether a folder is an adapter; a folder that is also a model is refused.
fn is_adapter(dir: &Path) -> Result<bool> {
    if !std::fs::metadata(dir).map_err(CheckpointError::io("read", dir))?.is_dir() {
        let source = std::io::Error::from(std::io::ErrorKind::NotADirectory);
        return Err(CheckpointError::io("read", dir)(source));
    }
    let has = |names: [&str; 2]| names.iter().any(|name| dir.join(name).symlink_metadata().is_ok());
    match (has([CONFIG_FILE, WEIGHTS_FILE]), has([MODEL_FILE, INDEX_FILE])) {
        (true, true) => Err(CheckpointError::Ambiguous {
            dir: dir.to_path_buf(),
            detail: "it holds a model and an adapter",
        }),
        (adapter, _) => Ok(adapter),
    }
}

fn find_base(adapter: &Adapter, given: Option<&Path>) -> Result<PathBuf> {
    let named = adapter.config().base_model_name_or_path.as_str();
    let candidates = match given {
        Some(base) => vec![base.to_path_buf()],
        None if named.is_empty() => Vec::new(),
        None => vec![adapter.dir().join(named), PathBuf::from(named)],
    };
    candidates.into_iter().find(|base| base.is_dir()).ok_or_else(|| CheckpointError::NoBase {
        adapter: adapter.dir().to_path_buf(),
        base: given.map_or_else(|| named.to_owned(), |base| base.to_string_lossy().into_owned()),
    })
}
