//! A gene into a target: a merged model folder, a PEFT adapter, or both.
//!
//! Everything of a layer, its factors and its rest, is multiplied by the layer's coefficient; what belongs to no layer is
//! added only on request. Beside the output lies `safegene.json`, which says what it was made from; an output that says
//! the same is reported and left as it is.
//!
//! Not here: choosing coefficients, and profiles for other loaders.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use checkpoint::{Checkpoint, CheckpointError, FolderWriter};
use gene::{Class, Gene, GeneError, RestDelta, RestEntry};
use kernels::Engine;
use serde::{Deserialize, Serialize};

use crate::extract::COMMON_ROWS;
use crate::flow::{Limits, Stages};
use crate::merge::{Addition, Plan, merge};
use crate::{Progress, Result, StreamError};

/// Name of the record of what an output was made from.
pub const RECORD_FILE: &str = "safegene.json";

/// What a fuse writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A model folder.
    Merged,
    /// A PEFT adapter over the target, or over the target's base where the target is an adapter.
    Adapter,
    /// A folder with `merged` and `adapter` in it.
    Both,
}

/// What to fuse.
#[derive(Debug)]
pub struct Fuse {
    /// The gene.
    pub gene: Gene,
    /// The coefficient of each layer; a layer that is not named has 0.
    pub coefficients: BTreeMap<u32, f64>,
    /// The model that it is added to.
    pub target: Checkpoint,
    /// Where the result goes.
    pub out: PathBuf,
    /// What is written.
    pub form: Form,
    /// The coefficient of what belongs to no layer, if that is to be added at all.
    pub outside: Option<f32>,
    /// Whether to leave out what is no linear module, which an adapter cannot hold, in every form.
    pub drop_rest: bool,
    /// Whether an output that exists may be replaced.
    pub force: bool,
    /// Bytes of weights and work under way.
    pub memory_bytes: u64,
    /// Set to stop after what is under way.
    pub stop: Arc<AtomicBool>,
}

/// What was fused.
#[derive(Debug, Clone, Default)]
pub struct FuseReport {
    /// Every output was there already, made from the same inputs.
    pub already: bool,
    /// The folders.
    pub outputs: Vec<PathBuf>,
    /// Merged: tensors of which an element changed.
    pub tensors_changed: u64,
    /// Merged: elements that changed.
    pub elements_changed: u64,
    /// Merged: the squared norm of what was to be added (a target adapter's share included).
    pub intended_sumsq: f64,
    /// Merged: the squared norm of what was added once rounded.
    pub realised_sumsq: f64,
    /// Adapter: modules that it holds.
    pub adapter_modules: u64,
    /// Tensors of the gene that were left out by `drop_rest`.
    pub dropped: Vec<String>,
    /// Rows that the gene holds whole because the degraded side lacked them; they are never added.
    pub rows_not_added: u64,
    /// Merged: what the stages did.
    pub stages: Stages,
    /// How long it took.
    pub wall_s: f64,
}

/// Adds a gene to a target.
pub fn fuse<E: Engine>(engine: &E, job: &Fuse, progress: &dyn Progress) -> Result<FuseReport> {
    let start = Instant::now();
    let plan = GenePlan::new(job)?;
    let parts = match job.form {
        Form::Merged => vec![(job.out.clone(), "merged")],
        Form::Adapter => vec![(job.out.clone(), "adapter")],
        Form::Both => vec![(job.out.join("merged"), "merged"), (job.out.join("adapter"), "adapter")],
    };
    if parts.iter().any(|(_, form)| *form == "adapter") {
        plan.check_adapter(job)?;
    }
    let mut report = FuseReport {
        already: true,
        dropped: plan.dropped.clone(),
        rows_not_added: plan.rows_not_added,
        ..FuseReport::default()
    };
    if job.form == Form::Both {
        only_parts(&job.out)?;
    }
    // All that exists is looked at before anything is written.
    let mut work = Vec::new();
    for (out, form) in parts {
        // The target's content is known once it has been read; an output that is there is compared with it before.
        let compare = !job.force && out.symlink_metadata().is_ok();
        let mut record = Record::new(job, form);
        if compare || form == "adapter" {
            record.target = job.target.content()?;
        }
        let before = if compare { record.finished(&out) } else { None };
        let writer = if before.is_some() { None } else { Some(FolderWriter::create(&out, job.force)?) };
        work.push((out, record, before, writer));
    }
    for (out, mut record, before, writer) in work {
        if let Some(writer) = writer {
            report.already = false;
            record.result = match record.form.as_str() {
                "merged" => {
                    let (result, content) =
                        write_merged(engine, job, &plan, &writer, progress, &mut report.stages)?;
                    record.target = content;
                    result
                }
                _ => write_adapter(job, &writer, progress)?,
            };
            let mut text = serde_json::to_vec_pretty(&record).unwrap_or_default();
            text.push(b'\n');
            writer.file(RECORD_FILE, &text)?;
            writer.publish()?;
        }
        let result = before.unwrap_or(record.result);
        report.outputs.push(out);
        report.tensors_changed += result.tensors_changed;
        report.elements_changed += result.elements_changed;
        report.intended_sumsq += result.intended_sumsq;
        report.realised_sumsq += result.realised_sumsq;
        report.adapter_modules += result.adapter_modules;
    }
    report.wall_s = start.elapsed().as_secs_f64();
    Ok(report)
}

/// `safegene.json`: what an output was made from, and what came of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    schema: u32,
    tool: String,
    gene: String,
    target: String,
    form: String,
    coefficients: BTreeMap<u32, f64>,
    outside: Option<f32>,
    drop_rest: bool,
    result: Outcome,
}

impl Record {
    /// Of a job, before its result and the target's content are known.
    fn new(job: &Fuse, form: &str) -> Record {
        Record {
            schema: 1,
            tool: env!("CARGO_PKG_VERSION").to_owned(),
            gene: job.gene.content().to_owned(),
            target: String::new(),
            form: form.to_owned(),
            coefficients: job.coefficients.clone(),
            outside: job.outside,
            drop_rest: job.drop_rest,
            result: Outcome::default(),
        }
    }

    /// What came of an output that is there already and was made from the same.
    fn finished(&self, out: &Path) -> Option<Outcome> {
        // A record that cannot be read is somebody else's: the writer refuses or replaces the folder.
        let found: Record = checkpoint::read_json(out, RECORD_FILE).ok().flatten()?;
        let same = (found.schema, &found.gene, &found.target, &found.form)
            == (self.schema, &self.gene, &self.target, &self.form)
            && found.coefficients == self.coefficients
            && found.outside == self.outside
            && found.drop_rest == self.drop_rest;
        same.then_some(found.result)
    }
}

/// What came of it.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Outcome {
    tensors_changed: u64,
    elements_changed: u64,
    intended_sumsq: f64,
    realised_sumsq: f64,
    adapter_modules: u64,
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

fn write_merged<E: Engine>(
    engine: &E,
    job: &Fuse,
    plan: &GenePlan<'_>,
    writer: &FolderWriter,
    progress: &dyn Progress,
    stages: &mut Stages,
) -> Result<(Outcome, String)> {
    let limits = Limits { memory_bytes: job.memory_bytes, readers: 1, stop: &job.stop };
    let (merged, found, digests) = merge(engine, &job.target, plan, writer, &limits, progress)?;
    *stages = found;
    if merged.elements_changed == 0 && !plan.all_zero {
        return Err(nothing_changed(job));
    }
    writer.copy_support_files(job.target.base_dir())?;
    let outcome = Outcome {
        tensors_changed: merged.tensors_changed,
        elements_changed: merged.elements_changed,
        intended_sumsq: merged.intended_sumsq,
        realised_sumsq: merged.realised_sumsq,
        adapter_modules: 0,
    };
    Ok((outcome, job.target.content_from(&digests)?))
}

fn write_adapter(job: &Fuse, writer: &FolderWriter, progress: &dyn Progress) -> Result<Outcome> {
    progress.stage("writing the adapter", 0);
    let report = gene::adapter_into(writer, &job.gene, &job.coefficients, &job.target)?;
    Ok(Outcome { adapter_modules: report.modules as u64, ..Outcome::default() })
}

fn nothing_changed(job: &Fuse) -> StreamError {
    StreamError::NothingChanged { target: job.target.dir().to_path_buf() }
}

/// What a gene with its coefficients adds to each tensor of the target.
struct GenePlan<'a> {
    gene: &'a Gene,
    target: &'a Checkpoint,
    /// Modules by the name of their weight.
    modules: BTreeMap<String, (&'a str, f32)>,
    rest: BTreeMap<&'a str, (&'a RestEntry, f32)>,
    dropped: Vec<String>,
    rows_not_added: u64,
    /// Whether every coefficient is 0, so that nothing is expected to change.
    all_zero: bool,
}

impl<'a> GenePlan<'a> {
    /// Holds the gene and its coefficients against the target's headers.
    fn new(job: &'a Fuse) -> Result<GenePlan<'a>> {
        let (gene, target) = (&job.gene, &job.target);
        gene::check_coefficients(&job.coefficients)?;
        if let Some(value) = job.outside.filter(|value| !value.is_finite() || *value < 0.0) {
            return Err(StreamError::OutsideCoefficient { value });
        }
        gene::check_family(gene, target)?;
        let layers = gene.layers();
        let unknown = job.coefficients.iter().find(|(layer, value)| **value > 0.0 && !layers.contains(layer));
        if let Some((&layer, _)) = unknown {
            return Err(GeneError::UnknownLayer { layer }.into());
        }
        let of = |layer: u32| job.coefficients.get(&layer).map_or(0.0, |&value| value as f32);
        let modules = gene
            .modules()
            .iter()
            .filter(|module| module.class == Class::LowRank && of(module.layer) > 0.0)
            .map(|module| (format!("{}.weight", module.name), (module.name.as_str(), of(module.layer))))
            .collect();
        let outside = job.outside.unwrap_or(0.0);
        let wanted = gene
            .rest()
            .iter()
            .map(|entry| (entry, entry.layer.map_or(outside, of)))
            .filter(|(entry, c)| entry.class != Class::LeftOut && *c > 0.0);
        let (mut rest, mut dropped, mut rows_not_added) = (BTreeMap::new(), Vec::new(), 0);
        for (entry, c) in wanted {
            if job.drop_rest {
                dropped.push(entry.name.clone());
                continue;
            }
            rows_not_added += check_entry(gene, entry, target)?;
            rest.insert(entry.name.as_str(), (entry, c));
        }
        let all_zero = outside == 0.0 && job.coefficients.values().all(|&value| value as f32 == 0.0);
        Ok(GenePlan { gene, target, modules, rest, dropped, rows_not_added, all_zero })
    }

    /// Refuses what an adapter cannot hold, and one that would add nothing.
    fn check_adapter(&self, job: &Fuse) -> Result<()> {
        if let Some(example) = self.rest.keys().next() {
            return Err(StreamError::RestInAdapter {
                count: self.rest.len(),
                example: (*example).to_owned(),
            });
        }
        if self.modules.is_empty() && !self.all_zero {
            return Err(nothing_changed(job));
        }
        Ok(())
    }
}

/// Rows that both sides of the extraction had, if they had different counts.
fn common_rows(gene: &Gene, tensor: &str) -> Option<u64> {
    gene.manifest().extra.get(COMMON_ROWS)?.get(tensor)?.as_u64()
}

/// Refuses an entry of the rest that the target has no place for; returns how many of its rows are never added.
fn check_entry(gene: &Gene, entry: &RestEntry, target: &Checkpoint) -> Result<u64> {
    let refuse = || StreamError::NoSuchTarget {
        tensor: entry.name.clone(),
        shape: entry.shape.clone(),
        target: target.dir().to_path_buf(),
    };
    let shape = &target.shards().get(&entry.name).ok_or_else(refuse)?.shape;
    match common_rows(gene, &entry.name) {
        None if *shape == entry.shape => Ok(0),
        // Only the rows that were compared are differences; the target has to have them.
        Some(common) if shape.len() == 2 && shape[1] == entry.shape[1] && shape[0] >= common => {
            Ok(entry.shape[0].saturating_sub(common))
        }
        _ => Err(refuse()),
    }
}

impl Plan for GenePlan<'_> {
    fn changes(&self, unit: &str) -> bool {
        self.modules.contains_key(unit) || self.rest.contains_key(unit)
    }

    fn addition(&self, tensor: &str) -> Result<Option<Addition>> {
        if let Some((module, c)) = self.modules.get(tensor) {
            return Ok(Some(Addition::Product(*c, self.gene.factors(module)?)));
        }
        let Some((entry, c)) = self.rest.get(tensor) else { return Ok(None) };
        let delta = match self.gene.rest_delta(tensor)? {
            RestDelta::Full(delta) => delta,
            RestDelta::Rows { rows, delta } => {
                let elements = self.target.shards().get(tensor).map_or(0, |info| info.elements()) as usize;
                let cols = entry.shape.get(1).map_or(0, |&cols| cols as usize);
                let limit = common_rows(self.gene, tensor).unwrap_or(u64::MAX);
                let mut dense = vec![0.0; elements];
                for (row, values) in rows.iter().zip(delta.chunks(cols.max(1))) {
                    if *row < limit {
                        dense[*row as usize * cols..][..cols].copy_from_slice(values);
                    }
                }
                dense
            }
        };
        Ok(Some(Addition::Dense(*c, delta)))
    }
}
