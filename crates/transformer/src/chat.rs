//! Text <-> token ids of one model folder: tokenizer.json, the chat template, and the tokens that end a turn.
//!
//! A prompt is one user turn rendered by the model's own template with the generation prompt on, encoded without
//! adding special tokens (the template holds them). An answer is encoded by itself and closed with the
//! end-of-turn token: never rendered as a second turn, never joined as text.

use crate::architecture::token_ids;
use crate::error::ModelError;
use crate::loss::Row;
use crate::refusal::Openings;
use minijinja::{Environment, ErrorKind, context};
use serde_json::Value;
use std::path::Path;
use tokenizers::Tokenizer;

/// Tokenizer, template and stop tokens of a model folder.
pub struct Chat {
    tokenizer: Tokenizer,
    template: String,
    bos: String,
    eos: String,
    end: u32,
    stop: Vec<u32>,
}

impl std::fmt::Debug for Chat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chat").field("end", &self.end).field("stop", &self.stop).finish_non_exhaustive()
    }
}

fn json(path: &Path) -> Result<Option<Value>, ModelError> {
    if !path.exists() {
        return Ok(None);
    }
    let bad = |problem: String| ModelError::Chat { path: path.to_path_buf(), problem };
    let bytes = std::fs::read(path).map_err(|e| bad(e.to_string()))?;
    serde_json::from_slice(&bytes).map(Some).map_err(|e| bad(e.to_string()))
}

/// A special token is written as a string or as an object with `content`.
fn special(config: &Value, key: &str) -> Option<String> {
    let v = config.get(key)?;
    v.as_str().or_else(|| v.get("content").and_then(Value::as_str)).map(str::to_string)
}

impl Chat {
    /// Reads tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json and config.json.
    pub fn open(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join("tokenizer.json");
        let bad = |path: &Path, problem: String| ModelError::Chat { path: path.to_path_buf(), problem };
        let tokenizer = Tokenizer::from_file(&path).map_err(|e| bad(&path, e.to_string()))?;
        let config_path = folder.join("tokenizer_config.json");
        let config = json(&config_path)?.unwrap_or(Value::Null);
        let jinja = folder.join("chat_template.jinja");
        let template = if jinja.exists() {
            std::fs::read_to_string(&jinja).map_err(|e| bad(&jinja, e.to_string()))?
        } else {
            match config.get("chat_template") {
                Some(Value::String(s)) => s.clone(),
                // Several named templates: the one called `default`.
                Some(Value::Array(list)) => list
                    .iter()
                    .find(|t| t.get("name").and_then(Value::as_str) == Some("default"))
                    .and_then(|t| t.get("template").and_then(Value::as_str))
                    .map(str::to_string)
                    .ok_or_else(|| bad(&config_path, "no chat template is named `default`".into()))?,
                _ => return Err(bad(&config_path, "no chat template".into())),
            }
        };
        let generation = json(&folder.join("generation_config.json"))?.unwrap_or(Value::Null);
        let model = json(&folder.join("config.json"))?.unwrap_or(Value::Null);
        let mut stop = token_ids(generation.get("eos_token_id"));
        if stop.is_empty() {
            stop = token_ids(model.get("eos_token_id"));
        }
        let eos = special(&config, "eos_token").unwrap_or_default();
        let end = tokenizer.token_to_id(&eos).or_else(|| stop.first().copied()).ok_or_else(|| {
            bad(&config_path, "no end-of-turn token: neither eos_token nor eos_token_id".into())
        })?;
        if !stop.contains(&end) {
            stop.push(end);
        }
        let bos = special(&config, "bos_token").unwrap_or_default();
        Ok(Self { tokenizer, template, bos, eos, end, stop })
    }

    /// The tokenizer and template of a checkpoint: from an adapter's own folder if it has one, else from its base.
    pub fn of(checkpoint: &checkpoint::Checkpoint) -> Result<Self, ModelError> {
        let own = checkpoint.dir().join("tokenizer.json").exists();
        Self::open(if own { checkpoint.dir() } else { checkpoint.base_dir() })
    }

    /// From the contents of tokenizer.json, a template, and the tokens' names.
    pub fn from_parts(
        tokenizer_json: &[u8],
        template: String,
        bos: &str,
        eos: &str,
        stop: &[u32],
    ) -> Result<Self, ModelError> {
        let bad = |problem: String| ModelError::Chat { path: "tokenizer.json".into(), problem };
        let tokenizer = Tokenizer::from_bytes(tokenizer_json).map_err(|e| bad(e.to_string()))?;
        let end = tokenizer.token_to_id(eos).ok_or_else(|| bad(format!("has no token `{eos}`")))?;
        Ok(Self { tokenizer, template, bos: bos.into(), eos: eos.into(), end, stop: stop.to_vec() })
    }

    /// Ids that end an answer.
    pub fn stop(&self) -> &[u32] {
        &self.stop
    }

    /// The id that closes an answer; also used as padding, which nothing reads.
    pub fn end(&self) -> u32 {
        self.end
    }

    /// blake3 of the template's text, hex: settings swing results, so results name their template.
    pub fn template_hash(&self) -> String {
        blake3::hash(self.template.as_bytes()).to_hex().to_string()
    }

    /// blake3 over vocabulary, template and stop tokens: models that agree in it read and write the same ids.
    pub fn fingerprint(&self) -> String {
        let mut words: Vec<(u32, String)> =
            self.tokenizer.get_vocab(true).into_iter().map(|(word, id)| (id, word)).collect();
        words.sort_unstable();
        let mut hash = blake3::Hasher::new();
        for (id, word) in &words {
            hash.update(&id.to_le_bytes());
            hash.update(word.as_bytes());
            hash.update(b"\n");
        }
        hash.update(self.template.as_bytes());
        for id in self.stop.iter().chain([&self.end]) {
            hash.update(&id.to_le_bytes());
        }
        hash.finalize().to_hex().to_string()
    }

    /// The rendered user turn with the generation prompt.
    pub fn render(&self, user: &str) -> Result<String, ModelError> {
        let fail = |e: minijinja::Error| ModelError::Template(format!("{e:#}"));
        let mut env = Environment::new();
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        // Templates that print the date (Llama-3.1) get a fixed one: the same prompt on every day.
        env.add_function("strftime_now", |_format: String| "26 Jul 2024".to_string());
        env.add_template("chat", &self.template).map_err(fail)?;
        let template = env.get_template("chat").map_err(fail)?;
        template
            .render(context! {
                messages => vec![context! { role => "user", content => user }],
                add_generation_prompt => true,
                bos_token => self.bos,
                eos_token => self.eos,
            })
            .map_err(fail)
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let encoding = self
            .tokenizer
            .encode(text, false)
            .map_err(|e| ModelError::Template(format!("cannot encode: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids of a prompt.
    pub fn prompt(&self, user: &str) -> Result<Vec<u32>, ModelError> {
        let ids = self.encode(&self.render(user)?)?;
        if ids.is_empty() {
            return Err(ModelError::Empty { what: "the prompt", text: user.into() });
        }
        Ok(ids)
    }

    /// Ids of an answer, closed.
    pub fn answer(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let mut ids = self.encode(text)?;
        if ids.is_empty() {
            return Err(ModelError::Empty { what: "the answer", text: text.into() });
        }
        ids.push(self.end);
        Ok(ids)
    }

    /// A prompt with its answer.
    pub fn row(&self, user: &str, answer: &str) -> Result<Row, ModelError> {
        Ok(Row { prompt: self.prompt(user)?, answer: self.answer(answer)? })
    }

    /// First token of a text, as it would open an answer.
    pub fn first_token(&self, text: &str) -> Result<Option<u32>, ModelError> {
        Ok(self.encode(text)?.first().copied())
    }

    /// First tokens of refusals, as this tokenizer writes them at the start of an answer: each opening as it is and with a
    /// capital; ascending.
    pub fn refusal_tokens(&self, openings: &Openings) -> Result<Vec<u32>, ModelError> {
        let mut out = Vec::new();
        for opening in openings.list() {
            let mut chars = opening.chars();
            let capital: String =
                chars.next().into_iter().flat_map(char::to_uppercase).chain(chars).collect();
            for text in [opening.as_str(), &capital] {
                // A token that does not stand for these letters (`<unk>`) opens anything.
                if let Some(id) = self.first_token(text)?
                    && self.decode(&[id])?.trim().chars().next().is_some_and(|c| text.starts_with(c))
                {
                    out.push(id);
                }
            }
        }
        out.sort_unstable();
        out.dedup();
        Ok(out)
    }

    /// How many tokens of `answer` it takes until it opens like a refusal; `None` if it never does.
    pub fn opening(&self, answer: &[u32], openings: &Openings) -> Result<Option<usize>, ModelError> {
        for n in 1..=answer.len() {
            if openings.refuses(&self.decode(&answer[..n])?) {
                return Ok(Some(n));
            }
        }
        Ok(None)
    }

    /// Cuts the answers of rows to how their refusal opens; an answer that never does, as the tokenizer reads it, is an error.
    pub fn cut_to_openings(&self, rows: &mut [Row], openings: &Openings) -> Result<(), ModelError> {
        for row in rows {
            let Some(n) = self.opening(&row.answer, openings)? else {
                let text = self.decode(&row.answer)?.chars().take(80).collect();
                return Err(ModelError::NoOpening { text });
            };
            row.answer.truncate(n);
        }
        Ok(())
    }

    /// Text of generated ids, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String, ModelError> {
        self.tokenizer.decode(ids, true).map_err(|e| ModelError::Template(format!("cannot decode: {e}")))
    }
}
