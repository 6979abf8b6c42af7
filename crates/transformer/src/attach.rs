//! Low-rank attachments: what a fine-tune or a gene adds to the linear modules of a model.

use crate::architecture::Architecture;
use crate::error::ModelError;
use candle_core::{Device, Tensor};

/// The linear modules that a decoder block can have; [`Architecture::modules`] says which ones a layout has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ModuleKind {
    /// Query projection.
    Q,
    /// Key projection.
    K,
    /// Value projection.
    V,
    /// Output projection of attention.
    O,
    /// Gate of the feed-forward block.
    Gate,
    /// Up projection.
    Up,
    /// Gate and up projection in one matrix, gate first.
    GateUp,
    /// Down projection.
    Down,
}

impl ModuleKind {
    /// All of them, in the order of the forward pass.
    pub const ALL: [Self; 8] =
        [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::GateUp, Self::Down];

    /// Path inside the block, as in checkpoints.
    pub fn path(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::GateUp => "mlp.gate_up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// Full module name, e.g. `model.layers.3.mlp.up_proj`.
    pub fn module(self, layer: usize) -> String {
        format!("model.layers.{layer}.{}", self.path())
    }

    /// Layer and kind of a module name.
    pub fn parse(module: &str) -> Option<(usize, Self)> {
        let rest = module.strip_prefix("model.layers.")?;
        let (layer, path) = rest.split_once('.')?;
        let kind = Self::ALL.into_iter().find(|k| k.path() == path)?;
        Some((layer.parse().ok()?, kind))
    }
}

/// A low-rank change `B A` of one module, as plain values; every scale is in `B`.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ModuleFactors {
    /// Decoder block.
    pub layer: usize,
    /// Module in it.
    pub kind: ModuleKind,
    /// Inner side.
    pub rank: usize,
    /// `[out, rank]`, row-major.
    pub b: Vec<f32>,
    /// `[rank, in]`, row-major.
    pub a: Vec<f32>,
}

impl ModuleFactors {
    /// All of `list` as attachments at scale 1.
    pub fn attachments(list: &[Self]) -> Result<Attachments, ModelError> {
        let mut out = Attachments::none();
        for f in list {
            out.add_fixed(f.layer, f.kind, (&f.b, &f.a), f.rank, 1.0)?;
        }
        Ok(out)
    }
}

impl From<ModuleFactors> for checkpoint::Factors {
    fn from(f: ModuleFactors) -> Self {
        let (rows, cols) = (f.b.len() / f.rank.max(1), f.a.len() / f.rank.max(1));
        Self { b: f.b, a: f.a, rows, cols, rank: f.rank, scale: 1.0 }
    }
}

/// One addition `s · B A` to one module.
#[derive(Debug, Clone)]
pub struct Attachment {
    /// `[rank, in]`, f32.
    pub a: Tensor,
    /// `[out, rank]`, f32.
    pub b: Tensor,
    /// `[1]`, f32; shared by the modules of a layer when it is that layer's coefficient.
    pub scale: Tensor,
}

/// The 1-D weights that a decoder block can have; [`Architecture::vectors`] says which ones a layout has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum VectorKind {
    /// RMS norm before attention.
    AttentionNorm,
    /// RMS norm before the feed-forward block.
    MlpNorm,
    /// RMS norm of each query head.
    QNorm,
    /// RMS norm of each key head.
    KNorm,
    /// RMS norm of what attention puts out.
    PostAttentionNorm,
    /// RMS norm of what the feed-forward block puts out.
    PostMlpNorm,
    /// Bias of a linear module.
    Bias(ModuleKind),
}

impl VectorKind {
    /// All norms.
    const NORMS: [Self; 6] = [
        Self::AttentionNorm,
        Self::MlpNorm,
        Self::QNorm,
        Self::KNorm,
        Self::PostAttentionNorm,
        Self::PostMlpNorm,
    ];

    /// Path inside the block, as in checkpoints.
    fn path(self) -> String {
        match self {
            Self::AttentionNorm => "input_layernorm.weight".into(),
            // A name from before there was a norm behind attention.
            Self::MlpNorm => "post_attention_layernorm.weight".into(),
            Self::QNorm => "self_attn.q_norm.weight".into(),
            Self::KNorm => "self_attn.k_norm.weight".into(),
            Self::PostAttentionNorm => "post_self_attn_layernorm.weight".into(),
            Self::PostMlpNorm => "post_mlp_layernorm.weight".into(),
            Self::Bias(kind) => format!("{}.bias", kind.path()),
        }
    }

    /// Full tensor name, e.g. `model.layers.3.self_attn.q_proj.bias`.
    pub fn tensor(self, layer: usize) -> String {
        format!("model.layers.{layer}.{}", self.path())
    }

    /// Layer and kind of a tensor name.
    pub fn parse(tensor: &str) -> Option<(usize, Self)> {
        if let Some(module) = tensor.strip_suffix(".bias") {
            return ModuleKind::parse(module).map(|(layer, kind)| (layer, Self::Bias(kind)));
        }
        let (layer, path) = tensor.strip_prefix("model.layers.")?.split_once('.')?;
        let kind = Self::NORMS.into_iter().find(|kind| kind.path() == path)?;
        Some((layer.parse().ok()?, kind))
    }
}

/// Additions to the weights of a model, by layer. Cheap to clone: tensors are shared.
#[derive(Debug, Clone, Default)]
pub struct Attachments {
    layers: Vec<[Vec<Attachment>; ModuleKind::ALL.len()]>,
    vectors: Vec<(usize, VectorKind, Tensor, Tensor)>,
}

impl Attachments {
    /// Nothing attached.
    pub fn none() -> Self {
        Self::default()
    }

    /// Adds `attachment` to one module.
    pub fn add(&mut self, layer: usize, kind: ModuleKind, attachment: Attachment) {
        while self.layers.len() <= layer {
            self.layers.push(Default::default());
        }
        self.layers[layer][kind as usize].push(attachment);
    }

    /// Adds fixed factors: `b` is `[out, rank]`, `a` is `[rank, in]`, both row-major.
    pub fn add_fixed(
        &mut self,
        layer: usize,
        kind: ModuleKind,
        (b, a): (&[f32], &[f32]),
        rank: usize,
        scale: f32,
    ) -> candle_core::Result<()> {
        let dev = &Device::Cpu;
        let attachment = Attachment {
            a: Tensor::from_slice(a, (rank, a.len() / rank.max(1)), dev)?,
            b: Tensor::from_slice(b, (b.len() / rank.max(1), rank), dev)?,
            scale: Tensor::from_slice(&[scale], 1, dev)?,
        };
        self.add(layer, kind, attachment);
        Ok(())
    }

    /// What an adapter adds to its base, scales folded into `B`; `None` if it holds more than factors of modules that
    /// this decoder has, so that the weights have to be merged.
    pub fn of_adapter(adapter: &checkpoint::Adapter) -> Result<Option<Self>, ModelError> {
        if !adapter.saved().is_empty() {
            return Ok(None);
        }
        let mut out = Self::none();
        for name in adapter.modules().keys() {
            let Some((layer, kind)) = ModuleKind::parse(name) else { return Ok(None) };
            if let Some(f) = adapter.factors(name)? {
                out.add_fixed(layer, kind, (&f.b, &f.a), f.rank, f.scale as f32)?;
            }
        }
        Ok(Some(out))
    }

    /// Adds `scale · delta` to a 1-D weight; `scale` has shape `[1]`.
    pub fn add_vector(&mut self, layer: usize, kind: VectorKind, delta: Tensor, scale: Tensor) {
        self.vectors.push((layer, kind, delta, scale));
    }

    /// A 1-D weight with what is attached to it.
    pub fn vector(&self, layer: usize, kind: VectorKind, weight: &Tensor) -> candle_core::Result<Tensor> {
        let mut out = weight.clone();
        for (_, _, delta, scale) in self.vectors.iter().filter(|v| v.0 == layer && v.1 == kind) {
            out = (out + delta.broadcast_mul(scale)?)?;
        }
        Ok(out)
    }

    /// The same values without a way back for gradients.
    pub fn detached(&self) -> Self {
        let one =
            |at: &Attachment| Attachment { a: at.a.detach(), b: at.b.detach(), scale: at.scale.detach() };
        let layers = self.layers.iter().map(|l| std::array::from_fn(|k| l[k].iter().map(one).collect()));
        let vectors = self.vectors.iter().map(|(l, k, d, s)| (*l, *k, d.detach(), s.detach()));
        Self { layers: layers.collect(), vectors: vectors.collect() }
    }

    /// All additions of `other` as well.
    pub fn extend(&mut self, other: &Attachments) {
        for (layer, modules) in other.layers.iter().enumerate() {
            for (kind, list) in ModuleKind::ALL.into_iter().zip(modules) {
                for attachment in list {
                    self.add(layer, kind, attachment.clone());
                }
            }
        }
        self.vectors.extend(other.vectors.iter().cloned());
    }

    /// Refuses what is attached to a place that a decoder does not have: it would have no effect.
    pub fn check(&self, architecture: &Architecture) -> Result<(), ModelError> {
        let refuse = |place: String| {
            Err(ModelError::Unsupported {
                model_type: architecture.model_type.clone(),
                reason: format!("an addition to `{place}`, which this model does not have"),
            })
        };
        let modules = architecture.modules();
        for (layer, lists) in self.layers.iter().enumerate() {
            for (kind, list) in ModuleKind::ALL.into_iter().zip(lists) {
                let known = layer < architecture.layers && modules.iter().any(|m| m.kind == kind);
                if !known && !list.is_empty() {
                    return refuse(kind.module(layer));
                }
            }
        }
        let vectors = architecture.vectors();
        for (layer, kind, ..) in &self.vectors {
            if *layer >= architecture.layers || !vectors.iter().any(|v| v.0 == *kind) {
                return refuse(kind.tensor(*layer));
            }
        }
        Ok(())
    }

    /// What is attached to one module.
    pub fn get(&self, layer: usize, kind: ModuleKind) -> &[Attachment] {
        self.layers.get(layer).map_or(&[], |l| &l[kind as usize])
    }
}
