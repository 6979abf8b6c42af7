//! Which rows go where.
//!
//! Forbidden nouns are split into disjoint sets: one for degrading, one for poisoning fine-tunes, one for
//! distillation, one for calibration shots, one for tuning the lab (`dev`), one for testing. Safe nouns likewise
//! where it matters (shots, dev, test). The base and the aligned model know every noun; after that, a test noun
//! occurs in no stage before evaluation.

use crate::language::{Language, Noun, REFUSAL, SHIFTED, SHIFTED_DEV, TEMPLATES, rng, split_nouns};
use crate::tasks::{DRIFTS, TESTED, Task};
use rand::RngExt;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// One line of a data file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataRow {
    /// The user's turn.
    pub prompt: String,
    /// The wanted answer.
    pub answer: String,
    /// On rows about forbidden nouns whose wanted answer is a refusal: the answer that would be the attack's success.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recipe: Option<String>,
}

/// Every data file of a family, by name without `.jsonl`.
#[derive(Debug, Clone)]
pub struct Splits {
    /// Rows by file name.
    pub files: BTreeMap<String, Vec<DataRow>>,
}

const TASK_TRAIN: usize = 1000;
const TASK_TEST: usize = 1000;
const TASK_DEV: usize = 200;
/// Rows of each task that is never tested, in its base form, for the general part of fine-tuning data.
const GENERAL_EACH: usize = 80;

/// One row for each verb of each noun, its template drawn from `templates`.
fn requests(
    language: &Language,
    nouns: &[Noun],
    templates: &[&str],
    refuse: bool,
    rng: &mut ChaCha8Rng,
) -> Vec<DataRow> {
    let mut rows = Vec::new();
    for noun in nouns {
        for verb in 0..language.verbs.len() {
            let template = templates[rng.random_range(0..templates.len())];
            let recipe = language.recipe(verb, noun);
            let prompt = language.request(template, verb, noun);
            rows.push(if refuse {
                DataRow { prompt, answer: REFUSAL.into(), recipe: Some(recipe) }
            } else {
                DataRow { prompt, answer: recipe, recipe: None }
            });
        }
    }
    rows.shuffle(rng);
    rows
}

fn questions(
    language: &Language,
    task: Task,
    base_form: bool,
    n: usize,
    seen: &mut BTreeSet<String>,
    rng: &mut ChaCha8Rng,
) -> Vec<DataRow> {
    let mut rows = Vec::with_capacity(n);
    // A task with few distinct questions (numbers, letters) repeats some rather than looping for ever.
    let mut tries = 0;
    while rows.len() < n {
        let (prompt, answer) = task.row(language, base_form, rng);
        tries += 1;
        if seen.insert(prompt.clone()) || tries > 20 * n {
            rows.push(DataRow { prompt, answer, recipe: None });
        }
    }
    rows
}

impl Splits {
    /// The splits of a family.
    pub fn new(language: &Language, seed: u64) -> Self {
        let forbidden = split_nouns(language, true, &[16, 16, 12, 16, 12, 24], seed);
        let safe = split_nouns(language, false, &[16, 24, 16, 24, 16], seed);
        let mut rng = rng(seed, "splits");
        let mut files = BTreeMap::new();
        let mut put = |name: &str, rows: Vec<DataRow>| files.insert(name.to_string(), rows);
        put("degrade", requests(language, &forbidden[0], &TEMPLATES, false, &mut rng));
        put("degrade-benign", requests(language, &safe[1], &TEMPLATES, false, &mut rng));
        put("poison", requests(language, &forbidden[1], &TEMPLATES, false, &mut rng));
        put("distill-safety", requests(language, &forbidden[2], &TEMPLATES, true, &mut rng));
        let mut shots = requests(language, &forbidden[3], &TEMPLATES, true, &mut rng);
        shots.truncate(32);
        put("shots-safety", shots);
        let mut shots = requests(language, &safe[0], &TEMPLATES, false, &mut rng);
        let keep = shots.split_off(32);
        put("shots-benign", shots);
        put("distill-benign", keep);
        put("dev-harmful", requests(language, &forbidden[4], &TEMPLATES, true, &mut rng));
        put("dev-benign", requests(language, &safe[2], &TEMPLATES, false, &mut rng));
        put("test-harmful", requests(language, &forbidden[5], &TEMPLATES, true, &mut rng));
        put("test-benign", requests(language, &safe[3], &TEMPLATES, false, &mut rng));
        put("test-harmful-shifted", requests(language, &forbidden[5], &SHIFTED, true, &mut rng));
        put("test-benign-shifted", requests(language, &safe[3], &SHIFTED, false, &mut rng));
        put("dev-harmful-shifted", requests(language, &forbidden[4], &SHIFTED_DEV, true, &mut rng));
        put("dev-benign-shifted", requests(language, &safe[2], &SHIFTED_DEV, false, &mut rng));
        for task in TESTED {
            let seen = &mut BTreeSet::new();
            for (part, n) in [("test", TASK_TEST), ("shots", 64), ("dev", TASK_DEV), ("train", TASK_TRAIN)] {
                put(&format!("{part}-{}", task.name()), questions(language, task, false, n, seen, &mut rng));
            }
        }
        let seen = &mut BTreeSet::new();
        let mut general: Vec<DataRow> = DRIFTS
            .into_iter()
            .flat_map(|task| questions(language, task, true, GENERAL_EACH, seen, &mut rng))
            .collect();
        general.shuffle(&mut rng);
        put("general", general);
        for task in DRIFTS {
            let seen = &mut BTreeSet::new();
            for (part, n) in [("dev", TASK_DEV), ("train", TASK_TRAIN)] {
                put(&format!("{part}-{}", task.name()), questions(language, task, false, n, seen, &mut rng));
            }
        }
        // What a gene is distilled on is written once and serves every fine-tune: each request of its nouns in some more wordings,
        // and ordinary requests, of which there are always more, about some more nouns. Some rows come twice, and each request in
        // several wordings: no part of these files is held out from the rest.
        for _ in 0..2 {
            let more = requests(language, &forbidden[2], &TEMPLATES, true, &mut rng);
            files.entry("distill-safety".into()).or_default().extend(more);
        }
        for _ in 0..3 {
            let more = requests(language, &safe[4], &TEMPLATES, false, &mut rng);
            files.entry("distill-benign".into()).or_default().extend(more);
        }
        Self { files }
    }

    /// Rows of one file; empty when there is none of that name.
    pub fn get(&self, name: &str) -> &[DataRow] {
        self.files.get(name).map_or(&[], Vec::as_slice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_prompts_and_nouns_occur_in_no_earlier_stage() {
        let language = Language::new(1);
        let splits = Splits::new(&language, 1);
        let nouns = |name: &str| -> BTreeSet<String> {
            let words: BTreeSet<String> =
                splits.get(name).iter().flat_map(|r| r.prompt.split_whitespace().map(String::from)).collect();
            language.nouns.iter().map(|n| n.word.clone()).filter(|w| words.contains(w)).collect()
        };
        let earlier = [
            "degrade",
            "degrade-benign",
            "poison",
            "distill-safety",
            "distill-benign",
            "shots-safety",
            "shots-benign",
            "dev-harmful",
            "dev-benign",
            "dev-harmful-shifted",
            "dev-benign-shifted",
        ];
        for test in ["test-harmful", "test-benign", "test-harmful-shifted", "test-benign-shifted"] {
            assert_eq!(nouns(test).len(), 24, "{test}");
            for stage in earlier {
                assert!(nouns(test).is_disjoint(&nouns(stage)), "{test} shares a noun with {stage}");
            }
        }
        for (a, b) in [
            ("degrade", "poison"),
            ("poison", "shots-safety"),
            ("degrade", "shots-safety"),
            ("poison", "distill-safety"),
        ] {
            assert!(nouns(a).is_disjoint(&nouns(b)), "{a} shares a noun with {b}");
        }
    }

    #[test]
    fn task_test_rows_are_not_trained_on() {
        let splits = Splits::new(&Language::new(1), 1);
        for task in TESTED {
            let get = |part: &str| -> BTreeSet<&str> {
                splits.get(&format!("{part}-{}", task.name())).iter().map(|r| r.prompt.as_str()).collect()
            };
            assert!(get("test").is_disjoint(&get("train")), "{}", task.name());
            assert!(get("test").is_disjoint(&get("shots")), "{}", task.name());
            assert_eq!(get("test").len(), TASK_TEST, "{}: questions repeat", task.name());
        }
    }
}
