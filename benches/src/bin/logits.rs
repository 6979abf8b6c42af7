//! What our decoder computes, for comparison with others: logits of every position, and greedy answers.
//!
//! Input is JSONL, one prompt a row: `{"prompt": "…"}` goes through the model's chat template, `{"tokens": [1, 2]}` is
//! taken as it is. Output is a safetensors file with `logits.N` (f32, `[tokens, vocabulary]`) for row N, and on stdout
//! one line a row: `{"tokens": […], "generated": […]}`. `scripts/peers/check_logits.py` reads both.

#![allow(clippy::print_stdout)]

use anyhow::{Context, Result};
use checkpoint::Checkpoint;
use clap::Parser;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use std::path::PathBuf;
use transformer::{Attachments, Batch, Chat, Model, generate};

#[derive(Debug, Parser)]
struct Args {
    /// Folder of the model, or of an adapter.
    #[arg(long)]
    model: PathBuf,
    /// Rows, JSONL.
    #[arg(long)]
    rows: PathBuf,
    /// Tokens to generate after each row.
    #[arg(long, default_value_t = 8)]
    new_tokens: usize,
    /// File for the logits.
    #[arg(long)]
    out: PathBuf,
}

fn tokens(row: &Value, chat: Option<&Chat>) -> Result<Vec<u32>> {
    if let Some(text) = row["prompt"].as_str() {
        return Ok(chat.context("a prompt as text needs tokenizer.json beside the model")?.prompt(text)?);
    }
    let ids = row["tokens"].as_array().context("a row needs `prompt` or `tokens`")?;
    ids.iter().map(|id| Ok(u32::try_from(id.as_u64().context("`tokens` holds numbers")?)?)).collect()
}

fn main() -> Result<()> {
    let args = Args::parse();
    let checkpoint = Checkpoint::open(&args.model, None)?;
    let folder =
        [checkpoint.dir(), checkpoint.base_dir()].into_iter().find(|d| d.join("tokenizer.json").exists());
    let chat = folder.map(Chat::open).transpose()?;
    let model = Model::open(&checkpoint)?;
    let none = Attachments::none();
    let text = std::fs::read_to_string(&args.rows)
        .with_context(|| format!("cannot read `{}`", args.rows.display()))?;
    let mut logits: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for (n, line) in text.lines().enumerate() {
        let ids = tokens(&serde_json::from_str(line)?, chat.as_ref()).with_context(|| format!("row {n}"))?;
        let hidden = model.hidden(&Batch::pad_behind(std::slice::from_ref(&ids), 0), &none, None, None)?;
        let all = model.all_logits(&hidden)?;
        let bytes = all.flatten_all()?.to_vec1::<f32>()?.iter().flat_map(|x| x.to_le_bytes()).collect();
        logits.push((format!("logits.{n}"), all.dims().to_vec(), bytes));
        let stop = chat.as_ref().map_or(&[][..], Chat::stop);
        let generated = generate(&model, &none, std::slice::from_ref(&ids), stop, args.new_tokens)?;
        println!("{}", serde_json::json!({"tokens": ids, "generated": generated[0]}));
    }
    let views = logits
        .iter()
        .map(|(name, shape, bytes)| Ok((name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>>>()?;
    safetensors::serialize_to_file(views, None, &args.out)?;
    Ok(())
}
