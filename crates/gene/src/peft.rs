//! `adapter_config.json` as PEFT reads it.
//!
//! Every module has scale 1: `lora_alpha = r`, the largest rank, and where a rank differs both patterns name it, anchored
//! at the start and escaped, because PEFT reads patterns as regular expressions. Target modules are exact paths.
//!
//! Not here: profiles for other loaders.

use serde_json::{Map, Value, json};

/// What an adapter's config has to say.
pub(crate) struct PeftConfig<'a> {
    /// Name or path of the base.
    pub(crate) base: &'a str,
    /// Module paths and ranks, sorted.
    pub(crate) modules: &'a [(String, usize)],
    /// Modules saved whole.
    pub(crate) saved: &'a [String],
}

impl PeftConfig<'_> {
    pub(crate) fn to_json(&self) -> Value {
        let r = self.modules.iter().map(|(_, rank)| *rank).max().unwrap_or(1);
        let patterns: Map<String, Value> = self
            .modules
            .iter()
            .filter(|(_, rank)| *rank != r)
            .map(|(name, rank)| (format!("^{}", escaped(name)), json!(rank)))
            .collect();
        let names: Vec<&str> = self.modules.iter().map(|(name, _)| name.as_str()).collect();
        json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": r,
            "lora_alpha": r,
            "rank_pattern": patterns,
            "alpha_pattern": patterns,
            "target_modules": names,
            "modules_to_save": if self.saved.is_empty() { Value::Null } else { json!(self.saved) },
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "lora_dropout": 0.0,
            "use_dora": false,
            "use_rslora": false,
        })
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        format!("{:#}\n", self.to_json()).into_bytes()
    }
}

/// The text as a pattern that matches only itself, in the syntaxes of Python and Rust.
pub fn escaped(text: &str) -> String {
    let mut pattern = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if r"\.+*?()|[]{}^$#&-~".contains(c) {
            pattern.push('\\');
        }
        pattern.push(c);
    }
    pattern
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_that_differ_are_named_by_escaped_anchored_patterns() {
        let modules = [("a.b".to_owned(), 2), ("a.c-d".to_owned(), 3), ("a.e".to_owned(), 4)];
        let config = PeftConfig { base: "m", modules: &modules, saved: &[] }.to_json();
        assert_eq!((&config["r"], &config["lora_alpha"]), (&json!(4), &json!(4)));
        assert_eq!(config["rank_pattern"], json!({"^a\\.b": 2, "^a\\.c\\-d": 3}));
        assert_eq!(config["rank_pattern"], config["alpha_pattern"]);
        assert_eq!(config["target_modules"], json!(["a.b", "a.c-d", "a.e"]));
    }

    #[test]
    fn equal_ranks_need_no_pattern() {
        let modules = [("a".to_owned(), 2), ("b".to_owned(), 2)];
        let config = PeftConfig { base: "m", modules: &modules, saved: &[] }.to_json();
        assert_eq!(config["rank_pattern"], json!({}));
        assert_eq!(config["modules_to_save"], Value::Null);
    }
}
