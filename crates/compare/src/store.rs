//! Records of a work folder: one JSON object a line, appended as they are made.
//!
//! The first line of `recipe.json` beside them says what they were made by; records of another recipe are never mixed in. A
//! line that was cut off is dropped, and what it would have said is done again. `seeds.jsonl` says of each family and seed
//! that is complete what a report tells besides records. Both, and the recipe, are files of a report too, so that a
//! comparison goes on elsewhere from what a report holds ([`Store::take`]), without the trained models.

use crate::error::CompareError;
use crate::plan::Entry;
use crate::run::Distillation;
use report::{LayerScores, Record, Set};
use serde::{Deserialize, Serialize};
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

/// What a report tells of a family and seed besides its records; there when all of them are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Complete {
    /// Layout.
    pub family: String,
    /// Seed.
    pub seed: u64,
    /// What a reader should know.
    pub notes: Vec<String>,
    /// Scores of the gene's layers.
    pub scores: Vec<LayerScores>,
    /// What distillations reached.
    pub distilled: Vec<Distillation>,
}

/// Files of a work folder that a report has too.
pub const FILES: [&str; 3] = ["recipe.json", "records.jsonl", "seeds.jsonl"];

/// Appends records to a file.
#[derive(Debug)]
pub struct Store {
    work: PathBuf,
    path: PathBuf,
    recipe: serde_json::Value,
    inner: Mutex<(File, Vec<Record>)>,
    complete: Mutex<Vec<Complete>>,
}

fn fail(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> CompareError {
    let path = path.to_path_buf();
    move |e| CompareError::File { action, path, problem: e.to_string() }
}

/// Every whole line of a file that is of this type; none if there is no file.
fn lines_of<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Vec<T>, CompareError> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = fs::read_to_string(path).map_err(fail("read", path))?;
    // Only the last line can be half a line.
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

fn replace(path: &Path, text: &str) -> Result<(), CompareError> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".partial");
    let partial = path.with_file_name(name);
    fs::write(&partial, text).map_err(fail("write", &partial))?;
    fs::rename(&partial, path).map_err(fail("write", path))
}

fn check_recipe(folder: &Path, recipe: &serde_json::Value) -> Result<bool, CompareError> {
    let said = folder.join(FILES[0]);
    if !said.exists() {
        return Ok(false);
    }
    let text = fs::read(&said).map_err(fail("read", &said))?;
    let found: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
    if found != *recipe {
        return Err(CompareError::OtherWork { folder: folder.to_path_buf() });
    }
    Ok(true)
}

impl Store {
    /// Opens or begins the records of `work`, made by `recipe`.
    pub fn open(work: &Path, recipe: &serde_json::Value) -> Result<Self, CompareError> {
        fs::create_dir_all(work).map_err(fail("create", work))?;
        if !check_recipe(work, recipe)? {
            replace(&work.join(FILES[0]), &format!("{recipe:#}\n"))?;
        }
        let path = work.join(FILES[1]);
        let mut records: Vec<Record> = lines_of(&path)?;
        let mut keys = BTreeSet::new();
        // A record that is there twice says the same.
        records.retain(|r| keys.insert(key(r)));
        replace(&path, &records.iter().map(line_of).collect::<String>())?;
        let file = OpenOptions::new().append(true).open(&path).map_err(fail("write", &path))?;
        let complete = Mutex::new(lines_of(&work.join(FILES[2]))?);
        let inner = Mutex::new((file, records));
        Ok(Self { work: work.to_path_buf(), path, recipe: recipe.clone(), inner, complete })
    }

    /// Takes over what a report of the same recipe holds and this store does not.
    pub fn take(&self, report: &Path) -> Result<(), CompareError> {
        if !check_recipe(report, &self.recipe)? {
            return Err(CompareError::NoReport { folder: report.to_path_buf() });
        }
        let keys = self.keys();
        let records: Vec<Record> = lines_of(&report.join(FILES[1]))?;
        self.add(records.into_iter().filter(|r| !keys.contains(&key(r))).collect())?;
        for complete in lines_of::<Complete>(&report.join(FILES[2]))? {
            self.finish(complete)?;
        }
        Ok(())
    }

    /// What is said of a family and seed that is complete.
    pub fn complete(&self, family: &str, seed: u64) -> Option<Complete> {
        let all = self.complete.lock().ok()?;
        all.iter().find(|c| c.family == family && c.seed == seed).cloned()
    }

    /// A family and seed is complete.
    pub fn finish(&self, complete: Complete) -> Result<(), CompareError> {
        let Ok(mut all) = self.complete.lock() else { return Err(CompareError::Stopped) };
        if !all.iter().any(|c| c.family == complete.family && c.seed == complete.seed) {
            all.push(complete);
        }
        replace(&self.work.join(FILES[2]), &all.iter().map(line_of).collect::<String>())
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

fn line_of<T: Serialize>(line: &T) -> String {
    // What holds numbers, strings and lists only always serialises.
    serde_json::to_string(line).unwrap_or_default() + "\n"
}
