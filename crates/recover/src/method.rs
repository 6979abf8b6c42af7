//! What a method gets, and what it gives.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use checkpoint::{Checkpoint, CheckpointError, FolderWriter};
use serde::Serialize;
use serde_json::{Map, Value};
use stream::Progress;

use crate::algebra::Algebra;
use crate::error::{RecoverError, Result};
use crate::registry::{MethodInfo, Need};
use crate::report::{ModuleReport, Tensors};
use crate::side::Side;

/// What a recovery writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// A model folder.
    Merged,
    /// A PEFT adapter.
    Adapter,
    /// A folder with `merged` and `adapter` in it.
    Both,
}

/// A row of data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Shot {
    /// The user's turn.
    pub prompt: String,
    /// The wanted answer.
    pub answer: String,
}

/// The few examples that some methods need.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shots {
    /// Harmful prompts with refusals.
    pub safety: Vec<Shot>,
    /// Rows of the target's task.
    pub task: Vec<Shot>,
    /// Harmless prompts with answers.
    pub benign: Vec<Shot>,
}

/// All that a method may need. What it does not need is not looked at.
#[derive(Debug, Clone, Default)]
pub struct Inputs {
    /// The fine-tuned model, a folder or an adapter folder; of a method that comes before training, the aligned model.
    pub target: PathBuf,
    /// The model that still refuses.
    pub aligned: Option<PathBuf>,
    /// The model before it was aligned.
    pub base: Option<PathBuf>,
    /// The aligned model after it lost its safety.
    pub degraded: Option<PathBuf>,
    /// A LoRA over the aligned model that was trained on refusals.
    pub safety_adapter: Option<PathBuf>,
    /// The base of inputs that are adapters. Without it, what each names, else the aligned model's folder.
    pub adapter_base: Option<PathBuf>,
    /// Examples.
    pub shots: Shots,
}

/// How and where.
pub struct Job<'a> {
    /// Where the result goes.
    pub out: &'a Path,
    /// What is written.
    pub form: Form,
    /// Whether an output that exists may be replaced.
    pub force: bool,
    /// Bytes of one module's work.
    pub memory_bytes: u64,
    /// What computes on weights.
    pub algebra: &'a dyn Algebra,
    /// Set to stop; nothing is left then.
    pub stop: &'a AtomicBool,
    /// Hears how far it has come.
    pub progress: &'a dyn Progress,
}

impl Job<'_> {
    /// An error if a module alone needs more memory than there may be.
    pub(crate) fn check_memory(&self, module: &str, need_bytes: u64) -> Result<()> {
        match need_bytes <= self.memory_bytes {
            true => Ok(()),
            false => Err(RecoverError::Memory {
                module: module.to_owned(),
                need_bytes,
                limit_bytes: self.memory_bytes,
            }),
        }
    }

    /// An error once it was told to stop.
    pub(crate) fn check_stop(&self) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) { Err(RecoverError::Interrupted) } else { Ok(()) }
    }
}

/// The opened inputs of a method: all that its entry names as needed is there.
#[derive(Debug)]
pub struct Models {
    method: &'static MethodInfo,
    /// The target.
    pub target: Side,
    aligned: Option<Side>,
    base: Option<Side>,
    degraded: Option<Side>,
    safety_adapter: Option<Side>,
    /// Examples of the kinds that the method takes.
    pub shots: Shots,
}

impl Models {
    /// Opens what a method needs. Headers are read and checked, weights are not.
    pub fn open(method: &'static MethodInfo, inputs: &Inputs) -> Result<Models> {
        let wanted = |need: Need| method.needs.contains(&need) || method.optional.contains(&need);
        for need in method.needs {
            let there = match need {
                Need::Aligned => inputs.aligned.is_some(),
                Need::Base => inputs.base.is_some(),
                Need::Degraded => inputs.degraded.is_some(),
                Need::SafetyAdapter => inputs.safety_adapter.is_some(),
                Need::SafetyShots => !inputs.shots.safety.is_empty(),
                Need::TaskShots => !inputs.shots.task.is_empty(),
                Need::BenignShots => !inputs.shots.benign.is_empty(),
            };
            if !there {
                return Err(RecoverError::Missing { method: method.name, need: *need });
            }
        }
        let open = |need: Need, dir: &Option<PathBuf>| -> Result<Option<Side>> {
            match dir.as_ref().filter(|_| wanted(need)) {
                Some(dir) => Ok(Some(open_side(dir, inputs)?)),
                None => Ok(None),
            }
        };
        let taken = |need: Need, rows: &[Shot]| if wanted(need) { rows.to_vec() } else { Vec::new() };
        let shots = Shots {
            safety: taken(Need::SafetyShots, &inputs.shots.safety),
            task: taken(Need::TaskShots, &inputs.shots.task),
            benign: taken(Need::BenignShots, &inputs.shots.benign),
        };
        Ok(Models {
            method,
            target: open_side(&inputs.target, inputs)?,
            aligned: open(Need::Aligned, &inputs.aligned)?,
            base: open(Need::Base, &inputs.base)?,
            degraded: open(Need::Degraded, &inputs.degraded)?,
            safety_adapter: open(Need::SafetyAdapter, &inputs.safety_adapter)?,
            shots,
        })
    }

    /// The aligned model.
    pub fn aligned(&self) -> Result<&Side> {
        self.there(&self.aligned, Need::Aligned)
    }

    /// The unaligned base model.
    pub fn base(&self) -> Result<&Side> {
        self.there(&self.base, Need::Base)
    }

    /// The degraded model.
    pub fn degraded(&self) -> Result<&Side> {
        self.there(&self.degraded, Need::Degraded)
    }

    /// The safety adapter, over its base.
    pub fn safety_adapter(&self) -> Result<&Side> {
        self.there(&self.safety_adapter, Need::SafetyAdapter)
    }

    /// Every side that was opened, by the name of its argument.
    pub(crate) fn sides(&self) -> impl Iterator<Item = (&'static str, &Side)> {
        let optional = [
            ("aligned", &self.aligned),
            ("base", &self.base),
            ("degraded", &self.degraded),
            ("safety-adapter", &self.safety_adapter),
        ];
        std::iter::once(("target", &self.target))
            .chain(optional.into_iter().filter_map(|(name, side)| Some((name, side.as_ref()?))))
    }

    fn there<'a>(&self, side: &'a Option<Side>, need: Need) -> Result<&'a Side> {
        side.as_ref().ok_or(RecoverError::Missing { method: self.method.name, need })
    }
}

fn open_side(dir: &Path, inputs: &Inputs) -> Result<Side> {
    let is_adapter = dir.join("adapter_config.json").exists();
    let opened = match Checkpoint::open(dir, inputs.adapter_base.as_deref().filter(|_| is_adapter)) {
        // What it names is not here; a LoRA that a method can use is over the aligned model.
        Err(CheckpointError::NoBase { .. }) if inputs.adapter_base.is_none() && inputs.aligned.is_some() => {
            Checkpoint::open(dir, inputs.aligned.as_deref())
        }
        opened => opened,
    };
    Side::new(opened?)
}

/// The folders being made; which ones are there was asked for.
#[derive(Debug, Default)]
pub struct Outputs {
    /// A model folder.
    pub merged: Option<FolderWriter>,
    /// An adapter folder.
    pub adapter: Option<FolderWriter>,
}

/// What a method did.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// The target's tensors by what became of them.
    pub tensors: Tensors,
    /// The modules that were looked at.
    pub modules: Vec<ModuleReport>,
    /// What was measured on the shots, by its name.
    pub measured: Map<String, Value>,
    /// What a reader should know.
    pub notes: Vec<String>,
    /// Python files in the output.
    pub code: Vec<String>,
}

/// A method with its options.
pub trait Method: fmt::Debug + Send + Sync {
    /// Its entry in the table of all methods.
    fn info(&self) -> &'static MethodInfo;

    /// Its options, defaults written out, by the names of [`Settings`](crate::Settings).
    fn options(&self) -> Map<String, Value>;

    /// Refuses what the headers show to be wrong, before anything is written.
    fn check(&self, models: &Models, form: Form) -> Result<()>;

    /// Writes into `outputs`; the caller publishes them.
    fn write(&self, models: &Models, outputs: &Outputs, job: &Job<'_>) -> Result<Outcome>;
}
