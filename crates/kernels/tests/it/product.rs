//! `sweep`, `forward`, `gemm`, `gram`, `apply_right` and `residual` against f64.

use kernels::{Engine, KernelError, Shape, selftest};

use crate::{check, on_engines};

const ODD: [(usize, usize, usize); 8] =
    [(1, 1, 1), (3, 129, 2), (129, 5, 24), (257, 130, 7), (2, 600, 33), (128, 128, 16), (5, 1, 3), (0, 4, 2)];

#[test]
fn gemm_of_odd_shapes() {
    for (rows, depth, n) in ODD {
        for transposed in [false, true] {
            check!(|engine| selftest::gemm(engine, rows, depth, n, transposed));
        }
    }
}

#[test]
fn gemm_over_nothing_is_zero() {
    on_engines!(|engine| {
        let a = engine.matrix(&[], Shape { rows: 2, cols: 0 }).unwrap();
        let b = engine.matrix(&[], Shape { rows: 0, cols: 3 }).unwrap();
        let product = engine.gemm(&a, false, &b).unwrap();
        assert_eq!(engine.read(&product).unwrap(), [0.0; 6]);
    });
}

#[test]
fn gram_of_odd_shapes() {
    for (rows, cols) in [(1, 1), (129, 3), (2500, 7), (128, 128), (3, 40), (0, 3), (4, 0)] {
        check!(|engine| selftest::gram(engine, rows, cols));
    }
}

#[test]
fn apply_right_of_odd_shapes() {
    for (rows, depth, cols) in ODD {
        check!(|engine| selftest::apply_right(engine, rows, depth, cols));
    }
}

/// A pair whose difference is `delta`, bit for bit.
fn difference<E: Engine>(engine: &E, delta: &[f32], shape: Shape) -> E::Pair {
    selftest::difference(engine, delta, shape).unwrap()
}

#[test]
fn sweep_of_odd_shapes() {
    for (rows, cols) in [(1, 1), (7, 33), (130, 95), (9, 1100), (1030, 64), (260, 2049), (0, 3), (3, 0)] {
        for l in [1, 2, 3, 4, 5, 12, 24, 31] {
            check!(|engine| selftest::sweep(engine, rows, cols, l));
        }
    }
}

#[test]
fn beside_of_matrices_and_of_other_heights() {
    on_engines!(|engine| {
        let m = |data: &[f32], cols| engine.matrix(data, Shape { rows: 2, cols }).unwrap();
        let (a, b) = (m(&[1.0, 2.0], 1), m(&[3.0, 4.0, 5.0, 6.0], 2));
        let both = engine.beside(&[&a, &b]).unwrap();
        assert_eq!(engine.read(&both).unwrap(), [1.0, 3.0, 4.0, 2.0, 5.0, 6.0]);
        let high = engine.matrix(&[0.0; 3], Shape { rows: 3, cols: 1 }).unwrap();
        assert!(matches!(engine.beside(&[&a, &high]), Err(KernelError::ShapeMismatch { .. })));
    });
}

#[test]
fn residual_of_odd_shapes() {
    for (rows, cols, rank) in [(1, 1, 1), (129, 513, 3), (3, 1030, 16), (300, 7, 5), (2, 2, 0), (0, 3, 1)] {
        // Nearly the product itself, so that a product rounded to f32 would show; and far from it.
        for rest in [1e-6, 0.3] {
            check!(|engine| selftest::residual(engine, rows, cols, rank, rest));
        }
    }
}

#[test]
fn products_of_shapes_that_do_not_fit() {
    on_engines!(|engine| {
        let x = engine.matrix(&[0.0; 6], Shape { rows: 2, cols: 3 }).unwrap();
        assert!(matches!(engine.gemm(&x, false, &x), Err(KernelError::ShapeMismatch { .. })));
        assert!(engine.gemm(&x, true, &x).is_ok());
        assert!(matches!(engine.apply_right(&x, &[0.0; 5], 2), Err(KernelError::Length { .. })));
        let pair = difference(engine, &[0.0; 6], Shape { rows: 2, cols: 3 });
        assert!(matches!(engine.residual(&pair, &x, &x), Err(KernelError::ShapeMismatch { .. })));
        assert!(matches!(
            engine.back(&pair, &engine.matrix(&[0.0; 3], Shape { rows: 3, cols: 1 }).unwrap()),
            Err(KernelError::ShapeMismatch { .. })
        ));
        assert!(matches!(engine.sweep(&pair, &x, None), Err(KernelError::ShapeMismatch { .. })));
        assert!(matches!(
            engine.matrix(&[0.0; 5], Shape { rows: 2, cols: 3 }),
            Err(KernelError::Length { .. })
        ));
    });
}
