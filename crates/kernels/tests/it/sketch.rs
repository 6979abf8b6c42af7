//! `sketch` and `pack`: to the bit.

use kernels::{Dtype, Engine, KernelError, Shape, selftest};

use crate::{DTYPES, check, on_engines};

#[test]
fn sketch_is_the_popcount_of_its_word() {
    for (rows, cols) in [(1, 1), (130, 3), (5, 24), (3, 41)] {
        check!(|engine| selftest::sketch(engine, Shape { rows, cols }));
    }
}

#[test]
fn sketch_of_another_seed_or_key_is_another_one() {
    on_engines!(|engine| {
        let read =
            |seed, key| engine.read(&engine.sketch(Shape { rows: 4, cols: 4 }, seed, key).unwrap()).unwrap();
        assert_ne!(read(1, 1), read(2, 1));
        assert_ne!(read(1, 1), read(1, 2));
        assert_eq!(read(1, 1), read(1, 1));
    });
}

#[test]
fn pack_rounds_to_nearest_even() {
    for dtype in DTYPES {
        check!(|engine| selftest::pack(engine, dtype));
    }
}

#[test]
fn pack_beyond_the_range() {
    on_engines!(|engine| {
        let matrix = engine.matrix(&[1.0, 70000.0], Shape { rows: 1, cols: 2 }).unwrap();
        assert_eq!(engine.pack(&matrix, Dtype::F16), Err(KernelError::Overflow { what: "pack", index: 1 }));
        assert!(engine.pack(&matrix, Dtype::Bf16).is_ok());
    });
}
