//! Pairs of checkpoints with random weights, in the names and shapes of real models.
//!
//! The aligned side is N(0, 0.02^2), from a counter, so a tensor depends on its name and the seed only. The degraded
//! side is its linear weights plus a change of rank 16 and 3 % of their norm, rounded once; embeddings are equal, norms
//! of every fourth layer differ. 8-bit pairs share their codes but for one in sixteen, and have scales that differ by up
//! to 3 %. Headers alone, with holes instead of weights, take no disk and no time at any size.
//!
//! Not here: models that say anything.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use checkpoint::{
    CheckpointError, Dtype, FolderWriter, INDEX_FILE, Role, TensorSpec, default_metadata, index_json, role,
    safetensors_header, shard_plan,
};
use kernels::{CpuEngine, Engine, KernelError, Shape, bf16_bits};
use rayon::prelude::*;
use serde_json::{Value, json};

/// Rank of the change.
const RANK: usize = 16;
/// Size of the change in relation to the weights.
const CHANGE: f32 = 0.03;
/// Size of the weights.
const SIGMA: f32 = 0.02;
/// Rows and columns of an 8-bit block.
const BLOCK: u64 = 128;

/// Why a pair could not be written, or a limit not be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// A folder could not be written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// An operation failed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The operating system said no.
    #[error("cannot use `{}`", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
}

/// How weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// bf16.
    Bf16,
    /// 8 bits with a scale for each block of 128 x 128; what is no linear weight stays bf16.
    Fp8,
}

/// The sides of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Model {
    /// `model_type`.
    pub model_type: &'static str,
    /// Decoder layers.
    pub layers: u64,
    /// Width.
    pub hidden: u64,
    /// Inner width of the dense feed-forward part.
    pub intermediate: u64,
    /// Outputs of q, and of k and v.
    pub attention: [u64; 2],
    /// Rows of the embedding; the head is tied to it.
    pub vocabulary: u64,
    /// Experts of a layer, 0 for none, and their inner width.
    pub experts: [u64; 2],
    /// Layers at the beginning without experts.
    pub dense_layers: u64,
}

impl Model {
    /// The model of that name.
    pub fn named(name: &str) -> Option<Model> {
        let dense = |layers, hidden, intermediate, attention, vocabulary| Model {
            model_type: "llama",
            layers,
            hidden,
            intermediate,
            attention,
            vocabulary,
            experts: [0, 0],
            dense_layers: 0,
        };
        let experts = |layers, experts, dense_layers| Model {
            model_type: "qwen3_moe",
            experts,
            dense_layers,
            ..dense(layers, 2048, 6144, [4096, 512], 151_936)
        };
        Some(match name {
            "qwen2-0.5b" => Model { model_type: "qwen2", ..dense(24, 896, 4864, [896, 128], 151_936) },
            "llama-1b" => dense(16, 2048, 8192, [2048, 512], 128_256),
            "llama-1b-blocks" => dense(16, 2048, 8192, [2048, 512], 4096),
            "llama-7b" => dense(32, 4096, 11_008, [4096, 4096], 32_000),
            "llama-70b" => dense(80, 8192, 28_672, [8192, 1024], 128_256),
            "qwen3-30b-a3b" => experts(48, [128, 768], 0),
            "moe-small" => experts(3, [128, 768], 0),
            "deepseek-v3" => Model {
                model_type: "deepseek_v3",
                experts: [256, 2048],
                dense_layers: 3,
                ..dense(61, 7168, 18_432, [24_576, 576], 129_280)
            },
            "tiny" => dense(2, 64, 160, [64, 32], 300),
            _ => return None,
        })
    }

    /// Names that [`named`](Self::named) knows.
    pub const NAMES: [&'static str; 9] = [
        "qwen2-0.5b",
        "llama-1b",
        "llama-1b-blocks",
        "llama-7b",
        "llama-70b",
        "qwen3-30b-a3b",
        "moe-small",
        "deepseek-v3",
        "tiny",
    ];

    /// Linear weights and norms, with their sides.
    fn tensors(&self) -> Vec<(String, Vec<u64>)> {
        let Model { hidden, intermediate, attention: [q, kv], .. } = *self;
        let mut tensors = vec![
            ("model.embed_tokens.weight".to_owned(), vec![self.vocabulary, hidden]),
            ("model.norm.weight".to_owned(), vec![hidden]),
        ];
        for layer in 0..self.layers {
            let mut put = |name: &str, shape: Vec<u64>| {
                tensors.push((format!("model.layers.{layer}.{name}.weight"), shape))
            };
            put("self_attn.q_proj", vec![q, hidden]);
            put("self_attn.k_proj", vec![kv, hidden]);
            put("self_attn.v_proj", vec![kv, hidden]);
            put("self_attn.o_proj", vec![hidden, q]);
            put("input_layernorm", vec![hidden]);
            put("post_attention_layernorm", vec![hidden]);
            let [experts, inner] = if layer < self.dense_layers { [0, 0] } else { self.experts };
            if experts == 0 {
                put("mlp.gate_proj", vec![intermediate, hidden]);
                put("mlp.up_proj", vec![intermediate, hidden]);
                put("mlp.down_proj", vec![hidden, intermediate]);
            } else {
                put("mlp.gate", vec![experts, hidden]);
            }
            for expert in 0..experts {
                put(&format!("mlp.experts.{expert}.gate_proj"), vec![inner, hidden]);
                put(&format!("mlp.experts.{expert}.up_proj"), vec![inner, hidden]);
                put(&format!("mlp.experts.{expert}.down_proj"), vec![hidden, inner]);
            }
        }
        tensors.sort();
        tensors
    }
}

/// What to write.
#[derive(Debug, Clone)]
pub struct Synth {
    /// The model.
    pub model: Model,
    /// How weights are stored.
    pub kind: Kind,
    /// The seed of all values.
    pub seed: u64,
    /// Largest shard.
    pub shard_bytes: u64,
    /// Headers with holes instead of weights.
    pub headers_only: bool,
}

/// Writes `OUT/aligned` and `OUT/degraded`; returns the bytes of weights of both.
pub fn synthesize(job: &Synth, out: &Path) -> Result<u64, BenchError> {
    let mut total = 0;
    for (side, degraded) in [("aligned", false), ("degraded", true)] {
        total += write_side(job, &out.join(side), degraded)?;
    }
    Ok(total)
}

fn write_side(job: &Synth, out: &Path, degraded: bool) -> Result<u64, BenchError> {
    let mut specs: Vec<TensorSpec> = Vec::new();
    for (name, shape) in job.model.tensors() {
        let scaled = job.kind == Kind::Fp8 && matches!(role(&name, &shape), Role::Linear { .. });
        if scaled {
            let grid = shape.iter().map(|side| side.div_ceil(BLOCK)).collect();
            specs.push((name.clone(), Dtype::F8E4M3, shape));
            specs.push((format!("{name}_scale_inv"), Dtype::F32, grid));
        } else {
            specs.push((name, Dtype::Bf16, shape));
        }
    }
    let bytes = |spec: &TensorSpec| spec.1.bytes_of(&spec.2).unwrap_or(0);
    let sizes: Vec<(String, u64)> = specs.iter().map(|spec| (spec.0.clone(), bytes(spec))).collect();
    let by_name: BTreeMap<&str, &TensorSpec> = specs.iter().map(|spec| (spec.0.as_str(), spec)).collect();
    let shards = shard_plan(&sizes, job.shard_bytes);
    let folder = FolderWriter::create(out, false)?;
    for shard in &shards {
        let specs: Vec<TensorSpec> =
            shard.tensors.iter().map(|name| by_name[name.as_str()].clone()).collect();
        if job.headers_only {
            let path = folder.partial().join(&shard.file);
            hole(&path, &specs).map_err(|source| BenchError::Io { path, source })?;
            continue;
        }
        let mut file = folder.shard(&shard.file, &default_metadata(), &specs)?;
        for spec in &specs {
            file.write(&spec.0, &values(job, spec, degraded)?)?;
        }
        file.finish()?;
    }
    if shards.len() > 1 {
        folder.file(INDEX_FILE, index_json(&shards).as_bytes())?;
    }
    folder.file("config.json", format!("{:#}\n", config(job)).as_bytes())?;
    folder.publish()?;
    Ok(sizes.iter().map(|(_, bytes)| bytes).sum())
}

fn config(job: &Synth) -> Value {
    let Model { model_type, layers, hidden, intermediate, vocabulary, experts, .. } = job.model;
    let mut config = json!({"model_type": model_type, "num_hidden_layers": layers, "hidden_size": hidden,
        "intermediate_size": intermediate, "vocab_size": vocabulary, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16"});
    if experts[0] > 0 {
        config["num_experts"] = experts[0].into();
        config["moe_intermediate_size"] = experts[1].into();
    }
    if job.kind == Kind::Fp8 {
        config["quantization_config"] = json!({"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]});
    }
    config
}

/// A header, and a hole of the right length.
fn hole(path: &Path, specs: &[TensorSpec]) -> io::Result<()> {
    let header = safetensors_header(&default_metadata(), specs).map_err(io::Error::other)?;
    let data: u64 = specs.iter().filter_map(|(_, dtype, shape)| dtype.bytes_of(shape)).sum();
    let mut file = File::create(path)?;
    file.write_all(&header)?;
    file.set_len(header.len() as u64 + data)?;
    file.sync_all()?;
    fs::metadata(path).map(|_| ())
}

/// A counter's hash (splitmix64).
fn hash(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn key(seed: u64, name: &str, what: u64) -> u64 {
    name.bytes().fold(hash(seed ^ hash(what)), |key, byte| hash(key ^ u64::from(byte)))
}

/// 65,536 normal numbers in the order of their size: quantiles, from sums of hashes.
fn normals() -> Vec<f32> {
    let mut values: Vec<f32> = (0..1u64 << 16)
        .map(|i| {
            let sum: u64 = (0..12).map(|k| hash(i * 12 + k) >> 32).sum();
            (sum as f64 / 2.0f64.powi(32) - 6.0) as f32
        })
        .collect();
    values.sort_by(f32::total_cmp);
    values
}

/// The bytes of one tensor.
fn values(job: &Synth, (name, dtype, shape): &TensorSpec, degraded: bool) -> Result<Vec<u8>, BenchError> {
    let n: u64 = shape.iter().product();
    let base = key(job.seed, name, 0);
    match dtype {
        Dtype::F8E4M3 => {
            let flip = key(job.seed, name, 1);
            let mut codes = vec![0u8; n as usize];
            codes.par_chunks_mut(1 << 16).enumerate().for_each(|(chunk, codes)| {
                for (i, code) in codes.iter_mut().enumerate() {
                    let at = ((chunk << 16) | i) as u64;
                    // Exponents 0 to 14: no NaN.
                    let bits = hash(base ^ at);
                    *code = (bits as u8 & 0x87) | (((bits >> 8) % 15) as u8 * 8);
                    if degraded && hash(flip ^ at).is_multiple_of(16) {
                        *code ^= 1;
                    }
                }
            });
            Ok(codes)
        }
        Dtype::F32 => {
            let moved = key(job.seed, name, 2);
            let unit = |bits: u64| (bits >> 40) as f32 / (1 << 24) as f32;
            let scale = |at: u64| {
                let scale = 1e-4 * (1.0 + unit(hash(base ^ at)));
                if degraded { scale * (1.0 + CHANGE * unit(hash(moved ^ at))) } else { scale }
            };
            Ok((0..n).flat_map(|at| scale(at).to_le_bytes()).collect())
        }
        _ => bf16(job, name, shape, degraded),
    }
}

fn bf16(job: &Synth, name: &str, shape: &[u64], degraded: bool) -> Result<Vec<u8>, BenchError> {
    let table = normals();
    let n: u64 = shape.iter().product();
    let base = key(job.seed, name, 0);
    let mut bytes = vec![0u8; 2 * n as usize];
    bytes.par_chunks_mut(1 << 17).enumerate().for_each(|(chunk, bytes)| {
        for (i, four) in bytes.chunks_mut(8).enumerate() {
            let mut bits = hash(base ^ (((chunk as u64) << 14) | i as u64));
            for x in four.chunks_exact_mut(2) {
                x.copy_from_slice(&bf16_bits(SIGMA * table[(bits & 0xffff) as usize]).to_le_bytes());
                bits >>= 16;
            }
        }
    });
    if !degraded {
        return Ok(bytes);
    }
    match (role(name, shape), shape) {
        (Role::Linear { .. }, &[rows, cols]) => {
            let shape = Shape { rows: rows as usize, cols: cols as usize };
            let engine = CpuEngine::new();
            // Entries of both factors have variance 8; the product of rank r has r * 64 an element, weights SIGMA^2.
            let b =
                engine.sketch(Shape { rows: shape.rows, cols: RANK }, job.seed, key(job.seed, name, 3))?;
            let a =
                engine.sketch(Shape { rows: RANK, cols: shape.cols }, job.seed, key(job.seed, name, 4))?;
            let scale = CHANGE * SIGMA / (RANK as f32 * 64.0).sqrt();
            engine.add_low_rank(&mut bytes, kernels::Dtype::Bf16, shape, &[(scale, &b, &a)])?;
        }
        (Role::LayerOther { layer }, _) if layer % 4 == 0 => {
            for x in bytes.chunks_exact_mut(2).step_by(3) {
                x[0] ^= 1;
            }
        }
        _ => {}
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use checkpoint::Checkpoint;

    fn job(model: &str, kind: Kind) -> Synth {
        Synth {
            model: Model::named(model).unwrap(),
            kind,
            seed: 3,
            shard_bytes: 100_000,
            headers_only: false,
        }
    }

    #[test]
    fn synth_is_readable_and_differs_by_what_it_says() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = synthesize(&job("tiny", Kind::Bf16), dir.path()).unwrap();
        let open = |side: &str| Checkpoint::open(&dir.path().join(side), None).unwrap();
        let (a, d) = (open("aligned"), open("degraded"));
        assert!(a.shards().files().len() > 1);
        assert_eq!(2 * a.tensors().iter().map(|info| info.bytes).sum::<u64>(), bytes);
        let norm = |x: &[f32]| x.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt();
        for name in ["model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"] {
            let (a, d) = (a.read_f32(name).unwrap(), d.read_f32(name).unwrap());
            let change: Vec<f32> = a.iter().zip(&d).map(|(a, d)| a - d).collect();
            let relative = norm(&change) / norm(&a);
            assert!((0.02..0.04).contains(&relative), "{name}: {relative}");
            let size = norm(&a) / (a.len() as f64).sqrt();
            assert!((0.018..0.022).contains(&size), "{name}: {size}");
        }
        let embed = "model.embed_tokens.weight";
        assert_eq!(a.read_f32(embed).unwrap(), d.read_f32(embed).unwrap());
    }

    #[test]
    fn synth_of_8_bits_has_scales_that_are_found() {
        let dir = tempfile::tempdir().unwrap();
        synthesize(&job("tiny", Kind::Fp8), dir.path()).unwrap();
        for side in ["aligned", "degraded"] {
            let model = Checkpoint::open(&dir.path().join(side), None).unwrap();
            let units = model.units().unwrap();
            let scaled: Vec<_> = units.iter().filter(|unit| unit.scale.is_some()).collect();
            assert_eq!(scaled.len(), 14);
            assert!(scaled.iter().all(|unit| model.read_scales(unit).unwrap().iter().all(|&x| x > 0.0)));
        }
    }

    #[test]
    fn synth_is_the_same_for_the_same_seed() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for dir in [&first, &second] {
            synthesize(&job("tiny", Kind::Bf16), dir.path()).unwrap();
        }
        let content = |dir: &tempfile::TempDir| {
            Checkpoint::open(&dir.path().join("degraded"), None).unwrap().content().unwrap()
        };
        assert_eq!(content(&first), content(&second));
    }

    #[test]
    fn headers_of_the_largest_models_take_no_disk() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let cases = [("llama-70b", Kind::Bf16, 130e9..145e9), ("deepseek-v3", Kind::Fp8, 640e9..690e9)];
        for (name, kind, want) in cases {
            let out = dir.path().join(name);
            let job = Synth { headers_only: true, shard_bytes: 5_000_000_000, ..job(name, kind) };
            let bytes = synthesize(&job, &out).unwrap() as f64 / 2.0;
            assert!(want.contains(&bytes), "{name}: {bytes:e}");
            let model = Checkpoint::open(&out.join("aligned"), None).unwrap();
            let blocks: u64 =
                model.shards().files().iter().map(|file| fs::metadata(file).unwrap().blocks()).sum();
            assert!(blocks * 512 < 100 << 20, "{name}: {blocks} blocks");
        }
    }
}
