//! Making a gene folder, module by module.
//!
//! Values wait in a part file; `finish` writes `adapter_model.safetensors` (factors in `f32`, sorted by name),
//! `rest.safetensors` if anything is in it, `adapter_config.json` and `gene.json`, and publishes the folder by rename.
//! The bytes do not depend on the order of the calls.
//!
//! Not here: computing factors and certificates, the totals of the manifest.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use checkpoint::{Dtype, FolderWriter, Role, TensorSpec, default_metadata, module_of, role};
use serde_json::Map;

use crate::error::{GeneError, Result};
use crate::manifest::{
    ADAPTER_FILE, Class, GeneManifest, LayerEntry, MANIFEST_FILE, ManifestParts, Module, REST_FILE,
    RestEntry, SCHEMA,
};
use crate::peft::PeftConfig;
use crate::read::{ROW_INDEX, ROW_VALUES};
use crate::spill::{Given, Slot, Spill, f32_bytes};

/// Writes a gene.
#[derive(Debug)]
pub struct GeneWriter {
    // Before the folder, so that its file is closed when an unfinished folder is removed.
    spill: Spill,
    folder: FolderWriter,
    modules: Vec<Module>,
    rest: Vec<RestEntry>,
    classes: BTreeMap<Class, u64>,
    seen: BTreeSet<String>,
    factor_tensors: BTreeMap<String, (Dtype, Vec<u64>, Slot)>,
    rest_tensors: BTreeMap<String, (Dtype, Vec<u64>, Slot)>,
    layers: Option<Vec<LayerEntry>>,
}

impl GeneWriter {
    /// Starts a gene; see [`FolderWriter::create`] for what `force` does.
    pub fn create(out: &Path, force: bool) -> Result<GeneWriter> {
        Self::in_folder(FolderWriter::create(out, force)?)
    }

    /// Starts a gene in a folder that was begun already.
    pub fn in_folder(folder: FolderWriter) -> Result<GeneWriter> {
        Ok(GeneWriter {
            spill: Spill::create(&folder)?,
            folder,
            modules: Vec::new(),
            rest: Vec::new(),
            classes: BTreeMap::new(),
            seen: BTreeSet::new(),
            factor_tensors: BTreeMap::new(),
            rest_tensors: BTreeMap::new(),
            layers: None,
        })
    }

    /// Where the gene is being made.
    pub fn partial(&self) -> &Path {
        self.folder.partial()
    }

    /// A linear module kept as factors: `b` is [out, rank], `a` is [rank, in], row-major, scale 1.
    pub fn low_rank(&mut self, module: Module, b: &[f32], a: &[f32]) -> Result<()> {
        let name = module.name.clone();
        if module.class != Class::LowRank || module.rank == 0 {
            return Err(GeneError::part(&name, "factors need the class `low-rank` and a rank above zero"));
        }
        let [out, into] = module.shape;
        if role(&format!("{name}.weight"), &module.shape) != (Role::Linear { layer: module.layer }) {
            return Err(GeneError::part(&name, format!("it is no linear module of layer {}", module.layer)));
        }
        let rank = module.rank as u64;
        self.count(&format!("{name}.weight"), Class::LowRank)?;
        for (side, values, shape) in [("lora_B", b, [out, rank]), ("lora_A", a, [rank, into])] {
            expect_len(&name, values.len(), &shape)?;
            finite(&name, values)?;
            let slot = self.spill.keep(&f32_bytes(values))?;
            self.factor_tensors
                .insert(format!("base_model.model.{name}.{side}.weight"), (Dtype::F32, shape.to_vec(), slot));
        }
        self.modules.push(module);
        Ok(())
    }

    /// The same with values that lie in a file; they are known to be finite.
    pub fn low_rank_given(&mut self, module: Module, b: Given, a: Given) -> Result<()> {
        let name = module.name.clone();
        if module.class != Class::LowRank || module.rank == 0 {
            return Err(GeneError::part(&name, "factors need the class `low-rank` and a rank above zero"));
        }
        let ([out, into], rank) = (module.shape, module.rank as u64);
        if role(&format!("{name}.weight"), &module.shape) != (Role::Linear { layer: module.layer }) {
            return Err(GeneError::part(&name, format!("it is no linear module of layer {}", module.layer)));
        }
        self.count(&format!("{name}.weight"), Class::LowRank)?;
        for (side, given, shape) in [("lora_B", b, [out, rank]), ("lora_A", a, [rank, into])] {
            expect_bytes(&name, &given, &shape, 4)?;
            self.factor_tensors.insert(
                format!("base_model.model.{name}.{side}.weight"),
                (Dtype::F32, shape.to_vec(), Slot::Given(given)),
            );
        }
        self.modules.push(module);
        Ok(())
    }

    /// [`full`](Self::full) with values that lie in a file; they are known to be finite, and to have this energy.
    pub fn full_given(&mut self, name: &str, shape: &[u64], delta: Given, energy: f64) -> Result<()> {
        expect_bytes(name, &delta, shape, 4)?;
        self.count(name, Class::Full)?;
        self.rest_tensors.insert(name.to_owned(), (Dtype::F32, shape.to_vec(), Slot::Given(delta)));
        self.list(name, role(name, shape).layer(), shape, Class::Full, energy)
    }

    /// [`row_patch`](Self::row_patch) with values that lie in a file; they are known to be finite, and to have this
    /// energy.
    pub fn row_patch_given(
        &mut self,
        name: &str,
        shape: [u64; 2],
        rows: &[u64],
        delta: Given,
        energy: f64,
    ) -> Result<()> {
        check_rows(name, rows, shape[0])?;
        let values_shape = [rows.len() as u64, shape[1]];
        expect_bytes(name, &delta, &values_shape, 4)?;
        self.count(name, Class::RowPatch)?;
        let index: Vec<u8> = rows.iter().flat_map(|row| row.to_le_bytes()).collect();
        let index = self.spill.keep(&index)?;
        self.rest_tensors.insert(format!("{name}{ROW_INDEX}"), (Dtype::I64, vec![rows.len() as u64], index));
        let values = (Dtype::F32, values_shape.to_vec(), Slot::Given(delta));
        self.rest_tensors.insert(format!("{name}{ROW_VALUES}"), values);
        self.list(name, role(name, &shape).layer(), &shape, Class::RowPatch, energy)
    }

    /// A tensor kept as its exact difference. A linear module's weight is listed among the modules too.
    pub fn full(&mut self, name: &str, layer: Option<u32>, shape: &[u64], delta: &[f32]) -> Result<()> {
        expect_len(name, delta.len(), shape)?;
        finite(name, delta)?;
        self.count(name, Class::Full)?;
        let slot = self.spill.keep(&f32_bytes(delta))?;
        self.rest_tensors.insert(name.to_owned(), (Dtype::F32, shape.to_vec(), slot));
        self.list(name, layer, shape, Class::Full, energy(delta))
    }

    /// A matrix of which only `rows` (ascending) changed: `delta` holds one difference per row listed.
    pub fn row_patch(
        &mut self,
        name: &str,
        layer: Option<u32>,
        shape: [u64; 2],
        rows: &[u64],
        delta: &[f32],
    ) -> Result<()> {
        check_rows(name, rows, shape[0])?;
        let values_shape = [rows.len() as u64, shape[1]];
        expect_len(name, delta.len(), &values_shape)?;
        finite(name, delta)?;
        self.count(name, Class::RowPatch)?;
        let index: Vec<u8> = rows.iter().flat_map(|row| row.to_le_bytes()).collect();
        let index = self.spill.keep(&index)?;
        let values = self.spill.keep(&f32_bytes(delta))?;
        self.rest_tensors.insert(format!("{name}{ROW_INDEX}"), (Dtype::I64, vec![rows.len() as u64], index));
        self.rest_tensors.insert(format!("{name}{ROW_VALUES}"), (Dtype::F32, values_shape.to_vec(), values));
        self.list(name, layer, &shape, Class::RowPatch, energy(delta))
    }

    /// A tensor of which nothing is kept: `unchanged` (energy 0) or `left-out`. `name` is the tensor's, with `.weight`.
    pub fn class_only(
        &mut self,
        name: &str,
        layer: Option<u32>,
        shape: &[u64],
        class: Class,
        energy: f64,
    ) -> Result<()> {
        let fits = match class {
            Class::Unchanged => energy == 0.0,
            Class::LeftOut => energy.is_finite() && energy >= 0.0,
            _ => false,
        };
        if !fits {
            return Err(GeneError::part(
                name,
                format!("class {class:?} with energy {energy} holds no values"),
            ));
        }
        self.count(name, class)?;
        self.list(name, layer, shape, class, energy)
    }

    /// Counts tensors that are equal, are no linear modules and need not be named.
    pub(crate) fn count_unchanged(&mut self, n: u64) {
        if n > 0 {
            *self.classes.entry(Class::Unchanged).or_default() += n;
        }
    }

    /// Says what each layer scored and whether it stays, in place of the list of those that hold something.
    pub(crate) fn keep_layers(&mut self, layers: Vec<LayerEntry>) {
        self.layers = Some(layers);
    }

    /// Writes a further file, such as `log.json`. It is no part of the gene's content.
    pub fn file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        if [MANIFEST_FILE, ADAPTER_FILE, REST_FILE, "adapter_config.json"].contains(&name) {
            return Err(GeneError::part(name, "this file is written by the gene itself"));
        }
        Ok(self.folder.file(name, bytes)?)
    }

    /// Writes the files and publishes the folder.
    pub fn finish(self, parts: ManifestParts) -> Result<GeneManifest> {
        let GeneWriter {
            mut spill,
            folder,
            mut modules,
            mut rest,
            classes,
            factor_tensors,
            rest_tensors,
            layers,
            ..
        } = self;
        if factor_tensors.is_empty() && rest_tensors.is_empty() {
            return Err(GeneError::Empty);
        }
        modules.sort_by(|a, b| (a.layer, &a.name).cmp(&(b.layer, &b.name)));
        rest.sort_by(|a, b| a.name.cmp(&b.name));
        let mut manifest = manifest(parts, classes, modules, rest)?;
        if let Some(layers) = layers {
            manifest.layers = layers;
        }

        write_tensors(&folder, &mut spill, ADAPTER_FILE, &factor_tensors)?;
        if !rest_tensors.is_empty() {
            write_tensors(&folder, &mut spill, REST_FILE, &rest_tensors)?;
        }

        let mut ranks: Vec<(String, usize)> = manifest
            .modules
            .iter()
            .filter(|module| module.class == Class::LowRank)
            .map(|module| (module.name.clone(), module.rank))
            .collect();
        ranks.sort();
        let config = PeftConfig { base: &manifest.sources.degraded.name, modules: &ranks, saved: &[] };
        folder.file("adapter_config.json", &config.to_bytes())?;
        let path = folder.partial().join(MANIFEST_FILE);
        let mut text =
            serde_json::to_vec_pretty(&manifest).map_err(|error| GeneError::json(&path, &error))?;
        text.push(b'\n');
        folder.file(MANIFEST_FILE, &text)?;
        folder.publish()?;
        Ok(manifest)
    }

    fn count(&mut self, tensor: &str, class: Class) -> Result<()> {
        if tensor.contains('#') {
            return Err(GeneError::part(tensor, "a name with `#` cannot be stored"));
        }
        if !self.seen.insert(tensor.to_owned()) {
            return Err(GeneError::part(tensor, "the tensor was given twice"));
        }
        *self.classes.entry(class).or_default() += 1;
        Ok(())
    }

    fn list(
        &mut self,
        name: &str,
        layer: Option<u32>,
        shape: &[u64],
        class: Class,
        energy: f64,
    ) -> Result<()> {
        let found = role(name, shape);
        if found.layer() != layer {
            return Err(GeneError::part(
                name,
                format!("it belongs to layer {:?}, not {layer:?}", found.layer()),
            ));
        }
        if let (Role::Linear { layer }, Some(module), &[out, into]) = (found, module_of(name), shape) {
            self.modules.push(Module {
                name: module.to_owned(),
                layer,
                shape: [out, into],
                class,
                energy,
                residual: if class == Class::LeftOut { 1.0 } else { 0.0 },
                ..Module::default()
            });
        }
        let kept_or_lost = matches!(class, Class::Full | Class::RowPatch | Class::LeftOut);
        if kept_or_lost && !(class == Class::LeftOut && matches!(found, Role::Linear { .. })) {
            let (name, shape) = (name.to_owned(), shape.to_vec());
            self.rest.push(RestEntry { name, layer, shape, class, energy, extra: Map::new() });
        }
        Ok(())
    }
}

fn manifest(
    parts: ManifestParts,
    classes: BTreeMap<Class, u64>,
    modules: Vec<Module>,
    rest: Vec<RestEntry>,
) -> Result<GeneManifest> {
    let totals = [
        ("energy", parts.energy),
        ("captured", parts.captured),
        ("captured_upper_bound", parts.captured_upper_bound),
        ("noise_floor", parts.noise_floor),
    ];
    let of_modules = modules.iter().flat_map(|module| {
        [module.energy, module.residual, module.noise_floor].map(|value| (module.name.as_str(), value))
    });
    for (name, value) in totals.into_iter().chain(of_modules) {
        // NaN has no place in JSON, and none of these is ever below zero.
        if !value.is_finite() || value < 0.0 {
            return Err(GeneError::part(name, format!("{value} is no energy or share")));
        }
    }
    let holds = |class| matches!(class, Class::LowRank | Class::Full | Class::RowPatch);
    let layers: BTreeSet<u32> = modules
        .iter()
        .filter(|module| holds(module.class))
        .map(|module| module.layer)
        .chain(rest.iter().filter(|entry| holds(entry.class)).filter_map(|entry| entry.layer))
        .collect();
    let layers =
        layers.into_iter().map(|layer| LayerEntry { layer, score: None, selected: true, extra: Map::new() });
    Ok(GeneManifest {
        schema: SCHEMA,
        family: parts.family,
        tool: parts.tool,
        options: parts.options,
        sources: parts.sources,
        energy: parts.energy,
        captured: parts.captured,
        captured_upper_bound: parts.captured_upper_bound,
        noise_floor: parts.noise_floor,
        classes,
        modules,
        rest,
        layers: layers.collect(),
        extra: parts.extra,
    })
}

fn write_tensors(
    folder: &FolderWriter,
    spill: &mut Spill,
    file: &str,
    tensors: &BTreeMap<String, (Dtype, Vec<u64>, Slot)>,
) -> Result<()> {
    let mut order: Vec<_> =
        tensors.iter().map(|(name, (dtype, shape, slot))| (name.clone(), *dtype, (shape, slot))).collect();
    checkpoint::aligned_order(&mut order);
    let specs: Vec<TensorSpec> =
        order.iter().map(|(name, dtype, (shape, _))| (name.clone(), *dtype, (*shape).clone())).collect();
    let mut shard = folder.shard(file, &default_metadata(), &specs)?;
    for (name, _, (_, slot)) in &order {
        spill.copy(slot, name, &mut shard)?;
    }
    Ok(shard.finish()?)
}

fn check_rows(name: &str, rows: &[u64], height: u64) -> Result<()> {
    let ascending =
        rows.windows(2).all(|pair| pair[0] < pair[1]) && rows.last().is_none_or(|&row| row < height);
    if rows.is_empty() || !ascending {
        return Err(GeneError::part(name, "rows are not ascending numbers of rows"));
    }
    Ok(())
}

fn expect_bytes(name: &str, given: &Given, shape: &[u64], size: u64) -> Result<()> {
    let need = shape.iter().try_fold(size, |product, &side| product.checked_mul(side));
    if need == Some(given.bytes()) {
        return Ok(());
    }
    Err(GeneError::part(name, format!("shape {shape:?} does not hold {} bytes", given.bytes())))
}

fn expect_len(name: &str, got: usize, shape: &[u64]) -> Result<()> {
    let need = shape.iter().try_fold(1u64, |product, &side| product.checked_mul(side));
    if need == Some(got as u64) {
        return Ok(());
    }
    Err(GeneError::part(name, format!("shape {shape:?} does not hold {got} values")))
}

fn finite(name: &str, values: &[f32]) -> Result<()> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => Err(GeneError::NonFinite { name: name.to_owned(), index: index as u64 }),
        None => Ok(()),
    }
}

fn energy(delta: &[f32]) -> f64 {
    delta.iter().map(|&value| f64::from(value) * f64::from(value)).sum()
}
