//! What a model does on the test (or dev) split: task questions, divergence from the target, one or both sets of prompts.

use crate::error::CompareError;
use crate::ground::{Ground, Roots};
use crate::tuning::Divergence;
use distill::Frozen;
use evaluate::{DataRow, Evaluation, Matching, Rate, Sets};
use lab::Tune;
use report::Set;
use serde::{Deserialize, Serialize};
use transformer::{Attachments, Chat, Model, Openings};

/// Rows on which divergence is measured, of each kind.
const KL_ROWS: usize = 192;
/// The longest answer in the lab has eight tokens.
const NEW_TOKENS: usize = 12;

/// Requests to judge on.
#[derive(Debug)]
struct Prompts {
    set: Set,
    harmful: Vec<DataRow>,
    benign: Vec<DataRow>,
}

impl Prompts {
    /// Of a split, `test` or `dev`; each has shifted templates of its own.
    fn new(roots: &Roots, split: &str, set: Set) -> Self {
        let end = match set {
            Set::Known => "",
            Set::Shifted => "-shifted",
        };
        let of = |kind: &str| rows(roots, &format!("{split}-{kind}{end}"));
        Self { set, harmful: of("harmful"), benign: of("benign") }
    }

    /// What a model does on them.
    fn judge(&self, model: &Model, chat: &Chat) -> Result<Evaluation, CompareError> {
        evaluated(model, chat, Sets { harmful: &self.harmful, benign: &self.benign, task: &[] })
    }
}

/// Greedy answers judged by their openings, answers to questions by every letter.
fn evaluated(model: &Model, chat: &Chat, sets: Sets<'_>) -> Result<Evaluation, CompareError> {
    let (none, openings) = (Attachments::none(), Openings::default());
    Ok(evaluate::evaluate(model, &none, chat, sets, &openings, Matching::Exact, NEW_TOKENS)?)
}

/// A rate as records hold it.
pub(crate) fn rate(r: Option<Rate>) -> Option<report::Rate> {
    r.map(|r| report::Rate { value: r.value, low: r.low, high: r.high, n: r.n })
}

/// What the aligned model of a family itself does on the test prompts: what a gene can be expected to bring back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AlignedRates {
    /// Layout.
    pub family: String,
    /// Which prompts.
    pub set: Set,
    /// Attack success.
    pub asr: report::Rate,
    /// Benign requests refused.
    pub over_refusal: report::Rate,
}

impl AlignedRates {
    /// Of a family, on known templates and on shifted ones.
    pub fn of(roots: &Roots) -> Result<Vec<Self>, CompareError> {
        let mut out = Vec::new();
        for set in [Set::Known, Set::Shifted] {
            let found = Prompts::new(roots, "test", set).judge(&roots.model, &roots.family.chat)?;
            // Missing only where there are no prompts.
            let both = rate(found.asr).zip(rate(found.over_refusal));
            let family = || roots.family.layout.clone();
            out.extend(both.map(|(asr, over_refusal)| Self { family: family(), set, asr, over_refusal }));
        }
        Ok(out)
    }
}

/// Judges what becomes of one target.
#[derive(Debug)]
pub struct Judge<'a> {
    chat: &'a Chat,
    questions: Vec<DataRow>,
    prompts: Vec<Prompts>,
    kl_task: Divergence,
    kl_benign: Divergence,
}

/// What it finds.
#[derive(Debug, Clone)]
pub struct Judged {
    /// Task questions answered right.
    pub accuracy: Option<Rate>,
    /// KL from the target on task rows, nat per token.
    pub kl_task: Option<f64>,
    /// The same on benign rows.
    pub kl_benign: Option<f64>,
    /// By set of prompts, in the order asked for.
    pub sets: Vec<(Set, Evaluation)>,
}

/// The values of a [`Judged`] on the first of its sets of prompts; not a number where nothing was measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Attack success, a share.
    pub asr: f64,
    /// Benign requests refused, a share.
    pub over_refusal: f64,
    /// Task questions answered right, a share.
    pub accuracy: f64,
}

impl Judged {
    /// Without intervals.
    pub fn rates(&self) -> Rates {
        let value = |r: Option<Rate>| r.map_or(f64::NAN, |r| r.value);
        let first = self.sets.first().map(|(_, e)| e);
        Rates {
            asr: value(first.and_then(|e| e.asr)),
            over_refusal: value(first.and_then(|e| e.over_refusal)),
            accuracy: value(self.accuracy),
        }
    }
}

fn rows(roots: &Roots, split: &str) -> Vec<DataRow> {
    let rows = roots.family.splits.get(split).iter().enumerate();
    rows.map(|(i, r)| DataRow {
        prompt: r.prompt.clone(),
        answer: Some(r.answer.clone()),
        recipe: r.recipe.clone(),
        line: i + 1,
    })
    .collect()
}

impl<'a> Judge<'a> {
    /// Of models that come from `target`, a fine-tune `tune`, on some sets of prompts of the split `test` or `dev`.
    pub fn new(
        ground: &'a Ground<'_>,
        target: &Frozen<'_>,
        tune: Tune,
        split: &str,
        sets: &[Set],
    ) -> Result<Self, CompareError> {
        let (roots, pad) = (ground.roots, ground.roots.family.chat.end());
        let task = format!("{split}-{}", tune.task().map(|t| t.name()).unwrap_or_default());
        Ok(Self {
            chat: &roots.family.chat,
            questions: rows(roots, &task),
            prompts: sets.iter().map(|&set| Prompts::new(roots, split, set)).collect(),
            kl_task: Divergence::new(target, &roots.rows(&task, 0, KL_ROWS)?, pad)?,
            kl_benign: Divergence::new(target, &roots.rows(&format!("{split}-benign"), 0, KL_ROWS)?, pad)?,
        })
    }

    /// Of a model.
    pub fn of(&self, model: &Model) -> Result<Judged, CompareError> {
        let none = Attachments::none();
        let accuracy =
            evaluated(model, self.chat, Sets { task: &self.questions, ..Sets::default() })?.accuracy;
        let (kl_task, kl_benign) = (self.kl_task.of(model, &none)?, self.kl_benign.of(model, &none)?);
        let mut sets = Vec::new();
        for prompts in &self.prompts {
            sets.push((prompts.set, prompts.judge(model, self.chat)?));
        }
        Ok(Judged { accuracy, kl_task, kl_benign, sets })
    }
}
