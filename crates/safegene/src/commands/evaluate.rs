//! `safegene evaluate`: a model's rates on files of rows.

use crate::args::{DataFields, Evaluate, Match};
use crate::commands::{check_folder_of, openings, percent};
use crate::fail::Failure;
use crate::ui::Ui;
use checkpoint::Checkpoint;
use evaluate::{DataRow, Fields, Given, Matching, Rate, Sets, read_rows};
use std::path::Path;
use transformer::{Attachments, Chat, Model, Openings};

pub(super) fn fields(f: &DataFields) -> Fields {
    Fields { prompt: f.prompt_field.clone(), answer: f.answer_field.clone(), ..Fields::default() }
}

/// Names of the fields, where a result remembers what it was made from; null for the usual ones.
pub(super) fn named(f: &Fields) -> serde_json::Value {
    let usual = Fields::default();
    if (&f.prompt, &f.answer) == (&usual.prompt, &usual.answer) {
        return serde_json::Value::Null;
    }
    serde_json::json!({ "prompt": f.prompt, "answer": f.answer })
}

pub(super) fn run(job: &Evaluate, ui: &Ui) -> Result<(), Failure> {
    if job.harmful.is_none() && job.benign.is_none() && job.task.is_none() {
        return Err(Failure::usage("nothing to measure", "give at least one of --harmful, --benign, --task"));
    }
    if let Some(path) = &job.answers {
        check_folder_of(path)?;
    }
    let fields = fields(&job.fields);
    let rows = |path: &Option<std::path::PathBuf>, need_answer: bool| -> Result<Vec<DataRow>, Failure> {
        match path {
            Some(path) => Ok(read_rows(path, &fields, need_answer)?),
            None => Ok(Vec::new()),
        }
    };
    let (harmful, benign, task) =
        (rows(&job.harmful, false)?, rows(&job.benign, false)?, rows(&job.task, true)?);
    let openings = openings(job.fields.refusals.as_deref())?;
    let checkpoint = Checkpoint::open(&job.model, job.base.as_deref())?;
    let model = Model::open(&checkpoint)?;
    let chat = chat_of(&checkpoint)?;
    ui.say(&format!("  running   {} prompts", harmful.len() + benign.len() + task.len()));
    let matching = match job.r#match {
        Match::Exact => Matching::Exact,
        Match::Prefix => Matching::Prefix,
    };
    let sets = Sets { harmful: &harmful, benign: &benign, task: &task };
    let given = evaluate::run(&model, &Attachments::none(), &chat, sets, job.new_tokens)?;
    let e = evaluate::judge(sets, &given, &openings, matching);
    if let Some(path) = &job.answers {
        write_answers(path, sets, &given, &openings)?;
    }
    if job.json {
        let mut value = serde_json::to_value(&e).unwrap_or_default();
        value["schema"] = 1.into();
        value["settings"] = serde_json::json!({
            "model": checkpoint.content()?, "decoding": "greedy", "new_tokens": job.new_tokens,
            "judge": if job.fields.refusals.is_some() { "refusal-opening (own list)" } else { "refusal-opening" },
            "prompts": { "harmful": hash(job.harmful.as_deref())?, "benign": hash(job.benign.as_deref())?,
                "task": hash(job.task.as_deref())? },
            "template": format!("blake3:{}", chat.template_hash()),
        });
        ui.data(&value.to_string());
        return Ok(());
    }
    let line = |name: &str, rate: Option<Rate>| {
        if let Some(r) = rate {
            let text = format!(
                "{name:<34} {:>8}  ({} to {}, n = {})",
                percent(r.value),
                percent(r.low),
                percent(r.high),
                r.n
            );
            ui.data(&text);
        }
    };
    line("attack success (not refused)", e.asr);
    line("attack success (true answer given)", e.asr_precise);
    line("over-refusal", e.over_refusal);
    line("benign requests helped", e.helped);
    line("task accuracy", e.accuracy);
    Ok(())
}

/// One line a row, in the order of the files; an older file is replaced.
fn write_answers(path: &Path, sets: Sets<'_>, given: &Given, openings: &Openings) -> Result<(), Failure> {
    let mut text = String::new();
    for (set, rows, given) in [
        ("harmful", sets.harmful, &given.harmful),
        ("benign", sets.benign, &given.benign),
        ("task", sets.task, &given.task),
    ] {
        for (row, given) in rows.iter().zip(given) {
            let line = serde_json::json!({"set": set, "line": row.line, "prompt": row.prompt, "given": given,
                "refused": openings.refuses(given)});
            text += &format!("{line}\n");
        }
    }
    std::fs::write(path, text).map_err(|e| {
        Failure::usage(
            format!("cannot write `{}`: {e}", path.display()),
            "choose another file with --answers",
        )
    })
}

/// Tokenizer and template: from the adapter's own folder if it has one, else from its base.
pub(super) fn chat_of(checkpoint: &Checkpoint) -> Result<Chat, Failure> {
    Ok(Chat::of(checkpoint)?)
}

/// blake3 of a data file, so that a result names what it was measured on.
pub(super) fn hash(path: Option<&Path>) -> Result<Option<String>, Failure> {
    let Some(path) = path else { return Ok(None) };
    let bytes =
        std::fs::read(path).map_err(|source| evaluate::DataError::Io { path: path.to_path_buf(), source })?;
    Ok(Some(format!("blake3:{}", blake3::hash(&bytes).to_hex())))
}
