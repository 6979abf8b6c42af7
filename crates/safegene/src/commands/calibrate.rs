//! `safegene calibrate`: the coefficients of a gene in a target.

use crate::args::Calibrate;
use crate::commands::evaluate::{chat_of, fields, hash};
use crate::commands::{check_folder_of, openings};
use crate::fail::{Code, Failure};
use crate::ui::Ui;
use checkpoint::Checkpoint;
use distill::{Calibration, Frozen, GeneAttachments, Goal, Limits, Shots, check_safety_shots};
use evaluate::{DataRow, Fields, read_rows};
use gene::{Expression, Gene};
use std::path::Path;
use transformer::{Chat, Model, Openings, Row};

/// Files of shots.
pub(super) struct ShotFiles<'a> {
    pub(super) safety: &'a Path,
    pub(super) task: &'a Path,
    pub(super) benign: Option<&'a Path>,
}

impl ShotFiles<'_> {
    /// Reads, checks that safety shots are refusals, and encodes.
    pub(super) fn read(&self, chat: &Chat, fields: &Fields, openings: &Openings) -> Result<Shots, Failure> {
        let safety = read_refusals(self.safety, fields, openings)?;
        let task = read_rows(self.task, fields, true)?;
        let benign = match self.benign {
            Some(path) => read_rows(path, fields, true)?,
            None => Vec::new(),
        };
        let encode = |rows: &[DataRow]| -> Result<Vec<Row>, Failure> {
            rows.iter().map(|r| Ok(chat.row(&r.prompt, r.answer.as_deref().unwrap_or(""))?)).collect()
        };
        Ok(Shots { safety: encode(&safety)?, task: encode(&task)?, benign: encode(&benign)? })
    }

    /// What the expression remembers of them.
    pub(super) fn record(
        &self,
        shots: &Shots,
    ) -> Result<serde_json::Map<String, serde_json::Value>, Failure> {
        let one = |path: Option<&Path>, n: usize| -> Result<serde_json::Value, Failure> {
            Ok(match hash(path)? {
                Some(content) => serde_json::json!({"n": n, "content": content}),
                None => serde_json::Value::Null,
            })
        };
        let mut out = serde_json::Map::new();
        out.insert("safety".into(), one(Some(self.safety), shots.safety.len())?);
        out.insert("task".into(), one(Some(self.task), shots.task.len())?);
        out.insert("benign".into(), one(self.benign, shots.benign.len())?);
        Ok(out)
    }
}

/// Harmful prompts, each of which has to be answered by a refusal.
pub(super) fn read_refusals(
    path: &Path,
    fields: &Fields,
    openings: &Openings,
) -> Result<Vec<DataRow>, Failure> {
    let rows = read_rows(path, fields, true)?;
    let answers = rows.iter().map(|r| (r.line, r.answer.as_deref().unwrap_or("")));
    check_safety_shots(answers, openings)
        .map_err(|e| Failure::from(e).context(format!("cannot use `{}`", path.display())))?;
    Ok(rows)
}

/// An expression from a calibration.
pub(super) fn expression(
    gene: &Gene,
    target_content: &str,
    found: &Calibration,
    limits: &Limits,
    shots: serde_json::Map<String, serde_json::Value>,
) -> Expression {
    let mut limits_json = serde_json::Map::new();
    let mut put = |key: &str, value: f64| limits_json.insert(key.into(), value.into());
    put("max_kl", limits.max_kl);
    put("c_max", limits.c_max);
    put("delta", limits.delta);
    put("kl", found.kl_task);
    if let Some(kl) = found.kl_benign {
        put("kl_benign", kl);
    }
    put("loss_before", found.loss_before);
    put("loss", found.loss);
    limits_json.insert("goal".into(), serde_json::to_value(found.goal).unwrap_or_default());
    Expression {
        schema: gene::SCHEMA,
        gene: gene.content().into(),
        target: target_content.into(),
        coefficients: found.coefficients.clone(),
        limits: limits_json,
        shots,
        extra: Default::default(),
    }
}

pub(super) const SWAPPED: &str = "adding the gene makes the refusals less likely: either the target is all but safe already, or the aligned and the degraded checkpoint were swapped in `extract`";

pub(super) fn run(job: &Calibrate, ui: &Ui) -> Result<(), Failure> {
    check_folder_of(&job.out)?;
    let limits = Limits { max_kl: job.max_kl, c_max: job.c_max, delta: job.delta, ..Limits::default() };
    let gene = Gene::open(&job.gene)?;
    let target = Checkpoint::open(&job.target, job.base.as_deref())?;
    gene::check_family(&gene, &target)?;
    let chat = chat_of(&target)?;
    let files =
        ShotFiles { safety: &job.safety_shots, task: &job.task_shots, benign: job.benign_shots.as_deref() };
    let shots = files.read(&chat, &fields(&job.fields), &openings(job.fields.refusals.as_deref())?)?;
    let (target_content, record) = (target.content()?, files.record(&shots)?);
    if job.out.exists() && !job.force {
        return already(job, &gene, &target_content, &limits, &record, ui);
    }
    if shots.benign.is_empty() {
        ui.warn("without --benign-shots nothing keeps the model from refusing harmless requests; measure over-refusal");
    }
    ui.say(&format!(
        "  calibrating {} layers on {} safety, {} task and {} benign shots",
        gene.layers().len(),
        shots.safety.len(),
        shots.task.len(),
        shots.benign.len()
    ));
    let model = Model::open(&target)?;
    let attachments = GeneAttachments::new(&gene)?;
    let found = distill::calibrate(&Frozen::new(&model), &attachments, &shots, &limits, chat.end())?;
    if found.raises_safety_loss() {
        ui.warn(SWAPPED);
    }
    let expression = expression(&gene, &target_content, &found, &limits, record);
    expression.write(&job.out)?;
    if job.json {
        ui.data(&serde_json::to_value(&found).unwrap_or_default().to_string());
    }
    let goal = match found.goal {
        Goal::AlreadySafe => "the target refuses already; nothing is expressed",
        Goal::LeastKl => "as safe as asked, at the least change",
        Goal::LeastLoss => "as safe as the limit on KL allows",
    };
    let c: Vec<String> = found.coefficients.iter().map(|(l, c)| format!("{l}: {c:.2}")).collect();
    ui.say(&format!(
        "wrote `{}`: {goal}; safety loss {:.4} -> {:.4}, KL {:.4} on task shots{} nat per token; coefficients {}",
        job.out.display(),
        found.loss_before,
        found.loss,
        found.kl_task,
        found.kl_benign.map(|k| format!(", {k:.4} on benign shots")).unwrap_or_default(),
        c.join(", ")
    ));
    Ok(())
}

/// An output that exists is fine if it was made from the same gene, target, limits and shots.
fn already(
    job: &Calibrate,
    gene: &Gene,
    target: &str,
    limits: &Limits,
    shots: &serde_json::Map<String, serde_json::Value>,
    ui: &Ui,
) -> Result<(), Failure> {
    if let Ok(old) = Expression::read(&job.out) {
        let number = |key: &str| old.limits.get(key).and_then(serde_json::Value::as_f64);
        let same_limits = number("max_kl") == Some(limits.max_kl)
            && number("c_max") == Some(limits.c_max)
            && number("delta") == Some(limits.delta);
        if old.gene == gene.content() && old.target == target && same_limits && old.shots == *shots {
            ui.say(&format!(
                "`{}` is there already, made from the same inputs and options",
                job.out.display()
            ));
            return Ok(());
        }
    }
    Err(Failure {
        code: Code::Usage,
        message: format!("output `{}` exists", job.out.display()),
        causes: Vec::new(),
        hint: Some("use another path, or `--force` to replace it".into()),
    })
}
