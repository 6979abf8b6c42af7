//! Gram matrices of module inputs.

use crate::decoder::{answered, flat, model, other};
use candle_core::Tensor;
use recover::{Gram, Positions, RunError, grams};
use transformer::{Attachments, Batch, ModuleKind, Row, Taps};

#[test]
fn sums_of_two_rows_by_hand() {
    let mut g = Gram::new(2);
    g.add_row(&[1.0, 2.0, 3.0, 0.0]);
    g.add_row(&[-1.0, 1.0]);
    // (1, 2), (3, 0), (−1, 1): 1 + 9 + 1, 2 + 0 − 1, 4 + 0 + 1.
    assert_eq!(g.sums(), [11.0, 1.0, 1.0, 5.0]);
    assert_eq!((g.rows(), g.tokens(), g.width()), (2, 3, 2));
    // D = [[1, 1], [0, 2]]: (3, 4), (3, 0), (0, 2): 9 + 16 + 9 + 0 + 0 + 4.
    assert_eq!(g.moved(&[1.0, 1.0, 0.0, 2.0]), 38.0);
}

#[test]
fn padding_is_left_out_and_positions_are_those_asked() {
    let model = model();
    let none = Attachments::none();
    let mut rows = answered(&model, &none, 4, 10);
    rows[3].prompt.truncate(2);
    rows[7].answer.truncate(1);
    for positions in [Positions::All, Positions::Answer] {
        let found = grams(&model, &none, "safety", &rows, 0, positions, &|_, _| true).unwrap();
        assert_eq!(found.modules().count(), 14);
        for (layer, kind) in found.modules() {
            let gram = found.get(layer, kind).unwrap();
            let mut want = Gram::new(gram.width());
            // One row at a time, nothing padded, the input of just this module.
            for Row { prompt, answer } in &rows {
                let first = if positions == Positions::All { 0 } else { prompt.len() };
                let full = [prompt.as_slice(), answer].concat();
                let mut x = Vec::new();
                let mut tap = |l: usize, k: ModuleKind, t: &Tensor| {
                    if (l, k) == (layer, kind) {
                        x = flat(t);
                    }
                    Ok(())
                };
                let mut taps = Taps { modules: Some(&mut tap), ..Taps::default() };
                model.hidden(&Batch::pad_behind(&[full], 0), &none, None, Some(&mut taps)).unwrap();
                want.add_row(&x[first * gram.width()..]);
            }
            assert_eq!((gram.rows(), gram.tokens()), (10, want.tokens()), "{kind:?}");
            let size = want.sums().iter().fold(0f64, |m, v| m.max(v.abs()));
            for (e, (got, want)) in gram.sums().iter().zip(want.sums()).enumerate() {
                // Batches of another shape: the last bits of f32 activations differ.
                assert!((got - want).abs() <= 1e-5 * size, "{positions:?} {kind:?} {e}: {got} {want}");
            }
        }
    }
}

#[test]
fn only_wanted_modules_are_measured_and_attachments_count() {
    let model = model();
    let none = Attachments::none();
    let rows = answered(&model, &none, 4, 3);
    let wanted = |layer, kind| layer == 1 && kind == ModuleKind::V;
    let run = |at: &Attachments| grams(&model, at, "safety", &rows, 0, Positions::All, &wanted).unwrap();
    let plain = run(&none);
    assert_eq!(plain.modules().collect::<Vec<_>>(), [(1, ModuleKind::V)]);
    assert_ne!(plain.get(1, ModuleKind::V), run(&other(3.0)).get(1, ModuleKind::V));
    assert!(plain.get(0, ModuleKind::V).is_none());
}

#[test]
fn rows_that_cannot_be_measured_are_refused() {
    let model = model();
    let none = Attachments::none();
    let run = |rows: &[Row], wanted: bool| {
        grams(&model, &none, "safety", rows, 0, Positions::All, &|_, _| wanted).unwrap_err()
    };
    let e = run(&[], true);
    assert!(matches!(e, RunError::NoRows("safety")) && e.hint().is_some());
    let good = Row { prompt: vec![1], answer: vec![2] };
    assert!(matches!(run(std::slice::from_ref(&good), false), RunError::NoModule));
    let rows = [good.clone(), Row { answer: Vec::new(), ..good }];
    assert_eq!(run(&rows, true).to_string(), "safety row 2 has no answer");
}
