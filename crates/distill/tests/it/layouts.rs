//! A gene of each layout, extracted from folders and hung on a model, against the same gene fused into the folder.

use checkpoint::{Checkpoint, Dtype, TensorSpec, default_metadata, pack_f32, safetensors_bytes};
use distill::GeneAttachments;
use gene::{Class, Gene};
use kernels::CpuEngine;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use stream::{Extract, Form, Fuse, NoProgress, Ranks, extract, fuse};
use transformer::architecture::LAYOUTS;
use transformer::{Architecture, Attachments, Batch, Model};

use crate::calibrate::noise;

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn config(model_type: &str) -> Value {
    let mut config = json!({
        "model_type": model_type, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "vocab_size": 40, "rms_norm_eps": 1e-5,
        "rope_theta": 100.0, "tie_word_embeddings": true, "attention_bias": model_type != "mistral"
    });
    if model_type == "mistral" {
        config["sliding_window"] = json!(3);
    }
    config
}

/// A random model, and what is added to each of its weights in layers: a product of rank 2 to a matrix.
fn model(a: &Architecture) -> (Tensors, Tensors) {
    let mut names = vec!["model.embed_tokens.weight".to_string(), "model.norm.weight".into()];
    for layer in 0..a.layers {
        names.extend(a.modules().iter().map(|m| format!("{}.weight", m.kind.module(layer))));
        names.extend(a.vectors().iter().map(|(kind, _)| kind.tensor(layer)));
    }
    let (mut weights, mut added) = (Tensors::new(), Tensors::new());
    for (i, name) in names.into_iter().enumerate() {
        let (seed, shape) = (i as u64 + 1, a.shape(&name).unwrap());
        let lift = if name.contains("norm") { 1.0 } else { 0.0 };
        let values = noise(shape.iter().product(), seed).iter().map(|x| x + lift).collect();
        let change = match shape[..] {
            _ if !name.contains("layers") => None,
            [out, into] => {
                let (b, f) = (noise(out * 2, seed + 100), noise(2 * into, seed + 200));
                let product = |at: usize| {
                    let (o, i) = (at / into, at % into);
                    b[2 * o] * f[i] + b[2 * o + 1] * f[into + i]
                };
                Some((0..out * into).map(product).collect())
            }
            _ => Some(noise(shape[0], seed + 300)),
        };
        if let Some(change) = change {
            added.insert(name.clone(), (shape.clone(), change));
        }
        weights.insert(name, (shape, values));
    }
    (weights, added)
}

/// `weights` and, where `which` says so, what is added to them.
fn save(
    dir: PathBuf,
    config: &Value,
    weights: &Tensors,
    added: &Tensors,
    which: fn(&str) -> bool,
) -> PathBuf {
    let tensors: Vec<(TensorSpec, Vec<u8>)> = weights
        .iter()
        .map(|(name, (shape, values))| {
            let mut values = values.clone();
            if let Some((_, change)) = added.get(name).filter(|_| which(name)) {
                values.iter_mut().zip(change).for_each(|(x, d)| *x += d);
            }
            let shape = shape.iter().map(|&d| d as u64).collect();
            ((name.clone(), Dtype::F32, shape), pack_f32(&values, Dtype::F32).unwrap())
        })
        .collect();
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    fs::write(dir.join("model.safetensors"), safetensors_bytes(&default_metadata(), &tensors).unwrap())
        .unwrap();
    dir
}

fn open(dir: &Path) -> Checkpoint {
    Checkpoint::open(dir, None).unwrap()
}

fn logits(dir: &Path, attachments: &Attachments) -> Vec<f32> {
    let model = Model::open(&open(dir)).unwrap();
    let batch = Batch::pad_front(&[vec![1, 2, 3, 4, 5, 6, 7], vec![9, 8, 30]], 0);
    let hidden = model.hidden(&batch, attachments, None, None).unwrap();
    model.all_logits(&hidden).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn far(x: &[f32], y: &[f32]) -> f32 {
    assert_eq!(x.len(), y.len());
    x.iter().zip(y).map(|(x, y)| (x - y).abs()).fold(0.0, |worst, d| if d <= worst { worst } else { d })
}

#[test]
fn gene_on_a_model_is_the_gene_in_its_weights() {
    for model_type in LAYOUTS {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let config = config(model_type);
        let a = Architecture::from_config(&config).unwrap();
        let (weights, added) = model(&a);
        // The degraded model is the plain one: the gene is what was added.
        let degraded = save(path("degraded"), &config, &weights, &added, |_| false);
        let coefficients = BTreeMap::from([(0, 0.8), (1, 0.6)]);
        let linear: fn(&str) -> bool = |name| name.ends_with("_proj.weight");
        let all: fn(&str) -> bool = |_| true;
        for (name, which, form) in [("all", all, Form::Merged), ("linear", linear, Form::Both)] {
            let aligned = save(path(&format!("aligned-{name}")), &config, &weights, &added, which);
            let gene = path(&format!("gene-{name}"));
            let job = Extract::new(open(&aligned), open(&degraded), Ranks::Fixed(3), &gene);
            extract(&CpuEngine::new(), &job, &NoProgress).unwrap();
            let gene = Gene::open(&gene).unwrap();
            let low_rank = gene.modules().iter().filter(|m| m.class == Class::LowRank).count();
            assert_eq!(low_rank, 2 * a.modules().len(), "{model_type}, {name}");
            let full = gene.rest().iter().filter(|r| r.class == Class::Full).count();
            assert_eq!(full, if name == "all" { 2 * a.vectors().len() } else { 0 }, "{model_type}, {name}");

            let attached = GeneAttachments::new(&gene).unwrap().at(&coefficients).unwrap();
            let want = logits(&degraded, &attached);
            assert!(far(&want, &logits(&degraded, &Attachments::none())) > 0.1, "{model_type}, {name}");
            let out = path(&format!("fused-{name}"));
            let job = Fuse { form, ..Fuse::new(gene, coefficients.clone(), open(&degraded), &out) };
            for fused in fuse(&CpuEngine::new(), &job, &NoProgress).unwrap().outputs {
                // One sum of some 24 terms in another order, in each of 15 modules.
                let worst = far(&want, &logits(&fused, &Attachments::none()));
                assert!(worst < 1e-4, "{model_type}, {}: {worst}", fused.display());
            }
        }
    }
}
