//! The order of the work: for each seed and family all trainings, then genes, then cells, several at a time.

use crate::cell;
use crate::error::CompareError;
use crate::ground::{Ground, Roots, Training};
use crate::judge::AlignedRates;
use crate::plan::{Plan, Settings, check_splits};
use crate::store::{Complete, Store};
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
    /// What the aligned models themselves do on the prompts.
    pub aligned: Vec<AlignedRates>,
    /// All of this by family and seed, as a later comparison takes it over.
    pub complete: Vec<Complete>,
    /// What it was made by.
    pub recipe: serde_json::Value,
}

/// What one distillation reached on held-out rows.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
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
    for report in &settings.from {
        store.take(&plan, report)?;
    }
    let mut outcome = Outcome {
        records: Vec::new(),
        scores: Vec::new(),
        notes: Vec::new(),
        splits: BTreeMap::new(),
        distilled: Vec::new(),
        aligned: Vec::new(),
        complete: Vec::new(),
        recipe,
    };
    let halted = || if stop.load(Ordering::Relaxed) { Err(CompareError::Stopped) } else { Ok(()) };
    let mut all_roots = Vec::new();
    for layout in &settings.families {
        let roots = Roots::open(layout, &settings.lab, &settings.work)?;
        outcome.splits.insert(layout.clone(), check_splits(&roots.family.splits)?);
        let hash = roots.hash()?;
        // Before hours of work, not when the seed's turn comes.
        for &seed in &settings.seeds {
            if store.complete(layout, seed).is_some_and(|c| c.roots != hash) {
                return Err(CompareError::OtherRoots { family: layout.clone(), seed });
            }
        }
        halted()?;
        outcome.aligned.extend(AlignedRates::of(&roots)?);
        all_roots.push(roots);
    }
    for &seed in &settings.seeds {
        for roots in &all_roots {
            let layout = &roots.family.layout;
            if !store.is_whole(&plan, layout, seed) {
                store.finish(one(settings, &plan, roots, seed, &store, progress, &halted)?)?;
            }
            let Some(complete) = store.complete(layout, seed) else { continue };
            outcome.notes.extend(complete.notes.iter().cloned());
            outcome.scores.extend(complete.scores.iter().cloned());
            outcome.distilled.extend(complete.distilled.iter().cloned());
            outcome.complete.push(complete);
        }
    }
    outcome.records = store.records();
    outcome.records.retain(|r| settings.families.contains(&r.family) && settings.seeds.contains(&r.seed));
    Ok(outcome)
}

/// Trains what a plan needs of a family and seed and is not there.
pub(crate) fn trained(
    plan: &Plan,
    roots: &Roots,
    seed: u64,
    threads: usize,
    progress: &dyn Progress,
    halted: &(dyn Fn() -> Result<(), CompareError> + Sync),
) -> Result<(), CompareError> {
    let todo: Vec<Training> = Training::all(plan).into_iter().filter(|t| !t.done(roots, seed)).collect();
    let layout = &roots.family.layout;
    progress.stage(&format!("training, {layout}, seed {seed}"), todo.len());
    train::each::<CompareError>(todo.len(), threads, &|i| {
        halted()?;
        let result = todo[i].run(roots, seed, progress);
        progress.part(&todo[i].folder());
        result
    })
}

/// One family and seed: its records go into the store.
fn one(
    settings: &Settings,
    plan: &Plan,
    roots: &Roots,
    seed: u64,
    store: &Store,
    progress: &dyn Progress,
    halted: &(dyn Fn() -> Result<(), CompareError> + Sync),
) -> Result<Complete, CompareError> {
    let layout = &roots.family.layout;
    if settings.quick {
        take_shipped(settings, roots, seed)?;
    }
    trained(plan, roots, seed, settings.threads, progress, halted)?;
    halted()?;
    progress.stage(&format!("genes, {layout}, seed {seed}"), 1);
    let ground = Ground::open(roots, seed, &plan.recipe, settings.threads, progress)?;
    progress.part("distilled");
    let keys = store.keys();
    progress.stage(&format!("methods, {layout}, seed {seed}"), plan.cells.len());
    let left_out: Mutex<Vec<(String, String)>> = Mutex::new(Vec::new());
    train::each::<CompareError>(plan.cells.len(), settings.threads, &|i| {
        halted()?;
        let cell = &plan.cells[i];
        let scratch = settings.work.join("scratch").join(format!("{layout}-{seed}-{}", cell.tune.name()));
        std::fs::create_dir_all(&scratch).map_err(|e| CompareError::File {
            action: "create",
            path: scratch.clone(),
            problem: e.to_string(),
        })?;
        let note = cell::run(&ground, cell, &plan.recipe, store, &keys, &scratch, halted)?;
        let _ = std::fs::remove_dir_all(&scratch);
        if let (Some(note), Ok(mut out)) = (note, left_out.lock()) {
            out.push((cell.tune.name(), note));
        }
        progress.part(&cell.tune.name());
        Ok(())
    })?;
    let mut left_out = left_out.into_inner().map_err(|_| LabError::Thread("methods".into()))?;
    left_out.sort();
    let (left_out, why): (Vec<String>, Vec<String>) = left_out.into_iter().unzip();
    let notes = ground.notes.iter().cloned().chain(why).collect();
    let mut distilled = Vec::new();
    for gene in ["distilled", "fresh"] {
        if let Some(r) = ground.reached(gene)? {
            let loss = |p: &distill::distillation::Parts| p.loss(&plan.recipe.distill);
            distilled.push(Distillation {
                family: layout.clone(),
                seed,
                gene: gene.into(),
                start: loss(&r.start),
                end: loss(&r.end),
                seconds: r.seconds,
            });
        }
    }
    Ok(Complete {
        family: layout.clone(),
        seed,
        roots: roots.hash()?,
        machine: settings.machine.clone(),
        left_out,
        notes,
        scores: layer_scores(&ground),
        distilled,
    })
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
