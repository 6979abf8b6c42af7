//! A checkpoint as rows of its units in f32, every value finite.
//!
//! A value is the stored one widened, 8-bit codes times their scales, plus `scale * B A` of an adapter summed in f32 over
//! ascending rank, scale folded into B once: the same as `Checkpoint::read_f32`, by rows.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use checkpoint::{
    BlockScale, Checkpoint, CheckpointError, Dtype, Factors, Role, Unit, module_of, printable, widen_f32,
};
use kernels::{KernelError, RowReader, Scales, Shape, Unreadable, Weights};
use lowrank::LowRankError;

use crate::algebra::Difference;
use crate::error::{RecoverError, Result};
use crate::method::Job;

/// An opened model or adapter, by units.
#[derive(Debug)]
pub struct Side {
    /// Shared with the readers that an engine is given.
    checkpoint: Arc<Checkpoint>,
    units: BTreeMap<String, Unit>,
}

/// Which tensors have to be the same in two models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// All of them.
    All,
    /// The linear modules of the layers.
    Linear,
}

impl Side {
    pub(crate) fn new(checkpoint: Checkpoint) -> Result<Side> {
        let units = checkpoint.units()?.into_iter().map(|unit| (unit.name.clone(), unit)).collect();
        Ok(Side { checkpoint: Arc::new(checkpoint), units })
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Its units, by name.
    pub fn units(&self) -> &BTreeMap<String, Unit> {
        &self.units
    }

    /// The units that are weights: no buffers, no integers.
    pub(crate) fn weights(&self) -> impl Iterator<Item = &Unit> {
        self.units.values().filter(|unit| is_weight(unit))
    }

    /// The units that are linear modules of layers.
    pub(crate) fn linear(&self) -> impl Iterator<Item = &Unit> {
        self.units.values().filter(|unit| matches!(unit.role, Role::Linear { .. }))
    }

    /// The file that a unit's values lie in.
    pub(crate) fn file_of(&self, unit: &Unit) -> PathBuf {
        let saved = self.checkpoint.adapter().and_then(|adapter| adapter.saved().get(&unit.tensor));
        let info = saved.or_else(|| self.checkpoint.shards().get(&unit.tensor));
        info.map_or_else(|| self.checkpoint.dir().to_path_buf(), |info| info.file.clone())
    }

    /// The rows of a unit, with what an adapter adds.
    pub(crate) fn rows_of(&self, name: &str) -> Result<UnitRows<'_>> {
        let rows = self.stored_rows_of(name)?;
        let terms = match module_of(&rows.unit.tensor) {
            Some(module) => self.checkpoint.factors(module)?.into_iter().collect(),
            None => Vec::new(),
        };
        Ok(rows.with(terms))
    }

    /// The rows of a unit, without what an adapter adds.
    pub(crate) fn stored_rows_of(&self, name: &str) -> Result<UnitRows<'_>> {
        let unit = self.units.get(name).ok_or_else(|| checkpoint::CheckpointError::UnknownTensor {
            tensor: name.to_owned(),
            dir: self.checkpoint.dir().to_path_buf(),
        })?;
        let scales = match &unit.scale {
            Some(scale) => Some((scale, self.checkpoint.read_scales(unit)?)),
            None => None,
        };
        Ok(UnitRows { side: self, unit, terms: Vec::new(), scales })
    }

    /// Refuses another model that is not of the same family: another architecture, a tensor on one side only, or one of
    /// another shape.
    pub(crate) fn check_family(&self, other: &Side, scope: Scope) -> Result<()> {
        let (one_config, other_config) = (self.checkpoint.config(), other.checkpoint.config());
        if one_config.model_type != other_config.model_type || one_config.layers != other_config.layers {
            let kind = |config: &checkpoint::ModelConfig| {
                format!("{} with {} layers", printable(&config.model_type), config.layers)
            };
            return Err(RecoverError::OtherArchitecture {
                one: self.checkpoint.dir().to_path_buf(),
                one_kind: kind(one_config),
                other: other.checkpoint.dir().to_path_buf(),
                other_kind: kind(other_config),
            });
        }
        let counts = |unit: &&Unit| scope == Scope::All || matches!(unit.role, Role::Linear { .. });
        for (holder, lacks) in [(self, other), (other, self)] {
            if let Some(unit) =
                holder.units.values().filter(counts).find(|unit| !lacks.units.contains_key(&unit.name))
            {
                return Err(RecoverError::OneSided {
                    tensor: unit.name.clone(),
                    file: holder.file_of(unit),
                    missing_from: lacks.checkpoint.dir().to_path_buf(),
                });
            }
        }
        for unit in self.units.values().filter(counts) {
            let theirs = &other.units[&unit.name];
            if unit.shape != theirs.shape {
                return Err(RecoverError::OtherShape {
                    tensor: unit.name.clone(),
                    shape: unit.shape.clone(),
                    file: self.file_of(unit),
                    other_shape: theirs.shape.clone(),
                    other_file: other.file_of(theirs),
                });
            }
            for (side, unit) in [(self, unit), (other, theirs)] {
                if !is_number(unit) && is_weight(unit) {
                    let (tensor, file) = (unit.name.clone(), side.file_of(unit));
                    let what = "computed with";
                    return Err(RecoverError::UnsupportedDtype { tensor, file, dtype: unit.dtype, what });
                }
            }
        }
        Ok(())
    }
}

/// Whether a unit's values can be read: a plain float, or an 8-bit one with its scales.
pub(crate) fn is_number(unit: &Unit) -> bool {
    is_plain(unit.dtype) || kernel_dtype(unit.dtype).is_some() && unit.scale.is_some()
}

/// Whether a unit is a weight that methods are about: no buffer, and no integers.
pub(crate) fn is_weight(unit: &Unit) -> bool {
    unit.role != Role::Buffer && unit.dtype.name().starts_with(['F', 'B']) && unit.dtype != Dtype::Bool
}

/// A float that is read and written as it is.
pub(crate) fn is_plain(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::Bf16)
}

/// A number that tells one tensor's random numbers from another's.
pub(crate) fn key_of(tensor: &str) -> u64 {
    let hash = blake3::hash(tensor.as_bytes());
    hash.as_bytes().iter().take(8).fold(0, |key, &byte| key << 8 | u64::from(byte))
}

fn kernel_dtype(dtype: Dtype) -> Option<kernels::Dtype> {
    Some(match dtype {
        Dtype::F64 => kernels::Dtype::F64,
        Dtype::F32 => kernels::Dtype::F32,
        Dtype::F16 => kernels::Dtype::F16,
        Dtype::Bf16 => kernels::Dtype::Bf16,
        Dtype::F8E4M3 => kernels::Dtype::F8E4M3,
        Dtype::F8E5M2 => kernels::Dtype::F8E5M2,
        _ => return None,
    })
}

/// Adds a sum of products to the rows from `first_row` on, each element one chain in f32 over ascending rank of all.
pub(crate) fn add_products(terms: &[Factors], first_row: u64, cols: u64, values: &mut [f32]) {
    let cols = cols as usize;
    if terms.is_empty() || cols == 0 {
        return;
    }
    let mut sum = vec![0f32; cols];
    for (at, values) in values.chunks_exact_mut(cols).enumerate() {
        let row = first_row as usize + at;
        sum.fill(0.0);
        for Factors { b, a, rank, scale, .. } in terms {
            for (&b, a) in b[row * rank..(row + 1) * rank].iter().zip(a.chunks_exact(cols)) {
                let b = (f64::from(b) * scale) as f32;
                for (sum, &a) in sum.iter_mut().zip(a) {
                    *sum += b * a;
                }
            }
        }
        for (value, &sum) in values.iter_mut().zip(&sum) {
            *value += sum;
        }
    }
}

/// One unit of one side.
pub(crate) struct UnitRows<'a> {
    side: &'a Side,
    pub(crate) unit: &'a Unit,
    terms: Vec<Factors>,
    scales: Option<(&'a BlockScale, Vec<f32>)>,
}

impl UnitRows<'_> {
    /// The same with these products added.
    pub(crate) fn with(self, terms: Vec<Factors>) -> Self {
        Self { terms, ..self }
    }

    /// Whether the values are the stored ones.
    pub(crate) fn is_plain(&self) -> bool {
        self.terms.is_empty() && self.scales.is_none()
    }

    pub(crate) fn all(&self) -> Range<u64> {
        0..self.unit.rows()
    }

    /// The stored bytes of some rows, and their values in f32.
    pub(crate) fn read(&self, rows: Range<u64>) -> Result<(Vec<u8>, Vec<f32>)> {
        let (unit, cols) = (self.unit, self.unit.cols());
        let mut bytes = vec![0u8; ((rows.end - rows.start) * cols * unit.dtype.bits() / 8) as usize];
        self.side.checkpoint.read_unit(unit, rows.clone(), &mut bytes)?;
        let refuse = || RecoverError::UnsupportedDtype {
            tensor: unit.name.clone(),
            file: self.side.file_of(unit),
            dtype: unit.dtype,
            what: "computed with",
        };
        let mut values = match (&self.scales, kernel_dtype(unit.dtype)) {
            (Some((scale, grid)), Some(dtype)) => (0..bytes.len() / dtype.bytes())
                .map(|i| {
                    let (o, col) = (rows.start + i as u64 / cols.max(1), i as u64 % cols.max(1));
                    let scale = grid.get(scale.at(o, col) as usize).copied().unwrap_or(f32::NAN);
                    kernels::reference::widen(&bytes, dtype, i) as f32 * scale
                })
                .collect(),
            _ => widen_f32(&bytes, unit.dtype).ok_or_else(refuse)?,
        };
        add_products(&self.terms, rows.start, cols, &mut values);
        match values.iter().position(|x| !x.is_finite()) {
            None => Ok((bytes, values)),
            Some(index) => Err(RecoverError::NonFinite {
                tensor: unit.name.clone(),
                file: self.side.file_of(unit),
                index: rows.start * cols + index as u64,
            }),
        }
    }

    /// The values of some rows in f32.
    pub(crate) fn values(&self, rows: Range<u64>) -> Result<Vec<f32>> {
        Ok(self.read(rows)?.1)
    }

    fn shape(&self) -> Shape {
        Shape { rows: self.unit.rows() as usize, cols: self.unit.cols() as usize }
    }

    /// All of it for an engine: as it is stored, in memory or by a reader, or in f32 where something is added.
    fn weights(&self, held: bool, unread: &Unread) -> Result<Weights> {
        let at = |source| RecoverError::Kernel { tensor: self.unit.name.clone(), source };
        if !self.terms.is_empty() {
            let bytes: Vec<u8> = self.values(self.all())?.iter().flat_map(|x| x.to_le_bytes()).collect();
            return Weights::held(Arc::new(bytes), kernels::Dtype::F32, self.shape()).map_err(at);
        }
        let dtype = kernel_dtype(self.unit.dtype).ok_or_else(|| RecoverError::UnsupportedDtype {
            tensor: self.unit.name.clone(),
            file: self.side.file_of(self.unit),
            dtype: self.unit.dtype,
            what: "computed with",
        })?;
        let weights = if held {
            let mut bytes = vec![0u8; self.shape().bytes(dtype).map_err(at)?];
            self.side.checkpoint.read_unit(self.unit, self.all(), &mut bytes)?;
            Weights::held(Arc::new(bytes), dtype, self.shape())
        } else {
            let (side, unit) = (self.side.checkpoint.clone(), self.unit.clone());
            let reader = UnitReader { checkpoint: side, unit, unread: unread.clone() };
            Weights::read(Arc::new(reader), dtype, self.shape())
        };
        let weights = weights.map_err(at)?;
        match &self.scales {
            None => Ok(weights),
            Some((scale, grid)) => weights
                .scaled(Scales {
                    grid: grid.clone(),
                    grid_cols: scale.grid[1] as usize,
                    block: scale.block.map(|side| side as usize),
                    origin: [scale.row as usize, scale.col as usize],
                })
                .map_err(at),
        }
    }

    /// Bytes that it takes in memory for an engine.
    fn bytes(&self) -> u64 {
        let size = if self.terms.is_empty() { self.unit.dtype.bits() / 8 } else { 4 };
        self.unit.rows().saturating_mul(self.unit.cols()).saturating_mul(size)
    }
}

/// This unit of one side less the same of another, for an engine.
pub(crate) struct Step<'a> {
    one: UnitRows<'a>,
    other: UnitRows<'a>,
    unread: Unread,
}

/// Why rows could not be read, if they could not.
type Unread = Arc<Mutex<Option<CheckpointError>>>;

impl<'a> Step<'a> {
    pub(crate) fn new(one: &'a Side, other: &'a Side, unit: &str) -> Result<Step<'a>> {
        Ok(Step { one: one.rows_of(unit)?, other: other.rows_of(unit)?, unread: Unread::default() })
    }

    /// Both sides, in memory if they fit into what is left of it beside `beside_bytes`; else rows are read whenever they
    /// are needed. Sides that are made in f32 have to fit.
    pub(crate) fn difference(&self, job: &Job<'_>, beside_bytes: u64) -> Result<Difference> {
        let made = [&self.one, &self.other].into_iter().filter(|rows| !rows.terms.is_empty());
        let made_bytes = made.map(UnitRows::bytes).fold(beside_bytes, u64::saturating_add);
        job.check_memory(&self.one.unit.name, made_bytes)?;
        let all = beside_bytes.saturating_add(self.one.bytes()).saturating_add(self.other.bytes());
        let held = all <= job.memory_bytes;
        let weights = |rows: &UnitRows<'_>| rows.weights(held, &self.unread);
        Ok(Difference { one: weights(&self.one)?, other: weights(&self.other)? })
    }

    /// An engine's error about it, with its file.
    pub(crate) fn kernel_error(&self, source: KernelError) -> RecoverError {
        let tensor = self.one.unit.name.clone();
        match source {
            KernelError::Unread { .. } => {
                match self.unread.lock().unwrap_or_else(PoisonError::into_inner).take() {
                    Some(error) => error.into(),
                    None => RecoverError::Kernel { tensor, source },
                }
            }
            KernelError::NonFinite { side, index } => {
                let rows = if side == kernels::Side::Aligned { &self.one } else { &self.other };
                RecoverError::NonFinite { tensor, file: rows.side.file_of(rows.unit), index }
            }
            source => RecoverError::Kernel { tensor, source },
        }
    }

    /// The same of a factorisation.
    pub(crate) fn factor_error(&self, source: LowRankError) -> RecoverError {
        match source {
            LowRankError::Kernel(source) => self.kernel_error(source),
            source => RecoverError::LowRank { tensor: self.one.unit.name.clone(), source },
        }
    }
}

/// Reads rows of a unit for an engine.
struct UnitReader {
    checkpoint: Arc<Checkpoint>,
    unit: Unit,
    unread: Unread,
}

impl RowReader for UnitReader {
    fn read(&self, first_row: usize, out: &mut [u8]) -> std::result::Result<(), Unreadable> {
        let row_bytes = (self.unit.cols() * self.unit.dtype.bits() / 8).max(1);
        let rows = first_row as u64..first_row as u64 + out.len() as u64 / row_bytes;
        self.checkpoint.read_unit(&self.unit, rows, out).map_err(|error| {
            *self.unread.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            Unreadable
        })
    }
}
