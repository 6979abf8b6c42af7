//! What a recovery did, for machines: it is kept in the output's `safegene.json`, and printed with `--json`.

use std::path::PathBuf;

use checkpoint::{Role, Unit, module_of};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// What a recovery did. Norms are Frobenius norms, not squared.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// 1.
    pub schema: u32,
    /// The method's name.
    pub method: String,
    /// Its paper, an arXiv id.
    pub paper: Option<String>,
    /// Its options, defaults written out.
    pub options: Map<String, Value>,
    /// The folders; not part of the record beside the weights.
    #[serde(default)]
    pub outputs: Vec<PathBuf>,
    /// The output was there already, made from the same inputs and options.
    #[serde(default)]
    pub already: bool,
    /// Not one element of the output differs from the target.
    pub changed_nothing: bool,
    /// The target's tensors by what became of them.
    pub tensors: Tensors,
    /// Elements that differ from the target's.
    pub elements_changed: u64,
    /// The norm of all that changed, after rounding.
    pub change_norm: f64,
    /// The modules that the method looked at, sorted by name.
    pub modules: Vec<ModuleReport>,
    /// What a method that runs a model measured on the shots, by its name.
    #[serde(default)]
    pub measured: Map<String, Value>,
    /// What a reader should know: what the method leaves alone, what was not done.
    pub notes: Vec<String>,
    /// Python files in the output: code that runs when the model is loaded.
    #[serde(default)]
    pub code: Vec<String>,
    /// How long it took.
    pub wall_s: f64,
}

/// Counts of tensors; `changed + same + kept` is all of the target's (of an adapter's, if only that was written).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tensors {
    /// The method has changed an element.
    pub changed: u64,
    /// The method has looked, and every element came out as it was.
    pub same: u64,
    /// The method does not touch them: the target's own, byte for byte (a target adapter's product merged).
    pub kept: u64,
}

/// What became of one module.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModuleReport {
    /// `model.layers.0.self_attn.q_proj`; of what is no module, the tensor's name.
    pub name: String,
    /// The layer, if it is of one.
    pub layer: Option<u32>,
    /// What the method decided.
    pub action: Action,
    /// Whether an element changed.
    pub changed: bool,
    /// Elements of the weight that changed; of the factors, if only an adapter was written.
    pub elements_changed: u64,
    /// The norm of the change of the weight, after rounding; before it, if only an adapter was written.
    pub change_norm: f64,
    /// The cosine that the method decides by.
    pub cosine: Option<f64>,
    /// How large what the method makes is beside what it makes it of: `|C BA| / |BA|` of a projected update,
    /// `|SVD_k(D)| / |D|` of a difference cut to a rank.
    pub norm_ratio: Option<f64>,
    /// The rank of factors.
    pub rank: Option<usize>,
    /// The share of the entries that fine-tuning moved which stay fine-tuned.
    #[serde(default)]
    pub kept: Option<f64>,
}

/// What a method decided about a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Left as it is.
    Kept,
    /// Something was added.
    Added,
    /// Averaged with another model or adapter.
    Merged,
    /// Some of its entries went back to the aligned model's.
    Restored,
    /// Its update was projected.
    Projected,
    /// Its update was removed.
    Dropped,
}

impl ModuleReport {
    /// Of a unit that was left as it is.
    pub(crate) fn of(unit: &Unit) -> ModuleReport {
        let name = match unit.role {
            Role::Linear { .. } => module_of(&unit.name).unwrap_or(&unit.name),
            _ => &unit.name,
        };
        ModuleReport {
            name: name.to_owned(),
            layer: unit.role.layer(),
            action: Action::Kept,
            changed: false,
            elements_changed: 0,
            change_norm: 0.0,
            cosine: None,
            norm_ratio: None,
            rank: None,
            kept: None,
        }
    }
}
