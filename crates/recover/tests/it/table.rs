//! The table of methods: complete, and what help and documents are made of.

use std::collections::BTreeSet;

use recover::{METHODS, Need, RecoverError, Settings, by_name};

#[test]
fn names_are_unique_and_found() {
    let names: BTreeSet<&str> = METHODS.iter().map(|method| method.name).collect();
    assert_eq!(names.len(), METHODS.len());
    for name in names {
        assert_eq!(by_name(name).unwrap().name, name);
    }
    let error = by_name("safegene").unwrap_err();
    assert!(matches!(error, RecoverError::UnknownMethod { .. }));
    let hint = error.hint().unwrap();
    assert!(METHODS.iter().all(|method| hint.contains(method.name)), "{hint}");
}

#[test]
fn every_entry_says_all_that_help_needs() {
    for method in METHODS {
        for text in [method.title, method.formula, method.deviations] {
            assert!(!text.is_empty(), "{}", method.name);
        }
        for option in method.options {
            assert!(!option.default.is_empty() && !option.help.is_empty(), "{} {}", method.name, option.name);
        }
        if let Some(paper) = method.paper {
            let (year, number) = paper.split_once('.').unwrap();
            assert!(year.len() == 4 && number.len() == 5, "{paper} is no arXiv id");
        }
    }
}

#[test]
fn defaults_build_and_are_written_out() {
    for info in METHODS {
        let method = (info.build)(&Settings::default()).unwrap();
        assert_eq!(method.info().name, info.name);
        let options = method.options();
        for option in info.options.iter().filter(|option| options.contains_key(option.name)) {
            let shown = match &options[option.name] {
                serde_json::Value::String(text) => text.clone(),
                // 1.0 is written 1.
                value => value.as_f64().unwrap().to_string(),
            };
            assert_eq!(shown, option.default, "{} {}", info.name, option.name);
        }
    }
}

#[test]
fn needs_of_the_methods() {
    let needs = |name: &str| by_name(name).unwrap().needs;
    assert_eq!(needs("resta"), [Need::Aligned, Need::Degraded]);
    assert_eq!(needs("wise-ft"), [Need::Aligned]);
    assert_eq!(needs("low-rank-restore"), [Need::Aligned]);
    assert_eq!(needs("lox"), [Need::Base]);
    assert_eq!(needs("safelora"), [Need::Aligned, Need::Base]);
    assert_eq!(needs("safemerge"), [Need::Aligned, Need::Base, Need::SafetyAdapter]);
    assert_eq!(needs("safe-delta"), [Need::Aligned, Need::SafetyShots]);
    assert_eq!(needs("few-shot-lora"), [Need::SafetyShots, Need::TaskShots]);
    assert_eq!(needs("salora"), [Need::SafetyShots, Need::TaskShots]);
    assert_eq!(by_name("few-shot-lora").unwrap().optional, [Need::BenignShots]);
}
