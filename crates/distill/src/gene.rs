//! How a gene hangs on a model: one scalar a layer.

use candle_core::{Device, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use transformer::{Attachment, Attachments, Model, ModelError, ModuleKind, VectorKind};

/// A frozen model with what hangs on it: an adapter over weights that others share, or nothing.
#[derive(Debug, Clone)]
pub struct Frozen<'a> {
    /// The weights.
    pub model: &'a Model,
    /// What makes this one differ from them.
    pub own: Attachments,
}

impl<'a> Frozen<'a> {
    /// The model as it is.
    pub fn new(model: &'a Model) -> Self {
        Self { model, own: Attachments::none() }
    }

    /// What it has, and `more`.
    pub fn with(&self, more: &Attachments) -> Attachments {
        let mut out = self.own.clone();
        out.extend(more);
        out
    }
}

/// A gene's factors as tensors, layer by layer, ready to be attached with any coefficients.
#[derive(Debug, Clone, Default)]
pub struct GeneAttachments {
    modules: Vec<(usize, ModuleKind, Tensor, Tensor)>,
    vectors: Vec<(usize, VectorKind, Tensor)>,
    layers: Vec<u32>,
}

impl GeneAttachments {
    /// All low-rank modules of `gene`, and the norms and biases of its layers.
    ///
    /// An error when the gene holds a module or a layer's tensor that this decoder does not have.
    pub fn new(gene: &gene::Gene) -> Result<Self, crate::CalibrationError> {
        let mut modules = Vec::new();
        for module in gene.modules() {
            if module.class != gene::Class::LowRank {
                continue;
            }
            let unknown = || ModelError::Unsupported {
                model_type: gene.manifest().family.model_type.clone(),
                reason: format!("module `{}` is not one this decoder has", module.name),
            };
            let (layer, kind) = ModuleKind::parse(&module.name).ok_or_else(unknown)?;
            let f = gene.factors(&module.name)?;
            let scale = f.scale as f32;
            let b: Vec<f32> = f.b.iter().map(|x| x * scale).collect();
            let b = Tensor::from_vec(b, (f.rows, f.rank), &Device::Cpu).map_err(ModelError::from)?;
            let a = Tensor::from_vec(f.a, (f.rank, f.cols), &Device::Cpu).map_err(ModelError::from)?;
            modules.push((layer, kind, b, a));
        }
        let mut out = Self { layers: gene.layers(), ..Self::from_factors(modules) };
        for entry in gene.rest() {
            // What belongs to no layer has no coefficient; what was left out has no values.
            if entry.layer.is_none() || entry.class != gene::Class::Full {
                continue;
            }
            let (layer, kind) = VectorKind::parse(&entry.name).ok_or_else(|| ModelError::Unsupported {
                model_type: gene.manifest().family.model_type.clone(),
                reason: format!("tensor `{}` is not one this decoder has", entry.name),
            })?;
            if let gene::RestDelta::Full(delta) = gene.rest_delta(&entry.name)? {
                let n = delta.len();
                out.vectors.push((
                    layer,
                    kind,
                    Tensor::from_vec(delta, n, &Device::Cpu).map_err(ModelError::from)?,
                ));
            }
        }
        Ok(out)
    }

    /// Factors that are no file yet: layer, module, `B [out, rank]`, `A [rank, in]`, both f32.
    pub fn from_factors(modules: Vec<(usize, ModuleKind, Tensor, Tensor)>) -> Self {
        let layers: BTreeSet<u32> = modules.iter().map(|m| m.0 as u32).collect();
        Self { modules, vectors: Vec::new(), layers: layers.into_iter().collect() }
    }

    /// The same of these layers only.
    pub fn only(&self, layers: &[u32]) -> Self {
        let of = |layer: usize| layers.contains(&(layer as u32));
        Self {
            modules: self.modules.iter().filter(|m| of(m.0)).cloned().collect(),
            vectors: self.vectors.iter().filter(|v| of(v.0)).cloned().collect(),
            layers: self.layers.iter().copied().filter(|l| layers.contains(l)).collect(),
        }
    }

    /// Layers that have a coefficient, ascending.
    pub fn layers(&self) -> &[u32] {
        &self.layers
    }

    /// Attachments whose scales are the given one-element tensors, one for each of [`Self::layers`].
    pub fn attach(&self, scales: &BTreeMap<u32, Tensor>) -> Attachments {
        let mut out = Attachments::none();
        for (layer, kind, b, a) in &self.modules {
            if let Some(scale) = scales.get(&(*layer as u32)) {
                out.add(*layer, *kind, Attachment { a: a.clone(), b: b.clone(), scale: scale.clone() });
            }
        }
        for (layer, kind, delta) in &self.vectors {
            if let Some(scale) = scales.get(&(*layer as u32)) {
                out.add_vector(*layer, *kind, delta.clone(), scale.clone());
            }
        }
        out
    }

    /// Attachments at fixed coefficients; a layer that is not named has coefficient 0.
    pub fn at(&self, coefficients: &BTreeMap<u32, f64>) -> Result<Attachments, ModelError> {
        let mut scales = BTreeMap::new();
        for (&layer, &c) in coefficients {
            scales.insert(layer, Tensor::from_slice(&[c as f32], 1, &Device::Cpu)?);
        }
        Ok(self.attach(&scales))
    }
}
