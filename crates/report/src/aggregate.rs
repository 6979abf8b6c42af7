//! Records → means over cells.
//!
//! A cell is one target of one family and seed after one method with one label; its records for the two sets belong
//! together. Accuracy, KL and time do not depend on the set: they are taken from the known set's record, or else from the
//! shifted one's. An attack success rate is only ever inside [`Judged`], which cannot be made without its company.

use crate::mean::{self, CellOf, Mean};
use crate::names::{self, FINE_TUNED};
use crate::record::{Kind, Label, Rate, Record, Set, Target};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// Which targets are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Slice {
    /// Those fine-tuned with harmful rows: here safety has to be recovered.
    Harmful,
    /// Those fine-tuned on harmless rows: here nothing should change.
    Harmless,
}

impl Slice {
    pub(crate) fn holds(self, target: &Target) -> bool {
        let harmful = target.kind != Kind::BenignOnly && target.harm_percent > 0.0;
        harmful == (self == Self::Harmful)
    }
}

/// What rows are told apart by, besides method and label.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Grouping {
    /// By the share of harmful rows.
    pub harm_percent: bool,
    /// By how the target came to be.
    pub kind: bool,
    /// By family.
    pub family: bool,
    /// By task.
    pub task: bool,
}

/// The group that a row is about; what is null was not told apart.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Group {
    /// Share of harmful rows, in percent.
    pub harm_percent: Option<f64>,
    /// How the targets came to be.
    pub kind: Option<Kind>,
    /// Family.
    pub family: Option<String>,
    /// Task.
    pub task: Option<String>,
}

/// An attack success rate with what it must not be read without, over the same cells.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Judged {
    /// Cells judged.
    pub cells: usize,
    /// Harmful prompts answered.
    pub asr: Mean,
    /// Harmless prompts refused.
    pub over_refusal: Mean,
    /// Task rows answered rightly.
    pub accuracy: Mean,
    /// Harmful prompts answered with what was asked for.
    pub asr_precise: Option<Mean>,
    /// Harmless prompts answered with what was asked for.
    pub helped: Option<Mean>,
}

/// One method with one label over the cells of a group.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Row {
    /// Which targets.
    pub group: Group,
    /// Method.
    pub method: String,
    /// What it saw.
    pub label: Label,
    /// Cells of this row.
    pub cells: usize,
    /// Cells of the group that some method has: where it is more, means are not over the same cells.
    pub cells_of_group: usize,
    /// Prompts in the known form.
    pub known: Option<Judged>,
    /// Prompts in a form that nothing was trained on.
    pub shifted: Option<Judged>,
    /// Accuracy over all cells that have it.
    pub accuracy: Option<Mean>,
    /// Accuracy less that of the fine-tuned target, cell by cell: negative is lost.
    pub accuracy_change: Option<Mean>,
    /// KL from the target on task rows, nat per token.
    pub kl_task: Option<Mean>,
    /// KL from the target on harmless requests, nat per token.
    pub kl_benign: Option<Mean>,
    /// Time to recover.
    pub seconds: Option<Mean>,
}

/// How a difference is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The interval lies on the better side of 0.
    Better,
    /// The interval holds 0, or there is none.
    Tie,
    /// The interval lies on the worse side of 0.
    Worse,
}

/// A mean difference, and what it says.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Difference {
    /// First less second, over the cells that both have.
    pub mean: Mean,
    /// Whether the first is better.
    pub verdict: Verdict,
}

/// Difference of two methods on one set, with its company.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct JudgedDifference {
    /// In attack success rate.
    pub asr: Difference,
    /// In over-refusal.
    pub over_refusal: Difference,
    /// In accuracy.
    pub accuracy: Difference,
    /// Cells in which the first's ASR is lower, by both cells' rows (Newcombe's interval of the difference).
    pub cells_better: usize,
    /// Cells in which they cannot be told apart.
    pub cells_tie: usize,
    /// Cells in which the first's ASR is higher.
    pub cells_worse: usize,
}

/// Two methods with one label, cell by cell.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Pair {
    /// The first.
    pub method: String,
    /// The second.
    pub rival: String,
    /// What both saw.
    pub label: Label,
    /// Cells that both have.
    pub cells: usize,
    /// Prompts in the known form.
    pub known: Option<JudgedDifference>,
    /// Prompts in a form that nothing was trained on.
    pub shifted: Option<JudgedDifference>,
    /// In KL on task rows.
    pub kl_task: Option<Difference>,
    /// In KL on harmless requests.
    pub kl_benign: Option<Difference>,
    /// In time.
    pub seconds: Option<Difference>,
}

/// One target after one method, judged on up to two sets.
#[derive(Clone, Copy)]
pub(crate) struct Cell<'a> {
    pub(crate) of: CellOf<'a>,
    pub(crate) target: &'a Target,
    pub(crate) method: &'a str,
    pub(crate) label: Label,
    pub(crate) known: Option<&'a Record>,
    pub(crate) shifted: Option<&'a Record>,
}

impl<'a> Cell<'a> {
    fn either<T>(&self, read: impl Fn(&'a Record) -> Option<T>) -> Option<T> {
        self.known.and_then(&read).or_else(|| self.shifted.and_then(&read))
    }

    pub(crate) fn accuracy(&self) -> Option<Rate> {
        self.either(|r| r.accuracy)
    }

    pub(crate) fn kl_task(&self) -> Option<f64> {
        self.either(|r| r.kl_task)
    }

    pub(crate) fn kl_benign(&self) -> Option<f64> {
        self.either(|r| r.kl_benign)
    }

    pub(crate) fn seconds(&self) -> Option<f64> {
        self.either(|r| r.seconds)
    }

    pub(crate) fn coefficients(&self) -> Option<&'a BTreeMap<u32, f64>> {
        self.either(|r| r.coefficients.as_ref())
    }

    pub(crate) fn tradeoff(&self) -> Option<&'a [crate::record::TradeOff]> {
        self.either(|r| r.tradeoff.as_deref())
    }

    pub(crate) fn record(&self, set: Set) -> Option<&'a Record> {
        match set {
            Set::Known => self.known,
            Set::Shifted => self.shifted,
        }
    }

    /// Attack success rate, over-refusal and accuracy on a set: all or none.
    pub(crate) fn rates(&self, set: Set) -> Option<[Rate; 3]> {
        let r = self.record(set)?;
        Some([r.asr?, r.over_refusal?, self.accuracy()?])
    }
}

/// Cells in the order of tables: family, seed, target, method, label.
pub(crate) fn cells(records: &[Record]) -> Vec<Cell<'_>> {
    let mut out = BTreeMap::new();
    for r in records {
        let of = CellOf { family: &r.family, seed: r.seed, target: &r.target.name };
        let cell = out.entry((of, names::place(&r.method), r.label)).or_insert(Cell {
            of,
            target: &r.target,
            method: &r.method,
            label: r.label,
            known: None,
            shifted: None,
        });
        match r.set {
            Set::Known => cell.known = Some(r),
            Set::Shifted => cell.shifted = Some(r),
        }
    }
    out.into_values().collect()
}

fn judged(cells: &[Cell], set: Set) -> Option<Judged> {
    let all: Vec<_> = cells.iter().filter_map(|c| Some((c, c.rates(set)?))).collect();
    let mean = |k: usize| mean::of_rates(&all.iter().map(|(c, r)| (c.of, r[k])).collect::<Vec<_>>());
    let extra = |read: fn(&Record) -> Option<Rate>| {
        mean::of_rates(
            &all.iter().filter_map(|(c, _)| Some((c.of, read(c.record(set)?)?))).collect::<Vec<_>>(),
        )
    };
    Some(Judged {
        cells: all.len(),
        asr: mean(0)?,
        over_refusal: mean(1)?,
        accuracy: mean(2)?,
        asr_precise: extra(|r| r.asr_precise),
        helped: extra(|r| r.helped),
    })
}

fn amounts(cells: &[Cell], read: fn(&Cell) -> Option<f64>) -> Option<Mean> {
    mean::of_amounts(&cells.iter().filter_map(|c| Some((c.of, read(c)?))).collect::<Vec<_>>())
}

/// Order of groups: harm, kind, family, task. Harm is never negative, so its bits are ordered as it is.
type GroupKey<'a> = (Option<u64>, Option<Kind>, Option<&'a str>, Option<&'a str>);

fn group_of<'a>(cell: &Cell<'a>, by: Grouping) -> GroupKey<'a> {
    (
        by.harm_percent.then_some((cell.target.harm_percent + 0.0).to_bits()),
        by.kind.then_some(cell.target.kind),
        by.family.then_some(cell.of.family),
        by.task.then_some(cell.target.task.as_str()),
    )
}

/// Means of every method and label in every group.
pub(crate) fn rows(cells: &[Cell], slice: Slice, by: Grouping) -> Vec<Row> {
    let baseline: BTreeMap<CellOf, Rate> =
        cells.iter().filter(|c| c.method == FINE_TUNED).filter_map(|c| Some((c.of, c.accuracy()?))).collect();
    let mut grouped: BTreeMap<_, BTreeMap<_, Vec<Cell>>> = BTreeMap::new();
    for cell in cells.iter().filter(|c| slice.holds(c.target)) {
        let group = grouped.entry(group_of(cell, by)).or_default();
        group.entry((names::place(cell.method), cell.label)).or_default().push(*cell);
    }
    let mut out = Vec::new();
    for ((harm, kind, family, task), methods) in grouped {
        let union: BTreeSet<CellOf> = methods.values().flatten().map(|c| c.of).collect();
        for (((_, method), label), cells) in methods {
            let pairs: Vec<_> =
                cells.iter().filter_map(|c| Some((c.of, c.accuracy()?, *baseline.get(&c.of)?))).collect();
            let accuracy: Vec<_> = cells.iter().filter_map(|c| Some((c.of, c.accuracy()?))).collect();
            out.push(Row {
                group: Group {
                    harm_percent: harm.map(f64::from_bits),
                    kind,
                    family: family.map(String::from),
                    task: task.map(String::from),
                },
                method: method.to_string(),
                label,
                cells: cells.len(),
                cells_of_group: union.len(),
                known: judged(&cells, Set::Known),
                shifted: judged(&cells, Set::Shifted),
                accuracy: mean::of_rates(&accuracy),
                // Of the target itself there is nothing to lose.
                accuracy_change: if method == FINE_TUNED { None } else { mean::of_differences(&pairs) },
                kl_task: amounts(&cells, |c| c.kl_task()),
                kl_benign: amounts(&cells, |c| c.kl_benign()),
                seconds: amounts(&cells, |c| c.seconds()),
            });
        }
    }
    out
}

/// What is good news.
#[derive(Clone, Copy, PartialEq)]
enum Wanted {
    Less,
    More,
}

fn difference(mean: Mean, wanted: Wanted) -> Difference {
    let (low, high) = (mean.low.unwrap_or(f64::NEG_INFINITY), mean.high.unwrap_or(f64::INFINITY));
    let verdict = match (wanted, high < 0.0, low > 0.0) {
        (Wanted::Less, true, _) | (Wanted::More, _, true) => Verdict::Better,
        (Wanted::Less, _, true) | (Wanted::More, true, _) => Verdict::Worse,
        _ => Verdict::Tie,
    };
    Difference { mean, verdict }
}

/// Newcombe's interval of `a - b` from both shares' own intervals (1998, method 10).
fn told_apart(a: Rate, b: Rate) -> Verdict {
    let d = a.value - b.value;
    let low = d - ((a.value - a.low).powi(2) + (b.high - b.value).powi(2)).sqrt();
    let high = d + ((a.high - a.value).powi(2) + (b.value - b.low).powi(2)).sqrt();
    if high < 0.0 {
        Verdict::Better
    } else if low > 0.0 {
        Verdict::Worse
    } else {
        Verdict::Tie
    }
}

fn judged_difference(pairs: &[(Cell, Cell)], set: Set) -> Option<JudgedDifference> {
    let all: Vec<_> = pairs.iter().filter_map(|(a, b)| Some((a.of, a.rates(set)?, b.rates(set)?))).collect();
    let mean =
        |k: usize| mean::of_differences(&all.iter().map(|(c, a, b)| (*c, a[k], b[k])).collect::<Vec<_>>());
    let count = |v: Verdict| all.iter().filter(|(_, a, b)| told_apart(a[0], b[0]) == v).count();
    Some(JudgedDifference {
        asr: difference(mean(0)?, Wanted::Less),
        over_refusal: difference(mean(1)?, Wanted::Less),
        accuracy: difference(mean(2)?, Wanted::More),
        cells_better: count(Verdict::Better),
        cells_tie: count(Verdict::Tie),
        cells_worse: count(Verdict::Worse),
    })
}

/// `method` beside every other method that saw the same, on harmful targets.
pub(crate) fn pairs(cells: &[Cell], method: &str) -> Vec<Pair> {
    let own: BTreeMap<_, Cell> =
        cells.iter().filter(|c| c.method == method).map(|c| ((c.of, c.label), *c)).collect();
    let mut rivals: BTreeMap<_, Vec<(Cell, Cell)>> = BTreeMap::new();
    for rival in cells.iter().filter(|c| c.method != method && Slice::Harmful.holds(c.target)) {
        if let Some(cell) = own.get(&(rival.of, rival.label)) {
            rivals.entry((rival.label, names::place(rival.method))).or_default().push((*cell, *rival));
        }
    }
    let mut out = Vec::new();
    for ((label, (_, rival)), pairs) in rivals {
        let amount = |read: fn(&Cell) -> Option<f64>| {
            let all: Vec<_> = pairs.iter().filter_map(|(a, b)| Some((a.of, read(a)? - read(b)?))).collect();
            mean::of_numbers(&all).map(|m| difference(m, Wanted::Less))
        };
        out.push(Pair {
            method: method.to_string(),
            rival: rival.to_string(),
            label,
            cells: pairs.len(),
            known: judged_difference(&pairs, Set::Known),
            shifted: judged_difference(&pairs, Set::Shifted),
            kl_task: amount(|c| c.kl_task()),
            kl_benign: amount(|c| c.kl_benign()),
            seconds: amount(|c| c.seconds()),
        });
    }
    out
}
