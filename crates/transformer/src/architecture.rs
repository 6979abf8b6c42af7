//! config.json -> the shape of the decoder.
//!
//! Reads both dialects of transformers (`rope_theta` and `rope_scaling` on top, or inside
//! `rope_parameters`). Keys that are absent have the default of the layout's own class in transformers where that is a
//! switch; a size has to be there. What is not understood is refused, never guessed.
//!
//! | `model_type` | biases | window | q and k | rotary | norms of a block | feed-forward |
//! |---|---|---|---|---|---|---|
//! | `llama` | by config | – | plain | halves | 2 | gate, up |
//! | `mistral` | none | all layers, or none | plain | halves | 2 | gate, up |
//! | `qwen2` | q, k, v | by layer, if it is switched on | plain | halves | 2 | gate, up |
//! | `qwen3` | by config | by layer, if it is switched on | a norm per head | halves | 2 | gate, up |
//! | `glm` | q, k, v by config | – | plain | neighbours, part of the head | 2 | one matrix |
//! | `glm4` | q, k, v by config | – | plain | neighbours, part of the head | 4 | one matrix |
//!
//! Every shape of a layout is in [`Architecture::modules`] and [`Architecture::vectors`], and nowhere else.

use crate::attach::{ModuleKind, VectorKind};
use crate::error::ModelError;
use crate::ops::RopeForm;
use serde_json::Value;

/// The layouts, by `model_type`.
pub const LAYOUTS: [&str; 6] = ["llama", "mistral", "qwen2", "qwen3", "glm", "glm4"];

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

/// One linear module of a block: weight `[out, into]`, and a bias `[out]` if it has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearShape {
    /// Which module.
    pub kind: ModuleKind,
    /// Rows of the weight.
    pub out: usize,
    /// Columns of the weight.
    pub into: usize,
    /// Whether it has a bias.
    pub bias: bool,
}

/// Sizes and switches of one decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    /// `model_type` of config.json, one of [`LAYOUTS`].
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
    /// Which elements of a head are turned together.
    pub rope_form: RopeForm,
    /// Elements at the front of each head that are turned, the others stay; even, at most `head_dim`.
    pub rotary_dim: usize,
    /// Per layer, how many positions a query sees, its own included; all before it if `None`.
    pub windows: Vec<Option<usize>>,
    /// The head is the embedding.
    pub tied: bool,
    /// q, k and v have a bias.
    pub qkv_bias: bool,
    /// o has a bias.
    pub o_bias: bool,
    /// gate, up and down have a bias.
    pub mlp_bias: bool,
    /// Each head of q and k goes through an RMS norm before it is turned.
    pub qk_norm: bool,
    /// What attention and feed-forward block put out goes through an RMS norm before it is added.
    pub post_norms: bool,
    /// gate and up are one matrix `[2 * ffn, hidden]`, gate first.
    pub fused_gate_up: bool,
    /// Token ids that end generation, from config.json.
    pub eos: Vec<u32>,
}

fn bad(key: &str, problem: impl Into<String>) -> ModelError {
    ModelError::Config { key: key.into(), problem: problem.into() }
}

fn number(config: &Value, key: &str) -> Result<f64, ModelError> {
    match config.get(key) {
        None => Err(bad(key, "is missing")),
        Some(v) => v.as_f64().ok_or_else(|| bad(key, format!("is not a number: {v}"))),
    }
}

fn positive(config: &Value, key: &str) -> Result<f64, ModelError> {
    let x = number(config, key)?;
    if x > 0.0 && x.is_finite() { Ok(x) } else { Err(bad(key, format!("is not above zero: {x}"))) }
}

fn size(config: &Value, key: &str) -> Result<usize, ModelError> {
    let x = number(config, key)?;
    if x >= 1.0 && x.fract() == 0.0 && x < 1e9 {
        Ok(x as usize)
    } else {
        Err(bad(key, format!("is not a size: {x}")))
    }
}

/// What is there and not null.
fn given<'a>(config: &'a Value, key: &str) -> Option<&'a Value> {
    config.get(key).filter(|v| !v.is_null())
}

fn flag(config: &Value, key: &str, default: bool) -> Result<bool, ModelError> {
    match given(config, key) {
        None => Ok(default),
        Some(v) => v.as_bool().ok_or_else(|| bad(key, format!("is not true or false: {v}"))),
    }
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

/// Refuses a layout's switch, with the reason.
type Refuse<'a> = &'a dyn Fn(String) -> ModelError;

impl Architecture {
    /// Reads a parsed config.json.
    pub fn from_config(config: &Value) -> Result<Self, ModelError> {
        let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or("").to_string();
        let refuse = |reason: String| ModelError::Unsupported { model_type: model_type.clone(), reason };
        let layout = model_type.as_str();
        if !LAYOUTS.contains(&layout) {
            return Err(refuse(format!("this decoder knows `{}`", LAYOUTS.join("`, `"))));
        }
        let glm = matches!(layout, "glm" | "glm4");
        if let Some(act) = given(config, "hidden_act").filter(|act| **act != "silu") {
            return Err(refuse(format!("activation {act}")));
        }

        let attention_bias = flag(config, "attention_bias", glm)?;
        let (qkv_bias, o_bias) = match layout {
            "llama" | "qwen3" => (attention_bias, attention_bias),
            "glm" | "glm4" => (attention_bias, false),
            // Whatever the config says: this layout has no such switch.
            "qwen2" => (true, false),
            _ if attention_bias => return Err(refuse("`attention_bias`".into())),
            _ => (false, false),
        };
        let mlp_bias = flag(config, "mlp_bias", false)?;
        if mlp_bias && layout != "llama" {
            return Err(refuse("`mlp_bias`".into()));
        }

        let hidden = size(config, "hidden_size")?;
        let layers = size(config, "num_hidden_layers")?;
        let heads = size(config, "num_attention_heads")?;
        let kv_heads = match config.get("num_key_value_heads") {
            // In the others a class has a number for it, which differs by version.
            None if layout == "llama" => heads,
            Some(Value::Null) if !glm => heads,
            _ => size(config, "num_key_value_heads")?,
        };
        let head_dim = match given(config, "head_dim") {
            None if !glm && layout != "qwen3" => {
                if hidden % heads != 0 {
                    return Err(refuse(format!("{heads} heads do not divide a width of {hidden}")));
                }
                hidden / heads
            }
            _ => size(config, "head_dim")?,
        };
        if heads % kv_heads != 0 || head_dim % 2 != 0 {
            return Err(refuse(format!("{heads} heads, {kv_heads} key heads, head width {head_dim}")));
        }

        let rope = rope(config, &refuse)?;
        let part = rope.part.unwrap_or(if glm { 0.5 } else { 1.0 });
        if !glm && part != 1.0 {
            return Err(refuse(format!("`partial_rotary_factor` {part}")));
        }
        let rotary = head_dim as f64 * part;
        if !(2.0..=head_dim as f64).contains(&rotary) || rotary % 2.0 != 0.0 {
            return Err(refuse(format!("`partial_rotary_factor` {part} of a head width of {head_dim}")));
        }

        Ok(Self {
            hidden,
            layers,
            heads,
            kv_heads,
            head_dim,
            ffn: size(config, "intermediate_size")?,
            vocab: size(config, "vocab_size")?,
            rms_eps: number(config, "rms_norm_eps")?,
            rope_theta: rope.theta,
            rope_scaling: rope.scaling,
            rope_form: if glm { RopeForm::Neighbours } else { RopeForm::Halves },
            rotary_dim: rotary as usize,
            windows: windows(config, layout, layers, &refuse)?,
            tied: flag(config, "tie_word_embeddings", false)?,
            qkv_bias,
            o_bias,
            mlp_bias,
            qk_norm: layout == "qwen3",
            post_norms: layout == "glm4",
            fused_gate_up: glm,
            eos: token_ids(config.get("eos_token_id")),
            model_type,
        })
    }

    /// The linear modules of a block, in the order of the forward pass; all blocks are alike.
    pub fn modules(&self) -> Vec<LinearShape> {
        let (h, q, kv, f) =
            (self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.ffn);
        let linear = |kind, out, into, bias| LinearShape { kind, out, into, bias };
        let mut out = vec![
            linear(ModuleKind::Q, q, h, self.qkv_bias),
            linear(ModuleKind::K, kv, h, self.qkv_bias),
            linear(ModuleKind::V, kv, h, self.qkv_bias),
            linear(ModuleKind::O, h, q, self.o_bias),
        ];
        if self.fused_gate_up {
            out.push(linear(ModuleKind::GateUp, 2 * f, h, self.mlp_bias));
        } else {
            out.push(linear(ModuleKind::Gate, f, h, self.mlp_bias));
            out.push(linear(ModuleKind::Up, f, h, self.mlp_bias));
        }
        out.push(linear(ModuleKind::Down, h, f, self.mlp_bias));
        out
    }

    /// The 1-D weights of a block and their lengths: biases of the modules, then norms.
    pub fn vectors(&self) -> Vec<(VectorKind, usize)> {
        let modules = self.modules();
        let biases = modules.iter().filter(|m| m.bias).map(|m| (VectorKind::Bias(m.kind), m.out));
        biases.chain(self.norms()).collect()
    }

    /// The norms of a block and their lengths.
    pub(crate) fn norms(&self) -> Vec<(VectorKind, usize)> {
        let mut out = vec![(VectorKind::AttentionNorm, self.hidden), (VectorKind::MlpNorm, self.hidden)];
        if self.qk_norm {
            out.extend([(VectorKind::QNorm, self.head_dim), (VectorKind::KNorm, self.head_dim)]);
        }
        if self.post_norms {
            out.extend([
                (VectorKind::PostAttentionNorm, self.hidden),
                (VectorKind::PostMlpNorm, self.hidden),
            ]);
        }
        out
    }

    /// Shape of a weight by its checkpoint name; `None` if this decoder has no such weight.
    pub fn shape(&self, tensor: &str) -> Option<Vec<usize>> {
        match tensor {
            "model.embed_tokens.weight" => return Some(vec![self.vocab, self.hidden]),
            "lm_head.weight" => return (!self.tied).then(|| vec![self.vocab, self.hidden]),
            "model.norm.weight" => return Some(vec![self.hidden]),
            _ => {}
        }
        if let Some((layer, kind)) = VectorKind::parse(tensor) {
            let found = self.vectors().into_iter().find(|v| v.0 == kind);
            return found.filter(|_| layer < self.layers).map(|(_, len)| vec![len]);
        }
        let (layer, kind) = ModuleKind::parse(tensor.strip_suffix(".weight")?)?;
        let found = self.modules().into_iter().find(|m| m.kind == kind);
        found.filter(|_| layer < self.layers).map(|m| vec![m.out, m.into])
    }

    /// Rotary angle per position for each of the `rotary_dim / 2` pairs (arXiv 2104.09864; Llama-3 scaling as in
    /// transformers' `_compute_llama3_parameters`).
    pub fn rope_frequencies(&self) -> Vec<f64> {
        let half = self.rotary_dim / 2;
        (0..half)
            .map(|i| {
                let f = self.rope_theta.powf(-(2.0 * i as f64) / self.rotary_dim as f64);
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

/// How far each layer sees. `mistral`: all layers alike. `qwen2` and `qwen3`: layers named in `layer_types`, else those from
/// `max_window_layers` on, if `use_sliding_window`.
fn windows(
    config: &Value,
    layout: &str,
    layers: usize,
    refuse: Refuse<'_>,
) -> Result<Vec<Option<usize>>, ModelError> {
    let named = layer_types(config, layers, refuse)?;
    let switched = flag(config, "use_sliding_window", false)?;
    let out = match layout {
        "mistral" => {
            let window = match config.get("sliding_window") {
                // The default of the layout's class; null is none.
                None => Some(4096),
                Some(Value::Null) => None,
                Some(_) => Some(size(config, "sliding_window")?),
            };
            vec![window; layers]
        }
        "qwen2" | "qwen3" if switched => {
            let window = size(config, "sliding_window")?;
            let slides = match &named {
                Some(named) => named.clone(),
                None => {
                    let from = match number(config, "max_window_layers")? {
                        x if x >= 0.0 && x.fract() == 0.0 => x,
                        x => return Err(bad("max_window_layers", format!("is not a number of layers: {x}"))),
                    };
                    (0..layers).map(|layer| layer as f64 >= from).collect()
                }
            };
            slides.into_iter().map(|slides| slides.then_some(window)).collect()
        }
        // Published configs hold a window that is switched off.
        "qwen2" | "qwen3" => vec![None; layers],
        _ if switched || given(config, "sliding_window").is_some() => {
            return Err(refuse("sliding-window attention".into()));
        }
        _ => vec![None; layers],
    };
    let slides = out.iter().map(Option::is_some);
    if named.is_some_and(|named| !slides.eq(named)) {
        return Err(refuse("`layer_types` that disagree with the other keys of sliding windows".into()));
    }
    Ok(out)
}

/// Per layer whether `layer_types` calls it sliding; `None` without the key.
fn layer_types(config: &Value, layers: usize, refuse: Refuse<'_>) -> Result<Option<Vec<bool>>, ModelError> {
    let Some(value) = given(config, "layer_types") else { return Ok(None) };
    let list = value.as_array().ok_or_else(|| bad("layer_types", "is not a list"))?;
    if list.len() != layers {
        return Err(bad("layer_types", format!("names {} layers of {layers}", list.len())));
    }
    let slides = list.iter().map(|name| match name.as_str() {
        Some("full_attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        _ => Err(refuse(format!("layer type {name}"))),
    });
    slides.collect::<Result<_, _>>().map(Some)
}

/// What config.json says about rotary embeddings.
struct Rope {
    theta: f64,
    scaling: RopeScaling,
    /// Share of each head that is turned.
    part: Option<f64>,
}

/// One number that may stand on top and inside of either dialect's object; two that differ are refused.
fn one_of(config: &Value, inner: [Option<&Value>; 2], key: &str) -> Result<Option<f64>, ModelError> {
    let mut found = None;
    for place in [Some(config)].into_iter().chain(inner).flatten() {
        if given(place, key).is_none() {
            continue;
        }
        let x = positive(place, key)?;
        if let Some(other) = found.filter(|other| *other != x) {
            return Err(bad(key, format!("is {other} in one place and {x} in another")));
        }
        found = Some(x);
    }
    Ok(found)
}

fn rope(config: &Value, refuse: Refuse<'_>) -> Result<Rope, ModelError> {
    for key in ["rope_parameters", "rope_scaling"] {
        match given(config, key) {
            Some(Value::Object(inner)) if inner.values().any(Value::is_object) => {
                return Err(refuse(format!("`{key}` that differ by layer")));
            }
            None | Some(Value::Object(_)) => {}
            Some(v) => return Err(bad(key, format!("is not an object: {v}"))),
        }
    }
    let (new, old) = (given(config, "rope_parameters"), given(config, "rope_scaling"));
    let theta = one_of(config, [new, old], "rope_theta")?.unwrap_or(10_000.0);
    let part = one_of(config, [new, old], "partial_rotary_factor")?;
    let kind = |p: &Value| match given(p, "rope_type").or_else(|| given(p, "type")) {
        None => Ok("default".to_string()),
        Some(v) => {
            v.as_str().map(str::to_string).ok_or_else(|| bad("rope_type", format!("is not a name: {v}")))
        }
    };
    if let (Some(a), Some(b)) = (new, old)
        && kind(a)? != kind(b)?
    {
        return Err(bad("rope_scaling", "disagrees with rope_parameters"));
    }
    let Some(p) = new.or(old) else { return Ok(Rope { theta, scaling: RopeScaling::None, part }) };
    let scaling = match kind(p)?.as_str() {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: positive(p, "factor")? },
        "llama3" => {
            let (low, high) = (positive(p, "low_freq_factor")?, positive(p, "high_freq_factor")?);
            if low >= high {
                return Err(bad("high_freq_factor", format!("is {high}, not above low_freq_factor {low}")));
            }
            let original = "original_max_position_embeddings";
            let original =
                one_of(config, [new, old], original)?.ok_or_else(|| bad(original, "is missing"))?;
            RopeScaling::Llama3 { factor: positive(p, "factor")?, low, high, original }
        }
        other => return Err(refuse(format!("rotary scaling `{other}`"))),
    };
    Ok(Rope { theta, scaling, part })
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

    /// A config of a layout: that of [`llama`] with other keys.
    fn with(model_type: &str, keys: Value) -> Value {
        let mut c = llama();
        c["model_type"] = json!(model_type);
        c["head_dim"] = json!(16);
        c.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        c
    }

    fn read(model_type: &str, keys: Value) -> Architecture {
        Architecture::from_config(&with(model_type, keys)).unwrap()
    }

    #[track_caller]
    fn refused(model_type: &str, keys: Value, reason: &str) {
        let error = Architecture::from_config(&with(model_type, keys)).unwrap_err().to_string();
        assert!(error.contains(reason), "{model_type}: {error}");
    }

    #[test]
    fn window_of_mistral_is_that_of_all_layers() {
        assert_eq!(read("mistral", json!({"sliding_window": 7})).windows, [Some(7), Some(7)]);
        assert_eq!(read("mistral", json!({"sliding_window": null})).windows, [None, None]);
        // As transformers reads it.
        assert_eq!(read("mistral", json!({})).windows, [Some(4096), Some(4096)]);
        refused("mistral", json!({"sliding_window": 0}), "sliding_window");
        let types = json!({"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]});
        refused("mistral", types, "layer_types");
    }

    #[test]
    fn window_of_qwen_counts_only_when_it_is_switched_on() {
        for model_type in ["qwen2", "qwen3"] {
            let off = json!({"sliding_window": 7, "use_sliding_window": false, "max_window_layers": 1});
            assert_eq!(read(model_type, off).windows, [None, None]);
            assert_eq!(read(model_type, json!({"sliding_window": 7})).windows, [None, None]);
            let mut on = json!({"sliding_window": 7, "use_sliding_window": true, "max_window_layers": 1});
            assert_eq!(read(model_type, on.clone()).windows, [None, Some(7)]);
            on["layer_types"] = json!(["sliding_attention", "full_attention"]);
            assert_eq!(read(model_type, on.clone()).windows, [Some(7), None]);
            on["layer_types"] = json!(["sliding_attention", "chunked_attention"]);
            refused(model_type, on.clone(), "chunked_attention");
            on["layer_types"] = json!(["sliding_attention"]);
            refused(model_type, on, "1 layers of 2");
            let off = json!({"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]});
            refused(model_type, off, "layer_types");
            refused(
                model_type,
                json!({"use_sliding_window": true, "max_window_layers": 1}),
                "sliding_window",
            );
            let on = json!({"sliding_window": 7, "use_sliding_window": true});
            refused(model_type, on, "max_window_layers");
        }
    }

    #[test]
    fn window_in_a_layout_without_one_is_refused() {
        for model_type in ["llama", "glm", "glm4"] {
            assert_eq!(read(model_type, json!({"sliding_window": null})).windows, [None, None]);
            refused(model_type, json!({"sliding_window": 7}), "sliding-window");
            refused(model_type, json!({"use_sliding_window": true}), "sliding-window");
            let types = json!({"layer_types": ["sliding_attention", "full_attention"]});
            refused(model_type, types, "layer_types");
        }
    }

    #[test]
    fn biases_are_those_of_the_layout() {
        let biases = |model_type: &str, keys| {
            let a = read(model_type, keys);
            (a.qkv_bias, a.o_bias, a.mlp_bias)
        };
        let on = || json!({"attention_bias": true});
        assert_eq!(biases("llama", json!({})), (false, false, false));
        assert_eq!(biases("llama", json!({"attention_bias": true, "mlp_bias": true})), (true, true, true));
        assert_eq!(biases("mistral", json!({})), (false, false, false));
        refused("mistral", on(), "attention_bias");
        assert_eq!(biases("qwen2", json!({})), (true, false, false));
        assert_eq!(biases("qwen3", json!({})), (false, false, false));
        assert_eq!(biases("qwen3", on()), (true, true, false));
        refused("qwen3", json!({"mlp_bias": true}), "mlp_bias");
        for glm in ["glm", "glm4"] {
            assert_eq!(biases(glm, json!({})), (true, false, false));
            assert_eq!(biases(glm, json!({"attention_bias": false})), (false, false, false));
        }
        refused("llama", json!({"attention_bias": "yes"}), "attention_bias");
    }

    #[test]
    fn heads_are_turned_in_part_by_glm_only() {
        for glm in ["glm", "glm4"] {
            let a = read(glm, json!({}));
            assert_eq!((a.rotary_dim, a.rope_form, a.rope_frequencies().len()), (8, RopeForm::Neighbours, 4));
            // The exponent counts what is turned, not the head.
            assert!((a.rope_frequencies()[1] - 10_000f64.powf(-2.0 / 8.0)).abs() < 1e-15);
            let new = json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}});
            assert_eq!(read(glm, new).rotary_dim, 4);
            assert_eq!(read(glm, json!({"partial_rotary_factor": 1.0})).rotary_dim, 16);
            for odd in [0.3, 0.01, 1.5] {
                refused(glm, json!({"partial_rotary_factor": odd}), "partial_rotary_factor");
            }
            refused(glm, json!({"partial_rotary_factor": "half"}), "not a number");
            let two =
                json!({"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}});
            refused(glm, two, "in one place and");
        }
        for other in ["llama", "mistral", "qwen2", "qwen3"] {
            assert_eq!(
                (read(other, json!({})).rotary_dim, read(other, json!({})).rope_form),
                (16, RopeForm::Halves)
            );
            refused(other, json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor");
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        for layout in LAYOUTS {
            refused(layout, json!({"num_key_value_heads": 3}), "4 heads, 3 key heads");
            refused(layout, json!({"head_dim": 15}), "head width 15");
            refused(layout, json!({"intermediate_size": 0.5}), "intermediate_size");
            refused(layout, json!({"num_hidden_layers": -1}), "num_hidden_layers");
            refused(layout, json!({"hidden_act": "gelu"}), "gelu");
            refused(layout, json!({"rope_theta": 0}), "rope_theta");
            refused(layout, json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}), "dynamic");
            refused(layout, json!({"rope_scaling": {"rope_type": 3}}), "rope_type");
            refused(layout, json!({"rope_scaling": "linear"}), "not an object");
            let nested = json!({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}});
            refused(layout, nested, "differ by layer");
        }
        // Where the class in transformers has a number of its own for what is absent.
        for layout in ["qwen3", "glm", "glm4"] {
            refused(layout, json!({"head_dim": null}), "head_dim");
        }
        for layout in ["llama", "mistral", "qwen2"] {
            assert_eq!(read(layout, json!({"head_dim": null})).head_dim, 16);
            refused(layout, json!({"head_dim": null, "hidden_size": 66}), "do not divide");
        }
        for layout in &LAYOUTS[1..] {
            let mut c = with(layout, json!({}));
            c.as_object_mut().unwrap().remove("num_key_value_heads");
            let error = Architecture::from_config(&c).unwrap_err().to_string();
            assert!(error.contains("num_key_value_heads"), "{layout}: {error}");
        }
        assert_eq!(read("qwen3", json!({"num_key_value_heads": null})).kv_heads, 4);
    }

    #[test]
    fn shape_of_every_weight_by_name_and_of_no_other() {
        let a = read("glm4", json!({"attention_bias": true}));
        for m in a.modules() {
            assert_eq!(a.shape(&format!("{}.weight", m.kind.module(1))), Some(vec![m.out, m.into]));
            assert_eq!(a.shape(&format!("{}.weight", m.kind.module(2))), None);
        }
        for (kind, len) in a.vectors() {
            assert_eq!(VectorKind::parse(&kind.tensor(1)), Some((1, kind)));
            assert_eq!(a.shape(&kind.tensor(1)), Some(vec![len]));
            assert_eq!(a.shape(&kind.tensor(2)), None);
        }
        assert_eq!(a.vectors().len(), 3 + 4);
        assert_eq!(a.shape("model.layers.0.mlp.gate_up_proj.weight"), Some(vec![192, 64]));
        assert_eq!(a.shape("model.layers.0.mlp.up_proj.weight"), None);
        assert_eq!(a.shape("model.layers.0.self_attn.q_norm.weight"), None);
        assert_eq!(a.shape("model.layers.0.self_attn.o_proj.bias"), None);
        assert_eq!(a.shape("lm_head.weight"), Some(vec![100, 64]));
        let a = read("qwen3", json!({"tie_word_embeddings": true}));
        assert_eq!(a.shape("model.layers.0.self_attn.k_norm.weight"), Some(vec![16]));
        assert_eq!(a.shape("lm_head.weight"), None);
        assert_eq!(a.vectors().len(), 4);
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
