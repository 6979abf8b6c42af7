//! Values as `f32`, and what is refused as no value.

use checkpoint::{Checkpoint, CheckpointError, Dtype};
use tempfile::tempdir;

use crate::support::*;

fn open(tensors: &[Tensor]) -> (tempfile::TempDir, Checkpoint) {
    let dir = tempdir().unwrap();
    save(dir.path(), "model.safetensors", tensors);
    save_config(dir.path());
    let model = Checkpoint::open(dir.path(), None).unwrap();
    (dir, model)
}

#[test]
fn every_float_dtype_reads_as_f32() {
    let values = [0.5, -2.0, 96.0];
    for dtype in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::Bf16] {
        let (_dir, model) = open(&[tensor("w", dtype, &[3], &values)]);
        assert_eq!(model.read_f32("w").unwrap(), values, "{dtype}");
    }
}

#[test]
fn nan_and_infinity_are_named_with_file_and_flat_index() {
    for dtype in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::Bf16] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = ramp(12, 0.0);
            values[7] = bad;
            values[9] = bad;
            let (_dir, model) = open(&[tensor("w.weight", dtype, &[3, 4], &values)]);
            match model.read_f32("w.weight") {
                Err(CheckpointError::NonFinite { tensor, file, index }) => {
                    assert_eq!((tensor.as_str(), index), ("w.weight", 7));
                    assert!(file.ends_with("model.safetensors"));
                }
                other => panic!("{dtype} {bad}: {other:?}"),
            }
        }
    }
}

#[test]
fn double_beyond_f32_is_not_finite() {
    let ((name, ..), _) = tensor("w", Dtype::F64, &[1], &[0.0]);
    let (_dir, model) = open(&[((name, Dtype::F64, vec![1]), 1e300f64.to_le_bytes().to_vec())]);
    assert!(matches!(model.read_f32("w"), Err(CheckpointError::NonFinite { index: 0, .. })));
}

#[test]
fn integers_and_fp8_are_not_read_as_numbers() {
    for dtype in [Dtype::I64, Dtype::F8E4M3, Dtype::Bool] {
        let bytes = vec![0; dtype.bytes_of(&[4]).unwrap() as usize];
        let (_dir, model) = open(&[(("w".into(), dtype, vec![4]), bytes)]);
        match model.read_f32("w") {
            Err(CheckpointError::UnsupportedDtype { tensor, dtype: got, .. }) => {
                assert_eq!((tensor.as_str(), got), ("w", dtype));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn unknown_tensor_is_named() {
    let (_dir, model) = open(&[tensor("w", Dtype::F32, &[1], &[1.0])]);
    assert!(
        matches!(model.read_f32("v"), Err(CheckpointError::UnknownTensor { tensor, .. }) if tensor == "v")
    );
    assert!(model.read_base("v").is_err());
    assert!(model.factors("w").unwrap().is_none());
}
