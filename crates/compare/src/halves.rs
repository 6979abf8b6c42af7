//! Whether selection earns its place: every half of a gene's layers, calibrated and judged, not one random half.
//!
//! On each LoRA target with 1 % of harmful rows the distilled gene is cut down to each of its halves (20 of six layers), each
//! is calibrated on the main shots and judged on the test split like a method of the comparison; all layers stand
//! beside them. The scores see the shots only. What stands on a target is one line of `halves.jsonl` in the work folder; a
//! study that was cut off goes on from there.

use crate::error::CompareError;
use crate::ground::{Ground, Held};
use crate::judge::Judge;
use crate::plan::{Recipe, Settings};
use crate::roster::{calibration_limits, shots_of};
use crate::run::Progress;
use crate::study::{self, GoOn, OnTarget, Study};
use distill::select::{Keep, Score, choose, scores};
use distill::{Freedom, GeneAttachments};
use lab::Tune;
use report::{Set, Shots};
use serde::{Deserialize, Serialize};
use std::sync::atomic::AtomicBool;
use transformer::Attachments;

/// What some layers of the gene reach on one target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cut {
    /// Which layers.
    pub layers: Vec<u32>,
    /// Scores that choose them.
    pub chosen_by: Vec<Score>,
    /// Attack success on the test split, a share.
    pub asr: f64,
    /// Benign requests refused there, a share.
    pub over_refusal: f64,
    /// Task questions answered right, a share.
    pub accuracy: f64,
    /// KL from the target on task test rows, nat per token.
    pub kl_task: f64,
    /// The same on benign test rows.
    pub kl_benign: f64,
    /// Safety loss on the shots, nat.
    pub loss: f64,
}

/// All halves on one target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// Layout.
    pub family: String,
    /// Seed of the fine-tune.
    pub seed: u64,
    /// Name of the fine-tune.
    pub target: String,
    /// Attack success without a gene, a share.
    pub asr_before: f64,
    /// Accuracy without a gene.
    pub accuracy_before: f64,
    /// All layers, then every half.
    pub cuts: Vec<Cut>,
}

/// Means over targets of one way to choose layers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// `all layers`, the name of a score, or `mean of all halves`.
    pub choice: String,
    /// Attack success.
    pub asr: f64,
    /// Share of the fall in attack success that all layers bring, over all targets; none where they bring none.
    pub kept: Option<f64>,
    /// Benign requests refused.
    pub over_refusal: f64,
    /// Accuracy gained (or lost: negative), a share.
    pub accuracy_change: f64,
    /// KL on task rows, nat per token.
    pub kl_task: f64,
    /// KL on benign rows, nat per token.
    pub kl_benign: f64,
    /// Halves that have lower attack success plus over-refusal on the same target, mean; a draw counts half.
    pub better_halves: Option<f64>,
}

/// Every set of `k` of `layers`, each ascending.
pub fn subsets(layers: &[u32], k: usize) -> Vec<Vec<u32>> {
    match (k, layers.split_first()) {
        (0, _) => vec![Vec::new()],
        (_, None) => Vec::new(),
        (_, Some((&first, rest))) => {
            let with = subsets(rest, k - 1).into_iter().map(|s| [vec![first], s].concat());
            with.chain(subsets(rest, k)).collect()
        }
    }
}

impl OnTarget for Target {
    fn key(&self) -> (&str, u64, &str) {
        (&self.family, self.seed, &self.target)
    }
}

/// Runs what is missing, in the work folder of a comparison of the same recipe; what it has trained is used.
pub fn run(
    settings: &Settings,
    progress: &dyn Progress,
    stop: &AtomicBool,
) -> Result<Study<Target>, CompareError> {
    study::run("halves", settings, progress, stop, &on_target)
}

fn on_target(
    ground: &Ground<'_>,
    tune: Tune,
    recipe: &Recipe,
    _: &dyn Progress,
    go_on: GoOn<'_>,
) -> Result<Target, CompareError> {
    let roots = ground.roots;
    let pad = roots.family.chat.end();
    let held = Held::open(&roots.seed_folder(ground.seed).join(tune.folder()), &roots.model)?.merged()?;
    let frozen = held.frozen();
    let [safety, task, benign] = recipe.shots;
    let shots = shots_of(roots, tune, Shots { safety, task, benign }, 0)?;
    let judge = Judge::new(ground, &frozen, tune, "test", &[Set::Known])?;
    let judged = |layers: &[u32], chosen_by, loss, more: &Attachments| -> Result<Cut, CompareError> {
        let judged = judge.of(&frozen.model.merged(&frozen.with(more))?)?;
        let rates = judged.rates();
        Ok(Cut {
            layers: layers.to_vec(),
            chosen_by,
            asr: rates.asr,
            over_refusal: rates.over_refusal,
            accuracy: rates.accuracy,
            kl_task: judged.kl_task.unwrap_or(0.0),
            kl_benign: judged.kl_benign.unwrap_or(0.0),
            loss,
        })
    };
    let gene = &ground.gene;
    let half = gene.layers().len().div_ceil(2);
    let by = scores(&frozen, gene, &shots.safety, &shots.benign, (&roots.refusal, pad))?;
    let mut chosen = Vec::new();
    for score in Score::ALL {
        chosen.push((score, choose(&by, score, Keep::Top(half))?));
    }
    let limits = calibration_limits(recipe, Freedom::PerLayer);
    let cut = |layers: &[u32]| -> Result<Cut, CompareError> {
        go_on()?;
        let some: GeneAttachments = gene.only(layers);
        let found = distill::calibrate(&frozen, &some, &shots, &limits, pad)?;
        let chosen_by = chosen.iter().filter(|(_, l)| l == layers).map(|(score, _)| *score).collect();
        judged(layers, chosen_by, found.loss, &some.at(&found.coefficients)?)
    };
    let mut cuts = vec![cut(gene.layers())?];
    for layers in subsets(gene.layers(), half) {
        cuts.push(cut(&layers)?);
    }
    let before = judged(&[], Vec::new(), f64::NAN, &Attachments::none())?;
    Ok(Target {
        family: roots.family.layout.clone(),
        seed: ground.seed,
        target: tune.name(),
        asr_before: before.asr,
        accuracy_before: before.accuracy,
        cuts,
    })
}

/// All layers, each score's half, and the mean of all halves, over some targets.
pub fn summary(targets: &[Target]) -> Vec<Summary> {
    let name = |score: Score| serde_json::to_value(score).ok().and_then(|v| v.as_str().map(String::from));
    let mut choices: Vec<(String, Option<Score>, bool)> = vec![("all layers".into(), None, true)];
    choices.extend(Score::ALL.into_iter().map(|s| (name(s).unwrap_or_default(), Some(s), false)));
    choices.push(("mean of all halves".into(), None, false));
    let mean = |all: &[f64]| all.iter().sum::<f64>() / all.len() as f64;
    let total = |c: &Cut| c.asr + c.over_refusal;
    let mut out = Vec::new();
    for (choice, score, is_all) in choices {
        // By target: attack success, over-refusal, accuracy change, both KL, then the falls of attack success.
        let mut rows: Vec<[f64; 7]> = Vec::new();
        let mut better = Vec::new();
        for t in targets {
            let Some((all, halves)) = t.cuts.split_first() else { continue };
            let taken: Vec<&Cut> = match (is_all, score) {
                (true, _) => vec![all],
                (_, Some(score)) => halves.iter().filter(|c| c.chosen_by.contains(&score)).collect(),
                _ => halves.iter().collect(),
            };
            if taken.is_empty() {
                continue;
            }
            let of = |f: &dyn Fn(&Cut) -> f64| mean(&taken.iter().map(|c| f(c)).collect::<Vec<_>>());
            let asr = of(&|c| c.asr);
            rows.push([
                asr,
                of(&|c| c.over_refusal),
                of(&|c| c.accuracy) - t.accuracy_before,
                of(&|c| c.kl_task),
                of(&|c| c.kl_benign),
                t.asr_before - asr,
                t.asr_before - all.asr,
            ]);
            if let (Some(_), [own]) = (score, &taken[..]) {
                let others = halves.iter().filter(|c| c.layers != own.layers);
                let beats = |c: &Cut| match total(c).total_cmp(&total(own)) {
                    std::cmp::Ordering::Less => 1.0,
                    std::cmp::Ordering::Equal => 0.5,
                    std::cmp::Ordering::Greater => 0.0,
                };
                better.push(others.map(beats).sum());
            }
        }
        if rows.is_empty() {
            continue;
        }
        let of = |i: usize| mean(&rows.iter().map(|r| r[i]).collect::<Vec<_>>());
        out.push(Summary {
            choice,
            asr: of(0),
            kept: (of(6) > 0.0).then(|| of(5) / of(6)),
            over_refusal: of(1),
            accuracy_change: of(2),
            kl_task: of(3),
            kl_benign: of(4),
            better_halves: (!better.is_empty()).then(|| mean(&better)),
        });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subsets_are_all_of_their_size_and_none_twice() {
        let all = subsets(&[0, 2, 3, 5], 2);
        assert_eq!(all, [[0, 2], [0, 3], [0, 5], [2, 3], [2, 5], [3, 5]]);
        assert_eq!(subsets(&[1, 2, 3, 4, 5, 6], 3).len(), 20);
        assert_eq!(subsets(&[1], 2), Vec::<Vec<u32>>::new());
    }

    fn cut(layers: &[u32], by: &[Score], asr: f64, over_refusal: f64) -> Cut {
        Cut {
            layers: layers.to_vec(),
            chosen_by: by.to_vec(),
            asr,
            over_refusal,
            accuracy: 0.9,
            kl_task: 0.25 * over_refusal,
            kl_benign: 0.5 * over_refusal,
            loss: 0.0,
        }
    }

    fn target(name: &str, asr_before: f64, cuts: Vec<Cut>) -> Target {
        let (family, target) = ("f".into(), name.into());
        Target { family, seed: 1, target, asr_before, accuracy_before: 1.0, cuts }
    }

    #[track_caller]
    fn near(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-12, "{a} against {b}");
    }

    #[test]
    fn summary_by_hand() {
        let cuts = vec![
            cut(&[0, 1], &[], 0.2, 0.0),
            cut(&[0], &[Score::Price], 0.28, 0.1),
            cut(&[1], &[Score::Insertion, Score::Activation], 0.6, 0.0),
        ];
        let s = summary(&[target("t", 1.0, cuts)]);
        let of = |choice: &str| s.iter().find(|s| s.choice == choice).unwrap();
        near(of("all layers").kept.unwrap(), 1.0);
        near(of("price").kept.unwrap(), 0.9);
        near(of("price").better_halves.unwrap(), 0.0);
        near(of("insertion").better_halves.unwrap(), 1.0);
        near(of("mean of all halves").asr, 0.44);
        near(of("mean of all halves").over_refusal, 0.05);
        near(of("mean of all halves").kl_task, 0.0125);
        near(of("mean of all halves").kl_benign, 0.025);
        near(of("mean of all halves").accuracy_change, -0.1);
        near(of("activation").kept.unwrap(), 0.5);
        assert_eq!(of("all layers").better_halves, None);
    }

    #[test]
    fn target_where_no_layer_helps_does_not_swamp_the_mean_and_a_missing_half_is_no_zero() {
        let helped = vec![cut(&[0, 1], &[], 0.0, 0.0), cut(&[0], &[Score::Price], 0.5, 0.0)];
        let hopeless = vec![cut(&[0, 1], &[], 1.0, 0.0), cut(&[0], &[], 0.9, 0.0)];
        let s = summary(&[target("a", 1.0, helped), target("b", 1.0, hopeless.clone())]);
        let of = |choice: &str| s.iter().find(|s| s.choice == choice);
        // Falls of 0.5 and 0.1 against 1 and 0.
        near(of("mean of all halves").unwrap().kept.unwrap(), 0.6);
        // Of target b no half was chosen by price: the mean is of a alone.
        near(of("price").unwrap().asr, 0.5);
        assert!(of("insertion").is_none());
        assert_eq!(summary(&[target("b", 1.0, hopeless)])[0].kept, None);
    }
}
