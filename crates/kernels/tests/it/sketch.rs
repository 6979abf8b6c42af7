//! `sketch` and `pack`: to the bit.

use kernels::{CpuEngine, Dtype, Engine, KernelError, Shape, philox4x32_10, reference};

use crate::{DTYPES, bits, noise, on_any_threads};

#[test]
fn sketch_is_the_popcount_of_its_word() {
    let engine = CpuEngine::new();
    let (seed, key) = (0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210);
    for (rows, cols) in [(1, 1), (130, 3), (5, 24), (3, 41)] {
        let shape = Shape { rows, cols };
        let got = on_any_threads(|| bits(&engine.read(&engine.sketch(shape, seed, key).unwrap()).unwrap()));
        for row in 0..rows {
            for col in 0..cols {
                let counter = [col as u32 / 4, row as u32, 0x7654_3210, 0xfedc_ba98];
                let word = philox4x32_10(counter, [0x89ab_cdef, 0x0123_4567])[col % 4];
                let want = word.count_ones() as i32 - 16;
                assert_eq!(f32::from_bits(got[row * cols + col]), want as f32, "{shape}: {row},{col}");
            }
        }
    }
}

#[test]
fn sketch_of_another_seed_or_key_is_another_one() {
    let engine = CpuEngine::new();
    let read =
        |seed, key| engine.read(&engine.sketch(Shape { rows: 4, cols: 4 }, seed, key).unwrap()).unwrap();
    assert_ne!(read(1, 1), read(2, 1));
    assert_ne!(read(1, 1), read(1, 2));
    assert_eq!(read(1, 1), read(1, 1));
}

#[test]
fn pack_rounds_to_nearest_even() {
    let engine = CpuEngine::new();
    let mut values = noise(9, 500);
    values.extend([
        0.0,
        -0.0,
        1.0 + 2.0f32.powi(-8),
        1.0 + 3.0 * 2.0f32.powi(-8),
        1.0 + 2.0f32.powi(-11),
        3e-8,
    ]);
    let matrix = engine.matrix(&values, Shape { rows: 1, cols: values.len() }).unwrap();
    for dtype in DTYPES {
        let want: Vec<u8> = values.iter().flat_map(|&x| reference::round(f64::from(x), dtype)).collect();
        assert_eq!(engine.pack(&matrix, dtype).unwrap(), want, "{dtype:?}");
    }
}

#[test]
fn pack_beyond_the_range() {
    let engine = CpuEngine::new();
    let matrix = engine.matrix(&[1.0, 70000.0], Shape { rows: 1, cols: 2 }).unwrap();
    assert_eq!(engine.pack(&matrix, Dtype::F16), Err(KernelError::Overflow { what: "pack", index: 1 }));
    assert!(engine.pack(&matrix, Dtype::Bf16).is_ok());
}
