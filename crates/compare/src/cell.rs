//! What the methods reach on one target: both sets of prompts, task questions, divergence on rows kept out of everything.

use crate::error::CompareError;
use crate::ground::{Ground, Held, Training, rates_of};
use crate::judge::{Judge, rate};
use crate::plan::{CellPlan, Recipe};
use crate::roster::{Made, Patient, apply};
use crate::store::{Key, Store, has};
use lab::{Kind, Tune};
use report::{Record, SCHEMA, Set, Target};
use std::collections::BTreeSet;
use std::path::Path;

/// How a record describes a target.
pub fn target_of(tune: Tune) -> Option<Target> {
    let Tune::Target { task, percent, kind } = tune else { return None };
    let kind = match kind {
        Kind::Full => report::Kind::Full,
        Kind::Second => report::Kind::Second,
        Kind::Lora if percent == 0 => report::Kind::BenignOnly,
        Kind::Lora => report::Kind::Lora,
    };
    Some(Target { name: tune.name(), task: task.name().into(), harm_percent: f64::from(percent), kind })
}

/// Makes and stores the records of one target that are not there yet, as long as `go_on` allows; `None`, or why the target
/// was left out.
pub fn run(
    ground: &Ground<'_>,
    plan: &CellPlan,
    recipe: &Recipe,
    store: &Store,
    keys: &BTreeSet<Key>,
    scratch: &Path,
    go_on: &dyn Fn() -> Result<(), CompareError>,
) -> Result<Option<String>, CompareError> {
    let roots = ground.roots;
    let (layout, seed) = (roots.family.layout.as_str(), ground.seed);
    let Some(target) = target_of(plan.tune) else { return Ok(None) };
    let missing: Vec<_> = plan.entries.iter().filter(|e| !has(keys, layout, seed, &target.name, e)).collect();
    if missing.is_empty() {
        return Ok(None);
    }
    let rates = rates_of(roots, seed, &Training::Plain(plan.tune).folder())?;
    if let Err(e) = lab::build::check(&target.name, &rates) {
        return Ok(Some(format!("{layout}, seed {seed}: target left out: {e}")));
    }
    let folder = roots.seed_folder(seed).join(plan.tune.folder());
    let held = Held::open(&folder, &roots.model)?.merged()?;
    let patient = Patient { tune: plan.tune, held, folder, curve: true };
    let frozen = patient.held.frozen();
    let judge = Judge::new(ground, &frozen, plan.tune, "test", &[Set::Known, Set::Shifted])?;
    for entry in missing {
        go_on()?;
        let Some(applied) = apply(ground, &patient, entry, recipe, scratch)? else { continue };
        let model = match applied.made {
            Made::Added(more) => Box::new(frozen.model.merged(&frozen.with(&more))?),
            Made::Own(model) => model,
        };
        let judged = judge.of(&model)?;
        let retrained = applied.seconds.is_none() && entry.method != crate::plan::Way::FineTuned;
        let mut records = Vec::new();
        for (set, e) in judged.sets {
            records.push(Record {
                schema: SCHEMA,
                family: layout.into(),
                seed,
                target: target.clone(),
                method: entry.method.name().into(),
                label: entry.label,
                shots: entry.shots,
                set,
                asr: rate(e.asr),
                asr_precise: rate(e.asr_precise),
                over_refusal: rate(e.over_refusal),
                helped: rate(e.helped),
                accuracy: rate(judged.accuracy),
                // A model that was trained again has not moved from the target: it never was there.
                kl_task: judged.kl_task.filter(|_| !retrained),
                kl_benign: judged.kl_benign.filter(|_| !retrained),
                seconds: applied.seconds,
                given: applied.given.clone(),
                coefficients: applied.coefficients.clone(),
                tradeoff: applied.tradeoff.clone(),
            });
        }
        store.add(records)?;
    }
    Ok(None)
}
