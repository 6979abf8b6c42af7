//! What the modules of a model read on some rows: `G = Σ_t x_t x_tᵀ` of each module's inputs, in f64.
//!
//! `q`, `k` and `v` read one thing, so do `gate` and `up`: each such matrix is measured and held once. Padding is left out.
//! Sums run over tokens in the order of the rows, so the result depends neither on threads nor on how rows are grouped
//! (but for the last bits of the f32 forward pass). Everything else follows from `G`: the outputs on the same tokens have
//! the Gram matrix `W G Wᵀ`, and a change `D` of a weight changes them by `Σ_t ‖D x_t‖² = tr(D G Dᵀ)`.
//!
//! Not here: what is made of it.

use crate::run_error::RunError;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;
use transformer::{Attachments, Batch, Model, ModuleKind, Row, Taps};

/// Sum of `x xᵀ` over the inputs of one module.
#[derive(Debug, Clone, PartialEq)]
pub struct Gram {
    width: usize,
    rows: usize,
    tokens: usize,
    sums: Vec<f64>,
}

impl Gram {
    /// Of nothing so far, for inputs of `width` numbers.
    pub fn new(width: usize) -> Self {
        Self { width, rows: 0, tokens: 0, sums: vec![0.0; width * width] }
    }

    /// From sums made elsewhere: `sums` is `[width, width]`, row-major and symmetric, over `rows` rows of `tokens` tokens in all.
    pub fn from_sums(width: usize, rows: usize, tokens: usize, sums: Vec<f64>) -> Result<Self, RunError> {
        RunError::check_size("Gram", "the sums", width.saturating_mul(width), sums.len())?;
        Ok(Self { width, rows, tokens, sums })
    }

    /// Adds the inputs of one row, `[tokens, width]`; what does not fill a token is ignored.
    pub fn add_row(&mut self, inputs: &[f32]) {
        let n = self.width;
        if n == 0 {
            return;
        }
        self.rows += 1;
        self.tokens += inputs.len() / n;
        self.sums.par_chunks_mut(n).enumerate().for_each(|(i, sums)| {
            for x in inputs.chunks_exact(n) {
                let xi = f64::from(x[i]);
                for (s, &xj) in sums.iter_mut().zip(x) {
                    *s += xi * f64::from(xj);
                }
            }
        });
    }

    /// Numbers of an input.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows seen.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Tokens seen.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The sums, row-major, symmetric.
    pub fn sums(&self) -> &[f64] {
        &self.sums
    }

    /// `tr(D G Dᵀ)` of the change `d` `[out, width]`: how far the outputs move, squared and summed over the tokens.
    pub fn moved(&self, d: &[f64]) -> f64 {
        let n = self.width;
        if n == 0 {
            return 0.0;
        }
        let per_row: Vec<f64> = d
            .par_chunks(n)
            .map(|d| {
                let of = |(di, g): (&f64, &[f64])| {
                    if *di == 0.0 { 0.0 } else { di * d.iter().zip(g).map(|(a, b)| a * b).sum::<f64>() }
                };
                d.iter().zip(self.sums.chunks(n)).map(of).sum()
            })
            .collect();
        per_row.iter().sum()
    }
}

/// Gram matrices by layer and module.
#[derive(Debug, Clone, Default)]
pub struct Grams {
    modules: BTreeMap<(usize, ModuleKind), Arc<Gram>>,
}

impl Grams {
    /// That of one module, if it was measured.
    pub fn get(&self, layer: usize, kind: ModuleKind) -> Option<&Gram> {
        self.modules.get(&(layer, kind)).map(Arc::as_ref)
    }

    /// Adds or replaces that of one module.
    pub fn insert(&mut self, layer: usize, kind: ModuleKind, gram: Arc<Gram>) {
        self.modules.insert((layer, kind), gram);
    }

    /// Layers and modules, ascending.
    pub fn modules(&self) -> impl Iterator<Item = (usize, ModuleKind)> + '_ {
        self.modules.keys().copied()
    }
}

/// Tokens of a row whose inputs count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Positions {
    /// Prompt and answer.
    All,
    /// The answer's own tokens.
    Answer,
}

/// Rows a forward pass.
const ROWS: usize = 8;

/// The module that stands for all that read the same.
fn reader(kind: ModuleKind) -> ModuleKind {
    match kind {
        ModuleKind::K | ModuleKind::V => ModuleKind::Q,
        ModuleKind::Up => ModuleKind::Gate,
        other => other,
    }
}

/// Gram matrices of the inputs of the wanted modules of `model` with `attachments`, over `rows`.
///
/// `what` names the rows in errors.
pub fn grams(
    model: &Model,
    attachments: &Attachments,
    what: &'static str,
    rows: &[Row],
    pad: u32,
    positions: Positions,
    wanted: &dyn Fn(usize, ModuleKind) -> bool,
) -> Result<Grams, RunError> {
    RunError::check_rows(what, rows)?;
    let layers = model.architecture().layers;
    let mut sums: BTreeMap<(usize, ModuleKind), Gram> = BTreeMap::new();
    for layer in 0..layers {
        for module in model.architecture().modules().into_iter().filter(|m| wanted(layer, m.kind)) {
            sums.entry((layer, reader(module.kind))).or_insert_with(|| Gram::new(module.into));
        }
    }
    if sums.is_empty() {
        return Err(RunError::NoModule);
    }
    for rows in rows.chunks(ROWS) {
        let full: Vec<Vec<u32>> =
            rows.iter().map(|r| r.prompt.iter().chain(&r.answer).copied().collect()).collect();
        let batch = Batch::pad_behind(&full, pad);
        let mut tap = |layer: usize, kind: ModuleKind, x: &candle_core::Tensor| {
            let Some(gram) = sums.get_mut(&(layer, kind)) else { return Ok(()) };
            let values = x.flatten_all()?.to_vec1::<f32>()?;
            let n = gram.width;
            for (i, row) in rows.iter().enumerate() {
                let first = match positions {
                    Positions::All => 0,
                    Positions::Answer => row.prompt.len(),
                };
                let at = i * batch.tokens;
                gram.add_row(&values[(at + first) * n..(at + row.prompt.len() + row.answer.len()) * n]);
            }
            Ok(())
        };
        let mut taps = Taps { modules: Some(&mut tap), ..Taps::default() };
        model.hidden(&batch, attachments, None, Some(&mut taps))?;
    }
    let mut out = Grams::default();
    let sums: BTreeMap<_, _> = sums.into_iter().map(|(key, gram)| (key, Arc::new(gram))).collect();
    for layer in 0..layers {
        for kind in model.architecture().modules().into_iter().map(|m| m.kind).filter(|&k| wanted(layer, k)) {
            let Some(gram) = sums.get(&(layer, reader(kind))) else { continue };
            if !gram.sums.iter().all(|v| v.is_finite()) {
                return Err(RunError::NotFinite { module: kind.module(layer), what: "its input" });
            }
            out.insert(layer, kind, gram.clone());
        }
    }
    Ok(out)
}
