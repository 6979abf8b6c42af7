//! Greedy generation in batches, with a key-value cache.

use crate::attach::Attachments;
use crate::error::ModelError;
use crate::model::{Batch, Cache, Model};

/// Continues each prompt greedily until a token of `stop` or `new_tokens_max` tokens; the stop token is not returned.
/// Rows of a batch do not see each other, so the result does not depend on how prompts are grouped.
pub fn generate(
    model: &Model,
    attachments: &Attachments,
    prompts: &[Vec<u32>],
    stop: &[u32],
    new_tokens_max: usize,
) -> Result<Vec<Vec<u32>>, ModelError> {
    if prompts.is_empty() || new_tokens_max == 0 {
        return Ok(vec![Vec::new(); prompts.len()]);
    }
    let rows = prompts.len();
    let mut batch = Batch::pad_front(prompts, 0);
    let mut cache = Cache::default();
    let mut answers = vec![Vec::new(); rows];
    let mut done = vec![false; rows];
    for _ in 0..new_tokens_max {
        let hidden = model.hidden(&batch, attachments, Some(&mut cache), None)?;
        let last: Vec<u32> = (0..rows).map(|r| ((r + 1) * batch.tokens - 1) as u32).collect();
        let next = Model::greedy(&model.logits(&hidden, &last)?)?;
        for (row, &id) in next.iter().enumerate() {
            if stop.contains(&id) {
                done[row] = true;
            } else if !done[row] {
                answers[row].push(id);
            }
        }
        if done.iter().all(|d| *d) {
            break;
        }
        batch = Batch { ids: next, tokens: 1, starts: batch.starts };
    }
    Ok(answers)
}
