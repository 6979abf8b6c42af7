//! A study of the main targets beside the table: LoRAs with 1 % of harmful rows, one by one.
//!
//! What stands on a target is one line of `NAME.jsonl` in the work folder of a comparison of the same recipe; a study that was
//! cut off goes on from there, and uses what the comparison has trained.

use crate::error::CompareError;
use crate::ground::{Ground, Roots, Training, rates_of};
use crate::plan::{Plan, Recipe, Settings};
use crate::run::Progress;
use crate::store::{Store, line_of, lines, lines_of, replace};
use lab::{Tune, train};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// What a study found on one target.
pub trait OnTarget: Serialize + DeserializeOwned + Send {
    /// Family, seed, name of the target.
    fn key(&self) -> (&str, u64, &str);
}

/// What a study found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Study<T> {
    /// Sorted by family, seed and target.
    pub targets: Vec<T>,
    /// Targets that were left out, and why.
    pub notes: Vec<String>,
}

/// Asked between steps whether to go on; an error ends the work.
pub(crate) type GoOn<'a> = &'a (dyn Fn() -> Result<(), CompareError> + Sync);

/// Looks at one target.
pub(crate) type Look<'a, T> =
    &'a (dyn Fn(&Ground<'_>, Tune, &Recipe, &dyn Progress, GoOn<'_>) -> Result<T, CompareError> + Sync);

/// Runs what is missing.
pub(crate) fn run<T: OnTarget>(
    name: &str,
    settings: &Settings,
    progress: &dyn Progress,
    stop: &AtomicBool,
    look: Look<'_, T>,
) -> Result<Study<T>, CompareError> {
    let plan = Plan::of_main_targets();
    Store::open(&settings.work, &serde_json::to_value(&plan.recipe).unwrap_or_default())?;
    let halted = || if stop.load(Ordering::Relaxed) { Err(CompareError::Stopped) } else { Ok(()) };
    let path = settings.work.join(format!("{name}.jsonl"));
    let known: Vec<T> = lines_of(&path)?;
    replace(&path, &lines(&known))?;
    let known = Mutex::new(known);
    let dead = || lab::LabError::Thread(name.into());
    let mut notes = Vec::new();
    for &seed in &settings.seeds {
        for layout in &settings.families {
            let there: BTreeSet<String> = {
                let known = known.lock().map_err(|_| dead())?;
                let here = known.iter().map(T::key).filter(|k| (k.0, k.1) == (layout, seed));
                here.map(|k| k.2.to_string()).collect()
            };
            let mut tunes: Vec<Tune> = plan.cells.iter().map(|c| c.tune).collect();
            tunes.retain(|t| !there.contains(&t.name()));
            if tunes.is_empty() {
                continue;
            }
            let roots = Roots::open(layout, &settings.lab, &settings.work)?;
            crate::run::trained(&plan, &roots, seed, settings.threads, progress, &halted)?;
            halted()?;
            let ground = Ground::open(&roots, seed, &plan.recipe, settings.threads, progress)?;
            let mut fit = Vec::new();
            for tune in tunes {
                let rates = rates_of(&roots, seed, &Training::Plain(tune).folder())?;
                match lab::build::check(&tune.name(), &rates) {
                    Ok(()) => fit.push(tune),
                    Err(e) => notes.push(format!("{layout}, seed {seed}: target left out: {e}")),
                }
            }
            progress.stage(&format!("{name}, {layout}, seed {seed}"), fit.len());
            train::each::<CompareError>(fit.len(), settings.threads, &|i| {
                let found = look(&ground, fit[i], &plan.recipe, progress, &halted)?;
                let mut known = known.lock().map_err(|_| dead())?;
                append(&path, &line_of(&found))?;
                known.push(found);
                progress.part(&fit[i].name());
                Ok(())
            })?;
        }
    }
    let mut targets = known.into_inner().map_err(|_| dead())?;
    targets
        .retain(|t| settings.families.iter().any(|f| f == t.key().0) && settings.seeds.contains(&t.key().1));
    targets.sort_by(|a, b| a.key().cmp(&b.key()));
    Ok(Study { targets, notes })
}

fn append(path: &Path, line: &str) -> Result<(), CompareError> {
    let fail = |e: std::io::Error| CompareError::File {
        action: "write",
        path: path.to_path_buf(),
        problem: e.to_string(),
    };
    let mut file = OpenOptions::new().create(true).append(true).open(path).map_err(fail)?;
    file.write_all(line.as_bytes()).map_err(fail)
}
