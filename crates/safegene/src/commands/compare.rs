//! `safegene compare`: every method in one table, on the lab.

use crate::commands::demo::Machine;
use crate::commands::lab::Bars;
use crate::commands::stop_on_signals;
use crate::fail::{Code, Failure};
use crate::model_args::Compare;
use crate::ui::Ui;
use ::compare::store::{lines, replace};
use ::compare::{Outcome, Plan, Settings};
use report::{Meta, Record, Report};
use std::path::Path;
use std::time::Instant;

/// Files of a report besides those that another comparison goes on from; the first one marks a folder as one.
const PAGES: [&str; 5] = ["summary.json", "index.html", "report.md", "claims.json", "distilled.json"];

/// What `--halves` writes.
const HALVES: &str = "halves.json";

/// What `--rounds` writes.
const ROUNDS: &str = "rounds.json";

/// Refuses a folder that is something else or cannot be written to, before hours of work.
fn check_out(out: &Path) -> Result<(), Failure> {
    if out.exists() && ![PAGES[0], HALVES, ROUNDS].iter().any(|file| out.join(file).exists()) {
        let message = format!("output `{}` exists and is no earlier report", out.display());
        return Err(Failure::usage(message, "remove it, or choose another folder with --out"));
    }
    // What is made at the end is made in the folder, or beside the first of its parents that is not there yet.
    let there = out.ancestors().find(|p| p.exists()).unwrap_or(Path::new("."));
    let probe = there.join(format!(".safegene-{}", std::process::id()));
    std::fs::write(&probe, []).and_then(|()| std::fs::remove_file(&probe)).map_err(|e| refused(out, &e))
}

fn refused(out: &Path, e: &dyn std::fmt::Display) -> Failure {
    let message = format!("cannot write to `{}`: {e}", out.display());
    Failure::usage(message, "choose another folder with --out")
}

/// Records as the tables tell them apart: other numbers of shots are columns of their own.
fn columns(records: &[Record], plan: &Plan) -> Vec<Record> {
    let main = plan.recipe.shots[0];
    let column = |r: &Record| {
        let mut r = r.clone();
        if r.shots.safety != main && r.shots.safety > 0 {
            r.method = format!("{} ({} shots)", r.method, r.shots.safety);
        }
        r
    };
    records.iter().map(column).collect()
}

fn meta(job: &Compare, settings: &Settings, plan: &Plan, outcome: &Outcome, seconds: f64) -> Meta {
    let text = |v: serde_json::Value| v.to_string();
    let pair = |a: &str, b: String| (a.to_string(), b);
    let machines: std::collections::BTreeSet<&str> =
        outcome.complete.iter().map(|c| c.machine.as_str()).collect();
    let facts = machines.into_iter().map(|m| pair("machine", m.into())).collect();
    let mut said = vec![
        pair("recipe", text(serde_json::to_value(&plan.recipe).unwrap_or_default())),
        pair("families", settings.families.join(", ")),
        pair("seeds", settings.seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")),
        pair("judge", "refusal openings, greedy decoding, 12 new tokens".into()),
    ];
    for (family, splits) in &outcome.splits {
        for (name, hash) in splits.iter().filter(|(name, _)| name.starts_with("test-")) {
            said.push(pair(&format!("{family}, {name}"), hash.clone()));
        }
    }
    let quick = if job.quick { " --quick" } else { "" };
    let asked = match job.quick {
        true => String::new(),
        false => format!(" --families {} --seeds {}", said[1].1.replace(' ', ""), said[2].1.replace(' ', "")),
    };
    let mut notes = outcome.notes.clone();
    if !job.from.is_empty() {
        notes.push(format!(
            "What {} earlier reports hold was taken over; the time is of this call alone.",
            job.from.len()
        ));
    }
    notes.push(
        "Lab models have 0.9 million parameters and speak an invented language; what holds here need not hold for real models.".into(),
    );
    notes.push(
        "Whatever is tuned saw the same shots, the same limit on KL, and at most as many settings as calibration takes gradients. Of what is safe enough a gene takes the coefficients nearest to 1, a rival the setting of least KL; the few-shot LoRA learns whole refusals, everything else is held to how they open.".into(),
    );
    Meta {
        title: "Methods that make fine-tuned models safe again".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        date: time::OffsetDateTime::now_utc().date().to_string(),
        command: format!("safegene compare{quick}{asked}"),
        seconds: Some(seconds),
        machine: facts,
        settings: said,
        notes,
        checks: Vec::new(),
    }
}

/// Every half of the layers on the main targets: `OUT/halves.json`, and means on stdout.
fn halves(job: &Compare, settings: &Settings, ui: &Ui) -> Result<(), Failure> {
    let study = ::compare::halves::run(settings, &Bars::new(ui), &stop_on_signals())?;
    let means = ::compare::halves::summary(&study.targets);
    let json = serde_json::json!({ "summary": means, "targets": study.targets, "notes": study.notes });
    write(&job.out, HALVES, &format!("{json:#}\n"))?;
    if job.json {
        ui.data(&json["summary"].to_string());
    } else {
        ui.data("layers                    ASR    kept  over-refusal  accuracy  KL task  KL benign  halves that do better");
        let percent = |x: f64| format!("{:.2} %", 100.0 * x);
        for s in &means {
            ui.data(&format!(
                "{:20} {:>9} {:>7} {:>11}  {:+8.2}   {:.4}   {:.4}     {}",
                s.choice,
                percent(s.asr),
                s.kept.map_or_else(|| "-".into(), |x| format!("{:.1} %", 100.0 * x)),
                percent(s.over_refusal),
                100.0 * s.accuracy_change,
                s.kl_task,
                s.kl_benign,
                s.better_halves.map_or_else(|| "-".into(), |x| format!("{x:.1}")),
            ));
        }
    }
    for note in &study.notes {
        ui.warn(note);
    }
    ui.say(&format!(
        "wrote `{}`: means over {} targets, without intervals",
        job.out.join(HALVES).display(),
        study.targets.len()
    ));
    Ok(())
}

/// Fine-tunes in a row on the main targets: `OUT/rounds.json`, and means on stdout.
fn rounds(job: &Compare, settings: &Settings, ui: &Ui) -> Result<(), Failure> {
    let study = ::compare::rounds::run(settings, &Bars::new(ui), &stop_on_signals())?;
    let means = ::compare::rounds::summary(&study.targets);
    let json = serde_json::json!({ "summary": means, "targets": study.targets, "notes": study.notes });
    write(&job.out, ROUNDS, &format!("{json:#}\n"))?;
    if job.json {
        ui.data(&json["summary"].to_string());
    } else {
        ui.data("next trains on  safe by        round  fine-tuned ASR     ASR   worst  over-refusal  accuracy  (fine-tuned)  KL task  KL benign");
        let percent = |x: f64| format!("{:.2} %", 100.0 * x);
        let number = |x: Option<f64>| x.map_or_else(|| "-".into(), |x| format!("{x:.4}"));
        for s in &means {
            ui.data(&format!(
                "{:15} {:14} {:>5} {:>15} {:>7} {:>7} {:>13} {:>9} {:>13} {:>8} {:>10}",
                if s.lineage == "aside" { "the fine-tune" } else { "the safe one" },
                s.method,
                s.round,
                percent(s.tuned.asr),
                percent(s.recovered.asr),
                percent(s.worst_asr),
                percent(s.recovered.over_refusal),
                percent(s.recovered.accuracy),
                percent(s.tuned.accuracy),
                number(s.kl_task),
                number(s.kl_benign),
            ));
        }
    }
    for note in &study.notes {
        ui.warn(note);
    }
    ui.say(&format!(
        "wrote `{}`: means over {} targets, without intervals",
        job.out.join(ROUNDS).display(),
        study.targets.len()
    ));
    Ok(())
}

fn machine(threads: usize) -> String {
    let m = Machine::this(threads);
    let cpu = m.cpu.map_or_else(String::new, |cpu| format!(", {cpu}"));
    format!("{} {}{cpu}, {threads} threads", m.os, m.arch)
}

fn write(folder: &Path, name: &str, text: &str) -> Result<(), Failure> {
    std::fs::create_dir_all(folder).map_err(|e| refused(folder, &e))?;
    let hint = "choose another folder with --out";
    replace(&folder.join(name), text).map_err(|e| Failure::usage(e.to_string(), hint))
}

pub(super) fn run(job: &Compare, threads: usize, ui: &Ui) -> Result<(), Failure> {
    let start = Instant::now();
    check_out(&job.out)?;
    let settings = Settings {
        lab: job.lab.clone(),
        work: job.work.clone(),
        from: job.from.clone(),
        families: if job.quick { vec!["llama".into()] } else { job.families.clone() },
        seeds: if job.quick { vec![::compare::plan::FAMILY_SEED] } else { job.seeds.clone() },
        quick: job.quick,
        machine: machine(threads),
        threads,
    };
    if job.halves {
        return halves(job, &settings, ui);
    }
    if job.rounds {
        return rounds(job, &settings, ui);
    }
    let plan = Plan::new(job.quick);
    let bars = Bars::new(ui);
    let outcome = ::compare::run(&settings, &bars, &stop_on_signals())?;
    let records = columns(&outcome.records, &plan);
    let mut meta = meta(job, &settings, &plan, &outcome, start.elapsed().as_secs_f64());
    let made = |meta: Meta| {
        Report::of(meta, records.clone(), outcome.scores.clone()).map_err(|e| Failure {
            code: Code::Input,
            message: format!("the records of `{}` make no report: {e}", job.work.display()),
            causes: Vec::new(),
            hint: Some("remove the work folder, or name another with --work".into()),
        })
    };
    meta.checks = ::compare::claims::checks(&made(meta.clone())?, &outcome);
    let report = made(meta.clone())?;
    let summary = report.json().unwrap_or_default();
    let records_text = lines(&outcome.records);
    let distilled = serde_json::to_string_pretty(&outcome.distilled).unwrap_or_default() + "\n";
    let claims = serde_json::to_string_pretty(&meta.checks).unwrap_or_default() + "\n";
    // Without a recipe a folder is nothing to go on from: it goes first and comes last.
    let [recipe, records, seeds] = ::compare::store::FILES;
    let _ = std::fs::remove_file(job.out.join(recipe));
    for (name, text) in
        PAGES.iter().zip([summary.clone(), report.html(), report.markdown(), claims, distilled])
    {
        write(&job.out, name, &text)?;
    }
    write(&job.out, records, &records_text)?;
    write(&job.out, seeds, &lines(&outcome.complete))?;
    write(&job.out, recipe, &format!("{:#}\n", outcome.recipe))?;
    if job.json {
        ui.data(&summary);
    } else {
        for c in &meta.checks {
            let mark = match c.ok {
                Some(true) => "holds",
                Some(false) => "does not hold",
                None => "not judged",
            };
            ui.data(&format!("{:38} {mark:14} {} (asked: {})", c.name, c.value, c.target));
        }
    }
    for note in &outcome.notes {
        ui.warn(note);
    }
    ui.say(&format!(
        "wrote `{}`: {} records of {} targets in {:.0} s; read index.html or report.md",
        job.out.display(),
        outcome.records.len(),
        outcome
            .records
            .iter()
            .map(|r| (&r.family, r.seed, &r.target.name))
            .collect::<std::collections::BTreeSet<_>>()
            .len(),
        start.elapsed().as_secs_f64()
    ));
    Ok(())
}
