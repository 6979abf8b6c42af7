//! config.json -> the shape of the decoder.
//!
//! Reads both dialects of transformers (`rope_theta` and `rope_scaling` on top, or inside
//! `rope_parameters`). What is not understood is refused, never guessed.

use crate::attach::ModuleKind;
use crate::error::ModelError;
use serde_json::Value;

/// How rotary frequencies are stretched for long contexts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Plain RoPE.
    None,
    /// All frequencies divided by a factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama-3: long wavelengths divided by `factor`, short ones kept, a smooth step between.
    Llama3 {
        /// Divisor of the long wavelengths.
        factor: f64,
        /// Wavelengths above `original / low` are divided.
        low: f64,
        /// Wavelengths below `original / high` are kept.
        high: f64,
        /// Context length of pre-training, in tokens.
        original: f64,
    },
}

/// Sizes and switches of one decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    /// `model_type` of config.json: `llama` or `qwen2`.
    pub model_type: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Number of decoder blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Width of the feed-forward block.
    pub ffn: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// ε of the RMS norms.
    pub rms_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Stretching of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// The head is the embedding.
    pub tied: bool,
    /// q, k and v have a bias.
    pub qkv_bias: bool,
    /// o has a bias.
    pub o_bias: bool,
    /// gate, up and down have a bias.
    pub mlp_bias: bool,
    /// Token ids that end generation, from config.json.
    pub eos: Vec<u32>,
}

fn number(config: &Value, key: &str) -> Result<f64, ModelError> {
    match config.get(key) {
        None => Err(ModelError::Config { key: key.into(), problem: "is missing".into() }),
        Some(v) => v
            .as_f64()
            .ok_or_else(|| ModelError::Config { key: key.into(), problem: format!("is not a number: {v}") }),
    }
}

fn size(config: &Value, key: &str) -> Result<usize, ModelError> {
    let x = number(config, key)?;
    if x >= 1.0 && x.fract() == 0.0 && x < 1e9 {
        Ok(x as usize)
    } else {
        Err(ModelError::Config { key: key.into(), problem: format!("is not a size: {x}") })
    }
}

fn flag(config: &Value, key: &str, default: bool) -> bool {
    config.get(key).and_then(Value::as_bool).unwrap_or(default)
}

/// Ids under `eos_token_id`, a number or a list of numbers.
pub fn token_ids(value: Option<&Value>) -> Vec<u32> {
    let one = |v: &Value| v.as_u64().and_then(|x| u32::try_from(x).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(one).collect(),
        Some(v) => one(v).into_iter().collect(),
        None => Vec::new(),
    }
}

impl Architecture {
    /// Reads a parsed config.json.
    pub fn from_config(config: &Value) -> Result<Self, ModelError> {
        let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or("").to_string();
        let refuse = |reason: String| ModelError::Unsupported { model_type: model_type.clone(), reason };
        let (qkv_bias, o_bias) = match model_type.as_str() {
            "llama" => {
                let bias = flag(config, "attention_bias", false);
                (bias, bias)
            }
            "qwen2" => (true, false),
            _ => return Err(refuse("this decoder knows `llama` and `qwen2`".into())),
        };
        if flag(config, "use_sliding_window", false) {
            return Err(refuse("sliding-window attention".into()));
        }
        if let Some(act) = config.get("hidden_act").and_then(Value::as_str)
            && act != "silu"
        {
            return Err(refuse(format!("activation `{act}`")));
        }
        let hidden = size(config, "hidden_size")?;
        let heads = size(config, "num_attention_heads")?;
        let kv_heads = if config.get("num_key_value_heads").is_some() {
            size(config, "num_key_value_heads")?
        } else {
            heads
        };
        let head_dim = match config.get("head_dim") {
            Some(v) if !v.is_null() => size(config, "head_dim")?,
            _ => hidden / heads,
        };
        if heads % kv_heads != 0 || head_dim == 0 || head_dim % 2 != 0 {
            return Err(refuse(format!("{heads} heads, {kv_heads} key heads, head width {head_dim}")));
        }
        let (rope_theta, rope_scaling) = rope(config, &refuse)?;
        Ok(Self {
            hidden,
            layers: size(config, "num_hidden_layers")?,
            heads,
            kv_heads,
            head_dim,
            ffn: size(config, "intermediate_size")?,
            vocab: size(config, "vocab_size")?,
            rms_eps: number(config, "rms_norm_eps")?,
            rope_theta,
            rope_scaling,
            tied: flag(config, "tie_word_embeddings", false),
            qkv_bias,
            o_bias,
            mlp_bias: flag(config, "mlp_bias", false),
            eos: token_ids(config.get("eos_token_id")),
            model_type,
        })
    }

    /// The linear modules of a block in the order of the forward pass, with their sides: (module, out, in).
    pub fn modules(&self) -> Vec<(ModuleKind, usize, usize)> {
        let (h, q, kv) = (self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        ModuleKind::ALL
            .into_iter()
            .map(|kind| match kind {
                ModuleKind::Q => (kind, q, h),
                ModuleKind::K | ModuleKind::V => (kind, kv, h),
                ModuleKind::O => (kind, h, q),
                ModuleKind::Gate | ModuleKind::Up => (kind, self.ffn, h),
                ModuleKind::Down => (kind, h, self.ffn),
            })
            .collect()
    }

    /// Rotary angle per position for each of the `head_dim / 2` pairs (arXiv 2104.09864; Llama-3 scaling as in
    /// transformers' `_compute_llama3_parameters`).
    pub fn rope_frequencies(&self) -> Vec<f64> {
        let half = self.head_dim / 2;
        (0..half)
            .map(|i| {
                let f = self.rope_theta.powf(-(2.0 * i as f64) / self.head_dim as f64);
                match self.rope_scaling {
                    RopeScaling::None => f,
                    RopeScaling::Linear { factor } => f / factor,
                    RopeScaling::Llama3 { factor, low, high, original } => {
                        let wavelength = 2.0 * std::f64::consts::PI / f;
                        if wavelength < original / high {
                            f
                        } else if wavelength > original / low {
                            f / factor
                        } else {
                            let smooth = (original / wavelength - low) / (high - low);
                            (1.0 - smooth) * f / factor + smooth * f
                        }
                    }
                }
            })
            .collect()
    }
}

fn rope(config: &Value, refuse: &dyn Fn(String) -> ModelError) -> Result<(f64, RopeScaling), ModelError> {
    let new = config.get("rope_parameters").filter(|v| v.is_object());
    let old = config.get("rope_scaling").filter(|v| v.is_object());
    let theta_new = new.and_then(|p| p.get("rope_theta")).and_then(Value::as_f64);
    let theta_old = config.get("rope_theta").and_then(Value::as_f64);
    if let (Some(a), Some(b)) = (theta_new, theta_old)
        && a != b
    {
        return Err(ModelError::Config {
            key: "rope_theta".into(),
            problem: format!("is {b}, but rope_parameters says {a}"),
        });
    }
    let theta = theta_new.or(theta_old).unwrap_or(10_000.0);
    let kind = |p: &Value| {
        p.get("rope_type").or_else(|| p.get("type")).and_then(Value::as_str).unwrap_or("default").to_string()
    };
    if let (Some(a), Some(b)) = (new, old)
        && kind(a) != kind(b)
    {
        return Err(ModelError::Config {
            key: "rope_scaling".into(),
            problem: "disagrees with rope_parameters".into(),
        });
    }
    let Some(p) = new.or(old) else { return Ok((theta, RopeScaling::None)) };
    let scaling = match kind(p).as_str() {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: number(p, "factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: number(p, "factor")?,
            low: number(p, "low_freq_factor")?,
            high: number(p, "high_freq_factor")?,
            original: number(p, "original_max_position_embeddings")?,
        },
        other => return Err(refuse(format!("rotary scaling `{other}`"))),
    };
    Ok((theta, scaling))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn llama() -> Value {
        json!({"model_type":"llama","hidden_size":64,"num_hidden_layers":2,"num_attention_heads":4,
            "num_key_value_heads":2,"intermediate_size":96,"vocab_size":100,"rms_norm_eps":1e-5,"rope_theta":10000.0,
            "eos_token_id":[1,2]})
    }

    #[test]
    fn both_dialects_give_the_same_architecture() {
        let old = Architecture::from_config(&llama()).unwrap();
        let mut new = llama();
        new.as_object_mut().unwrap().remove("rope_theta");
        new["rope_parameters"] = json!({"rope_theta":10000.0,"rope_type":"default"});
        assert_eq!(old, Architecture::from_config(&new).unwrap());
        assert_eq!(old.eos, vec![1, 2]);
    }

    #[test]
    fn dialects_that_disagree_are_refused() {
        let mut c = llama();
        c["rope_parameters"] = json!({"rope_theta":5000.0,"rope_type":"default"});
        assert!(Architecture::from_config(&c).unwrap_err().to_string().contains("rope_theta"));
    }

    #[test]
    fn unknown_rotary_scaling_is_refused() {
        let mut c = llama();
        c["rope_scaling"] = json!({"rope_type":"yarn","factor":4.0});
        assert!(Architecture::from_config(&c).unwrap_err().to_string().contains("yarn"));
    }

    #[test]
    fn other_model_type_is_refused() {
        let mut c = llama();
        c["model_type"] = json!("gpt2");
        assert!(matches!(Architecture::from_config(&c), Err(ModelError::Unsupported { .. })));
    }

    #[test]
    fn llama3_scaling_keeps_short_and_divides_long_wavelengths() {
        let mut c = llama();
        c["head_dim"] = json!(128);
        c["rope_theta"] = json!(500000.0);
        c["rope_scaling"] = json!({"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,
            "original_max_position_embeddings":8192});
        let scaled = Architecture::from_config(&c).unwrap();
        let plain = Architecture { rope_scaling: RopeScaling::None, ..scaled.clone() };
        let (s, p) = (scaled.rope_frequencies(), plain.rope_frequencies());
        assert_eq!(s[0], p[0]);
        assert!((s[63] * 8.0 - p[63]).abs() < 1e-18);
        // Strictly between in the smooth step.
        assert!(s.iter().zip(&p).any(|(s, p)| *s < p * 0.999 && *s > p / 8.0 * 1.001));
    }
}
