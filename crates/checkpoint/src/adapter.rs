//! PEFT LoRA folders: `adapter_config.json` and one `adapter_model.safetensors`.
//!
//! The weight that an adapter stands for is `base + scale * B A`, scale being alpha / r (rsLoRA: alpha / sqrt r), with
//! `rank_pattern` and `alpha_pattern` looked up as PEFT does: a regular expression anchored at the end of the module's
//! path, after its start or a dot, tried in the order of the file, first hit wins; their number and size are bounded.
//! Copies that PEFT saved whole (`modules_to_save`) take the place of the base's tensor.
//!
//! Whatever cannot be written as such a sum is refused: DoRA, biases, fused experts, replicated layers, initialisations
//! that change the base.
//!
//! Not here: finding and opening the base; see `model`.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use regex::Regex;
use serde_json::Value;

use crate::config::ModelConfig;
use crate::error::{CheckpointError, Result, printable};
use crate::files::{has_ending, names, open_inside, read_json};
use crate::shards::{ShardSet, TensorInfo};
use crate::values::{first_non_finite, widen_f32};

/// The config's file name.
pub(crate) const CONFIG_FILE: &str = "adapter_config.json";
/// The weights' file name.
pub(crate) const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// Keys that have to be absent, null, false or empty.
const MUST_BE_EMPTY: [&str; 9] = [
    "use_dora",
    "lora_bias",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
];

/// Most patterns of a map that are more than an exact path, which are compiled.
const REGEXES_MAX: usize = 2048;
/// Bytes that the compiled patterns of a map share, but each may have `REGEX_BYTES.start` and none more than `.end`: a
/// class of letters is tens of kilobytes, and repeats.
const REGEXES_BYTES: usize = 8 << 20;
const REGEX_BYTES: std::ops::Range<usize> = 8 << 10..1 << 20;

/// Initialisations that rewrite the base, so that base + scale * B A is not the model.
const BASE_CHANGING_INITS: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

/// A low-rank difference, `scale * B A`, row-major `f32`.
#[derive(Clone, Debug, PartialEq)]
pub struct Factors {
    /// [rows, rank].
    pub b: Vec<f32>,
    /// [rank, cols].
    pub a: Vec<f32>,
    /// Rows of the weight.
    pub rows: usize,
    /// Columns of the weight.
    pub cols: usize,
    /// Inner side.
    pub rank: usize,
    /// Factor of the product.
    pub scale: f64,
}

/// A `rank_pattern` or `alpha_pattern`. Patterns are numbered in the order of the file.
#[derive(Clone, Debug)]
struct Patterns<T> {
    /// Those that match one path only, `^` and escaped text, as our own writer has them for every module: by path.
    exact: HashMap<String, (usize, T)>,
    /// The others.
    regexes: Vec<(usize, Regex, T)>,
}

impl<T: Copy> Patterns<T> {
    /// The value of the first pattern that a module's path matches.
    fn first_hit(&self, module: &str) -> Option<T> {
        let exact = self.exact.get(module);
        let before = exact.map_or(usize::MAX, |&(number, _)| number);
        let mut regexes = self.regexes.iter().take_while(|(number, ..)| *number < before);
        let regex = regexes.find(|(_, regex, _)| regex.is_match(module));
        regex.map(|&(.., value)| value).or(exact.map(|&(_, value)| value))
    }
}

/// `adapter_config.json`, as far as it decides the weights.
#[derive(Clone, Debug)]
pub struct AdapterConfig {
    /// The whole file.
    pub raw: Value,
    /// Rank where no pattern says otherwise.
    pub r: usize,
    /// Alpha where no pattern says otherwise.
    pub lora_alpha: f64,
    /// Scale is alpha / sqrt(r) instead of alpha / r.
    pub use_rslora: bool,
    /// Whether Conv1D weights ([in, out]) are meant; PEFT ignores it for other modules, and so does this crate.
    pub fan_in_fan_out: bool,
    /// Name or path of the base, empty if absent.
    pub base_model_name_or_path: String,
    ranks: Patterns<usize>,
    alphas: Patterns<f64>,
}

impl AdapterConfig {
    /// Reads `adapter_config.json` of an adapter folder.
    pub fn open(dir: &Path) -> Result<AdapterConfig> {
        let path = dir.join(CONFIG_FILE);
        match read_json(dir, CONFIG_FILE)? {
            Some(raw) => Self::from_json(raw, &path),
            None => Err(CheckpointError::config(&path, "the file is missing")),
        }
    }

    /// Checks a parsed config; `path` is for messages only.
    pub fn from_json(raw: Value, path: &Path) -> Result<AdapterConfig> {
        let refuse = |problem: &str| CheckpointError::config(path, problem);
        let unsupported = |key: &str, value: &Value| CheckpointError::UnsupportedAdapter {
            file: path.to_path_buf(),
            what: printable(&format!("`{key}` is {value}")),
        };
        if !raw.is_object() {
            return Err(refuse("it is no JSON object"));
        }
        match raw.get("peft_type") {
            Some(Value::String(kind)) if kind == "LORA" => {}
            Some(kind) => return Err(unsupported("peft_type", kind)),
            None => return Err(refuse("`peft_type` is missing")),
        }
        for key in MUST_BE_EMPTY {
            if let Some(value) = raw.get(key).filter(|value| !is_empty(value)) {
                return Err(unsupported(key, value));
            }
        }
        if let Some(bias) = raw.get("bias").filter(|bias| !bias.is_null() && **bias != "none") {
            return Err(unsupported("bias", bias));
        }
        if let Some(init @ Value::String(name)) = raw.get("init_lora_weights")
            && BASE_CHANGING_INITS.iter().any(|known| name.to_ascii_lowercase().starts_with(known))
        {
            return Err(unsupported("init_lora_weights", init));
        }

        let r = raw.get("r").and_then(rank).ok_or_else(|| refuse("`r` is missing or no rank above zero"))?;
        let lora_alpha = raw
            .get("lora_alpha")
            .and_then(alpha)
            .ok_or_else(|| refuse("`lora_alpha` is missing or no number"))?;
        let truth = |key: &str| match raw.get(key) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(value)) => Ok(*value),
            Some(_) => Err(refuse(&format!("`{key}` is no truth value"))),
        };
        let base = raw.get("base_model_name_or_path").and_then(Value::as_str).unwrap_or_default().to_owned();
        Ok(AdapterConfig {
            r,
            lora_alpha,
            use_rslora: truth("use_rslora")?,
            fan_in_fan_out: truth("fan_in_fan_out")?,
            base_model_name_or_path: base,
            ranks: patterns(&raw, "rank_pattern", path, rank)?,
            alphas: patterns(&raw, "alpha_pattern", path, alpha)?,
            raw,
        })
    }

    /// Rank of a module, by pattern.
    pub fn rank_of(&self, module: &str) -> usize {
        self.ranks.first_hit(module).unwrap_or(self.r)
    }

    /// Alpha of a module, by pattern.
    pub fn alpha_of(&self, module: &str) -> f64 {
        self.alphas.first_hit(module).unwrap_or(self.lora_alpha)
    }

    /// Scale of a module's product.
    pub fn scale_of(&self, module: &str) -> f64 {
        let rank = self.rank_of(module) as f64;
        self.alpha_of(module) / if self.use_rslora { rank.sqrt() } else { rank }
    }
}

/// The two factors of one module.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterModule {
    /// `lora_A`, [rank, in]; of an embedding [rank, vocabulary].
    pub a: TensorInfo,
    /// `lora_B`, [out, rank].
    pub b: TensorInfo,
    /// Inner side.
    pub rank: usize,
    /// Factor of the product.
    pub scale: f64,
    /// The weight is stored transposed to `B A` (embeddings, Conv1D), so it is given `scale * A^T B^T`.
    pub transposed: bool,
}

impl AdapterModule {
    /// Shape of the weight that this module fits.
    pub fn shape(&self) -> [u64; 2] {
        let (out, into) = (self.b.shape[0], self.a.shape[1]);
        if self.transposed { [into, out] } else { [out, into] }
    }
}

/// A LoRA folder.
#[derive(Debug)]
pub struct Adapter {
    dir: PathBuf,
    config: AdapterConfig,
    shards: ShardSet,
    modules: BTreeMap<String, AdapterModule>,
    saved: BTreeMap<String, TensorInfo>,
}

impl Adapter {
    /// Opens an adapter folder and sorts its tensors into factors and saved copies. The base is not looked at.
    pub fn open(dir: &Path) -> Result<Adapter> {
        let config = AdapterConfig::open(dir)?;
        if open_inside(dir, Path::new(WEIGHTS_FILE))?.is_none() {
            let pickle = names(dir)?.into_iter().find(|name| has_ending(name, &["bin", "pt", "pth"]));
            return Err(match pickle {
                Some(file) => CheckpointError::PickleOnly { dir: dir.to_path_buf(), file },
                None => CheckpointError::NoWeights { dir: dir.to_path_buf() },
            });
        }
        let shards = ShardSet::open_file(dir, WEIGHTS_FILE)?;
        let mut halves: BTreeMap<String, Halves> = BTreeMap::new();
        let mut saved = BTreeMap::new();
        for info in shards.tensors() {
            match key(&info.name).map_err(|what| tensor_error(info, what))? {
                Key::Factor { module, embedding, first } => {
                    let half = halves.entry(module).or_default();
                    let place = if first { &mut half.a } else { &mut half.b };
                    if place.replace((info.clone(), embedding)).is_some() {
                        return Err(tensor_error(info, "its module has this factor twice"));
                    }
                }
                Key::Saved(name) => {
                    if saved.insert(name, info.clone()).is_some() {
                        return Err(tensor_error(info, "its module has this copy twice"));
                    }
                }
            }
        }
        let mut modules = BTreeMap::new();
        for (name, half) in halves {
            let module = half.joined(&name, &config)?;
            modules.insert(name, module);
        }
        if modules.is_empty() && saved.is_empty() {
            return Err(CheckpointError::NoWeights { dir: dir.to_path_buf() });
        }
        Ok(Adapter { dir: dir.to_path_buf(), config, shards, modules, saved })
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its config.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// Its tensors as stored.
    pub fn shards(&self) -> &ShardSet {
        &self.shards
    }

    /// Factors by module name (`model.layers.0.self_attn.q_proj`).
    pub fn modules(&self) -> &BTreeMap<String, AdapterModule> {
        &self.modules
    }

    /// Copies saved whole, by the name of the base's tensor.
    pub fn saved(&self) -> &BTreeMap<String, TensorInfo> {
        &self.saved
    }

    /// The factors of a module in `f32`, oriented like the weight; `None` if the module has none.
    pub fn factors(&self, module: &str) -> Result<Option<Factors>> {
        let Some(found) = self.modules.get(module) else { return Ok(None) };
        let a = read_finite(&self.shards, &found.a)?;
        let b = read_finite(&self.shards, &found.b)?;
        let rank = found.rank;
        // Both were read, so their sides fit in memory and in usize.
        let [rows, cols] = found.shape().map(|side| side as usize);
        let (b, a) =
            if found.transposed { (transposed(&a, rank, rows), transposed(&b, cols, rank)) } else { (b, a) };
        Ok(Some(Factors { b, a, rows, cols, rank, scale: found.scale }))
    }

    /// Checks that every module and copy has a place of its own shape in the base.
    pub(crate) fn fit(&mut self, base: &ShardSet, config: &ModelConfig) -> Result<()> {
        let (adapter, base_dir) = (self.dir.clone(), base.dir().to_path_buf());
        let other_base = |tensor: String, detail: String| CheckpointError::AdapterOtherBase {
            adapter: adapter.clone(),
            base: base_dir.clone(),
            tensor,
            detail,
        };
        let conv1d = self.config.fan_in_fan_out && config.is_conv1d();
        for (name, module) in &mut self.modules {
            let tensor = format!("{name}.weight");
            module.transposed |= conv1d;
            match base.get(&tensor) {
                None => return Err(other_base(tensor, "is not in the base".into())),
                Some(info) if info.shape != module.shape() => {
                    let detail = format!(
                        "is {:?} in the base, the adapter's factors make {:?}",
                        info.shape,
                        module.shape()
                    );
                    return Err(other_base(tensor, detail));
                }
                Some(_) => {}
            }
        }
        for (tensor, copy) in &self.saved {
            match base.get(tensor) {
                None => return Err(other_base(tensor.clone(), "is not in the base".into())),
                Some(info) if info.shape != copy.shape => {
                    let detail =
                        format!("is {:?} in the base, the adapter's copy is {:?}", info.shape, copy.shape);
                    return Err(other_base(tensor.clone(), detail));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }
}

/// Reads a tensor as finite `f32`.
pub(crate) fn read_finite(shards: &ShardSet, info: &TensorInfo) -> Result<Vec<f32>> {
    let values =
        widen_f32(&shards.read(info)?, info.dtype).ok_or_else(|| CheckpointError::UnsupportedDtype {
            tensor: info.name.clone(),
            file: info.file.clone(),
            dtype: info.dtype,
        })?;
    match first_non_finite(&values) {
        Some(index) => {
            Err(CheckpointError::NonFinite { tensor: info.name.clone(), file: info.file.clone(), index })
        }
        None => Ok(values),
    }
}

fn transposed(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for col in 0..cols {
        out.extend((0..rows).map(|row| values[row * cols + col]));
    }
    out
}

/// What the name of an adapter's tensor says.
enum Key {
    Factor { module: String, embedding: bool, first: bool },
    Saved(String),
}

fn key(name: &str) -> Result<Key, &'static str> {
    let Some(path) = name.strip_prefix("base_model.model.") else {
        return Err("its name does not start with `base_model.model.`");
    };
    let endings = [
        (".lora_A.weight", false, true),
        (".lora_B.weight", false, false),
        (".lora_embedding_A", true, true),
        (".lora_embedding_B", true, false),
    ];
    for (ending, embedding, first) in endings {
        if let Some(module) = path.strip_suffix(ending).filter(|module| !module.is_empty()) {
            if module.split('.').any(|part| part == "base_layer") {
                return Err("factors of fused parameters are not supported");
            }
            return Ok(Key::Factor { module: module.to_owned(), embedding, first });
        }
    }
    if path.contains("lora_") {
        return Err("only `lora_A.weight`, `lora_B.weight` and `lora_embedding_A`, `_B` are");
    }
    if path.split('.').any(|part| part == "modules_to_save" || part == "original_module") {
        return Err("saved copies carry the module's own name");
    }
    // Embeddings under an adapter are saved as their base layer.
    Ok(Key::Saved(match path.strip_suffix(".base_layer.weight") {
        Some(module) => format!("{module}.weight"),
        None => path.to_owned(),
    }))
}

/// The factors of a module while they are collected; the flag says that they are an embedding's.
#[derive(Default)]
struct Halves {
    a: Option<(TensorInfo, bool)>,
    b: Option<(TensorInfo, bool)>,
}

impl Halves {
    fn joined(self, module: &str, config: &AdapterConfig) -> Result<AdapterModule> {
        let (a, b, embedding) = match (self.a, self.b) {
            (Some((a, left)), Some((b, right))) if left == right => (a, b, left),
            (Some((info, _)), _) | (None, Some((info, _))) => {
                return Err(tensor_error(&info, "its other factor is missing"));
            }
            // An entry is made only when a tensor is put into it.
            (None, None) => {
                return Err(CheckpointError::config(Path::new(module), "the module has no factors"));
            }
        };
        for info in [&a, &b] {
            if info.shape.len() != 2 {
                return Err(tensor_error(info, format!("its shape is {:?}, not a matrix", info.shape)));
            }
        }
        let rank = config.rank_of(module);
        for (info, inner) in [(&a, a.shape[0]), (&b, b.shape[1])] {
            if inner != rank as u64 {
                return Err(tensor_error(info, format!("its rank is {inner}, the config says {rank}")));
            }
        }
        Ok(AdapterModule { scale: config.scale_of(module), a, b, rank, transposed: embedding })
    }
}

fn tensor_error(info: &TensorInfo, what: impl Into<String>) -> CheckpointError {
    CheckpointError::AdapterTensor { tensor: info.name.clone(), file: info.file.clone(), what: what.into() }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

fn rank(value: &Value) -> Option<usize> {
    value
        .as_u64()
        .filter(|&rank| rank > 0)
        .and_then(|rank| u32::try_from(rank).ok())
        .map(|rank| rank as usize)
}

fn alpha(value: &Value) -> Option<f64> {
    value.as_f64().filter(|alpha| alpha.is_finite())
}

fn patterns<T>(raw: &Value, key: &str, path: &Path, read: fn(&Value) -> Option<T>) -> Result<Patterns<T>> {
    let refuse = |problem: String| CheckpointError::config(path, problem);
    let (mut exact, mut others) = (HashMap::new(), Vec::new());
    match raw.get(key) {
        None | Some(Value::Null) => {}
        Some(Value::Object(map)) => {
            for (number, (text, value)) in map.iter().enumerate() {
                let value =
                    read(value).ok_or_else(|| refuse(format!("`{key}`: value of `{text}` is not usable")))?;
                match exact_path(text) {
                    // Two spellings of one path: the first one wins.
                    Some(module) => {
                        exact.entry(module).or_insert((number, value));
                    }
                    None => others.push((number, text, value)),
                }
            }
        }
        Some(_) => return Err(refuse(format!("`{key}` is no object"))),
    }
    if others.len() > REGEXES_MAX {
        let problem = format!(
            "`{key}` has {} patterns that are no exact path, at most {REGEXES_MAX} are read",
            others.len()
        );
        return Err(refuse(problem));
    }
    let size_limit = (REGEXES_BYTES / others.len().max(1)).clamp(REGEX_BYTES.start, REGEX_BYTES.end);
    let build = |pattern: &str| regex::RegexBuilder::new(pattern).size_limit(size_limit).build();
    let mut regexes = Vec::with_capacity(others.len());
    for (number, text, value) in others {
        // The text has to be a pattern by itself: one like `a)|(b` would escape the anchors around it.
        let regex = build(text)
            .and_then(|_| build(&format!(r"\A(?:.*\.)?(?:{text})\z")))
            .map_err(|_| refuse(format!("`{key}`: `{text}` is no pattern that can be read")))?;
        regexes.push((number, regex, value));
    }
    Ok(Patterns { exact, regexes })
}

/// The only path that a pattern matches, if it is `^` and text in which every character stands for itself.
fn exact_path(pattern: &str) -> Option<String> {
    let mut chars = pattern.strip_prefix('^')?.chars();
    let mut path = String::with_capacity(pattern.len());
    while let Some(c) = chars.next() {
        match c {
            '\\' => path.push(chars.next().filter(|c| r"\.+*?()|[]{}^$#&-~".contains(*c))?),
            '.' | '+' | '*' | '?' | '(' | ')' | '|' | '[' | ']' | '{' | '}' | '^' | '$' => return None,
            c => path.push(c),
        }
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(change: Value) -> Result<AdapterConfig> {
        let mut raw = json!({"peft_type": "LORA", "r": 8, "lora_alpha": 16});
        for (key, value) in change.as_object().unwrap() {
            raw[key] = value.clone();
        }
        AdapterConfig::from_json(raw, Path::new("adapter_config.json"))
    }

    #[test]
    fn scale_is_alpha_over_rank_or_its_root() {
        assert_eq!(read(json!({})).unwrap().scale_of("m"), 2.0);
        assert_eq!(read(json!({"use_rslora": true, "r": 16})).unwrap().scale_of("m"), 4.0);
    }

    #[test]
    fn patterns_anchor_at_a_dot_and_at_the_end_first_hit_wins() {
        let config = read(json!({
            "rank_pattern": {"^model\\.layers\\.0\\.mlp\\.up_proj": 2, "up_proj": 4, "layers.*proj": 6},
            "alpha_pattern": {"q_proj|k_proj": 32.5}
        }))
        .unwrap();
        assert_eq!(config.rank_of("model.layers.0.mlp.up_proj"), 2);
        assert_eq!(config.rank_of("x.model.layers.0.mlp.up_proj"), 4);
        assert_eq!(config.rank_of("model.layers.1.mlp.up_proj"), 4);
        assert_eq!(config.rank_of("model.layers.1.mlp.gate_up_proj"), 6);
        assert_eq!(config.rank_of("gate_up_proj"), 8);
        assert_eq!(config.rank_of("up_proj.extra"), 8);
        assert_eq!(config.alpha_of("model.layers.0.self_attn.k_proj"), 32.5);
        assert_eq!(config.alpha_of("model.layers.0.self_attn.v_proj"), 16.0);
    }

    #[test]
    fn exact_paths_are_found_without_a_regex_in_the_order_of_the_file() {
        let config = read(json!({"rank_pattern": {
            "^a\\.b": 2, "b": 3, "^c\\.b": 5, "^a\\.b|d": 6, "^\\d": 7, "^a.-c": 9, "^a\\.\\-c": 10
        }}))
        .unwrap();
        assert_eq!((config.ranks.exact.len(), config.ranks.regexes.len()), (3, 4));
        // `b` comes before `^c\.b`, and behind `^a\.b`.
        for (module, rank) in [
            ("a.b", 2),
            ("c.b", 3),
            ("x.a.b", 3),
            ("d", 6),
            ("x.d", 6),
            ("7", 7),
            ("x.7", 8),
            ("a.-c", 9),
            ("a", 8),
        ] {
            assert_eq!(config.rank_of(module), rank, "{module}");
        }
        assert_eq!(exact_path("^model\\.layers\\.0\\.a_b").as_deref(), Some("model.layers.0.a_b"));
        for pattern in ["a", "^a.b", "^a\\", "^\\<a", "^a$", "^(a)", "^a|b", "^\\w"] {
            assert_eq!(exact_path(pattern), None, "{pattern}");
        }
    }

    #[test]
    fn patterns_that_would_take_gigabytes_are_refused() {
        // Ten bytes of text are a megabyte of compiled pattern: one is read, a hundred share what ten may have.
        let classes = |count: usize| -> serde_json::Map<String, Value> {
            (0..count).map(|n| (format!("\\w{{15}}{n}"), json!(1))).collect()
        };
        assert!(read(json!({"alpha_pattern": classes(1)})).is_ok());
        assert!(matches!(read(json!({"alpha_pattern": classes(100)})), Err(CheckpointError::Config { .. })));
        // Paths as other tools write them, with dots that are wildcards, and as ours does, as many as a model can have.
        let paths = |start: &str, dot: &str, count: usize| -> serde_json::Map<String, Value> {
            let path = |n| format!("{start}model{dot}layers{dot}{n}{dot}self_attn{dot}q_proj");
            (0..count).map(|n| (path(n), json!(n % 7 + 1))).collect()
        };
        let config = read(json!({"rank_pattern": paths("", ".", REGEXES_MAX)})).unwrap();
        assert_eq!(config.rank_of("model.layers.2000.self_attn.q_proj"), 2000 % 7 + 1);
        let error = read(json!({"rank_pattern": paths("", ".", REGEXES_MAX + 1)})).unwrap_err();
        assert!(error.to_string().contains("at most 2048"), "{error}");
        let config = read(json!({"rank_pattern": paths("^", "\\.", 100_000)})).unwrap();
        for n in 0..100_000 {
            assert_eq!(config.rank_of(&format!("model.layers.{n}.self_attn.q_proj")), n % 7 + 1);
        }
    }

    #[test]
    fn dots_in_patterns_are_wildcards_as_in_peft() {
        assert_eq!(read(json!({"rank_pattern": {"a.b": 3}})).unwrap().rank_of("axb"), 3);
    }

    #[test]
    fn adapters_that_are_no_plain_lora_are_refused_by_key() {
        for (change, key) in [
            (json!({"use_dora": true}), "use_dora"),
            (json!({"bias": "all"}), "bias"),
            (json!({"bias": "lora_only"}), "bias"),
            (json!({"lora_bias": true}), "lora_bias"),
            (json!({"peft_type": "IA3"}), "peft_type"),
            (json!({"target_parameters": ["mlp.experts.gate_up_proj"]}), "target_parameters"),
            (json!({"layer_replication": [[0, 4], [2, 5]]}), "layer_replication"),
            (json!({"init_lora_weights": "pissa_niter_4"}), "init_lora_weights"),
        ] {
            match read(change) {
                Err(CheckpointError::UnsupportedAdapter { what, .. }) => {
                    assert!(what.contains(key), "{what}")
                }
                other => panic!("{key}: {other:?}"),
            }
        }
        assert!(
            read(json!({"bias": "none", "use_dora": false, "target_parameters": [], "lora_bias": null,
            "init_lora_weights": "gaussian"}))
            .is_ok()
        );
    }

    #[test]
    fn numbers_and_patterns_that_make_no_sense_are_refused() {
        for change in [
            json!({"r": 0}),
            json!({"r": -1}),
            json!({"r": 5e9}),
            json!({"lora_alpha": "16"}),
            json!({"rank_pattern": {"q_proj": 0}}),
            json!({"rank_pattern": ["q_proj"]}),
            json!({"alpha_pattern": {"(": 1}}),
            json!({"alpha_pattern": {"a)|(?:b": 1}}),
            json!({"alpha_pattern": {"a{100000}{100000}": 1}}),
            json!({"use_rslora": 1}),
        ] {
            assert!(matches!(read(change.clone()), Err(CheckpointError::Config { .. })), "{change}");
        }
    }

    #[test]
    fn tensor_names_that_are_no_factor_are_refused() {
        for name in [
            "model.layers.0.mlp.up_proj.lora_A.weight",
            "base_model.model.x.lora_A.default.weight",
            "base_model.model.x.lora_B.bias",
            "base_model.model.x.lora_magnitude_vector",
            "base_model.model.mlp.experts.base_layer.lora_A.weight",
            "base_model.model.lm_head.modules_to_save.weight",
        ] {
            assert!(key(name).is_err(), "{name}");
        }
        assert!(
            matches!(key("base_model.model.lm_head.weight"), Ok(Key::Saved(name)) if name == "lm_head.weight")
        );
        assert!(
            matches!(key("base_model.model.e.base_layer.weight"), Ok(Key::Saved(name)) if name == "e.weight")
        );
    }
}
