//! `delta`: differences to the bit, sums to rounding, and the elements it refuses.

use kernels::{CpuEngine, Dtype, Engine, KernelError, Shape, Side, reference};

use crate::{DTYPES, bits, noise, on_any_threads, stored};

#[track_caller]
fn check(engine: &impl Engine, shape: Shape, aligned: Dtype, degraded: Dtype) {
    let n = shape.len().unwrap();
    let base = noise(1, n);
    // Changes of very different sizes, and every fifth element the same.
    let moved: Vec<f32> = base
        .iter()
        .zip(noise(2, n))
        .enumerate()
        .map(|(i, (x, change))| if i % 5 == 0 { *x } else { x + change * 0.01f32.powi(i as i32 % 3) })
        .collect();
    let (a, d) = (stored(&moved, aligned), stored(&base, degraded));
    let (got, stats) = on_any_threads(|| {
        let (delta, stats) = engine
            .delta(&engine.raw(&a, aligned, shape).unwrap(), &engine.raw(&d, degraded, shape).unwrap())
            .unwrap();
        assert_eq!(engine.shape(&delta), shape);
        (bits(&engine.read(&delta).unwrap()), stats)
    });
    let (mut sumsq, mut ulp_sumsq, mut max_abs, mut nonzero) = (0.0f64, 0.0f64, 0.0f32, 0);
    for (i, &got) in got.iter().enumerate() {
        let (x, y) = (reference::widen(&a, aligned, i), reference::widen(&d, degraded, i));
        let want = reference::delta(x, y);
        assert_eq!(got, want.to_bits(), "element {i} of {shape}, {aligned:?} - {degraded:?}");
        sumsq += f64::from(want).powi(2);
        let fraction = match degraded {
            Dtype::F64 => 52,
            Dtype::F32 => 23,
            Dtype::F16 => 10,
            Dtype::Bf16 => 7,
        };
        let lowest = if degraded == Dtype::F16 { -14 } else { -126 };
        let exponent = (y.abs().log2().floor() as i32).max(lowest);
        ulp_sumsq += 2.0f64.powi(2 * (exponent - fraction));
        max_abs = max_abs.max(want.abs());
        nonzero += u64::from(x != y);
    }
    // All terms positive: n roundings on each side bound the relative error of a sum.
    let rel = 2.0 * n as f64 * f64::EPSILON;
    assert!((stats.sumsq - sumsq).abs() <= rel * sumsq, "{} for {sumsq}", stats.sumsq);
    assert!((stats.ulp_sumsq - ulp_sumsq).abs() <= rel * ulp_sumsq, "{} for {ulp_sumsq}", stats.ulp_sumsq);
    assert_eq!((stats.max_abs, stats.nonzero, stats.elements), (max_abs, nonzero, n as u64));
}

#[test]
fn delta_of_odd_shapes() {
    for (rows, cols) in [(1, 1), (1, 7), (129, 3), (3, 1025), (260, 131), (0, 5), (5, 0)] {
        check(&CpuEngine::new(), Shape { rows, cols }, Dtype::Bf16, Dtype::Bf16);
    }
}

#[test]
fn delta_of_every_pair_of_formats() {
    for aligned in DTYPES {
        for degraded in DTYPES {
            check(&CpuEngine::new(), Shape { rows: 130, cols: 17 }, aligned, degraded);
        }
    }
}

#[track_caller]
fn check_refused(at: usize, side: Side, value: f32, dtype: Dtype) {
    let engine = CpuEngine::new();
    let shape = Shape { rows: 300, cols: 11 };
    let good = noise(3, shape.len().unwrap());
    let mut bad = good.clone();
    bad[at] = value;
    // A later one must not be named instead.
    *bad.last_mut().unwrap() = f32::NAN;
    let raw = |x: &[f32]| engine.raw(&stored(x, dtype), dtype, shape).unwrap();
    let result = match side {
        Side::Aligned => engine.delta(&raw(&bad), &raw(&good)),
        _ => engine.delta(&raw(&good), &raw(&bad)),
    };
    assert_eq!(result.unwrap_err(), KernelError::NonFinite { side, index: at as u64 });
}

#[test]
fn delta_refuses_what_is_not_finite_by_side_and_index() {
    for dtype in DTYPES {
        for at in [0, 1500, 3298] {
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                check_refused(at, Side::Aligned, value, dtype);
                check_refused(at, Side::Degraded, value, dtype);
            }
        }
    }
}

#[test]
fn delta_refuses_infinities_that_would_cancel() {
    let engine = CpuEngine::new();
    let shape = Shape { rows: 1, cols: 2 };
    let raw = engine.raw(&stored(&[0.0, f32::INFINITY], Dtype::Bf16), Dtype::Bf16, shape).unwrap();
    let error = engine.delta(&raw, &raw).unwrap_err();
    assert_eq!(error, KernelError::NonFinite { side: Side::Aligned, index: 1 });
}

#[test]
fn delta_beyond_the_range_of_f32() {
    let engine = CpuEngine::new();
    let shape = Shape { rows: 1, cols: 1 };
    let raw = |x: f32| engine.raw(&x.to_le_bytes(), Dtype::F32, shape).unwrap();
    let error = engine.delta(&raw(f32::MAX), &raw(f32::MIN)).unwrap_err();
    assert_eq!(error, KernelError::Overflow { what: "delta", index: 0 });
}

#[test]
fn raw_of_another_length_and_shapes_that_differ() {
    let engine = CpuEngine::new();
    let shape = Shape { rows: 2, cols: 3 };
    let error = engine.raw(&[0; 11], Dtype::Bf16, shape).unwrap_err();
    assert_eq!(error, KernelError::Length { what: "bytes of weights", shape, need: 12, found: 11 });
    let huge = Shape { rows: usize::MAX, cols: 2 };
    assert_eq!(engine.raw(&[], Dtype::Bf16, huge).unwrap_err(), KernelError::ShapeOverflow { shape: huge });
    let raw = engine.raw(&[0; 12], Dtype::Bf16, shape).unwrap();
    let turned = engine.raw(&[0; 12], Dtype::Bf16, shape.transposed()).unwrap();
    assert!(matches!(engine.delta(&raw, &turned), Err(KernelError::ShapeMismatch { .. })));
}
