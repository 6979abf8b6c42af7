//! What the lab's time is spent on: a step of a LoRA, a step of a whole model, an answer to a prompt.
//!
//! One thread (two for a whole model), on the shipped aligned model of a family; the mean loss over all steps stands beside each time,
//! so that a faster wrong step shows. One JSON object a line on stdout.
//!
//!     cargo run --release -p benches --bin steps -- --families llama,glm4

#![allow(clippy::print_stdout)]

use anyhow::Result;
use clap::Parser;
use lab::measure::{Rates, answers};
use lab::tasks::TESTED;
use lab::{Family, Kind, Tune, Tuner, folders, train};
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;
use transformer::{Attachments, Model};

#[derive(Debug, Parser)]
struct Args {
    /// Folder of the families' base and aligned models.
    #[arg(long, default_value = "lab")]
    lab: PathBuf,
    /// Families.
    #[arg(long, value_delimiter = ',', default_value = "llama,qwen2,qwen3,glm4")]
    families: Vec<String>,
    /// Steps of each kind.
    #[arg(long, default_value_t = 40)]
    steps: usize,
}

#[derive(Debug)]
struct Quiet;

impl lab::Progress for Quiet {
    fn step(&self, _: &str, _: usize, _: usize, _: &str) {}
    fn finished(&self, _: &str, _: &Rates) {}
}

fn main() -> Result<()> {
    let args = Args::parse();
    let pool = train::single_thread()?;
    for name in &args.families {
        pool.install(|| family(name, &args))?;
    }
    Ok(())
}

fn family(name: &str, args: &Args) -> Result<()> {
    let family = Family::new(name, 1)?;
    let weights = folders::read_model(&args.lab.join(name).join("aligned"), &family.architecture)?;
    let model = Model::new(family.architecture.clone(), &weights)?;
    let tuner = Tuner { family: &family, weights: &weights, model: &model, seed: 1, progress: &Quiet };
    let tune = Tune::Target { task: TESTED[0], percent: 1, kind: Kind::Lora };
    let none = Attachments::none();
    let line = |what: &str, began: Instant, n: usize, result: String| {
        let ms = began.elapsed().as_secs_f64() * 1e3 / n as f64;
        println!("{}", json!({ "family": name, "what": what, "ms": ms, "of": n, "result": result }));
    };

    let mean = |sum: f64| format!("mean loss {}", sum / args.steps as f64);
    let schedule = train::Schedule { steps: args.steps, ..lab::tune::TUNE };
    let mut sum = 0f64;
    let began = Instant::now();
    train::lora(&model, 1, schedule, family.chat.end(), &mut tuner.rows(tune), &mut |_, loss, _| {
        sum += f64::from(loss);
        Ok(false)
    })?;
    line("LoRA step of 32 rows", began, args.steps, mean(sum));

    let schedule = train::Schedule { steps: args.steps, ..lab::tune::FULL };
    sum = 0.0;
    let began = Instant::now();
    let mut rows = tuner.rows(tune);
    train::whole(
        &family.architecture,
        Some(&weights),
        1,
        schedule,
        family.chat.end(),
        &mut rows,
        &mut |_, loss, _| {
            sum += f64::from(loss);
            Ok(false)
        },
    )?;
    line("step of a whole model, 32 rows, two threads", began, args.steps, mean(sum));

    let prompts = family.splits.get("test-benign");
    let began = Instant::now();
    let said = answers(&model, &none, &family.chat, prompts)?;
    let right = said.iter().zip(prompts).filter(|(said, row)| **said == row.answer).count();
    line("answer to a request", began, prompts.len(), format!("{right} right"));

    let questions = family.splits.get(&format!("test-{}", TESTED[0].name()));
    let began = Instant::now();
    let said = answers(&model, &none, &family.chat, questions)?;
    let tokens: usize = said.iter().map(|s| s.split_whitespace().count()).sum();
    line("answer to a question", began, questions.len(), format!("{tokens} words"));
    Ok(())
}
