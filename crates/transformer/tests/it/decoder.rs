//! A small random decoder of each layout.

use candle_core::{Device, Tensor, Var};
use serde_json::json;
use std::collections::BTreeMap;
use transformer::architecture::LAYOUTS;
use transformer::model::Cache;
use transformer::{
    AnswerBatch, Architecture, Attachment, Attachments, Batch, LinearShape, Model, ModelError, ModuleKind,
    Row, Taps, VectorKind, WeightSource, generate,
};

struct Small(BTreeMap<String, Vec<f32>>, Architecture);

/// xorshift: fixed values, no dependency.
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

impl WeightSource for Small {
    fn read(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), ModelError> {
        let shape = self.1.shape(name).unwrap_or_else(|| panic!("the decoder asks for `{name}`"));
        let n = shape.iter().product();
        if let Some(values) = self.0.get(name) {
            return Ok((shape, values.clone()));
        }
        let seed = name.bytes().fold(7, |s: u64, b| s.wrapping_mul(31) + u64::from(b));
        let mut values = noise(n, seed);
        if shape.len() == 1 && name.contains("norm") {
            values.iter_mut().for_each(|v| *v += 1.0);
        }
        Ok((shape, values))
    }
}

/// Windows shorter than the rows; heads whose width is not that of the stream over their number.
fn architecture(model_type: &str) -> Architecture {
    let mut config = json!({
        "model_type": model_type, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 24, "vocab_size": 40, "rms_norm_eps": 1e-5,
        "rope_theta": 100.0, "tie_word_embeddings": model_type == "qwen2"
    });
    let more = match model_type {
        "mistral" => json!({"sliding_window": 3}),
        "qwen3" => json!({"head_dim": 6, "use_sliding_window": true, "sliding_window": 2,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
        "glm" => json!({"head_dim": 4, "attention_bias": false}),
        "glm4" => json!({"head_dim": 8, "partial_rotary_factor": 0.5, "attention_bias": true}),
        _ => json!({}),
    };
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    Architecture::from_config(&config).unwrap()
}

pub(crate) fn model(model_type: &str) -> Model {
    let a = architecture(model_type);
    Model::new(a.clone(), &Small(BTreeMap::new(), a)).unwrap()
}

pub(crate) fn rows() -> Vec<Row> {
    vec![
        Row { prompt: vec![1, 2, 3, 4, 5], answer: vec![6, 7] },
        Row { prompt: vec![9, 8], answer: vec![3, 3, 3] },
        Row { prompt: vec![11], answer: vec![12] },
    ]
}

pub(crate) fn flat(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn gradients_reach_every_attachment_and_agree_with_differences() {
    for model_type in LAYOUTS {
        let model = model(model_type);
        let a = model.architecture().clone();
        let dev = &Device::Cpu;
        let mut attachments = Attachments::none();
        let mut vars: Vec<(String, Var)> = Vec::new();
        for layer in 0..a.layers {
            let scale = Var::from_slice(&[0.7f32], 1, dev).unwrap();
            vars.push((format!("scale of layer {layer}"), scale.clone()));
            for LinearShape { kind, out, into: inn, .. } in a.modules() {
                let seed = (layer * 10 + kind as usize) as u64;
                let va = Var::from_tensor(&Tensor::from_vec(noise(2 * inn, seed), (2, inn), dev).unwrap())
                    .unwrap();
                let vb =
                    Var::from_tensor(&Tensor::from_vec(noise(2 * out, seed + 500), (out, 2), dev).unwrap())
                        .unwrap();
                let at = Attachment {
                    a: va.as_tensor().clone(),
                    b: vb.as_tensor().clone(),
                    scale: scale.as_tensor().clone(),
                };
                attachments.add(layer, kind, at);
                vars.push((format!("A of {}", kind.module(layer)), va));
                vars.push((format!("B of {}", kind.module(layer)), vb));
            }
            for (i, (kind, len)) in a.vectors().into_iter().enumerate() {
                let delta = noise(len, (layer * 10 + i + 900) as u64);
                let delta = Var::from_tensor(&Tensor::from_vec(delta, len, dev).unwrap()).unwrap();
                let scale = scale.as_tensor().clone();
                attachments.add_vector(layer, kind, delta.as_tensor().clone(), scale);
                vars.push((kind.tensor(layer), delta));
            }
        }
        let batch = AnswerBatch::new(&rows(), 0);
        let loss = |at: &Attachments| flat(&batch.cross_entropy(&model, at).unwrap())[0];
        let grads = batch.cross_entropy(&model, &attachments).unwrap().backward().unwrap();
        for (name, var) in &vars {
            let g =
                flat(grads.get(var).unwrap_or_else(|| panic!("{model_type}: no gradient reaches {name}")));
            assert!(g.iter().any(|g| g.abs() > 1e-7), "{model_type}: the gradient of {name} is zero");
            // The steepest coordinate against a central difference.
            let i = (0..g.len()).max_by(|&i, &j| g[i].abs().total_cmp(&g[j].abs())).unwrap();
            let x = flat(var.as_tensor());
            let at = |d: f32| {
                let mut x = x.clone();
                x[i] += d;
                var.set(&Tensor::from_vec(x, var.shape(), dev).unwrap()).unwrap();
                f64::from(loss(&attachments))
            };
            let h = 5e-3f32;
            let want = (at(h) - at(-h)) / (2.0 * f64::from(h));
            at(0.0);
            // f32 rounding of a loss near 4 is 5e-7, over 2h = 1e-4; truncation is O(h²).
            let err = (f64::from(g[i]) - want).abs();
            assert!(err < 3e-4 + 2e-2 * want.abs(), "{model_type}: {name}[{i}]: {} against {want}", g[i]);
        }
    }
}

#[test]
fn frozen_weights_get_no_gradient_and_trainable_ones_all_do() {
    for model_type in LAYOUTS {
        let a = architecture(model_type);
        let model = Model::trainable(a.clone(), &Small(BTreeMap::new(), a)).unwrap();
        let batch = AnswerBatch::new(&rows(), 0);
        let grads = batch.cross_entropy(&model, &Attachments::none()).unwrap().backward().unwrap();
        assert!(model.variables().len() > 20);
        for (name, var) in model.variables() {
            assert!(grads.get(var).is_some(), "{model_type}: no gradient reaches `{name}`");
        }
    }
    assert!(model("llama").variables().is_empty());
}

#[test]
fn attachment_equals_the_weight_with_the_product_added() {
    LAYOUTS.into_iter().for_each(attachment_equals_the_weight);
}

fn attachment_equals_the_weight(model_type: &str) {
    let a = architecture(model_type);
    let plain = Small(BTreeMap::new(), a.clone());
    let mut merged = BTreeMap::new();
    let mut attachments = Attachments::none();
    for layer in 0..a.layers {
        for LinearShape { kind, out, into: inn, .. } in a.modules() {
            let (b, f) = (noise(out * 2, layer as u64 + 3), noise(2 * inn, layer as u64 + 9));
            attachments.add_fixed(layer, kind, (&b, &f), 2, 1.5).unwrap();
            let name = format!("{}.weight", kind.module(layer));
            let (_, mut w) = plain.read(&name).unwrap();
            for r in 0..out {
                for c in 0..inn {
                    w[r * inn + c] += 1.5 * (b[2 * r] * f[c] + b[2 * r + 1] * f[inn + c]);
                }
            }
            merged.insert(name, w);
        }
        for (i, (kind, len)) in a.vectors().into_iter().enumerate() {
            let delta = noise(len, (layer * 10 + i + 900) as u64);
            let (_, mut w) = plain.read(&kind.tensor(layer)).unwrap();
            w.iter_mut().zip(&delta).for_each(|(w, d)| *w += 0.5 * d);
            merged.insert(kind.tensor(layer), w);
            let [delta, half] = [delta, vec![0.5]].map(|x| {
                let n = x.len();
                Tensor::from_vec(x, n, &Device::Cpu).unwrap()
            });
            attachments.add_vector(layer, kind, delta, half);
        }
    }
    let left = Model::new(a.clone(), &plain).unwrap();
    let right = Model::new(a.clone(), &Small(merged, a)).unwrap();
    let batch = AnswerBatch::new(&rows(), 0);
    let none = Attachments::none();
    let want = flat(&batch.logits(&right, &none).unwrap());
    let merged = left.merged(&attachments).unwrap();
    for (how, got) in
        [("attached", batch.logits(&left, &attachments)), ("merged", batch.logits(&merged, &none))]
    {
        for (i, (x, y)) in flat(&got.unwrap()).iter().zip(&want).enumerate() {
            // Two orders of the same f32 sums of about 24 terms.
            assert!(
                (x - y).abs() < 1e-4 * (1.0 + y.abs()),
                "{model_type}, {how}: logit {i}: {x} against {y}"
            );
        }
    }
}

#[test]
fn addition_to_a_place_that_the_layout_does_not_have_is_refused() {
    for (model_type, kind) in [("glm4", ModuleKind::Up), ("llama", ModuleKind::GateUp)] {
        let mut at = Attachments::none();
        at.add_fixed(1, kind, (&[1.0; 24], &[1.0; 16]), 1, 1.0).unwrap();
        let error = AnswerBatch::new(&rows(), 0).logits(&model(model_type), &at).unwrap_err();
        let message = error.to_string();
        assert!(message.contains(&kind.module(1)), "{message}");
        assert!(error.hint().unwrap().contains("`glm4`"));
    }
    let one = Tensor::from_vec(vec![1f32], 1, &Device::Cpu).unwrap();
    let bias = VectorKind::Bias(ModuleKind::O);
    for (layer, kind) in [(0, VectorKind::QNorm), (0, bias), (3, VectorKind::MlpNorm)] {
        let mut at = Attachments::none();
        at.add_vector(layer, kind, one.clone(), one.clone());
        let error = AnswerBatch::new(&rows(), 0).logits(&model("llama"), &at).unwrap_err().to_string();
        assert!(error.contains(&kind.tensor(layer)), "{error}");
    }
}

/// Hidden states of a row alone, without a cache: `[tokens][hidden]`.
fn alone(model: &Model, row: &[u32]) -> Vec<Vec<f32>> {
    let batch = Batch::pad_behind(&[row.to_vec()], 0);
    let hidden = model.hidden(&batch, &Attachments::none(), None, None).unwrap();
    flat(&hidden).chunks(16).map(<[f32]>::to_vec).collect()
}

#[track_caller]
fn near(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        // Products of another shape may add in another order: some 24 terms a sum, three layers.
        assert!((got - want).abs() < 1e-4 * (1.0 + want.abs()), "{what}, {i}: {got} against {want}");
    }
}

#[test]
fn hidden_states_do_not_depend_on_padding_or_the_cache() {
    let rows = [vec![1, 2, 3, 4, 5, 6, 7, 8], vec![9, 8, 30], vec![11, 30, 12, 3, 22]];
    for model_type in LAYOUTS {
        let model = model(model_type);
        let want = rows.each_ref().map(|row| alone(&model, row));
        let none = Attachments::none();
        for (front, batch) in [(true, Batch::pad_front(&rows, 0)), (false, Batch::pad_behind(&rows, 0))] {
            let got = flat(&model.hidden(&batch, &none, None, None).unwrap());
            for (r, row) in rows.iter().enumerate() {
                let first = r * 8 + if front { 8 - row.len() } else { 0 };
                for (t, want) in want[r].iter().enumerate() {
                    let at = (first + t) * 16;
                    near(&format!("{model_type}: row {r}, token {t}"), &got[at..at + 16], want);
                }
            }
        }
        // The first three columns at once, then one by one; the longest padding is longer than the windows.
        let whole = Batch::pad_front(&rows, 0);
        let mut cache = Cache::default();
        for (from, to) in [(0, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7, 8)] {
            let ids = (0..3).flat_map(|r| whole.ids[r * 8 + from..r * 8 + to].to_vec()).collect();
            let part = Batch { ids, tokens: to - from, starts: whole.starts.clone() };
            let got = flat(&model.hidden(&part, &none, Some(&mut cache), None).unwrap());
            for (r, row) in rows.iter().enumerate() {
                for column in from..to {
                    let Some(t) = column.checked_sub(8 - row.len()) else { continue };
                    let at = (r * (to - from) + column - from) * 16;
                    near(&format!("{model_type}: row {r}, column {column}"), &got[at..at + 16], &want[r][t]);
                }
            }
        }
    }
}

#[test]
fn a_window_hides_what_lies_further_back() {
    // Each layer of three sees two positions further back: the last of nine sees three to nine.
    let model = model("mistral");
    let base = alone(&model, &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
    let other = alone(&model, &[31, 32, 3, 4, 5, 6, 7, 8, 9]);
    assert_eq!(base[8], other[8]);
    assert_ne!(base[7], other[7]);
    // A layer that sees all carries it on.
    let model = self::model("qwen3");
    let (base, other) =
        (alone(&model, &[1, 2, 3, 4, 5, 6, 7, 8, 9]), alone(&model, &[31, 2, 3, 4, 5, 6, 7, 8, 9]));
    assert_ne!(base[8], other[8]);
}

#[test]
fn generation_does_not_depend_on_the_batch_or_the_cache() {
    for model_type in LAYOUTS {
        let model = model(model_type);
        let none = Attachments::none();
        let prompts = vec![vec![1, 2, 3, 4, 5, 6, 7], vec![9, 8], vec![11, 30, 12]];
        let together = generate(&model, &none, &prompts, &[0], 6).unwrap();
        for (prompt, got) in prompts.iter().zip(&together) {
            let alone = generate(&model, &none, std::slice::from_ref(prompt), &[0], 6).unwrap();
            assert_eq!(&alone[0], got, "{model_type}: {prompt:?}");
            // Without a cache: the whole row again for each token.
            let mut row = prompt.clone();
            let mut slow = Vec::new();
            while slow.len() < 6 {
                let batch = Batch::pad_front(std::slice::from_ref(&row), 0);
                let hidden = model.hidden(&batch, &none, None, None).unwrap();
                let id = Model::greedy(&model.logits(&hidden, &[row.len() as u32 - 1]).unwrap()).unwrap()[0];
                if id == 0 {
                    break;
                }
                row.push(id);
                slow.push(id);
            }
            assert_eq!(&slow, got, "{model_type}: {prompt:?}");
        }
    }
}

#[test]
fn generation_ends_at_a_stop_token_and_leaves_it_out() {
    let model = model("llama");
    let none = Attachments::none();
    let free = generate(&model, &none, &[vec![1, 2, 3]], &[], 6).unwrap();
    assert_eq!(free[0].len(), 6);
    let stop = free[0][2];
    let first = free[0].iter().position(|&id| id == stop).unwrap();
    let ended = generate(&model, &none, &[vec![1, 2, 3]], &[stop], 6).unwrap();
    assert_eq!(ended[0], free[0][..first]);
}

#[test]
fn taps_are_what_each_block_adds() {
    let model = model("qwen2");
    let mut taps = Taps::default();
    let batch = Batch::pad_behind(&[vec![1, 2, 3], vec![4, 5]], 0);
    model.hidden(&batch, &Attachments::none(), None, Some(&mut taps)).unwrap();
    assert_eq!((taps.inputs.len(), taps.outputs.len()), (3, 3));
    for layer in 0..2 {
        let sum = flat(&(&taps.inputs[layer] + &taps.outputs[layer]).unwrap());
        let next = flat(&taps.inputs[layer + 1]);
        for (a, b) in sum.iter().zip(&next) {
            // (x + y) − x + x differs from x + y by roundings of values near 3.
            assert!((a - b).abs() < 1e-5, "layer {layer}: {a} against {b}");
        }
    }
}

#[test]
fn kl_to_itself_is_zero_and_grows_with_a_change() {
    let model = model("llama");
    let batch = AnswerBatch::new(&rows(), 0);
    let none = Attachments::none();
    let reference = batch.reference(&model, &none).unwrap();
    assert!(flat(&batch.kl(&model, &none, &reference).unwrap())[0].abs() < 1e-6);
    let mut changed = Attachments::none();
    changed.add_fixed(1, ModuleKind::Down, (&noise(16, 1), &noise(24, 2)), 1, 5.0).unwrap();
    assert!(flat(&batch.kl(&model, &changed, &reference).unwrap())[0] > 1e-4);
}

#[test]
fn weight_of_another_shape_is_refused_by_name() {
    let a = architecture("llama");
    struct Wrong(Small);
    impl WeightSource for Wrong {
        fn read(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), ModelError> {
            let (mut shape, mut values) = self.0.read(name)?;
            if name == "model.layers.1.mlp.up_proj.weight" {
                shape[0] += 1;
                values.extend(vec![0.0; shape[1]]);
            }
            Ok((shape, values))
        }
    }
    let error = Model::new(a.clone(), &Wrong(Small(BTreeMap::new(), a))).unwrap_err().to_string();
    assert!(error.contains("model.layers.1.mlp.up_proj.weight"), "{error}");
}
