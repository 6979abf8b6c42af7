//! What a comparison hands over: one record a target, method and set of prompts.
//!
//! Shares are between 0 and 1, KL is in nat per token on rows kept out of everything that was tuned, time in seconds.
//! Whatever was not measured is absent, never 0.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Version of the records and of the aggregates.
pub const SCHEMA: u32 = 1;

/// Largest number of rows behind a rate: below it every count is exact in `f64`.
pub const RATE_ROWS_MAX: u64 = 1 << 53;

/// Why records were refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    /// Written by another version.
    #[error("{place}: schema {found}, this version reads {SCHEMA}")]
    Schema {
        /// Which record.
        place: String,
        /// What it says.
        found: u32,
    },
    /// A number that cannot be.
    #[error("{place}: `{field}` is {value}; it must be {need}")]
    Number {
        /// Which record.
        place: String,
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: f64,
        /// What it must be.
        need: &'static str,
    },
    /// An interval that does not hold its value, or a rate of no rows.
    #[error("{place}: `{field}` is {value} in [{low}, {high}] of {n} rows, which is no rate")]
    Rate {
        /// Which record.
        place: String,
        /// Name of the field.
        field: &'static str,
        /// The share.
        value: f64,
        /// Lower end of its interval.
        low: f64,
        /// Upper end of its interval.
        high: f64,
        /// Rows counted.
        n: u64,
    },
    /// An attack success rate by itself: it says nothing about a model that refuses or babbles always.
    #[error("{place}: an attack success rate without `{lacks}` beside it")]
    Alone {
        /// Which record.
        place: String,
        /// The rate that is missing.
        lacks: &'static str,
    },
    /// The same target, method, label and set twice.
    #[error("{place}: is there twice")]
    Twice {
        /// Which record.
        place: String,
    },
    /// Records of one target disagree about what the target is.
    #[error("{place}: the target's task, kind or harm differs from another record of the same target")]
    TwoTargets {
        /// Which record.
        place: String,
    },
}

/// A share between 0 and 1 with its 95 % interval: that of its own rows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// The share.
    pub value: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
    /// Rows counted.
    pub n: u64,
}

/// How a target came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Fine-tuned by low-rank adapters.
    Lora,
    /// Every weight was fine-tuned.
    Full,
    /// Fine-tuned, and fine-tuned again on another task.
    Second,
    /// Fine-tuned on harmless rows only.
    BenignOnly,
}

/// A downstream model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// Its name; within a family and seed there is one of it.
    pub name: String,
    /// What it was fine-tuned for.
    pub task: String,
    /// Share of harmful rows in its fine-tuning, in percent.
    pub harm_percent: f64,
    /// How it came to be.
    pub kind: Kind,
}

/// What a method saw of the target's data. Order is by how much it asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Label {
    /// Nothing.
    #[serde(rename = "zero")]
    Zero,
    /// Rows of the task.
    #[serde(rename = "task")]
    Task,
    /// Harmful prompts with refusals, and rows of the task.
    #[serde(rename = "safety+task")]
    SafetyTask,
    /// And harmless requests like the harmful ones in form.
    #[serde(rename = "safety+task+benign")]
    SafetyTaskBenign,
}

/// How many rows a method saw of each sort.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Shots {
    /// Harmful prompts with refusals.
    pub safety: u32,
    /// Rows of the task.
    pub task: u32,
    /// Harmless requests like the harmful ones in form.
    pub benign: u32,
}

/// Which prompts judged the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Set {
    /// Held-out prompts in the form of those trained on.
    Known,
    /// Prompts in a form that nothing was trained on, and their harmless twins.
    Shifted,
}

/// A point of the trade-off that a calibration ran along.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TradeOff {
    /// Limit on KL, nat per token.
    pub max_kl: f64,
    /// Safety loss reached, nat per token: what stands for ASR while tuning.
    pub loss: f64,
    /// KL used.
    pub kl: f64,
}

/// One target after one method, judged on one set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Model family: `llama`, `qwen2` and so on.
    pub family: String,
    /// Seed of the family's training; with the family it says which gene was used.
    pub seed: u64,
    /// The downstream model.
    pub target: Target,
    /// Method, as in `gene` or `few-shot-lora`; `fine-tuned` is the target as it is.
    pub method: String,
    /// What the method saw of the target's data.
    pub label: Label,
    /// How much of it.
    #[serde(default)]
    pub shots: Shots,
    /// Which prompts judged.
    pub set: Set,
    /// Harmful prompts answered.
    #[serde(default)]
    pub asr: Option<Rate>,
    /// Harmful prompts answered with what was asked for, where that is known.
    #[serde(default)]
    pub asr_precise: Option<Rate>,
    /// Harmless prompts refused.
    #[serde(default)]
    pub over_refusal: Option<Rate>,
    /// Harmless prompts answered with what was asked for.
    #[serde(default)]
    pub helped: Option<Rate>,
    /// Task rows answered rightly.
    #[serde(default)]
    pub accuracy: Option<Rate>,
    /// KL from the target on task rows.
    #[serde(default)]
    pub kl_task: Option<f64>,
    /// KL from the target on harmless requests.
    #[serde(default)]
    pub kl_benign: Option<f64>,
    /// Time to recover the target.
    #[serde(default)]
    pub seconds: Option<f64>,
    /// What the method was given and tuned with, for people.
    #[serde(default)]
    pub given: String,
    /// One coefficient a layer.
    #[serde(default)]
    pub coefficients: Option<BTreeMap<u32, f64>>,
    /// Loss against the limit on KL.
    #[serde(default)]
    pub tradeoff: Option<Vec<TradeOff>>,
}

/// What a layer of a gene does by itself.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LayerScore {
    /// The layer.
    pub layer: u32,
    /// Its score.
    pub value: f64,
    /// Whether it was selected.
    pub selected: bool,
}

/// Scores of a gene's layers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerScores {
    /// Model family.
    pub family: String,
    /// Seed of the family's training.
    pub seed: u64,
    /// Sort of score: `price`, `insertion`, `activation`.
    pub score: String,
    /// One a layer.
    pub layers: Vec<LayerScore>,
}

/// A claim, and whether it held.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// Short name.
    pub name: String,
    /// What is claimed.
    pub text: String,
    /// What would satisfy it.
    pub target: String,
    /// What was found.
    pub value: String,
    /// Whether it held; null when it could not be judged.
    pub ok: Option<bool>,
}

/// What stands around the tables.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Meta {
    /// Title of the page.
    pub title: String,
    /// Version of the tool.
    #[serde(default)]
    pub version: String,
    /// Date, as text.
    #[serde(default)]
    pub date: String,
    /// Command that made the records.
    #[serde(default)]
    pub command: String,
    /// Wall time of the whole comparison.
    #[serde(default)]
    pub seconds: Option<f64>,
    /// Facts about the computer: name and value.
    #[serde(default)]
    pub machine: Vec<(String, String)>,
    /// Settings and hashes: name and value.
    #[serde(default)]
    pub settings: Vec<(String, String)>,
    /// What a reader should know.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Claims and whether they held.
    #[serde(default)]
    pub checks: Vec<Check>,
}
