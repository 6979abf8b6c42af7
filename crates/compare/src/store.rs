//! Records of a work folder: one JSON object a line, appended as they are made.
//!
//! `recipe.json` beside them says what they were made by; records of another recipe are never mixed in. A last line that was
//! cut off is dropped, and what it would have said is done again. `seeds.jsonl` says of each family and seed that was
//! finished what a report tells besides records. All three are files of a report too, so that a comparison goes on
//! elsewhere from the families and seeds that a report holds whole ([`Store::take`]), without the trained models.

use crate::error::CompareError;
use crate::plan::{Entry, Plan};
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
    /// Hash of the base and the aligned model that everything came from.
    #[serde(default)]
    pub roots: String,
    /// System, processor and threads that it was finished on.
    #[serde(default)]
    pub machine: String,
    /// Targets that turned out not to be what the lab promises.
    #[serde(default)]
    pub left_out: Vec<String>,
    /// What a reader should know.
    pub notes: Vec<String>,
    /// Scores of the gene's layers.
    pub scores: Vec<LayerScores>,
    /// What distillations reached.
    pub distilled: Vec<Distillation>,
}

/// Files of a work folder that a report has too.
pub const FILES: [&str; 3] = ["recipe.json", "records.jsonl", "seeds.jsonl"];

/// Whether the records are all that a plan asks of a family and seed.
fn covers(plan: &Plan, complete: &Complete, keys: &BTreeSet<Key>) -> bool {
    let Complete { family, seed, left_out, .. } = complete;
    plan.cells.iter().all(|cell| {
        let target = cell.tune.name();
        left_out.contains(&target) || cell.entries.iter().all(|e| has(keys, family, *seed, &target, e))
    })
}

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

/// Every line of a file; none if there is no file. A last line that was cut off is dropped, any other that makes no sense is
/// an error.
pub(crate) fn lines_of<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Vec<T>, CompareError> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = fs::read_to_string(path).map_err(fail("read", path))?;
    let mut out = Vec::new();
    let count = text.lines().count();
    for (i, line) in text.lines().enumerate() {
        match serde_json::from_str(line) {
            Ok(one) => out.push(one),
            Err(_) if i + 1 == count && !text.ends_with('\n') => {}
            Err(e) => {
                return Err(CompareError::File {
                    action: "read",
                    path: path.to_path_buf(),
                    problem: format!("line {}: {e}", i + 1),
                });
            }
        }
    }
    Ok(out)
}

/// Puts `text` in the place of a file, whole or not at all.
pub fn replace(path: &Path, text: &str) -> Result<(), CompareError> {
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

/// One JSON object a line.
pub fn lines<T: Serialize>(all: &[T]) -> String {
    all.iter().map(line_of).collect()
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
        replace(&path, &lines(&records))?;
        let file = OpenOptions::new().append(true).open(&path).map_err(fail("write", &path))?;
        let complete = Mutex::new(lines_of(&work.join(FILES[2]))?);
        let inner = Mutex::new((file, records));
        Ok(Self { work: work.to_path_buf(), path, recipe: recipe.clone(), inner, complete })
    }

    /// Takes over the families and seeds that a report of the same recipe holds whole. What is here of the same family and
    /// seed and is not whole makes way: records of two trainings are never mixed.
    pub fn take(&self, plan: &Plan, report: &Path) -> Result<(), CompareError> {
        if !check_recipe(report, &self.recipe)? {
            return Err(CompareError::NoReport { folder: report.to_path_buf() });
        }
        let records: Vec<Record> = lines_of(&report.join(FILES[1]))?;
        for complete in lines_of::<Complete>(&report.join(FILES[2]))? {
            if self.complete(&complete.family, complete.seed).is_some() {
                continue;
            }
            let of = |r: &&Record| r.family == complete.family && r.seed == complete.seed;
            let theirs: Vec<Record> = records.iter().filter(of).cloned().collect();
            if !covers(plan, &complete, &theirs.iter().map(key).collect()) {
                let Complete { family, seed, .. } = complete;
                return Err(CompareError::NotWhole { folder: report.to_path_buf(), family, seed });
            }
            self.drop_records(&complete.family, complete.seed)?;
            self.add(theirs)?;
            self.finish(complete)?;
        }
        Ok(())
    }

    fn drop_records(&self, family: &str, seed: u64) -> Result<(), CompareError> {
        let Ok(mut inner) = self.inner.lock() else { return Err(CompareError::Stopped) };
        inner.1.retain(|r| r.family != family || r.seed != seed);
        replace(&self.path, &lines(&inner.1))?;
        inner.0 = OpenOptions::new().append(true).open(&self.path).map_err(fail("write", &self.path))?;
        Ok(())
    }

    /// What is said of a family and seed that was finished.
    pub fn complete(&self, family: &str, seed: u64) -> Option<Complete> {
        let all = self.complete.lock().ok()?;
        all.iter().find(|c| c.family == family && c.seed == seed).cloned()
    }

    /// Whether it was finished and every record that the plan asks for is there, but of targets that were left out.
    pub fn is_whole(&self, plan: &Plan, family: &str, seed: u64) -> bool {
        self.complete(family, seed).is_some_and(|complete| covers(plan, &complete, &self.keys()))
    }

    /// A family and seed is finished; what was said of it before is replaced.
    pub fn finish(&self, complete: Complete) -> Result<(), CompareError> {
        let Ok(mut all) = self.complete.lock() else { return Err(CompareError::Stopped) };
        all.retain(|c| c.family != complete.family || c.seed != complete.seed);
        all.push(complete);
        replace(&self.work.join(FILES[2]), &lines(&all))
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
        let text = lines(&records);
        inner.0.write_all(text.as_bytes()).map_err(fail("write", &self.path))?;
        inner.1.extend(records);
        Ok(())
    }
}

/// One JSON object on a line.
pub(crate) fn line_of<T: Serialize>(line: &T) -> String {
    // What holds numbers, strings and lists only always serialises.
    serde_json::to_string(line).unwrap_or_default() + "\n"
}
