//! Steps of programs: grids and arguments of the kernels from shapes.

use super::kernel::{Kernel, SPLIT, TILE_ROWS};
use super::lanes;
use super::memory::Block;
use super::program::Program;
use crate::{Dtype, KernelError, Result, Shape};

/// Sides as the kernels take them.
pub(super) fn side(n: usize, shape: Shape) -> Result<u32> {
    u32::try_from(n).map_err(|_| KernelError::ShapeOverflow { shape })
}

pub(super) fn code(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F64 => 0,
        Dtype::F32 => 1,
        Dtype::F16 => 2,
        Dtype::Bf16 => 3,
        Dtype::F8E4M3 => 4,
        Dtype::F8E5M2 => 5,
    }
}

/// The two halves of a number.
pub(super) fn halves(n: u64) -> [u32; 2] {
    [n as u32, (n >> 32) as u32]
}

/// Blocks for `n` things, `each` to a block.
pub(super) fn blocks(n: u64, each: u64, shape: Shape) -> Result<u32> {
    i32::try_from(n.div_ceil(each)).map(|n| n as u32).map_err(|_| KernelError::ShapeOverflow { shape })
}

/// Parts that a sum over `depth` is cut into, no more than a dimension of a grid has blocks.
pub(super) fn in_a_grid(parts: u32, depth: u32) -> Result<u32> {
    let shape = Shape { rows: depth as usize, cols: 1 };
    if parts <= lanes::GRID_Z_MAX { Ok(parts) } else { Err(KernelError::ShapeOverflow { shape }) }
}

/// Tiles of a chain, as many as a launch can have.
pub(super) fn tiles(down: u32, across: u32, shape: Shape) -> Result<u32> {
    blocks(u64::from(down) * u64::from(across), 1, shape)
}

/// Elements between rows of a difference: whole vectors of four.
pub(super) fn stride(cols: u32) -> u32 {
    cols.next_multiple_of(4)
}

/// A product in parts of the depth, one after the other.
pub(super) fn write_gemm(
    program: &mut Program,
    transposed: bool,
    (rows, cols, depth): (u32, u32, u32),
    (a, lda): (u64, u32),
    b: u64,
    parts: u64,
) {
    let (kernel, tile) = Kernel::gemm(transposed, cols);
    let splits = depth.div_ceil(SPLIT);
    let grid = (rows.div_ceil(TILE_ROWS), cols.div_ceil(tile));
    program.launch(kernel, grid, splits, &[a, b, parts], &[rows, cols, depth, lda, splits, 0]);
}

/// One record for many.
pub(super) fn write_reduce_sums(program: &mut Program, parts: &Block, count: u32, out: &Block) {
    program.launch(Kernel::ReduceSums, (1, 1), 1, &[parts.address, out.address], &[count, 0]);
}

/// The sum of parts, between `first` and `last`.
pub(super) fn write_reduce(
    program: &mut Program,
    (parts, sum, out): (u64, u64, u64),
    len: u64,
    count: u32,
    (first, last): (bool, bool),
) {
    let [low, high] = halves(len);
    let words = [low, high, count, first.into(), last.into(), 0];
    let grid = (len.div_ceil(256) as u32, 1);
    program.launch(Kernel::ReduceParts, grid, 1, &[parts, sum, out], &words);
}

/// A matrix of its own stride into another, times a factor.
pub(super) fn write_place(
    program: &mut Program,
    from: u64,
    (shape, ld): (Shape, usize),
    (to, ld_out): (u64, usize),
    factor: f32,
) {
    let len = shape.rows as u64 * shape.cols as u64;
    let [low, high] = halves(len);
    let words = [low, high, shape.cols as u32, ld as u32, ld_out as u32, factor.to_bits()];
    program.launch(Kernel::Place, (len.div_ceil(256) as u32, 1), 1, &[from, to], &words);
}
