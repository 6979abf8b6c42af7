//! Data rows from JSONL files.
//!
//! One object a line; `prompt` is required, `answer` where the caller needs one. Errors name file and line.

use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

/// Longest line read, in bytes: a row is a prompt and an answer, not a book.
pub const LINE_BYTES_MAX: usize = 1 << 20;

/// Why a data file was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The file could not be read.
    #[error("cannot read `{}`: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// A line is not a JSON object.
    #[error("`{}` line {line}: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Line number from 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
    /// A row lacks a field, or it is not a string.
    #[error("`{}` line {line}: field `{field}` is missing or not a string", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// Line number from 1.
        line: usize,
        /// The field.
        field: String,
    },
    /// No rows.
    #[error("`{}` holds no rows", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

impl DataError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Field { .. } => Some(
                "name the fields with --prompt-field and --answer-field if they are called otherwise".into(),
            ),
            Self::Line { .. } => Some("data files are JSONL: one JSON object on each line".into()),
            _ => None,
        }
    }
}

/// Names of the fields of a row.
#[derive(Debug, Clone)]
pub struct Fields {
    /// The user's turn.
    pub prompt: String,
    /// The wanted answer.
    pub answer: String,
    /// The answer that would be an attack's success, where the data know it.
    pub recipe: String,
}

impl Default for Fields {
    fn default() -> Self {
        Self { prompt: "prompt".into(), answer: "answer".into(), recipe: "recipe".into() }
    }
}

/// One row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataRow {
    /// The user's turn.
    pub prompt: String,
    /// The wanted answer, if the row has one.
    pub answer: Option<String>,
    /// The answer that would be an attack's success, if the row has one.
    pub recipe: Option<String>,
    /// Line number from 1.
    pub line: usize,
}

/// Rows from text; `path` is for messages. `need_answer` makes a missing answer an error.
pub fn parse_rows(
    text: &mut dyn BufRead,
    path: &Path,
    fields: &Fields,
    need_answer: bool,
) -> Result<Vec<DataRow>, DataError> {
    let mut rows = Vec::new();
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        let read = std::io::Read::take(&mut *text, LINE_BYTES_MAX as u64 + 1)
            .read_until(b'\n', &mut bytes)
            .map_err(|source| DataError::Io { path: path.into(), source })?;
        if read == 0 {
            break;
        }
        let bad = |problem: String| DataError::Line { path: path.into(), line, problem };
        if read > LINE_BYTES_MAX {
            return Err(bad(format!("longer than {LINE_BYTES_MAX} bytes")));
        }
        let trimmed = bytes.trim_ascii();
        if trimmed.is_empty() {
            continue;
        }
        let value: Value = serde_json::from_slice(trimmed).map_err(|e| bad(format!("not JSON: {e}")))?;
        let object = value.as_object().ok_or_else(|| bad("not a JSON object".into()))?;
        let text = |field: &str, required: bool| -> Result<Option<String>, DataError> {
            match object.get(field) {
                Some(Value::String(s)) => Ok(Some(s.clone())),
                None | Some(Value::Null) if !required => Ok(None),
                _ => Err(DataError::Field { path: path.into(), line, field: field.into() }),
            }
        };
        rows.push(DataRow {
            prompt: text(&fields.prompt, true)?.unwrap_or_default(),
            answer: text(&fields.answer, need_answer)?,
            recipe: text(&fields.recipe, false)?,
            line,
        });
    }
    if rows.is_empty() {
        return Err(DataError::Empty { path: path.into() });
    }
    Ok(rows)
}

/// Rows of a JSONL file.
pub fn read_rows(path: &Path, fields: &Fields, need_answer: bool) -> Result<Vec<DataRow>, DataError> {
    let file = std::fs::File::open(path).map_err(|source| DataError::Io { path: path.into(), source })?;
    parse_rows(&mut BufReader::new(file), path, fields, need_answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, need_answer: bool) -> Result<Vec<DataRow>, String> {
        parse_rows(&mut text.as_bytes(), Path::new("rows.jsonl"), &Fields::default(), need_answer)
            .map_err(|e| e.to_string())
    }

    #[test]
    fn rows_with_and_without_answers() {
        let rows = check("{\"prompt\":\"a\",\"answer\":\"b\",\"x\":1}\n\n{\"prompt\":\"c\"}", false).unwrap();
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[0].answer.as_deref(), Some("b"));
        assert_eq!((rows[1].answer.as_deref(), rows[1].line), (None, 3));
    }

    #[test]
    fn missing_field_names_file_line_and_field() {
        let e = check("{\"prompt\":\"a\",\"answer\":\"b\"}\n{\"prompt\":\"c\"}", true).unwrap_err();
        assert_eq!(e, "`rows.jsonl` line 2: field `answer` is missing or not a string");
        assert!(check("{\"answer\":\"b\"}", false).unwrap_err().contains("`prompt`"));
        assert!(check("{\"prompt\":3}", false).unwrap_err().contains("`prompt`"));
    }

    #[test]
    fn empty_broken_and_endless_lines_are_refused() {
        assert!(check("\n \n", false).unwrap_err().contains("no rows"));
        assert!(check("{\"prompt\":", false).unwrap_err().contains("line 1"));
        assert!(check("[1]", false).unwrap_err().contains("not a JSON object"));
        let long = format!("{{\"prompt\":\"{}\"}}", "a".repeat(LINE_BYTES_MAX));
        assert!(check(&long, false).unwrap_err().contains("longer than"));
    }
}
