//! What a comparison of methods showed: records in; a page, tables and aggregates out.
//!
//! A [`Record`] is one target model after one method, judged on one set of prompts. [`Report::of`] refuses records that
//! cannot be; [`Report::html`], [`Report::markdown`] and [`Report::json`] depend on the records alone, not on their order,
//! and show outside text escaped. What an interval of a mean means is said in the module `mean`.
//!
//! Not here: files, printing, models, and what a rate is counted from.

mod aggregate;
mod chart;
mod check;
mod markdown;
mod mean;
mod names;
mod page;
mod reading;
mod record;
mod table;
mod text;

pub use aggregate::{Difference, Group, Grouping, Judged, JudgedDifference, Pair, Row, Slice, Verdict};
pub use mean::Mean;
pub use record::{
    Check, Kind, Label, LayerScore, LayerScores, Meta, RATE_ROWS_MAX, Rate, Record, ReportError, SCHEMA, Set,
    Shots, Target, TradeOff,
};
pub use table::Table;

use serde::Serialize;

/// Method that the others stand beside, unless told otherwise.
pub const OWN_METHOD: &str = "gene";

/// Records that were checked, in their order.
#[derive(Debug, Clone)]
pub struct Report {
    meta: Meta,
    records: Vec<Record>,
    layers: Vec<LayerScores>,
    own: String,
}

/// The tables that every form of the report has, in their order.
const TABLES: [(Slice, Grouping); 6] = {
    const ALL: Grouping = Grouping { harm_percent: false, kind: false, family: false, task: false };
    [
        (Slice::Harmful, ALL),
        (Slice::Harmless, ALL),
        (Slice::Harmful, Grouping { harm_percent: true, ..ALL }),
        (Slice::Harmful, Grouping { kind: true, ..ALL }),
        (Slice::Harmful, Grouping { family: true, ..ALL }),
        (Slice::Harmful, Grouping { task: true, ..ALL }),
    ]
};

/// Whether a table tells apart what the table of all targets does not.
fn adds(by: Grouping, rows: &[Row]) -> bool {
    by == Grouping::default() || rows.iter().any(|r| r.group != rows[0].group)
}

/// Aggregates as they are written.
#[derive(Serialize)]
struct Aggregates<'a> {
    schema: u32,
    meta: &'a Meta,
    records: usize,
    own_method: &'a str,
    tables: Vec<Means>,
    pairs: Vec<Pair>,
}

#[derive(Serialize)]
struct Means {
    slice: Slice,
    grouping: Grouping,
    rows: Vec<Row>,
}

impl Report {
    /// Checks the records and puts them in order.
    pub fn of(
        meta: Meta,
        mut records: Vec<Record>,
        mut layers: Vec<LayerScores>,
    ) -> Result<Self, ReportError> {
        check::check(&meta, &records, &layers)?;
        records.sort_by(|a, b| {
            let key = |r: &Record| (r.seed, r.label, r.set);
            (a.family.as_str(), a.target.name.as_str(), names::place(&a.method), key(a)).cmp(&(
                b.family.as_str(),
                b.target.name.as_str(),
                names::place(&b.method),
                key(b),
            ))
        });
        layers.sort_by(|a, b| (&a.family, a.seed, &a.score).cmp(&(&b.family, b.seed, &b.score)));
        Ok(Self { meta, records, layers, own: OWN_METHOD.into() })
    }

    /// Sets which method the others stand beside.
    pub fn with_own_method(mut self, id: &str) -> Self {
        self.own = id.into();
        self
    }

    /// Means of every method and label in every group.
    pub fn rows(&self, slice: Slice, by: Grouping) -> Vec<Row> {
        aggregate::rows(&aggregate::cells(&self.records), slice, by)
    }

    /// The own method beside each other one that saw the same, on targets with harm.
    pub fn pairs(&self) -> Vec<Pair> {
        aggregate::pairs(&aggregate::cells(&self.records), &self.own)
    }

    /// [`Report::rows`] as a table.
    pub fn table(&self, slice: Slice, by: Grouping) -> Table {
        Table::rows(&self.rows(slice, by), by, &self.own)
    }

    /// The aggregates for programs: JSON with `schema` first, numbers as they are (shares, nat per token, seconds).
    pub fn json(&self) -> Result<String, serde_json::Error> {
        let tables = TABLES.iter().map(|&(slice, grouping)| Means {
            slice,
            grouping,
            rows: self.rows(slice, grouping),
        });
        let aggregates = Aggregates {
            schema: SCHEMA,
            meta: &self.meta,
            records: self.records.len(),
            own_method: &self.own,
            tables: tables.collect(),
            pairs: self.pairs(),
        };
        serde_json::to_string_pretty(&aggregates).map(|text| text + "\n")
    }

    /// The tables and notes for people, in GitHub's Markdown.
    pub fn markdown(&self) -> String {
        markdown::write(self)
    }

    /// One page that asks for nothing from anywhere.
    pub fn html(&self) -> String {
        page::write(self)
    }
}
