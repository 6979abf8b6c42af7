//! WiSE-FT (arXiv 2109.01903), as a merge of the models before and after fine-tuning (arXiv 2412.19512).
//!
//! ```text
//! W = (1 − λ) W_a + λ W_t
//! ```
//!
//! for every tensor of floats: `λ = 1` is the target, `λ = 0` the aligned model. The sources tune λ on held-out data; the
//! default 0.5 is the first one's recommendation.
//!
//! Departures: none in the formula. Norms, biases and embeddings are averaged as all else is; buffers and integers keep
//! the target's bytes.

use checkpoint::Unit;
use serde_json::{Map, Value, json};

use crate::error::{RecoverError, Result};
use crate::method::{Form, Job, Method, Models, Outcome, Outputs};
use crate::registry::{MethodInfo, Need, OptionInfo, When};
use crate::report::{Action, ModuleReport};
use crate::rewrite::{Change, Recipe, rewrite};
use crate::settings::{Settings, Taking};
use crate::side::{Scope, Side, is_weight};

/// Its entry.
pub(crate) static INFO: MethodInfo = MethodInfo {
    name: "wise-ft",
    title: "WiSE-FT, or pre-post merge",
    paper: Some("2109.01903"),
    formula: "(1 − λ) θ_a + λ θ_t",
    when: When::AfterTraining,
    needs: &[Need::Aligned],
    optional: &[],
    options: &[OptionInfo { name: "lambda", default: "0.5", help: "share of the target, 0 to 1" }],
    deviations: "none in the formula; the same average as arXiv 2412.19512",
    build: |settings| Ok(Box::new(WiseFt::new(settings)?)),
};

/// An average of the aligned model and the target.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WiseFt {
    /// The share of the target, 0 to 1.
    pub lambda: f64,
}

impl WiseFt {
    fn new(settings: &Settings) -> Result<WiseFt> {
        let mut taking = Taking::new(INFO.name, settings);
        let given = taking.left.lambda.take();
        let lambda = taking.number("lambda", given, 0.5, "between 0 and 1", |x| (0.0..=1.0).contains(&x))?;
        taking.finish()?;
        Ok(WiseFt { lambda })
    }
}

impl Method for WiseFt {
    fn info(&self) -> &'static MethodInfo {
        &INFO
    }

    fn options(&self) -> Map<String, Value> {
        Map::from_iter([("lambda".to_owned(), json!(self.lambda))])
    }

    fn check(&self, models: &Models, form: Form) -> Result<()> {
        if form != Form::Merged {
            return Err(RecoverError::NoAdapter { method: INFO.name, of_model: false });
        }
        models.target.check_family(models.aligned()?, Scope::All)
    }

    fn write(&self, models: &Models, outputs: &Outputs, job: &Job<'_>) -> Result<Outcome> {
        let Some(writer) = &outputs.merged else { return Ok(Outcome::default()) };
        let average = Average { lambda: self.lambda as f32, aligned: models.aligned()? };
        let rewritten = rewrite(&models.target, &average, writer, job)?;
        let report = |unit| ModuleReport { action: Action::Merged, ..ModuleReport::of(unit) };
        let modules = models.target.weights().map(|unit| (unit.name.clone(), report(unit))).collect();
        Ok(rewritten.outcome(modules))
    }
}

struct Average<'a> {
    lambda: f32,
    aligned: &'a Side,
}

impl Recipe for Average<'_> {
    fn change(&self, unit: &Unit) -> Result<Option<Change<'_>>> {
        if !is_weight(unit) {
            return Ok(None);
        }
        let (lambda, aligned) = (self.lambda, self.aligned.rows_of(&unit.name)?);
        Ok(Some(Box::new(move |rows, target| {
            let aligned = aligned.values(rows)?;
            Ok(target.iter().zip(&aligned).map(|(&t, &a)| average(lambda, a, t)).collect())
        })))
    }
}

/// One element. The ends are the two values themselves.
fn average(lambda: f32, aligned: f32, target: f32) -> f32 {
    if aligned == target || lambda == 1.0 {
        target
    } else if lambda == 0.0 {
        aligned
    } else {
        (1.0 - lambda) * aligned + lambda * target
    }
}
