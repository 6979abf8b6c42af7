//! Tokenizer and templates in the forms model folders have them.

use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use transformer::{Chat, Openings, Row};

const WORDS: [&str; 8] =
    ["<|im_start|>", "<|im_end|>", "user", "assistant", "hello", "there", "sorry", "<unk>"];

fn folder(dir: &Path, config: Value, jinja: Option<&str>) {
    let vocab: serde_json::Map<String, Value> =
        WORDS.iter().enumerate().map(|(i, w)| ((*w).to_string(), json!(i))).collect();
    let added: Vec<Value> = [0, 1]
        .iter()
        .map(|&i| {
            json!({"id": i, "content": WORDS[i], "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        })
        .collect();
    let tokenizer = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}});
    fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
    fs::write(dir.join("config.json"), r#"{"eos_token_id": 1}"#).unwrap();
    if let Some(text) = jinja {
        fs::write(dir.join("chat_template.jinja"), text).unwrap();
    }
}

const CHATML: &str = "{%- for message in messages %}\n{{- '<|im_start|> ' + message.role + '\\n' + message.content.strip() + ' <|im_end|>' + '\\n' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n{{- '<|im_start|> assistant\\n' }}\n{%- endif %}";

#[test]
fn template_in_its_own_file_or_in_the_config() {
    let want = vec![0, 2, 4, 5, 1, 0, 3];
    let eos = json!({"eos_token": "<|im_end|>"});
    let own = tempfile::tempdir().unwrap();
    folder(own.path(), eos.clone(), Some(CHATML));
    let inside = tempfile::tempdir().unwrap();
    folder(inside.path(), json!({"eos_token": {"content": "<|im_end|>"}, "chat_template": CHATML}), None);
    let named = tempfile::tempdir().unwrap();
    let list = json!([{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]);
    folder(named.path(), json!({"eos_token": "<|im_end|>", "chat_template": list}), None);
    for dir in [own, inside, named] {
        let chat = Chat::open(dir.path()).unwrap();
        assert_eq!(chat.prompt("  hello there ").unwrap(), want);
        assert_eq!(chat.answer("sorry").unwrap(), vec![6, 1]);
        assert_eq!(chat.stop(), [1]);
        assert_eq!(chat.decode(&[6, 1]).unwrap(), "sorry");
    }
}

#[test]
fn refusals_are_cut_where_they_have_opened() {
    let dir = tempfile::tempdir().unwrap();
    folder(dir.path(), json!({"eos_token": "<|im_end|>"}), Some(CHATML));
    let chat = Chat::open(dir.path()).unwrap();
    let row = |answer: &[u32]| Row { prompt: vec![2], answer: answer.to_vec() };
    // "hello there sorry", "hello there", and "sorry" alone.
    let mut rows = [row(&[4, 5, 6, 1]), row(&[4, 5, 1]), row(&[6])];
    let openings = Openings::parse("hello there\nsorry").unwrap();
    chat.cut_to_openings(&mut rows, &openings).unwrap();
    assert_eq!(rows, [row(&[4, 5]), row(&[4, 5]), row(&[6])]);
    assert_eq!(chat.opening(&[6, 4, 5, 1], &Openings::default()).unwrap(), Some(1));
    // What never refuses is not taken whole: its loss would mean something else.
    assert_eq!(chat.opening(&[5, 4, 1], &openings).unwrap(), None);
    let error = chat.cut_to_openings(&mut [row(&[5, 4, 1])], &openings).unwrap_err();
    assert!(
        error.to_string().contains("there hello") && error.hint().unwrap().contains("--refusals"),
        "{error}"
    );
}

/// A byte-level BPE tokenizer, as most model folders have it: a typographic apostrophe is three tokens.
#[test]
fn an_opening_of_byte_level_tokens_ends_with_its_last_byte() {
    let dir = tempfile::tempdir().unwrap();
    folder(dir.path(), json!({"eos_token": "<|im_end|>"}), Some(CHATML));
    let tokens = "<|im_start|> <|im_end|> I Ġ c a n t h e l p â Ģ Ļ ca can Ġcan ' o";
    let vocab: serde_json::Map<String, Value> =
        tokens.split(' ').enumerate().map(|(i, t)| (t.to_string(), json!(i))).collect();
    let path = dir.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    tokenizer["pre_tokenizer"] = bytes.clone();
    tokenizer["decoder"] = bytes;
    tokenizer["model"] = json!({"type": "BPE", "vocab": vocab, "merges": ["c a", "ca n", "Ġ can"]});
    fs::write(&path, tokenizer.to_string()).unwrap();
    let chat = Chat::open(dir.path()).unwrap();
    for (text, prefix) in [
        ("I can\u{2019}t help", "I can\u{2019}t"),
        ("I can't help", "I can't"),
        ("I cannot help", "I cannot"),
    ] {
        let answer = chat.answer(text).unwrap();
        let n = chat.opening(&answer, &Openings::default()).unwrap().unwrap();
        assert_eq!(chat.decode(&answer[..n]).unwrap(), prefix);
    }
    // "I", " can", three bytes, "t": one byte less is no text.
    let answer = chat.answer("I can\u{2019}t help").unwrap();
    assert_eq!(answer[..6], [2, 17, 12, 13, 14, 7]);
    assert_eq!(chat.opening(&answer[..5], &Openings::default()).unwrap(), None);
    assert_eq!(chat.opening(&chat.answer("I can help").unwrap(), &Openings::default()).unwrap(), None);
}

#[test]
fn generation_config_names_several_stop_tokens() {
    let dir = tempfile::tempdir().unwrap();
    folder(dir.path(), json!({"eos_token": "<|im_end|>"}), Some(CHATML));
    fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": [7, 1]}"#).unwrap();
    assert_eq!(Chat::open(dir.path()).unwrap().stop(), [7, 1]);
}

#[test]
fn missing_template_missing_tokenizer_and_raised_exception_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    folder(dir.path(), json!({"eos_token": "<|im_end|>"}), None);
    assert!(Chat::open(dir.path()).unwrap_err().to_string().contains("no chat template"));
    fs::write(dir.path().join("chat_template.jinja"), "{{ raise_exception('roles must alternate') }}")
        .unwrap();
    let chat = Chat::open(dir.path()).unwrap();
    assert!(chat.prompt("hello").unwrap_err().to_string().contains("roles must alternate"));
    assert!(chat.answer("").unwrap_err().to_string().contains("no token"));
    fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    assert!(Chat::open(dir.path()).unwrap_err().to_string().contains("tokenizer.json"));
}
