//! All methods in one table: what the help, the list and the documents say comes from here.

use std::fmt;

use serde::Serialize;

use crate::error::{RecoverError, Result};
use crate::method::Method;
use crate::settings::Settings;
use crate::{few_shot, low_rank, resta, safe_delta, safe_lora, safe_merge, salora, wise_ft};

/// What a method needs beside the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Need {
    /// The model that still refuses.
    Aligned,
    /// The model before it was aligned.
    Base,
    /// The aligned model after it lost its safety.
    Degraded,
    /// A LoRA over the aligned model that was trained on refusals.
    SafetyAdapter,
    /// Harmful prompts with refusals.
    SafetyShots,
    /// Rows of the target's task.
    TaskShots,
    /// Harmless prompts with answers.
    BenignShots,
}

impl Need {
    /// How the command line is given it.
    pub fn argument(self) -> &'static str {
        match self {
            Need::Aligned => "`--aligned DIR`",
            Need::Base => "`--base DIR`",
            Need::Degraded => "`--degraded DIR`",
            Need::SafetyAdapter => "`--safety-adapter DIR`",
            Need::SafetyShots => "`--safety-shots FILE`",
            Need::TaskShots => "`--task-shots FILE`",
            Need::BenignShots => "`--benign-shots FILE`",
        }
    }
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Need::Aligned => "the aligned model",
            Need::Base => "the unaligned base model",
            Need::Degraded => "a degraded model",
            Need::SafetyAdapter => "a safety adapter",
            Need::SafetyShots => "safety shots",
            Need::TaskShots => "task shots",
            Need::BenignShots => "benign shots",
        })
    }
}

/// When a method has its turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum When {
    /// On the fine-tuned model.
    AfterTraining,
    /// While it is fine-tuned.
    AtTraining,
    /// On the aligned model; targets are trained from the result.
    BeforeTraining,
}

/// An option of a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct OptionInfo {
    /// Its name in [`Settings`] and on the command line.
    pub name: &'static str,
    /// Its default, as it is written.
    pub default: &'static str,
    /// What it is.
    pub help: &'static str,
}

/// A method: what it is, what it needs, and how it is made.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct MethodInfo {
    /// `resta`.
    pub name: &'static str,
    /// What people call it.
    pub title: &'static str,
    /// Its source, an arXiv id; `None` for a control of our own.
    pub paper: Option<&'static str>,
    /// What it computes.
    pub formula: &'static str,
    /// When it is applied.
    pub when: When,
    /// What it needs beside the target.
    pub needs: &'static [Need],
    /// What it takes if it is there.
    pub optional: &'static [Need],
    /// Its options.
    pub options: &'static [OptionInfo],
    /// Where it departs from its source, or what the source leaves open.
    pub deviations: &'static str,
    /// The method with these options.
    #[serde(skip)]
    pub build: fn(&Settings) -> Result<Box<dyn Method>>,
}

/// All methods.
pub static METHODS: &[&MethodInfo] = &[
    &resta::INFO,
    &wise_ft::INFO,
    &low_rank::RESTORE,
    &low_rank::LOX,
    &safe_lora::INFO,
    &safe_merge::INFO,
    &safe_delta::INFO,
    &few_shot::INFO,
    &salora::INFO,
];

/// The method of this name.
pub fn by_name(name: &str) -> Result<&'static MethodInfo> {
    let found = METHODS.iter().find(|method| method.name == name);
    found.copied().ok_or_else(|| RecoverError::UnknownMethod { name: name.to_owned() })
}
