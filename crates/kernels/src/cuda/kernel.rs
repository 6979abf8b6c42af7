//! The kernels of `kernels/*.cu` by name, and how their arguments are laid out.
//!
//! A struct of arguments is `slots` arrays of [`BATCH`] words of 8 bytes, one word for each matrix of a launch, and `words`
//! words of 4 bytes for all of them. A test compares this table with the sources.

/// Matrices of a launch at most.
pub(super) const BATCH: usize = 32;
/// Arrays of a struct of arguments at most.
pub(super) const SLOTS: usize = 6;
/// Words of 4 bytes at most.
pub(super) const WORDS: usize = 16;

/// Rows that one record of `delta` sums.
pub(super) const DELTA_ROWS: u32 = 16;
/// Depth that one block of a product, or of a Gram matrix, sums.
pub(super) const SPLIT: u32 = 256;
/// Rows of a tile of a product.
pub(super) const TILE_ROWS: u32 = 128;
/// Rows and columns of a tile of a Gram matrix.
pub(super) const GRAM_TILE: u32 = 32;
/// Rows and columns of a tile of a chain.
pub(super) const CHAIN_TILE: u32 = 64;
/// Elements that one block of `pack` rounds.
pub(super) const PACKED: u64 = 4096;
/// Blocks of `squares`.
pub(super) const SQUARES: u32 = 64;
/// Rows of panels are a multiple of this, so that no sum depends on how a matrix is cut.
pub(super) const PANEL_ROWS: u32 = SPLIT;

macro_rules! kernels {
    ($($kernel:ident $name:literal $slots:literal $words:literal $threads:literal;)*) => {
        /// A kernel.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) enum Kernel { $($kernel),* }

        impl Kernel {
            /// All of them, in the order of their numbers.
            pub(super) const ALL: &'static [Kernel] = &[$(Kernel::$kernel),*];

            pub(super) fn name(self) -> &'static str {
                match self { $(Kernel::$kernel => $name),* }
            }

            /// Slots, words and threads of a block.
            pub(super) fn layout(self) -> (usize, usize, u32) {
                match self { $(Kernel::$kernel => ($slots, $words, $threads)),* }
            }
        }
    };
}

kernels! {
    ReduceSums "reduce_sums" 2 2 128;
    Squares "squares" 2 2 128;
    DeltaAny "delta_any" 6 16 256;
    DeltaBf16 "delta_bf16" 6 16 256;
    DeltaF16 "delta_f16" 6 16 256;
    DeltaF32 "delta_f32" 6 16 256;
    DeltaE4m3 "delta_e4m3" 6 16 256;
    Sketch "sketch" 2 4 128;
    GemmNn24 "gemm_nn_24" 3 6 64;
    GemmNn72 "gemm_nn_72" 3 6 192;
    GemmTn24 "gemm_tn_24" 3 6 64;
    GemmTn72 "gemm_tn_72" 3 6 192;
    ReduceParts "reduce_parts" 3 6 256;
    Gram "gram" 2 2 64;
    GramSum "gram_sum" 2 2 128;
    Apply "apply" 3 4 128;
    ResidualF32 "residual_f32" 4 6 256;
    ResidualF64 "residual_f64" 4 6 256;
    AddBf16 "add_bf16" 4 4 256;
    AddF16 "add_f16" 4 4 256;
    AddF32 "add_f32" 4 4 256;
    AddF64 "add_f64" 4 4 256;
    Pack "pack" 3 4 256;
    Place "place" 2 6 256;
}

impl Kernel {
    /// The kernel for a product with so many columns, and the columns of its tile: that which multiplies fewer zeros, or
    /// about as many with fewer reads.
    pub(super) fn gemm(transposed: bool, cols: u32) -> (Kernel, u32) {
        let padded = |tile: u32| u64::from(cols.div_ceil(tile)) * u64::from(tile);
        let wide = padded(72) * 8 <= padded(24) * 9;
        match (transposed, wide) {
            (false, false) => (Kernel::GemmNn24, 24),
            (false, true) => (Kernel::GemmNn72, 72),
            (true, false) => (Kernel::GemmTn24, 24),
            (true, true) => (Kernel::GemmTn72, 72),
        }
    }
}

/// One record of sums, as `sums.cu` has it.
#[derive(Debug, Clone, Copy, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct Sums {
    pub(super) x: f64,
    pub(super) y: f64,
    pub(super) count: u64,
    pub(super) first: u64,
    pub(super) max: u32,
    pub(super) unused: u32,
}

/// [`Sums::first`] where nothing is wrong.
pub(super) const NONE: u64 = u64::MAX;

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of a macro, or the parts of a call of one, in the sources.
    fn parts<'a>(line: &'a str, call: &str) -> Option<Vec<&'a str>> {
        let inside = line.strip_prefix(call)?.strip_prefix('(')?;
        Some(inside[..inside.find(')')?].split(',').map(str::trim).collect())
    }

    #[test]
    fn table_is_that_of_the_sources() {
        let source = crate::cuda::image::SOURCE;
        let structs: Vec<Vec<&str>> = source.lines().filter_map(|line| parts(line, "ARGS")).collect();
        let found: Vec<(&str, usize, usize, u32)> = source
            .lines()
            .filter_map(|line| parts(line, "KERNEL"))
            .map(|kernel| {
                let args = structs.iter().find(|args| args[0] == kernel[1]).unwrap();
                let number = |text: &str| text.parse::<usize>().unwrap();
                (kernel[0], number(args[1]), number(args[2]), kernel[2].parse().unwrap())
            })
            .collect();
        let table: Vec<(&str, usize, usize, u32)> = Kernel::ALL
            .iter()
            .map(|kernel| {
                let (slots, words, threads) = kernel.layout();
                assert!(slots <= SLOTS && words <= WORDS && words % 2 == 0);
                (kernel.name(), slots, words, threads)
            })
            .collect();
        assert_eq!(found, table);
        for (name, value) in [
            ("BATCH", BATCH as u64),
            ("DELTA_ROWS", DELTA_ROWS.into()),
            ("SPLIT", SPLIT.into()),
            ("GRAM_SPLIT", SPLIT.into()),
            ("TILE_ROWS", TILE_ROWS.into()),
            ("GRAM_TILE", GRAM_TILE.into()),
            ("CHAIN_TILE", CHAIN_TILE.into()),
        ] {
            let line = format!("#define {name} {value}");
            assert!(source.lines().any(|found| found == line), "the sources have no `{line}`");
        }
        let multiples = [DELTA_ROWS, SPLIT, CHAIN_TILE].iter().all(|rows| PANEL_ROWS.is_multiple_of(*rows));
        assert!(multiples && size_of::<Sums>() == 40);
    }

    #[test]
    fn gemm_tiles_waste_little() {
        let tile = |cols| Kernel::gemm(false, cols).1;
        let tiles = [1, 18, 24, 36, 48, 54, 66, 72, 138, 144, 216].map(tile);
        assert_eq!(tiles, [24, 24, 24, 24, 24, 72, 72, 72, 72, 72, 72]);
    }
}
