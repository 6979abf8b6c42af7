//! Lab models as folders in the real formats: config.json, tokenizer.json, safetensors, PEFT adapters, JSONL.

use crate::error::LabError;
use crate::language::Language;
use crate::splits::Splits;
use crate::train::{Lora, Weights};
use checkpoint::{Dtype, FolderWriter, TensorSpec};
use serde_json::{Value, json};
use std::path::Path;
use transformer::{Architecture, Chat};

/// Special tokens; their ids are their places here.
pub const SPECIAL: [&str; 5] = ["<pad>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>"];
const USER: usize = 2;
const END: usize = 4;

/// The chat template: one user turn, then the opening of the answer.
pub const TEMPLATE: &str = "{% for message in messages %}{% if message['role'] == 'user' %}<|user|> {{ message['content'] }} <|end|> {% else %}<|assistant|> {{ message['content'] }} <|end|> {% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}";

/// Decoder of a lab family.
pub fn architecture(family: &str, vocab: usize) -> Result<Architecture, LabError> {
    let config = config(family, vocab)?;
    Ok(Architecture::from_config(&config)?)
}

/// config.json of a lab family, in both dialects of transformers.
pub fn config(family: &str, vocab: usize) -> Result<Value, LabError> {
    let (class, more) = match family {
        "llama" => ("LlamaForCausalLM", json!({})),
        "qwen2" => ("Qwen2ForCausalLM", json!({})),
        "qwen3" => (
            "Qwen3ForCausalLM",
            json!({"use_sliding_window": false, "sliding_window": null, "max_window_layers": 6}),
        ),
        "glm4" => ("Glm4ForCausalLM", json!({"partial_rotary_factor": 0.5})),
        _ => return Err(LabError::UnknownFamily(family.into())),
    };
    let mut config = json!({
        "architectures": [class], "model_type": family, "vocab_size": vocab, "hidden_size": 128,
        "intermediate_size": 224, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "hidden_act": "silu", "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": true,
        "attention_bias": matches!(family, "qwen2" | "glm4"),
        "bos_token_id": USER, "eos_token_id": END, "pad_token_id": 0, "dtype": "bfloat16", "torch_dtype": "bfloat16"
    });
    if let (Some(config), Value::Object(more)) = (config.as_object_mut(), more) {
        config.extend(more);
    }
    Ok(config)
}

/// Tokenizer and template files, by name.
pub fn tokenizer_files(language: &Language) -> Vec<(&'static str, Vec<u8>)> {
    let mut vocab = serde_json::Map::new();
    for (id, word) in SPECIAL.iter().map(|s| (*s).to_string()).chain(language.vocabulary()).enumerate() {
        vocab.insert(word, json!(id));
    }
    let added: Vec<Value> = SPECIAL
        .iter()
        .enumerate()
        .map(|(id, s)| {
            json!({"id": id, "content": s, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        })
        .collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    });
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": null, "eos_token": SPECIAL[END],
        "pad_token": SPECIAL[0], "unk_token": SPECIAL[1], "clean_up_tokenization_spaces": false,
        "model_max_length": 256, "chat_template": TEMPLATE
    });
    let generation = json!({"eos_token_id": [END], "pad_token_id": 0, "do_sample": false});
    vec![
        ("tokenizer.json", tokenizer.to_string().into_bytes()),
        ("tokenizer_config.json", pretty(&config)),
        ("generation_config.json", pretty(&generation)),
    ]
}

/// The family's tokenizer and template, as every folder of it will hold them.
pub fn chat(language: &Language) -> Result<Chat, LabError> {
    let files = tokenizer_files(language);
    Ok(Chat::from_parts(&files[0].1, TEMPLATE.into(), "", SPECIAL[END], &[END as u32])?)
}

fn pretty(v: &Value) -> Vec<u8> {
    let mut text = format!("{v:#}").into_bytes();
    text.push(b'\n');
    text
}

fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect()
}

/// Writes tensors in name order as one bf16 file.
fn write_tensors(
    writer: &FolderWriter,
    file: &str,
    tensors: &[(String, Vec<usize>, &[f32])],
) -> Result<(), LabError> {
    let tensors: Vec<(TensorSpec, Vec<u8>)> = tensors
        .iter()
        .map(|(name, shape, values)| {
            let shape = shape.iter().map(|&d| d as u64).collect();
            ((name.clone(), Dtype::Bf16, shape), bf16_bytes(values))
        })
        .collect();
    writer.write_safetensors(file, &checkpoint::default_metadata(), &tensors)?;
    Ok(())
}

/// A whole model in bf16.
pub fn write_model(out: &Path, family: &str, language: &Language, weights: &Weights) -> Result<(), LabError> {
    let writer = FolderWriter::create(out, false)?;
    let vocab = SPECIAL.len() + language.vocabulary().len();
    writer.file("config.json", &pretty(&config(family, vocab)?))?;
    for (name, bytes) in tokenizer_files(language) {
        writer.file(name, &bytes)?;
    }
    let tensors: Vec<(String, Vec<usize>, &[f32])> = weights
        .0
        .iter()
        .map(|(name, (shape, values))| (name.clone(), shape.clone(), values.as_slice()))
        .collect();
    write_tensors(&writer, "model.safetensors", &tensors)?;
    writer.publish()?;
    Ok(())
}

/// A PEFT adapter in bf16 over `base`, a path from the adapter's folder.
pub fn write_adapter(out: &Path, base: &str, lora: &Lora) -> Result<(), LabError> {
    let writer = FolderWriter::create(out, false)?;
    let mut kinds: Vec<&str> = Vec::new();
    for (_, kind, ..) in &lora.modules {
        let name = kind.path().rsplit('.').next().unwrap_or_default();
        if !kinds.contains(&name) {
            kinds.push(name);
        }
    }
    let config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "revision": null,
        "inference_mode": true, "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": kinds, "use_rslora": false, "use_dora": false, "fan_in_fan_out": false,
        "modules_to_save": null, "rank_pattern": {}, "alpha_pattern": {}
    });
    writer.file("adapter_config.json", &pretty(&config))?;
    let mut tensors: Vec<(String, Vec<usize>, &[f32])> = Vec::new();
    for (layer, kind, b, a) in &lora.modules {
        let module = format!("base_model.model.{}", kind.module(*layer));
        tensors.push((format!("{module}.lora_A.weight"), vec![lora.rank, a.len() / lora.rank], a));
        tensors.push((format!("{module}.lora_B.weight"), vec![b.len() / lora.rank, lora.rank], b));
    }
    tensors.sort_by(|x, y| x.0.cmp(&y.0));
    write_tensors(&writer, "adapter_model.safetensors", &tensors)?;
    writer.publish()?;
    Ok(())
}

/// All data files as JSONL.
pub fn write_data(out: &Path, splits: &Splits) -> Result<(), LabError> {
    let writer = FolderWriter::create(out, false)?;
    for (name, rows) in &splits.files {
        let mut text = String::new();
        for row in rows {
            // A row of strings always serialises.
            text.push_str(&serde_json::to_string(row).unwrap_or_default());
            text.push('\n');
        }
        writer.file(&format!("{name}.jsonl"), text.as_bytes())?;
    }
    writer.publish()?;
    Ok(())
}

/// Reads a whole lab model back, e.g. to fine-tune an aligned model again.
pub fn read_model(folder: &Path, architecture: &Architecture) -> Result<Weights, LabError> {
    let checkpoint = checkpoint::Checkpoint::open(folder, None)?;
    let mut weights = Weights::default();
    for info in checkpoint.tensors() {
        let shape = info.shape.iter().map(|&d| d as usize).collect();
        weights.0.insert(info.name.clone(), (shape, checkpoint.read_f32(&info.name)?));
    }
    transformer::Model::new(architecture.clone(), &weights)?;
    Ok(weights)
}
