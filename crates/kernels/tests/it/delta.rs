//! `delta`: differences to the bit, sums to rounding, and the elements it refuses.

use std::sync::Arc;

use kernels::{
    CpuEngine, DeltaStats, Dtype, Engine, KernelError, RowReader, Scales, Shape, Side, Unreadable, Weights,
    reference,
};

use crate::{DTYPES, bits, noise, on_any_threads, pair, stored};

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
        let pair = pair(engine, (&a, aligned), (&d, degraded), shape);
        assert_eq!(engine.pair_shape(&pair), shape);
        let (delta, stats) = engine.delta(&pair).unwrap();
        assert_eq!(engine.stats(&pair).unwrap(), stats);
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
            Dtype::F8E4M3 | Dtype::F8E5M2 => unreachable!(),
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
    let (aligned, degraded) = if side == Side::Aligned { (&bad, &good) } else { (&good, &bad) };
    let pair = pair(&engine, (&stored(aligned, dtype), dtype), (&stored(degraded, dtype), dtype), shape);
    let refusal = KernelError::NonFinite { side, index: at as u64 };
    assert_eq!(engine.delta(&pair).unwrap_err(), refusal);
    assert_eq!(engine.stats(&pair).unwrap_err(), refusal);
    let z = engine.sketch(Shape { rows: shape.cols, cols: 3 }, 1, 1).unwrap();
    assert_eq!(engine.sweep(&pair, &z, Some(&mut DeltaStats::default())).unwrap_err(), refusal);
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
    let bytes = stored(&[0.0, f32::INFINITY], Dtype::Bf16);
    let error =
        engine.delta(&pair(&engine, (&bytes, Dtype::Bf16), (&bytes, Dtype::Bf16), shape)).unwrap_err();
    assert_eq!(error, KernelError::NonFinite { side: Side::Aligned, index: 1 });
}

#[test]
fn delta_beyond_the_range_of_f32() {
    let engine = CpuEngine::new();
    let shape = Shape { rows: 1, cols: 1 };
    let (a, d) = (f32::MAX.to_le_bytes(), f32::MIN.to_le_bytes());
    let error = engine.delta(&pair(&engine, (&a, Dtype::F32), (&d, Dtype::F32), shape)).unwrap_err();
    assert_eq!(error, KernelError::Overflow { what: "delta", index: 0 });
}

#[test]
fn weights_of_another_length_and_shapes_that_differ() {
    let engine = CpuEngine::new();
    let shape = Shape { rows: 2, cols: 3 };
    let error = Weights::copied(&[0; 11], Dtype::Bf16, shape).unwrap_err();
    assert_eq!(error, KernelError::Length { what: "bytes of weights", shape, need: 12, found: 11 });
    let huge = Shape { rows: usize::MAX, cols: 2 };
    assert_eq!(
        Weights::copied(&[], Dtype::Bf16, huge).unwrap_err(),
        KernelError::ShapeOverflow { shape: huge }
    );
    let weights = |shape| Weights::copied(&[0; 12], Dtype::Bf16, shape).unwrap();
    assert!(matches!(
        engine.pair(weights(shape), weights(shape.transposed())),
        Err(KernelError::ShapeMismatch { .. })
    ));
}

fn scales(shape: Shape, block: [usize; 2], origin: [usize; 2], seed: u32) -> Scales {
    let grid_cols = (shape.cols + origin[1]).div_ceil(block[1]);
    let n = (shape.rows + origin[0]).div_ceil(block[0]) * grid_cols;
    Scales { grid: noise(seed, n).iter().map(|x| x.abs() + 0.1).collect(), grid_cols, block, origin }
}

#[test]
fn delta_of_8_bit_weights_with_block_scales() {
    let engine = CpuEngine::new();
    let shape = Shape { rows: 37, cols: 1300 };
    let n = shape.len().unwrap();
    // Every finite pattern of bits occurs.
    let finite = |seed, dtype| -> Vec<u8> {
        noise(seed, n)
            .iter()
            .map(|x| (x.to_bits() >> 8) as u8)
            .map(|x| if reference::widen(&[x], dtype, 0).is_finite() { x } else { 0 })
            .collect()
    };
    for (aligned, degraded) in
        [(Dtype::F8E4M3, Dtype::F8E4M3), (Dtype::F8E5M2, Dtype::F8E4M3), (Dtype::F8E4M3, Dtype::F8E5M2)]
    {
        let (a, d) = (finite(1, aligned), finite(2, degraded));
        let (sa, sd) = (scales(shape, [16, 128], [0, 0], 3), scales(shape, [8, 100], [5, 70], 4));
        let weights = |bytes: &[u8], dtype, scales: &Scales| {
            Weights::copied(bytes, dtype, shape).unwrap().scaled(scales.clone()).unwrap()
        };
        let pair = engine.pair(weights(&a, aligned, &sa), weights(&d, degraded, &sd)).unwrap();
        let (delta, stats) = engine.delta(&pair).unwrap();
        let delta = engine.read(&delta).unwrap();
        let mut ulp_sumsq = 0.0;
        for (i, got) in delta.iter().enumerate() {
            let value = |bytes: &[u8], dtype, scales: &Scales| {
                reference::widen(bytes, dtype, i) as f32 * scales.at(i / shape.cols, i % shape.cols)
            };
            let want = value(&a, aligned, &sa) - value(&d, degraded, &sd);
            assert_eq!(got.to_bits(), want.to_bits(), "element {i}, {aligned:?} - {degraded:?}");
            let (lowest, fraction) = if degraded == Dtype::F8E4M3 { (-6, 3) } else { (-14, 2) };
            let exponent = (reference::widen(&d, degraded, i).abs().log2().floor() as i32).max(lowest);
            let scale = f64::from(sd.at(i / shape.cols, i % shape.cols));
            ulp_sumsq += (2.0f64.powi(exponent - fraction) * scale).powi(2);
        }
        assert!((stats.ulp_sumsq - ulp_sumsq).abs() <= 2.0 * n as f64 * f64::EPSILON * ulp_sumsq);
    }
    let short = Scales { grid: vec![1.0; 3], grid_cols: 2, block: [32, 650], origin: [0, 0] };
    let weights = Weights::copied(&vec![0; n], Dtype::F8E4M3, shape).unwrap();
    assert!(matches!(weights.scaled(short), Err(KernelError::Length { what: "scales", .. })));
}

/// Gives rows of bytes, until it is asked for one past `fails_from`.
struct Reader(Vec<u8>, usize, usize);

impl RowReader for Reader {
    fn read(&self, first_row: usize, out: &mut [u8]) -> Result<(), Unreadable> {
        let start = first_row * self.1;
        if start + out.len() > self.2 * self.1 {
            return Err(Unreadable);
        }
        out.copy_from_slice(&self.0[start..][..out.len()]);
        Ok(())
    }
}

#[test]
fn rows_that_are_read_give_what_rows_in_memory_give() {
    let engine = CpuEngine::new();
    let shape = Shape { rows: 700, cols: 513 };
    let n = shape.len().unwrap();
    let (a, d) = (stored(&noise(1, n), Dtype::Bf16), stored(&noise(2, n), Dtype::F32));
    let held = pair(&engine, (&a, Dtype::Bf16), (&d, Dtype::F32), shape);
    let read = |rows: usize| {
        let weights = Weights::read(Arc::new(Reader(d.clone(), 513 * 4, rows)), Dtype::F32, shape).unwrap();
        engine.pair(Weights::copied(&a, Dtype::Bf16, shape).unwrap(), weights).unwrap()
    };
    let z = engine.sketch(Shape { rows: 513, cols: 5 }, 1, 2).unwrap();
    let all = |pair| {
        let (mut stats, b) =
            (DeltaStats::default(), engine.sketch(Shape { rows: 700, cols: 2 }, 3, 4).unwrap());
        let (y, w) = engine.sweep(pair, &z, Some(&mut stats)).unwrap();
        let a = engine.sketch(Shape { rows: 2, cols: 513 }, 3, 4).unwrap();
        let [y, w] = [y, w].map(|x| bits(&engine.read(&x).unwrap()));
        (y, w, stats, engine.residual(pair, &b, &a).unwrap())
    };
    assert!(all(&held) == all(&read(700)));
    let refused = engine.stats(&read(650)).unwrap_err();
    assert!(matches!(refused, KernelError::Unread { side: Side::Degraded, .. }), "{refused}");
}
