//! Genes and expressions: what they are, what their files look like, and which model they fit.
//!
//! A [`Gene`] is a folder that PEFT can load: factors of linear modules at coefficient 1 and scale 1, beside them
//! `rest.safetensors` for what is no such module, and `gene.json` for what both are. An [`Expression`] is one
//! non-negative coefficient per layer. A gene is only ever added: a coefficient below zero and a model of another family
//! are refused here, before anything is written.
//!
//! Not here: computing factors (`lowrank`), walking a model (`stream`), choosing coefficients (`distill`), printing.

mod adapter;
mod error;
mod expression;
mod family;
mod made;
mod manifest;
mod peft;
mod read;
mod spill;
mod write;

pub use adapter::{AdapterReport, Expressed, adapter_into, base_name, factors_into, write_adapter};
pub use error::{GeneError, Result};
pub use expression::{Expression, check_coefficients};
pub use family::{check_family, fingerprint, fingerprint_of};
pub use made::{MadeFactors, Origin, write_made, write_selected};
pub use manifest::{
    ADAPTER_FILE, Class, Family, GeneManifest, LayerEntry, MANIFEST_FILE, ManifestParts, Module, REST_FILE,
    RestEntry, SCHEMA, Source, Sources,
};
pub use peft::escaped;
pub use read::{Gene, RestDelta};
pub use spill::Given;
pub use write::GeneWriter;
