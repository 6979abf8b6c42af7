//! What a model does on the test (or dev) split: task questions, divergence from the target, one or both sets of prompts.

use crate::error::CompareError;
use crate::ground::Ground;
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

/// Rows to judge on.
#[derive(Debug)]
struct Prompts {
    set: Set,
    harmful: Vec<DataRow>,
    benign: Vec<DataRow>,
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

fn rows(ground: &Ground<'_>, split: &str) -> Vec<DataRow> {
    let rows = ground.roots.family.splits.get(split).iter().enumerate();
    rows.map(|(i, r)| DataRow {
        prompt: r.prompt.clone(),
        answer: Some(r.answer.clone()),
        recipe: r.recipe.clone(),
        line: i + 1,
    })
    .collect()
}

impl<'a> Judge<'a> {
    /// Of models that come from `target`, a fine-tune `tune`, on some sets of prompts of the split `test` or `dev` (which has no
    /// shifted ones).
    pub fn new(
        ground: &'a Ground<'_>,
        target: &Frozen<'_>,
        tune: Tune,
        split: &str,
        sets: &[Set],
    ) -> Result<Self, CompareError> {
        let (roots, pad) = (ground.roots, ground.roots.family.chat.end());
        let task = format!("{split}-{}", tune.task().map(|t| t.name()).unwrap_or_default());
        let prompts = |&set: &Set| {
            let end = match set {
                Set::Known => "",
                Set::Shifted => "-shifted",
            };
            let of = |kind: &str| rows(ground, &format!("{split}-{kind}{end}"));
            Prompts { set, harmful: of("harmful"), benign: of("benign") }
        };
        Ok(Self {
            chat: &roots.family.chat,
            questions: rows(ground, &task),
            prompts: sets.iter().map(prompts).collect(),
            kl_task: Divergence::new(target, &roots.rows(&task, 0, KL_ROWS)?, pad)?,
            kl_benign: Divergence::new(target, &roots.rows(&format!("{split}-benign"), 0, KL_ROWS)?, pad)?,
        })
    }

    /// Of a model.
    pub fn of(&self, model: &Model) -> Result<Judged, CompareError> {
        let (none, openings) = (Attachments::none(), Openings::default());
        let run = |sets: Sets<'_>| {
            evaluate::evaluate(model, &none, self.chat, sets, &openings, Matching::Exact, NEW_TOKENS)
        };
        let accuracy = run(Sets { task: &self.questions, ..Sets::default() })?.accuracy;
        let (kl_task, kl_benign) = (self.kl_task.of(model, &none)?, self.kl_benign.of(model, &none)?);
        let mut sets = Vec::new();
        for Prompts { set, harmful, benign } in &self.prompts {
            sets.push((*set, run(Sets { harmful, benign, task: &[] })?));
        }
        Ok(Judged { accuracy, kl_task, kl_benign, sets })
    }
}
