//! `add_low_rank`: to the bit, with its sums, and what it refuses.

use kernels::{Dtype, Engine, KernelError, Shape, Side, selftest};

use crate::{DTYPES, check, on_engines, stored};

#[track_caller]
fn check(rows: usize, cols: usize, ranks: &[usize], dtype: Dtype) {
    check!(|engine| selftest::add_low_rank(engine, rows, cols, ranks, dtype));
}

#[test]
fn add_low_rank_of_odd_shapes_and_ranks() {
    for (rows, cols) in [(1, 1), (129, 5), (3, 2050), (260, 33), (0, 4)] {
        for ranks in [&[][..], &[1], &[3, 5], &[0, 7, 1]] {
            check(rows, cols, ranks, Dtype::Bf16);
        }
    }
}

#[test]
fn add_low_rank_in_every_format() {
    for dtype in DTYPES {
        check(130, 19, &[4, 2], dtype);
    }
}

#[test]
fn add_low_rank_of_zero_keeps_every_bit() {
    on_engines!(|engine| {
        let shape = Shape { rows: 1, cols: 3 };
        let w = stored(&[-0.0, 0.0, 1.5], Dtype::Bf16);
        let b = engine.matrix(&[1.0], Shape { rows: 1, cols: 1 }).unwrap();
        let a = engine.matrix(&[1.0, -1.0, 2.0], shape).unwrap();
        let mut out = w.clone();
        let stats = engine.add_low_rank(&mut out, Dtype::Bf16, shape, &[(0.0, &b, &a)]).unwrap();
        assert_eq!(out, w);
        assert_eq!((stats.changed, stats.intended_sumsq, stats.realised_sumsq), (0, 0.0, 0.0));
    });
}

#[track_caller]
fn check_refused(w: &[f32], dtype: Dtype, a: f32, want: KernelError) {
    on_engines!(|engine| {
        let shape = Shape { rows: 1, cols: w.len() };
        let b = engine.matrix(&[1.0], Shape { rows: 1, cols: 1 }).unwrap();
        let a = engine.matrix(&vec![a; w.len()], shape).unwrap();
        let result = engine.add_low_rank(&mut stored(w, dtype), dtype, shape, &[(1.0, &b, &a)]);
        assert_eq!(result.unwrap_err(), want);
    });
}

#[test]
fn add_low_rank_refuses_overflow_and_what_is_not_finite() {
    let overflow = |index| KernelError::Overflow { what: "add_low_rank", index };
    check_refused(&[1.0, 65504.0, 65504.0], Dtype::F16, 100.0, overflow(1));
    check_refused(&[0.0, f32::MAX], Dtype::F32, f32::MAX, overflow(1));
    check_refused(&[0.0, 1.0, 3.3e38], Dtype::Bf16, 3e38, overflow(2));
    for bad in [f32::NAN, f32::INFINITY] {
        check_refused(&[0.0, bad], Dtype::Bf16, 1.0, KernelError::NonFinite { side: Side::Target, index: 1 });
    }
    // The first element at fault is named even where a later column block of an earlier row is at fault too.
    on_engines!(|engine| {
        let shape = Shape { rows: 2, cols: 3000 };
        let mut w = vec![0.0; 6000];
        (w[2999], w[3000]) = (f32::NAN, f32::NAN);
        let b = engine.matrix(&[1.0; 2], Shape { rows: 2, cols: 1 }).unwrap();
        let a = engine.matrix(&vec![1.0; 3000], Shape { rows: 1, cols: 3000 }).unwrap();
        let mut w = stored(&w, Dtype::Bf16);
        let error = engine.add_low_rank(&mut w, Dtype::Bf16, shape, &[(1.0, &b, &a)]).unwrap_err();
        assert_eq!(error, KernelError::NonFinite { side: Side::Target, index: 2999 });
    });
}

#[test]
fn add_low_rank_of_shapes_that_do_not_fit() {
    on_engines!(|engine| {
        let (mut w, shape) = ([0; 12], Shape { rows: 2, cols: 3 });
        let b = engine.matrix(&[1.0; 2], Shape { rows: 2, cols: 1 }).unwrap();
        let a = engine.matrix(&[1.0; 2], Shape { rows: 1, cols: 2 }).unwrap();
        let mut add = |dtype, terms: &[_]| engine.add_low_rank(&mut w, dtype, shape, terms);
        assert!(matches!(add(Dtype::Bf16, &[(1.0, &b, &a)]), Err(KernelError::ShapeMismatch { .. })));
        assert!(matches!(add(Dtype::F32, &[]), Err(KernelError::Length { .. })));
        assert!(matches!(
            engine.add_low_rank(&mut [0; 6], Dtype::F8E4M3, shape, &[]),
            Err(KernelError::NotWritten { .. })
        ));
    });
}
