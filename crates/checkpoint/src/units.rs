//! The canonical tensor space: one name per matrix, whatever the folder's layout.
//!
//! Stacks of experts are taken apart into one unit per expert and projection, matrices oriented [out, in], names brought
//! to one form (`experts`); so a fused and an unfused folder of one model have the same names and shapes. Any other
//! tensor is one unit with its own name and shape, the biases of fused experts ([E, 2I], [E, H]) and Conv1D weights as
//! they are stored. Fp8 scales belong to their weight and are no units. Everything but [`Checkpoint::read_unit`] and
//! `read_scales` works from headers alone.
//!
//! Not here: values as numbers, and an adapter's factors, which belong to `module_of` of the stored tensor.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::catalogue::{Role, role};
use crate::config::FILE as CONFIG_FILE;
use crate::dtype::{Dtype, elements};
use crate::error::{CheckpointError, Result};
use crate::experts::{Experts, Layout};
use crate::model::Checkpoint;
use crate::quantized::refuse_quantized;
use crate::scales::{Scales, block_size, is_scaled, named_scales, scale_error};
use crate::shards::{ShardSet, TensorInfo};
use crate::values::widen_f32;

/// Buffers with more than two sides that models keep in their layers beside the weights.
const BUFFERS: [&str; 4] = ["slope_rate", "query_decay", "key_decay", "diagonal_decay"];

/// Bytes that a gathering read holds beside its output, unless one stored row is longer.
const GATHER_BYTES: u64 = 4 << 20;

/// One tensor of the canonical space: experts and fused projections taken apart, matrices oriented [out, in].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Canonical tensor name, `model.layers.0.mlp.experts.3.gate_proj.weight`.
    pub name: String,
    /// Sides; of a matrix [out, in].
    pub shape: Vec<u64>,
    /// What it is for.
    pub role: Role,
    /// The stored tensor that holds it.
    pub tensor: String,
    /// Element type, as stored.
    pub dtype: Dtype,
    /// Where it lies in the stored tensor.
    pub slice: Slice,
    /// Its scales, if it is fp8.
    pub scale: Option<BlockScale>,
}

impl Unit {
    /// Rows as they are read: the first side; 1 for a vector or a scalar.
    pub fn rows(&self) -> u64 {
        if self.shape.len() < 2 { 1 } else { self.shape[0] }
    }

    /// Columns as they are read: all sides but the first; of a vector all it has.
    pub fn cols(&self) -> u64 {
        let sides = if self.shape.len() < 2 { &self.shape[..] } else { &self.shape[1..] };
        // Overflow is possible only where another side is 0 and there is nothing to read.
        elements(sides).unwrap_or(0)
    }
}

/// Where a unit lies in its stored tensor, in elements: (o, i) is at `start + o * row_stride + i * col_stride`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Element (0, 0).
    pub start: u64,
    /// From one row to the next.
    pub row_stride: u64,
    /// From one column to the next.
    pub col_stride: u64,
}

/// The scales of an fp8 unit: (o, i) has number [`at`](Self::at) of the grid, and stands for code * scale.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockScale {
    /// The tensor with the scales.
    pub tensor: String,
    /// First element of this matrix's grid in it.
    pub start: u64,
    /// Rows and columns that share a scale.
    pub block: [u64; 2],
    /// This unit's first row inside the scaled matrix, above 0 for the second half of a fused one.
    pub row: u64,
    /// This unit's first column inside the scaled matrix.
    pub col: u64,
    /// Rows and columns of the grid.
    pub grid: [u64; 2],
}

impl BlockScale {
    /// Position in the grid of the scale of the unit's element (o, i).
    pub fn at(&self, o: u64, i: u64) -> u64 {
        (self.row + o) / self.block[0] * self.grid[1] + (self.col + i) / self.block[1]
    }
}

/// What a look at all headers gives.
struct Scan {
    units: Vec<Unit>,
    scale_tensors: BTreeSet<String>,
}

impl Checkpoint {
    /// The model as canonical units, sorted by name, from headers alone.
    ///
    /// Quantized weights without a reading are refused here, and so are stacks of matrices of an unknown layout.
    pub fn units(&self) -> Result<Vec<Unit>> {
        Ok(self.scan()?.units)
    }

    /// Names of the stored tensors that are scales of fp8 weights and so no units, sorted.
    pub fn scale_tensors(&self) -> Result<Vec<String>> {
        Ok(self.scan()?.scale_tensors.into_iter().collect())
    }

    fn scan(&self) -> Result<Scan> {
        let config_file = self.base_dir().join(CONFIG_FILE);
        refuse_quantized(self.shards(), self.config(), &config_file)?;
        let experts = Experts::of(self.config());
        let block = block_size(self, &config_file)?;

        let mut scale_tensors = BTreeSet::new();
        for weight in self.tensors() {
            let named = named_scales(self.shards(), &weight.name);
            if is_scaled(weight.dtype) {
                scale_tensors.extend(named.iter().map(|scale| scale.name.clone()));
            } else if widen_f32(&[], weight.dtype).is_some()
                && let Some(scale) = named.iter().find(|scale| scale.name.contains("weight_scale"))
            {
                let problem = format!("`{}` lies beside it, but it is {}", scale.name, weight.dtype);
                return Err(scale_error(weight, problem));
            }
        }

        let mut units = Vec::with_capacity(self.tensors().len());
        for base in self.tensors().iter().filter(|base| !scale_tensors.contains(&base.name)) {
            let stored = self.stored(&base.name)?.1;
            self.take_apart(base, stored, &experts, block, &mut units)?;
        }
        units.sort_by(|a, b| a.name.cmp(&b.name));
        for pair in units.windows(2) {
            if pair[0].name == pair[1].name {
                let file = |unit: &Unit| self.shards().get(&unit.tensor).map(|info| info.file.clone());
                return Err(CheckpointError::DuplicateTensor {
                    tensor: pair[0].name.clone(),
                    first: file(&pair[0]).unwrap_or_default(),
                    second: file(&pair[1]).unwrap_or_default(),
                });
            }
        }
        Ok(Scan { units, scale_tensors })
    }

    /// The units of one tensor; `base` has its name, `stored` its dtype.
    fn take_apart(
        &self,
        base: &TensorInfo,
        stored: &TensorInfo,
        experts: &Experts,
        block: Option<[u64; 2]>,
        units: &mut Vec<Unit>,
    ) -> Result<()> {
        let refuse = |problem: String| CheckpointError::Layout {
            tensor: base.name.clone(),
            file: base.file.clone(),
            model_type: experts.model_type(),
            problem,
        };
        let name = experts.canonical(&base.name);
        let scaled = is_scaled(stored.dtype);
        let scales = |matrix, stacked, halves| {
            scaled.then(|| Scales::find(self, base, matrix, stacked, halves, block)).transpose()
        };

        if let Some(found) = experts.take_apart(&name, &base.shape) {
            let (layout, parts) = found.map_err(refuse)?;
            let (rows, cols) = (base.shape[1], base.shape[2]);
            let halves = parts.iter().any(|part| part.row > 0);
            let scales = scales([rows, cols], Some(base.shape[0]), halves)?;
            if let Some(scales) = &scales {
                if layout != Layout::OutIn {
                    return Err(scale_error(
                        base,
                        "is of experts stored as [in, out], which is not read".into(),
                    ));
                }
                if halves && scales.halves_are_ambiguous(rows) {
                    let problem = format!("has blocks that straddle gate and up, {} rows each", rows / 2);
                    return Err(scale_error(base, problem));
                }
            }
            units.extend(parts.into_iter().map(|part| Unit {
                role: role(&part.name, &part.shape),
                name: part.name,
                shape: part.shape.to_vec(),
                tensor: base.name.clone(),
                dtype: stored.dtype,
                slice: part.slice,
                scale: scales.as_ref().map(|scales| scales.of(part.expert, part.row)),
            }));
            return Ok(());
        }

        let role = role(&name, &base.shape);
        if role.layer().is_some() && looks_like_a_stack(&base.name, &base.shape) {
            let shape = &base.shape;
            return Err(refuse(format!("its shape is {shape:?} and no layout is known for it")));
        }
        let mut unit = Unit {
            name,
            shape: base.shape.clone(),
            role,
            tensor: base.name.clone(),
            dtype: stored.dtype,
            slice: Slice { start: 0, row_stride: 0, col_stride: 1 },
            scale: None,
        };
        unit.slice.row_stride = unit.cols();
        if scaled && unit.shape.len() > 2 {
            return Err(refuse(format!(
                "it is {} of {} sides, not a matrix",
                stored.dtype,
                unit.shape.len()
            )));
        }
        unit.scale = scales([unit.rows(), unit.cols()], None, false)?.map(|scales| scales.of(0, 0));
        units.push(unit);
        Ok(())
    }

    /// Fills `out` with these rows of a unit, in the stored dtype, row-major [out, in].
    ///
    /// Bytes are those before any factors are added: the adapter's saved copy of the tensor, else the base's. What lies
    /// in one piece is read in one piece; else at most a few megabytes, or one stored row, are held beside `out`.
    pub fn read_unit(&self, unit: &Unit, rows: Range<u64>, out: &mut [u8]) -> Result<()> {
        let refuse = |problem: String| CheckpointError::UnitRange { unit: unit.name.clone(), problem };
        let (shards, info) = self.stored(&unit.tensor)?;
        if info.dtype != unit.dtype || !info.dtype.bits().is_multiple_of(8) {
            return Err(refuse(format!("it is {}, the stored tensor {}", unit.dtype, info.dtype)));
        }
        let (size, cols) = (info.dtype.bits() / 8, unit.cols());
        let count = rows.end.checked_sub(rows.start).filter(|_| rows.end <= unit.rows());
        let Some(count) = count else {
            return Err(refuse(format!("rows {rows:?} of {} were asked for", unit.rows())));
        };
        let need = count.checked_mul(cols).and_then(|elements| elements.checked_mul(size));
        if need != Some(out.len() as u64) {
            return Err(refuse(format!("{} bytes were given for {count} rows of {cols}", out.len())));
        }
        if out.is_empty() {
            return Ok(());
        }
        let Slice { start, row_stride, col_stride } = unit.slice;
        let last = (|| {
            let rows = (rows.end - 1).checked_mul(row_stride)?;
            let cols = (cols - 1).checked_mul(col_stride)?;
            start.checked_add(rows)?.checked_add(cols)
        })();
        if last.is_none_or(|last| last >= info.elements()) {
            return Err(refuse(format!("it does not lie inside `{}`", unit.tensor)));
        }

        let first = start + rows.start * row_stride;
        if col_stride == 1 && (row_stride == cols || count == 1) {
            return shards.read_at(info, first * size, out);
        }
        if col_stride == 1 {
            for (row, out) in out.chunks_exact_mut((cols * size) as usize).enumerate() {
                shards.read_at(info, (first + row as u64 * row_stride) * size, out)?;
            }
            return Ok(());
        }
        let gather = Gather { first, count, cols, row_stride, col_stride };
        match size {
            1 => gather.read::<1>(shards, info, out),
            2 => gather.read::<2>(shards, info, out),
            4 => gather.read::<4>(shards, info, out),
            _ => gather.read::<8>(shards, info, out),
        }
    }
}

/// A read that turns stored columns into rows; all of it was checked to lie inside the tensor.
struct Gather {
    first: u64,
    count: u64,
    cols: u64,
    row_stride: u64,
    col_stride: u64,
}

impl Gather {
    fn read<const SIZE: usize>(&self, shards: &ShardSet, info: &TensorInfo, out: &mut [u8]) -> Result<()> {
        let size = SIZE as u64;
        // Elements from the first wanted to the last wanted of one column.
        let span = (self.count - 1) * self.row_stride + 1;
        // Reading what lies between the columns is cheaper than one call per column, unless it is most of the bytes.
        let together = if span >= self.col_stride / 4 {
            (GATHER_BYTES / size / self.col_stride.max(1)).clamp(1, self.cols)
        } else {
            1
        };
        let mut buffer = vec![0u8; (((together - 1) * self.col_stride + span) * size) as usize];
        let (out, _) = out.as_chunks_mut::<SIZE>();
        let mut col = 0;
        while col < self.cols {
            let take = together.min(self.cols - col);
            let bytes = &mut buffer[..(((take - 1) * self.col_stride + span) * size) as usize];
            shards.read_at(info, (self.first + col * self.col_stride) * size, bytes)?;
            let (stored, _) = bytes.as_chunks::<SIZE>();
            self.transpose(stored, col as usize..(col + take) as usize, out);
            col += take;
        }
        Ok(())
    }

    /// Puts the columns `cols`, which `stored` begins with, into all rows of `out`.
    fn transpose<const SIZE: usize>(
        &self,
        stored: &[[u8; SIZE]],
        cols: Range<usize>,
        out: &mut [[u8; SIZE]],
    ) {
        // Small squares, so that both sides stay in cache.
        const TILE: usize = 32;
        let (row_stride, col_stride) = (self.row_stride as usize, self.col_stride as usize);
        let (count, width) = (self.count as usize, self.cols as usize);
        for tile in (0..count).step_by(TILE) {
            let rows = tile..(tile + TILE).min(count);
            for start in cols.clone().step_by(TILE) {
                let end = (start + TILE).min(cols.end);
                for row in rows.clone() {
                    let from = &stored[row * row_stride..];
                    for (col, out) in (start..end).zip(&mut out[row * width + start..row * width + end]) {
                        *out = from[(col - cols.start) * col_stride];
                    }
                }
            }
        }
    }
}

/// Whether a tensor of a layer may hold more than one matrix: three sides or more, more than one of them above 1, and
/// not named like the weight of a convolution or a known buffer.
fn looks_like_a_stack(name: &str, shape: &[u64]) -> bool {
    shape.len() > 2
        && shape.iter().filter(|&&side| side != 1).count() > 1
        && !name.split('.').any(|part| part.contains("conv") || BUFFERS.contains(&part))
}
