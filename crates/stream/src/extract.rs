//! Two checkpoints in, a gene out.
//!
//! Every tensor of both ends in exactly one class: linear modules of the layers become factors with a certificate, what
//! is left of a layer and what lies outside is kept exactly, an embedding or head of which some rows are equal as the
//! rows that are not, and a computed buffer, a module without rank or one that is asked not to be kept is left out and
//! named. Totals are sums over all of them, in the order of their names.
//!
//! Each finished tensor goes to a journal beside the output, so that an interrupted run goes on where it stopped and
//! several workers share the work; the gene is made (`make`) once all tensors are there.
//!
//! Not here: making the gene of what was found.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use checkpoint::{Checkpoint, CheckpointError, PartialFolder, Role, module_of};
use gene::{Class, Gene, GeneManifest, Module};
use kernels::{DeltaStats, Engine, Shape};
use lowrank::{Certificate, Factor, LowRank, LowRankError, Rank};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use xxhash_rust::xxh64::xxh64;

use crate::difference::{Blocks, Difference, Sides, Stored, block, located, pair_on, terms};
use crate::flow::{Limits, Stages, flow};
use crate::make::make_gene;
use crate::pairing::{Pair, float, in_file_order, pairs, share_of, unsupported};
use crate::parts::{self, Log, Placed, Segments, Worker};
use crate::pool::{Buffer, Pool, buffers_of};
use crate::{Progress, Result, StreamError};

/// Bytes of one side that are looked at together where a tensor is kept row by row: both stay in cache while they are
/// hashed and compared.
const BLOCK_BYTES: u64 = 4 << 20;

/// Which ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Ranks {
    /// The same for every module, or less where the difference has less.
    Fixed(usize),
    /// For each module the smallest that leaves at most this share of its squared norm, up to a largest one.
    Residual {
        /// The share.
        share: f64,
        /// The largest rank.
        max: usize,
    },
    /// For each module what stands above the noise of rounding, up to a largest one.
    Auto {
        /// The largest rank.
        max: usize,
    },
    /// Over all modules together those that leave least of the whole difference for this many bytes of factors.
    Budget {
        /// Bytes of f32 factors.
        bytes: u64,
        /// The largest rank.
        max: usize,
    },
}

impl Ranks {
    /// The largest rank of a module.
    pub fn max(self) -> usize {
        match self {
            Ranks::Fixed(rank) => rank,
            Ranks::Residual { max, .. } | Ranks::Auto { max } | Ranks::Budget { max, .. } => max,
        }
    }

    pub(crate) fn of_module(self) -> Rank {
        match self {
            Ranks::Fixed(rank) => Rank::Fixed(rank),
            Ranks::Residual { share, max } => Rank::Residual { share, max },
            Ranks::Auto { max } => Rank::Noise { max },
            Ranks::Budget { max, .. } => Rank::Fixed(max),
        }
    }
}

/// What to extract.
#[derive(Debug)]
pub struct Extract {
    /// The checkpoint that still refuses.
    pub aligned: Arc<Checkpoint>,
    /// The checkpoint that lost its safety.
    pub degraded: Arc<Checkpoint>,
    /// The ranks of the linear modules' factors.
    pub ranks: Ranks,
    /// Where the gene goes.
    pub out: PathBuf,
    /// Whether an output that exists may be replaced.
    pub force: bool,
    /// The seed of the sketches.
    pub seed: u64,
    /// Tensors that are not kept: a name, or a beginning of one that ends in `*`.
    pub leave_out: Vec<String>,
    /// Bytes of weights and work under way.
    pub memory_bytes: u64,
    /// Which share of the work; all of it makes the gene, too.
    pub worker: Worker,
    /// Set to stop after what is under way.
    pub stop: Arc<AtomicBool>,
}

impl Extract {
    /// All of the work, with seed 0 and 1 GiB of memory, into an output that must not exist.
    pub fn new(aligned: Checkpoint, degraded: Checkpoint, ranks: Ranks, out: &Path) -> Extract {
        Extract {
            aligned: Arc::new(aligned),
            degraded: Arc::new(degraded),
            ranks,
            out: out.to_path_buf(),
            force: false,
            seed: 0,
            leave_out: Vec::new(),
            memory_bytes: 1 << 30,
            worker: Worker::ALL,
            stop: Arc::default(),
        }
    }
}

/// What was extracted. Shares are of `energy`.
#[derive(Debug, Clone)]
pub struct ExtractReport {
    /// The output was there already, made from the same inputs and options.
    pub already: bool,
    /// The gene is not made yet: other workers' shares are missing.
    pub partial: bool,
    /// Tensors that an earlier run had finished.
    pub resumed: u64,
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
    /// What the stages did.
    pub stages: Stages,
    /// How long it took.
    pub wall_s: f64,
    /// Bytes of weights on both sides of the work done.
    pub input_bytes: u64,
}

/// What a journal is about: the same inputs and options. Paths are absolute.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Work {
    pub(crate) schema: u32,
    pub(crate) kind: String,
    pub(crate) aligned: Input,
    pub(crate) degraded: Input,
    pub(crate) options: Map<String, Value>,
}

/// A folder as it was found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Input {
    pub(crate) dir: PathBuf,
    pub(crate) base: PathBuf,
    /// Over the names, lengths and times of its weight files.
    stamp: String,
}

impl Input {
    pub(crate) fn of(side: &Checkpoint) -> Result<Input> {
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        let mut lines = String::new();
        let own = side.adapter().map(|adapter| adapter.shards().files()).unwrap_or_default();
        for path in side.shards().files().iter().chain(own) {
            let kind = std::fs::metadata(path).map_err(|source| CheckpointError::Io {
                action: "read",
                path: path.clone(),
                source,
            })?;
            let (s, ns) = (kind.mtime(), kind.mtime_nsec());
            lines += &format!("{} {} {s}.{ns:09}\n", path.display(), kind.len());
        }
        let stamp = format!("{:016x}", xxhash_rust::xxh3::xxh3_64(lines.as_bytes()));
        Ok(Input { dir: real(side.dir()), base: real(side.base_dir()), stamp })
    }
}

/// A finished tensor.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) tensor: String,
    pub(crate) class: Class,
    pub(crate) layer: Option<u32>,
    pub(crate) shape: Vec<u64>,
    pub(crate) rank: usize,
    pub(crate) energy: f64,
    /// Shares of the energy: missed, held at best, rounding; and of the elements: unchanged.
    pub(crate) residual: f64,
    pub(crate) best: f64,
    pub(crate) noise: f64,
    pub(crate) zeros: f64,
    /// For a choice among ranks.
    pub(crate) singular: Vec<f64>,
    pub(crate) outside: f64,
    pub(crate) b: Segments,
    pub(crate) a: Segments,
    pub(crate) values: Segments,
    pub(crate) rows: Segments,
    pub(crate) common_rows: Option<u64>,
    pub(crate) aligned_digest: Option<String>,
    pub(crate) degraded_digest: Option<String>,
}

impl Placed for Record {
    fn segments(&self) -> Segments {
        [&self.b, &self.a, &self.values, &self.rows].into_iter().flatten().copied().collect()
    }
}

/// Extracts the gene of a pair of checkpoints, or a worker's share of it.
pub fn extract<E: Engine>(engine: &E, job: &Extract, progress: &dyn Progress) -> Result<ExtractReport> {
    let start = Instant::now();
    let pairs = pairs(&job.aligned, &job.degraded)?;
    let share = share_of(in_file_order(pairs.iter().collect()), job.worker, |pair| pair.bytes());
    let input_bytes = share.iter().map(|pair| pair.bytes()).sum();
    let options = options(job);
    if let Some(mut report) = finished(job, &options, input_bytes)? {
        report.wall_s = start.elapsed().as_secs_f64();
        return Ok(report);
    }
    let work = Work {
        schema: 1,
        kind: "extract".to_owned(),
        aligned: Input::of(&job.aligned)?,
        degraded: Input::of(&job.degraded)?,
        options,
    };
    let folder = PartialFolder::open(&job.out, job.force)?;
    let (mut log, records) = Log::open::<Work, Record>(&folder.work()?, job.worker, &work)?;
    let known: BTreeSet<&str> = records.iter().map(|record| record.tensor.as_str()).collect();
    let resumed = share.iter().filter(|pair| known.contains(pair.name.as_str())).count() as u64;
    let todo: Vec<&Pair> = share.into_iter().filter(|pair| !known.contains(pair.name.as_str())).collect();
    progress.stage("extracting", todo.iter().map(|pair| pair.bytes()).sum());
    let buffers = buffers_of(engine);
    let pool = Pool::new(&buffers);
    let limits = Limits::new(engine, job.memory_bytes, &job.stop);
    let run = Run {
        engine,
        sides: Sides::new(&job.aligned, &job.degraded, &pool)?,
        arcs: [job.aligned.clone(), job.degraded.clone()],
        how: Factor::new(job.ranks.of_module(), job.seed),
        keep_singular: matches!(job.ranks, Ranks::Budget { .. }),
        held_bytes: limits.memory_bytes,
        job,
    };
    // Everything that computing needs of the log is behind `&`; the lines are written by the keeper alone.
    let values = log.share();
    let flowed = flow(
        &todo,
        &limits,
        |pair| run.needs(pair),
        |pair| run.read(pair),
        |pair, difference| run.tensor(pair, difference, &values),
        |pair, record| {
            log.finished(&record)?;
            progress.advance(pair.bytes(), &pair.name);
            Ok(())
        },
    );
    if job.worker.of > 1 || flowed.is_err() {
        // Else the gene itself follows, and what it was made of goes.
        log.sync()?;
    }
    let stages = flowed?;
    drop((log, values));
    drop(folder);
    let mut report = if job.worker.of == 1 {
        make_gene(engine, job, &work, &pairs)?
    } else {
        ExtractReport { partial: true, ..ExtractReport::nothing() }
    };
    (report.stages, report.resumed, report.input_bytes) = (stages, resumed, input_bytes);
    report.wall_s = start.elapsed().as_secs_f64();
    Ok(report)
}

impl ExtractReport {
    fn nothing() -> ExtractReport {
        ExtractReport {
            already: false,
            partial: false,
            resumed: 0,
            energy: 0.0,
            captured: 0.0,
            captured_upper_bound: 0.0,
            noise_floor: 0.0,
            classes: BTreeMap::new(),
            modules: Vec::new(),
            stages: Stages::default(),
            wall_s: 0.0,
            input_bytes: 0,
        }
    }
}

/// Keys of a module: the bound on what any factors of its rank hold, the share of elements that did not change, and
/// whether the noise floor is more than a bound.
pub(crate) const UPPER_BOUND: &str = "captured_upper_bound";
pub(crate) const ZERO_FRACTION: &str = "zero_fraction";
pub(crate) const NOISE_RELIABLE_KEY: &str = "noise_floor_reliable";

/// Key of the manifest for row patches of tensors whose row counts differ: how many rows both sides have. Rows beyond
/// are whole, not differences.
pub(crate) const COMMON_ROWS: &str = "common_rows";

/// What computing a tensor needs.
struct Run<'a, E: Engine> {
    engine: &'a E,
    sides: Sides<'a>,
    arcs: [Arc<Checkpoint>; 2],
    how: Factor,
    keep_singular: bool,
    /// Bytes of one tensor at most while both sides are in memory.
    held_bytes: u64,
    job: &'a Extract,
}

impl<E: Engine> Run<'_, E> {
    /// Whether a tensor becomes factors.
    fn factored(&self, pair: &Pair) -> bool {
        matches!(pair.role, Role::Linear { .. }) && float(pair.aligned.dtype).is_some()
    }

    fn in_place(&self, pair: &Pair) -> bool {
        self.factored(pair) && self.needs_held(pair) > self.held_bytes
    }

    /// Bytes while a tensor is under way with both sides in memory.
    fn needs_held(&self, pair: &Pair) -> u64 {
        pair.bytes().saturating_add(self.work_bytes(pair))
    }

    /// Bytes of the blocks of the factorisation.
    fn work_bytes(&self, pair: &Pair) -> u64 {
        let columns = match self.how.rank {
            Rank::Fixed(_) => self.how.blocks * self.how.width(),
            Rank::Residual { .. } | Rank::Noise { .. } => 96,
        } as u64;
        let sides: u64 = pair.aligned.shape.iter().sum();
        // Blocks of both sides, side by side, and again in f64 where they are multiplied.
        sides.saturating_mul(columns).saturating_mul(4 * 4)
    }

    fn needs(&self, pair: &Pair) -> u64 {
        match self.factored(pair) {
            true if self.in_place(pair) => self.work_bytes(pair),
            true => self.needs_held(pair),
            false => (6 * BLOCK_BYTES).min(6 * pair.bytes()),
        }
    }

    /// Reads what becomes factors; the rest is read block by block where it is computed.
    fn read(&self, pair: &Pair) -> Result<Option<Difference>> {
        if !self.factored(pair) {
            return Ok(None);
        }
        if self.in_place(pair)
            && let Some(difference) = self.sides.streamed(pair, &self.arcs)?
        {
            return Ok(Some(difference));
        }
        self.sides.read(pair).map(Some)
    }

    /// Puts one tensor into its class.
    fn tensor(&self, pair: &Pair, difference: Option<Difference>, values: &parts::Values) -> Result<Record> {
        let mut record = Record {
            tensor: pair.name.clone(),
            layer: pair.role.layer(),
            shape: pair.aligned.shape.clone(),
            ..Record::default()
        };
        match difference {
            None if float(pair.aligned.dtype).is_none() => self.opaque(pair, &mut record)?,
            None => self.rows(pair, &mut record, values)?,
            Some(Difference::Products(products, base)) => {
                base.check_finite(&pair.name)?;
                if !products.is_empty() {
                    self.products(pair, &products, &mut record, values)?;
                }
            }
            Some(Difference::Dense(sides)) => {
                let hex = |side: &Stored| side.digest.map(|digest| format!("{digest:032x}"));
                (record.aligned_digest, record.degraded_digest) = (hex(&sides[0]), hex(&sides[1]));
                if sides[0].same_as(&sides[1]) {
                    sides[0].check_finite(&pair.name)?;
                } else {
                    self.dense(pair, &sides, &mut record, values)?;
                }
            }
        }
        if record.class != Class::Unchanged && self.left_out(&pair.name) {
            let missed = Record { class: Class::LeftOut, residual: 1.0, rank: 0, ..record };
            record = Record {
                b: vec![],
                a: vec![],
                values: vec![],
                rows: vec![],
                common_rows: None,
                best: 0.0,
                ..missed
            };
        }
        Ok(record)
    }

    fn left_out(&self, name: &str) -> bool {
        self.job.leave_out.iter().any(|pattern| match pattern.strip_suffix('*') {
            Some(start) => name.starts_with(start),
            None => name == pattern || module_of(name) == Some(pattern),
        })
    }

    /// Formats that are no weights: equal, or a buffer.
    fn opaque(&self, pair: &Pair, record: &mut Record) -> Result<()> {
        let same = self.sides.aligned.read_base(&pair.aligned.tensor)?.1
            == self.sides.degraded.read_base(&pair.degraded.tensor)?.1;
        match (same, pair.role) {
            (true, _) => {}
            (false, Role::Buffer) => (record.class, record.residual) = (Class::LeftOut, 1.0),
            (false, _) => return Err(unsupported(self.sides.aligned, &pair.aligned)),
        }
        Ok(())
    }

    fn dense(
        &self,
        pair: &Pair,
        sides: &[Stored; 2],
        record: &mut Record,
        values: &parts::Values,
    ) -> Result<()> {
        let on = pair_on(self.engine, &pair.name, sides)?;
        let key = xxh64(pair.name.as_bytes(), 0);
        let at = |source| match source {
            LowRankError::Kernel(source) => located(&pair.name, sides, source),
            source => StreamError::LowRank { tensor: pair.name.clone(), source },
        };
        let (low_rank, stats) = lowrank::factor(self.engine, &on, key, &self.how).map_err(at)?;
        record.energy = stats.sumsq;
        match low_rank {
            None if stats.nonzero == 0 => {}
            Some(low_rank) if low_rank.rank > 0 => {
                let certificate = lowrank::certify(self.engine, &on, &stats, &low_rank).map_err(at)?;
                self.keep(&low_rank, &certificate, record, values)?;
            }
            // Too small for f32 to factor, or nothing that stands out of the noise.
            _ => {
                (record.class, record.residual) = (Class::LeftOut, 1.0);
                record.noise = noise_share(&stats);
            }
        }
        Ok(())
    }

    fn products(
        &self,
        pair: &Pair,
        products: &[checkpoint::Factors],
        record: &mut Record,
        values: &parts::Values,
    ) -> Result<()> {
        let terms = terms(products);
        let at = |source| StreamError::LowRank { tensor: pair.name.clone(), source };
        let low_rank = lowrank::factor_factors(&terms, self.how.rank).map_err(at)?;
        if low_rank.rank == 0 {
            // Adapters that add nothing, or the same.
            return Ok(());
        }
        let certificate = lowrank::certify_factors(&terms, &low_rank).map_err(at)?;
        self.keep(&low_rank, &certificate, record, values)
    }

    fn keep(
        &self,
        low_rank: &LowRank,
        certificate: &Certificate,
        record: &mut Record,
        values: &parts::Values,
    ) -> Result<()> {
        let Certificate { energy, residual, captured_upper_bound, noise_floor, zero_fraction } = *certificate;
        record.class = Class::LowRank;
        record.rank = low_rank.rank;
        (record.energy, record.residual, record.best) = (energy, residual, captured_upper_bound);
        (record.noise, record.zeros) = (noise_floor, zero_fraction);
        for (side, factor) in [("lora_B", &low_rank.b), ("lora_A", &low_rank.a)] {
            if let Some(index) = factor.iter().position(|x| !x.is_finite()) {
                let name = format!("{} of `{}`", side, record.tensor);
                return Err(gene::GeneError::NonFinite { name, index: index as u64 }.into());
            }
        }
        record.b = vec![values.write(bytemuck::cast_slice(&low_rank.b))?];
        record.a = vec![values.write(bytemuck::cast_slice(&low_rank.a))?];
        if self.keep_singular {
            record.singular = low_rank.singular.clone();
            record.outside = low_rank.outside_sumsq;
        }
        Ok(())
    }

    /// A tensor that is kept exactly: the rows that changed, or all. Read, and kept, block by block.
    fn rows(&self, pair: &Pair, record: &mut Record, values: &parts::Values) -> Result<()> {
        let (a_side, d_side) = (self.sides.aligned, self.sides.degraded);
        let (cols, a_rows, d_rows) = (pair.aligned.cols(), pair.aligned.rows(), pair.degraded.rows());
        let common = a_rows.min(d_rows);
        let by_row = matches!(pair.role, Role::Embedding | Role::Head) && pair.aligned.shape.len() == 2;
        // An adapter's sum of such a tensor (an embedding) is made as a whole.
        let whole: Vec<Option<Vec<f32>>> = [(a_side, &pair.aligned), (d_side, &pair.degraded)]
            .into_iter()
            .map(|(side, unit)| match crate::difference::adapted(side, unit) {
                true => side.read_f32(&unit.tensor).map(Some),
                false => Ok(None),
            })
            .collect::<checkpoint::Result<_>>()?;
        let widest = (cols * pair.aligned.dtype.bits().max(pair.degraded.dtype.bits()) / 8).max(1);
        let step = (BLOCK_BYTES / widest).max(1);
        let (mut a_blocks, mut d_blocks) = (
            Blocks::new(&self.sides, a_side, &pair.aligned),
            Blocks::new(&self.sides, d_side, &pair.degraded),
        );
        let mut rows: Vec<u64> = Vec::new();
        let mut total = DeltaStats::default();
        let mut new_energy = 0.0f64;
        let mut row = 0;
        while row < a_rows.max(d_rows) {
            let end = |rows: u64| (row + step).min(rows).max(row);
            let side =
                |side: &Checkpoint, unit, blocks: &mut Blocks<'_>, whole: &Option<Vec<f32>>, rows: u64| {
                    let count = end(rows).saturating_sub(row);
                    let bytes = if row < rows { blocks.next(row, count)? } else { Buffer::own(Vec::new()) };
                    let shape = Shape { rows: count as usize, cols: cols as usize };
                    match whole {
                        None => block(side, unit, bytes, shape),
                        Some(values) => {
                            let at = (row * cols) as usize..((row + count) * cols) as usize;
                            Stored::of_f32(&values[at], shape, side.dir())
                        }
                    }
                };
            let a = side(a_side, &pair.aligned, &mut a_blocks, &whole[0], a_rows)?;
            let d = side(d_side, &pair.degraded, &mut d_blocks, &whole[1], d_rows)?;
            let shared = end(common).saturating_sub(row) as usize;
            let sides = [a.first_rows(shared, cols as usize)?, d.first_rows(shared, cols as usize)?];
            if sides[0].same_as(&sides[1]) {
                sides[0].check_finite_from(&pair.name, row * cols)?;
                total.elements += shared as u64 * cols;
            } else if shared > 0 {
                let on = pair_on(self.engine, &pair.name, &sides)?;
                let found = self.engine.delta(&on);
                let (delta, stats) =
                    found.map_err(|source| moved(located(&pair.name, &sides, source), row * cols))?;
                let delta = self.engine.read(&delta).map_err(|source| located(&pair.name, &sides, source))?;
                self.keep_rows(&delta, row, cols, by_row, &mut rows, record, values)?;
                add(&mut total, &stats);
            }
            if end(a_rows) > row + shared as u64 {
                let from = row + shared as u64;
                let new = a.values_from(shared, cols as usize, &pair.name)?;
                new_energy += new.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
                rows.extend(from..end(a_rows));
                record.values.push(values.write(bytemuck::cast_slice(&new))?);
            }
            row += step;
        }
        let hex = |blocks: Blocks<'_>| blocks.digest().map(|digest| format!("{digest:032x}"));
        (record.aligned_digest, record.degraded_digest) = (hex(a_blocks), hex(d_blocks));
        record.energy = total.sumsq + new_energy;
        record.best = 1.0;
        record.noise =
            if record.energy > 0.0 { noise_share(&total) * total.sumsq / record.energy } else { 0.0 };
        let same_rows = pair.same_rows();
        if total.nonzero == 0 && same_rows {
            (record.class, record.best) = (Class::Unchanged, 0.0);
        } else if pair.role == Role::Buffer || rows.is_empty() || (total.sumsq == 0.0 && same_rows) {
            // Also rows that only the degraded side has: nothing to keep, but not the same either; and a difference
            // too small for f32.
            (record.class, record.residual, record.best) = (Class::LeftOut, 1.0, 0.0);
        } else if !by_row || (rows.len() as u64 == common && same_rows) {
            record.class = Class::Full;
        } else {
            record.class = Class::RowPatch;
            record.common_rows = (!same_rows).then_some(common);
            record.rows = vec![values.write(bytemuck::cast_slice(&rows))?];
        }
        if !matches!(record.class, Class::Full | Class::RowPatch) {
            record.values.clear();
        }
        Ok(())
    }

    /// Writes the rows of a block that changed, or all where rows do not matter.
    fn keep_rows(
        &self,
        delta: &[f32],
        first: u64,
        cols: u64,
        by_row: bool,
        rows: &mut Vec<u64>,
        record: &mut Record,
        values: &parts::Values,
    ) -> Result<()> {
        let cols = (cols as usize).max(1);
        let mut kept: Vec<f32> = Vec::new();
        for (at, line) in delta.chunks(cols).enumerate() {
            if !by_row || line.iter().any(|&x| x != 0.0) {
                rows.push(first + at as u64);
                kept.extend_from_slice(line);
            }
        }
        if !kept.is_empty() {
            record.values.push(values.write(bytemuck::cast_slice(&kept))?);
        }
        Ok(())
    }
}

/// An element's index in a block as one in its tensor.
fn moved(error: StreamError, by: u64) -> StreamError {
    match error {
        StreamError::NonFinite { tensor, file, index } => {
            StreamError::NonFinite { tensor, file, index: index + by }
        }
        error => error,
    }
}

fn add(total: &mut DeltaStats, part: &DeltaStats) {
    total.sumsq += part.sumsq;
    total.ulp_sumsq += part.ulp_sumsq;
    total.max_abs = total.max_abs.max(part.max_abs);
    total.nonzero += part.nonzero;
    total.elements += part.elements;
}

fn noise_share(stats: &DeltaStats) -> f64 {
    if stats.sumsq > 0.0 { (stats.ulp_sumsq / 12.0 / stats.sumsq).min(1.0) } else { 0.0 }
}

fn options(job: &Extract) -> Map<String, Value> {
    let Factor { oversample, blocks, seed, .. } = Factor::new(job.ranks.of_module(), job.seed);
    let mut options = Map::new();
    let mut put = |key: &str, value: Value| options.insert(key.to_owned(), value);
    match job.ranks {
        Ranks::Fixed(rank) => drop(put("rank", json!(rank))),
        Ranks::Residual { share, max } => {
            put("max_residual", json!(share));
            put("rank_max", json!(max));
        }
        Ranks::Auto { max } => {
            put("rank", json!("auto"));
            put("rank_max", json!(max));
        }
        Ranks::Budget { bytes, max } => {
            put("budget_bytes", json!(bytes));
            put("rank_max", json!(max));
        }
    }
    put("oversample", json!(oversample));
    put("blocks", json!(blocks));
    put("seed", json!(seed));
    if !job.leave_out.is_empty() {
        put("leave_out", json!(job.leave_out));
    }
    options
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
    Ok(same.then(|| report(manifest, true, input_bytes)))
}

pub(crate) fn report(manifest: &GeneManifest, already: bool, input_bytes: u64) -> ExtractReport {
    ExtractReport {
        already,
        energy: manifest.energy,
        captured: manifest.captured,
        captured_upper_bound: manifest.captured_upper_bound,
        noise_floor: manifest.noise_floor,
        classes: manifest.classes.clone(),
        modules: manifest.modules.clone(),
        input_bytes,
        ..ExtractReport::nothing()
    }
}
