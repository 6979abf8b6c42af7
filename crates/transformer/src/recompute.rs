//! Gradients with the activations of one block in memory.
//!
//! Forward keeps what goes into each block and nothing inside of one; backward runs each block again, from the last to
//! the first, and takes its gradient there. Memory for activations grows with one block, not with depth; the price is a
//! second forward pass. Values and gradients are those of the plain way (arXiv 1604.06174 describes the trade).

use crate::attach::Attachments;
use crate::error::ModelError;
use crate::loss::AnswerBatch;
use crate::model::Model;
use candle_core::{Tensor, Var};

/// A further loss on what comes out of a block: (layer, output `[rows * tokens, hidden]`) to `[1]`.
pub type HiddenLoss<'a> = &'a dyn Fn(usize, &Tensor) -> Result<Tensor, ModelError>;

/// Value of `loss(logits)` plus, where given, of `hidden` summed over all blocks, and the gradient for each of `vars`
/// (zeros for one that plays no part). `logits` are those of [`AnswerBatch::logits`].
pub fn gradients(
    model: &Model,
    batch: &AnswerBatch,
    attachments: &Attachments,
    vars: &[Var],
    loss: &dyn Fn(&Tensor) -> Result<Tensor, ModelError>,
    hidden: Option<HiddenLoss<'_>>,
) -> Result<(f64, Vec<Vec<f32>>), ModelError> {
    let number = |t: &Tensor| -> Result<f64, ModelError> { Ok(f64::from(t.sum_all()?.to_scalar::<f32>()?)) };
    attachments.check(model.architecture())?;
    let place = model.place(batch.batch(), 0)?;
    let quiet = attachments.detached();
    let mut inputs = vec![model.embedded(batch.batch())?.detach()];
    for layer in 0..model.architecture().layers {
        let y = model.block(layer, &inputs[layer], &place, &quiet, None, None)?;
        inputs.push(y.detach());
    }
    let mut sums: Vec<Vec<f32>> = vars.iter().map(|v| vec![0f32; v.elem_count()]).collect();
    let out = Var::from_tensor(&inputs[inputs.len() - 1])?;
    let logits = model.logits(&model.last_norm(out.as_tensor())?, batch.predictors())?;
    let end = loss(&logits)?;
    let mut value = number(&end)?;
    let grads = end.backward()?;
    let mut slope = match grads.get(&out) {
        Some(g) => g.clone(),
        None => out.zeros_like()?,
    };
    for (layer, x) in inputs.iter().enumerate().take(inputs.len() - 1).rev() {
        let x = Var::from_tensor(x)?;
        let y = model.block(layer, x.as_tensor(), &place, attachments, None, None)?;
        let mut through = (&y * slope.detach())?.sum_all()?;
        if let Some(hidden) = hidden {
            let more = hidden(layer, &y)?.sum_all()?;
            value += number(&more)?;
            through = (through + more)?;
        }
        let grads = through.backward()?;
        for (sum, var) in sums.iter_mut().zip(vars) {
            if let Some(g) = grads.get(var) {
                for (s, g) in sum.iter_mut().zip(g.flatten_all()?.to_vec1::<f32>()?) {
                    *s += g;
                }
            }
        }
        slope = match grads.get(&x) {
            Some(g) => g.clone(),
            None => x.zeros_like()?,
        };
    }
    Ok((value, sums))
}
