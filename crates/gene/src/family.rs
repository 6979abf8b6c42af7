//! Which models a gene fits.
//!
//! The fingerprint is `blake3:` and the hex blake3 of the `model_type`, a line break and the sorted lines
//! `module out in`, each ended by a line break, over the linear modules of all layers. Vocabulary and dtype do not count.
//!
//! Not here: whether the gene does any good in a model that it fits.

use std::collections::BTreeMap;

use checkpoint::{Checkpoint, Role, module_of, printable};

use crate::error::{GeneError, Result};
use crate::read::Gene;

/// The fingerprint of a family with these linear modules (name, out, in), in any order.
pub fn fingerprint<N: AsRef<str>>(model_type: &str, modules: impl Iterator<Item = (N, u64, u64)>) -> String {
    let mut lines: Vec<String> =
        modules.map(|(name, out, into)| format!("{} {out} {into}\n", name.as_ref())).collect();
    lines.sort();
    let mut hash = blake3::Hasher::new();
    hash.update(model_type.as_bytes());
    hash.update(b"\n");
    for line in &lines {
        hash.update(line.as_bytes());
    }
    format!("blake3:{}", hash.finalize().to_hex())
}

/// The fingerprint of a checkpoint.
pub fn fingerprint_of(model: &Checkpoint) -> Result<String> {
    let modules = linear_modules(model)?;
    let modules = modules.iter().map(|(name, shape)| (name, shape[0], shape[1]));
    Ok(fingerprint(&model.config().model_type, modules))
}

/// Refuses a target that the gene does not fit, naming the first module that differs.
pub fn check_family(gene: &Gene, target: &Checkpoint) -> Result<()> {
    let family = &gene.manifest().family;
    let refuse = |first_difference: String| {
        Err(GeneError::OtherFamily {
            gene_type: family.model_type.clone(),
            target_type: target.config().model_type.clone(),
            first_difference,
        })
    };
    if family.model_type != target.config().model_type {
        return refuse("`model_type` differs".into());
    }
    // The modules are compared even if the fingerprints agree, because the file may have been edited.
    let mut theirs = linear_modules(target)?;
    for module in gene.modules() {
        let name = printable(&module.name);
        match theirs.remove(&module.name) {
            None => return refuse(format!("`{name}` is not in the target")),
            Some(shape) if shape != module.shape => {
                return refuse(format!(
                    "`{name}` is {:?} in the gene, {shape:?} in the target",
                    module.shape
                ));
            }
            Some(_) => {}
        }
    }
    for entry in gene.rest().iter().filter(|entry| entry.layer.is_some()) {
        let name = printable(&entry.name);
        match target.shards().get(&entry.name) {
            None => return refuse(format!("`{name}` is not in the target")),
            Some(info) if info.shape != entry.shape => {
                return refuse(format!(
                    "`{name}` is {:?} in the gene, {:?} in the target",
                    entry.shape, info.shape
                ));
            }
            Some(_) => {}
        }
    }
    if family.fingerprint != fingerprint_of(target)? {
        return refuse(match theirs.first_key_value() {
            Some((name, _)) => format!("`{}` is not in the gene", printable(name)),
            None => "the fingerprints differ".into(),
        });
    }
    Ok(())
}

/// Linear modules of the canonical space: experts one by one, whatever the layout.
fn linear_modules(model: &Checkpoint) -> Result<BTreeMap<String, [u64; 2]>> {
    let units = model.units()?;
    let linear = units.iter().filter(|unit| matches!(unit.role, Role::Linear { .. }));
    Ok(linear
        .filter_map(|unit| match unit.shape[..] {
            [out, into] => Some((module_of(&unit.name)?.to_owned(), [out, into])),
            _ => None,
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprint_is_the_documented_hash_in_any_order() {
        let modules = [("b", 2, 3), ("a", 10, 4)];
        let want = format!("blake3:{}", blake3::hash(b"qwen2\na 10 4\nb 2 3\n").to_hex());
        assert_eq!(fingerprint("qwen2", modules.into_iter()), want);
        assert_eq!(fingerprint("qwen2", modules.into_iter().rev()), want);
    }

    #[test]
    fn fingerprint_changes_with_type_name_and_side() {
        let all = [
            fingerprint("qwen2", [("a", 2, 3)].into_iter()),
            fingerprint("llama", [("a", 2, 3)].into_iter()),
            fingerprint("qwen2", [("b", 2, 3)].into_iter()),
            fingerprint("qwen2", [("a", 3, 2)].into_iter()),
        ];
        assert_eq!(all.iter().collect::<std::collections::HashSet<_>>().len(), 4);
    }
}
