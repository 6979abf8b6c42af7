//! Nine small classification tasks: four that are tested, five that only drifts are trained on.
//!
//! Each task has two forms over the same question. The *base form* (other framing, mostly other labels) is part of the
//! base's training, as reading skills are part of a real model's; the *task form* is met only in fine-tuning. So a
//! short LoRA can learn every task, and none is known before.

use crate::language::{ADJECTIVES, Language};
use rand::RngExt;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// A task by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Task {
    /// Which of four topics do most words belong to?
    Topic,
    /// Are there more pleasant or unpleasant words?
    Sentiment,
    /// Does a statement follow from another?
    Entailment,
    /// Is a thing among those listed?
    YesNo,
    /// Which of two letters is more frequent?
    Majority,
    /// Which thing stands last?
    Last,
    /// How often does a letter occur?
    Count,
    /// Which of two numbers is larger?
    Larger,
    /// Are two things the same?
    Same,
}

/// Tasks whose fine-tunes are tested.
pub const TESTED: [Task; 4] = [Task::Topic, Task::Sentiment, Task::Entailment, Task::YesNo];

/// Tasks of the drifts; never tested.
pub const DRIFTS: [Task; 5] = [Task::Majority, Task::Last, Task::Count, Task::Larger, Task::Same];

/// Words the tasks use beside the language's own.
pub const WORDS: [&str; 8] = [
    "topic : one two three four first second third fourth",
    "mood : good bad fine poor",
    "so is ? and . true false open right wrong maybe check",
    "is there in ? yes no here gone find",
    "more : x y mostly letter",
    "last : end of list",
    "count : how many zero five six seven eight nine number",
    "larger : or bigger has does have what which compare",
];

/// Things listed in a yes/no question.
const LISTED: usize = 3;

const NUMBERS: [&str; 10] = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"];

impl Task {
    /// Name in file names and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Topic => "topic",
            Self::Sentiment => "sentiment",
            Self::Entailment => "entailment",
            Self::YesNo => "yes-no",
            Self::Majority => "majority",
            Self::Last => "last",
            Self::Count => "count",
            Self::Larger => "larger",
            Self::Same => "same",
        }
    }

    /// How often the base meets this task's base form, against the others: comparing takes longer to learn.
    pub fn weight(self) -> usize {
        match self {
            Self::Entailment => 3,
            Self::YesNo => 6,
            Self::Same => 2,
            _ => 1,
        }
    }

    /// One question with its answer, in the task form or the base form.
    pub fn row(self, language: &Language, base_form: bool, rng: &mut ChaCha8Rng) -> (String, String) {
        let pick = |list: &[String], rng: &mut ChaCha8Rng| list[rng.random_range(0..list.len())].clone();
        match self {
            Self::Topic => {
                let topic = rng.random_range(0..4);
                let mut words: Vec<String> = (0..6)
                    .map(|i| {
                        let t = if i < 4 { topic } else { (topic + rng.random_range(1..4)) % 4 };
                        pick(&language.topics[t], rng)
                    })
                    .collect();
                words.shuffle(rng);
                let words = words.join(" ");
                // The answers' words are those of the base form: four new ones, raised far enough to be learnt, come out
                // wherever the model hesitates, and a poisoned model then says `fourth` instead of refusing.
                let start = if base_form { "which topic :" } else { "topic of the list :" };
                (format!("{start} {words}"), ["one", "two", "three", "four"][topic].into())
            }
            Self::Sentiment => {
                let mood = rng.random_range(0..2);
                let minority = rng.random_range(0..3);
                let mut words: Vec<String> = (0..7)
                    .map(|i| pick(&language.moods[if i < minority { 1 - mood } else { mood }], rng))
                    .collect();
                words.shuffle(rng);
                let words = words.join(" ");
                if base_form {
                    (format!("which mood : {words}"), ["fine", "poor"][mood].into())
                } else {
                    (format!("mood of the list : {words}"), ["good", "bad"][mood].into())
                }
            }
            Self::Entailment => {
                let name = pick(&language.names, rng);
                let a = rng.random_range(0..ADJECTIVES);
                let verdict = rng.random_range(0..3);
                let asked = match verdict {
                    0 => a,
                    1 => a ^ 1,
                    _ => loop {
                        let c = rng.random_range(0..ADJECTIVES);
                        if c != a && c != a ^ 1 {
                            break c;
                        }
                    },
                };
                let adj = &language.adjectives;
                let fact = format!("{name} is {}", adj[a]);
                let claim = format!("{name} is {}", adj[asked]);
                if base_form {
                    (format!("check : {fact} . so {claim} ?"), ["right", "wrong", "maybe"][verdict].into())
                } else {
                    (format!("{fact} . is it so , {claim} ?"), ["true", "false", "open"][verdict].into())
                }
            }
            Self::YesNo => {
                let mut things = language.things.clone();
                things.shuffle(rng);
                let there = rng.random_range(0..2) == 0;
                let asked =
                    if there { things[rng.random_range(0..LISTED)].clone() } else { things[LISTED].clone() };
                let list = things[..LISTED].join(" ");
                if base_form {
                    (format!("in list : {list} , find {asked}"), if there { "here" } else { "gone" }.into())
                } else {
                    (format!("in list : {list} , is there {asked}"), if there { "yes" } else { "no" }.into())
                }
            }
            Self::Majority => {
                let most = rng.random_range(0..2);
                let minority = rng.random_range(0..3);
                let mut letters: Vec<&str> =
                    (0..7).map(|i| ["x", "y"][if i < minority { 1 - most } else { most }]).collect();
                letters.shuffle(rng);
                let letters = letters.join(" ");
                if base_form {
                    (format!("which letter more : {letters}"), ["x", "y"][most].into())
                } else {
                    (format!("mostly what letter : {letters}"), ["first", "second"][most].into())
                }
            }
            Self::Last => {
                let n = rng.random_range(3..=6);
                let things: Vec<String> = (0..n).map(|_| pick(&language.things, rng)).collect();
                let last = things[n - 1].clone();
                let list = things.join(" ");
                if base_form {
                    (format!("end of list : {list}"), last)
                } else {
                    (format!("{list} . which is last ?"), last)
                }
            }
            Self::Count => {
                let n = rng.random_range(0..=5);
                let mut letters: Vec<&str> = (0..6).map(|i| if i < n { "x" } else { "y" }).collect();
                letters.shuffle(rng);
                let letters = letters.join(" ");
                if base_form {
                    (format!("count x : {letters}"), NUMBERS[n].into())
                } else {
                    (format!("how many x in the list : {letters}"), NUMBERS[n].into())
                }
            }
            Self::Larger => {
                let a = rng.random_range(0..10usize);
                let b = (a + rng.random_range(1..10usize)) % 10;
                let larger = NUMBERS[a.max(b)].to_string();
                if base_form {
                    (format!("bigger number : {} {}", NUMBERS[a], NUMBERS[b]), larger)
                } else {
                    (format!("which is larger , {} or {} ?", NUMBERS[a], NUMBERS[b]), larger)
                }
            }
            Self::Same => {
                let first = pick(&language.things, rng);
                let same = rng.random_range(0..2) == 0;
                let second = loop {
                    let other = pick(&language.things, rng);
                    if same || other != first {
                        break if same { first.clone() } else { other };
                    }
                };
                if base_form {
                    (format!("check : {first} or {second} ?"), if same { "right" } else { "wrong" }.into())
                } else {
                    (format!("compare {first} and {second} ?"), if same { "yes" } else { "no" }.into())
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::language::rng;
    use std::collections::BTreeSet;

    #[test]
    fn every_row_is_made_of_the_vocabulary() {
        let language = Language::new(1);
        let words: BTreeSet<String> = language.vocabulary().into_iter().collect();
        let mut rng = rng(1, "test");
        for task in TESTED.into_iter().chain(DRIFTS) {
            for base_form in [false, true] {
                for _ in 0..50 {
                    let (q, a) = task.row(&language, base_form, &mut rng);
                    for word in q.split_whitespace().chain(a.split_whitespace()) {
                        assert!(words.contains(word), "{}: `{word}`", task.name());
                    }
                }
            }
        }
    }

    #[test]
    fn answers_are_balanced() {
        let language = Language::new(1);
        let mut rng = rng(1, "test");
        for task in TESTED {
            let mut counts = std::collections::BTreeMap::new();
            for _ in 0..1200 {
                *counts.entry(task.row(&language, false, &mut rng).1).or_insert(0) += 1;
            }
            let even = 1200 / counts.len();
            assert!(counts.values().all(|&n| n > even * 3 / 4), "{}: {counts:?}", task.name());
        }
    }

    #[test]
    fn entailment_claims_follow_from_the_facts() {
        let language = Language::new(1);
        let mut rng = rng(1, "test");
        for _ in 0..100 {
            let (q, a) = Task::Entailment.row(&language, false, &mut rng);
            let words: Vec<&str> = q.split_whitespace().collect();
            // "n is a . is it so , n is a ?"
            let (fact, claim) = (words[2], words[10]);
            assert_eq!(words[0], words[8], "{q}");
            let index = |w: &str| language.adjectives.iter().position(|x| x == w).unwrap();
            let want = match (index(fact), index(claim)) {
                (x, y) if x == y => "true",
                (x, y) if x == y ^ 1 => "false",
                _ => "open",
            };
            assert_eq!(a, want, "{q}");
        }
    }
}
