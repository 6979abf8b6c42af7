//! Two checkpoints in, a gene out.
//!
//! Every tensor of both ends in exactly one class: linear modules of the layers become factors with a certificate, what
//! is left of a layer and what lies outside is kept exactly, an embedding or head of which some rows are equal as the
//! rows that are not, and a computed buffer that changed is left out and named. Totals are sums over all of them.
//!
//! Not here: the choice of a rank, and the gene's files.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use checkpoint::{Checkpoint, Factors, Role, module_of};
use gene::{Class, Family, Gene, GeneManifest, GeneWriter, ManifestParts, Module, Source, Sources};
use kernels::{DeltaStats, Engine, KernelError, Shape};
use lowrank::{Certificate, Factor, LowRank, LowRankError};
use serde_json::{Map, Value, json};
use xxhash_rust::xxh64::xxh64;

use crate::difference::{Difference, Sides, terms};
use crate::pairing::{Pair, pairs, unsupported};
use crate::{Progress, Result, StreamError};

/// What to extract.
#[derive(Debug)]
pub struct Extract {
    /// The checkpoint that still refuses.
    pub aligned: Checkpoint,
    /// The checkpoint that lost its safety.
    pub degraded: Checkpoint,
    /// The rank of every linear module's factors.
    pub rank: usize,
    /// Where the gene goes.
    pub out: PathBuf,
    /// Whether an output that exists may be replaced.
    pub force: bool,
    /// The seed of the sketches.
    pub seed: u64,
}

/// What was extracted. Shares are of `energy`.
#[derive(Debug, Clone)]
pub struct ExtractReport {
    /// The output was there already, made from the same inputs and options.
    pub already: bool,
    /// The squared norm of the whole difference.
    pub energy: f64,
    /// The share that the gene holds.
    pub captured: f64,
    /// The share that no gene of this rank can exceed.
    pub captured_upper_bound: f64,
    /// The share that rounding the degraded weights explains.
    pub noise_floor: f64,
    /// How many tensors are of each class.
    pub classes: BTreeMap<Class, u64>,
    /// The linear modules.
    pub modules: Vec<Module>,
    /// How long it took.
    pub wall_s: f64,
    /// Bytes of weights on both sides.
    pub input_bytes: u64,
}

/// Extracts the gene of a pair of checkpoints.
pub fn extract<E: Engine>(engine: &E, job: &Extract, progress: &dyn Progress) -> Result<ExtractReport> {
    let start = Instant::now();
    let pairs = pairs(&job.aligned, &job.degraded)?;
    let input_bytes = pairs.iter().map(Pair::bytes).sum();
    let how = Factor::new(job.rank, job.seed);
    let options = options(&how);
    if let Some(mut report) = finished(job, &options, input_bytes)? {
        report.wall_s = start.elapsed().as_secs_f64();
        return Ok(report);
    }
    let writer = GeneWriter::create(&job.out, job.force)?;
    progress.stage("extracting", input_bytes);
    let sides = Sides::new(&job.aligned, &job.degraded)?;
    let mut run = Run { engine, sides, how, writer, totals: Totals::default(), common_rows: Map::new() };
    for pair in &pairs {
        run.tensor(pair)?;
        progress.advance(pair.bytes(), &pair.name);
    }
    let Run { writer, totals, common_rows, .. } = run;
    if !totals.differs {
        return Err(StreamError::NothingDiffers {
            aligned: job.aligned.dir().to_path_buf(),
            degraded: job.degraded.dir().to_path_buf(),
        });
    }
    let mut extra = Map::new();
    if !common_rows.is_empty() {
        extra.insert(COMMON_ROWS.to_owned(), Value::Object(common_rows));
    }
    let manifest = writer.finish(ManifestParts {
        family: Family {
            model_type: job.aligned.config().model_type.clone(),
            fingerprint: gene::fingerprint_of(&job.aligned),
            extra: Map::new(),
        },
        tool: env!("CARGO_PKG_VERSION").to_owned(),
        options,
        sources: Sources {
            aligned: source(&job.aligned)?,
            degraded: source(&job.degraded)?,
            extra: Map::new(),
        },
        energy: totals.energy,
        captured: totals.share(totals.energy - totals.missed),
        captured_upper_bound: totals.share(totals.best),
        noise_floor: totals.share(totals.noise),
        extra,
    })?;
    Ok(report(&manifest, false, start.elapsed().as_secs_f64(), input_bytes))
}

/// Key of the manifest for row patches of tensors whose row counts differ: how many rows both sides have. Rows beyond
/// are whole, not differences.
pub(crate) const COMMON_ROWS: &str = "common_rows";

/// Sums over all tensors, in squared norms.
#[derive(Default)]
struct Totals {
    energy: f64,
    missed: f64,
    best: f64,
    noise: f64,
    differs: bool,
}

impl Totals {
    /// A tensor of `energy`, with its shares.
    fn add(&mut self, energy: f64, missed: f64, best: f64, noise: f64) {
        self.energy += energy;
        self.missed += missed * energy;
        self.best += best * energy;
        self.noise += noise * energy;
        self.differs = true;
    }

    fn share(&self, part: f64) -> f64 {
        // Nothing but buffers of no number format, or whole rows of zeros, has no energy: all of nothing is held.
        if self.energy > 0.0 { (part / self.energy).clamp(0.0, 1.0) } else { 1.0 }
    }
}

struct Run<'a, E: Engine> {
    engine: &'a E,
    sides: Sides<'a>,
    how: Factor,
    writer: GeneWriter,
    totals: Totals,
    common_rows: Map<String, Value>,
}

impl<E: Engine> Run<'_, E> {
    /// Puts one tensor into its class.
    fn tensor(&mut self, pair: &Pair) -> Result<()> {
        let (name, layer, shape) = (&pair.name, pair.role.layer(), &pair.aligned.shape);
        match self.sides.difference(self.engine, pair)? {
            Difference::Nothing => Ok(self.writer.class_only(name, layer, shape, Class::Unchanged, 0.0)?),
            Difference::Opaque => self.left_out(pair, 0.0),
            Difference::Products(products) => self.products(pair, &products),
            Difference::Dense(delta, stats) => match pair.role {
                // A difference too small for f32 has nothing to factor.
                Role::Buffer => self.left_out(pair, stats.sumsq),
                _ if stats.sumsq == 0.0 && pair.same_rows() => self.left_out(pair, 0.0),
                Role::Linear { .. } => self.factored(pair, &delta, &stats),
                Role::Embedding | Role::Head if shape.len() == 2 => self.rows(pair, &delta, &stats),
                _ => self.full(pair, &self.engine.read(&delta).map_err(|e| at(pair, e))?, &stats),
            },
        }
    }

    fn left_out(&mut self, pair: &Pair, energy: f64) -> Result<()> {
        self.totals.add(energy, 1.0, 0.0, 0.0);
        let (name, layer, shape) = (&pair.name, pair.role.layer(), &pair.aligned.shape);
        Ok(self.writer.class_only(name, layer, shape, Class::LeftOut, energy)?)
    }

    fn full(&mut self, pair: &Pair, delta: &[f32], stats: &DeltaStats) -> Result<()> {
        self.totals.add(stats.sumsq, 0.0, 1.0, noise_share(stats));
        Ok(self.writer.full(&pair.name, pair.role.layer(), &pair.aligned.shape, delta)?)
    }

    fn factored(&mut self, pair: &Pair, delta: &E::Matrix, stats: &DeltaStats) -> Result<()> {
        let key = xxh64(pair.name.as_bytes(), 0);
        let low_rank = lowrank::factor(self.engine, delta, stats.sumsq, key, &self.how)
            .map_err(|source| located(pair, source))?;
        let certificate =
            lowrank::certify(self.engine, delta, stats, &low_rank).map_err(|source| located(pair, source))?;
        self.keep(pair, &low_rank, &certificate)
    }

    fn products(&mut self, pair: &Pair, products: &[Factors]) -> Result<()> {
        let terms = terms(products);
        let low_rank =
            lowrank::factor_factors(&terms, self.how.rank).map_err(|source| located(pair, source))?;
        if low_rank.rank == 0 {
            // Adapters that add nothing, or the same.
            let (name, layer, shape) = (&pair.name, pair.role.layer(), &pair.aligned.shape);
            return Ok(self.writer.class_only(name, layer, shape, Class::Unchanged, 0.0)?);
        }
        let certificate =
            lowrank::certify_factors(&terms, &low_rank).map_err(|source| located(pair, source))?;
        self.keep(pair, &low_rank, &certificate)
    }

    fn keep(&mut self, pair: &Pair, low_rank: &LowRank, certificate: &Certificate) -> Result<()> {
        let Certificate { energy, residual, captured_upper_bound, noise_floor, zero_fraction } = *certificate;
        self.totals.add(energy, residual, captured_upper_bound, noise_floor);
        let (Role::Linear { layer }, Some(name)) = (pair.role, module_of(&pair.name)) else {
            return Err(unsupported(&pair.aligned));
        };
        let mut extra = Map::new();
        extra.insert("captured_upper_bound".to_owned(), json!(captured_upper_bound));
        extra.insert("zero_fraction".to_owned(), json!(zero_fraction));
        let module = Module {
            name: name.to_owned(),
            layer,
            shape: [pair.aligned.shape[0], pair.aligned.shape[1]],
            class: Class::LowRank,
            rank: low_rank.rank,
            energy,
            residual,
            noise_floor,
            extra,
        };
        Ok(self.writer.low_rank(module, &low_rank.b, &low_rank.a)?)
    }

    /// An embedding or head: the rows that changed, unless all did.
    fn rows(&mut self, pair: &Pair, delta: &E::Matrix, stats: &DeltaStats) -> Result<()> {
        let Shape { rows: common, cols } = self.engine.shape(delta);
        let dense = self.engine.read(delta).map_err(|source| at(pair, source))?;
        let changed: Vec<usize> =
            (0..common).filter(|&row| dense[row * cols..][..cols].iter().any(|&x| x != 0.0)).collect();
        if changed.len() == common && pair.same_rows() {
            return self.full(pair, &dense, stats);
        }
        let mut rows: Vec<u64> = changed.iter().map(|&row| row as u64).collect();
        let mut values: Vec<f32> =
            changed.iter().flat_map(|&row| dense[row * cols..][..cols].iter().copied()).collect();
        let new_rows = self.sides.new_rows(pair)?;
        let new_energy: f64 = new_rows.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        rows.extend((common..common + new_rows.len() / cols.max(1)).map(|row| row as u64));
        values.extend(new_rows);
        if rows.is_empty() {
            // Only rows that the aligned side does not have: nothing to keep, but not the same either.
            return self.left_out(pair, 0.0);
        }
        if !pair.same_rows() {
            self.common_rows.insert(pair.name.clone(), json!(common));
        }
        let energy = stats.sumsq + new_energy;
        let noise = if energy > 0.0 { noise_share(stats) * stats.sumsq / energy } else { 0.0 };
        self.totals.add(energy, 0.0, 1.0, noise);
        let shape = [pair.aligned.shape[0], pair.aligned.shape[1]];
        Ok(self.writer.row_patch(&pair.name, None, shape, &rows, &values)?)
    }
}

fn noise_share(stats: &DeltaStats) -> f64 {
    if stats.sumsq > 0.0 { (stats.ulp_sumsq / 12.0 / stats.sumsq).min(1.0) } else { 0.0 }
}

fn at(pair: &Pair, source: KernelError) -> StreamError {
    StreamError::kernel(&pair.name, &pair.aligned.file, source)
}

fn located(pair: &Pair, source: LowRankError) -> StreamError {
    StreamError::LowRank { tensor: pair.name.clone(), source }
}

fn options(how: &Factor) -> Map<String, Value> {
    let Factor { rank, oversample, sweeps, kept, seed } = *how;
    [("rank", rank), ("oversample", oversample), ("sweeps", sweeps), ("kept", kept)]
        .map(|(key, value)| (key.to_owned(), json!(value)))
        .into_iter()
        .chain([("seed".to_owned(), json!(seed))])
        .collect()
}

fn source(side: &Checkpoint) -> Result<Source> {
    let dir = side.dir();
    let name = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
    let name = name.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(Source { name, revision: None, content: side.content()?, extra: Map::new() })
}

/// The report of an output that is there already, if it is a gene of the same contents and options.
fn finished(job: &Extract, options: &Map<String, Value>, input_bytes: u64) -> Result<Option<ExtractReport>> {
    if job.force || job.out.symlink_metadata().is_err() {
        return Ok(None);
    }
    // Whatever else is there is an output that exists, which the writer refuses or replaces.
    let Ok(gene) = Gene::open(&job.out) else { return Ok(None) };
    let manifest = gene.manifest();
    let same = manifest.options == *options
        && manifest.sources.aligned.content == job.aligned.content()?
        && manifest.sources.degraded.content == job.degraded.content()?;
    Ok(same.then(|| report(manifest, true, 0.0, input_bytes)))
}

fn report(manifest: &GeneManifest, already: bool, wall_s: f64, input_bytes: u64) -> ExtractReport {
    ExtractReport {
        already,
        energy: manifest.energy,
        captured: manifest.captured,
        captured_upper_bound: manifest.captured_upper_bound,
        noise_floor: manifest.noise_floor,
        classes: manifest.classes.clone(),
        modules: manifest.modules.clone(),
        wall_s,
        input_bytes,
    }
}
