//! `expression.json`: one coefficient per layer, for one gene and one target.
//!
//! A layer that is not named has coefficient 0. Coefficients are finite and not below zero. Keys that are not known here
//! are kept.
//!
//! Not here: choosing them (`distill`), applying them (`stream`).

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::Read;
use std::path::Path;

use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{GeneError, Result};
use crate::manifest::SCHEMA;

/// Longest expression that is read.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// How strongly a gene is expressed in a target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Expression {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Content hash of the gene.
    pub gene: String,
    /// Content hash of the target.
    pub target: String,
    /// By layer number, written as text.
    #[serde(deserialize_with = "by_layer")]
    pub coefficients: BTreeMap<u32, f64>,
    /// The limits it was calibrated under, and what was reached.
    #[serde(default)]
    pub limits: Map<String, Value>,
    /// The examples it was calibrated on.
    #[serde(default)]
    pub shots: Map<String, Value>,
    /// Keys that are not known here.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Expression {
    /// Reads and checks an expression.
    pub fn read(path: &Path) -> Result<Expression> {
        let file = fs::File::open(path).map_err(GeneError::io("read", path))?;
        let mut bytes = Vec::new();
        file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(GeneError::io("read", path))?;
        if bytes.len() as u64 > FILE_BYTES_MAX {
            let problem = format!("it is over the limit of {FILE_BYTES_MAX} bytes");
            return Err(GeneError::Json { file: path.to_path_buf(), problem });
        }
        let expression: Expression =
            serde_json::from_slice(&bytes).map_err(|error| GeneError::json(path, &error))?;
        if expression.schema != SCHEMA {
            return Err(GeneError::Schema {
                file: path.to_path_buf(),
                found: expression.schema,
                read: SCHEMA,
            });
        }
        check_coefficients(&expression.coefficients)?;
        Ok(expression)
    }

    /// Checks and writes an expression: a temporary file beside it, flushed, then renamed over whatever was there.
    pub fn write(&self, path: &Path) -> Result<()> {
        check_coefficients(&self.coefficients)?;
        let mut text = serde_json::to_vec_pretty(self).map_err(|error| GeneError::json(path, &error))?;
        text.push(b'\n');
        let Some(name) = path.file_name() else {
            return Err(GeneError::io("create", path)(std::io::ErrorKind::InvalidFilename.into()));
        };
        let mut partial = name.to_owned();
        partial.push(".partial");
        let partial = path.with_file_name(partial);
        let write = || {
            let mut file = fs::File::create(&partial)?;
            std::io::Write::write_all(&mut file, &text)?;
            file.sync_all()?;
            fs::rename(&partial, path)?;
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            fs::File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
        };
        write().map_err(|source| {
            // Nothing half-written stays; the first error is the one to tell.
            let _ = fs::remove_file(&partial);
            GeneError::io("write", path)(source)
        })
    }

    /// The coefficient of a layer.
    pub fn coefficient(&self, layer: u32) -> f64 {
        self.coefficients.get(&layer).copied().unwrap_or(0.0)
    }

    /// Refuses a gene that the expression was not made for.
    pub fn check_gene(&self, gene_content: &str) -> Result<()> {
        if self.gene == gene_content {
            return Ok(());
        }
        Err(GeneError::OtherGene { expected: self.gene.clone(), found: gene_content.to_owned() })
    }

    /// Refuses a gene or a target that the expression was not made for.
    pub fn check_made_for(&self, gene_content: &str, target_content: &str) -> Result<()> {
        self.check_gene(gene_content)?;
        if self.target != target_content {
            return Err(GeneError::OtherTarget {
                expected: self.target.clone(),
                found: target_content.to_owned(),
            });
        }
        Ok(())
    }
}

/// Refuses coefficients below zero and those that are no finite `f32`.
pub fn check_coefficients(coefficients: &BTreeMap<u32, f64>) -> Result<()> {
    for (&layer, &value) in coefficients {
        if value < 0.0 {
            return Err(GeneError::NegativeCoefficient { layer, value });
        }
        if !(value as f32).is_finite() {
            return Err(GeneError::CoefficientRange { layer, value });
        }
    }
    Ok(())
}

/// Keys are layer numbers as this crate writes them; a layer given twice is refused.
fn by_layer<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<u32, f64>, D::Error> {
    struct Layers;

    impl<'de> Visitor<'de> for Layers {
        type Value = BTreeMap<u32, f64>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object from layer numbers to coefficients")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut coefficients = BTreeMap::new();
            while let Some((key, value)) = map.next_entry::<String, f64>()? {
                let layer = key.parse::<u32>().ok().filter(|layer| layer.to_string() == key);
                let layer =
                    layer.ok_or_else(|| de::Error::custom(format_args!("`{key}` is no layer number")))?;
                if coefficients.insert(layer, value).is_some() {
                    return Err(de::Error::custom(format_args!("layer {layer} occurs twice")));
                }
            }
            Ok(coefficients)
        }
    }

    deserializer.deserialize_map(Layers)
}
