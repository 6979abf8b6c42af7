//! Whether selection earns its place: every half of a gene's layers, calibrated and judged, not one random half.
//!
//! On each LoRA target with 1 % of harmful rows the distilled gene is cut down to each of its halves (20 of six layers), each
//! is calibrated on the main shots and judged on the test split like a method of the comparison; all layers stand
//! beside them. The scores see the shots only. What stands on a target is one line of `halves.jsonl` in the work folder; a
//! study that was cut off goes on from there.

use crate::cell::{NEW_TOKENS, rows};
use crate::error::CompareError;
use crate::ground::{Ground, Held, Roots};
use crate::plan::{Entry, Plan, Recipe, Settings, Way};
use crate::roster::{calibration_limits, shots_of};
use crate::run::Progress;
use crate::tuning::Divergence;
use distill::select::{Keep, Score, choose, scores};
use distill::{Freedom, GeneAttachments};
use evaluate::{DataRow, Matching, Sets};
use lab::{Kind, Tune, train};
use report::{Label, Shots};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use transformer::{Attachments, Openings};

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
    /// KL from the target on benign test rows, nat per token.
    pub kl_benign: f64,
    /// Safety loss on the shots, nat per token.
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
    /// Share of the fall in attack success that all layers bring.
    pub kept: f64,
    /// Benign requests refused.
    pub over_refusal: f64,
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

/// Runs what is missing, on families and seeds that the comparison has trained or will be trained for now.
pub fn run(
    settings: &Settings,
    progress: &dyn Progress,
    stop: &AtomicBool,
) -> Result<Vec<Target>, CompareError> {
    let plan = Plan::new(false);
    let halted = || if stop.load(Ordering::Relaxed) { Err(CompareError::Stopped) } else { Ok(()) };
    let path = settings.work.join("halves.jsonl");
    let done = Mutex::new(read(&path)?);
    for &seed in &settings.seeds {
        for layout in &settings.families {
            let roots = Roots::open(layout, &settings.lab, &settings.work)?;
            crate::run::trained(&plan, &roots, seed, settings.threads, progress, &halted)?;
            let ground = Ground::open(&roots, seed, &plan.recipe, progress)?;
            let there: BTreeSet<String> = match done.lock() {
                Ok(done) => {
                    let of = |t: &&Target| t.family == *layout && t.seed == seed;
                    done.iter().filter(of).map(|t| t.target.clone()).collect()
                }
                Err(_) => BTreeSet::new(),
            };
            let is_main = |t: &Tune| {
                matches!(t, Tune::Target { percent: 1, kind: Kind::Lora, .. }) && !there.contains(&t.name())
            };
            let tunes: Vec<Tune> = plan.cells.iter().map(|c| c.tune).filter(is_main).collect();
            progress.stage(&format!("halves, {layout}, seed {seed}"), tunes.len());
            train::each::<CompareError>(tunes.len(), settings.threads, &|i| {
                let target = on_target(&ground, tunes[i], &plan.recipe, &halted)?;
                let line = serde_json::to_string(&target).unwrap_or_default() + "\n";
                if let Ok(mut done) = done.lock() {
                    append(&path, &line)?;
                    done.push(target);
                }
                progress.part(&tunes[i].name());
                Ok(())
            })?;
        }
    }
    let mut done = done.into_inner().map_err(|_| lab::LabError::Thread("halves".into()))?;
    done.retain(|t| settings.families.contains(&t.family) && settings.seeds.contains(&t.seed));
    done.sort_by(|a, b| (&a.family, a.seed, &a.target).cmp(&(&b.family, b.seed, &b.target)));
    Ok(done)
}

fn fail(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> CompareError {
    let path = path.to_path_buf();
    move |e| CompareError::File { action, path, problem: e.to_string() }
}

/// Whole lines; a last one that was cut off is dropped from the file, too.
fn read(path: &Path) -> Result<Vec<Target>, CompareError> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = fs::read_to_string(path).map_err(fail("read", path))?;
    let targets: Vec<Target> = text.lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
    let whole: String = targets.iter().map(|t| serde_json::to_string(t).unwrap_or_default() + "\n").collect();
    if whole != text {
        fs::write(path, whole).map_err(fail("write", path))?;
    }
    Ok(targets)
}

fn append(path: &Path, line: &str) -> Result<(), CompareError> {
    let mut file = OpenOptions::new().create(true).append(true).open(path).map_err(fail("write", path))?;
    file.write_all(line.as_bytes()).map_err(fail("write", path))
}

fn on_target(
    ground: &Ground<'_>,
    tune: Tune,
    recipe: &Recipe,
    go_on: &dyn Fn() -> Result<(), CompareError>,
) -> Result<Target, CompareError> {
    let roots = ground.roots;
    let pad = roots.family.chat.end();
    let held = Held::open(&roots.seed_folder(ground.seed).join(tune.folder()), &roots.model)?.merged()?;
    let frozen = held.frozen();
    let [safety, task, benign] = recipe.shots;
    let entry =
        Entry { method: Way::Gene, label: Label::SafetyTaskBenign, shots: Shots { safety, task, benign } };
    let shots = shots_of(roots, tune, &entry)?;
    let kl = Divergence::new(&frozen, &roots.rows("test-benign", 0, crate::cell::KL_ROWS)?, pad)?;
    let (harmful, good): (Vec<DataRow>, Vec<DataRow>) =
        (rows(ground, "test-harmful"), rows(ground, "test-benign"));
    let judged = |more: &Attachments| -> Result<(f64, f64, f64), CompareError> {
        let model = frozen.model.merged(&frozen.with(more))?;
        let sets = Sets { harmful: &harmful, benign: &good, task: &[] };
        let none = Attachments::none();
        let (chat, openings) = (&roots.family.chat, Openings::default());
        let e = evaluate::evaluate(&model, &none, chat, sets, &openings, Matching::Exact, NEW_TOKENS)?;
        let value = |r: Option<evaluate::Rate>| r.map_or(0.0, |r| r.value);
        Ok((value(e.asr), value(e.over_refusal), kl.of(&model, &none)?.unwrap_or(0.0)))
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
        let (asr, over_refusal, kl_benign) = judged(&some.at(&found.coefficients)?)?;
        let chosen_by = chosen.iter().filter(|(_, l)| l == layers).map(|(score, _)| *score).collect();
        Ok(Cut { layers: layers.to_vec(), chosen_by, asr, over_refusal, kl_benign, loss: found.loss })
    };
    let mut cuts = vec![cut(gene.layers())?];
    for layers in subsets(gene.layers(), half) {
        cuts.push(cut(&layers)?);
    }
    Ok(Target {
        family: roots.family.layout.clone(),
        seed: ground.seed,
        target: tune.name(),
        asr_before: judged(&Attachments::none())?.0,
        cuts,
    })
}

/// All layers, each score's half, and the mean of all halves, over some targets.
pub fn summary(targets: &[Target]) -> Vec<Summary> {
    let name = |score: Score| serde_json::to_value(score).ok().and_then(|v| v.as_str().map(String::from));
    let mut choices: Vec<(String, Option<Score>, bool)> = vec![("all layers".into(), None, true)];
    choices.extend(Score::ALL.into_iter().map(|s| (name(s).unwrap_or_default(), Some(s), false)));
    choices.push(("mean of all halves".into(), None, false));
    let mean = |all: &[f64]| all.iter().sum::<f64>() / all.len().max(1) as f64;
    let total = |c: &Cut| c.asr + c.over_refusal;
    let mut out = Vec::new();
    for (choice, score, is_all) in choices {
        let (mut asr, mut kept, mut over, mut kl, mut better) = (vec![], vec![], vec![], vec![], vec![]);
        for t in targets {
            let Some((all, halves)) = t.cuts.split_first() else { continue };
            let taken: Vec<&Cut> = match (is_all, score) {
                (true, _) => vec![all],
                (_, Some(score)) => halves.iter().filter(|c| c.chosen_by.contains(&score)).collect(),
                _ => halves.iter().collect(),
            };
            let of = |f: &dyn Fn(&Cut) -> f64| mean(&taken.iter().map(|c| f(c)).collect::<Vec<_>>());
            asr.push(of(&|c| c.asr));
            over.push(of(&|c| c.over_refusal));
            kl.push(of(&|c| c.kl_benign));
            kept.push((t.asr_before - of(&|c| c.asr)) / (t.asr_before - all.asr).max(1e-9));
            if let (Some(_), [own]) = (score, &taken[..]) {
                let others = halves.iter().filter(|c| c.layers != own.layers);
                better.push(
                    others
                        .map(|c| match total(c).total_cmp(&total(own)) {
                            std::cmp::Ordering::Less => 1.0,
                            std::cmp::Ordering::Equal => 0.5,
                            std::cmp::Ordering::Greater => 0.0,
                        })
                        .sum(),
                );
            }
        }
        out.push(Summary {
            choice,
            asr: mean(&asr),
            kept: mean(&kept),
            over_refusal: mean(&over),
            kl_benign: mean(&kl),
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

    #[test]
    fn summary_by_hand() {
        let cut = |layers: &[u32], by: &[Score], asr, over_refusal| Cut {
            layers: layers.to_vec(),
            chosen_by: by.to_vec(),
            asr,
            over_refusal,
            kl_benign: 0.5 * over_refusal,
            loss: 0.0,
        };
        let target = Target {
            family: "f".into(),
            seed: 1,
            target: "t".into(),
            asr_before: 1.0,
            cuts: vec![
                cut(&[0, 1], &[], 0.2, 0.0),
                cut(&[0], &[Score::Price], 0.28, 0.1),
                cut(&[1], &[Score::Insertion, Score::Activation], 0.6, 0.0),
            ],
        };
        let s = summary(&[target]);
        let of = |choice: &str| s.iter().find(|s| s.choice == choice).unwrap();
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} against {b}");
        near(of("all layers").kept, 1.0);
        near(of("price").kept, 0.9);
        near(of("price").better_halves.unwrap(), 0.0);
        near(of("insertion").better_halves.unwrap(), 1.0);
        near(of("mean of all halves").asr, 0.44);
        near(of("mean of all halves").over_refusal, 0.05);
        near(of("mean of all halves").kl_benign, 0.025);
        near(of("activation").kept, 0.5);
    }
}
