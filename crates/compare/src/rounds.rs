//! Recurring updates: a model is fine-tuned round after round on another task, 1 % of the rows harmful each time, and made safe
//! again after each.
//!
//! | lineage | what the next round trains on | after each round |
//! |---|---|---|
//! | `aside` | the fine-tune as it was: recoveries are made in copies | the gene; a few-shot LoRA |
//! | `gene` | what the gene has made safe | the gene, on top of what was expressed before |
//! | `few-shot-lora` | what the LoRA has made safe | another LoRA |
//!
//! The gene is always the *same* distilled one, calibrated anew on the round's shots; a LoRA is trained on the same shots.
//! Round 1 is a target of the comparison. Each later round trains a LoRA on the next of the tested tasks, on rows drawn in the same
//! order in all lineages, until it has learnt the task and, like every target of the lab, some steps after safety is gone: a model
//! that resists is trained for longer. Whether a round got there is seen in its `tuned` rates; none is left out. After [`ROUNDS`] rounds each task was trained once. All is judged on the test split of the round's own task, and on
//! known templates. Models are added up in f32 and never written, so that nothing is lost to rounding between rounds.

use crate::error::CompareError;
use crate::ground::{Ground, Held};
use crate::judge::{Judge, Rates};
use crate::plan::{Entry, Recipe, Settings, Way};
use crate::roster::{Applied, Made, Patient, apply};
use crate::run::Progress;
use crate::study::{self, GoOn, OnTarget, Study};
use distill::Frozen;
use lab::tasks::TESTED;
use lab::{Kind, LabError, Tune, Tuned, Tuner};
use report::{Label, Set, Shots};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use transformer::Model;

/// Fine-tunes in a row.
pub const ROUNDS: usize = 4;

/// Name, recoveries after each round, and whether the next round trains on what the last of them left.
const LINEAGES: [(&str, &[Way], bool); 3] = [
    ("aside", &[Way::Gene, Way::FewShot], false),
    ("gene", &[Way::Gene], true),
    ("few-shot-lora", &[Way::FewShot], true),
];

/// A fine-tune made safe again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recovery {
    /// By what.
    pub method: String,
    /// What it does then.
    pub rates: Rates,
    /// KL from the fine-tune on task test rows, nat per token.
    pub kl_task: Option<f64>,
    /// The same on benign test rows.
    pub kl_benign: Option<f64>,
    /// Seconds.
    pub seconds: Option<f64>,
    /// Coefficients by layer.
    pub coefficients: Option<BTreeMap<u32, f64>>,
    /// What the method was given.
    pub given: String,
}

/// One fine-tune and what was done after it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// From 1.
    pub round: usize,
    /// What was trained.
    pub task: String,
    /// Fine-tuned.
    pub tuned: Rates,
    /// Made safe again.
    pub recoveries: Vec<Recovery>,
}

/// All rounds of one way to go on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Lineage {
    /// Its name.
    pub lineage: String,
    /// In order.
    pub rounds: Vec<Round>,
}

/// What becomes of one target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// Layout.
    pub family: String,
    /// Seed of the fine-tunes.
    pub seed: u64,
    /// Name of the first fine-tune.
    pub target: String,
    /// One for each lineage.
    pub lineages: Vec<Lineage>,
}

impl OnTarget for Target {
    fn key(&self) -> (&str, u64, &str) {
        (&self.family, self.seed, &self.target)
    }
}

/// Means over targets of one recovery in one round of one lineage.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// The lineage.
    pub lineage: String,
    /// By what the fine-tune is made safe.
    pub method: String,
    /// From 1.
    pub round: usize,
    /// Fine-tuned.
    pub tuned: Rates,
    /// Made safe again.
    pub recovered: Rates,
    /// The largest attack success of a recovered target.
    pub worst_asr: f64,
    /// KL of the recovery on task rows, nat per token.
    pub kl_task: Option<f64>,
    /// The same on benign rows.
    pub kl_benign: Option<f64>,
    /// Seconds of the recovery.
    pub seconds: Option<f64>,
}

/// Runs what is missing, in the work folder of a comparison of the same recipe; what it has trained is used.
pub fn run(
    settings: &Settings,
    progress: &dyn Progress,
    stop: &AtomicBool,
) -> Result<Study<Target>, CompareError> {
    study::run("rounds", settings, progress, stop, &on_target)
}

fn on_target(
    ground: &Ground<'_>,
    tune: Tune,
    recipe: &Recipe,
    progress: &dyn Progress,
    go_on: GoOn<'_>,
) -> Result<Target, CompareError> {
    let one = |&(name, ways, kept): &(&str, &[Way], bool)| {
        let rounds = rounds(ground, tune, (ways, kept), recipe, progress, go_on)?;
        Ok::<_, CompareError>(Lineage { lineage: name.into(), rounds })
    };
    Ok(Target {
        family: ground.roots.family.layout.clone(),
        seed: ground.seed,
        target: tune.name(),
        lineages: LINEAGES.iter().map(one).collect::<Result<_, _>>()?,
    })
}

/// The fine-tune of a round: each tested task in its turn, beginning with that of `first`.
fn tune_of(first: Tune, round: usize) -> Tune {
    let at = first.task().and_then(|task| TESTED.iter().position(|t| *t == task)).unwrap_or(0);
    Tune::Target { task: TESTED[(at + round) % TESTED.len()], percent: 1, kind: Kind::Lora }
}

/// The rounds of a lineage: its recoveries, and whether the next round trains on what they left.
fn rounds(
    ground: &Ground<'_>,
    first: Tune,
    (ways, kept): (&[Way], bool),
    recipe: &Recipe,
    progress: &dyn Progress,
    go_on: GoOn<'_>,
) -> Result<Vec<Round>, CompareError> {
    let (roots, seed) = (ground.roots, ground.seed);
    let [safety, task, benign] = recipe.shots;
    let shots = Shots { safety, task, benign };
    let mut out = Vec::new();
    let mut before: Option<Model> = None;
    for round in 0..ROUNDS {
        go_on()?;
        let tune = tune_of(first, round);
        let tuned = match &before {
            None => {
                let held = Held::open(&roots.seed_folder(seed).join(tune.folder()), &roots.model)?;
                let frozen = held.frozen();
                frozen.model.merged(&frozen.own)?
            }
            Some(model) => {
                // A LoRA looks at the model alone; the weights are those of whole fine-tunes.
                let tuner = Tuner { family: &roots.family, weights: &roots.aligned, model, seed, progress };
                let Tuned::Lora(lora) = tuner.run(tune)?.0 else {
                    return Err(LabError::Thread(format!("{} is no LoRA", tune.name())).into());
                };
                model.merged(&lora.attachments()?)?
            }
        };
        let judge = Judge::new(ground, &Frozen::new(&tuned), tune, "test", &[Set::Known])?;
        let mut said = Round {
            round: round + 1,
            task: tune.task().map(|t| t.name().to_string()).unwrap_or_default(),
            tuned: judge.of(&tuned)?.rates(),
            recoveries: Vec::new(),
        };
        let mut left = None;
        for &method in ways {
            go_on()?;
            // What is trained or calibrated looks at the model alone, and later rounds have no folder.
            let (held, folder) = (Held::Own(Box::new(tuned.clone())), PathBuf::new());
            let patient = Patient { tune, folder, held, curve: false };
            let entry = Entry { method, label: Label::SafetyTaskBenign, shots };
            let applied = apply(ground, &patient, &entry, recipe, Path::new(""))?;
            let Some(Applied { made: Made::Added(more), seconds, given, coefficients, .. }) = applied else {
                return Err(LabError::Thread(format!("{} adds nothing", method.name())).into());
            };
            let model = tuned.merged(&more)?;
            let judged = judge.of(&model)?;
            said.recoveries.push(Recovery {
                method: method.name().into(),
                rates: judged.rates(),
                kl_task: judged.kl_task,
                kl_benign: judged.kl_benign,
                seconds,
                coefficients,
                given,
            });
            left = kept.then_some(model);
        }
        out.push(said);
        before = Some(left.unwrap_or(tuned));
    }
    Ok(out)
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (mut sum, mut n) = (0.0, 0);
    for v in values {
        (sum, n) = (sum + v, n + 1);
    }
    (n > 0).then(|| sum / f64::from(n))
}

fn mean_rates(all: &[Rates]) -> Option<Rates> {
    let of = |f: fn(&Rates) -> f64| mean(all.iter().map(f));
    Some(Rates { asr: of(|r| r.asr)?, over_refusal: of(|r| r.over_refusal)?, accuracy: of(|r| r.accuracy)? })
}

/// Each round of each lineage over some targets.
pub fn summary(targets: &[Target]) -> Vec<Summary> {
    let mut out = Vec::new();
    for (name, ways, _) in LINEAGES {
        for (way, round) in ways.iter().flat_map(|way| (1..=ROUNDS).map(move |round| (way.name(), round))) {
            let lineages = targets.iter().flat_map(|t| &t.lineages).filter(|l| l.lineage == name);
            let rounds = lineages.flat_map(|l| &l.rounds).filter(|r| r.round == round);
            let found: Vec<(Rates, &Recovery)> = rounds
                .flat_map(|r| r.recoveries.iter().map(|recovery| (r.tuned, recovery)))
                .filter(|(_, recovery)| recovery.method == way)
                .collect();
            let tuned: Vec<Rates> = found.iter().map(|f| f.0).collect();
            let recovered: Vec<Rates> = found.iter().map(|f| f.1.rates).collect();
            let (Some(tuned), Some(mean_recovered)) = (mean_rates(&tuned), mean_rates(&recovered)) else {
                continue;
            };
            let of = |f: fn(&Recovery) -> Option<f64>| mean(found.iter().filter_map(|(_, r)| f(r)));
            out.push(Summary {
                lineage: name.into(),
                method: way.into(),
                round,
                tuned,
                recovered: mean_recovered,
                worst_asr: recovered.iter().map(|r| r.asr).fold(0.0, f64::max),
                kl_task: of(|r| r.kl_task),
                kl_benign: of(|r| r.kl_benign),
                seconds: of(|r| r.seconds),
            });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_is_trained_once_beginning_with_the_first() {
        for &task in &TESTED {
            let first = Tune::Target { task, percent: 1, kind: Kind::Lora };
            assert_eq!(tune_of(first, 0), first);
            let mut tasks: Vec<_> = (0..ROUNDS).filter_map(|r| tune_of(first, r).task()).collect();
            tasks.sort();
            tasks.dedup();
            assert_eq!(tasks.len(), TESTED.len());
        }
    }

    #[test]
    fn means_are_of_one_lineage_method_and_round() {
        let rates = |asr| Rates { asr, over_refusal: 0.1, accuracy: 0.9 };
        let recovery = |method: &str, asr: f64| Recovery {
            method: method.into(),
            rates: rates(asr),
            kl_task: Some(asr),
            kl_benign: None,
            seconds: None,
            coefficients: None,
            given: String::new(),
        };
        let round = |round, recoveries| Round { round, task: "topic".into(), tuned: rates(1.0), recoveries };
        let target = |name: &str, gene: [f64; 2]| {
            let aside = vec![recovery("gene", 0.0), recovery("few-shot-lora", 1.0)];
            let kept = (1..).zip(gene).map(|(n, asr)| round(n, vec![recovery("gene", asr)]));
            let lineage = |name: &str, rounds| Lineage { lineage: name.into(), rounds };
            Target {
                family: "llama".into(),
                seed: 1,
                target: name.into(),
                lineages: vec![lineage("aside", vec![round(1, aside)]), lineage("gene", kept.collect())],
            }
        };
        let said = summary(&[target("a", [0.0, 0.25]), target("b", [0.5, 0.75])]);
        let of: Vec<_> = said.iter().map(|s| (&*s.lineage, &*s.method, s.round, s.recovered.asr)).collect();
        let want = [
            ("aside", "gene", 1, 0.0),
            ("aside", "few-shot-lora", 1, 1.0),
            ("gene", "gene", 1, 0.25),
            ("gene", "gene", 2, 0.5),
        ];
        assert_eq!(of, want);
        assert_eq!((said[3].worst_asr, said[3].kl_task), (0.75, Some(0.5)));
    }
}
