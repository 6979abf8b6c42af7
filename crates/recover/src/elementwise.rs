//! Methods that change every element by itself: one recipe, one model folder, one report.

use checkpoint::{Role, Unit, module_of};

use crate::error::Result;
use crate::method::{Job, Models, Outcome, Outputs};
use crate::report::{Action, ModuleReport};
use crate::rewrite::{Recipe, Rewritten, rewrite};

/// A recipe that changes elements.
pub(crate) trait Elementwise: Recipe {
    /// What the report calls it.
    const ACTION: Action;
}

/// Writes a model folder by such a recipe.
pub(crate) fn write<R: Elementwise>(
    recipe: &R,
    models: &Models,
    outputs: &Outputs,
    job: &Job<'_>,
) -> Result<Outcome> {
    // Adapters were refused before.
    let Some(writer) = &outputs.merged else { return Ok(Outcome::default()) };
    let Rewritten { tensors, units, code } = rewrite(&models.target, recipe, writer, job)?;
    let modules = units
        .into_iter()
        .filter_map(|(name, changed)| {
            let unit = models.target.units().get(&name)?;
            Some(ModuleReport {
                action: R::ACTION,
                changed: changed.elements > 0,
                elements_changed: changed.elements,
                change_norm: changed.sumsq.sqrt(),
                ..ModuleReport::of(unit)
            })
        })
        .collect();
    Ok(Outcome { tensors, modules, code, notes: Vec::new() })
}

impl ModuleReport {
    /// Of a unit that was left as it is.
    pub(crate) fn of(unit: &Unit) -> ModuleReport {
        let name = match unit.role {
            Role::Linear { .. } => module_of(&unit.name).unwrap_or(&unit.name),
            _ => &unit.name,
        };
        ModuleReport {
            name: name.to_owned(),
            layer: unit.role.layer(),
            action: Action::Kept,
            changed: false,
            elements_changed: 0,
            change_norm: 0.0,
            cosine: None,
            norm_ratio: None,
            rank: None,
        }
    }
}
