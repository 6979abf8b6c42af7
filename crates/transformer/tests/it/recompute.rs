//! Gradients by block against the plain way, on a small random decoder of each layout.

use crate::decoder::{flat, model, noise, rows};
use candle_core::{Device, Tensor, Var};
use transformer::architecture::LAYOUTS;
use transformer::recompute::gradients;
use transformer::{AnswerBatch, Attachment, Attachments, Model, ModelError, Taps};

fn attached(model: &Model) -> (Attachments, Vec<Var>) {
    let dev = &Device::Cpu;
    let (mut at, mut vars) = (Attachments::none(), Vec::new());
    let scale = Tensor::from_slice(&[0.7f32], 1, dev).unwrap();
    for layer in 0..model.architecture().layers {
        for m in model.architecture().modules() {
            let seed = (layer * 10 + m.kind as usize) as u64;
            let var = |values: Vec<f32>, shape: (usize, usize)| {
                Var::from_tensor(&Tensor::from_vec(values, shape, dev).unwrap()).unwrap()
            };
            let a = var(noise(2 * m.into, seed), (2, m.into));
            let b = var(noise(2 * m.out, seed + 500), (m.out, 2));
            let one = Attachment { a: a.as_tensor().clone(), b: b.as_tensor().clone(), scale: scale.clone() };
            at.add(layer, m.kind, one);
            vars.extend([a, b]);
        }
    }
    (at, vars)
}

fn number(t: &Tensor) -> f64 {
    f64::from(t.sum_all().unwrap().to_scalar::<f32>().unwrap())
}

/// What hidden states lack of zero, as an example of a loss on them.
fn size(_: usize, y: &Tensor) -> Result<Tensor, ModelError> {
    Ok((y.sqr()?.mean_all()? * 0.1)?)
}

#[test]
fn values_and_gradients_are_those_of_the_plain_way() {
    for layout in LAYOUTS {
        let model = model(layout);
        let (at, vars) = attached(&model);
        let batch = AnswerBatch::new(&rows(), 0);
        for with_hidden in [false, true] {
            let mut taps = Taps::default();
            let hidden = model.hidden(batch.batch(), &at, None, Some(&mut taps)).unwrap();
            let logits = model.logits(&hidden, batch.predictors()).unwrap();
            let mut plain = batch.cross_entropy_of(&logits).unwrap().sum_all().unwrap();
            if with_hidden {
                for (input, added) in taps.inputs.iter().zip(&taps.outputs) {
                    plain = (plain + size(0, &(input + added).unwrap()).unwrap()).unwrap();
                }
            }
            let want = plain.backward().unwrap();
            let loss = |logits: &Tensor| batch.cross_entropy_of(logits);
            let hidden: Option<transformer::recompute::HiddenLoss<'_>> =
                if with_hidden { Some(&size) } else { None };
            let (value, got) = gradients(&model, &batch, &at, &vars, &loss, hidden).unwrap();
            let err = (value - number(&plain)).abs();
            // The same f32 operations; only sums of a few losses may round elsewhere.
            assert!(err <= 1e-5 * number(&plain), "{layout}: {value} against {}", number(&plain));
            for (i, (var, got)) in vars.iter().zip(&got).enumerate() {
                let want = flat(want.get(var).expect("a gradient reaches every factor"));
                let norm = want.iter().map(|w| w * w).sum::<f32>().sqrt();
                assert!(norm > 0.0, "{layout}: the gradient of factor {i} is zero and shows nothing");
                let apart = want.iter().zip(got).map(|(w, g)| (w - g) * (w - g)).sum::<f32>().sqrt();
                // Both ways add the same products; where paths join, in another order.
                assert!(apart <= 1e-4 * norm, "{layout}: factor {i}: off by {} of {norm}", apart);
            }
        }
    }
}

#[test]
fn factors_that_play_no_part_get_zeros() {
    let model = model("llama");
    let (at, mut vars) = attached(&model);
    vars.push(Var::from_slice(&[1.0f32, 2.0], 2, &Device::Cpu).unwrap());
    let batch = AnswerBatch::new(&rows(), 0);
    let loss = |logits: &Tensor| batch.cross_entropy_of(logits);
    let (_, grads) = gradients(&model, &batch, &at, &vars, &loss, None).unwrap();
    assert_eq!(grads.last().unwrap(), &[0.0, 0.0]);
}

#[test]
fn a_layer_alone_begins_where_the_whole_pass_has_it() {
    for layout in LAYOUTS {
        let model = model(layout);
        let (at, _) = attached(&model);
        let batch = AnswerBatch::new(&rows(), 0);
        let mut taps = Taps::default();
        let whole = model.hidden(batch.batch(), &at, None, Some(&mut taps)).unwrap();
        for (layer, input) in taps.inputs.iter().enumerate() {
            let from = model.hidden_from(batch.batch(), layer, input, &at).unwrap();
            assert_eq!(flat(&from), flat(&whole), "{layout} from layer {layer}");
            let out = model.block_alone(batch.batch(), layer, input, &at).unwrap();
            assert_eq!(flat(&(out - input).unwrap()), flat(&taps.outputs[layer]), "{layout} layer {layer}");
        }
    }
}
