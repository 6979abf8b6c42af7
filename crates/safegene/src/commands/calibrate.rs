//! `safegene calibrate`: the coefficients of a gene in a target.

use crate::commands::evaluate::{chat_of, fields, hash, named};
use crate::commands::models::{Shelf, canonical};
use crate::commands::{check_folder_of, openings, warn_if_fused};
use crate::fail::{Code, Failure};
use crate::model_args::Calibrate;
use crate::ui::Ui;
use checkpoint::Checkpoint;
use distill::{
    Aim, Calibration, Freedom, Frozen, GeneAttachments, Goal, Limits, Shots, Solver, check_safety_shots,
};
use evaluate::{DataRow, Fields, Matching, Sets, read_rows};
use gene::{Expression, Gene};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use transformer::{Attachments, Chat, Openings, Row};

/// Files of shots.
pub(super) struct ShotFiles<'a> {
    pub(super) safety: &'a Path,
    pub(super) task: &'a Path,
    pub(super) benign: Option<&'a Path>,
}

impl ShotFiles<'_> {
    /// Reads, checks that safety shots are refusals, cuts these to their openings, and encodes.
    pub(super) fn read(
        &self,
        chat: &Chat,
        fields: &Fields,
        openings: &Openings,
        fill: &dyn Fn(Vec<DataRow>) -> Result<Vec<DataRow>, Failure>,
    ) -> Result<Shots, Failure> {
        let safety = read_refusals(self.safety, fields, openings, fill)?;
        let task = read_rows(self.task, fields, true)?;
        let benign = match self.benign {
            Some(path) => read_rows(path, fields, true)?,
            None => Vec::new(),
        };
        let encode = |rows: &[DataRow]| -> Result<Vec<Row>, Failure> {
            rows.iter().map(|r| Ok(chat.row(&r.prompt, r.answer.as_deref().unwrap_or(""))?)).collect()
        };
        let mut safety = encode(&safety)?;
        chat.cut_to_openings(&mut safety, openings)?;
        Ok(Shots { safety, task: encode(&task)?, benign: encode(&benign)? })
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

/// Harmful prompts, each of which has to be answered by a refusal; `fill` may answer those that are not answered.
pub(super) fn read_refusals(
    path: &Path,
    fields: &Fields,
    openings: &Openings,
    fill: &dyn Fn(Vec<DataRow>) -> Result<Vec<DataRow>, Failure>,
) -> Result<Vec<DataRow>, Failure> {
    let rows = fill(read_rows(path, fields, false)?)?;
    if let Some(row) = rows.iter().find(|r| r.answer.is_none()) {
        let field = fields.answer.clone();
        return Err(evaluate::DataError::Field { path: path.into(), line: row.line, field }.into());
    }
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
    put("leave", limits.leave);
    put("kl_price", limits.kl_price);
    put("kl", found.kl_task);
    if let Some(kl) = found.kl_benign {
        put("kl_benign", kl);
    }
    put("loss_before", found.loss_before);
    put("loss", found.loss);
    limits_json.insert("goal".into(), serde_json::to_value(found.goal).unwrap_or_default());
    limits_json.insert("refusals".into(), "openings".into());
    limits_json.insert("aim".into(), serde_json::to_value(limits.aim).unwrap_or_default());
    limits_json.insert("freedom".into(), serde_json::to_value(limits.freedom).unwrap_or_default());
    limits_json.insert("solver".into(), serde_json::to_value(limits.solver).unwrap_or_default());
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

/// Halvings of the limit on KL before the gate gives up.
const HALVINGS: usize = 5;
/// Longest answer on a utility row, beyond what the row's own answer has, in tokens.
const UTILITY_TOKENS: usize = 8;

/// One target of the call.
struct Job<'a> {
    call: &'a Calibrate,
    target: &'a Path,
    task: &'a Path,
    utility: &'a Path,
    out: PathBuf,
}

/// Pairs targets with their files and outputs.
fn jobs(call: &Calibrate) -> Result<Vec<Job<'_>>, Failure> {
    let n = call.target.len();
    let count = |files: usize, what: &str, least: usize| {
        let fits = files == n || files == 1 || (files == 0 && least == 0);
        let message = format!("{files} {what} for {n} --target");
        if fits {
            Ok(())
        } else {
            Err(Failure::usage(message, "give one file for each target in their order, or one for all"))
        }
    };
    count(call.task_shots.len(), "--task-shots", 1)?;
    count(call.utility.len(), "--utility", 0)?;
    let of = |files: &'_ [PathBuf], i: usize| -> usize { if files.len() == 1 { 0 } else { i } };
    let mut out = Vec::new();
    for (i, target) in call.target.iter().enumerate() {
        let task = &call.task_shots[of(&call.task_shots, i)];
        let utility = call.utility.get(of(&call.utility, i)).unwrap_or(task);
        let file = match n {
            1 => call.out.clone(),
            _ => {
                let name = target.file_name().unwrap_or_default().to_string_lossy();
                call.out.join(format!("{name}.json"))
            }
        };
        if out.iter().any(|j: &Job<'_>| j.out == file) {
            let message = format!("two targets would be written to `{}`", file.display());
            return Err(Failure::usage(
                message,
                "name their folders differently, or calibrate them one by one",
            ));
        }
        out.push(Job { call, target, task, utility, out: file });
    }
    Ok(out)
}

/// The safety shots of a call: read once, for all targets.
struct Safety {
    rows: Vec<DataRow>,
    /// The content of the aligned model, if it had to answer some.
    answered_by: Option<String>,
}

impl Safety {
    /// Answers that are lacking are the aligned model's, if there is one.
    fn read(call: &Calibrate) -> Result<Self, Failure> {
        let rows = read_rows(&call.safety_shots, &fields(&call.fields), false)?;
        let lacking: Vec<DataRow> = rows.iter().filter(|r| r.answer.is_none()).cloned().collect();
        let Some(aligned) = call.aligned.as_ref().filter(|_| !lacking.is_empty()) else {
            return Ok(Self { rows, answered_by: None });
        };
        let checkpoint = Checkpoint::open(aligned, call.base.as_deref())?;
        let (mut shelf, chat) = (Shelf::default(), chat_of(&checkpoint)?);
        let slot = shelf.open(&checkpoint)?;
        let teacher = shelf.frozen(&slot);
        let mut answers = evaluate::answers(teacher.model, &teacher.own, &chat, &lacking, 48)?.into_iter();
        let fill = |mut r: DataRow| {
            if r.answer.is_none() {
                r.answer = answers.next();
            }
            r
        };
        let rows = rows.into_iter().map(fill).collect();
        Ok(Self { rows, answered_by: Some(checkpoint.content()?) })
    }
}

/// Rows of the gate that the target answers rightly, and how many of these a change loses.
struct Utility<'a> {
    target: &'a Frozen<'a>,
    chat: &'a Chat,
    rows: &'a [DataRow],
    right: Vec<bool>,
}

impl<'a> Utility<'a> {
    fn new(target: &'a Frozen<'a>, chat: &'a Chat, rows: &'a [DataRow]) -> Result<Self, Failure> {
        let mut out = Self { target, chat, rows, right: Vec::new() };
        out.right = out.right(&Attachments::none())?;
        Ok(out)
    }

    fn right(&self, more: &Attachments) -> Result<Vec<bool>, Failure> {
        let longest = self.rows.iter().filter_map(|r| r.answer.as_deref());
        let longest =
            longest.map(|a| self.chat.answer(a).map(|ids| ids.len())).collect::<Result<Vec<_>, _>>()?;
        let tokens = longest.into_iter().max().unwrap_or(0) + UTILITY_TOKENS;
        let at = self.target.with(more);
        let sets = Sets { task: self.rows, ..Sets::default() };
        let given = evaluate::run(self.target.model, &at, self.chat, sets, tokens)?;
        let one = |(row, given): (&DataRow, &String)| {
            let sets = Sets { task: std::slice::from_ref(row), ..Sets::default() };
            let given = evaluate::Given { task: vec![given.clone()], ..Default::default() };
            let e = evaluate::judge(sets, &given, &Openings::default(), Matching::Exact);
            e.accuracy.is_some_and(|r| r.value > 0.5)
        };
        Ok(self.rows.iter().zip(&given.task).map(one).collect())
    }

    /// Share of all rows that were right and no longer are.
    fn loss(&self, more: &Attachments) -> Result<f64, Failure> {
        let now = self.right(more)?;
        let lost = self.right.iter().zip(&now).filter(|(before, now)| **before && !**now).count();
        Ok(lost as f64 / self.rows.len().max(1) as f64)
    }
}

pub(super) fn run(call: &Calibrate, ui: &Ui) -> Result<(), Failure> {
    let jobs = jobs(call)?;
    for job in &jobs {
        if jobs.len() == 1 {
            check_folder_of(&job.out)?;
        }
    }
    if let Some(share) = call.max_utility_loss.filter(|s| !(0.0..=1.0).contains(s)) {
        return Err(Failure::usage(
            format!("--max-utility-loss {share} is no share"),
            "0.01 allows one row in a hundred",
        ));
    }
    let gene = Gene::open(&call.gene)?;
    let attachments = GeneAttachments::new(&gene)?;
    let limits = limits(call);
    let safety = Safety::read(call)?;
    // Files are looked at before anything is run: a bad one must not end a batch in its middle.
    let mut ready = Vec::new();
    for job in &jobs {
        ready.extend(prepare(job, &gene, &limits, &safety, ui)?);
    }
    let folders = ready
        .iter()
        .map(|r| Ok(canonical(Shelf::weights_of(&r.target)?.0)))
        .collect::<Result<Vec<_>, Failure>>()?;
    if jobs.len() > 1 && !ready.is_empty() {
        std::fs::create_dir_all(&call.out).map_err(|e| {
            Failure::usage(format!("cannot create `{}`: {e}", call.out.display()), "choose another --out")
        })?;
        let copies = folders.iter().collect::<BTreeSet<_>>().len();
        let copies = if copies == 1 { "1 copy".into() } else { format!("{copies} copies") };
        ui.say(&format!("  calibrate {} targets on {copies} of weights", ready.len()));
    }
    let (mut shelf, mut refused) = (Shelf::default(), None);
    for (i, ready) in ready.iter().enumerate() {
        // What no target needs any more goes first: whole fine-tunes are held one at a time.
        shelf.keep_only(&folders[i..]);
        let slot = shelf.open(&ready.target)?;
        match one(ready, &gene, &attachments, &limits, &shelf.frozen(&slot), ui) {
            Err(failure) if failure.code == Code::No && jobs.len() > 1 => {
                ui.warn(&format!("{}: {}", ready.job.target.display(), failure.message));
                refused = Some(failure);
            }
            other => other?,
        }
    }
    refused.map_or(Ok(()), Err)
}

fn limits(call: &Calibrate) -> Limits {
    Limits {
        max_kl: call.max_kl,
        c_max: call.c_max,
        delta: call.delta,
        leave: call.leave,
        // The least KL is asked for without a price.
        kl_price: if call.least_kl { 0.0 } else { call.kl_price },
        freedom: if call.one_coefficient { Freedom::OneForAll } else { Freedom::PerLayer },
        aim: if call.least_kl { Aim::LeastKl } else { Aim::Nearest },
        solver: if call.forward_only { Solver::ForwardOnly } else { Solver::Gradients },
        ..Limits::default()
    }
}

/// A target whose files are read.
struct Ready<'a> {
    job: &'a Job<'a>,
    target: Checkpoint,
    content: String,
    chat: Chat,
    shots: Shots,
    utility: Vec<DataRow>,
    record: serde_json::Map<String, serde_json::Value>,
}

/// `None` if the output is there already.
fn prepare<'a>(
    job: &'a Job<'a>,
    gene: &Gene,
    limits: &Limits,
    safety: &Safety,
    ui: &Ui,
) -> Result<Option<Ready<'a>>, Failure> {
    let call = job.call;
    let target = Checkpoint::open(job.target, call.base.as_deref())?;
    gene::check_family(gene, &target)
        .map_err(|e| Failure::from(e).context(format!("cannot use `{}`", job.target.display())))?;
    warn_if_fused(gene, &target, ui);
    transformer::Architecture::from_config(&target.config().raw)?;
    let chat = chat_of(&target)?;
    let fields = fields(&call.fields);
    let openings = openings(call.fields.refusals.as_deref())?;
    let files =
        ShotFiles { safety: &call.safety_shots, task: job.task, benign: call.benign_shots.as_deref() };
    let shots = files.read(&chat, &fields, &openings, &|_| Ok(safety.rows.clone()))?;
    let (content, mut record) = (target.content()?, files.record(&shots)?);
    let mut utility = Vec::new();
    if let Some(share) = call.max_utility_loss {
        utility = read_rows(job.utility, &fields, true)?;
        let rows = serde_json::json!({ "max_loss": share, "content": hash(Some(job.utility))? });
        record.insert("utility".into(), rows);
    }
    if let Some(refusals) = &call.fields.refusals {
        record.insert("refusals".into(), serde_json::json!({ "content": hash(Some(refusals))? }));
    }
    if let named @ serde_json::Value::Object(_) = named(&fields) {
        record.insert("fields".into(), named);
    }
    if let Some(content) = &safety.answered_by {
        record.insert("answered_by".into(), content.clone().into());
    }
    if job.out.exists() && !call.force {
        already(job, gene, &content, limits, &record, ui)?;
        return Ok(None);
    }
    Ok(Some(Ready { job, target, content, chat, shots, utility, record }))
}

fn one(
    ready: &Ready<'_>,
    gene: &Gene,
    attachments: &GeneAttachments,
    limits: &Limits,
    frozen: &Frozen<'_>,
    ui: &Ui,
) -> Result<(), Failure> {
    let Ready { job, chat, shots, .. } = ready;
    let call = job.call;
    if shots.benign.is_empty() {
        ui.warn("without --benign-shots nothing keeps the model from refusing harmless requests; measure over-refusal");
    }
    ui.say(&format!(
        "  calibrating {} layers on {} safety, {} task and {} benign shots",
        attachments.layers().len(),
        shots.safety.len(),
        shots.task.len(),
        shots.benign.len()
    ));
    let utility = match call.max_utility_loss {
        Some(_) => Some(Utility::new(frozen, chat, &ready.utility)?),
        None => None,
    };
    let (mut used, mut found) = (*limits, None);
    for halving in 0..=HALVINGS {
        let try_now = distill::calibrate(frozen, attachments, shots, &used, chat.end())?;
        let Some((utility, allowed)) = utility.as_ref().zip(call.max_utility_loss) else {
            found = Some((try_now, None));
            break;
        };
        let lost = utility.loss(&attachments.at(&try_now.coefficients)?)?;
        if lost <= allowed {
            found = Some((try_now, Some(lost)));
            break;
        }
        ui.say(&format!(
            "  utility   {} of {} rows lost under --max-kl {}{}",
            crate::commands::percent(lost),
            utility.rows.len(),
            used.max_kl,
            if halving < HALVINGS { "; trying half of it" } else { "" }
        ));
        // What was reached may lie far below the limit, and a limit that does not bind changes nothing.
        let reached = try_now.kl_task.max(try_now.kl_benign.unwrap_or(0.0));
        used.max_kl = 0.5 * used.max_kl.min(reached.max(1e-9));
    }
    if found.as_ref().is_some_and(|(c, _)| c.raises_safety_loss()) {
        ui.warn(SWAPPED);
    }
    let helps = |c: &Calibration| c.goal == Goal::AlreadySafe || c.loss < c.loss_before;
    let Some((found, lost)) = found.filter(|(c, _)| helps(c)) else {
        let limit = match call.max_utility_loss {
            Some(share) => format!("--max-utility-loss {share}"),
            None => format!("--max-kl {}", limits.max_kl),
        };
        return Err(Failure {
            code: Code::No,
            message: format!("`{}` cannot be made safer by this gene within {limit}", job.target.display()),
            causes: Vec::new(),
            hint: Some("allow more, give more task shots, or use a gene that was distilled on drifts".into()),
        });
    };
    let effects = distill::layer_effects(frozen, attachments, shots, &found, chat.end())?;
    let points = sorted(&call.trade_off);
    let curve = distill::trade_off(frozen, attachments, shots, limits, &points, chat.end())?;
    let mut expression = expression(gene, &ready.content, &found, limits, ready.record.clone());
    let mut put = |key: &str, value: serde_json::Value| expression.limits.insert(key.into(), value);
    if let Some(lost) = lost {
        put("max_kl_used", used.max_kl.into());
        put("utility_loss", lost.into());
    }
    expression.extra.insert("effects".into(), serde_json::to_value(&effects).unwrap_or_default());
    if !curve.is_empty() {
        expression.extra.insert("trade_off".into(), serde_json::to_value(&curve).unwrap_or_default());
    }
    expression.write(&job.out)?;
    if call.json {
        let mut value = serde_json::to_value(&found).unwrap_or_default();
        value["schema"] = 1.into();
        value["target"] = job.target.display().to_string().into();
        value["effects"] = serde_json::to_value(&effects).unwrap_or_default();
        value["trade_off"] = serde_json::to_value(&curve).unwrap_or_default();
        value["utility_loss"] = lost.into();
        ui.data(&value.to_string());
    }
    let goal = match found.goal {
        Goal::AlreadySafe => "the target refuses already; nothing is expressed",
        Goal::Nearest => "as safe as asked, with coefficients near 1 and little KL",
        Goal::LeastKl => "as safe as asked, at the least KL on the shots",
        Goal::LeastLoss => {
            "the safety asked for costs more than the limit on KL, or more KL or coefficients further from 1 than it is worth: about as safe as that allows"
        }
    };
    ui.say(&format!(
        "wrote `{}`: {goal}; safety loss {:.4} -> {:.4}, KL {:.4} on task shots{} nat per token",
        job.out.display(),
        found.loss_before,
        found.loss,
        found.kl_task,
        found.kl_benign.map(|k| format!(", {k:.4} on benign shots")).unwrap_or_default(),
    ));
    if found.goal != Goal::AlreadySafe {
        ui.say("  layer  coefficient  loss without it  KL without it");
        for e in &effects {
            ui.say(&format!(
                "  {:>5}  {:>11.3}  {:>15.4}  {:>13.4}",
                e.layer, e.coefficient, e.loss_without, e.kl_without
            ));
        }
    }
    if !curve.is_empty() {
        ui.say("  KL limit  safety loss  KL used");
        for p in &curve {
            let kl = p.kl_task.max(p.kl_benign.unwrap_or(0.0));
            ui.say(&format!("  {:>8}  {:>11.4}  {:>7.4}", p.max_kl, p.loss, kl));
        }
    }
    Ok(())
}

fn sorted(limits: &[f64]) -> Vec<f64> {
    let mut out = limits.to_vec();
    out.sort_by(f64::total_cmp);
    out
}

/// The limits of the trade-off curve in an expression.
fn curve_limits(old: &Expression) -> Vec<f64> {
    let points = old.extra.get("trade_off").and_then(serde_json::Value::as_array);
    points.into_iter().flatten().filter_map(|p| p["max_kl"].as_f64()).collect()
}

/// An output that exists is fine if it was made from the same gene, target, limits and shots.
fn already(
    job: &Job<'_>,
    gene: &Gene,
    target: &str,
    limits: &Limits,
    shots: &serde_json::Map<String, serde_json::Value>,
    ui: &Ui,
) -> Result<(), Failure> {
    if let Ok(old) = Expression::read(&job.out) {
        let number = |key: &str| old.limits.get(key).and_then(serde_json::Value::as_f64);
        let word = |key: &str, now: serde_json::Value| old.limits.get(key).is_none_or(|v| *v == now);
        let same_limits = number("max_kl") == Some(limits.max_kl)
            && number("c_max") == Some(limits.c_max)
            && number("delta") == Some(limits.delta)
            && number("leave").is_none_or(|v| v == limits.leave)
            // Before it had a price, KL was free.
            && number("kl_price").unwrap_or(0.0) == limits.kl_price
            // Before there was an aim, whole refusals were looked at.
            && old.limits.get("aim") == serde_json::to_value(limits.aim).ok().as_ref()
            && word("freedom", serde_json::to_value(limits.freedom).unwrap_or_default())
            && word("solver", serde_json::to_value(limits.solver).unwrap_or_default());
        let has_curve = job.call.trade_off.is_empty() || curve_limits(&old) == sorted(&job.call.trade_off);
        if old.gene == gene.content()
            && old.target == target
            && same_limits
            && has_curve
            && old.shots == *shots
        {
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
