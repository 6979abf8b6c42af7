//! Quantized checkpoints that are recognised in order to be refused.
//!
//! Raw codes look like weights to anything that only sees names and sides, and adding to them gives rubbish that loads.
//! Formats are told by the tensors that only they have, else by `quant_method`. A method that is not known is refused
//! too.
//!
//! Not here: fp8 with scales, which is read; see `scales`.

use std::path::Path;

use serde_json::Value;

use crate::config::ModelConfig;
use crate::dtype::Dtype;
use crate::error::{CheckpointError, Result};
use crate::shards::{ShardSet, TensorInfo};

/// Methods of which the tensors themselves tell whether they can be read.
const TOLD_BY_TENSORS: [&str; 4] = ["fp8", "fbgemm_fp8", "compressed-tensors", "modelopt"];

/// Refuses a folder whose weights are codes of a format that is not read.
pub(crate) fn refuse_quantized(shards: &ShardSet, config: &ModelConfig, config_file: &Path) -> Result<()> {
    let method = config.quantization("quant_method").and_then(Value::as_str).map(str::to_ascii_lowercase);
    let method = method.as_deref();
    for info in shards.tensors() {
        if let Some(format) = format_of(shards, info, method) {
            return Err(CheckpointError::Quantized {
                tensor: Some(info.name.clone()),
                file: info.file.clone(),
                format: format.into(),
            });
        }
    }
    let in_bits = |key| config.quantization(key) == Some(&Value::Bool(true));
    let format = match method {
        Some(method) if TOLD_BY_TENSORS.contains(&method) => return Ok(()),
        Some("gptq") => "GPTQ",
        Some("awq") => "AWQ",
        Some("bitsandbytes") => "bitsandbytes",
        Some("mxfp4") => "MXFP4",
        Some("hqq") => "HQQ",
        Some(other) => other,
        None if in_bits("load_in_4bit") || in_bits("load_in_8bit") => "bitsandbytes",
        None => return Ok(()),
    };
    Err(CheckpointError::Quantized {
        tensor: None,
        file: config_file.to_path_buf(),
        format: format.to_owned(),
    })
}

/// The format that this tensor gives away.
fn format_of(shards: &ShardSet, info: &TensorInfo, method: Option<&str>) -> Option<&'static str> {
    let name = info.name.as_str();
    let has = |front: &str, ending: &str| shards.get(&format!("{front}{ending}")).is_some();
    match info.dtype {
        Dtype::F4 => return Some("F4"),
        Dtype::F6E2M3 | Dtype::F6E3M2 => return Some("F6"),
        _ => {}
    }
    if let Some(front) = name.strip_suffix("_blocks") {
        return has(front, "_scales").then_some("MXFP4");
    }
    if name.contains(".quant_state.") {
        return Some("bitsandbytes");
    }
    let (front, last) = name.rsplit_once('.')?;
    match last {
        "qweight" | "qzeros" | "g_idx" => Some(match method {
            Some("awq") => "AWQ",
            Some("gptq") => "GPTQ",
            _ if has(front, ".g_idx") => "GPTQ",
            _ => "GPTQ or AWQ",
        }),
        "absmax" | "quant_map" | "nested_absmax" | "nested_quant_map" | "SCB" => Some("bitsandbytes"),
        "weight_packed" if has(front, ".weight_global_scale") => Some("NVFP4"),
        "weight_packed" => Some("compressed-tensors packed integers"),
        "weight_scale_2" | "weight_global_scale" => Some("NVFP4"),
        "W_q" => Some("HQQ"),
        "weight" if matches!(info.dtype, Dtype::I8 | Dtype::U8) => {
            let scaled = [".weight_scale", ".weight_scale_inv", ".scale", ".scales"]
                .iter()
                .any(|ending| has(front, ending));
            scaled.then_some("8-bit codes with scales")
        }
        _ => None,
    }
}
