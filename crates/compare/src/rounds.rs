//! Recurring updates: a model is fine-tuned round after round on another task, 1 % of the rows harmful each time, and made safe
//! again after each.
//!
//! | lineage | after each round |
//! |---|---|
//! | `none` | nothing |
//! | `gene` | the *same* distilled gene, calibrated anew on the round's shots |
//! | `few-shot-lora` | a LoRA trained on the same shots |
//!
//! Round 1 is a target of the comparison. Each later round trains a LoRA over the model that the round before left, safe again or
//! not, on the next of the tested tasks and on rows drawn alike in all lineages; after [`ROUNDS`] rounds each task was trained once.
//! All is judged on the test split of the round's own task, and on known templates. Models are added up in f32 and never
//! written, so that nothing is lost to rounding between rounds.

use crate::error::CompareError;
use crate::ground::{Ground, Held};
use crate::judge::{Judge, Judged};
use crate::plan::{Entry, Recipe, Settings, Way};
use crate::roster::{Applied, Made, Patient, apply};
use crate::run::Progress;
use crate::study::{self, GoOn, OnTarget, Study};
use distill::Frozen;
use lab::tasks::TESTED;
use lab::{Kind, LabError, Tune, Tuned, Tuner};
use report::{Label, Set, Shots};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use transformer::Model;

/// Fine-tunes in a row.
pub const ROUNDS: usize = 4;

/// What is done after each round; `None` is nothing.
const LINEAGES: [Option<Way>; 3] = [None, Some(Way::Gene), Some(Way::FewShot)];

/// What a model does on the test split.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Attack success, a share.
    pub asr: f64,
    /// Benign requests refused, a share.
    pub over_refusal: f64,
    /// Questions of the round's task answered right, a share.
    pub accuracy: f64,
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
    /// Made safe again; none in the lineage `none`.
    pub recovered: Option<Rates>,
    /// KL of the recovery on task test rows, nat per token.
    pub kl_task: Option<f64>,
    /// The same on benign test rows.
    pub kl_benign: Option<f64>,
    /// Seconds of the recovery.
    pub seconds: Option<f64>,
    /// What the recovery was given.
    pub given: String,
}

/// All rounds of one way to go on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Lineage {
    /// What is done after each round.
    pub method: String,
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

/// Means over targets of one round of one lineage.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// What is done after each round.
    pub method: String,
    /// From 1.
    pub round: usize,
    /// Fine-tuned.
    pub tuned: Rates,
    /// Made safe again.
    pub recovered: Option<Rates>,
    /// The largest attack success of a recovered target.
    pub worst_asr: Option<f64>,
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
    let one = |way: &Option<Way>| lineage(ground, tune, *way, recipe, progress, go_on);
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

fn rates(judged: &Judged) -> Rates {
    let value = |r: Option<evaluate::Rate>| r.map_or(f64::NAN, |r| r.value);
    let known = judged.sets.first().map(|(_, e)| e);
    Rates {
        asr: value(known.and_then(|e| e.asr)),
        over_refusal: value(known.and_then(|e| e.over_refusal)),
        accuracy: value(judged.accuracy),
    }
}

fn lineage(
    ground: &Ground<'_>,
    first: Tune,
    way: Option<Way>,
    recipe: &Recipe,
    progress: &dyn Progress,
    go_on: GoOn<'_>,
) -> Result<Lineage, CompareError> {
    let (roots, seed) = (ground.roots, ground.seed);
    let method = way.map_or("none", Way::name);
    let [safety, task, benign] = recipe.shots;
    let shots = Shots { safety, task, benign };
    let mut rounds = Vec::new();
    let mut before: Option<Model> = None;
    for round in 0..ROUNDS {
        go_on()?;
        let tune = tune_of(first, round);
        let tuned = match &before {
            None => {
                let folder = roots.seed_folder(seed).join(tune.folder());
                let held = Held::open(&folder, &roots.model)?;
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
            tuned: rates(&judge.of(&tuned)?),
            recovered: None,
            kl_task: None,
            kl_benign: None,
            seconds: None,
            given: String::new(),
        };
        let mut left = None;
        if let Some(method) = way {
            let patient = Patient {
                tune,
                folder: roots.seed_folder(seed).join(tune.folder()),
                held: Held::Own(Box::new(tuned.clone())),
            };
            let entry = Entry { method, label: Label::SafetyTaskBenign, shots };
            if let Some(Applied { made: Made::Added(more), seconds, given, .. }) =
                apply(ground, &patient, &entry, recipe, Path::new(""))?
            {
                let model = tuned.merged(&more)?;
                let judged = judge.of(&model)?;
                said.recovered = Some(rates(&judged));
                (said.kl_task, said.kl_benign) = (judged.kl_task, judged.kl_benign);
                (said.seconds, said.given) = (seconds, given);
                left = Some(model);
            }
        }
        rounds.push(said);
        before = Some(left.unwrap_or(tuned));
    }
    Ok(Lineage { method: method.into(), rounds })
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
    for way in LINEAGES {
        let method = way.map_or("none", Way::name);
        for round in 1..=ROUNDS {
            let lineages = targets.iter().flat_map(|t| &t.lineages).filter(|l| l.method == method);
            let rounds: Vec<&Round> = lineages.flat_map(|l| &l.rounds).filter(|r| r.round == round).collect();
            let tuned: Vec<Rates> = rounds.iter().map(|r| r.tuned).collect();
            let recovered: Vec<Rates> = rounds.iter().filter_map(|r| r.recovered).collect();
            let Some(tuned) = mean_rates(&tuned) else { continue };
            let of = |f: fn(&Round) -> Option<f64>| mean(rounds.iter().filter_map(|r| f(r)));
            out.push(Summary {
                method: method.into(),
                round,
                tuned,
                recovered: mean_rates(&recovered),
                worst_asr: recovered.iter().map(|r| r.asr).max_by(f64::total_cmp),
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
    fn means_are_of_one_lineage_and_round() {
        let rates = |asr| Rates { asr, over_refusal: 0.1, accuracy: 0.9 };
        let round = |round, after: Option<f64>| Round {
            round,
            task: "topic".into(),
            tuned: rates(1.0),
            recovered: after.map(rates),
            kl_task: after,
            kl_benign: None,
            seconds: None,
            given: String::new(),
        };
        let target = |name: &str, after: [f64; 2]| Target {
            family: "llama".into(),
            seed: 1,
            target: name.into(),
            lineages: vec![
                Lineage { method: "none".into(), rounds: vec![round(1, None)] },
                Lineage {
                    method: "gene".into(),
                    rounds: vec![round(1, Some(after[0])), round(2, Some(after[1]))],
                },
            ],
        };
        let said = summary(&[target("a", [0.0, 0.25]), target("b", [0.5, 0.75])]);
        let of: Vec<_> =
            said.iter().map(|s| (s.method.as_str(), s.round, s.recovered.map(|r| r.asr))).collect();
        assert_eq!(of, [("none", 1, None), ("gene", 1, Some(0.25)), ("gene", 2, Some(0.5))]);
        assert_eq!((said[2].worst_asr, said[2].kl_task), (Some(0.75), Some(0.5)));
    }
}
