//! Opening a gene folder and holding it to its own word.
//!
//! `gene.json` and the weights have to agree both ways: every module of class `low-rank` has factors of its rank and
//! shape at scale 1, every pair of factors is listed, every entry of the rest is stored as its class says, and nothing
//! else is in the files. Only headers and hashes are read at `open`; values on request, each checked to be finite.
//!
//! Not here: whether the gene fits a model; see `family`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use checkpoint::{
    Adapter, Dtype, Factors, JSON_BYTES_MAX, Role, ShardSet, TensorInfo, module_of, open_inside, printable,
    role, widen_f32,
};

use crate::error::{GeneError, Result};
use crate::manifest::{
    ADAPTER_FILE, Class, GeneManifest, MANIFEST_FILE, Module, REST_FILE, RestEntry, SCHEMA,
};

/// Appended to a tensor's name for the row numbers of a row patch, `I64`.
pub(crate) const ROW_INDEX: &str = "#rows";
/// Appended to a tensor's name for the differences of a row patch, `F32`.
pub(crate) const ROW_VALUES: &str = "#values";

/// A difference that is not kept as factors.
#[derive(Clone, Debug, PartialEq)]
pub enum RestDelta {
    /// All elements.
    Full(Vec<f32>),
    /// Some rows of a matrix.
    Rows {
        /// Row numbers, ascending.
        rows: Vec<u64>,
        /// One difference per row listed, row-major.
        delta: Vec<f32>,
    },
}

/// An opened gene.
#[derive(Debug)]
pub struct Gene {
    dir: PathBuf,
    manifest: GeneManifest,
    /// Places of the modules, and of the entries of the rest, in the manifest's lists: a gene of experts has 100,000.
    module_at: HashMap<String, usize>,
    rest_at: HashMap<String, usize>,
    adapter: Option<Adapter>,
    rest: Option<ShardSet>,
    content: String,
}

impl Gene {
    /// Opens a gene folder, checks it and hashes its files.
    pub fn open(dir: &Path) -> Result<Gene> {
        let path = dir.join(MANIFEST_FILE);
        let Some(file) = open_inside(dir, Path::new(MANIFEST_FILE))? else {
            return Err(GeneError::NotAGene { dir: dir.to_path_buf() });
        };
        let bytes = file.metadata().map_err(GeneError::io("read", &path))?.len();
        if bytes > JSON_BYTES_MAX {
            let problem = format!("it has {bytes} bytes, over the limit of {JSON_BYTES_MAX}");
            return Err(GeneError::Json { file: path, problem });
        }
        let mut text = Vec::with_capacity(bytes as usize);
        std::io::Read::read_to_end(&mut std::io::Read::take(file, JSON_BYTES_MAX), &mut text)
            .map_err(GeneError::io("read", &path))?;
        let manifest = parse(&text, &path)?;

        let has_factors = manifest.modules.iter().any(|module| module.class == Class::LowRank);
        let adapter = if has_factors { Some(Adapter::open(dir)?) } else { None };
        let rest = match open_inside(dir, Path::new(REST_FILE))? {
            Some(_) => Some(ShardSet::open_file(dir, REST_FILE)?),
            None => None,
        };
        let check = Check { dir, manifest: &manifest };
        check.modules(adapter.as_ref())?;
        check.rest(rest.as_ref())?;
        check.classes()?;
        let content = content(dir, &text)?;
        // Names are listed once: that was checked.
        let module_at = places(manifest.modules.iter().map(|module| &module.name));
        let rest_at = places(manifest.rest.iter().map(|entry| &entry.name));
        Ok(Gene { dir: dir.to_path_buf(), manifest, module_at, rest_at, adapter, rest, content })
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `gene.json`.
    pub fn manifest(&self) -> &GeneManifest {
        &self.manifest
    }

    /// The linear modules of all layers, whatever became of them.
    pub fn modules(&self) -> &[Module] {
        &self.manifest.modules
    }

    /// The module of that name.
    pub fn module(&self, name: &str) -> Option<&Module> {
        self.manifest.modules.get(*self.module_at.get(name)?)
    }

    /// The factors of a module, at scale 1.
    pub fn factors(&self, module: &str) -> Result<Factors> {
        let found = match &self.adapter {
            Some(adapter) => adapter.factors(module)?,
            None => None,
        };
        found.ok_or_else(|| GeneError::NoFactors { dir: self.dir.clone(), module: module.to_owned() })
    }

    /// The other tensors that changed, sorted by name. Entries of class `left-out` hold no values.
    pub fn rest(&self) -> &[RestEntry] {
        &self.manifest.rest
    }

    /// The values of an entry of the rest.
    pub fn rest_delta(&self, tensor: &str) -> Result<RestDelta> {
        let missing = || GeneError::NoRest { dir: self.dir.clone(), tensor: tensor.to_owned() };
        let shards = self.rest.as_ref().ok_or_else(missing)?;
        let entry =
            self.rest_at.get(tensor).and_then(|&at| self.manifest.rest.get(at)).ok_or_else(missing)?;
        match entry.class {
            Class::Full => Ok(RestDelta::Full(values(shards, tensor)?.ok_or_else(missing)?)),
            Class::RowPatch => {
                let index = shards.get(&format!("{tensor}{ROW_INDEX}")).ok_or_else(missing)?;
                let bytes = shards.read(index)?;
                let rows: Vec<u64> =
                    bytes.as_chunks::<8>().0.iter().map(|row| u64::from_le_bytes(*row)).collect();
                let height = entry.shape.first().copied().unwrap_or(0);
                // A negative number is a huge one when read without its sign, so one comparison refuses both.
                if rows.windows(2).any(|pair| pair[0] >= pair[1])
                    || rows.last().is_some_and(|&row| row >= height)
                {
                    return Err(GeneError::Inconsistent {
                        dir: self.dir.clone(),
                        name: tensor.to_owned(),
                        problem: "has row numbers that are not ascending or past its end".into(),
                    });
                }
                let delta = values(shards, &format!("{tensor}{ROW_VALUES}"))?.ok_or_else(missing)?;
                Ok(RestDelta::Rows { rows, delta })
            }
            _ => Err(missing()),
        }
    }

    /// `blake3:` and the hex blake3 over `gene.json`, `adapter_model.safetensors` and `rest.safetensors`, each preceded by
    /// its name, a zero byte and its length in 8 little-endian bytes; a file that is absent is left out.
    pub fn content(&self) -> &str {
        &self.content
    }

    /// The layers of which the gene holds something: a module or a tensor of the rest.
    pub fn layers(&self) -> Vec<u32> {
        let modules = self.modules().iter().filter(|module| holds(module.class)).map(|module| module.layer);
        let rest = self.rest().iter().filter(|entry| holds(entry.class)).filter_map(|entry| entry.layer);
        modules.chain(rest).collect::<BTreeSet<_>>().into_iter().collect()
    }
}

fn places<'a>(names: impl Iterator<Item = &'a String>) -> HashMap<String, usize> {
    names.enumerate().map(|(at, name)| (name.clone(), at)).collect()
}

fn holds(class: Class) -> bool {
    matches!(class, Class::LowRank | Class::Full | Class::RowPatch)
}

fn values(shards: &ShardSet, name: &str) -> Result<Option<Vec<f32>>> {
    let Some(info) = shards.get(name) else { return Ok(None) };
    let Some(values) = widen_f32(&shards.read(info)?, info.dtype) else { return Ok(None) };
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => Err(GeneError::NonFinite { name: name.to_owned(), index: index as u64 }),
        None => Ok(Some(values)),
    }
}

fn parse(text: &[u8], path: &Path) -> Result<GeneManifest> {
    // The schema is read first: a later one may not have this one's keys.
    #[derive(serde::Deserialize)]
    struct Version {
        schema: u32,
    }
    let refuse = |error: serde_json::Error| GeneError::json(path, &error);
    let version: Version = serde_json::from_slice(text).map_err(refuse)?;
    if version.schema != SCHEMA {
        return Err(GeneError::Schema { file: path.to_path_buf(), found: version.schema, read: SCHEMA });
    }
    serde_json::from_slice(text).map_err(refuse)
}

fn content(dir: &Path, manifest: &[u8]) -> Result<String> {
    let mut hash = blake3::Hasher::new();
    let announce = |hash: &mut blake3::Hasher, name: &str, bytes: u64| {
        hash.update(name.as_bytes());
        hash.update(&[0]);
        hash.update(&bytes.to_le_bytes());
    };
    announce(&mut hash, MANIFEST_FILE, manifest.len() as u64);
    hash.update(manifest);
    for name in [ADAPTER_FILE, REST_FILE] {
        let path = dir.join(name);
        let Some(file) = open_inside(dir, Path::new(name))? else { continue };
        announce(&mut hash, name, file.metadata().map_err(GeneError::io("read", &path))?.len());
        hash.update_reader(file).map_err(GeneError::io("read", &path))?;
    }
    Ok(format!("blake3:{}", hash.finalize().to_hex()))
}

/// The manifest against the files beside it.
struct Check<'a> {
    dir: &'a Path,
    manifest: &'a GeneManifest,
}

impl Check<'_> {
    fn refuse(&self, name: &str, problem: impl AsRef<str>) -> GeneError {
        GeneError::Inconsistent {
            dir: self.dir.to_path_buf(),
            name: name.to_owned(),
            problem: printable(problem.as_ref()),
        }
    }

    fn modules(&self, adapter: Option<&Adapter>) -> Result<()> {
        let mut listed = BTreeMap::new();
        for module in &self.manifest.modules {
            let name = module.name.as_str();
            if listed.insert(name, module).is_some() {
                return Err(self.refuse(name, "is listed twice"));
            }
            if role(&format!("{name}.weight"), &module.shape) != (Role::Linear { layer: module.layer }) {
                return Err(self.refuse(name, format!("is no linear module of layer {}", module.layer)));
            }
            for value in [module.energy, module.residual, module.noise_floor] {
                if !value.is_finite() || value < 0.0 {
                    return Err(self.refuse(name, format!("has {value} as an energy or a share")));
                }
            }
            if module.class == Class::RowPatch || (module.class == Class::LowRank) != (module.rank > 0) {
                return Err(self.refuse(name, format!("is {:?} with rank {}", module.class, module.rank)));
            }
            let stored = adapter.and_then(|adapter| adapter.modules().get(name));
            match (module.class, stored) {
                (Class::LowRank, None) => return Err(self.refuse(name, "has no factors")),
                (Class::LowRank, Some(stored)) => {
                    let same = stored.shape() == module.shape && stored.rank == module.rank;
                    if !same || stored.transposed {
                        let (shape, rank) = (stored.shape(), stored.rank);
                        return Err(self.refuse(name, format!("has factors of rank {rank} for {shape:?}")));
                    }
                    if stored.scale != 1.0 {
                        return Err(self.refuse(name, format!("has scale {} instead of 1", stored.scale)));
                    }
                }
                (_, Some(_)) => return Err(self.refuse(name, "has factors that are not announced")),
                (_, None) => {}
            }
        }
        let Some(adapter) = adapter else { return Ok(()) };
        if let Some(name) = adapter.modules().keys().find(|name| !listed.contains_key(name.as_str())) {
            return Err(self.refuse(name, "has factors but is not listed"));
        }
        if let Some(name) = adapter.saved().keys().next() {
            return Err(self.refuse(name, "is saved whole, which a gene does not do"));
        }
        Ok(())
    }

    fn rest(&self, shards: Option<&ShardSet>) -> Result<()> {
        let mut announced: BTreeSet<String> = BTreeSet::new();
        let mut seen = BTreeSet::new();
        let stored = |name: &str| shards.and_then(|shards| shards.get(name));
        let classes: HashMap<&str, Class> =
            self.manifest.modules.iter().map(|module| (module.name.as_str(), module.class)).collect();
        for entry in &self.manifest.rest {
            let name = entry.name.as_str();
            if !seen.insert(name) {
                return Err(self.refuse(name, "is listed twice"));
            }
            let found = role(name, &entry.shape);
            if found.layer() != entry.layer {
                return Err(self.refuse(name, format!("does not belong to layer {:?}", entry.layer)));
            }
            if matches!(found, Role::Linear { .. }) {
                let class = module_of(name).and_then(|module| classes.get(module));
                if class != Some(&entry.class) {
                    return Err(self.refuse(name, "is listed with another class among the modules"));
                }
            }
            if !entry.energy.is_finite() || entry.energy < 0.0 {
                return Err(self.refuse(name, format!("has {} as its energy", entry.energy)));
            }
            match entry.class {
                Class::LeftOut => {}
                Class::Full => {
                    let fits = |info: &TensorInfo| info.dtype == Dtype::F32 && info.shape == entry.shape;
                    if !stored(name).is_some_and(fits) {
                        return Err(self.refuse(name, "is not stored as `F32` of its shape"));
                    }
                    announced.insert(name.to_owned());
                }
                Class::RowPatch => {
                    let (index, values) = (format!("{name}{ROW_INDEX}"), format!("{name}{ROW_VALUES}"));
                    let fits = match (stored(&index), stored(&values), &entry.shape[..]) {
                        (Some(index), Some(values), &[rows, cols]) => {
                            index.dtype == Dtype::I64
                                && index.shape.len() == 1
                                && index.shape[0] <= rows
                                && values.dtype == Dtype::F32
                                && values.shape == [index.shape[0], cols]
                        }
                        _ => false,
                    };
                    if !fits {
                        return Err(self.refuse(name, "is not stored as rows of its shape"));
                    }
                    announced.extend([index, values]);
                }
                Class::Unchanged | Class::LowRank => {
                    return Err(
                        self.refuse(name, format!("is {:?}, which is no class of the rest", entry.class))
                    );
                }
            }
        }
        for module in self.manifest.modules.iter().filter(|module| module.class == Class::Full) {
            if !seen.contains(format!("{}.weight", module.name).as_str()) {
                return Err(self.refuse(&module.name, "is full but not in the rest"));
            }
        }
        let stray =
            shards.and_then(|shards| shards.tensors().iter().find(|info| !announced.contains(&info.name)));
        match stray {
            Some(info) => Err(self.refuse(&info.name, "is stored in the rest but not listed")),
            None => Ok(()),
        }
    }

    fn classes(&self) -> Result<()> {
        let modules = self.manifest.modules.iter().filter(|module| module.class == Class::LowRank).count();
        let rest = |class| self.manifest.rest.iter().filter(|entry| entry.class == class).count();
        let counts = [
            (Class::LowRank, modules),
            (Class::Full, rest(Class::Full)),
            (Class::RowPatch, rest(Class::RowPatch)),
        ];
        for (class, found) in counts {
            let said = self.manifest.classes.get(&class).copied().unwrap_or(0);
            if said != found as u64 {
                return Err(self.refuse("classes", format!("counts {said} as {class:?}, {found} are listed")));
            }
        }
        Ok(())
    }
}
