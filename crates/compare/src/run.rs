//! The order of the work: for each seed all trainings, then genes, then cells, several at a time.

use crate::cell;
use crate::error::CompareError;
use crate::ground::{Ground, Roots, Training};
use crate::plan::{Plan, Settings, check_splits};
use crate::store::Store;
use lab::{LabError, train};
use report::{LayerScore, LayerScores, Record};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// Hears how a comparison goes.
pub trait Progress: lab::Progress {
    /// A stage of so many parts begins.
    fn stage(&self, name: &str, parts: usize);
    /// A part of it is over.
    fn part(&self, name: &str);
}

/// All records, and what stands beside them.
#[derive(Debug)]
pub struct Outcome {
    /// Sorted.
    pub records: Vec<Record>,
    /// Scores of the genes' layers.
    pub scores: Vec<LayerScores>,
    /// What a reader should know.
    pub notes: Vec<String>,
    /// Hashes of the splits, by family and name.
    pub splits: BTreeMap<String, BTreeMap<String, String>>,
    /// What distillations reached.
    pub distilled: Vec<Distillation>,
}

/// What one distillation reached on held-out rows.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Distillation {
    /// Family.
    pub family: String,
    /// Seed.
    pub seed: u64,
    /// Which gene: `distilled` began from the extracted one, `fresh` from random factors.
    pub gene: String,
    /// Loss at the start.
    pub start: f64,
    /// Loss at the end.
    pub end: f64,
    /// Wall time.
    pub seconds: f64,
}

/// Runs what is missing and returns everything.
pub fn run(settings: &Settings, progress: &dyn Progress, stop: &AtomicBool) -> Result<Outcome, CompareError> {
    let plan = Plan::new(settings.quick);
    let recipe = serde_json::to_value(&plan.recipe).unwrap_or_default();
    let store = Store::open(&settings.work, &recipe)?;
    let roots: Vec<Roots> = settings
        .families
        .iter()
        .map(|layout| Roots::open(layout, &settings.lab, &settings.work))
        .collect::<Result<_, _>>()?;
    let mut splits = BTreeMap::new();
    for r in &roots {
        splits.insert(r.family.layout.clone(), check_splits(&r.family.splits)?);
    }
    let mut outcome =
        Outcome { records: Vec::new(), scores: Vec::new(), notes: Vec::new(), splits, distilled: Vec::new() };
    let halted = || if stop.load(Ordering::Relaxed) { Err(CompareError::Stopped) } else { Ok(()) };
    for &seed in &settings.seeds {
        let mut todo = Vec::new();
        for roots in &roots {
            if settings.quick {
                take_shipped(settings, roots, seed)?;
            }
            let all = Training::all(&plan).into_iter().filter(|t| !t.done(roots, seed));
            todo.extend(all.map(|t| (roots, t)));
        }
        progress.stage(&format!("training, seed {seed}"), todo.len());
        train::each::<CompareError>(todo.len(), settings.threads, &|i| {
            halted()?;
            let (roots, training) = todo[i];
            let result = training.run(roots, seed, progress);
            progress.part(&format!("{} {}", roots.family.layout, training.folder()));
            result
        })?;
        let grounds: Mutex<Vec<Ground<'_>>> = Mutex::new(Vec::new());
        progress.stage(&format!("genes, seed {seed}"), roots.len());
        train::each::<CompareError>(roots.len(), settings.threads, &|i| {
            halted()?;
            let ground = Ground::open(&roots[i], seed, &plan.recipe, progress)?;
            if let Ok(mut all) = grounds.lock() {
                all.push(ground);
            }
            progress.part(&roots[i].family.layout);
            Ok(())
        })?;
        let mut grounds = grounds.into_inner().map_err(|_| LabError::Thread("genes".into()))?;
        grounds.sort_by_key(|g| roots.iter().position(|r| r.family.layout == g.roots.family.layout));
        let keys = store.keys();
        let cells: Vec<_> = grounds.iter().flat_map(|g| plan.cells.iter().map(move |c| (g, c))).collect();
        progress.stage(&format!("methods, seed {seed}"), cells.len());
        let notes = Mutex::new(Vec::new());
        train::each::<CompareError>(cells.len(), settings.threads, &|i| {
            halted()?;
            let (ground, cell) = cells[i];
            let layout = &ground.roots.family.layout;
            let scratch = settings.work.join("scratch").join(format!("{layout}-{seed}-{}", cell.tune.name()));
            std::fs::create_dir_all(&scratch).map_err(|e| CompareError::File {
                action: "create",
                path: scratch.clone(),
                problem: e.to_string(),
            })?;
            let note = cell::run(ground, cell, &plan.recipe, &store, &keys, &scratch, &halted)?;
            let _ = std::fs::remove_dir_all(&scratch);
            if let (Some(note), Ok(mut notes)) = (note, notes.lock()) {
                notes.push(note);
            }
            progress.part(&format!("{layout} {}", cell.tune.name()));
            Ok(())
        })?;
        let mut notes = notes.into_inner().map_err(|_| LabError::Thread("methods".into()))?;
        notes.sort();
        outcome.notes.extend(notes);
        for ground in &grounds {
            outcome.notes.extend(ground.notes.iter().cloned());
            outcome.scores.extend(layer_scores(ground));
            let name = ground.roots.family.layout.clone();
            for gene in ["distilled", "fresh"] {
                if let Some(r) = ground.reached(gene)? {
                    let loss = |p: &distill::distillation::Parts| p.loss(&plan.recipe.distill);
                    outcome.distilled.push(Distillation {
                        family: name.clone(),
                        seed,
                        gene: gene.into(),
                        start: loss(&r.start),
                        end: loss(&r.end),
                        seconds: r.seconds,
                    });
                }
            }
        }
    }
    outcome.records = store.records();
    Ok(outcome)
}

fn layer_scores(ground: &Ground<'_>) -> Vec<LayerScores> {
    use distill::select::{Keep, Score, choose};
    let half = Keep::Top(ground.scores.len().div_ceil(2));
    Score::ALL
        .into_iter()
        .map(|score| {
            let chosen = choose(&ground.scores, score, half).unwrap_or_default();
            let one = |s: &distill::select::LayerScore| LayerScore {
                layer: s.layer,
                value: s.get(score),
                selected: chosen.contains(&s.layer),
            };
            LayerScores {
                family: ground.roots.family.layout.clone(),
                seed: ground.seed,
                score: serde_json::to_value(score)
                    .ok()
                    .and_then(|v| v.as_str().map(String::from))
                    .unwrap_or_default(),
                layers: ground.scores.iter().map(one).collect(),
            }
        })
        .collect()
}

/// Fine-tunes that ship with a family, with the rates that were measured when they were built.
fn take_shipped(settings: &Settings, roots: &Roots, seed: u64) -> Result<(), CompareError> {
    let from = settings.lab.join(&roots.family.layout);
    let path = from.join("lab.json");
    let Ok(text) = std::fs::read(&path) else { return Ok(()) };
    let fail = |e: String| CompareError::File { action: "read", path: path.clone(), problem: e };
    let report: lab::BuildReport = serde_json::from_slice(&text).map_err(|e| fail(e.to_string()))?;
    if seed != report.seed {
        return Ok(());
    }
    for training in Training::all(&Plan::new(true)) {
        let folder = training.folder();
        let name = folder.rsplit('/').next().unwrap_or_default();
        if let (Some(rates), true) = (report.dev.get(name), from.join(&folder).exists()) {
            crate::ground::take(roots, seed, &folder, &from, rates)?;
        }
    }
    Ok(())
}
