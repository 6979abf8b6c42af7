//! A small random decoder, and rows for it.

use std::path::PathBuf;

use candle_core::Tensor;
use checkpoint::Dtype;
use recover::{ModuleFactors, Shot};
use serde_json::{Value, json};
use transformer::{Architecture, Attachments, Model, ModelError, ModuleKind, Row, WeightSource};

use crate::support::{Bench, Named, named, save_json};

/// xorshift: fixed values in −0.3 … 0.3, no dependency.
pub(crate) fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            ((x >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.6
        })
        .collect()
}

struct Noise(Architecture);

impl WeightSource for Noise {
    fn read(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), ModelError> {
        let a = &self.0;
        let (h, q, kv) = (a.hidden, a.heads * a.head_dim, a.kv_heads * a.head_dim);
        let shape = match name.rsplit('.').nth(1).unwrap() {
            "embed_tokens" | "lm_head" => vec![a.vocab, h],
            "q_proj" => vec![q, h],
            "k_proj" | "v_proj" => vec![kv, h],
            "o_proj" => vec![h, q],
            "gate_proj" | "up_proj" => vec![a.ffn, h],
            "down_proj" => vec![h, a.ffn],
            _ => vec![h],
        };
        let n = shape.iter().product();
        let seed = name.bytes().fold(7, |s: u64, b| s.wrapping_mul(31) + u64::from(b));
        let lift = if shape.len() == 1 { 1.0 } else { 0.0 };
        Ok((shape, noise(n, seed).iter().map(|x| x + lift).collect()))
    }
}

fn config() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 24, "vocab_size": 40, "rms_norm_eps": 1e-5,
        "rope_theta": 100.0, "tie_word_embeddings": false
    })
}

/// Two layers of width 16.
pub(crate) fn model() -> Model {
    let a = Architecture::from_config(&config()).unwrap();
    Model::new(a.clone(), &Noise(a)).unwrap()
}

/// The same as a folder in bf16, every weight moved by up to `moved` of the noise of `seed`, with a tokenizer of its 40
/// words: `w0` to `w37`, `<user>` and `<end>`.
pub(crate) fn folder(bench: &Bench, name: &str, moved: f32, seed: u64) -> PathBuf {
    let a = Architecture::from_config(&config()).unwrap();
    let mut names = vec!["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
        .into_iter()
        .map(String::from)
        .collect::<Vec<_>>();
    for layer in 0..a.layers {
        names.extend(a.modules().iter().map(|m| format!("{}.weight", m.kind.module(layer))));
        let norms = ["input_layernorm", "post_attention_layernorm"];
        names.extend(norms.map(|norm| format!("model.layers.{layer}.{norm}.weight")));
    }
    let source = Noise(a);
    let tensors: Vec<Named> = names
        .iter()
        .enumerate()
        .map(|(i, name)| {
            let (shape, values) = source.read(name).unwrap();
            let shape: Vec<u64> = shape.into_iter().map(|side| side as u64).collect();
            let other = noise(values.len(), seed + i as u64);
            let values: Vec<f32> = values.iter().zip(other).map(|(x, y)| x + moved * y).collect();
            named(name, &shape, &values)
        })
        .collect();
    let dir = bench.model(name, Dtype::Bf16, &tensors);
    save_json(&dir, "config.json", &config());
    let words = (0..38).map(|i| format!("w{i}")).chain(["<user>".to_owned(), "<end>".to_owned()]);
    let vocab: serde_json::Map<String, Value> = words.enumerate().map(|(i, word)| (word, json!(i))).collect();
    let tokenizer = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}});
    save_json(&dir, "tokenizer.json", &tokenizer);
    let template = "{% for m in messages %}<user> {{ m.content }} <end>{% endfor %}";
    save_json(&dir, "tokenizer_config.json", &json!({"eos_token": "<end>", "chat_template": template}));
    dir
}

/// Prompts of five words with answers of three.
pub(crate) fn shots(seed: u64, n: usize) -> Vec<Shot> {
    let words: Vec<String> =
        noise(n * 8, seed).iter().map(|x| format!("w{}", ((x + 0.3) / 0.6 * 37.0) as u32)).collect();
    words.chunks(8).map(|w| Shot { prompt: w[..5].join(" "), answer: w[5..].join(" ") }).collect()
}

/// Prompts of six tokens, answered greedily by `model` with `attachments`.
pub(crate) fn answered(model: &Model, attachments: &Attachments, seed: u64, n: usize) -> Vec<Row> {
    let ids: Vec<u32> = noise(n * 6, seed).iter().map(|x| ((x + 0.3) / 0.6 * 39.0) as u32).collect();
    let prompts: Vec<Vec<u32>> = ids.chunks(6).map(<[u32]>::to_vec).collect();
    let answers = transformer::generate(model, attachments, &prompts, &[], 3).unwrap();
    prompts.into_iter().zip(answers).map(|(prompt, answer)| Row { prompt, answer }).collect()
}

/// Rank 2 on the modules that write into the residual stream: another model with the same weights.
pub(crate) fn other(size: f32) -> Attachments {
    let mut out = Attachments::none();
    for layer in 0..2 {
        for (i, (kind, inn)) in [(ModuleKind::O, 16), (ModuleKind::Down, 24)].into_iter().enumerate() {
            let seed = 1000 + 10 * layer as u64 + i as u64;
            out.add_fixed(layer, kind, (&noise(32, seed), &noise(2 * inn, seed + 5)), 2, size).unwrap();
        }
    }
    out
}

/// `B A` in f64.
pub(crate) fn product(f: &ModuleFactors) -> Vec<f64> {
    let inn = f.a.len() / f.rank;
    let mut out = vec![0f64; f.b.len() / f.rank * inn];
    for (row, b) in out.chunks_mut(inn).zip(f.b.chunks(f.rank)) {
        for (b, a) in b.iter().zip(f.a.chunks(inn)) {
            for (o, a) in row.iter_mut().zip(a) {
                *o += f64::from(*b) * f64::from(*a);
            }
        }
    }
    out
}

pub(crate) fn flat(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}
