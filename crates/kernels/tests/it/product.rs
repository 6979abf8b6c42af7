//! `sweep`, `forward`, `gemm`, `gram`, `apply_right` and `residual` against f64.

use kernels::{CpuEngine, DeltaStats, Dtype, Engine, KernelError, Shape, reference};

use crate::{bits, noise, on_any_threads, pair};

const ODD: [(usize, usize, usize); 8] =
    [(1, 1, 1), (3, 129, 2), (129, 5, 24), (257, 130, 7), (2, 600, 33), (128, 128, 16), (5, 1, 3), (0, 4, 2)];

#[track_caller]
fn check_gemm(engine: &impl Engine, rows: usize, depth: usize, n: usize, a_transposed: bool) {
    let a_shape = if a_transposed { Shape { rows: depth, cols: rows } } else { Shape { rows, cols: depth } };
    let (a, b) = (noise(1, rows * depth), noise(2, depth * n));
    let got = on_any_threads(|| {
        let a = engine.matrix(&a, a_shape).unwrap();
        let b = engine.matrix(&b, Shape { rows: depth, cols: n }).unwrap();
        let product = engine.gemm(&a, a_transposed, &b).unwrap();
        assert_eq!(engine.shape(&product), Shape { rows, cols: n });
        bits(&engine.read(&product).unwrap())
    });
    let want = reference::gemm(&a, a_shape, a_transposed, &b, n);
    let abs = |x: &[f32]| x.iter().map(|x| x.abs()).collect::<Vec<_>>();
    let size = reference::gemm(&abs(&a), a_shape, a_transposed, &abs(&b), n);
    assert_eq!(got.len(), want.len());
    for (i, ((&got, want), size)) in got.iter().zip(want).zip(size).enumerate() {
        // `depth` products and sums, each rounded by at most half an epsilon of the sum of magnitudes.
        let bound = depth as f64 * f64::from(f32::EPSILON) * size;
        let got = f64::from(f32::from_bits(got));
        assert!((got - want).abs() <= bound, "{rows}x{depth}x{n} {a_transposed}: {i}: {got} for {want}");
    }
}

#[test]
fn gemm_of_odd_shapes() {
    for (rows, depth, n) in ODD {
        check_gemm(&CpuEngine::new(), rows, depth, n, false);
        check_gemm(&CpuEngine::new(), rows, depth, n, true);
    }
}

#[test]
fn gemm_over_nothing_is_zero() {
    let engine = CpuEngine::new();
    let a = engine.matrix(&[], Shape { rows: 2, cols: 0 }).unwrap();
    let b = engine.matrix(&[], Shape { rows: 0, cols: 3 }).unwrap();
    let product = engine.gemm(&a, false, &b).unwrap();
    assert_eq!(engine.read(&product).unwrap(), [0.0; 6]);
}

#[track_caller]
fn check_gram(engine: &impl Engine, rows: usize, cols: usize) {
    let shape = Shape { rows, cols };
    let y = noise(3, rows * cols);
    let got = on_any_threads(|| engine.gram(&engine.matrix(&y, shape).unwrap()).unwrap());
    let want = reference::gram(&y, shape);
    for i in 0..cols {
        for j in 0..cols {
            let (x, w) = (got[i * cols + j], want[i * cols + j]);
            // Products of two f32 are exact in f64; only the `rows` sums of terms below 1 round.
            assert!(
                (x - w).abs() <= rows as f64 * rows as f64 * f64::EPSILON,
                "{shape}: {i},{j}: {x} for {w}"
            );
            assert!(x == got[j * cols + i], "{shape}: {i},{j} is not symmetric");
        }
    }
}

#[test]
fn gram_of_odd_shapes() {
    for (rows, cols) in [(1, 1), (129, 3), (2500, 7), (128, 128), (3, 40), (0, 3), (4, 0)] {
        check_gram(&CpuEngine::new(), rows, cols);
    }
}

#[track_caller]
fn check_apply_right(engine: &impl Engine, rows: usize, depth: usize, cols: usize) {
    let shape = Shape { rows, cols: depth };
    let y = noise(4, rows * depth);
    let w: Vec<f64> = noise(5, depth * cols).iter().map(|&x| f64::from(x) / 3.0).collect();
    let got = on_any_threads(|| {
        let out = engine.apply_right(&engine.matrix(&y, shape).unwrap(), &w, cols).unwrap();
        assert_eq!(engine.shape(&out), Shape { rows, cols });
        bits(&engine.read(&out).unwrap())
    });
    for (i, (got, want)) in got.iter().zip(reference::apply_right(&y, shape, &w, cols)).enumerate() {
        let got = f64::from(f32::from_bits(*got));
        // One rounding to f32, and f64 sums of `depth` terms below 1.
        let bound = f64::from(f32::EPSILON) / 2.0 * want.abs() + depth as f64 * depth as f64 * f64::EPSILON;
        assert!((got - want).abs() <= bound, "{rows}x{depth}x{cols}: {i}: {got} for {want}");
    }
}

#[test]
fn apply_right_of_odd_shapes() {
    for (rows, depth, cols) in ODD {
        check_apply_right(&CpuEngine::new(), rows, depth, cols);
    }
}

/// A pair whose difference is `delta`, bit for bit.
fn difference<E: Engine>(engine: &E, delta: &[f32], shape: Shape) -> E::Pair {
    let bytes: Vec<u8> = delta.iter().flat_map(|x| x.to_le_bytes()).collect();
    pair(engine, (&bytes, Dtype::F32), (&vec![0; bytes.len()], Dtype::F32), shape)
}

/// `rest` is the size of what the product misses.
#[track_caller]
fn check_residual(engine: &impl Engine, rows: usize, cols: usize, rank: usize, rest: f32) {
    let shape = Shape { rows, cols };
    let (b, a) = (noise(6, rows * rank), noise(7, rank * cols));
    let near = reference::gemm(&b, Shape { rows, cols: rank }, false, &a, cols);
    let delta: Vec<f32> = near.iter().zip(noise(8, rows * cols)).map(|(x, e)| *x as f32 + rest * e).collect();
    let got = on_any_threads(|| {
        let pair = difference(engine, &delta, shape);
        let b = engine.matrix(&b, Shape { rows, cols: rank }).unwrap();
        let a = engine.matrix(&a, Shape { rows: rank, cols }).unwrap();
        engine.residual(&pair, &b, &a).unwrap()
    });
    let want = reference::residual(&delta, shape, &b, &a, rank);
    // In f64 each rest carries `rank` roundings of products below 1, and the sum `rows * cols`.
    let size = (rows * cols) as f64;
    let in_f64 = 4.0 * rank as f64 * f64::EPSILON / f64::from(rest.min(1e-7)) + size * f64::EPSILON;
    // In f32, where the engine may use it, roundings e of half an epsilon of what all products come to, `rank` of them
    // for each element: |d + e|^2 is off by 2 |d| |e| + |e|^2 at the most.
    let square = |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
    let e = rank as f64 * (f64::from(f32::EPSILON) / 2.0).powi(2) * (square(&b) * square(&a) + want);
    let in_f32 = if rest < 1e-5 || want == 0.0 { 0.0 } else { 2.0 * (e / want).sqrt() + e / want };
    let rel = in_f64 + in_f32;
    assert!((got - want).abs() <= rel * want, "{shape} rank {rank}: {got} for {want}");
}

#[track_caller]
fn check_sweep(engine: &impl Engine, rows: usize, cols: usize, l: usize) {
    let shape = Shape { rows, cols };
    let (d, z) = (noise(9, rows * cols), noise(10, cols * l));
    let (y, w, back) = on_any_threads(|| {
        let pair = difference(engine, &d, shape);
        let z = engine.matrix(&z, Shape { rows: cols, cols: l }).unwrap();
        let mut stats = DeltaStats::default();
        let (y, w) = engine.sweep(&pair, &z, Some(&mut stats)).unwrap();
        assert_eq!(
            (engine.shape(&y), engine.shape(&w)),
            (Shape { rows, cols: l }, Shape { rows: cols, cols: l })
        );
        assert_eq!(stats, engine.stats(&pair).unwrap());
        let back = engine.back(&pair, &y).unwrap();
        assert_eq!(engine.shape(&back), engine.shape(&w));
        let (again, _) = engine.sweep(&pair, &z, None).unwrap();
        assert_eq!(bits(&engine.read(&again).unwrap()), bits(&engine.read(&y).unwrap()));
        (engine.read(&y).unwrap(), engine.read(&w).unwrap(), engine.read(&back).unwrap())
    });
    assert_eq!(bits(&w), bits(&back));
    let abs = |x: &[f32]| x.iter().map(|x| x.abs()).collect::<Vec<_>>();
    let want = reference::gemm(&d, shape, false, &z, l);
    let size = reference::gemm(&abs(&d), shape, false, &abs(&z), l);
    // As many roundings as terms, each at most half an epsilon of the sum of magnitudes.
    for (i, ((&got, want), size)) in y.iter().zip(&want).zip(&size).enumerate() {
        let bound = cols as f64 * f64::from(f32::EPSILON) * size;
        assert!((f64::from(got) - want).abs() <= bound, "{shape} x {l}: {i}: {got} for {want}");
    }
    // The way back starts from the Y that came out.
    let y_shape = Shape { rows, cols: l };
    let want = reference::gemm(&d, shape, true, &y, l);
    let size = reference::gemm(&abs(&d), shape, true, &abs(&y), l);
    assert_eq!((w.len(), engine.shape(&engine.matrix(&y, y_shape).unwrap())), (want.len(), y_shape));
    for (i, ((&got, want), size)) in w.iter().zip(&want).zip(&size).enumerate() {
        let bound = rows as f64 * f64::from(f32::EPSILON) * size;
        assert!((f64::from(got) - want).abs() <= bound, "{shape} x {l}: back: {i}: {got} for {want}");
    }
}

#[test]
fn sweep_of_odd_shapes() {
    for (rows, cols) in [(1, 1), (7, 33), (130, 95), (9, 1100), (1030, 64), (260, 2049), (0, 3), (3, 0)] {
        for l in [1, 2, 3, 4, 5, 12, 24, 31] {
            check_sweep(&CpuEngine::new(), rows, cols, l);
        }
    }
}

#[test]
fn beside_of_matrices_and_of_other_heights() {
    let engine = CpuEngine::new();
    let m = |data: &[f32], cols| engine.matrix(data, Shape { rows: 2, cols }).unwrap();
    let (a, b) = (m(&[1.0, 2.0], 1), m(&[3.0, 4.0, 5.0, 6.0], 2));
    let both = engine.beside(&[&a, &b]).unwrap();
    assert_eq!(engine.read(&both).unwrap(), [1.0, 3.0, 4.0, 2.0, 5.0, 6.0]);
    let high = engine.matrix(&[0.0; 3], Shape { rows: 3, cols: 1 }).unwrap();
    assert!(matches!(engine.beside(&[&a, &high]), Err(KernelError::ShapeMismatch { .. })));
}

#[test]
fn residual_of_odd_shapes() {
    for (rows, cols, rank) in [(1, 1, 1), (129, 513, 3), (3, 1030, 16), (300, 7, 5), (2, 2, 0), (0, 3, 1)] {
        // Nearly the product itself, so that a product rounded to f32 would show; and far from it.
        for rest in [1e-6, 0.3] {
            check_residual(&CpuEngine::new(), rows, cols, rank, rest);
        }
    }
}

#[test]
fn products_of_shapes_that_do_not_fit() {
    let engine = CpuEngine::new();
    let x = engine.matrix(&[0.0; 6], Shape { rows: 2, cols: 3 }).unwrap();
    assert!(matches!(engine.gemm(&x, false, &x), Err(KernelError::ShapeMismatch { .. })));
    assert!(engine.gemm(&x, true, &x).is_ok());
    assert!(matches!(engine.apply_right(&x, &[0.0; 5], 2), Err(KernelError::Length { .. })));
    let pair = difference(&engine, &[0.0; 6], Shape { rows: 2, cols: 3 });
    assert!(matches!(engine.residual(&pair, &x, &x), Err(KernelError::ShapeMismatch { .. })));
    assert!(matches!(
        engine.back(&pair, &engine.matrix(&[0.0; 3], Shape { rows: 3, cols: 1 }).unwrap()),
        Err(KernelError::ShapeMismatch { .. })
    ));
    assert!(matches!(engine.sweep(&pair, &x, None), Err(KernelError::ShapeMismatch { .. })));
    assert!(matches!(engine.matrix(&[0.0; 5], Shape { rows: 2, cols: 3 }), Err(KernelError::Length { .. })));
}
