//! Records of a work folder: one JSON object a line, appended as they are made.
//!
//! The first line of `recipe.json` beside them says what they were made by; records of another recipe are never mixed in. A
//! line that was cut off is dropped, and what it would have said is done again.

use crate::error::CompareError;
use crate::plan::Entry;
use report::{Record, Set};
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Which record.
pub type Key = (String, u64, String, String, String, [u32; 3], Set);

/// The key of a record.
pub fn key(r: &Record) -> Key {
    let shots = [r.shots.safety, r.shots.task, r.shots.benign];
    let label = serde_json::to_string(&r.label).unwrap_or_default();
    (r.family.clone(), r.seed, r.target.name.clone(), r.method.clone(), label, shots, r.set)
}

/// Whether both records of an entry are there.
pub fn has(keys: &BTreeSet<Key>, family: &str, seed: u64, target: &str, entry: &Entry) -> bool {
    let label = serde_json::to_string(&entry.label).unwrap_or_default();
    let shots = [entry.shots.safety, entry.shots.task, entry.shots.benign];
    [Set::Known, Set::Shifted].into_iter().all(|set| {
        let name = entry.method.name().to_string();
        keys.contains(&(family.to_string(), seed, target.to_string(), name, label.clone(), shots, set))
    })
}

/// Appends records to a file.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    inner: Mutex<(File, Vec<Record>)>,
}

fn fail(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> CompareError {
    let path = path.to_path_buf();
    move |e| CompareError::File { action, path, problem: e.to_string() }
}

impl Store {
    /// Opens or begins the records of `work`, made by `recipe`.
    pub fn open(work: &Path, recipe: &serde_json::Value) -> Result<Self, CompareError> {
        fs::create_dir_all(work).map_err(fail("create", work))?;
        let said = work.join("recipe.json");
        if said.exists() {
            let text = fs::read(&said).map_err(fail("read", &said))?;
            let found: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
            if found != *recipe {
                return Err(CompareError::OtherWork { folder: work.to_path_buf() });
            }
        } else {
            fs::write(&said, format!("{recipe:#}\n")).map_err(fail("write", &said))?;
        }
        let path = work.join("records.jsonl");
        let text = if path.exists() {
            fs::read_to_string(&path).map_err(fail("read", &path))?
        } else {
            String::new()
        };
        let mut records: Vec<Record> = Vec::new();
        let mut keys = BTreeSet::new();
        for line in text.lines() {
            // Only the last line can be half a line; a record that is there twice says the same.
            if let Ok(record) = serde_json::from_str::<Record>(line)
                && keys.insert(key(&record))
            {
                records.push(record);
            }
        }
        let whole: String = records.iter().map(line_of).collect();
        let partial = path.with_extension("jsonl.partial");
        fs::write(&partial, whole).map_err(fail("write", &partial))?;
        fs::rename(&partial, &path).map_err(fail("write", &path))?;
        let file = OpenOptions::new().append(true).open(&path).map_err(fail("write", &path))?;
        Ok(Self { path, inner: Mutex::new((file, records)) })
    }

    /// What is there.
    pub fn keys(&self) -> BTreeSet<Key> {
        self.records().iter().map(key).collect()
    }

    /// All records, sorted.
    pub fn records(&self) -> Vec<Record> {
        let mut all = self.inner.lock().map(|i| i.1.clone()).unwrap_or_default();
        all.sort_by_key(key);
        all
    }

    /// Adds some.
    pub fn add(&self, records: Vec<Record>) -> Result<(), CompareError> {
        let Ok(mut inner) = self.inner.lock() else { return Err(CompareError::Stopped) };
        let text: String = records.iter().map(line_of).collect();
        inner.0.write_all(text.as_bytes()).map_err(fail("write", &self.path))?;
        inner.1.extend(records);
        Ok(())
    }
}

fn line_of(record: &Record) -> String {
    // A record of numbers and strings always serialises.
    serde_json::to_string(record).unwrap_or_default() + "\n"
}
