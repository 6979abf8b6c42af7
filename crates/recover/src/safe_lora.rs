//! SafeLoRA (arXiv 2405.16833): updates that point away from alignment are seen through it.
//!
//! ```text
//! V = W_a − W_base,   C = V Vᵀ / |V|,   cos = ⟨C B A, B A⟩ / (|C B A| |B A|),   B ← C B where cos ≤ τ
//! ```
//!
//! for every linear module that the target's LoRA changes; the LoRA is over the aligned model. τ is 0.5, or the K-th
//! smallest cosine (`modules`; the published code's default is K = 10). C is no projector: its scale is that of V, so that a
//! module whose V is small is as good as switched off; hence the report gives `|C B A| / |B A|` beside each cosine, and two
//! other variants stand beside the published one:
//!
//! * `orthonormal`: C = U_k U_kᵀ with the first k left singular vectors of V, which keeps the scale of what it keeps;
//! * `drop`, the control: the same modules by the published cosine, their LoRA removed.
//!
//! Departures: cosines are not rounded to five digits before they are compared, as the published code does, so equal ones
//! are told apart. A module of which V is zero keeps its update (the published code divides by zero, and its comparison
//! with NaN keeps it, too). Modules of the adapter that are no linear modules of layers (embeddings) keep theirs. C B
//! is made in f32 as V (Vᵀ B) / |V|.
//!
//! A target that is a whole model is not what the source is about. Its update is W_t − W_a of every linear module of the
//! layers, in full: W ← W_a + C (W_t − W_a) where cos ≤ τ. Beside linear modules nothing changes. That takes 6 · out · in²
//! operations a module and again for each that is projected, and two f32 copies of it and a panel in memory.

use std::collections::BTreeMap;

use checkpoint::{Factors, Unit, module_of};
use serde_json::{Map, Value, json};

use crate::alignment::{self, Alignment, Angle, Seen, Through, Update};
use crate::error::{RecoverError, Result};
use crate::method::{Form, Job, Method, Models, Outcome, Outputs};
use crate::peft::{NewFactors, write_adapter};
use crate::registry::{MethodInfo, Need, OptionInfo, When};
use crate::report::{Action, ModuleReport};
use crate::rewrite::{Change, Exchange, Recipe, rewrite};
use crate::settings::{Settings, Taking};
use crate::side::Side;

/// Its entry.
pub(crate) static INFO: MethodInfo = MethodInfo {
    name: "safelora",
    title: "SafeLoRA",
    paper: Some("2405.16833"),
    formula: "B ← C B where cos(C B A, B A) ≤ τ; C = V Vᵀ / |V|, V = θ_a − θ_base",
    when: When::AfterTraining,
    needs: &[Need::Aligned, Need::Base],
    optional: &[],
    options: &[
        OptionInfo {
            name: "tau",
            default: "0.5",
            help: "the cosine up to which a module is projected, -1 to 1",
        },
        OptionInfo {
            name: "modules",
            default: "not used",
            help: "instead of tau: this many modules, those of the smallest cosines (the published code: 10)",
        },
        OptionInfo {
            name: "variant",
            default: "published",
            help: "published, orthonormal (C = U_k U_kᵀ), or drop (the control: the same modules without their LoRA)",
        },
        OptionInfo { name: "rank", default: "16", help: "k of orthonormal, 1 to 4096" },
        OptionInfo { name: "seed", default: "0", help: "of orthonormal's sketch" },
    ],
    deviations: "cosines are not rounded to five digits; a whole model's update is its dense difference from θ_a",
    build: |settings| Ok(Box::new(SafeLora::new(settings)?)),
};

/// Which modules are changed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Select {
    /// Those whose cosine is not above this.
    Tau(f64),
    /// This many, those of the smallest cosines, and what is equal to the last.
    Modules(usize),
}

/// What happens to them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SafeLoraVariant {
    /// Their update goes through `V Vᵀ / |V|`.
    Published,
    /// Their update goes through `U_k U_kᵀ`.
    Orthonormal {
        /// k.
        rank: usize,
        /// The sketch's seed.
        seed: u64,
    },
    /// Their update is removed.
    Drop,
}

/// Updates that point away from alignment, projected.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SafeLora {
    /// Which modules.
    pub select: Select,
    /// What happens to them.
    pub variant: SafeLoraVariant,
}

impl SafeLora {
    fn new(settings: &Settings) -> Result<SafeLora> {
        let mut taking = Taking::new(INFO.name, settings);
        let variant = match taking.left.variant.take().as_deref() {
            None | Some("published") => SafeLoraVariant::Published,
            Some("drop") => SafeLoraVariant::Drop,
            Some("orthonormal") => {
                let (rank, seed) = (taking.left.rank.take(), taking.left.seed.take());
                SafeLoraVariant::Orthonormal {
                    rank: taking.count("rank", rank, 16)?,
                    seed: seed.unwrap_or(0),
                }
            }
            Some(other) => return Err(taking.refuse("variant", other, "published, orthonormal or drop")),
        };
        let (tau, modules) = (taking.left.tau.take(), taking.left.modules.take());
        let select = match modules {
            None => Select::Tau(taking.number("tau", tau, 0.5, "a cosine", |x| (-1.0..=1.0).contains(&x))?),
            Some(_) if tau.is_some() => {
                return Err(taking.refuse("modules", "given beside `tau`", "an option that goes with it"));
            }
            Some(0) => return Err(taking.refuse("modules", 0, "a number of 1 or more")),
            Some(count) => Select::Modules(count),
        };
        taking.finish()?;
        Ok(SafeLora { select, variant })
    }

    fn through(&self) -> Through {
        match self.variant {
            SafeLoraVariant::Orthonormal { rank, seed } => Through::Orthonormal { rank, seed },
            _ => Through::Published,
        }
    }

    /// The largest cosine of a module that is changed; `None` if there is none.
    fn threshold(&self, angles: &BTreeMap<String, Angle>) -> Option<f64> {
        match self.select {
            Select::Tau(tau) => Some(tau),
            Select::Modules(count) => {
                let mut cosines: Vec<f64> = angles.values().filter_map(|angle| angle.cosine).collect();
                cosines.sort_by(f64::total_cmp);
                cosines.get(count.min(cosines.len()).checked_sub(1)?).copied()
            }
        }
    }
}

impl Method for SafeLora {
    fn info(&self) -> &'static MethodInfo {
        &INFO
    }

    fn options(&self) -> Map<String, Value> {
        let mut options = Map::new();
        match self.select {
            Select::Tau(tau) => options.insert("tau".to_owned(), json!(tau)),
            Select::Modules(count) => options.insert("modules".to_owned(), json!(count)),
        };
        let variant = match self.variant {
            SafeLoraVariant::Published => "published",
            SafeLoraVariant::Orthonormal { .. } => "orthonormal",
            SafeLoraVariant::Drop => "drop",
        };
        options.insert("variant".to_owned(), json!(variant));
        if let SafeLoraVariant::Orthonormal { rank, seed } = self.variant {
            options.insert("rank".to_owned(), json!(rank));
            options.insert("seed".to_owned(), json!(seed));
        }
        options
    }

    fn check(&self, models: &Models, form: Form) -> Result<()> {
        if form != Form::Merged && models.target.checkpoint().adapter().is_none() {
            return Err(RecoverError::NoAdapter { method: INFO.name, of_model: true });
        }
        alignment::check(models)
    }

    fn write(&self, models: &Models, outputs: &Outputs, job: &Job<'_>) -> Result<Outcome> {
        let alignment = Alignment::new(models, self.through(), job)?;
        let mut angles = BTreeMap::new();
        let mut updates: BTreeMap<String, (Factors, Vec<f32>)> = BTreeMap::new();
        alignment.see_all(|unit, seen| {
            let Seen { update, through, angle } = seen;
            angles.insert(unit.name.clone(), angle);
            // Factors are small; what is dense is made again where it is needed.
            if let (Update::Factors(factors), Some(through)) = (update, through) {
                updates.insert(unit.name.clone(), (factors, through));
            }
            Ok(())
        })?;
        let threshold = self.threshold(&angles);
        let chosen = |unit: &str| {
            let cosine = angles.get(unit).and_then(|angle| angle.cosine);
            cosine.zip(threshold).is_some_and(|(cosine, threshold)| cosine <= threshold)
        };
        let action = match self.variant {
            SafeLoraVariant::Drop => Action::Dropped,
            _ => Action::Projected,
        };
        let mut reports: BTreeMap<String, ModuleReport> = BTreeMap::new();
        for unit in alignment.modules() {
            let Some(angle) = angles.get(&unit.name) else { continue };
            let report = ModuleReport {
                action: if chosen(&unit.name) { action } else { Action::Kept },
                cosine: angle.cosine,
                norm_ratio: angle.norm_ratio,
                rank: updates.get(&unit.name).map(|(factors, _)| factors.rank),
                ..ModuleReport::of(unit)
            };
            reports.insert(unit.name.clone(), report);
        }
        let new_b: BTreeMap<&str, Vec<f32>> = updates
            .iter()
            .filter(|(unit, _)| chosen(unit))
            .map(|(unit, (_, through))| match self.variant {
                SafeLoraVariant::Drop => (unit.as_str(), vec![0.0; through.len()]),
                _ => (unit.as_str(), through.clone()),
            })
            .collect();

        let mut outcome = Outcome::default();
        if let (Some(writer), Some(adapter)) = (&outputs.adapter, models.target.checkpoint().adapter()) {
            let named = new_b.iter().filter_map(|(unit, b)| Some((module_of(unit)?.to_owned(), b)));
            let new = named.map(|(module, b)| (module, NewFactors::B(b.clone()))).collect();
            let (tensors, code) = write_adapter(models.target.checkpoint(), adapter, &new, writer)?;
            let changed = |unit: &str, report: ModuleReport| match (new_b.get(unit), updates.get(unit)) {
                (Some(b), Some((factors, _))) => {
                    let elements = b.iter().zip(&factors.b).filter(|(new, old)| new != old).count() as u64;
                    let change_norm = angles.get(unit).map_or(0.0, |angle| self.change_norm(angle));
                    ModuleReport { changed: elements > 0, elements_changed: elements, change_norm, ..report }
                }
                _ => report,
            };
            let modules = reports.iter().map(|(unit, report)| changed(unit, report.clone())).collect();
            outcome = Outcome { tensors, code, modules, ..Outcome::default() };
        }
        if let Some(writer) = &outputs.merged {
            let rewritten = if models.target.checkpoint().adapter().is_some() {
                let exchanged = |(unit, b): (&&str, &Vec<f32>)| {
                    let (factors, _) = updates.get(*unit)?;
                    Some(((*unit).to_owned(), vec![Factors { b: b.clone(), ..factors.clone() }]))
                };
                let terms = new_b.iter().filter_map(exchanged).collect();
                rewrite(&models.target, &Exchange { target: &models.target, terms }, writer, job)?
            } else {
                let drop = self.variant == SafeLoraVariant::Drop;
                let aligned = models.aligned()?;
                rewrite(
                    &models.target,
                    &Projected { alignment: &alignment, aligned, chosen: &chosen, drop },
                    writer,
                    job,
                )?
            };
            outcome = rewritten.outcome(reports);
        }
        outcome.notes = alignment.notes();
        Ok(outcome)
    }
}

impl SafeLora {
    /// The norm of what a chosen update changes by.
    fn change_norm(&self, angle: &Angle) -> f64 {
        match (self.variant, angle.cosine, angle.norm_ratio) {
            (SafeLoraVariant::Drop, ..) => angle.norm,
            (_, Some(cosine), Some(ratio)) => {
                angle.norm * (1.0 - 2.0 * cosine * ratio + ratio * ratio).max(0.0).sqrt()
            }
            _ => 0.0,
        }
    }
}

/// A whole model in which the updates of some modules are projected.
struct Projected<'a> {
    alignment: &'a Alignment<'a>,
    aligned: &'a Side,
    chosen: &'a (dyn Fn(&str) -> bool + Sync),
    drop: bool,
}

impl Recipe for Projected<'_> {
    fn change(&self, unit: &Unit) -> Result<Option<Change<'_>>> {
        if !(self.chosen)(&unit.name) {
            return Ok(None);
        }
        let aligned = self.aligned.rows_of(&unit.name)?;
        if self.drop {
            return Ok(Some(Box::new(move |rows, _| aligned.values(rows))));
        }
        let Some(through) = self.alignment.see(unit)?.through else { return Ok(None) };
        let cols = unit.cols();
        Ok(Some(Box::new(move |rows, _| {
            let mut values = aligned.values(rows.clone())?;
            let through = &through[(rows.start * cols) as usize..(rows.end * cols) as usize];
            for (value, &x) in values.iter_mut().zip(through) {
                *value += x;
            }
            Ok(values)
        })))
    }

    fn is_heavy(&self) -> bool {
        true
    }
}
