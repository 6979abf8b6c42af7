//! What a comparison of methods showed: records in; a page, tables and aggregates out.
//!
//! A [`Record`] is one target model after one method, judged on one set of prompts. Every string that leaves this crate
//! depends on the records alone, never on their order, and holds their text escaped.
//!
//! Not here: files, printing, models, and what a rate is counted from.

mod record;

pub use record::{
    Check, Kind, Label, LayerScore, LayerScores, Meta, RATE_ROWS_MAX, Rate, Record, ReportError, SCHEMA, Set,
    Shots, Target, TradeOff,
};
