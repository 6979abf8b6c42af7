//! Genes into a target: a merged model folder, a PEFT adapter, or both.
//!
//! Everything of a layer, its factors and its rest, is multiplied by the layer's coefficient; what belongs to no layer is
//! added only on request. Several genes are added in their order, in one sum with one rounding. Beside the output lies
//! `safegene.json`, which says what it was made from; an output that says the same is reported and left as it is.
//!
//! Each finished tensor of a merged model goes to a journal, so that an interrupted run goes on where it stopped. A worker's
//! share is whole files, because two machines cannot safely write into one file; [`assemble`](crate::assemble) puts the
//! shares together.
//!
//! Not here: choosing coefficients, and profiles for other loaders.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use checkpoint::{Checkpoint, CheckpointError, FolderWriter, INDEX_FILE, PartialFolder};
use gene::{Class, Gene, GeneError, RestDelta, RestEntry};
use kernels::Engine;
use serde::{Deserialize, Serialize};

use crate::extract::{COMMON_ROWS, Input};
use crate::flow::{Limits, Stages};
use crate::merge::{Addition, Merged, OutFile, Plan, is_there, merge, out_files};
use crate::pairing::share_of;
use crate::parts::{self, Log, Placed, Segments, Worker};
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

/// A gene and how strongly each of its layers is added.
#[derive(Debug)]
pub struct Expressed {
    /// The gene.
    pub gene: Gene,
    /// The coefficient of each layer; a layer that is not named has 0.
    pub coefficients: BTreeMap<u32, f64>,
}

/// What to fuse.
#[derive(Debug)]
pub struct Fuse {
    /// What is added, in this order.
    pub genes: Vec<Expressed>,
    /// The model that it is added to.
    pub target: Checkpoint,
    /// The content of the target that coefficients were made for; another one is an error without `force`.
    pub target_content: Option<String>,
    /// Where the result goes.
    pub out: PathBuf,
    /// What is written.
    pub form: Form,
    /// The coefficient of what belongs to no layer, if that is to be added at all.
    pub outside: Option<f32>,
    /// Whether to leave out what is no linear module, which an adapter cannot hold, in every form.
    pub drop_rest: bool,
    /// Whether 8-bit weights may become bf16.
    pub dequantize: bool,
    /// Whether an output that exists may be replaced, and the target be another one.
    pub force: bool,
    /// Bytes of weights and work under way.
    pub memory_bytes: u64,
    /// Which share of the files; all of them makes the output, too.
    pub worker: Worker,
    /// Set to stop after what is under way.
    pub stop: Arc<AtomicBool>,
}

impl Fuse {
    /// One gene, merged, with 1 GiB of memory, into an output that must not exist.
    pub fn new(gene: Gene, coefficients: BTreeMap<u32, f64>, target: Checkpoint, out: &Path) -> Fuse {
        Fuse {
            genes: vec![Expressed { gene, coefficients }],
            target,
            target_content: None,
            out: out.to_path_buf(),
            form: Form::Merged,
            outside: None,
            drop_rest: false,
            dequantize: false,
            force: false,
            memory_bytes: 1 << 30,
            worker: Worker::ALL,
            stop: Arc::default(),
        }
    }
}

/// What was fused.
#[derive(Debug, Clone, Default)]
pub struct FuseReport {
    /// Every output was there already, made from the same inputs.
    pub already: bool,
    /// The output is not made yet: other workers' shares are missing.
    pub partial: bool,
    /// The target is not the one that the coefficients were made for.
    pub other_target: bool,
    /// Merged: tensors that an earlier run had finished.
    pub resumed: u64,
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
    /// Merged: code that the output brings along, which runs when it is loaded.
    pub code: Vec<String>,
    /// Adapter: modules that it holds.
    pub adapter_modules: u64,
    /// Tensors of the genes that were left out by `drop_rest`.
    pub dropped: Vec<String>,
    /// Rows that a gene holds whole because the degraded side lacked them; they are never added.
    pub rows_not_added: u64,
    /// Merged: what the stages did.
    pub stages: Stages,
    /// How long it took.
    pub wall_s: f64,
}

/// Adds genes to a target.
pub fn fuse<E: Engine>(engine: &E, job: &Fuse, progress: &dyn Progress) -> Result<FuseReport> {
    let start = Instant::now();
    let plan = GenePlan::new(job)?;
    let parts = match job.form {
        Form::Merged => vec![(job.out.clone(), "merged")],
        Form::Adapter => vec![(job.out.clone(), "adapter")],
        Form::Both => vec![(job.out.join("merged"), "merged"), (job.out.join("adapter"), "adapter")],
    };
    if job.worker.of > 1 && job.form != Form::Merged {
        return Err(StreamError::NoShares);
    }
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
            report.other_target = is_other(job, &record.target)?;
        }
        let before = if compare { record.finished(&out) } else { None };
        if before.is_none() && compare {
            return Err(CheckpointError::OutputExists { out }.into());
        }
        work.push((out, record, before));
    }
    // What the headers show to be wrong with a merge, too.
    let files = match job.form {
        Form::Adapter => Vec::new(),
        _ => out_files(&job.target, job.dequantize)?,
    };
    for (out, record, before) in work {
        let result = match before {
            Some(before) => before,
            None => {
                report.already = false;
                let made = match record.form.as_str() {
                    "merged" => write_merged(engine, job, &plan, &files, &out, progress, &mut report)?,
                    _ => Some(write_adapter(job, &out, record, progress)?),
                };
                let Some(made) = made else {
                    report.partial = true;
                    continue;
                };
                made
            }
        };
        report.outputs.push(out);
        report.add(&result);
    }
    report.wall_s = start.elapsed().as_secs_f64();
    Ok(report)
}

impl FuseReport {
    fn add(&mut self, result: &Outcome) {
        self.tensors_changed += result.tensors_changed;
        self.elements_changed += result.elements_changed;
        self.intended_sumsq += result.intended_sumsq;
        self.realised_sumsq += result.realised_sumsq;
        self.adapter_modules += result.adapter_modules;
    }
}

/// Whether the target is another one than the coefficients were made for, which is an error without `force`.
fn is_other(job: &Fuse, found: &str) -> Result<bool> {
    match &job.target_content {
        Some(wanted) if wanted != found && !job.force => {
            Err(GeneError::OtherTarget { expected: wanted.clone(), found: found.to_owned() }.into())
        }
        wanted => Ok(wanted.as_ref().is_some_and(|wanted| wanted != found)),
    }
}

/// `safegene.json`: what an output was made from, and what came of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    schema: u32,
    tool: String,
    genes: Vec<Given>,
    /// Contents of the genes that the target, or what it is an adapter over, held before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    before: Vec<String>,
    target: String,
    form: String,
    outside: Option<f32>,
    drop_rest: bool,
    #[serde(default)]
    dequantize: bool,
    result: Outcome,
}

/// A gene by its content, with its coefficients.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Given {
    gene: String,
    coefficients: BTreeMap<u32, f64>,
}

fn given(job: &Fuse) -> Vec<Given> {
    let one = |expressed: &Expressed| Given {
        gene: expressed.gene.content().to_owned(),
        coefficients: expressed.coefficients.clone(),
    };
    job.genes.iter().map(one).collect()
}

fn held_before(target: &Checkpoint) -> Vec<String> {
    let mut out = fused_genes(target.dir());
    if target.base_dir() != target.dir() {
        out.extend(fused_genes(target.base_dir()));
    }
    out.sort();
    out.dedup();
    out
}

impl Record {
    /// Of a job, before its result and the target's content are known.
    fn new(job: &Fuse, form: &str) -> Record {
        Record {
            schema: 1,
            tool: env!("CARGO_PKG_VERSION").to_owned(),
            genes: given(job),
            before: held_before(&job.target),
            target: String::new(),
            form: form.to_owned(),
            outside: job.outside,
            drop_rest: job.drop_rest,
            dequantize: job.dequantize,
            result: Outcome::default(),
        }
    }

    /// What came of an output that is there already and was made from the same.
    fn finished(&self, out: &Path) -> Option<Outcome> {
        // A record that cannot be read is somebody else's: the writer refuses or replaces the folder.
        let found: Record = checkpoint::read_json(out, RECORD_FILE).ok().flatten()?;
        let same = (found.schema, &found.genes, &found.target, &found.form)
            == (self.schema, &self.genes, &self.target, &self.form)
            && found.outside == self.outside
            && found.drop_rest == self.drop_rest
            && found.dequantize == self.dequantize;
        same.then_some(found.result)
    }

    fn write(&self, writer: &FolderWriter) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(self).unwrap_or_default();
        text.push(b'\n');
        Ok(writer.file(RECORD_FILE, &text)?)
    }
}

/// Contents of the genes that were fused into a folder, by what `fuse` wrote there; what went in before it is among them where
/// `fuse` wrote that, too. None where it wrote nothing.
pub fn fused_genes(folder: &Path) -> Vec<String> {
    // A record that cannot be read is somebody else's.
    let record: Option<Record> = checkpoint::read_json(folder, RECORD_FILE).ok().flatten();
    record.map_or_else(Vec::new, |r| r.genes.into_iter().map(|g| g.gene).chain(r.before).collect())
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

/// What a journal is about: all that a merged output depends on, so that nothing but its name is needed to finish it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Work {
    schema: u32,
    pub(crate) kind: String,
    target: Input,
    target_content: Option<String>,
    /// Absolute folders of the genes.
    genes: Vec<PathBuf>,
    given: Vec<Given>,
    outside: Option<f32>,
    drop_rest: bool,
    dequantize: bool,
}

impl Work {
    fn new(job: &Fuse) -> Result<Work> {
        let dir = |expressed: &Expressed| {
            let dir = expressed.gene.dir();
            dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf())
        };
        Ok(Work {
            schema: 1,
            kind: "fuse".to_owned(),
            target: Input::of(&job.target)?,
            target_content: job.target_content.clone(),
            genes: job.genes.iter().map(dir).collect(),
            given: given(job),
            outside: job.outside,
            drop_rest: job.drop_rest,
            dequantize: job.dequantize,
        })
    }

    /// The job that it came from, if its inputs are what they were.
    pub(crate) fn job(&self, out: &Path, memory_bytes: u64, force: bool) -> Result<Option<Fuse>> {
        let genes = self.genes.iter().zip(&self.given).map(|(dir, given)| {
            Ok(Expressed { gene: Gene::open(dir)?, coefficients: given.coefficients.clone() })
        });
        let base = (self.target.base != self.target.dir).then_some(self.target.base.as_path());
        let job = Fuse {
            genes: genes.collect::<Result<_>>()?,
            target: Checkpoint::open(&self.target.dir, base)?,
            target_content: self.target_content.clone(),
            out: out.to_path_buf(),
            form: Form::Merged,
            outside: self.outside,
            drop_rest: self.drop_rest,
            dequantize: self.dequantize,
            force,
            memory_bytes,
            worker: Worker::ALL,
            stop: Arc::default(),
        };
        Ok((Work::new(&job)? == *self).then_some(job))
    }
}

impl Placed for Merged {
    fn segments(&self) -> Segments {
        // Its values are in the output's own files.
        Vec::new()
    }
}

/// Finishes a merged output whose shares are all there.
pub(crate) fn assemble(job: &Fuse) -> Result<FuseReport> {
    let start = Instant::now();
    let files = out_files(&job.target, job.dequantize)?;
    let plan = GenePlan::new(job)?;
    let mut report = FuseReport { dropped: plan.dropped.clone(), ..FuseReport::default() };
    let result = finish(job, &plan, &files, &job.out, true, &mut report)?;
    report.add(&result);
    report.outputs.push(job.out.clone());
    report.wall_s = start.elapsed().as_secs_f64();
    Ok(report)
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

/// Writes a share of a merged output, and all the rest if the share is all; `None` if it is not.
fn write_merged<E: Engine>(
    engine: &E,
    job: &Fuse,
    plan: &GenePlan<'_>,
    files: &[OutFile<'_>],
    out: &Path,
    progress: &dyn Progress,
    report: &mut FuseReport,
) -> Result<Option<Outcome>> {
    let folder = PartialFolder::open(out, job.force)?;
    let dir = folder.work()?;
    folder.put_back(&files.iter().map(|file| file.name.clone()).collect::<Vec<_>>())?;
    let (mut log, found) = Log::open::<Work, Merged>(&dir, job.worker, &Work::new(job)?)?;
    let mine = share_of(files.iter().collect(), job.worker, |file| file.bytes());
    let done = there(&mine, &found, &dir)?;
    report.resumed = done.len() as u64;
    let limits = Limits::new(engine, job.memory_bytes, &job.stop);
    let merged = merge(engine, &job.target, &mine, &done, plan, &dir, &limits, progress, |merged| {
        log.finished(&merged)
    });
    if job.worker.of > 1 || merged.is_err() {
        // Lines that are there after a power cut may stand for bytes that are not; their hashes tell.
        log.sync()?;
    }
    report.stages = merged?;
    drop((log, folder));
    if job.worker.of > 1 {
        for file in mine {
            file.open(&dir)?.finish()?;
        }
        return Ok(None);
    }
    finish(job, plan, files, out, false, report).map(Some)
}

/// Which of the journal's tensors are in their files as it says.
fn there(files: &[&OutFile<'_>], found: &[Merged], dir: &Path) -> Result<BTreeSet<String>> {
    let mut done = BTreeSet::new();
    if found.is_empty() {
        return Ok(done);
    }
    let found: BTreeMap<&str, &Merged> =
        found.iter().map(|merged| (merged.tensor.as_str(), merged)).collect();
    for file in files {
        let placed = file.open(dir)?;
        for tensor in &file.tensors {
            let name = &tensor.info.name;
            if found.get(name.as_str()).is_some_and(|merged| is_there(&placed, merged)) {
                done.insert(name.clone());
            }
        }
    }
    Ok(done)
}

/// Makes the output of what the workers left, which is looked at again if `check`.
fn finish(
    job: &Fuse,
    plan: &GenePlan<'_>,
    files: &[OutFile<'_>],
    out: &Path,
    check: bool,
    report: &mut FuseReport,
) -> Result<Outcome> {
    let writer = FolderWriter::resume(out, job.force)?;
    writer.clear()?;
    let dir = writer.work()?;
    let all = match parts::read_all::<Work, Merged>(&dir)? {
        Some((work, all)) if work == Work::new(job)? => all.into_iter().map(|(merged, _)| merged).collect(),
        _ => Vec::new(),
    };
    let present = match check {
        true => there(&files.iter().collect::<Vec<_>>(), &all, &dir)?,
        false => all.iter().map(|merged| merged.tensor.clone()).collect(),
    };
    let names: Vec<&str> =
        files.iter().flat_map(|file| &file.tensors).map(|tensor| tensor.info.name.as_str()).collect();
    let missing: Vec<&&str> = names.iter().filter(|name| !present.contains(**name)).collect();
    if let Some(first) = missing.first() {
        let (missing, of) = (missing.len() as u64, names.len() as u64);
        return Err(StreamError::Incomplete { missing, of, example: (**first).to_owned() });
    }
    // In the order of the files, whoever did them in whatever order.
    let all: BTreeMap<&str, &Merged> = all.iter().map(|merged| (merged.tensor.as_str(), merged)).collect();
    let mut outcome = Outcome::default();
    let mut digests = BTreeMap::new();
    for merged in names.iter().filter_map(|name| all.get(name)) {
        outcome.tensors_changed += u64::from(merged.elements_changed > 0);
        outcome.elements_changed += merged.elements_changed;
        outcome.intended_sumsq += merged.intended_sumsq;
        outcome.realised_sumsq += merged.realised_sumsq;
        if let Ok(digest) = u128::from_str_radix(&merged.digest, 16) {
            digests.insert(merged.tensor.clone(), digest);
        }
    }
    if outcome.elements_changed == 0 && !plan.all_zero {
        writer.discard();
        return Err(nothing_changed(job));
    }
    let content = job.target.content_from(&digests)?;
    match is_other(job, &content) {
        Ok(other) => report.other_target = other,
        Err(error) => {
            writer.discard();
            return Err(error);
        }
    }
    for file in files {
        writer.take(&file.name)?;
    }
    let shards = job.target.shards();
    if let Some(mut index) = checkpoint::read_json::<serde_json::Value>(shards.dir(), INDEX_FILE)? {
        // The same files with the same tensors: the index stays true, unless scales went.
        if job.dequantize {
            reindex(&mut index, files);
        }
        let mut text = serde_json::to_vec_pretty(&index).unwrap_or_default();
        text.push(b'\n');
        writer.file(INDEX_FILE, &text)?;
    }
    if job.dequantize {
        let mut text = serde_json::to_vec_pretty(&job.target.config().plain()).unwrap_or_default();
        text.push(b'\n');
        writer.file("config.json", &text)?;
    }
    let copied = writer.copy_support_files(job.target.base_dir())?;
    report.code = copied.into_iter().filter(|name| name.ends_with(".py")).collect();
    Record { target: content, result: outcome, ..Record::new(job, "merged") }.write(&writer)?;
    writer.publish()?;
    Ok(outcome)
}

/// Leaves out of an index what the files do not hold any more.
fn reindex(index: &mut serde_json::Value, files: &[OutFile<'_>]) {
    let kept: BTreeSet<&str> =
        files.iter().flat_map(|file| &file.tensors).map(|tensor| tensor.info.name.as_str()).collect();
    if let Some(map) = index.get_mut("weight_map").and_then(serde_json::Value::as_object_mut) {
        map.retain(|name, _| kept.contains(name.as_str()));
    }
    if let Some(metadata) = index.get_mut("metadata").and_then(serde_json::Value::as_object_mut) {
        metadata.insert("total_size".to_owned(), files.iter().map(OutFile::data_bytes).sum::<u64>().into());
        metadata.remove("total_parameters");
    }
}

fn write_adapter(job: &Fuse, out: &Path, record: Record, progress: &dyn Progress) -> Result<Outcome> {
    progress.stage("writing the adapter", 0);
    let writer = FolderWriter::create(out, job.force)?;
    let genes: Vec<_> = job.genes.iter().map(|one| (&one.gene, &one.coefficients)).collect();
    let report = gene::adapter_into(&writer, &genes, &job.target)?;
    let result = Outcome { adapter_modules: report.modules as u64, ..Outcome::default() };
    Record { result, ..record }.write(&writer)?;
    writer.publish()?;
    Ok(result)
}

fn nothing_changed(job: &Fuse) -> StreamError {
    StreamError::NothingChanged { target: job.target.dir().to_path_buf() }
}

/// What genes with their coefficients add to each tensor of the target.
struct GenePlan<'a> {
    target: &'a Checkpoint,
    /// Modules by the name of their weight, in the order of the genes.
    modules: BTreeMap<String, Vec<(&'a Gene, &'a str, f32)>>,
    rest: BTreeMap<&'a str, Vec<(&'a Gene, &'a RestEntry, f32)>>,
    dropped: Vec<String>,
    rows_not_added: u64,
    /// Whether every coefficient is 0, so that nothing is expected to change.
    all_zero: bool,
}

impl<'a> GenePlan<'a> {
    /// Holds the genes and their coefficients against the target's headers.
    fn new(job: &'a Fuse) -> Result<GenePlan<'a>> {
        let target = &job.target;
        if let Some(value) = job.outside.filter(|value| !value.is_finite() || *value < 0.0) {
            return Err(StreamError::OutsideCoefficient { value });
        }
        let outside = job.outside.unwrap_or(0.0);
        let mut plan = GenePlan {
            target,
            modules: BTreeMap::new(),
            rest: BTreeMap::new(),
            dropped: Vec::new(),
            rows_not_added: 0,
            all_zero: outside == 0.0,
        };
        for Expressed { gene, coefficients } in &job.genes {
            gene::check_coefficients(coefficients)?;
            gene::check_family(gene, target)?;
            let layers = gene.layers();
            let unknown = coefficients.iter().find(|(layer, value)| **value > 0.0 && !layers.contains(layer));
            if let Some((&layer, _)) = unknown {
                return Err(GeneError::UnknownLayer { layer }.into());
            }
            let of = |layer: u32| coefficients.get(&layer).map_or(0.0, |&value| value as f32);
            for module in gene.modules() {
                let c = of(module.layer);
                if module.class == Class::LowRank && c > 0.0 {
                    let name = format!("{}.weight", module.name);
                    plan.modules.entry(name).or_default().push((gene, &module.name, c));
                }
            }
            for entry in gene.rest() {
                let c = entry.layer.map_or(outside, of);
                if entry.class == Class::LeftOut || c <= 0.0 {
                    continue;
                }
                if job.drop_rest {
                    plan.dropped.push(entry.name.clone());
                    continue;
                }
                plan.rows_not_added += check_entry(gene, entry, target)?;
                plan.rest.entry(&entry.name).or_default().push((gene, entry, c));
            }
            plan.all_zero &= coefficients.values().all(|&value| value as f32 == 0.0);
        }
        Ok(plan)
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

    /// An entry of a gene's rest as a whole difference.
    fn dense(&self, gene: &Gene, entry: &RestEntry) -> Result<Vec<f32>> {
        Ok(match gene.rest_delta(&entry.name)? {
            RestDelta::Full(delta) => delta,
            RestDelta::Rows { rows, delta } => {
                let elements =
                    self.target.shards().get(&entry.name).map_or(0, |info| info.elements()) as usize;
                let cols = entry.shape.get(1).map_or(0, |&cols| cols as usize);
                let limit = common_rows(gene, &entry.name).unwrap_or(u64::MAX);
                let mut dense = vec![0.0; elements];
                for (row, values) in rows.iter().zip(delta.chunks(cols.max(1))) {
                    if *row < limit {
                        dense[*row as usize * cols..][..cols].copy_from_slice(values);
                    }
                }
                dense
            }
        })
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

    fn additions(&self, unit: &str) -> Result<Vec<Addition>> {
        let mut additions = Vec::new();
        for (gene, module, c) in self.modules.get(unit).into_iter().flatten() {
            additions.push(Addition::Product(*c, gene.factors(module)?));
        }
        for (gene, entry, c) in self.rest.get(unit).into_iter().flatten() {
            additions.push(Addition::Dense(*c, self.dense(gene, entry)?));
        }
        Ok(additions)
    }
}
