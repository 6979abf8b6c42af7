//! Tables as values, written as HTML or Markdown.
//!
//! A rate gets into a table in one way: as a [`Row`] or [`Pair`] with all its columns. So no table shows an attack success
//! rate without over-refusal, accuracy and KL; [`Table::text`] takes words only.

use crate::aggregate::{Cell, Difference, Grouping, JudgedDifference, Pair, Row, Verdict};
use crate::mean::Mean;
use crate::names;
use crate::record::{Rate, Set};
use crate::text::{self, MISSING, Unit};
use std::fmt::Write as _;

/// A table with one line of heads.
#[derive(Debug, Clone, PartialEq)]
pub struct Table {
    heads: Vec<Head>,
    lines: Vec<Line>,
    /// Words only: lines may break.
    prose: bool,
    /// So many first columns name the group: in HTML they are a line above it.
    grouped: usize,
}

#[derive(Debug, Clone, PartialEq)]
struct Head {
    name: String,
    unit: String,
    number: bool,
}

#[derive(Debug, Clone, PartialEq)]
struct Line {
    entries: Vec<Entry>,
    /// Belongs to the method that the report is about.
    own: bool,
    /// First line of its group.
    opens: bool,
}

/// Class of an entry that names a method.
const NAME: &str = "name";

#[derive(Debug, Clone, Default, PartialEq)]
struct Entry {
    /// Outside text may be in here: the writers escape.
    main: String,
    /// Numbers only.
    small: String,
    sort: Option<f64>,
    class: &'static str,
}

impl Entry {
    fn text(main: impl Into<String>) -> Self {
        Self { main: main.into(), ..Self::default() }
    }

    fn method(id: &str) -> Self {
        Self { class: NAME, ..Self::text(names::method(id)) }
    }

    fn missing() -> Self {
        Self { main: MISSING.into(), class: "missing", ..Self::default() }
    }

    fn mean(mean: Option<Mean>, unit: Unit, cells: usize) -> Self {
        let Some(m) = mean else { return Self::missing() };
        let mut small = match (m.low, m.high) {
            (Some(low), Some(high)) => format!("[{}, {}]", unit.show(low), unit.show(high)),
            _ => String::new(),
        };
        if m.cells < cells {
            let gap = if small.is_empty() { "" } else { " " };
            let _ = write!(small, "{gap}in {}", m.cells);
        }
        Self { main: unit.show(m.value), small, sort: Some(m.value), class: "" }
    }

    fn difference(difference: Option<Difference>, unit: Unit, cells: usize) -> Self {
        let Some(d) = difference else { return Self::missing() };
        let (class, mark) = match d.verdict {
            Verdict::Better => ("better", "✓"),
            Verdict::Tie => ("tie", "="),
            Verdict::Worse => ("worse", "✗"),
        };
        let mut entry = Self::mean(Some(d.mean), unit, cells);
        entry.main = format!("{} {mark}", entry.main);
        entry.class = class;
        entry
    }

    fn rate(rate: Option<Rate>) -> Self {
        let Some(r) = rate else { return Self::missing() };
        let unit = Unit::Percent;
        Self {
            main: unit.show(r.value),
            small: format!("[{}, {}]", unit.show(r.low), unit.show(r.high)),
            sort: Some(r.value),
            class: "",
        }
    }

    fn amount(value: Option<f64>, unit: Unit) -> Self {
        match value {
            Some(v) => Self { main: unit.show(v), sort: Some(v), ..Self::default() },
            None => Self::missing(),
        }
    }
}

fn words(names: &[&str]) -> Vec<Head> {
    names.iter().map(|n| Head { name: (*n).into(), unit: String::new(), number: false }).collect()
}

fn numbers(names: &[(&str, &str)]) -> Vec<Head> {
    names.iter().map(|(n, u)| Head { name: (*n).into(), unit: (*u).into(), number: true }).collect()
}

/// Heads and entries that tell groups apart.
fn group_heads(by: Grouping) -> Vec<Head> {
    let mut out = Vec::new();
    for (on, name) in
        [(by.family, "Family"), (by.task, "Task"), (by.kind, "Target"), (by.harm_percent, "Harm")]
    {
        if on {
            out.extend(words(&[name]));
        }
    }
    out
}

fn group_entries(row: &Row) -> Vec<Entry> {
    let g = &row.group;
    let mut out = Vec::new();
    out.extend(g.family.as_deref().map(Entry::text));
    out.extend(g.task.as_deref().map(Entry::text));
    out.extend(g.kind.map(|k| Entry::text(names::kind(k))));
    out.extend(g.harm_percent.map(|h| Entry { sort: Some(h), ..Entry::text(format!("{h} %")) }));
    out
}

impl Table {
    /// Methods side by side: everything that one needs in order to compare them.
    pub(crate) fn rows(rows: &[Row], by: Grouping, own: &str) -> Self {
        let mut heads = group_heads(by);
        let grouped = heads.len();
        heads.extend(words(&["Method", "Shots"]));
        heads.extend(numbers(&[
            ("ASR", "%"),
            ("ASR, shifted", "%"),
            ("Over-refusal", "%"),
            ("Over-refusal, shifted", "%"),
            ("Accuracy", "%"),
            ("Accuracy change", "points"),
            ("KL, task", "nat/token"),
            ("KL, benign", "nat/token"),
            ("Time", "s"),
            ("Cells", ""),
        ]));
        let line = |(i, row): (usize, &Row)| {
            let mut entries = group_entries(row);
            entries.push(Entry::method(&row.method));
            entries.push(Entry::text(names::label(row.label)));
            let (k, s) = (row.known.as_ref(), row.shifted.as_ref());
            for (mean, unit) in [
                (k.map(|j| j.asr), Unit::Percent),
                (s.map(|j| j.asr), Unit::Percent),
                (k.map(|j| j.over_refusal), Unit::Percent),
                (s.map(|j| j.over_refusal), Unit::Percent),
                (row.accuracy, Unit::Percent),
                (row.accuracy_change, Unit::Points),
                (row.kl_task, Unit::Kl),
                (row.kl_benign, Unit::Kl),
                (row.seconds, Unit::Seconds),
            ] {
                entries.push(Entry::mean(mean, unit, row.cells));
            }
            let lacking = row.cells < row.cells_of_group;
            entries.push(Entry {
                main: row.cells.to_string(),
                small: if lacking { format!("of {} †", row.cells_of_group) } else { String::new() },
                sort: Some(row.cells as f64),
                class: "",
            });
            Line { entries, own: row.method == own, opens: i > 0 && rows[i - 1].group != row.group }
        };
        Self { heads, lines: rows.iter().enumerate().map(line).collect(), prose: false, grouped }
    }

    /// The same rows under the judge that knows what was asked for; `None` where it did not judge.
    pub(crate) fn precise(rows: &[Row], own: &str) -> Option<Self> {
        let judged =
            |row: &Row| [&row.known, &row.shifted].into_iter().flatten().any(|j| j.asr_precise.is_some());
        if !rows.iter().any(judged) {
            return None;
        }
        let mut heads = words(&["Method", "Shots"]);
        heads.extend(numbers(&[
            ("ASR, precise", "%"),
            ("ASR, precise, shifted", "%"),
            ("Helped", "%"),
            ("Helped, shifted", "%"),
            ("Over-refusal", "%"),
            ("Over-refusal, shifted", "%"),
            ("Accuracy", "%"),
            ("KL, task", "nat/token"),
        ]));
        let line = |row: &Row| {
            let (k, s) = (row.known.as_ref(), row.shifted.as_ref());
            let mut entries = vec![Entry::method(&row.method), Entry::text(names::label(row.label))];
            for mean in [
                k.and_then(|j| j.asr_precise),
                s.and_then(|j| j.asr_precise),
                k.and_then(|j| j.helped),
                s.and_then(|j| j.helped),
                k.map(|j| j.over_refusal),
                s.map(|j| j.over_refusal),
                row.accuracy,
            ] {
                entries.push(Entry::mean(mean, Unit::Percent, row.cells));
            }
            entries.push(Entry::mean(row.kl_task, Unit::Kl, row.cells));
            Line { entries, own: row.method == own, opens: false }
        };
        Some(Self {
            heads,
            lines: rows.iter().filter(|r| judged(r)).map(line).collect(),
            prose: false,
            grouped: 0,
        })
    }

    /// One method less each other that saw the same.
    pub(crate) fn pairs(pairs: &[Pair]) -> Self {
        let mut heads = words(&["Compared with", "Shots"]);
        heads.extend(numbers(&[
            ("ASR", "points"),
            ("ASR, shifted", "points"),
            ("Over-refusal", "points"),
            ("Over-refusal, shifted", "points"),
            ("Accuracy", "points"),
            ("KL, task", "nat/token"),
            ("KL, benign", "nat/token"),
            ("Time", "s"),
            ("Won, tied, lost", "targets, by ASR"),
        ]));
        let line = |(i, p): (usize, &Pair)| {
            let both = |read: fn(&JudgedDifference) -> Difference| {
                [p.known.as_ref().map(read), p.shifted.as_ref().map(read)]
            };
            let [asr, asr_shifted] = both(|d| d.asr);
            let [refusal, refusal_shifted] = both(|d| d.over_refusal);
            let accuracy = p.known.as_ref().or(p.shifted.as_ref()).map(|d| d.accuracy);
            let mut entries = vec![Entry::text(names::method(&p.rival)), Entry::text(names::label(p.label))];
            for (difference, unit) in [
                (asr, Unit::Points),
                (asr_shifted, Unit::Points),
                (refusal, Unit::Points),
                (refusal_shifted, Unit::Points),
                (accuracy, Unit::Points),
                (p.kl_task, Unit::KlChange),
                (p.kl_benign, Unit::KlChange),
                (p.seconds, Unit::SecondsChange),
            ] {
                entries.push(Entry::difference(difference, unit, p.cells));
            }
            entries.push(match p.known.as_ref().or(p.shifted.as_ref()) {
                Some(d) => Entry {
                    main: format!("{} · {} · {}", d.cells_better, d.cells_tie, d.cells_worse),
                    sort: Some(d.cells_better as f64 - d.cells_worse as f64),
                    ..Entry::default()
                },
                None => Entry::missing(),
            });
            Line { entries, own: false, opens: i > 0 && pairs[i - 1].label != p.label }
        };
        Self { heads, lines: pairs.iter().enumerate().map(line).collect(), prose: false, grouped: 0 }
    }

    /// Every cell and set as it was measured.
    pub(crate) fn cells(cells: &[Cell], own: &str) -> Self {
        let mut heads =
            words(&["Family", "Seed", "Target", "Task", "Kind", "Harm", "Method", "Shots", "Prompts"]);
        heads.extend(numbers(&[
            ("ASR", "%"),
            ("Over-refusal", "%"),
            ("Accuracy", "%"),
            ("ASR, precise", "%"),
            ("Helped", "%"),
            ("KL, task", "nat/token"),
            ("KL, benign", "nat/token"),
            ("Time", "s"),
        ]));
        let mut lines = Vec::new();
        for c in cells {
            for (set, r) in [(Set::Known, c.known), (Set::Shifted, c.shifted)] {
                let Some(r) = r else { continue };
                let shots = match (r.shots.safety, r.shots.task, r.shots.benign) {
                    (0, 0, 0) => names::label(r.label).to_string(),
                    (safety, task, benign) => format!("{safety} + {task} + {benign}"),
                };
                let harm = r.target.harm_percent;
                lines.push(Line {
                    entries: vec![
                        Entry::text(c.of.family),
                        Entry { sort: Some(c.of.seed as f64), ..Entry::text(c.of.seed.to_string()) },
                        Entry::text(c.of.target),
                        Entry::text(&r.target.task),
                        Entry::text(names::kind(r.target.kind)),
                        Entry { sort: Some(harm), ..Entry::text(format!("{harm} %")) },
                        Entry::method(c.method),
                        Entry::text(shots),
                        Entry::text(if set == Set::Known { "known" } else { "shifted" }),
                        Entry::rate(r.asr),
                        Entry::rate(r.over_refusal),
                        Entry::rate(c.accuracy()),
                        Entry::rate(r.asr_precise),
                        Entry::rate(r.helped),
                        Entry::amount(c.kl_task(), Unit::Kl),
                        Entry::amount(c.kl_benign(), Unit::Kl),
                        Entry::amount(c.seconds(), Unit::Seconds),
                    ],
                    own: c.method == own,
                    opens: false,
                });
            }
        }
        Self { heads, lines, prose: false, grouped: 0 }
    }

    /// Words only.
    pub(crate) fn text(names: &[&str], lines: Vec<Vec<String>>) -> Self {
        let line = |l: Vec<String>| Line {
            entries: l
                .into_iter()
                .map(|t| if t.is_empty() { Entry::missing() } else { Entry::text(t) })
                .collect(),
            own: false,
            opens: false,
        };
        Self { heads: words(names), lines: lines.into_iter().map(line).collect(), prose: true, grouped: 0 }
    }

    /// Whether there is nothing to show.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Some row is not over all cells of its group: its mean may not be set beside the others.
    pub(crate) fn has_gaps(&self) -> bool {
        self.lines.iter().any(|l| l.entries.last().is_some_and(|e| e.small.ends_with('†')))
    }

    /// The table in GitHub's Markdown, with a line break at the end.
    pub fn markdown(&self) -> String {
        let mut out = String::from("|");
        for h in &self.heads {
            let unit = if h.unit.is_empty() { String::new() } else { format!(", {}", h.unit) };
            let _ = write!(out, " {}{unit} |", text::markdown(&h.name));
        }
        out.push_str("\n|");
        for h in &self.heads {
            out.push_str(if h.number { " ---: |" } else { " --- |" });
        }
        out.push('\n');
        for line in &self.lines {
            out.push('|');
            for e in &line.entries {
                let main = text::markdown(&e.main);
                let main = if line.own && e.class == NAME { format!("**{main}**") } else { main };
                // Numbers of ours: an interval's brackets need no escape, and read better without.
                let gap = if e.small.is_empty() { "" } else { " " };
                let _ = write!(out, " {main}{gap}{} |", e.small);
            }
            out.push('\n');
        }
        out
    }

    /// The table as HTML in a box that scrolls by itself.
    pub fn html(&self) -> String {
        let mut out = format!(
            "<div class=\"wide\"><table{}><thead><tr>",
            if self.prose { " class=\"prose\"" } else { "" }
        );
        let heads = &self.heads[self.grouped..];
        for h in heads {
            let class = if h.number { " class=\"n\"" } else { "" };
            let _ = write!(out, "<th scope=\"col\"{class}>{}", text::html(&h.name));
            if !h.unit.is_empty() {
                let _ = write!(out, "<small>{}</small>", text::html(&h.unit));
            }
            out.push_str("</th>");
        }
        out.push_str("</tr></thead><tbody>\n");
        for (i, line) in self.lines.iter().enumerate() {
            let (group, entries) = line.entries.split_at(self.grouped);
            if !group.is_empty() && (i == 0 || line.opens) {
                if i > 0 {
                    out.push_str("</tbody><tbody>\n");
                }
                let names: Vec<String> = group
                    .iter()
                    .zip(&self.heads)
                    .map(|(e, h)| format!("{}: {}", text::html(&h.name), text::html(&e.main)))
                    .collect();
                let _ = writeln!(
                    out,
                    "<tr class=\"group\"><th scope=\"rowgroup\" colspan=\"{}\">{}</th></tr>",
                    heads.len(),
                    names.join(" · ")
                );
            }
            let class = match (line.own, line.opens) {
                (true, true) => " class=\"own opens\"",
                (true, false) => " class=\"own\"",
                (false, true) => " class=\"opens\"",
                (false, false) => "",
            };
            let _ = write!(out, "<tr{class}>");
            for (k, (e, h)) in entries.iter().zip(heads).enumerate() {
                entry(&mut out, e, h, k == 0);
            }
            out.push_str("</tr>\n");
        }
        out.push_str("</tbody></table></div>\n");
        out
    }
}

/// A cell of an HTML table; the first of a line names it.
fn entry(out: &mut String, e: &Entry, head: &Head, first: bool) {
    let (tag, scope) = if first { ("th", " scope=\"row\"") } else { ("td", "") };
    let class = match (head.number, e.class) {
        (true, "") => " class=\"n\"".to_string(),
        (true, c) => format!(" class=\"n {c}\""),
        (false, "") => String::new(),
        (false, c) => format!(" class=\"{c}\""),
    };
    let sort = e.sort.map_or(String::new(), |s| format!(" data-v=\"{s}\""));
    let _ = write!(out, "<{tag}{scope}{class}{sort}>{}", text::html(&e.main));
    if !e.small.is_empty() {
        let _ = write!(out, "<small>{}</small>", text::html(&e.small));
    }
    let _ = write!(out, "</{tag}>");
}
