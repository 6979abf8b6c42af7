//! `safegene recover`: one model by one of the other methods.

use crate::args::{Form, Recover};
use crate::commands::calibrate::read_refusals;
use crate::commands::evaluate::fields;
use crate::commands::extract::Streaming;
use crate::commands::{openings, peak_rss_bytes, percent, stop_on_signals};
use crate::device::{Device, on_device};
use crate::fail::Failure;
use crate::ui::Ui;
use evaluate::{DataRow, read_rows};
use recover::{
    Action, Algebra, Inputs, Job, METHODS, MethodInfo, ModuleReport, Need, Report, Shots, When, by_name,
};
use std::path::{Path, PathBuf};

pub(super) fn run(job: &Recover, device: &Device, memory_bytes: u64, ui: &Ui) -> Result<(), Failure> {
    let (Some(name), Some(target), Some(out)) = (&job.method, &job.target, &job.out) else {
        // The arguments are all there unless the list is asked for.
        list(job.json, ui);
        return Ok(());
    };
    let info = by_name(name)?;
    let method = (info.build)(&job.options.settings())?;
    warn_of_unused(job, info, ui);
    let inputs = Inputs {
        target: target.clone(),
        aligned: job.aligned.clone(),
        base: job.base.clone(),
        degraded: job.degraded.clone(),
        safety_adapter: job.safety_adapter.clone(),
        adapter_base: job.adapter_base.clone(),
        shots: shots(job, info)?,
    };
    let algebra: &dyn Algebra = on_device!(device, |engine| engine);
    let (stop, streaming) = (stop_on_signals(), Streaming::new(ui));
    let work = Job {
        out,
        form: match job.r#as {
            Form::Merged => recover::Form::Merged,
            Form::Adapter => recover::Form::Adapter,
            Form::Both => recover::Form::Both,
        },
        force: job.force,
        memory_bytes,
        algebra,
        stop: &stop,
        progress: &streaming,
    };
    let result = recover::recover(&*method, &inputs, &work);
    streaming.finish();
    let report = result.map_err(|e| {
        Failure::from(e).context(format!("cannot recover `{}` by `{}`", target.display(), info.name))
    })?;
    show(&report, info, target, job.json, ui);
    Ok(())
}

/// The rows of the kinds that the method takes.
fn shots(job: &Recover, info: &MethodInfo) -> Result<Shots, Failure> {
    let fields = fields(&job.fields);
    let taken = |need: Need, path: &Option<PathBuf>| {
        path.clone().filter(|_| info.needs.contains(&need) || info.optional.contains(&need))
    };
    let shot = |row: DataRow| recover::Shot { prompt: row.prompt, answer: row.answer.unwrap_or_default() };
    let rows = |need: Need, path: &Option<PathBuf>| -> Result<Vec<recover::Shot>, Failure> {
        let Some(path) = taken(need, path) else { return Ok(Vec::new()) };
        Ok(read_rows(&path, &fields, true)?.into_iter().map(shot).collect())
    };
    let safety = match taken(Need::SafetyShots, &job.safety_shots) {
        None => Vec::new(),
        Some(path) => read_refusals(&path, &fields, &openings(job.fields.refusals.as_deref())?, &Ok)?,
    };
    Ok(Shots {
        safety: safety.into_iter().map(shot).collect(),
        task: rows(Need::TaskShots, &job.task_shots)?,
        benign: rows(Need::BenignShots, &job.benign_shots)?,
    })
}

/// What was given and is not looked at.
fn warn_of_unused(job: &Recover, info: &MethodInfo, ui: &Ui) {
    let given: [(Need, &Option<PathBuf>); 7] = [
        (Need::Aligned, &job.aligned),
        (Need::Base, &job.base),
        (Need::Degraded, &job.degraded),
        (Need::SafetyAdapter, &job.safety_adapter),
        (Need::SafetyShots, &job.safety_shots),
        (Need::TaskShots, &job.task_shots),
        (Need::BenignShots, &job.benign_shots),
    ];
    for (need, dir) in given {
        if dir.is_none() || info.needs.contains(&need) || info.optional.contains(&need) {
            continue;
        }
        let more = match need {
            Need::Base => "; the base of an adapter is `--adapter-base`",
            // It is where adapters look for their base.
            Need::Aligned => " but as a base of adapters that name none",
            _ => "",
        };
        ui.warn(&format!("{} is not used by `{}`{more}", need.argument(), info.name));
    }
}

/// All methods, for machines or for people.
fn list(json: bool, ui: &Ui) {
    if json {
        ui.data(&serde_json::json!(METHODS).to_string());
        return;
    }
    for method in METHODS {
        let paper = method.paper.map_or("a control of ours".to_owned(), |paper| format!("arXiv {paper}"));
        let needs = |needs: &[Need]| {
            let arguments: Vec<&str> = needs.iter().map(|need| need.argument().trim_matches('`')).collect();
            arguments.join(", ")
        };
        ui.data(&format!("{:18}{}, {paper}", method.name, method.title));
        ui.data(&format!("    {}", method.formula));
        let when = match method.when {
            When::AfterTraining => "",
            When::AtTraining => ", at training",
            When::BeforeTraining => ", before training",
        };
        ui.data(&format!("    needs {}{when}", needs(method.needs)));
        if !method.optional.is_empty() {
            ui.data(&format!("    takes {}", needs(method.optional)));
        }
        for option in method.options {
            ui.data(&format!("    --{:14}{} [{}]", option.name, option.help, option.default));
        }
        ui.data(&format!("    departs from its source: {}\n", method.deviations));
    }
}

/// What was done, for machines and for people.
fn show(report: &Report, info: &MethodInfo, target: &Path, json: bool, ui: &Ui) {
    if json {
        let mut value = serde_json::json!(report);
        value["peak_rss_bytes"] = serde_json::json!(peak_rss_bytes());
        ui.data(&value.to_string());
    }
    for out in &report.outputs {
        match report.already {
            true => ui.say(&format!("`{}` is there already, made from the same inputs", out.display())),
            false => ui.say(&format!("wrote `{}`", out.display())),
        }
    }
    let tensors = report.tensors;
    ui.say(&format!(
        "  {} by {}: {} elements of {} tensors changed (norm {:.3e}), {} came out as they were, {} are not touched; {:.1} s",
        target.display(),
        info.title,
        report.elements_changed,
        tensors.changed,
        report.change_norm,
        tensors.same,
        tensors.kept,
        report.wall_s
    ));
    if let Some((low, high)) = range(&report.modules, |module| module.cosine) {
        let acted = report.modules.iter().filter(|module| module.action != Action::Kept).count();
        let ratio = range(&report.modules, |module| module.norm_ratio);
        let ratio =
            ratio.map_or(String::new(), |(low, high)| format!(", |C BA| / |BA| {low:.2e} to {high:.2e}"));
        let of = report.modules.len();
        ui.say(&format!("  {acted} of {of} modules changed; cosines {low:.3} to {high:.3}{ratio}"));
    }
    if let Some((low, high)) = range(&report.modules, |module| module.kept) {
        let (low, high) = (percent(low), percent(high));
        ui.say(&format!("  of what fine-tuning moved in a module, {low} to {high} stays"));
    }
    for note in &report.notes {
        ui.say(&format!("  {note}"));
    }
    if report.changed_nothing {
        ui.warn(&format!("`{}` changed nothing: the output is the target as it was", info.name));
    }
    for name in &report.code {
        ui.warn(&format!("`{}` is code that runs when the model is loaded", checkpoint::printable(name)));
    }
}

/// The least and the largest of a number of some modules.
fn range(modules: &[ModuleReport], number: impl Fn(&ModuleReport) -> Option<f64>) -> Option<(f64, f64)> {
    let numbers: Vec<f64> = modules.iter().filter_map(number).collect();
    let low = numbers.iter().copied().reduce(f64::min)?;
    Some((low, numbers.into_iter().reduce(f64::max)?))
}
