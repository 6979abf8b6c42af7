//! Scores of layers against the same numbers computed the long way, and a layer that was planted.

use crate::calibrate::{gene, model, noise};
use candle_core::{Device, Tensor};
use distill::select::{Keep, Score, SelectError, choose, scores};
use distill::{Frozen, GeneAttachments};
use transformer::{AnswerBatch, Attachments, Model, ModuleKind, Row, Taps};

const REFUSAL: [u32; 2] = [3, 4];

fn rows(model: &Model, seed: u64, n: usize) -> Vec<Row> {
    let ids: Vec<u32> = noise(n * 6, seed).iter().map(|x| ((x + 0.3) / 0.6 * 39.0) as u32).collect();
    let prompts: Vec<Vec<u32>> = ids.chunks(6).map(<[u32]>::to_vec).collect();
    let answers = transformer::generate(model, &Attachments::none(), &prompts, &[], 3).unwrap();
    prompts.into_iter().zip(answers).map(|(prompt, answer)| Row { prompt, answer }).collect()
}

/// log P(R) − log(1 − P(R)) in f64.
fn log_odds(logits: &[f32]) -> f64 {
    let p: Vec<f64> = logits.iter().map(|&x| f64::from(x).exp()).collect();
    let inside: f64 = REFUSAL.iter().map(|&i| p[i as usize]).sum();
    (inside / (p.iter().sum::<f64>() - inside)).ln()
}

fn number(t: Tensor) -> f64 {
    f64::from(t.sum_all().unwrap().to_scalar::<f32>().unwrap())
}

#[test]
fn scores_are_those_of_the_formulas() {
    let (model, gene) = (model(), gene(1.0));
    let (bad, good) = (rows(&model, 1, 5), rows(&model, 2, 7));
    let found = scores(&Frozen::new(&model), &gene, &bad, &good, (&REFUSAL, 0)).unwrap();
    let none = Attachments::none();
    let (bad, good) = (AnswerBatch::new(&bad, 0), AnswerBatch::new(&good, 0));
    let mean_odds = |at: &Attachments| -> f64 {
        let logits = bad.first_logits(&bad.logits(&model, at).unwrap()).unwrap().to_vec2::<f32>().unwrap();
        logits.iter().map(|row| log_odds(row)).sum::<f64>() / logits.len() as f64
    };
    let reference = good.reference(&model, &none).unwrap();
    let kl = |at: &Attachments| number(good.kl(&model, at, &reference).unwrap());
    let loss = |at: &Attachments| number(bad.cross_entropy(&model, at).unwrap());
    let added = |batch: &AnswerBatch, at: &Attachments, layer: usize| -> Vec<Vec<f32>> {
        let mut taps = Taps::default();
        model.hidden(batch.batch(), at, None, Some(&mut taps)).unwrap();
        batch.at_predictors(&taps.outputs[layer]).unwrap().to_vec2().unwrap()
    };
    let change = |batch: &AnswerBatch, at: &Attachments, layer: usize| -> f64 {
        let (with, without) = (added(batch, at, layer), added(batch, &none, layer));
        let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|v| f64::from(v * v)).sum::<f64>().sqrt();
        let ratio = |(w, o): (&Vec<f32>, &Vec<f32>)| {
            norm(&mut w.iter().zip(o).map(|(w, o)| w - o)) / norm(&mut o.iter().copied())
        };
        with.iter().zip(&without).map(ratio).sum::<f64>() / with.len() as f64
    };
    for (i, s) in found.iter().enumerate() {
        assert_eq!(s.layer as usize, i);
        let at = |c: f64| gene.at(&[(s.layer, c)].into()).unwrap();
        let insertion = mean_odds(&at(1.0)) - mean_odds(&none) - kl(&at(1.0));
        let price = (loss(&none) - loss(&at(3.0))) / kl(&at(3.0)).sqrt();
        let activation = change(&bad, &at(1.0), i) - change(&good, &at(1.0), i);
        for (what, got, want) in [
            ("insertion", s.insertion, insertion),
            ("price", s.price, price),
            ("activation", s.activation, activation),
        ] {
            // Sums of f32 logits in two orders.
            assert!((got - want).abs() <= 1e-4 * (1.0 + want.abs()), "layer {i} {what}: {got}, {want}");
        }
    }
}

#[test]
fn layer_that_carries_the_effect_is_chosen() {
    // Layers 0 and 2 hold factors of next to nothing; in one direction layer 1 raises the refusal.
    let model = model();
    let (bad, good) = (rows(&model, 1, 6), rows(&model, 2, 6));
    let tensor = |v: Vec<f32>, shape: (usize, usize)| Tensor::from_vec(v, shape, &Device::Cpu).unwrap();
    let planted = |sign: f32| {
        let modules = (0..3)
            .map(|layer| {
                let size = if layer == 1 { 0.1 } else { 1e-5 };
                let b: Vec<f32> = noise(16, 77).iter().map(|x| sign * size * x).collect();
                (layer, ModuleKind::Down, tensor(b, (16, 1)), tensor(noise(24, 78), (1, 24)))
            })
            .collect();
        let gene = GeneAttachments::from_factors(modules);
        scores(&Frozen::new(&model), &gene, &bad, &good, (&REFUSAL, 0)).unwrap()
    };
    let both = [planted(1.0), planted(-1.0)];
    for found in &both {
        let moves = |s: &distill::select::LayerScore| s.insertion.abs();
        assert!(moves(&found[1]) > 100.0 * moves(&found[0]).max(moves(&found[2])), "{found:?}");
    }
    let up = both.iter().find(|found| found[1].insertion > 0.0).expect("one direction raises the refusal");
    assert_eq!(choose(up, Score::Insertion, Keep::Top(1)).unwrap(), [1], "{up:?}");
}

#[test]
fn score_that_is_not_finite_is_an_error() {
    let model = model();
    let (bad, good) = (rows(&model, 1, 2), rows(&model, 2, 2));
    let tensor = |v: Vec<f32>, shape: (usize, usize)| Tensor::from_vec(v, shape, &Device::Cpu).unwrap();
    let huge = (1, ModuleKind::Down, tensor(vec![3e38; 16], (16, 1)), tensor(vec![3e38; 24], (1, 24)));
    let gene = GeneAttachments::from_factors(vec![huge]);
    let error = scores(&Frozen::new(&model), &gene, &bad, &good, (&REFUSAL, 0)).unwrap_err();
    assert!(matches!(error, SelectError::NotFinite { layer: 1, .. }), "{error}");
}

#[test]
fn nothing_to_score_is_refused() {
    let (model, gene) = (model(), gene(1.0));
    let some = rows(&model, 1, 2);
    let frozen = Frozen::new(&model);
    let call = |gene: &GeneAttachments, bad: &[Row], good: &[Row]| {
        scores(&frozen, gene, bad, good, (&REFUSAL, 0)).unwrap_err()
    };
    assert!(matches!(call(&gene, &[], &some), SelectError::NoRows("harmful")));
    assert!(matches!(call(&gene, &some, &[]), SelectError::NoRows("benign")));
    let empty = GeneAttachments::from_factors(Vec::new());
    assert!(matches!(call(&empty, &some, &some), SelectError::NoLayer));
}
