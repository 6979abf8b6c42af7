//! From inputs to a folder: opened, checked, written beside the output, published.
//!
//! Beside the weights lies `safegene.json`: method, options, the contents of all inputs, and the report. An output that
//! says the same is reported and left as it is. Contents are hashed by a read of their own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use checkpoint::{CheckpointError, FolderWriter};
use serde::{Deserialize, Serialize};
use stream::RECORD_FILE;

use crate::error::Result;
use crate::method::{Form, Inputs, Job, Method, Models, Outputs, Shot};
use crate::report::Report;

/// What `safegene.json` calls this kind of work.
const COMMAND: &str = "recover";

/// Recovers a target by a method.
pub fn recover(method: &dyn Method, inputs: &Inputs, job: &Job<'_>) -> Result<Report> {
    let start = Instant::now();
    let info = method.info();
    let models = Models::open(info, inputs)?;
    method.check(&models, job.form)?;
    let parts: Vec<(PathBuf, Form)> = match job.form {
        Form::Merged | Form::Adapter => vec![(job.out.to_path_buf(), job.form)],
        Form::Both => vec![(job.out.join("merged"), Form::Merged), (job.out.join("adapter"), Form::Adapter)],
    };
    if job.form == Form::Both {
        only_parts(job.out)?;
    }
    let exists = |out: &Path| out.symlink_metadata().is_ok();
    if let Some((out, _)) =
        parts.iter().find(|(out, form)| exists(out) && !job.force && !is_recovered(out, *form))
    {
        return Err(CheckpointError::OutputExists { out: out.clone() }.into());
    }
    let sources = sources(&models, job)?;
    let record = |form: Form, report: &Report| Record {
        schema: 1,
        tool: env!("CARGO_PKG_VERSION").to_owned(),
        command: COMMAND.to_owned(),
        form: name_of(form).to_owned(),
        sources: sources.clone(),
        report: report.clone(),
    };
    let mut report = Report {
        schema: 1,
        method: info.name.to_owned(),
        paper: info.paper.map(str::to_owned),
        options: method.options(),
        ..Report::default()
    };
    let outputs: Vec<PathBuf> = parts.iter().map(|(out, _)| out.clone()).collect();
    if !job.force && parts.iter().any(|(out, _)| exists(out)) {
        let mut found = None;
        for (out, form) in &parts {
            found = record(*form, &report).finished(out);
            if found.is_none() {
                return Err(CheckpointError::OutputExists { out: out.clone() }.into());
            }
        }
        if let Some(found) = found {
            return Ok(Report { outputs, already: true, wall_s: start.elapsed().as_secs_f64(), ..found });
        }
    }
    let mut writers = Outputs::default();
    for (out, form) in &parts {
        let writer = FolderWriter::create(out, job.force)?;
        match form {
            Form::Adapter => writers.adapter = Some(writer),
            _ => writers.merged = Some(writer),
        }
    }
    let outcome = method.write(&models, &writers, job)?;
    job.check_stop()?;
    report.tensors = outcome.tensors;
    report.modules = outcome.modules;
    report.modules.sort_by(|a, b| a.name.cmp(&b.name));
    report.elements_changed = report.modules.iter().map(|module| module.elements_changed).sum();
    report.change_norm = report.modules.iter().map(|module| module.change_norm.powi(2)).sum::<f64>().sqrt();
    report.changed_nothing = !report.modules.iter().any(|module| module.changed);
    report.measured = outcome.measured;
    report.notes = outcome.notes;
    report.code = outcome.code;
    for (form, writer) in [(Form::Merged, writers.merged), (Form::Adapter, writers.adapter)] {
        let Some(writer) = writer else { continue };
        let mut text = serde_json::to_vec_pretty(&record(form, &report)).unwrap_or_default();
        text.push(b'\n');
        writer.file(RECORD_FILE, &text)?;
        writer.publish()?;
    }
    report.outputs = outputs;
    report.wall_s = start.elapsed().as_secs_f64();
    Ok(report)
}

/// `safegene.json` of a recovered folder.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    schema: u32,
    tool: String,
    command: String,
    form: String,
    sources: BTreeMap<String, String>,
    report: Report,
}

impl Record {
    /// The report of an output that is there already and was made from the same.
    fn finished(&self, out: &Path) -> Option<Report> {
        // A record that cannot be read is somebody else's.
        let found: Record = checkpoint::read_json(out, RECORD_FILE).ok().flatten()?;
        let same = (found.schema, &found.command, &found.form, &found.sources)
            == (self.schema, &self.command, &self.form, &self.sources)
            && found.report.method == self.report.method
            && found.report.options == self.report.options;
        same.then_some(found.report)
    }
}

/// Refuses to put two outputs into a folder that holds something else.
fn only_parts(out: &Path) -> Result<()> {
    let Ok(entries) = std::fs::read_dir(out) else { return Ok(()) };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if !["merged", "adapter", "merged.partial", "adapter.partial"].iter().any(|part| name == *part) {
            return Err(CheckpointError::OutputExists { out: out.to_path_buf() }.into());
        }
    }
    Ok(())
}

/// Whether a folder has a record of a recovery at all: a look that costs nothing, before contents are hashed.
fn is_recovered(out: &Path, form: Form) -> bool {
    let found: Option<Record> = checkpoint::read_json(out, RECORD_FILE).ok().flatten();
    found.is_some_and(|found| found.command == COMMAND && found.form == name_of(form))
}

fn name_of(form: Form) -> &'static str {
    match form {
        Form::Merged => "merged",
        Form::Adapter => "adapter",
        Form::Both => "both",
    }
}

/// The contents of all that a method was given.
fn sources(models: &Models, job: &Job<'_>) -> Result<BTreeMap<String, String>> {
    job.progress.stage("hashing", 0);
    let mut sources = BTreeMap::new();
    for (name, side) in models.sides() {
        job.check_stop()?;
        sources.insert(name.to_owned(), side.checkpoint().content()?);
    }
    let shots = &models.shots;
    for (name, rows) in [("safety", &shots.safety), ("task", &shots.task), ("benign", &shots.benign)] {
        if !rows.is_empty() {
            sources.insert(format!("{name}-shots"), content_of_shots(rows));
        }
    }
    Ok(sources)
}

/// The blake3 of the rows as lines of JSON.
fn content_of_shots(rows: &[Shot]) -> String {
    let mut hash = blake3::Hasher::new();
    for row in rows {
        hash.update(serde_json::to_string(row).unwrap_or_default().as_bytes());
        hash.update(b"\n");
    }
    format!("blake3:{}", hash.finalize().to_hex())
}
