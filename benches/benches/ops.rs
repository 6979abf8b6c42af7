//! The engine's operations one by one, on all threads, beside a product of the GEMM library and a plain copy.
//!
//! Names are `op_dtype/shape`; rates are input bytes a second for passes over a pair, multiplications and additions a
//! second ("elements") for products. Before an operation is timed its result is held against the reference, in f64, on
//! a few of its elements, and its digest is printed: a faster wrong answer shows. `cargo test --benches` runs tiny sizes.
//!
//!     cargo bench -p benches --bench ops

#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kernels::{
    CpuEngine, CpuMatrix, CpuPair, Dtype, Engine, Shape, Weights, bf16_bits, philox4x32_10, reference,
};
use lowrank::{Factor, Rank};
use xxhash_rust::xxh3::xxh3_64;

/// Numbers in [-1, 1), from a counter.
fn noise(seed: u32, n: usize) -> Vec<f32> {
    (0..n.div_ceil(4) as u32)
        .flat_map(|i| philox4x32_10([i, 0, 0, 0], [seed, 77]))
        .map(|word| word as i32 as f32 / 2.0f32.powi(31))
        .take(n)
        .collect()
}

fn stored(seed: u32, n: usize, dtype: Dtype) -> Vec<u8> {
    let values = noise(seed, n);
    match dtype {
        Dtype::Bf16 => values.iter().flat_map(|&x| bf16_bits(x).to_le_bytes()).collect(),
        // Every code but the two that are no number.
        _ => values.iter().map(|x| (x.to_bits() >> 12) as u8 & 0xf7).collect(),
    }
}

struct Case {
    engine: CpuEngine,
    pair: CpuPair,
    shape: Shape,
    bytes: [Vec<u8>; 2],
    dtype: Dtype,
}

impl Case {
    fn new(shape: Shape, dtype: Dtype) -> Case {
        let (engine, n) = (CpuEngine::new(), shape.rows * shape.cols);
        let bytes = [stored(1, n, dtype), stored(2, n, dtype)];
        let side = |bytes: &[u8]| Weights::copied(bytes, dtype, shape).unwrap();
        let pair = engine.pair(side(&bytes[0]), side(&bytes[1])).unwrap();
        Case { engine, pair, shape, bytes, dtype }
    }

    fn matrix(&self, rows: usize, cols: usize) -> CpuMatrix {
        self.engine.matrix(&noise(3, rows * cols), Shape { rows, cols }).unwrap()
    }

    fn difference(&self, row: usize, col: usize) -> f64 {
        let at = row * self.shape.cols + col;
        let [a, d] = [0, 1].map(|side| reference::widen(&self.bytes[side], self.dtype, at));
        f64::from(reference::delta(a, d))
    }
}

fn digest(what: &str, values: &[f32]) {
    println!(
        "{what}: digest {:016x}",
        xxh3_64(&values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>())
    );
}

fn ops(criterion: &mut Criterion) {
    // Criterion is given `--test` by `cargo test`.
    let tiny = std::env::args().any(|arg| arg == "--test") || !std::env::args().any(|arg| arg == "--bench");
    let shapes = if tiny {
        vec![Shape { rows: 70, cols: 130 }]
    } else {
        vec![
            Shape { rows: 4864, cols: 896 },
            Shape { rows: 896, cols: 4864 },
            Shape { rows: 4096, cols: 4096 },
            Shape { rows: 768, cols: 2048 },
        ]
    };
    limits(criterion, tiny);
    for shape in shapes {
        for dtype in [Dtype::Bf16, Dtype::F8E4M3] {
            passes(criterion, &Case::new(shape, dtype));
        }
    }
}

/// What the machine can do, in the same run.
fn limits(criterion: &mut Criterion, tiny: bool) {
    let (side, n) = if tiny { (64, 16) } else { (2048, 512) };
    let engine = CpuEngine::new();
    let a = engine.matrix(&noise(1, side * side), Shape { rows: side, cols: side }).unwrap();
    let b = engine.matrix(&noise(2, side * n), Shape { rows: side, cols: n }).unwrap();
    let mut group = criterion.benchmark_group("limit");
    group.throughput(Throughput::Elements(2 * (side * side * n) as u64));
    group.bench_function(format!("gemm_f32/{side}x{side}x{n}"), |bench| {
        bench.iter(|| engine.gemm(&a, false, &b).unwrap())
    });
    let from = vec![1u8; if tiny { 1000 } else { 64 << 20 }];
    let mut to = vec![2u8; from.len()];
    group.throughput(Throughput::Bytes(from.len() as u64));
    group.bench_function("copy", |bench| bench.iter(|| black_box(&mut to).copy_from_slice(black_box(&from))));
    group.finish();
}

fn passes(criterion: &mut Criterion, case: &Case) {
    let Case { engine, pair, shape, .. } = case;
    let Shape { rows, cols } = *shape;
    let name = |op: &str, more: &str| format!("{op}_{:?}/{rows}x{cols}{more}", case.dtype).to_lowercase();
    let mut group = criterion.benchmark_group("pass");
    group.sample_size(10);
    let bytes = (2 * rows * cols * case.dtype.bytes()) as u64;
    let elements = (rows * cols) as u64;

    let (delta, stats) = engine.delta(pair).unwrap();
    let delta = engine.read(&delta).unwrap();
    for (row, col) in [(0, 0), (rows - 1, cols - 1), (rows / 2, cols / 3)] {
        assert_eq!(f64::from(delta[row * cols + col]), case.difference(row, col));
    }
    let exact: f64 = delta.iter().map(|&x| f64::from(x).powi(2)).sum();
    assert!((stats.sumsq / exact - 1.0).abs() < 1e-12);
    digest(&name("delta", ""), &delta);
    group.throughput(Throughput::Bytes(bytes));
    group.bench_function(name("stats", ""), |bench| bench.iter(|| engine.stats(pair).unwrap()));

    for l in [18, 72] {
        let z = case.matrix(cols, l);
        let (y, w) = engine.sweep(pair, &z, None).unwrap();
        let (y, w, z_values) = (engine.read(&y).unwrap(), engine.read(&w).unwrap(), engine.read(&z).unwrap());
        for (row, j) in [(0, 0), (rows - 1, l - 1)] {
            let terms = (0..cols).map(|k| case.difference(row, k) * f64::from(z_values[k * l + j]));
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()));
            let bound = cols as f64 * f64::from(f32::EPSILON) * size;
            assert!((f64::from(y[row * l + j]) - sum).abs() <= bound, "sweep: {row}, {j}");
        }
        digest(&name("sweep", &format!("x{l}")), &w);
        group.throughput(Throughput::Elements(4 * elements * l as u64));
        group.bench_function(name("sweep", &format!("x{l}")), |bench| {
            bench.iter(|| engine.sweep(pair, &z, None).unwrap())
        });
    }

    let rank = 16;
    let (b, a) = (case.matrix(rows, rank), case.matrix(rank, cols));
    let residual = engine.residual(pair, &b, &a).unwrap();
    let want =
        reference::residual(&delta, *shape, &engine.read(&b).unwrap(), &engine.read(&a).unwrap(), rank);
    // What the engine may leave to f32 roundings.
    assert!((residual / want - 1.0).abs() < 2e-6, "residual {residual} for {want}");
    group.throughput(Throughput::Elements(2 * elements * rank as u64));
    group.bench_function(name("residual", &format!("x{rank}")), |bench| {
        bench.iter(|| engine.residual(pair, &b, &a).unwrap())
    });

    if case.dtype == Dtype::Bf16 {
        let mut w = case.bytes[0].clone();
        group.throughput(Throughput::Elements(2 * elements * rank as u64));
        let terms = [(1e-3, &b, &a)];
        group.bench_function(name("add_low_rank", &format!("x{rank}")), |bench| {
            bench.iter(|| engine.add_low_rank(&mut w, case.dtype, *shape, &terms).unwrap())
        });
        let how = Factor::new(Rank::Fixed(rank), 0);
        let operations = 4 * how.blocks * how.width();
        group.throughput(Throughput::Elements(elements * operations as u64));
        group.bench_function(name("factor", &format!("x{rank}")), |bench| {
            bench.iter(|| lowrank::factor(engine, pair, 1, &how).unwrap())
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().measurement_time(std::time::Duration::from_secs(2)).warm_up_time(std::time::Duration::from_millis(500));
    targets = ops
}
criterion_main!(benches);
