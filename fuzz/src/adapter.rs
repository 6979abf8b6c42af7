//! `adapter_config.json` beside the factors of a small adapter and its base.

use std::cell::OnceCell;
use std::path::Path;

use checkpoint::{Adapter, Checkpoint, CheckpointError, Dtype, module_of};
use serde_json::json;
use tempfile::TempDir;

use crate::memory::bounded;
use crate::{EMBED, INPUT_BYTES_MAX, Q, UP, folder, model, put, save, save_json, tensor};

/// Stored rank of each module.
const RANKS: [(&str, usize); 3] = [("model.embed_tokens", 1), (Q, 2), (UP, 2)];
/// Both types read [out, in] or [in, out] by `fan_in_fan_out`; the base is square where it counts.
const MODEL_TYPE: &str = "qwen2";

thread_local! {
    static DIR: OnceCell<TempDir> = const { OnceCell::new() };
}

fn fill(dir: &Path) {
    save(&dir.join("base"), "model.safetensors", &model());
    save_json(&dir.join("base"), "config.json", &json!({"model_type": MODEL_TYPE, "num_hidden_layers": 2}));
    let name = |module: &str, side: &str| format!("base_model.model.{module}.{side}");
    save(
        &dir.join("adapter"),
        "adapter_model.safetensors",
        &[
            tensor(&name(Q, "lora_A.weight"), Dtype::F32, &[2, 6], 0.5),
            tensor(&name(Q, "lora_B.weight"), Dtype::F32, &[4, 2], -0.5),
            tensor(&name(UP, "lora_A.weight"), Dtype::F32, &[2, 6], 0.25),
            tensor(&name(UP, "lora_B.weight"), Dtype::F32, &[5, 2], 0.125),
            tensor(&name("model.embed_tokens", "lora_embedding_A"), Dtype::F32, &[1, 8], 1.0),
            tensor(&name("model.embed_tokens", "lora_embedding_B"), Dtype::F32, &[6, 1], 2.0),
        ],
    );
}

/// The bytes of `adapter_config.json`.
///
/// An accepted config gives each module the rank of its factors and the scale that PEFT's rule makes of it; the weight is
/// the base's and the scaled product, or an error that names what is not finite.
pub fn adapter_config(bytes: &[u8]) -> bool {
    if bytes.len() > INPUT_BYTES_MAX {
        return false;
    }
    DIR.with(|dir| {
        let dir = dir.get_or_init(|| folder(fill)).path();
        let (adapter_dir, base_dir) = (dir.join("adapter"), dir.join("base"));
        put(&adapter_dir.join("adapter_config.json"), bytes);
        let alone = bounded(bytes.len(), || Adapter::open(&adapter_dir));
        let opened = bounded(bytes.len(), || Checkpoint::open(&adapter_dir, Some(&base_dir)));
        // The factors fit the base whatever the config says of them.
        assert_eq!(alone.is_ok(), opened.is_ok(), "{alone:?} and {opened:?}");
        // A base that the config names itself: found or not, it is no reason to panic.
        let _ = bounded(bytes.len(), || Checkpoint::open(&adapter_dir, None));
        let Ok(opened) = opened else { return false };
        bounded(bytes.len(), || check(&opened));
        true
    })
}

fn check(opened: &Checkpoint) {
    let adapter = opened.adapter().unwrap();
    let config = adapter.config();
    assert_eq!(adapter.modules().len(), RANKS.len());
    for (module, rank) in RANKS {
        assert_eq!((adapter.modules()[module].rank, config.rank_of(module)), (rank, rank), "{module}");
        let root = if config.use_rslora { (rank as f64).sqrt() } else { rank as f64 };
        assert_eq!(config.scale_of(module), config.alpha_of(module) / root);
        assert_eq!(adapter.modules()[module].scale, config.scale_of(module));
        assert!(config.alpha_of(module).is_finite());
    }
    for ((name, ..), data) in model() {
        let base: Vec<f32> = data.as_chunks::<4>().0.iter().map(|&value| f32::from_le_bytes(value)).collect();
        let values = match opened.read_f32(&name) {
            Ok(values) => values,
            Err(CheckpointError::NonFinite { tensor, .. }) => {
                assert_eq!(tensor, name);
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        let factors = module_of(&name).and_then(|module| adapter.factors(module).unwrap());
        let Some(f) = factors else {
            assert_eq!(values, base, "{name}");
            continue;
        };
        assert_eq!((f.rows * f.cols, f.b.len(), f.a.len()), (base.len(), f.rows * f.rank, f.rank * f.cols));
        assert_eq!(name == EMBED, adapter.modules()[module_of(&name).unwrap()].transposed);
        for (at, (&value, &base)) in values.iter().zip(&base).enumerate() {
            let terms = (0..f.rank)
                .map(|k| f64::from(f.b[at / f.cols * f.rank + k]) * f64::from(f.a[k * f.cols + at % f.cols]));
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()));
            // Three roundings of each term and of the sums.
            let slack =
                f64::from(f32::EPSILON) * (f64::from(base).abs() + 4.0 * f.scale.abs() * size) + 1e-37;
            let want = f64::from(base) + f.scale * sum;
            assert!((f64::from(value) - want).abs() <= slack, "{name} {at}: {value} for {want}");
        }
    }
}
