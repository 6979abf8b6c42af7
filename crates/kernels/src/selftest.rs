//! Every operation of an engine on small and odd shapes, against the references of [`reference`](mod@crate::reference).
//!
//! `delta`, `sketch`, `add_low_rank` and `pack` have to agree to the bit; for the rest the bounds follow from the arithmetic
//! and stand where they are used. [`run`] is what `doctor` shows and what the tests run on every engine there is.
//!
//! Each function gives the bits of the results, so that a caller can ask for the same ones again, or says what is wrong.

use crate::{DeltaStats, Dtype, Engine, KernelError, Scales, Shape, Weights, philox4x32_10, reference};

/// The bits of results, or what is wrong with them.
pub type Found = Result<Vec<u64>, String>;

/// What a case came to.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The operation.
    pub op: &'static str,
    /// Shapes and formats.
    pub case: String,
    /// Whether the engine has to agree with the reference to the bit, or within a bound.
    pub exact: bool,
    /// What is wrong, if anything.
    pub wrong: Option<String>,
}

/// The formats that engines write.
pub const DTYPES: [Dtype; 4] = [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::Bf16];

/// Rows, depth and columns of products.
const PRODUCTS: [(usize, usize, usize); 6] =
    [(1, 1, 1), (3, 129, 2), (129, 5, 24), (130, 300, 7), (2, 600, 33), (5, 1, 75)];

/// Runs every case and hands over what it came to; says how many failed.
pub fn run<E: Engine>(engine: &E, report: &mut dyn FnMut(Outcome)) -> usize {
    let mut failed = 0;
    let mut case = |op, exact, case: String, found: Found| {
        failed += usize::from(found.is_err());
        report(Outcome { op, case, exact, wrong: found.err() });
    };
    for (rows, cols) in [(1, 1), (1, 7), (129, 3), (3, 1025), (40, 131), (17, 264), (0, 5), (5, 0)] {
        let shape = Shape { rows, cols };
        case("delta", true, format!("{shape} Bf16"), delta(engine, shape, Dtype::Bf16, Dtype::Bf16));
    }
    for aligned in DTYPES {
        for degraded in DTYPES {
            for cols in [17, 24] {
                let shape = Shape { rows: 35, cols };
                let about = format!("{shape} {aligned:?} - {degraded:?}");
                case("delta", true, about, delta(engine, shape, aligned, degraded));
            }
        }
    }
    for dtype in [Dtype::F8E4M3, Dtype::F8E5M2] {
        for (shape, block, origin) in [
            (Shape { rows: 20, cols: 33 }, [8, 8], [3, 5]),
            (Shape { rows: 33, cols: 48 }, [16, 16], [0, 16]),
            (Shape { rows: 5, cols: 32 }, [128, 128], [0, 0]),
        ] {
            let about = format!("{shape} {dtype:?}, scales of {}x{} blocks", block[0], block[1]);
            case("delta", true, about, scaled_delta(engine, shape, dtype, block, origin));
        }
    }
    for (rows, cols) in [(1, 1), (70, 3), (5, 24), (3, 41)] {
        case("sketch", true, Shape { rows, cols }.to_string(), sketch(engine, Shape { rows, cols }));
    }
    for (rows, depth, n) in PRODUCTS {
        for transposed in [false, true] {
            let way = if transposed { "A^T B" } else { "A B" };
            let about = format!("{way} {rows}x{depth} by {depth}x{n}");
            case("gemm", false, about, gemm(engine, rows, depth, n, transposed));
        }
    }
    for (rows, cols, l) in
        [(1, 1, 1), (7, 33, 5), (130, 95, 18), (9, 300, 72), (300, 36, 25), (0, 3, 2), (3, 0, 2)]
    {
        case("sweep", false, format!("{rows}x{cols}, {l} columns"), sweep(engine, rows, cols, l));
    }
    for (rows, cols) in [(1, 1), (129, 3), (600, 7), (40, 40), (3, 70), (0, 3), (4, 0)] {
        case("gram", false, Shape { rows, cols }.to_string(), gram(engine, rows, cols));
    }
    for (rows, depth, cols) in PRODUCTS {
        let about = format!("{rows}x{depth} by {depth}x{cols}");
        case("apply_right", false, about, apply_right(engine, rows, depth, cols));
    }
    for (rows, cols, rank) in [(1, 1, 1), (129, 70, 3), (3, 130, 16), (66, 7, 21), (2, 2, 0), (0, 3, 1)] {
        // Nearly the product itself, so that a product rounded to f32 would show; and far from it.
        for rest in [1e-6, 0.3] {
            let about = format!("{rows}x{cols} rank {rank}, rest {rest}");
            case("residual", false, about, residual(engine, rows, cols, rank, rest));
        }
    }
    for (rows, cols, ranks) in [
        (1, 1, &[1][..]),
        (129, 5, &[3, 5]),
        (3, 150, &[0, 7, 1]),
        (70, 33, &[]),
        (65, 70, &[17]),
        (0, 4, &[2]),
    ] {
        let about = format!("{rows}x{cols} ranks {ranks:?} Bf16");
        case("add_low_rank", true, about, add_low_rank(engine, rows, cols, ranks, Dtype::Bf16));
    }
    for dtype in DTYPES {
        let about = format!("70x19 ranks [4, 2] {dtype:?}");
        case("add_low_rank", true, about, add_low_rank(engine, 70, 19, &[4, 2], dtype));
        case("pack", true, format!("{dtype:?}"), pack(engine, dtype));
    }
    failed
}

/// Written so that a NaN fails.
macro_rules! ensure {
    ($ok:expr, $($why:tt)*) => {
        match $ok {
            true => {}
            false => return Err(format!($($why)*)),
        }
    };
}

fn failed(error: KernelError) -> String {
    error.to_string()
}

/// Numbers in [-1, 1), from a counter.
pub fn noise(seed: u32, n: usize) -> Vec<f32> {
    (0..n.div_ceil(4) as u32)
        .flat_map(|i| philox4x32_10([i, 0, 0, 0], [seed, 77]))
        .map(|word| word as i32 as f32 / 2.0f32.powi(31))
        .take(n)
        .collect()
}

/// `values` as stored weights.
pub fn stored(values: &[f32], dtype: Dtype) -> Vec<u8> {
    values.iter().flat_map(|&x| reference::round(f64::from(x), dtype)).collect()
}

/// A pair of stored sides on an engine.
pub fn pair<E: Engine>(
    engine: &E,
    aligned: (&[u8], Dtype),
    degraded: (&[u8], Dtype),
    shape: Shape,
) -> Result<E::Pair, String> {
    let side = |(bytes, dtype): (&[u8], Dtype)| Weights::copied(bytes, dtype, shape).map_err(failed);
    engine.pair(side(aligned)?, side(degraded)?).map_err(failed)
}

fn bits(values: &[f32]) -> impl Iterator<Item = u64> + '_ {
    values.iter().map(|x| u64::from(x.to_bits()))
}

/// All terms positive: as many roundings on each side bound the relative error of a sum.
fn check_sum(what: &str, got: f64, want: f64, terms: usize) -> Result<(), String> {
    let bound = 2.0 * terms as f64 * f64::EPSILON * want;
    ensure!((got - want).abs() <= bound, "{what} is {got:e}, not {want:e}");
    Ok(())
}

/// The square of a unit in the last place.
fn ulp_squared(x: f64, dtype: Dtype) -> f64 {
    let (lowest, fraction) = dtype.exponents();
    let exponent = if x == 0.0 { lowest } else { (x.abs().log2().floor() as i64).max(lowest) };
    2.0f64.powi(2 * (exponent - fraction) as i32)
}

fn check_delta<E: Engine>(
    engine: &E,
    pair: &E::Pair,
    shape: Shape,
    sides: impl Fn(usize) -> (f64, f64, f64),
    subtract: impl Fn(f64, f64) -> f32,
) -> Found {
    ensure!(engine.pair_shape(pair) == shape, "the shape is {}", engine.pair_shape(pair));
    let (delta, stats) = engine.delta(pair).map_err(failed)?;
    ensure!(engine.stats(pair).map_err(failed)? == stats, "the sums alone are others");
    ensure!(engine.shape(&delta) == shape, "the shape is {}", engine.shape(&delta));
    let got = engine.read(&delta).map_err(failed)?;
    let n = shape.len().map_err(failed)?;
    ensure!(got.len() == n, "{} elements of {n}", got.len());
    let (mut sumsq, mut ulp_sumsq, mut max_abs, mut nonzero) = (0.0f64, 0.0f64, 0.0f32, 0);
    for (i, &got) in got.iter().enumerate() {
        let (x, y, ulp) = sides(i);
        let want = subtract(x, y);
        ensure!(got.to_bits() == want.to_bits(), "element {i} is {got:e}, not {want:e}");
        sumsq += f64::from(want).powi(2);
        ulp_sumsq += ulp;
        max_abs = max_abs.max(want.abs());
        nonzero += u64::from(x != y);
    }
    check_sum("the sum of squares", stats.sumsq, sumsq, n)?;
    check_sum("the sum of squared units", stats.ulp_sumsq, ulp_sumsq, n)?;
    let rest = (stats.max_abs, stats.nonzero, stats.elements);
    ensure!(rest == (max_abs, nonzero, n as u64), "maximum, nonzero, elements are {rest:?}");
    Ok(bits(&got).chain([stats.sumsq.to_bits(), stats.ulp_sumsq.to_bits()]).collect())
}

/// `delta` of two formats, to the bit, and its sums.
pub fn delta<E: Engine>(engine: &E, shape: Shape, aligned: Dtype, degraded: Dtype) -> Found {
    let n = shape.len().map_err(failed)?;
    let base = noise(1, n);
    // Changes of very different sizes, and every fifth element the same.
    let moved: Vec<f32> = base
        .iter()
        .zip(noise(2, n))
        .enumerate()
        .map(|(i, (x, change))| if i % 5 == 0 { *x } else { x + change * 0.01f32.powi(i as i32 % 3) })
        .collect();
    let (a, d) = (stored(&moved, aligned), stored(&base, degraded));
    let pair = pair(engine, (&a, aligned), (&d, degraded), shape)?;
    let sides = |i| {
        let y = reference::widen(&d, degraded, i);
        (reference::widen(&a, aligned, i), y, ulp_squared(y, degraded))
    };
    check_delta(engine, &pair, shape, sides, reference::delta)
}

/// Scales for a shape.
pub fn scales(shape: Shape, block: [usize; 2], origin: [usize; 2], seed: u32) -> Scales {
    let grid_cols = (shape.cols + origin[1]).div_ceil(block[1]);
    let n = (shape.rows + origin[0]).div_ceil(block[0]) * grid_cols;
    Scales { grid: noise(seed, n).iter().map(|x| x.abs() + 0.1).collect(), grid_cols, block, origin }
}

/// `delta` of 8-bit weights with scales, to the bit: a value is one f32 product, the difference one f32 subtraction.
pub fn scaled_delta<E: Engine>(
    engine: &E,
    shape: Shape,
    dtype: Dtype,
    block: [usize; 2],
    origin: [usize; 2],
) -> Found {
    let n = shape.len().map_err(failed)?;
    // Every code but those of NaN and infinity.
    let codes = |seed: u32| -> Vec<u8> {
        let code = |(i, x): (usize, f32)| {
            let code = ((x.to_bits() >> 3) as u8).wrapping_add(i as u8);
            if reference::widen(&[code], dtype, 0).is_finite() { code } else { 0x31 }
        };
        noise(seed, n).into_iter().enumerate().map(code).collect()
    };
    let (a, mut d) = (codes(11), codes(12));
    d.iter_mut().zip(&a).step_by(3).for_each(|(d, a)| *d = *a);
    let (a_scales, d_scales) = (scales(shape, block, origin, 3), scales(shape, block, origin, 4));
    let side = |bytes: &[u8], scales: &Scales| {
        Weights::copied(bytes, dtype, shape).and_then(|w| w.scaled(scales.clone())).map_err(failed)
    };
    let pair = engine.pair(side(&a, &a_scales)?, side(&d, &d_scales)?).map_err(failed)?;
    let sides = |i: usize| {
        let value = |bytes: &[u8], scales: &Scales| {
            reference::widen(bytes, dtype, i) as f32 * scales.at(i / shape.cols, i % shape.cols)
        };
        let unit = ulp_squared(reference::widen(&d, dtype, i), dtype).sqrt() as f32;
        // The power of two at the head times the scale rounds as the unit times the scale does.
        let unit = f64::from(unit * d_scales.at(i / shape.cols, i % shape.cols));
        (f64::from(value(&a, &a_scales)), f64::from(value(&d, &d_scales)), unit * unit)
    };
    check_delta(engine, &pair, shape, sides, |x, y| x as f32 - y as f32)
}

/// `sketch`, to the bit.
pub fn sketch<E: Engine>(engine: &E, shape: Shape) -> Found {
    let (seed, key) = (0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210);
    let got = engine.sketch(shape, seed, key).and_then(|x| engine.read(&x)).map_err(failed)?;
    ensure!(got.len() == shape.rows * shape.cols, "{} elements", got.len());
    for (i, &got) in got.iter().enumerate() {
        let (row, col) = (i / shape.cols, i % shape.cols);
        let counter = [col as u32 / 4, row as u32, 0x7654_3210, 0xfedc_ba98];
        let word = philox4x32_10(counter, [0x89ab_cdef, 0x0123_4567])[col % 4];
        let want = word.count_ones() as f32 - 16.0;
        ensure!(got == want, "element {row},{col} is {got}, not {want}");
    }
    Ok(bits(&got).collect())
}

/// A product against that in f64: as many roundings as terms, each at most half an epsilon of the sum of magnitudes.
fn check_product(
    what: &str,
    got: &[f32],
    (a, a_shape, transposed): (&[f32], Shape, bool),
    (b, n): (&[f32], usize),
) -> Result<(), String> {
    let abs = |x: &[f32]| x.iter().map(|x| x.abs()).collect::<Vec<_>>();
    let want = reference::gemm(a, a_shape, transposed, b, n);
    let size = reference::gemm(&abs(a), a_shape, transposed, &abs(b), n);
    let depth = if transposed { a_shape.rows } else { a_shape.cols };
    ensure!(got.len() == want.len(), "{what}: {} elements of {}", got.len(), want.len());
    for (i, ((&got, want), size)) in got.iter().zip(want).zip(size).enumerate() {
        let bound = depth as f64 * f64::from(f32::EPSILON) * size;
        ensure!((f64::from(got) - want).abs() <= bound, "{what}: element {i} is {got:e}, not {want:e}");
    }
    Ok(())
}

/// `gemm`, within its bound.
pub fn gemm<E: Engine>(engine: &E, rows: usize, depth: usize, n: usize, transposed: bool) -> Found {
    let a_shape = if transposed { Shape { rows: depth, cols: rows } } else { Shape { rows, cols: depth } };
    let (a, b) = (noise(1, rows * depth), noise(2, depth * n));
    let product = engine.matrix(&a, a_shape).and_then(|left| {
        let right = engine.matrix(&b, Shape { rows: depth, cols: n })?;
        engine.gemm(&left, transposed, &right)
    });
    let product = product.map_err(failed)?;
    ensure!(engine.shape(&product) == Shape { rows, cols: n }, "the shape is {}", engine.shape(&product));
    let got = engine.read(&product).map_err(failed)?;
    check_product("A B", &got, (&a, a_shape, transposed), (&b, n))?;
    Ok(bits(&got).collect())
}

/// A pair whose difference is `delta`, bit for bit.
pub fn difference<E: Engine>(engine: &E, delta: &[f32], shape: Shape) -> Result<E::Pair, String> {
    let bytes = stored(delta, Dtype::F32);
    pair(engine, (&bytes, Dtype::F32), (&vec![0; bytes.len()], Dtype::F32), shape)
}

/// `sweep` and `back`, within their bounds, and the sums on the way.
pub fn sweep<E: Engine>(engine: &E, rows: usize, cols: usize, l: usize) -> Found {
    let shape = Shape { rows, cols };
    let (d, z) = (noise(9, rows * cols), noise(10, cols * l));
    let pair = difference(engine, &d, shape)?;
    let on = engine.matrix(&z, Shape { rows: cols, cols: l }).map_err(failed)?;
    let mut stats = DeltaStats::default();
    let (y, w) = engine.sweep(&pair, &on, Some(&mut stats)).map_err(failed)?;
    let shapes = (engine.shape(&y), engine.shape(&w));
    ensure!(shapes == (Shape { rows, cols: l }, Shape { rows: cols, cols: l }), "shapes are {shapes:?}");
    ensure!(engine.stats(&pair).map_err(failed)? == stats, "the sums alone are others");
    let back = engine.back(&pair, &y).map_err(failed)?;
    let (again, _) = engine.sweep(&pair, &on, None).map_err(failed)?;
    let read = |m: &E::Matrix| engine.read(m).map_err(failed);
    let (y, w, back, again) = (read(&y)?, read(&w)?, read(&back)?, read(&again)?);
    ensure!(bits(&again).eq(bits(&y)), "a second sweep gives other bits");
    ensure!(bits(&w).eq(bits(&back)), "`back` gives other bits");
    check_product("D Z", &y, (&d, shape, false), (&z, l))?;
    // The way back starts from the Y that came out.
    check_product("D^T Y", &w, (&d, shape, true), (&y, l))?;
    Ok(bits(&y).chain(bits(&w)).collect())
}

/// `gram`: products of two f32 are exact in f64, and only the sums of terms below 1 round. Exactly symmetric.
pub fn gram<E: Engine>(engine: &E, rows: usize, cols: usize) -> Found {
    let shape = Shape { rows, cols };
    let y = noise(3, rows * cols);
    let got = engine.matrix(&y, shape).and_then(|y| engine.gram(&y)).map_err(failed)?;
    let want = reference::gram(&y, shape);
    ensure!(got.len() == want.len(), "{} elements of {}", got.len(), want.len());
    for i in 0..cols {
        for j in 0..cols {
            let (x, w) = (got[i * cols + j], want[i * cols + j]);
            let bound = rows as f64 * rows as f64 * f64::EPSILON;
            ensure!((x - w).abs() <= bound, "element {i},{j} is {x:e}, not {w:e}");
            ensure!(x == got[j * cols + i], "element {i},{j} is not symmetric");
        }
    }
    Ok(got.iter().map(|x| x.to_bits()).collect())
}

/// `apply_right`: one rounding to f32, and f64 sums of `depth` terms below 1.
pub fn apply_right<E: Engine>(engine: &E, rows: usize, depth: usize, cols: usize) -> Found {
    let shape = Shape { rows, cols: depth };
    let y = noise(4, rows * depth);
    let w: Vec<f64> = noise(5, depth * cols).iter().map(|&x| f64::from(x) / 3.0).collect();
    let out = engine.matrix(&y, shape).and_then(|y| engine.apply_right(&y, &w, cols)).map_err(failed)?;
    ensure!(engine.shape(&out) == Shape { rows, cols }, "the shape is {}", engine.shape(&out));
    let got = engine.read(&out).map_err(failed)?;
    let want = reference::apply_right(&y, shape, &w, cols);
    ensure!(got.len() == want.len(), "{} elements of {}", got.len(), want.len());
    for (i, (&got, want)) in got.iter().zip(want).enumerate() {
        let bound = f64::from(f32::EPSILON) / 2.0 * want.abs() + depth as f64 * depth as f64 * f64::EPSILON;
        ensure!((f64::from(got) - want).abs() <= bound, "element {i} is {got:e}, not {want:e}");
    }
    Ok(bits(&got).collect())
}

/// `residual`, where `rest` is the size of what the product misses.
pub fn residual<E: Engine>(engine: &E, rows: usize, cols: usize, rank: usize, rest: f32) -> Found {
    let shape = Shape { rows, cols };
    let (b, a) = (noise(6, rows * rank), noise(7, rank * cols));
    let near = reference::gemm(&b, Shape { rows, cols: rank }, false, &a, cols);
    let delta: Vec<f32> = near.iter().zip(noise(8, rows * cols)).map(|(x, e)| *x as f32 + rest * e).collect();
    let pair = difference(engine, &delta, shape)?;
    let got = engine.matrix(&b, Shape { rows, cols: rank }).and_then(|b| {
        let a = engine.matrix(&a, Shape { rows: rank, cols })?;
        engine.residual(&pair, &b, &a)
    });
    let got = got.map_err(failed)?;
    let want = reference::residual(&delta, shape, &b, &a, rank);
    // In f64 each rest carries `rank` roundings of products below 1, and the sum `rows * cols`.
    let size = (rows * cols) as f64;
    let in_f64 = 4.0 * rank as f64 * f64::EPSILON / f64::from(rest.min(1e-7)) + size * f64::EPSILON;
    // In f32, where the engine may use it, roundings e of half an epsilon of what all products come to, `rank` of them
    // for each element: |d + e|^2 is off by 2 |d| |e| + |e|^2 at the most.
    let square = |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
    let e = rank as f64 * (f64::from(f32::EPSILON) / 2.0).powi(2) * (square(&b) * square(&a) + want);
    let in_f32 = if rest < 1e-5 || want == 0.0 { 0.0 } else { 2.0 * (e / want).sqrt() + e / want };
    let bound = (in_f64 + in_f32) * want;
    ensure!((got - want).abs() <= bound, "{got:e} instead of {want:e}");
    Ok(vec![got.to_bits()])
}

/// `add_low_rank` of terms given by their ranks, to the bit, and its sums.
pub fn add_low_rank<E: Engine>(engine: &E, rows: usize, cols: usize, ranks: &[usize], dtype: Dtype) -> Found {
    let shape = Shape { rows, cols };
    let w = stored(&noise(1, rows * cols), dtype);
    let factors: Vec<(f32, Vec<f32>, Vec<f32>, usize)> = ranks
        .iter()
        .enumerate()
        .map(|(i, &rank)| {
            let mut b = noise(10 + i as u32, rows * rank);
            // Rows of zeros: their weights must keep their bits.
            b.iter_mut().enumerate().filter(|(at, _)| at / rank.max(1) % 3 == 0).for_each(|(_, x)| *x = 0.0);
            // Coefficients that are not exact in binary.
            (0.1 + i as f32 / 3.0, b, noise(20 + i as u32, rank * cols), rank)
        })
        .collect();
    let mut matrices = Vec::new();
    for (c, b, a, rank) in &factors {
        let b = engine.matrix(b, Shape { rows, cols: *rank }).map_err(failed)?;
        matrices.push((*c, b, engine.matrix(a, Shape { rows: *rank, cols }).map_err(failed)?));
    }
    let terms: Vec<_> = matrices.iter().map(|(c, b, a)| (*c, b, a)).collect();
    let mut got = w.clone();
    let stats = engine.add_low_rank(&mut got, dtype, shape, &terms).map_err(failed)?;
    let (mut changed, mut intended, mut realised) = (0, 0.0f64, 0.0f64);
    let size = dtype.bytes();
    for i in 0..rows * cols {
        let (row, col) = (i / cols, i % cols);
        let products: Vec<(f32, f32, f32)> = factors
            .iter()
            .flat_map(|(c, b, a, rank)| (0..*rank).map(move |k| (*c, b[row * rank + k], a[k * cols + col])))
            .collect();
        let want = reference::add_low_rank(&w, dtype, i, &products);
        let found = &got[i * size..(i + 1) * size];
        ensure!(found == want, "element {i} is {found:02x?}, not {want:02x?}");
        let (old, new) = (reference::widen(&w, dtype, i), reference::widen(&want, dtype, 0));
        changed += u64::from(old != new);
        intended += f64::from(products.iter().fold(0.0f32, |s, &(c, b, a)| (c * b).mul_add(a, s))).powi(2);
        realised += (new - old).powi(2);
    }
    ensure!(stats.changed == changed, "{} elements changed, not {changed}", stats.changed);
    check_sum("the intended sum", stats.intended_sumsq, intended, rows * cols)?;
    check_sum("the realised sum", stats.realised_sumsq, realised, rows * cols)?;
    Ok(got.iter().map(|x| u64::from(*x)).chain([stats.intended_sumsq.to_bits()]).collect())
}

/// `pack`, to the bit, ties and denormals included.
pub fn pack<E: Engine>(engine: &E, dtype: Dtype) -> Found {
    let mut values = noise(9, 5000);
    let tie = |power: i32| 1.0 + 2.0f32.powi(power);
    values.extend([0.0, -0.0, tie(-8), 1.0 + 3.0 * 2.0f32.powi(-8), tie(-11), 3e-8, 6e-5, -65504.0]);
    let shape = Shape { rows: 1, cols: values.len() };
    let got = engine.matrix(&values, shape).and_then(|m| engine.pack(&m, dtype)).map_err(failed)?;
    let want = stored(&values, dtype);
    let at = got.iter().zip(&want).position(|(a, b)| a != b);
    ensure!(got.len() == want.len() && at.is_none(), "byte {at:?} of {} is another one", want.len());
    Ok(got.iter().map(|x| u64::from(*x)).collect())
}
