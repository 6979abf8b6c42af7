//! The report in GitHub's Markdown: tables and words, no pictures.

use crate::aggregate::{cells, pairs, rows};
use crate::{Grouping, Report, Slice, TABLES, Table, adds, reading, text};
use std::fmt::Write as _;

pub(crate) fn write(report: &Report) -> String {
    let cells = cells(&report.records);
    let meta = &report.meta;
    let title = if meta.title.is_empty() { "Comparison of methods" } else { &meta.title };
    let mut out =
        format!("# {}\n\n{}\n", text::markdown(title), text::markdown(&reading::extent(report, &cells)));
    let section = |out: &mut String, title: &str, lead: &str, table: &Table| {
        if table.is_empty() {
            return;
        }
        let _ = write!(out, "\n## {title}\n\n");
        if !lead.is_empty() {
            let _ = write!(out, "{}\n\n", text::markdown(lead));
        }
        out.push_str(&table.markdown());
        if table.has_gaps() {
            let _ = write!(out, "\n{}\n", reading::GAPS);
        }
    };

    section(&mut out, "Checks", "", &reading::checks(report));
    if cells.is_empty() {
        out.push_str("\nThere are no records.\n");
    }
    for (i, (slice, by)) in TABLES.into_iter().enumerate() {
        let (_, title, lead) = reading::heading(slice, by);
        let rows = rows(&cells, slice, by);
        if adds(by, &rows) {
            section(&mut out, title, lead, &Table::rows(&rows, by, &report.own));
        }
        if i == 0 {
            let pairs = pairs(&cells, &report.own);
            section(
                &mut out,
                "Ties, wins and losses",
                &reading::pairs_lead(&report.own),
                &Table::pairs(&pairs),
            );
        }
    }
    let main = rows(&cells, Slice::Harmful, Grouping::default());
    if let Some(precise) = Table::precise(&main, &report.own) {
        section(&mut out, "Judged by what was asked for", reading::PRECISE, &precise);
    }
    section(&mut out, "Methods", "", &reading::methods(&cells));

    out.push_str("\n## How to read this\n\n");
    for note in reading::notes(&cells, &report.own).iter().chain(&meta.notes) {
        let _ = writeln!(out, "- {}", text::markdown(note));
    }
    let facts = reading::facts(report).into_iter().map(|(name, value)| vec![name, value]).collect();
    section(&mut out, "Settings", "", &Table::text(&["Name", "Value"], facts));
    out
}
