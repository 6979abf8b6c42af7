//! `delta`: differences to the bit, sums to rounding, and the elements it refuses.

use std::sync::Arc;

use kernels::{
    DeltaStats, Dtype, Engine, KernelError, RowReader, Scales, Shape, Side, Unreadable, Weights, reference,
    selftest,
};

use crate::{DTYPES, bits, check, noise, on_engines, pair, stored};

#[track_caller]
fn check(shape: Shape, aligned: Dtype, degraded: Dtype) {
    check!(|engine| selftest::delta(engine, shape, aligned, degraded));
}

#[test]
fn delta_of_odd_shapes() {
    for (rows, cols) in [(1, 1), (1, 7), (129, 3), (3, 1025), (260, 131), (0, 5), (5, 0)] {
        check(Shape { rows, cols }, Dtype::Bf16, Dtype::Bf16);
    }
}

#[test]
fn delta_of_every_pair_of_formats() {
    for aligned in DTYPES {
        for degraded in DTYPES {
            check(Shape { rows: 130, cols: 17 }, aligned, degraded);
        }
    }
}

#[track_caller]
fn check_refused(at: usize, side: Side, value: f32, dtype: Dtype) {
    on_engines!(|engine| {
        let shape = Shape { rows: 300, cols: 11 };
        let good = noise(3, shape.len().unwrap());
        let mut bad = good.clone();
        bad[at] = value;
        // A later one must not be named instead.
        *bad.last_mut().unwrap() = f32::NAN;
        let (aligned, degraded) = if side == Side::Aligned { (&bad, &good) } else { (&good, &bad) };
        let pair = pair(engine, (&stored(aligned, dtype), dtype), (&stored(degraded, dtype), dtype), shape);
        let refusal = KernelError::NonFinite { side, index: at as u64 };
        assert_eq!(engine.delta(&pair).unwrap_err(), refusal);
        assert_eq!(engine.stats(&pair).unwrap_err(), refusal);
        let z = engine.sketch(Shape { rows: shape.cols, cols: 3 }, 1, 1).unwrap();
        assert_eq!(engine.sweep(&pair, &z, Some(&mut DeltaStats::default())).unwrap_err(), refusal);
    });
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
    on_engines!(|engine| {
        let shape = Shape { rows: 1, cols: 2 };
        let bytes = stored(&[0.0, f32::INFINITY], Dtype::Bf16);
        let error =
            engine.delta(&pair(engine, (&bytes, Dtype::Bf16), (&bytes, Dtype::Bf16), shape)).unwrap_err();
        assert_eq!(error, KernelError::NonFinite { side: Side::Aligned, index: 1 });
    });
}

#[test]
fn delta_beyond_the_range_of_f32() {
    on_engines!(|engine| {
        let shape = Shape { rows: 1, cols: 1 };
        let (a, d) = (f32::MAX.to_le_bytes(), f32::MIN.to_le_bytes());
        let error = engine.delta(&pair(engine, (&a, Dtype::F32), (&d, Dtype::F32), shape)).unwrap_err();
        assert_eq!(error, KernelError::Overflow { what: "delta", index: 0 });
    });
}

#[test]
fn weights_of_another_length_and_shapes_that_differ() {
    on_engines!(|engine| {
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
    });
}

#[test]
fn delta_of_8_bit_weights_with_block_scales() {
    let shape = Shape { rows: 37, cols: 1300 };
    for dtype in [Dtype::F8E4M3, Dtype::F8E5M2] {
        for (block, origin) in [([16, 128], [0, 0]), ([8, 100], [5, 70])] {
            check!(|engine| selftest::scaled_delta(engine, shape, dtype, block, origin));
        }
    }
    // Two formats, one side without scales.
    on_engines!(|engine| {
        let n = shape.len().unwrap();
        let codes = noise(5, n).iter().map(|x| (x.to_bits() >> 8) as u8 & 0x77).collect::<Vec<_>>();
        let scales = selftest::scales(shape, [8, 100], [5, 70], 4);
        let aligned = Weights::copied(&codes, Dtype::F8E5M2, shape).unwrap();
        let degraded = Weights::copied(&codes, Dtype::F8E4M3, shape).unwrap().scaled(scales.clone()).unwrap();
        let (delta, _) = engine.delta(&engine.pair(aligned, degraded).unwrap()).unwrap();
        for (i, got) in engine.read(&delta).unwrap().iter().enumerate() {
            let value = |dtype| reference::widen(&codes, dtype, i) as f32;
            let scale = scales.at(i / shape.cols, i % shape.cols);
            let want = value(Dtype::F8E5M2) - value(Dtype::F8E4M3) * scale;
            assert_eq!(got.to_bits(), want.to_bits(), "element {i}");
        }
    });
    let short = Scales { grid: vec![1.0; 3], grid_cols: 2, block: [32, 650], origin: [0, 0] };
    let weights = Weights::copied(&vec![0; shape.len().unwrap()], Dtype::F8E4M3, shape).unwrap();
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
    on_engines!(|engine| {
        let shape = Shape { rows: 700, cols: 513 };
        let n = shape.len().unwrap();
        let (a, d) = (stored(&noise(1, n), Dtype::Bf16), stored(&noise(2, n), Dtype::F32));
        let held = pair(engine, (&a, Dtype::Bf16), (&d, Dtype::F32), shape);
        let read = |rows: usize| {
            let weights =
                Weights::read(Arc::new(Reader(d.clone(), 513 * 4, rows)), Dtype::F32, shape).unwrap();
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
    });
}
