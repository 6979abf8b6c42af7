//! Expressions as files.

use std::fs;

use gene::{Expression, GeneError, check_coefficients};
use serde_json::{Map, json};
use tempfile::tempdir;

use crate::support::*;

fn expression(list: &[(u32, f64)]) -> Expression {
    Expression {
        schema: 1,
        gene: "blake3:aa".into(),
        target: "blake3:bb".into(),
        coefficients: coefficients(list),
        limits: Map::new(),
        shots: Map::new(),
        extra: Map::new(),
    }
}

#[test]
fn written_expression_reads_back_with_unknown_keys() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("expression.json");
    let mut written = expression(&[(0, 1.0), (10, 0.1), (2, 2.25)]);
    written.limits.insert("max_kl".into(), json!(0.02));
    written.shots.insert("safety".into(), json!({"n": 32, "content": "blake3:cc"}));
    written.extra.insert("future".into(), json!([1, {"a": null}]));
    written.write(&path).unwrap();
    assert_eq!(Expression::read(&path).unwrap(), written);
    let text = fs::read_to_string(&path).unwrap();
    let order = ["\"0\": 1.0", "\"2\": 2.25", "\"10\": 0.1"].map(|part| text.find(part).unwrap());
    assert!(order.is_sorted(), "{text}");
    assert_eq!(names_in(dir.path()), ["expression.json"]);
    assert_eq!((written.coefficient(2), written.coefficient(3)), (2.25, 0.0));
}

#[test]
fn write_that_fails_leaves_nothing_half_written() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("taken");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("file"), b"x").unwrap();
    assert!(matches!(expression(&[]).write(&path), Err(GeneError::Io { .. })));
    assert_eq!(names_in(dir.path()), ["taken"]);
}

#[test]
fn negative_coefficient_is_refused_when_read_and_when_written() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("expression.json");
    let negative = |result: Result<(), GeneError>| match result {
        Err(GeneError::NegativeCoefficient { layer, value }) => (layer, value),
        other => panic!("{other:?}"),
    };
    assert_eq!(negative(expression(&[(0, 1.0), (5, -0.5)]).write(&path)), (5, -0.5));
    assert!(!path.exists());
    let text = serde_json::to_string(&expression(&[(5, -0.5)])).unwrap();
    fs::write(&path, text).unwrap();
    assert_eq!(negative(Expression::read(&path).map(|_| ())), (5, -0.5));
    assert_eq!(
        negative(check_coefficients(&coefficients(&[(3, f64::NEG_INFINITY)]))),
        (3, f64::NEG_INFINITY)
    );
    assert_eq!(negative(check_coefficients(&coefficients(&[(3, -1e-300)]))), (3, -1e-300));
}

#[test]
fn coefficients_beyond_f32_are_refused() {
    for value in [f64::NAN, f64::INFINITY, 1e39] {
        let result = check_coefficients(&coefficients(&[(4, value)]));
        assert!(matches!(result, Err(GeneError::CoefficientRange { layer: 4, .. })), "{value}");
    }
    check_coefficients(&coefficients(&[(0, 0.0), (1, -0.0), (2, 3e38)])).unwrap();
}

#[test]
fn hostile_expressions() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("expression.json");
    let file = |coefficients: &str| {
        format!(r#"{{"schema":1,"gene":"g","target":"t","coefficients":{coefficients}}}"#)
    };
    for coefficients in [
        r#"{"0":1,"0":2}"#,
        r#"{"00":1}"#,
        r#"{"+1":1}"#,
        r#"{"-1":1}"#,
        r#"{"4294967296":1}"#,
        r#"{"a":1}"#,
        r#"{"0":1e999}"#,
        r#"{"0":"1"}"#,
        r#"{"0":null}"#,
        "[1]",
        "1",
    ] {
        fs::write(&path, file(coefficients)).unwrap();
        assert!(matches!(Expression::read(&path), Err(GeneError::Json { .. })), "{coefficients}");
    }
    fs::write(&path, file("{}").replace("\"schema\":1", "\"schema\":7")).unwrap();
    assert!(matches!(Expression::read(&path), Err(GeneError::Schema { found: 7, .. })));
    fs::write(&path, file("{}")).unwrap();
    assert!(Expression::read(&path).unwrap().coefficients.is_empty());
    fs::write(&path, " ".repeat((16 << 20) + 1)).unwrap();
    assert!(
        matches!(Expression::read(&path), Err(GeneError::Json { problem, .. }) if problem.contains("limit"))
    );
    assert!(matches!(Expression::read(&dir.path().join("none")), Err(GeneError::Io { .. })));
}

#[test]
fn expression_for_another_gene_or_target() {
    let made = expression(&[(0, 1.0)]);
    made.check_made_for("blake3:aa", "blake3:bb").unwrap();
    assert!(matches!(made.check_made_for("blake3:ab", "blake3:bb"), Err(GeneError::OtherGene { .. })));
    assert!(matches!(made.check_made_for("blake3:aa", "blake3:ba"), Err(GeneError::OtherTarget { .. })));
}
