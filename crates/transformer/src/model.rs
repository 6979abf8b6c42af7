//! The decoder: embedding, blocks (RMS norm, attention with RoPE, SwiGLU), final norm, head.
//!
//! What layouts differ in are switches of [`Architecture`]; there is one forward pass.
//! Activations are f32, `[rows * tokens, width]`. Weights are frozen unless the model was built with
//! [`Model::trainable`].

use crate::architecture::Architecture;
use crate::attach::{Attachment, Attachments, ModuleKind, VectorKind};
use crate::error::ModelError;
use crate::ops::{self, RopeTable};
use candle_core::{D, Device, Tensor, Var};
use std::sync::Arc;

/// Where weights come from, by checkpoint name.
pub trait WeightSource {
    /// Shape and values (row-major, f32) of one tensor.
    fn read(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), ModelError>;
}

impl WeightSource for checkpoint::Checkpoint {
    fn read(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), ModelError> {
        let values = self.read_f32(name)?;
        let shape = self
            .tensors()
            .iter()
            .find(|t| t.name == name)
            .map(|t| t.shape.iter().map(|&d| d as usize).collect())
            .unwrap_or_else(|| vec![values.len()]);
        Ok((shape, values))
    }
}

/// Token ids of several rows of one length.
#[derive(Debug, Clone)]
pub struct Batch {
    /// `rows * tokens` ids, row-major.
    pub ids: Vec<u32>,
    /// Tokens in a row, padding included.
    pub tokens: usize,
    /// Per row, how many padding tokens stand in front (0 where padding follows).
    pub starts: Arc<Vec<u32>>,
}

impl Batch {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.starts.len()
    }

    /// Rows padded behind; a causal model never lets what follows change what stands before.
    pub fn pad_behind(rows: &[Vec<u32>], pad: u32) -> Self {
        let tokens = rows.iter().map(Vec::len).max().unwrap_or(0);
        let ids = rows
            .iter()
            .flat_map(|r| r.iter().copied().chain(std::iter::repeat_n(pad, tokens - r.len())))
            .collect();
        Self { ids, tokens, starts: Arc::new(vec![0; rows.len()]) }
    }

    /// Rows padded in front, so that all end at the same place.
    pub fn pad_front(rows: &[Vec<u32>], pad: u32) -> Self {
        let tokens = rows.iter().map(Vec::len).max().unwrap_or(0);
        let ids = rows
            .iter()
            .flat_map(|r| std::iter::repeat_n(pad, tokens - r.len()).chain(r.iter().copied()))
            .collect();
        Self { ids, tokens, starts: Arc::new(rows.iter().map(|r| (tokens - r.len()) as u32).collect()) }
    }
}

#[derive(Debug, Clone)]
struct Linear {
    w: Tensor,
    bias: Option<Tensor>,
}

#[derive(Debug, Clone)]
struct Block {
    /// By [`ModuleKind`]; `None` where the layout has no such module.
    linears: [Option<Linear>; ModuleKind::ALL.len()],
    norms: Vec<(VectorKind, Tensor)>,
}

impl Block {
    fn linear(&self, kind: ModuleKind) -> candle_core::Result<&Linear> {
        match &self.linears[kind as usize] {
            Some(linear) => Ok(linear),
            None => candle_core::bail!("this decoder has no `{}`", kind.path()),
        }
    }
}

/// Receives layer, module and input `[rows * tokens, in]` of every linear module, in the order of the forward pass.
pub type ModuleTap<'a> = dyn FnMut(usize, ModuleKind, &Tensor) -> candle_core::Result<()> + 'a;

/// What each block adds to the residual stream: its own output, `[rows * tokens, hidden]`, by layer.
#[derive(Default)]
pub struct Taps<'a> {
    /// Block output minus block input.
    pub outputs: Vec<Tensor>,
    /// Block input.
    pub inputs: Vec<Tensor>,
    /// Called with what each linear module is about to read.
    pub modules: Option<&'a mut ModuleTap<'a>>,
}

/// Keys and values of what was already read, by layer: `[rows, tokens, kv_heads, head_dim]`.
#[derive(Debug, Default)]
pub struct Cache {
    layers: Vec<(Tensor, Tensor)>,
    tokens: usize,
}

/// Where the tokens of a batch stand.
#[derive(Debug)]
pub(crate) struct Place {
    rows: usize,
    tokens: usize,
    /// Rotary position of each token, row-major.
    positions: Arc<Vec<u32>>,
    starts: Arc<Vec<u32>>,
}

/// A decoder with its weights.
#[derive(Debug, Clone)]
pub struct Model {
    architecture: Architecture,
    embedding: Tensor,
    blocks: Vec<Block>,
    norm: Tensor,
    head: Option<Tensor>,
    rope: RopeTable,
    variables: Option<Vec<(String, Var)>>,
}

/// Positions for which rotary angles are kept; far beyond any prompt this tool runs on a CPU.
const POSITIONS: usize = 8192;

impl Model {
    /// A frozen model.
    pub fn new(architecture: Architecture, source: &dyn WeightSource) -> Result<Self, ModelError> {
        Self::build(architecture, source, false)
    }

    /// A model whose weights are variables: see [`Model::variables`].
    pub fn trainable(architecture: Architecture, source: &dyn WeightSource) -> Result<Self, ModelError> {
        Self::build(architecture, source, true)
    }

    /// Opens a model folder, or an adapter over its base with the adapter added to the weights.
    pub fn open(checkpoint: &checkpoint::Checkpoint) -> Result<Self, ModelError> {
        Self::new(Architecture::from_config(&checkpoint.config().raw)?, checkpoint)
    }

    fn build(a: Architecture, source: &dyn WeightSource, trainable: bool) -> Result<Self, ModelError> {
        let mut variables = Vec::new();
        let mut get = |name: String, need: &[usize]| -> Result<Tensor, ModelError> {
            let (found, values) = source.read(&name)?;
            if found != need {
                return Err(ModelError::Shape { tensor: name, need: need.to_vec(), found });
            }
            let t = Tensor::from_vec(values, need, &Device::Cpu)?;
            if !trainable {
                return Ok(t);
            }
            let var = Var::from_tensor(&t)?;
            let t = var.as_tensor().clone();
            variables.push((name, var));
            Ok(t)
        };
        let h = a.hidden;
        let embedding = get("model.embed_tokens.weight".into(), &[a.vocab, h])?;
        let (modules, norm_shapes) = (a.modules(), a.norms());
        let mut blocks = Vec::with_capacity(a.layers);
        for layer in 0..a.layers {
            let mut linears: [Option<Linear>; ModuleKind::ALL.len()] = Default::default();
            for m in &modules {
                let w = get(format!("{}.weight", m.kind.module(layer)), &[m.out, m.into])?;
                let bias = VectorKind::Bias(m.kind).tensor(layer);
                let bias = if m.bias { Some(get(bias, &[m.out])?) } else { None };
                linears[m.kind as usize] = Some(Linear { w, bias });
            }
            let norms = norm_shapes.iter().map(|&(kind, len)| Ok((kind, get(kind.tensor(layer), &[len])?)));
            blocks.push(Block { linears, norms: norms.collect::<Result<_, ModelError>>()? });
        }
        let norm = get("model.norm.weight".into(), &[h])?;
        let head = if a.tied { None } else { Some(get("lm_head.weight".into(), &[a.vocab, h])?) };
        let rope = RopeTable::new(&a.rope_frequencies(), POSITIONS, a.rope_form);
        Ok(Self {
            architecture: a,
            embedding,
            blocks,
            norm,
            head,
            rope,
            variables: trainable.then_some(variables),
        })
    }

    /// The same model, frozen, with the attachments added to its weights in f32: one product a module instead of three.
    /// Every weight that something hangs on is a copy; all others are shared.
    pub fn merged(&self, attachments: &Attachments) -> Result<Self, ModelError> {
        attachments.check(&self.architecture)?;
        let mut out = Self { norm: self.norm.detach(), variables: None, ..self.clone() };
        for (layer, block) in out.blocks.iter_mut().enumerate() {
            for kind in ModuleKind::ALL {
                let Some(linear) = &mut block.linears[kind as usize] else { continue };
                for at in attachments.get(layer, kind) {
                    linear.w = (&linear.w + at.b.broadcast_mul(&at.scale)?.matmul(&at.a)?)?.detach();
                }
                if let Some(bias) = &mut linear.bias {
                    *bias = attachments.vector(layer, VectorKind::Bias(kind), bias)?.detach();
                }
            }
            for (kind, weight) in &mut block.norms {
                *weight = attachments.vector(layer, *kind, weight)?.detach();
            }
        }
        Ok(out)
    }

    /// The decoder's sizes.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// Names and variables of a trainable model; empty when frozen.
    pub fn variables(&self) -> &[(String, Var)] {
        self.variables.as_deref().unwrap_or(&[])
    }

    /// The frozen weight `[out, in]` of one linear module, without what is attached to it.
    pub fn weight(&self, layer: usize, kind: ModuleKind) -> Result<&Tensor, ModelError> {
        let found = self.blocks.get(layer).and_then(|b| b.linears[kind as usize].as_ref());
        found.map(|l| &l.w).ok_or_else(|| ModelError::Unsupported {
            model_type: self.architecture.model_type.clone(),
            reason: format!("`{}`, which this model does not have", kind.module(layer)),
        })
    }

    fn product(&self, x: &Tensor, w: &Tensor) -> candle_core::Result<Tensor> {
        if self.variables.is_some() { ops::linear(x, w) } else { ops::frozen_linear(x, (w, None)) }
    }

    fn linear(
        &self,
        x: &Tensor,
        layer: usize,
        kind: ModuleKind,
        attachments: &Attachments,
    ) -> candle_core::Result<Tensor> {
        let linear = self.blocks[layer].linear(kind)?;
        let mut bias = match &linear.bias {
            Some(bias) => Some(attachments.vector(layer, VectorKind::Bias(kind), bias)?),
            None => None,
        };
        let mut added = attachments.get(layer, kind).iter();
        let low_rank = |at: &Attachment, weight: Option<ops::Weight<'_>>| {
            ops::low_rank_linear(x, weight, (&at.a, &at.b, &at.scale))
        };
        let mut y = if self.variables.is_some() {
            ops::linear(x, &linear.w)?
        } else {
            let fixed = bias.take_if(|bias| !bias.track_op());
            let weight = (&linear.w, fixed.as_ref());
            match added.next() {
                Some(at) => low_rank(at, Some(weight))?,
                None => ops::frozen_linear(x, weight)?,
            }
        };
        if let Some(bias) = bias {
            y = y.broadcast_add(&bias)?;
        }
        for at in added {
            y = (y + low_rank(at, None)?)?;
        }
        Ok(y)
    }

    /// `x` through one RMS norm of a block; as it is, if the layout has none there.
    fn normed(
        &self,
        x: &Tensor,
        layer: usize,
        kind: VectorKind,
        attachments: &Attachments,
    ) -> candle_core::Result<Tensor> {
        match self.blocks[layer].norms.iter().find(|norm| norm.0 == kind) {
            Some((_, w)) => ops::rms_norm(x, &attachments.vector(layer, kind, w)?, self.architecture.rms_eps),
            None => Ok(x.clone()),
        }
    }

    /// Hidden states after the final norm, `[rows * tokens, hidden]`.
    pub fn hidden(
        &self,
        batch: &Batch,
        attachments: &Attachments,
        mut cache: Option<&mut Cache>,
        mut taps: Option<&mut Taps<'_>>,
    ) -> Result<Tensor, ModelError> {
        attachments.check(&self.architecture)?;
        let place = self.place(batch, cache.as_ref().map_or(0, |c| c.tokens))?;
        let mut x = self.embedded(batch)?;
        for layer in 0..self.blocks.len() {
            let input = x.clone();
            let tap = taps.as_deref_mut().and_then(|t| t.modules.as_deref_mut());
            x = self.block(layer, &x, &place, attachments, cache.as_deref_mut(), tap)?;
            if let Some(taps) = taps.as_deref_mut() {
                taps.outputs.push((&x - &input)?);
                taps.inputs.push(input);
            }
        }
        if let Some(cache) = cache {
            cache.tokens += batch.tokens;
        }
        self.last_norm(&x)
    }

    /// [`Self::hidden`] from what goes into `layer` on: `x` is `[rows * tokens, hidden]`.
    pub fn hidden_from(
        &self,
        batch: &Batch,
        layer: usize,
        x: &Tensor,
        attachments: &Attachments,
    ) -> Result<Tensor, ModelError> {
        attachments.check(&self.architecture)?;
        let place = self.place(batch, 0)?;
        let mut x = x.clone();
        for layer in layer..self.blocks.len() {
            x = self.block(layer, &x, &place, attachments, None, None)?;
        }
        self.last_norm(&x)
    }

    /// What comes out of one block, of what goes into it: both `[rows * tokens, hidden]`.
    pub fn block_alone(
        &self,
        batch: &Batch,
        layer: usize,
        x: &Tensor,
        attachments: &Attachments,
    ) -> Result<Tensor, ModelError> {
        attachments.check(&self.architecture)?;
        self.block(layer, x, &self.place(batch, 0)?, attachments, None, None)
    }

    /// Where the tokens of a batch stand, `past` tokens having been read before.
    pub(crate) fn place(&self, batch: &Batch, past: usize) -> Result<Place, ModelError> {
        let (rows, tokens) = (batch.rows(), batch.tokens);
        if past + tokens > self.rope.len() {
            return Err(ModelError::Config {
                key: "prompt".into(),
                problem: format!(
                    "has {} tokens, this decoder reads at most {}",
                    past + tokens,
                    self.rope.len()
                ),
            });
        }
        let of = |&s: &u32| (0..tokens).map(move |t| ((past + t) as u32).saturating_sub(s));
        let positions = Arc::new(batch.starts.iter().flat_map(of).collect());
        Ok(Place { rows, tokens, positions, starts: batch.starts.clone() })
    }

    /// What goes into the first block, `[rows * tokens, hidden]`.
    pub(crate) fn embedded(&self, batch: &Batch) -> Result<Tensor, ModelError> {
        let ids = Tensor::from_slice(&batch.ids, batch.ids.len(), &Device::Cpu)?;
        let x = self.embedding.index_select(&ids, 0)?;
        Ok(if self.variables.is_none() { x.detach() } else { x })
    }

    /// The final norm of what comes out of the last block.
    pub(crate) fn last_norm(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(ops::rms_norm(x, &self.norm, self.architecture.rms_eps)?)
    }

    /// One block: `[rows * tokens, hidden]` in and out.
    pub(crate) fn block(
        &self,
        layer: usize,
        x: &Tensor,
        place: &Place,
        attachments: &Attachments,
        cache: Option<&mut Cache>,
        mut tap: Option<&mut ModuleTap<'_>>,
    ) -> Result<Tensor, ModelError> {
        let a = &self.architecture;
        let (rows, tokens) = (place.rows, place.tokens);
        let mut lin = |x: &Tensor, kind| {
            if let Some(tap) = tap.as_deref_mut() {
                tap(layer, kind, x)?;
            }
            self.linear(x, layer, kind, attachments)
        };
        let norm = |x: &Tensor, kind| self.normed(x, layer, kind, attachments);
        let h = norm(x, VectorKind::AttentionNorm)?;
        let heads = |t: Tensor, n: usize| t.reshape((rows, tokens, n, a.head_dim));
        let q = heads(lin(&h, ModuleKind::Q)?, a.heads)?;
        let k = heads(lin(&h, ModuleKind::K)?, a.kv_heads)?;
        let mut v = heads(lin(&h, ModuleKind::V)?, a.kv_heads)?;
        let q = ops::rope(&norm(&q, VectorKind::QNorm)?, &self.rope, &place.positions)?;
        let mut k = ops::rope(&norm(&k, VectorKind::KNorm)?, &self.rope, &place.positions)?;
        if let Some(cache) = cache {
            if let Some((old_k, old_v)) = cache.layers.get(layer) {
                k = Tensor::cat(&[old_k, &k], 1)?;
                v = Tensor::cat(&[old_v, &v], 1)?;
                cache.layers[layer] = (k.clone(), v.clone());
            } else {
                cache.layers.push((k.clone(), v.clone()));
            }
        }
        let window = a.windows.get(layer).copied().flatten();
        let mixed = ops::attention(&q, &k, &v, &place.starts, window)?
            .reshape((rows * tokens, a.heads * a.head_dim))?;
        let x = (x + norm(&lin(&mixed, ModuleKind::O)?, VectorKind::PostAttentionNorm)?)?;
        let h = norm(&x, VectorKind::MlpNorm)?;
        let inner = if a.fused_gate_up {
            ops::swiglu_fused(&lin(&h, ModuleKind::GateUp)?)?
        } else {
            ops::swiglu(&lin(&h, ModuleKind::Gate)?, &lin(&h, ModuleKind::Up)?)?
        };
        Ok((x + norm(&lin(&inner, ModuleKind::Down)?, VectorKind::PostMlpNorm)?)?)
    }

    /// Logits `[n, vocab]` of chosen rows of `hidden`.
    pub fn logits(&self, hidden: &Tensor, rows: &[u32]) -> Result<Tensor, ModelError> {
        let rows = Tensor::from_slice(rows, rows.len(), &Device::Cpu)?;
        let h = hidden.index_select(&rows, 0)?;
        Ok(self.product(&h, self.head.as_ref().unwrap_or(&self.embedding))?)
    }

    /// Logits `[n, vocab]` of every position.
    pub fn all_logits(&self, hidden: &Tensor) -> Result<Tensor, ModelError> {
        Ok(self.product(hidden, self.head.as_ref().unwrap_or(&self.embedding))?)
    }

    /// Ids with the largest logit, for rows of `[n, vocab]`; ties go to the smaller id.
    pub fn greedy(logits: &Tensor) -> Result<Vec<u32>, ModelError> {
        Ok(logits.argmax(D::Minus1)?.to_vec1::<u32>()?)
    }
}
