//! The few facts of `config.json` that the weight path needs.
//!
//! Keys are looked up at the top level, then in `text_config`. Both dialects are read (`torch_dtype` and `dtype`,
//! `rope_theta` and `rope_parameters.rope_theta`); where both are present they have to agree.
//!
//! Not here: what a decoder needs to run; `transformer` takes that from `raw`.

use std::path::Path;

use serde_json::Value;

use crate::error::{CheckpointError, Result, printable};
use crate::files::read_json;

/// The file name.
pub(crate) const FILE: &str = "config.json";

/// Families whose linear weights are stored as [in, out].
const CONV1D_FAMILIES: [&str; 4] = ["gpt2", "openai-gpt", "imagegpt", "decision_transformer"];

/// Families whose embeddings are tied when the config does not say.
const TIED_FAMILIES: [&str; 4] = ["gemma", "gemma2", "gemma3_text", "gpt2"];

/// What `config.json` says.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// The whole file.
    pub raw: Value,
    /// `model_type`, at the top level.
    pub model_type: String,
    /// Decoder layers.
    pub layers: u32,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// `bfloat16` and the like, if given.
    pub dtype: Option<String>,
}

impl ModelConfig {
    /// Reads `config.json` of a model folder.
    pub fn open(dir: &Path) -> Result<ModelConfig> {
        let path = dir.join(FILE);
        match read_json(dir, FILE)? {
            Some(raw) => Self::from_json(raw, &path),
            None => Err(CheckpointError::config(&path, "the file is missing")),
        }
    }

    /// Takes the facts from a parsed config; `path` is for messages only.
    pub fn from_json(raw: Value, path: &Path) -> Result<ModelConfig> {
        let refuse = |problem: String| CheckpointError::config(path, problem);
        if !raw.is_object() {
            return Err(refuse("it is no JSON object".into()));
        }
        let model_type = look_up(&raw, "model_type")
            .and_then(Value::as_str)
            .ok_or_else(|| refuse("`model_type` is missing or no text".into()))?
            .to_owned();
        let layers = ["num_hidden_layers", "n_layer", "num_layers"]
            .iter()
            .find_map(|key| look_up(&raw, key))
            .and_then(Value::as_u64)
            .and_then(|layers| u32::try_from(layers).ok())
            .ok_or_else(|| refuse("`num_hidden_layers` is missing or no count".into()))?;
        let tie_word_embeddings = match look_up(&raw, "tie_word_embeddings") {
            Some(Value::Bool(tied)) => *tied,
            Some(_) => return Err(refuse("`tie_word_embeddings` is no truth value".into())),
            None => TIED_FAMILIES.contains(&model_type.as_str()),
        };

        let old = look_up(&raw, "torch_dtype").and_then(Value::as_str);
        let new = look_up(&raw, "dtype").and_then(Value::as_str);
        if let (Some(old), Some(new)) = (old, new)
            && old != new
        {
            return Err(refuse(format!(
                "`torch_dtype` is {} but `dtype` is {}",
                printable(old),
                printable(new)
            )));
        }
        let old_theta = look_up(&raw, "rope_theta").and_then(Value::as_f64);
        let new_theta =
            look_up(&raw, "rope_parameters").and_then(|rope| rope.get("rope_theta")).and_then(Value::as_f64);
        if let (Some(old), Some(new)) = (old_theta, new_theta)
            && old != new
        {
            return Err(refuse(format!("`rope_theta` is {old} but `rope_parameters.rope_theta` is {new}")));
        }
        let dtype = new.or(old).map(str::to_owned);
        Ok(ModelConfig { model_type, layers, tie_word_embeddings, dtype, raw })
    }

    /// A key of `quantization_config`, at the top level, else in `text_config`; null counts as absent.
    pub(crate) fn quantization(&self, key: &str) -> Option<&Value> {
        [Some(&self.raw), self.raw.get("text_config")]
            .into_iter()
            .flatten()
            .find_map(|level| level.get("quantization_config")?.get(key).filter(|value| !value.is_null()))
    }

    /// The file of the same model with plain weights: no `quantization_config` at any level that loaders look at.
    pub fn plain(&self) -> Value {
        let mut raw = self.raw.clone();
        let nested = ["text_config", "vision_config", "audio_config"];
        for level in std::iter::once(None).chain(nested.map(Some)) {
            let object = match level {
                None => raw.as_object_mut(),
                Some(key) => raw.get_mut(key).and_then(Value::as_object_mut),
            };
            if let Some(object) = object {
                object.remove("quantization_config");
            }
        }
        raw
    }

    /// Whether linear weights of this family are stored as [in, out].
    pub(crate) fn is_conv1d(&self) -> bool {
        CONV1D_FAMILIES.contains(&self.model_type.as_str())
    }
}

/// A key at the top level, else in `text_config`; null counts as absent.
pub(crate) fn look_up<'a>(raw: &'a Value, key: &str) -> Option<&'a Value> {
    let present = |value: Option<&'a Value>| value.filter(|value| !value.is_null());
    present(raw.get(key)).or_else(|| present(raw.get("text_config")?.get(key)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(raw: Value) -> Result<ModelConfig> {
        ModelConfig::from_json(raw, Path::new("config.json"))
    }

    #[test]
    fn both_dialects() {
        let old = read(json!({"model_type": "qwen2", "num_hidden_layers": 2, "torch_dtype": "bfloat16",
            "rope_theta": 10000.0, "tie_word_embeddings": true}))
        .unwrap();
        assert_eq!((old.layers, old.dtype.as_deref(), old.tie_word_embeddings), (2, Some("bfloat16"), true));
        let new = read(json!({"model_type": "qwen2", "num_hidden_layers": 2, "dtype": "float16",
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}))
        .unwrap();
        assert_eq!((new.dtype.as_deref(), new.tie_word_embeddings), (Some("float16"), false));
    }

    #[test]
    fn dialects_that_disagree_are_refused() {
        let base = json!({"model_type": "llama", "num_hidden_layers": 2, "torch_dtype": "float16", "rope_theta": 1e4});
        for (key, value) in [("dtype", json!("bfloat16")), ("rope_parameters", json!({"rope_theta": 5e5}))] {
            let mut raw = base.clone();
            raw[key] = value;
            assert!(matches!(read(raw), Err(CheckpointError::Config { .. })), "{key}");
        }
        assert!(read(base).is_ok());
    }

    #[test]
    fn nested_text_config() {
        let config = read(json!({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text",
            "num_hidden_layers": 5, "tie_word_embeddings": true, "dtype": "bfloat16"}}))
        .unwrap();
        assert_eq!((config.model_type.as_str(), config.layers), ("gemma3", 5));
        assert!(config.tie_word_embeddings);
    }

    #[test]
    fn missing_or_wrong_keys_are_named() {
        for (raw, key) in [
            (json!({"num_hidden_layers": 2}), "model_type"),
            (json!({"model_type": "llama"}), "num_hidden_layers"),
            (json!({"model_type": "llama", "num_hidden_layers": -1}), "num_hidden_layers"),
            (json!({"model_type": "llama", "num_hidden_layers": 4294967296u64}), "num_hidden_layers"),
            (
                json!({"model_type": "llama", "num_hidden_layers": 1, "tie_word_embeddings": "yes"}),
                "tie_word",
            ),
            (json!([1]), "no JSON object"),
        ] {
            let message = read(raw).unwrap_err().to_string();
            assert!(message.contains(key), "{message}");
        }
    }
}
