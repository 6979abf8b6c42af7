//! Formats of codes that are refused by name, with a way out.

use std::fs;

use checkpoint::{Checkpoint, CheckpointError, Dtype};
use serde_json::{Value, json};
use tempfile::tempdir;

use crate::support::*;

const UP: &str = "model.layers.0.mlp.up_proj";

fn codes(name: &str, dtype: Dtype, shape: &[u64]) -> Tensor {
    let bytes = dtype.bytes_of(shape).unwrap() as usize;
    ((format!("{UP}{name}"), dtype, shape.to_vec()), vec![1; bytes])
}

#[track_caller]
fn assert_refused(config: Value, tensors: &[Tensor], format: &str, way_out: &str) {
    let (_dir, model) = folder(&config, tensors);
    match model.units() {
        Err(error @ CheckpointError::Quantized { .. }) => {
            let (message, hint) = (error.to_string(), error.hint().unwrap());
            assert!(message.contains(format), "{format}: {message}");
            assert!(hint.contains(way_out), "{format}: {hint}");
            let from_tensor = message.contains(UP) && message.contains("model.safetensors");
            assert!(from_tensor || message.contains("config.json"), "{message}");
        }
        other => panic!("{format}: {other:?}"),
    }
}

fn method(name: &str) -> Value {
    json!({"model_type": "llama", "quantization_config": {"quant_method": name}})
}

#[test]
fn formats_told_by_their_tensors() {
    let plain = || json!({"model_type": "llama"});
    let (codes32, scales) = (codes(".qweight", Dtype::I32, &[2, 8]), codes(".scales", Dtype::F16, &[1, 8]));
    let zeros = codes(".qzeros", Dtype::I32, &[1, 1]);
    let groups = codes(".g_idx", Dtype::I32, &[16]);
    let transformers = "dequantize it to bf16 first, for example by loading it with transformers";
    assert_refused(plain(), &[codes32.clone(), groups, zeros.clone()], "GPTQ", transformers);
    assert_refused(method("awq"), &[codes32.clone(), zeros.clone(), scales.clone()], "AWQ", transformers);
    assert_refused(plain(), &[codes32, zeros, scales], "GPTQ or AWQ", transformers);

    let bytes = codes(".weight", Dtype::U8, &[32, 1]);
    let absmax = codes(".weight.absmax", Dtype::F32, &[2]);
    assert_refused(plain(), &[bytes.clone(), absmax], "bitsandbytes", "dequantize()");
    let state = codes(".weight.quant_state.bitsandbytes__nf4", Dtype::U8, &[9]);
    assert_refused(plain(), &[bytes.clone(), state], "bitsandbytes", "dequantize()");
    let int8 = codes(".weight", Dtype::I8, &[4, 8]);
    assert_refused(plain(), &[int8.clone(), codes(".SCB", Dtype::F32, &[4])], "bitsandbytes", "dequantize()");
    assert_refused(
        plain(),
        &[int8, codes(".weight_scale", Dtype::F32, &[4, 1])],
        "8-bit codes with scales",
        transformers,
    );

    let packed = codes(".weight_packed", Dtype::I32, &[4, 1]);
    assert_refused(method("compressed-tensors"), &[packed], "compressed-tensors", transformers);
    let packed = codes(".weight_packed", Dtype::U8, &[4, 4]);
    let global = codes(".weight_global_scale", Dtype::F32, &[1]);
    assert_refused(method("compressed-tensors"), &[packed, global], "NVFP4", "quantized from");
    assert_refused(
        method("modelopt"),
        &[bytes, codes(".weight_scale_2", Dtype::F32, &[])],
        "NVFP4",
        "quantized from",
    );

    let blocks = codes("_blocks", Dtype::U8, &[2, 4, 1, 16]);
    assert_refused(plain(), &[blocks, codes("_scales", Dtype::U8, &[2, 4, 1])], "MXFP4", "Mxfp4Config");
    assert_refused(plain(), &[codes(".W_q", Dtype::U8, &[4, 4])], "HQQ", transformers);
    assert_refused(plain(), &[codes(".weight", Dtype::F4, &[4, 4])], "F4", "quantized from");
}

#[test]
fn formats_told_by_the_config_alone() {
    for (name, format) in [
        ("gptq", "GPTQ"),
        ("awq", "AWQ"),
        ("bitsandbytes", "bitsandbytes"),
        ("mxfp4", "MXFP4"),
        ("hqq", "HQQ"),
        ("aqlm", "aqlm"),
        ("new\u{1b}method", "new\\u{1b}method"),
    ] {
        assert_refused(method(name), &model_tensors(), format, "take `quantization_config` out");
    }
    let old = json!({"model_type": "llama", "quantization_config": {"load_in_4bit": true}});
    assert_refused(old, &model_tensors(), "bitsandbytes", "dequantize()");
    let nested =
        json!({"model_type": "llama", "text_config": {"quantization_config": {"quant_method": "gptq"}}});
    assert_refused(nested, &model_tensors(), "GPTQ", "transformers");
}

#[test]
fn methods_whose_weights_are_plain_are_read() {
    for name in ["fp8", "compressed-tensors", "modelopt"] {
        assert_eq!(folder(&method(name), &model_tensors()).1.units().unwrap().len(), 4);
    }
    let null = json!({"model_type": "llama", "quantization_config": null});
    assert_eq!(folder(&null, &model_tensors()).1.units().unwrap().len(), 4);
}

#[test]
fn folder_of_gguf_only() {
    let dir = tempdir().unwrap();
    save_config(dir.path());
    fs::write(dir.path().join("model-Q4_K_M.gguf"), b"GGUF").unwrap();
    match Checkpoint::open(dir.path(), None) {
        Err(error @ CheckpointError::Quantized { .. }) => {
            let message = error.to_string();
            assert!(message.contains("GGUF") && message.contains("model-Q4_K_M.gguf"), "{message}");
            assert!(error.hint().unwrap().contains("safetensors"));
        }
        other => panic!("{other:?}"),
    }
    // Beside weights that are read it is one more file.
    save_model(dir.path());
    assert_eq!(Checkpoint::open(dir.path(), None).unwrap().units().unwrap().len(), 4);
}

#[test]
fn folder_of_pickles_only_says_how_to_convert() {
    let dir = tempdir().unwrap();
    save_config(dir.path());
    fs::write(dir.path().join("pytorch_model.bin"), b"\x80\x02").unwrap();
    let error = Checkpoint::open(dir.path(), None).unwrap_err();
    assert!(matches!(error, CheckpointError::PickleOnly { .. }));
    assert!(error.hint().unwrap().contains("convert the weights to safetensors"));
}
