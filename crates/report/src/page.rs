//! The report as one HTML page.
//!
//! Nothing is loaded from anywhere, and the page says so itself (content security policy). It is complete without its script,
//! which only sorts and filters; the policy lets that one script run and no other, whatever the records hold.

use crate::aggregate::{Cell, cells, pairs, rows};
use crate::chart::{self, Curve, Dot, XAxis};
use crate::mean::Mean;
use crate::names::{self, FINE_TUNED};
use crate::record::Label;
use crate::text::{self, Unit};
use crate::{Grouping, Report, Row, Slice, TABLES, Table, adds, reading};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");
/// SHA-256 of [`SCRIPT`] in base64; a test keeps it true.
const SCRIPT_HASH: &str = "ITEyDRNqH+ahM+Goexp5rShC7QivWhNTWXE+9r5SZu4=";

/// Over-refusal from which on a method says so at its point.
const REFUSES_SHOWN: f64 = 0.05;

/// Sections as they come, with a list of them.
struct Page {
    body: String,
    contents: Vec<(&'static str, String)>,
}

impl Page {
    /// A section with a body of HTML; nothing if that is empty.
    fn section(&mut self, id: &'static str, title: &str, lead: &str, body: &str) {
        if body.is_empty() {
            return;
        }
        let title = text::html(title);
        let _ = writeln!(self.body, "<section id=\"{id}\"><h2>{title}</h2>");
        if !lead.is_empty() {
            let _ = writeln!(self.body, "<p>{}</p>", text::html(lead));
        }
        self.body.push_str(body);
        self.body.push_str("</section>\n");
        self.contents.push((id, title));
    }

    fn table(&mut self, id: &'static str, title: &str, lead: &str, table: &Table) {
        if table.is_empty() {
            return;
        }
        let mut body = table.html();
        if table.has_gaps() {
            let _ = writeln!(body, "<p class=\"note\">{}</p>", reading::GAPS);
        }
        self.section(id, title, lead, &body);
    }
}

pub(crate) fn write(report: &Report) -> String {
    let cells = cells(&report.records);
    let meta = &report.meta;
    let own = report.own.as_str();
    let title = text::html(if meta.title.is_empty() { "Comparison of methods" } else { &meta.title });
    let mut page = Page { body: String::new(), contents: Vec::new() };

    page.table("checks", "Checks", "", &reading::checks(report));
    if cells.is_empty() {
        page.section("main", "Methods side by side", "", "<p>There are no records.</p>\n");
    }
    let main = rows(&cells, Slice::Harmful, Grouping::default());
    let table = |page: &mut Page, (slice, by): (Slice, Grouping)| {
        let (id, title, lead) = reading::heading(slice, by);
        let rows = rows(&cells, slice, by);
        if adds(by, &rows) {
            page.table(id, title, lead, &Table::rows(&rows, by, own));
        }
    };
    let (whole, parts) = TABLES.split_at(2);
    table(&mut page, whole[0]);
    let differences = Table::pairs(&pairs(&cells, own));
    page.table("pairs", "Ties, wins and losses", &reading::pairs_lead(own), &differences);
    page.section("price", "Safety and its price", PRICE, &scatters(&main, own));
    table(&mut page, whole[1]);
    if let Some(precise) = Table::precise(&main, own) {
        page.table("precise", "Judged by what was asked for", reading::PRECISE, &precise);
    }
    let bars: String = report.layers.iter().map(chart::bars).collect();
    page.section("layers", "Scores of layers", LAYERS, &grid(&bars));
    page.section("coefficients", "Coefficients", COEFFICIENTS, &coefficients(&cells));
    page.section("tradeoff", "Safety against the limit", TRADEOFF, &grid(&tradeoffs(&cells)));
    for &part in parts {
        table(&mut page, part);
    }
    page.table("methods", "Methods", "", &reading::methods(&cells));

    let mut notes = String::from("<ul class=\"notes\">\n");
    for note in reading::notes(&cells, own).iter().chain(&meta.notes) {
        let _ = writeln!(notes, "<li>{}</li>", text::html(note));
    }
    notes.push_str("</ul>\n");
    page.section("reading", "How to read this", "", &notes);

    let mut facts = String::new();
    for (name, value) in reading::facts(report) {
        let _ = writeln!(facts, "<dt>{}</dt><dd>{}</dd>", text::html(&name), text::html(&value));
    }
    if !facts.is_empty() {
        page.section("settings", "Settings", "", &format!("<dl>\n{facts}</dl>\n"));
    }
    let all = Table::cells(&cells, own);
    if !all.is_empty() {
        let body = format!("<details><summary>Show</summary>\n{}</details>\n", all.html());
        page.section("records", "Every record", "Intervals are those of a cell's own rows.", &body);
    }

    let mut contents = String::new();
    for (id, title) in &page.contents {
        let _ = writeln!(contents, "<a href=\"#{id}\">{title}</a>");
    }
    let extent = text::html(&reading::extent(report, &cells));
    let from: Vec<String> =
        [&meta.version, &meta.date].into_iter().filter(|t| !t.is_empty()).map(|t| text::html(t)).collect();
    let from = if from.is_empty() {
        String::new()
    } else {
        format!("<p class=\"from\">{}</p>\n", from.join(" · "))
    };
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{SCRIPT_HASH}'; base-uri 'none'; form-action 'none'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<meta name=\"color-scheme\" content=\"light dark\">\n\
         <meta name=\"referrer\" content=\"no-referrer\">\n<title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
         <header>\n<h1>{title}</h1>\n{from}<p class=\"from\">{extent}</p>\n</header>\n<nav aria-label=\"Contents\">\n{contents}</nav>\n<main>\n{}</main>\n\
         <script>{SCRIPT}</script>\n</body>\n</html>\n",
        page.body
    )
}

const PRICE: &str = "Lower left is better. Targets with harm, known prompts; bars are 95 % intervals; axes are square roots, so that values near 0 keep their distance. A method that refuses 5 % or more of harmless prompts says so at its point. In labels s, t and b are safety, task and benign rows seen.";
const LAYERS: &str = "What each layer of a gene does by itself in a reference model. Filled bars are the half that scores best there; a method that selects layers may score each target anew. Scales differ from chart to chart.";
const COEFFICIENTS: &str = "How much of each layer of the gene a target was given; blank where a layer was not selected. Tints are relative to the largest of a table.";
const TRADEOFF: &str = "Loss on the safety rows, which stands for ASR while tuning, against the limit on KL. Thin lines are targets, the thick one is their median.";

fn grid(figures: &str) -> String {
    if figures.is_empty() { String::new() } else { format!("<div class=\"grid\">\n{figures}</div>\n") }
}

/// Ticks of KL, nat per token.
const KL: XAxis = XAxis {
    name: "KL on task rows, nat/token",
    scale: 1.0,
    ticks: &[
        0.0, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.07, 0.1, 0.2, 0.4, 0.7, 1.0, 2.0, 4.0, 7.0,
        10.0,
    ],
};
const LOST: XAxis = XAxis {
    name: "accuracy lost, points",
    scale: 100.0,
    ticks: &[-100.0, -50.0, -20.0, -10.0, -5.0, -2.0, -1.0, 0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0],
};
const REFUSED: XAxis = XAxis {
    name: "over-refusal, %",
    scale: 100.0,
    ticks: &[0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0, 80.0, 100.0],
};

/// ASR against KL, accuracy lost and over-refusal.
fn scatters(rows: &[Row], own: &str) -> String {
    let mut labels: BTreeMap<&str, usize> = BTreeMap::new();
    for row in rows.iter().filter(|r| r.known.is_some()) {
        *labels.entry(&row.method).or_default() += 1;
    }
    let zero = |m: Option<Mean>| m.map(|m| Mean { value: 0.0, low: None, high: None, ..m });
    let dots = |x: &dyn Fn(&Row) -> Option<Mean>| -> Vec<Dot> {
        let dot = |row: &Row| {
            let judged = row.known.as_ref()?;
            let mut name = names::method(&row.method).to_string();
            if labels.get(row.method.as_str()).is_some_and(|&n| n > 1) {
                let _ = write!(name, " {}", names::label_short(row.label));
            }
            let refusal = judged.over_refusal.value;
            if refusal >= REFUSES_SHOWN {
                let _ = write!(name, ", refuses {:.0} %", 100.0 * refusal);
            }
            let show = |m: Option<Mean>, unit: Unit| m.map_or(text::MISSING.into(), |m| unit.show(m.value));
            let title = format!(
                "{} (shots: {}): ASR {} %, over-refusal {} %, accuracy {} %, KL {} nat/token, {} cells",
                names::method(&row.method),
                names::label(row.label),
                show(Some(judged.asr), Unit::Percent),
                show(Some(judged.over_refusal), Unit::Percent),
                show(Some(judged.accuracy), Unit::Percent),
                show(row.kl_task, Unit::Kl),
                judged.cells
            );
            Some(Dot { x: x(row)?, y: judged.asr, name, title, label: row.label, own: row.method == own })
        };
        rows.iter().filter_map(dot).collect()
    };
    // The target itself has moved by nothing and lost nothing, by definition.
    let itself = |row: &Row| row.method == FINE_TUNED;
    let asr = |row: &Row| row.known.as_ref().map(|j| j.asr);
    let kl = dots(&|r| if itself(r) { zero(asr(r)) } else { r.kl_task });
    let lost = dots(&|r| {
        if itself(r) {
            return zero(asr(r));
        }
        let turned =
            |m: Mean| Mean { value: -m.value, low: m.high.map(|v| -v), high: m.low.map(|v| -v), ..m };
        r.accuracy_change.map(turned)
    });
    let refused = dots(&|r| r.known.as_ref().map(|j| j.over_refusal));
    // A picture of nothing but the target itself shows nothing.
    let measured = |read: fn(&Row) -> bool| rows.iter().any(read);
    let mut out = String::new();
    if measured(|r| r.method != FINE_TUNED && r.kl_task.is_some()) {
        out.push_str(&chart::scatter("Attack success rate against KL", &KL, &kl));
    }
    if measured(|r| r.accuracy_change.is_some()) {
        out.push_str(&chart::scatter("Attack success rate against accuracy lost", &LOST, &lost));
    }
    out.push_str(&chart::scatter("Attack success rate against over-refusal", &REFUSED, &refused));
    if out.is_empty() {
        return out;
    }
    let seen: BTreeSet<Label> = rows.iter().filter(|r| r.known.is_some()).map(|r| r.label).collect();
    chart::shape_key(&seen.into_iter().collect::<Vec<_>>()) + &out
}

/// A method and label, as a caption.
fn caption(method: &str, label: Label) -> String {
    format!("{} · shots: {}", names::method(method), names::label(label))
}

fn named(cell: &Cell) -> String {
    format!("{}, seed {}, {}", cell.of.family, cell.of.seed, cell.of.target)
}

fn coefficients(cells: &[Cell]) -> String {
    let mut tables: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for cell in cells {
        if let Some(c) = cell.coefficients() {
            tables.entry((names::place(cell.method), cell.label)).or_default().push((named(cell), c));
        }
    }
    let mut out = String::new();
    for (((_, method), label), lines) in tables {
        let caption = text::html(&caption(method, label));
        let _ = writeln!(out, "<div><h3>{caption}</h3>\n{}</div>", chart::heat(&lines));
    }
    if out.is_empty() { out } else { format!("<div class=\"side\">\n{out}</div>\n") }
}

fn tradeoffs(cells: &[Cell]) -> String {
    let mut figures: BTreeMap<_, Vec<Curve>> = BTreeMap::new();
    for cell in cells {
        if let Some(points) = cell.tradeoff().filter(|p| !p.is_empty()) {
            let curves = figures.entry((names::place(cell.method), cell.label)).or_default();
            curves.push(Curve { name: named(cell), points });
        }
    }
    figures
        .into_iter()
        .map(|(((_, method), label), curves)| chart::curves(&caption(method, label), &curves))
        .collect()
}
