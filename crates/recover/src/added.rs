//! Trained factors, added to a target: written into its weights, as a PEFT adapter over it, or both.
//!
//! Merged, a weight is what the target has in f32 plus `B A`, rounded once. The adapter is f32 of scale 1; over a target that is
//! an adapter itself it is one over the same base that holds both.
//!
//! Not here: where factors come from.

use std::collections::BTreeMap;

use checkpoint::{Factors, Unit};

use crate::error::{RecoverError, Result};
use crate::lora::ModuleFactors;
use crate::method::{Form, Job, Outcome, Outputs};
use crate::report::{Action, ModuleReport, Tensors};
use crate::rewrite::{Change, Recipe, rewrite};
use crate::side::{Side, add_products, is_plain};

/// Refuses a target into whose linear modules nothing could be written, before anything is trained.
pub(crate) fn check_writable(target: &Side, form: Form) -> Result<()> {
    let unwritable = target.linear().find(|unit| form != Form::Adapter && !is_plain(unit.dtype));
    match unwritable {
        None => Ok(()),
        Some(unit) => {
            let (tensor, file) = (unit.name.clone(), target.file_of(unit));
            Err(RecoverError::UnsupportedDtype { tensor, file, dtype: unit.dtype, what: "written" })
        }
    }
}

/// Writes the target with these factors added, in the forms that were asked for.
pub(crate) fn write_added(
    target: &Side,
    factors: Vec<ModuleFactors>,
    outputs: &Outputs,
    job: &Job<'_>,
) -> Result<Outcome> {
    let products: BTreeMap<String, Factors> =
        factors.into_iter().map(|f| (f.kind.module(f.layer), f.into())).collect();
    let unit_of = |module: &str| format!("{module}.weight");
    let report = |module: &str, factors: &Factors| -> Option<ModuleReport> {
        let of = ModuleReport::of(target.units().get(&unit_of(module))?);
        Some(ModuleReport { action: Action::Added, rank: Some(factors.rank), ..of })
    };
    let mut outcome = Outcome::default();
    if let Some(writer) = &outputs.adapter {
        gene::factors_into(writer, &products, target.checkpoint())?;
        let mut copied = Vec::new();
        if target.checkpoint().adapter().is_some() {
            copied = writer.copy_support_files(target.checkpoint().dir())?;
        }
        let adapter = target.checkpoint().adapter();
        let theirs = adapter.map_or(0, |a| a.modules().keys().filter(|m| !products.contains_key(*m)).count());
        let saved = adapter.map_or(0, |a| a.saved().len());
        outcome.tensors =
            Tensors { changed: 2 * products.len() as u64, same: 0, kept: (2 * theirs + saved) as u64 };
        outcome.code = copied.into_iter().filter(|name| name.ends_with(".py")).collect();
        outcome.modules = products
            .iter()
            .filter_map(|(module, factors)| {
                let elements = factors.b.iter().filter(|x| **x != 0.0).count() as u64;
                let change_norm = norm(factors);
                let changed = change_norm > 0.0;
                Some(ModuleReport {
                    changed,
                    elements_changed: if changed { elements + factors.a.len() as u64 } else { 0 },
                    change_norm,
                    ..report(module, factors)?
                })
            })
            .collect();
    }
    if let Some(writer) = &outputs.merged {
        let reports =
            products.iter().filter_map(|(module, f)| Some((unit_of(module), report(module, f)?))).collect();
        let terms = products.into_iter().map(|(module, f)| (unit_of(&module), [f])).collect();
        outcome = rewrite(target, &Added { terms }, writer, job)?.outcome(reports);
    }
    Ok(outcome)
}

/// `‖s B A‖_F`, from the two Gram matrices of the factors' inner side, in f64.
fn norm(factors: &Factors) -> f64 {
    let (rank, cols) = (factors.rank, factors.cols);
    let dot =
        |x: &mut dyn Iterator<Item = (f32, f32)>| x.map(|(x, y)| f64::from(x) * f64::from(y)).sum::<f64>();
    let mut sum = 0.0;
    for i in 0..rank {
        for j in 0..rank {
            let (mut b, row) = (factors.b.chunks_exact(rank).map(|b| (b[i], b[j])), |k: usize| {
                factors.a[k * cols..(k + 1) * cols].iter().copied()
            });
            sum += dot(&mut b) * dot(&mut row(i).zip(row(j)));
        }
    }
    factors.scale.abs() * sum.max(0.0).sqrt()
}

/// The target with one product more in some units.
struct Added {
    /// By the names of units.
    terms: BTreeMap<String, [Factors; 1]>,
}

impl Recipe for Added {
    fn change(&self, unit: &Unit) -> Result<Option<Change<'_>>> {
        let Some(terms) = self.terms.get(&unit.name) else { return Ok(None) };
        let cols = unit.cols();
        Ok(Some(Box::new(move |rows, target| {
            let mut new = target.to_vec();
            add_products(terms, rows.start, cols, &mut new);
            Ok(new)
        })))
    }
}
