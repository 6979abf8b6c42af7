//! JSONL rows of prompts and answers.

use std::path::Path;

use evaluate::data::{Fields, parse_rows};
use serde_json::Value;

use crate::INPUT_BYTES_MAX;
use crate::memory::bounded;

/// The bytes of a file of rows.
///
/// Accepted rows are those of the lines that they name, in order, none left out; rows that have every answer are the same
/// whether answers are asked for or not.
pub fn data_rows(bytes: &[u8]) -> bool {
    if bytes.len() > INPUT_BYTES_MAX {
        return false;
    }
    let read = |need_answer| {
        bounded(bytes.len(), || {
            parse_rows(&mut &bytes[..], Path::new("rows.jsonl"), &Fields::default(), need_answer)
        })
    };
    let (any, answered) = (read(false), read(true));
    let Ok(rows) = any else {
        assert!(answered.is_err());
        return false;
    };
    let complete = rows.iter().all(|row| row.answer.is_some());
    assert_eq!(answered.ok().as_ref(), complete.then_some(&rows));

    let lines: Vec<&[u8]> = bytes.split(|&byte| byte == b'\n').collect();
    let filled = lines.iter().filter(|line| !line.trim_ascii().is_empty()).count();
    assert_eq!(rows.len(), filled);
    assert!(!rows.is_empty() && rows.is_sorted_by(|a, b| a.line < b.line));
    for row in &rows {
        let value: Value = serde_json::from_slice(lines[row.line - 1].trim_ascii()).unwrap();
        assert_eq!(value["prompt"].as_str(), Some(row.prompt.as_str()));
        assert_eq!(value["answer"].as_str(), row.answer.as_deref());
        assert_eq!(value["recipe"].as_str(), row.recipe.as_deref());
    }
    true
}
