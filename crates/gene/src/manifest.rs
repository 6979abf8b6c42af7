//! `gene.json`: what a gene says about itself.
//!
//! `energy` is the squared Frobenius norm of the difference; `residual`, `captured`, `noise_floor` and the bound are
//! shares of it. `modules` lists the linear modules of all layers, `rest` the other tensors that changed; tensors that
//! are equal and no linear module are only counted in `classes`. Keys that are not known here are kept.
//!
//! Not here: times, paths and the command as typed, which change between equal runs and go to `log.json`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The schema written and read here.
pub const SCHEMA: u32 = 1;

/// Name of the manifest.
pub const MANIFEST_FILE: &str = "gene.json";
/// Name of the factors.
pub const ADAPTER_FILE: &str = "adapter_model.safetensors";
/// Name of the file of what is no linear module.
pub const REST_FILE: &str = "rest.safetensors";

/// What became of a tensor of the two inputs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// Equal in every element.
    #[default]
    Unchanged,
    /// Kept as factors.
    LowRank,
    /// Kept as the exact difference.
    Full,
    /// Some rows changed, kept as differences of those rows.
    RowPatch,
    /// Changed and not kept; its energy counts as residual.
    LeftOut,
}

/// A linear module of a layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Module {
    /// Path without `.weight`.
    pub name: String,
    /// Layer number.
    pub layer: u32,
    /// [out, in].
    pub shape: [u64; 2],
    /// What became of it.
    pub class: Class,
    /// Inner side of the factors, 0 without factors.
    #[serde(default)]
    pub rank: usize,
    /// Squared Frobenius norm of its difference.
    #[serde(default)]
    pub energy: f64,
    /// Share of the energy that is not kept.
    #[serde(default)]
    pub residual: f64,
    /// Share of the energy that is rounding of the stored values.
    #[serde(default)]
    pub noise_floor: f64,
    /// Keys that are not known here.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// A tensor that changed and is no linear module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RestEntry {
    /// Tensor name.
    pub name: String,
    /// Layer number; none for what belongs to no layer.
    pub layer: Option<u32>,
    /// Its shape.
    pub shape: Vec<u64>,
    /// `full`, `row-patch` or `left-out`.
    pub class: Class,
    /// Squared Frobenius norm of its difference.
    pub energy: f64,
    /// Keys that are not known here.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// Which models a gene fits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Family {
    /// `model_type` of the config.
    pub model_type: String,
    /// Hash over the linear modules; see [`crate::fingerprint`].
    pub fingerprint: String,
    /// Keys that are not known here.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// One of the two checkpoints a gene came from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Name, without a path.
    pub name: String,
    /// Revision on the Hub, if known.
    pub revision: Option<String>,
    /// Content hash.
    pub content: String,
    /// Keys that are not known here.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The two checkpoints a gene came from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sources {
    /// The safe one.
    pub aligned: Source,
    /// The one that lost safety.
    pub degraded: Source,
    /// Keys that are not known here.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// A layer as selection sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerEntry {
    /// Layer number.
    pub layer: u32,
    /// How much it matters, if that was measured.
    pub score: Option<f64>,
    /// Whether the gene is kept there.
    pub selected: bool,
    /// Keys that are not known here.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The parts of a manifest that the writer of a gene cannot know by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct ManifestParts {
    /// Which models the gene fits.
    pub family: Family,
    /// Version of the tool.
    pub tool: String,
    /// Options that shaped the result.
    pub options: Map<String, Value>,
    /// Where it came from; the degraded one's name is written as the adapter's base.
    pub sources: Sources,
    /// Squared Frobenius norm of the whole difference.
    pub energy: f64,
    /// Share of it that is kept.
    pub captured: f64,
    /// Share that no factors of these ranks could exceed.
    pub captured_upper_bound: f64,
    /// Share that is rounding of the stored values.
    pub noise_floor: f64,
    /// Further keys.
    pub extra: Map<String, Value>,
}

/// `gene.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GeneManifest {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Which models the gene fits.
    pub family: Family,
    /// Version of the tool that wrote it.
    pub tool: String,
    /// Options that shaped it.
    pub options: Map<String, Value>,
    /// Where it came from.
    pub sources: Sources,
    /// Squared Frobenius norm of the whole difference.
    pub energy: f64,
    /// Share of it that is kept.
    pub captured: f64,
    /// Share that no factors of these ranks could exceed.
    pub captured_upper_bound: f64,
    /// Share that is rounding of the stored values.
    pub noise_floor: f64,
    /// How many tensors of the inputs ended in which class.
    pub classes: BTreeMap<Class, u64>,
    /// The linear modules of all layers, by layer and name.
    pub modules: Vec<Module>,
    /// Other tensors that changed, by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rest: Vec<RestEntry>,
    /// The layers that hold something.
    #[serde(default)]
    pub layers: Vec<LayerEntry>,
    /// Keys that are not known here.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}
