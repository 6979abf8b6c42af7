//! A small random decoder, and rows for it.

use candle_core::Tensor;
use recover::ModuleFactors;
use serde_json::json;
use transformer::{Architecture, Attachments, Model, ModelError, ModuleKind, Row, WeightSource};

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

/// Two layers of width 16.
pub(crate) fn model() -> Model {
    let a = Architecture::from_config(&json!({
        "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 24, "vocab_size": 40, "rms_norm_eps": 1e-5,
        "rope_theta": 100.0, "tie_word_embeddings": false
    }))
    .unwrap();
    Model::new(a.clone(), &Noise(a)).unwrap()
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
