//! Records that cannot be.

use crate::fake::{meta, rate, record};
use report::{Label, LayerScore, LayerScores, Meta, Rate, Record, Report, ReportError, Set, TradeOff};

#[track_caller]
fn refused(change: impl FnOnce(&mut Record)) -> ReportError {
    let mut r = record(1, "a", "gene", Label::Zero, 3, 0, 97);
    change(&mut r);
    Report::of(meta(), vec![r], vec![]).unwrap_err()
}

#[test]
fn numbers_that_are_none() {
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1e-9, 1e13] {
        assert!(matches!(refused(|r| r.kl_task = Some(bad)), ReportError::Number { field: "kl_task", .. }));
        assert!(matches!(
            refused(|r| r.kl_benign = Some(bad)),
            ReportError::Number { field: "kl_benign", .. }
        ));
        assert!(matches!(refused(|r| r.seconds = Some(bad)), ReportError::Number { field: "seconds", .. }));
        assert!(matches!(refused(|r| r.target.harm_percent = bad), ReportError::Number { .. }));
        assert!(matches!(
            refused(|r| r.coefficients = Some([(3, bad)].into())),
            ReportError::Number { field: "coefficients", .. }
        ));
        for k in 0..3 {
            let mut p = [0.02, 0.5, 0.01];
            p[k] = bad;
            let point = TradeOff { max_kl: p[0], loss: p[1], kl: p[2] };
            assert!(matches!(refused(|r| r.tradeoff = Some(vec![point])), ReportError::Number { .. }));
        }
        let meta = Meta { seconds: Some(bad), ..Meta::default() };
        assert!(Report::of(meta, vec![], vec![]).is_err());
    }
    let layers = vec![LayerScore { layer: 0, value: f64::NAN, selected: false }];
    let scores = LayerScores { family: "fake".into(), seed: 1, score: "price".into(), layers };
    assert!(matches!(Report::of(meta(), vec![], vec![scores]), Err(ReportError::Number { .. })));
}

#[test]
fn rates_that_are_none() {
    let good = rate(3, 100).unwrap();
    for bad in [
        Rate { value: f64::NAN, ..good },
        Rate { low: f64::NAN, ..good },
        Rate { high: f64::NAN, ..good },
        Rate { value: 1.5, high: 1.6, ..good },
        Rate { value: 3.0, low: 1.0, high: 8.0, n: 100 },
        Rate { low: 0.5, ..good },
        Rate { high: 0.0, ..good },
        Rate { n: 0, ..good },
    ] {
        assert!(matches!(refused(|r| r.asr = Some(bad)), ReportError::Rate { field: "asr", .. }), "{bad:?}");
        assert!(matches!(refused(|r| r.helped = Some(bad)), ReportError::Rate { field: "helped", .. }));
    }
}

#[test]
fn attack_success_rate_alone() {
    assert_eq!(
        refused(|r| r.over_refusal = None).to_string(),
        "record of `fake`, seed 1, target `a`, method `gene`, known prompts: an attack success rate without `over_refusal` beside it"
    );
    assert!(matches!(refused(|r| r.accuracy = None), ReportError::Alone { lacks: "accuracy", .. }));
    assert!(matches!(
        refused(|r| (r.asr_precise, r.asr) = (r.asr, None)),
        ReportError::Alone { lacks: "asr", .. }
    ));
    // The other set's accuracy is the same model's.
    let known = record(1, "a", "gene", Label::Zero, 3, 0, 97);
    let shifted = Record { set: Set::Shifted, accuracy: None, ..known.clone() };
    assert!(Report::of(meta(), vec![known, shifted], vec![]).is_ok());
}

#[test]
fn records_that_contradict_each_other() {
    let a = record(1, "a", "gene", Label::Zero, 3, 0, 97);
    let twice = Report::of(meta(), vec![a.clone(), a.clone()], vec![]).unwrap_err();
    assert!(matches!(twice, ReportError::Twice { .. }));
    let mut b = record(1, "a", "fine-tuned", Label::Zero, 99, 0, 97);
    b.target.harm_percent = 5.0;
    assert!(matches!(Report::of(meta(), vec![a, b], vec![]), Err(ReportError::TwoTargets { .. })));
    assert!(matches!(refused(|r| r.schema = 2), ReportError::Schema { found: 2, .. }));
}

#[test]
fn errors_show_outside_text_on_one_line() {
    let text = refused(|r| (r.method, r.schema) = ("x\n\u{202e}y".into(), 9)).to_string();
    assert_eq!(
        text,
        "record of `fake`, seed 1, target `a`, method `x␊⟨U+202E⟩y`, known prompts: schema 9, this version reads 1"
    );
}
