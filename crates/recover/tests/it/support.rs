//! Small models and adapters, and calls of a method on them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use checkpoint::{Checkpoint, Dtype, TensorSpec, default_metadata, pack_f32, safetensors_bytes};
use kernels::CpuEngine;
use recover::{Form, Inputs, Job, ModuleReport, Report, Result, Settings, by_name};
use serde_json::{Value, json};
use stream::NoProgress;
use tempfile::{TempDir, tempdir};

pub(crate) const Q: &str = "model.layers.0.self_attn.q_proj";
pub(crate) const K: &str = "model.layers.0.self_attn.k_proj";
pub(crate) const V: &str = "model.layers.0.self_attn.v_proj";
pub(crate) const NORM: &str = "model.layers.0.input_layernorm.weight";
pub(crate) const EMBED: &str = "model.embed_tokens.weight";

/// The name of a module's weight.
pub(crate) fn weight(module: &str) -> String {
    format!("{module}.weight")
}

/// Name, shape and values of a tensor.
pub(crate) type Named = (String, Vec<u64>, Vec<f32>);

pub(crate) fn named(name: &str, shape: &[u64], values: &[f32]) -> Named {
    (name.to_owned(), shape.to_vec(), values.to_vec())
}

/// A module of an adapter: its name, rank, B and A.
pub(crate) type Lora<'a> = (&'a str, u64, &'a [f32], &'a [f32]);

/// A folder for models and outputs.
pub(crate) struct Bench {
    root: TempDir,
}

impl Bench {
    pub(crate) fn new() -> Bench {
        Bench { root: tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// A model of one layer.
    pub(crate) fn model(&self, name: &str, dtype: Dtype, tensors: &[Named]) -> PathBuf {
        let dir = self.path(name);
        save(&dir, "model.safetensors", &stored(dtype, tensors));
        save_json(&dir, "config.json", &json!({"model_type": "llama", "num_hidden_layers": 1}));
        fs::write(dir.join("tokenizer.json"), "{}").unwrap();
        dir
    }

    /// The same in f32 with one module.
    pub(crate) fn one(&self, name: &str, shape: [u64; 2], values: &[f32]) -> PathBuf {
        self.model(name, Dtype::F32, &[named(&weight(Q), &shape, values)])
    }

    /// An adapter over a model, of scale `alpha / rank`.
    pub(crate) fn adapter(&self, name: &str, base: &Path, alpha: f64, modules: &[Lora<'_>]) -> PathBuf {
        let dir = self.path(name);
        let mut tensors = Vec::new();
        for (module, rank, b, a) in modules {
            let key = |factor: &str| format!("base_model.model.{module}.{factor}.weight");
            tensors.push(named(&key("lora_A"), &[*rank, a.len() as u64 / rank], a));
            tensors.push(named(&key("lora_B"), &[b.len() as u64 / rank, *rank], b));
        }
        save(&dir, "adapter_model.safetensors", &stored(Dtype::F32, &tensors));
        let base = format!("../{}", base.file_name().unwrap().to_str().unwrap());
        let names: Vec<&str> = modules.iter().map(|(module, ..)| *module).collect();
        let rank = modules[0].1;
        save_json(
            &dir,
            "adapter_config.json",
            &json!({"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": names,
                "base_model_name_or_path": base, "rank_pattern": {}, "alpha_pattern": {}}),
        );
        dir
    }

    /// Runs a method into `out`.
    pub(crate) fn run(&self, method: &str, settings: &Settings, inputs: &Inputs) -> Result<Report> {
        self.run_as(method, settings, inputs, Form::Merged, "out")
    }

    pub(crate) fn run_as(
        &self,
        method: &str,
        settings: &Settings,
        inputs: &Inputs,
        form: Form,
        out: &str,
    ) -> Result<Report> {
        let method = (by_name(method)?.build)(settings)?;
        let out = self.path(out);
        let job = Job {
            out: &out,
            form,
            force: false,
            memory_bytes: 1 << 30,
            algebra: &CpuEngine::new(),
            stop: &AtomicBool::new(false),
            progress: &NoProgress,
        };
        recover::recover(&*method, inputs, &job)
    }

    /// The values that a tensor of a folder stands for.
    pub(crate) fn values(&self, dir: &str, tensor: &str) -> Vec<f32> {
        Checkpoint::open(&self.path(dir), None).unwrap().read_f32(tensor).unwrap()
    }

    /// The values of the module of [`one`](Self::one) in `out`.
    pub(crate) fn out(&self) -> Vec<f32> {
        self.values("out", &weight(Q))
    }
}

fn stored(dtype: Dtype, tensors: &[Named]) -> Vec<(TensorSpec, Vec<u8>)> {
    let one = |(name, shape, values): &Named| {
        assert_eq!(shape.iter().product::<u64>(), values.len() as u64, "{name}");
        ((name.clone(), dtype, shape.clone()), pack_f32(values, dtype).unwrap())
    };
    tensors.iter().map(one).collect()
}

pub(crate) fn save(dir: &Path, file: &str, tensors: &[(TensorSpec, Vec<u8>)]) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join(file), safetensors_bytes(&default_metadata(), tensors).unwrap()).unwrap();
}

pub(crate) fn save_json(dir: &Path, file: &str, value: &Value) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join(file), value.to_string()).unwrap();
}

/// Inputs of these folders.
pub(crate) fn inputs(target: &Path) -> Inputs {
    Inputs { target: target.to_path_buf(), ..Inputs::default() }
}

/// The report of a module.
#[track_caller]
pub(crate) fn module<'a>(report: &'a Report, name: &str) -> &'a ModuleReport {
    report.modules.iter().find(|module| module.name == name).unwrap()
}

/// Values within a share of the largest: some f32 roundings of numbers of that size.
#[track_caller]
pub(crate) fn assert_close(got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(0f64, |largest, x| largest.max(x.abs()));
    for (index, (&got, &want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(got) - want).abs();
        assert!(error <= 1e-6 * largest, "element {index}: got {got}, want {want}");
    }
}

/// The same for a number; `None` fails.
#[track_caller]
pub(crate) fn assert_near(got: Option<f64>, want: f64) {
    let error = (got.unwrap() - want).abs();
    // Products that were rounded to f32 once or twice.
    assert!(error <= 1e-6 * want.abs().max(1.0), "got {got:?}, want {want}");
}

/// Numbers that look random and are the same everywhere, between -1 and 1.
pub(crate) fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 40) as f32 / (1u64 << 23) as f32) - 1.0
        })
        .collect()
}

/// The product of row-major matrices, in f64.
pub(crate) fn product(a: &[f64], b: &[f64], rows: usize, depth: usize, cols: usize) -> Vec<f64> {
    let element = |i: usize, j: usize| (0..depth).map(|k| a[i * depth + k] * b[k * cols + j]).sum();
    (0..rows * cols).map(|at| element(at / cols, at % cols)).collect()
}

pub(crate) fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
