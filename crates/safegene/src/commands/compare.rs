//! `safegene compare`: every method in one table, on the lab.

use crate::commands::demo::Machine;
use crate::commands::lab::Bars;
use crate::commands::stop_on_signals;
use crate::fail::{Code, Failure};
use crate::model_args::Compare;
use crate::ui::Ui;
use ::compare::judge::AlignedRates;
use ::compare::store::{lines, replace};
use ::compare::study::Study;
use ::compare::{Outcome, Plan, Settings};
use report::{Meta, Record, Report, Set};
use serde::Serialize;
use std::path::Path;
use std::time::Instant;

/// Files of a report besides those that another comparison goes on from.
const PAGES: [&str; 6] =
    ["summary.json", "index.html", "report.md", "claims.json", "distilled.json", "aligned.json"];

/// What `--halves` writes.
const HALVES: &str = "halves.json";

/// What `--rounds` writes.
const ROUNDS: &str = "rounds.json";

/// Refuses a folder that is something else or cannot be written to, before hours of work.
fn check_out(out: &Path) -> Result<(), Failure> {
    let mut files = ::compare::store::FILES.into_iter().chain([PAGES[0], HALVES, ROUNDS]);
    if out.exists() && !files.any(|file| out.join(file).exists()) {
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
    let from: String = job.from.iter().map(|d| format!(" --from {}", d.display())).collect();
    let asked = match job.quick {
        true => String::new(),
        false => {
            format!("{from} --families {} --seeds {}", said[1].1.replace(' ', ""), said[2].1.replace(' ', ""))
        }
    };
    let mut notes = outcome.notes.clone();
    notes.extend(aligned_note(&outcome.aligned));
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
        "Whatever is tuned saw the same shots, the same limit on KL, but for resta-equal-kl, whose limit is the larger of the two KL that the gene spends on the shots. A rival tries 7 to 15 settings, calibration may take 96 gradients and mostly takes 10 to 30. A gene takes coefficients near 1 and little KL, as far as it makes safer, a rival the setting of least KL of those that are safe enough; a rival none of whose settings is within the limit takes the one of least KL. The few-shot LoRA learns whole refusals, everything else is held to how they open.".into(),
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

/// What the aligned models themselves do, in one line.
fn aligned_note(aligned: &[AlignedRates]) -> Option<String> {
    let one = |a: &AlignedRates| {
        let set = match a.set {
            Set::Known => "known",
            Set::Shifted => "shifted",
        };
        let [asr, over] = [a.asr, a.over_refusal].map(|r| 100.0 * r.value);
        format!("{} {set} {asr:.1} and {over:.1}", a.family)
    };
    let all: Vec<String> = aligned.iter().map(one).collect();
    (!all.is_empty()).then(|| {
        format!(
            "The aligned models themselves, ASR and over-refusal in % on the same prompts: {}.",
            all.join("; ")
        )
    })
}

/// What a study found: all of it in `OUT/FILE`, its means on stdout.
fn show<T: Serialize>(
    job: &Compare,
    file: &str,
    study: &Study<T>,
    means: &impl Serialize,
    table: &[String],
    ui: &Ui,
) -> Result<(), Failure> {
    let json = serde_json::json!({ "summary": means, "targets": study.targets, "notes": study.notes });
    write(&job.out, file, &format!("{json:#}\n"))?;
    if job.json {
        ui.data(&json["summary"].to_string());
    } else {
        table.iter().for_each(|line| ui.data(line));
    }
    for note in &study.notes {
        ui.warn(note);
    }
    ui.say(&format!(
        "wrote `{}`: means over {} targets, without intervals",
        job.out.join(file).display(),
        study.targets.len()
    ));
    Ok(())
}

/// Every half of the layers on the main targets.
fn halves(job: &Compare, settings: &Settings, ui: &Ui) -> Result<(), Failure> {
    let study = ::compare::halves::run(settings, &Bars::new(ui), &stop_on_signals())?;
    let means = ::compare::halves::summary(&study.targets);
    let mut table =
        vec!["layers                    ASR    kept  over-refusal  accuracy  KL task  KL benign  halves that do better".into()];
    table.extend(means.iter().map(|s| {
        format!(
            "{:20} {:>9} {:>7} {:>11}  {:+8.2}   {:.4}   {:.4}     {}",
            s.choice,
            percent(s.asr),
            s.kept.map_or_else(|| "-".into(), |x| format!("{:.1} %", 100.0 * x)),
            percent(s.over_refusal),
            100.0 * s.accuracy_change,
            s.kl_task,
            s.kl_benign,
            s.better_halves.map_or_else(|| "-".into(), |x| format!("{x:.1}")),
        )
    }));
    show(job, HALVES, &study, &means, &table, ui)
}

/// Fine-tunes in a row on the main targets.
fn rounds(job: &Compare, settings: &Settings, ui: &Ui) -> Result<(), Failure> {
    let study = ::compare::rounds::run(settings, &Bars::new(ui), &stop_on_signals())?;
    let means = ::compare::rounds::summary(&study.targets);
    let mut table =
        vec!["next trains on  safe by        round  fine-tuned ASR     ASR   worst  over-refusal  accuracy  (fine-tuned)  KL task  KL benign".into()];
    let number = |x: Option<f64>| x.map_or_else(|| "-".into(), |x| format!("{x:.4}"));
    table.extend(means.iter().map(|s| {
        format!(
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
        )
    }));
    show(job, ROUNDS, &study, &means, &table, ui)
}

fn percent(x: f64) -> String {
    format!("{:.2} %", 100.0 * x)
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
    // The quick recipe is another one, and records of two are never mixed.
    let by_default = if job.quick { "compare-quick-work" } else { "compare-work" };
    let work = job.work.clone().unwrap_or_else(|| by_default.into());
    let settings = Settings {
        lab: job.lab.clone(),
        work,
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
            message: format!("the records of `{}` make no report: {e}", settings.work.display()),
            causes: Vec::new(),
            hint: Some("remove the work folder, or name another with --work".into()),
        })
    };
    meta.checks = ::compare::claims::checks(&made(meta.clone())?, &outcome);
    let report = made(meta.clone())?;
    let summary = report.json().unwrap_or_default();
    let records_text = lines(&outcome.records);
    let distilled = serde_json::to_string_pretty(&outcome.distilled).unwrap_or_default() + "\n";
    let aligned = serde_json::to_string_pretty(&outcome.aligned).unwrap_or_default() + "\n";
    let claims = serde_json::to_string_pretty(&meta.checks).unwrap_or_default() + "\n";
    // Without a recipe a folder is nothing to go on from: it goes first and comes last.
    let [recipe, records, seeds] = ::compare::store::FILES;
    let _ = std::fs::remove_file(job.out.join(recipe));
    for (name, text) in
        PAGES.iter().zip([summary.clone(), report.html(), report.markdown(), claims, distilled, aligned])
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
