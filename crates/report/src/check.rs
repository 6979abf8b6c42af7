//! Records are refused as a whole when one of them cannot be: a mean over a wrong number is a wrong number.

use crate::aggregate::cells;
use crate::record::{LayerScores, Meta, RATE_ROWS_MAX, Rate, Record, ReportError, SCHEMA, Set};
use crate::text::quoted;
use std::collections::BTreeMap;

/// Intervals come from arithmetic: the value may lie outside by rounding.
const ROUNDING: f64 = 1e-9;

fn place(r: &Record) -> String {
    let set = match r.set {
        Set::Known => "known",
        Set::Shifted => "shifted",
    };
    let (family, target, method) = (quoted(&r.family), quoted(&r.target.name), quoted(&r.method));
    format!("record of {family}, seed {}, target {target}, method {method}, {set} prompts", r.seed)
}

/// Largest and smallest size of a number: nothing measured is outside, and no picture's arithmetic overflows inside.
const MOST: f64 = 1e12;
const LEAST: f64 = 1e-12;
const NOT_NEGATIVE: &str = "between 0 and 1e12";

fn number(
    place: &str,
    field: &'static str,
    value: f64,
    low: f64,
    need: &'static str,
) -> Result<(), ReportError> {
    // Written so that a NaN fails.
    if (low..=MOST).contains(&value) {
        return Ok(());
    }
    Err(ReportError::Number { place: place.to_string(), field, value, need })
}

fn rate(place: &str, field: &'static str, rate: Option<Rate>) -> Result<(), ReportError> {
    let Some(Rate { value, low, high, n }) = rate else { return Ok(()) };
    // Written so that a NaN fails.
    let ordered = (0.0..=1.0).contains(&value)
        && (0.0..=1.0).contains(&low)
        && (0.0..=1.0).contains(&high)
        && low <= value + ROUNDING
        && high >= value - ROUNDING;
    if ordered && (1..=RATE_ROWS_MAX).contains(&n) {
        return Ok(());
    }
    Err(ReportError::Rate { place: place.to_string(), field, value, low, high, n })
}

fn one(r: &Record) -> Result<(), ReportError> {
    let place = place(r);
    if r.schema != SCHEMA {
        return Err(ReportError::Schema { place, found: r.schema });
    }
    for (field, value) in [
        ("asr", r.asr),
        ("asr_precise", r.asr_precise),
        ("over_refusal", r.over_refusal),
        ("helped", r.helped),
        ("accuracy", r.accuracy),
    ] {
        rate(&place, field, value)?;
    }
    number(&place, "harm_percent", r.target.harm_percent, 0.0, NOT_NEGATIVE)?;
    for (field, value) in [("kl_task", r.kl_task), ("kl_benign", r.kl_benign), ("seconds", r.seconds)] {
        number(&place, field, value.unwrap_or(0.0), 0.0, NOT_NEGATIVE)?;
    }
    for &c in r.coefficients.iter().flat_map(BTreeMap::values) {
        number(&place, "coefficients", c, 0.0, NOT_NEGATIVE)?;
    }
    for point in r.tradeoff.iter().flatten() {
        number(&place, "tradeoff.max_kl", point.max_kl, LEAST, "between 1e-12 and 1e12")?;
        number(&place, "tradeoff.loss", point.loss, 0.0, NOT_NEGATIVE)?;
        number(&place, "tradeoff.kl", point.kl, 0.0, NOT_NEGATIVE)?;
    }
    if (r.asr.is_some() || r.asr_precise.is_some()) && r.over_refusal.is_none() {
        return Err(ReportError::Alone { place, lacks: "over_refusal" });
    }
    if r.asr_precise.is_some() && r.asr.is_none() {
        return Err(ReportError::Alone { place, lacks: "asr" });
    }
    Ok(())
}

/// Refuses what cannot be.
pub(crate) fn check(meta: &Meta, records: &[Record], layers: &[LayerScores]) -> Result<(), ReportError> {
    number("meta", "seconds", meta.seconds.unwrap_or(0.0), 0.0, NOT_NEGATIVE)?;
    for scores in layers {
        let place = format!("scores of {}, seed {}", quoted(&scores.family), scores.seed);
        for layer in &scores.layers {
            number(&place, "value", layer.value, -MOST, "between -1e12 and 1e12")?;
        }
    }
    let mut seen = BTreeMap::new();
    let mut targets = BTreeMap::new();
    for r in records {
        one(r)?;
        if seen.insert((&r.family, r.seed, &r.target.name, &r.method, r.label, r.set), ()).is_some() {
            return Err(ReportError::Twice { place: place(r) });
        }
        if *targets.entry((&r.family, r.seed, &r.target.name)).or_insert(&r.target) != &r.target {
            return Err(ReportError::TwoTargets { place: place(r) });
        }
    }
    for cell in cells(records) {
        let judged = [cell.known, cell.shifted].into_iter().flatten().find(|r| r.asr.is_some());
        if let (Some(r), None) = (judged, cell.accuracy()) {
            return Err(ReportError::Alone { place: place(r), lacks: "accuracy" });
        }
    }
    Ok(())
}
