//! How tensors are spread over files, and what the index says about it.
//!
//! One shard is `model.safetensors` without an index; several are `model-%05d-of-%05d.safetensors`, counted from 1, filled
//! greedily in the given order. A tensor over the limit gets a shard of its own.
//!
//! Not here: writing; see `write`.

use crate::dtype::Dtype;

/// Name of an unsharded model's file.
pub const MODEL_FILE: &str = "model.safetensors";

/// Name of the index of a sharded model.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// One file of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardPlan {
    /// File name.
    pub file: String,
    /// Tensors, in the given order.
    pub tensors: Vec<String>,
    /// Sum of their bytes, without the header.
    pub bytes: u64,
}

/// Spreads tensors over files of at most `max_bytes` each, in the given order.
pub fn shard_plan(sizes: &[(String, u64)], max_bytes: u64) -> Vec<ShardPlan> {
    let mut shards: Vec<ShardPlan> = Vec::new();
    for (name, bytes) in sizes {
        match shards.last_mut() {
            Some(shard) if shard.bytes.saturating_add(*bytes) <= max_bytes => {
                shard.bytes += bytes;
                shard.tensors.push(name.clone());
            }
            _ => shards.push(ShardPlan { file: String::new(), tensors: vec![name.clone()], bytes: *bytes }),
        }
    }
    let count = shards.len();
    for (n, shard) in shards.iter_mut().enumerate() {
        shard.file = if count == 1 {
            MODEL_FILE.to_owned()
        } else {
            format!("model-{:05}-of-{count:05}.safetensors", n + 1)
        };
    }
    shards
}

/// The index of a plan, with `metadata.total_size` the sum of all tensor bytes. Ends in a line break.
pub fn index_json(shards: &[ShardPlan]) -> String {
    let total: u64 = shards.iter().map(|shard| shard.bytes).sum();
    let places: std::collections::BTreeMap<&str, &str> = shards
        .iter()
        .flat_map(|shard| shard.tensors.iter().map(|name| (name.as_str(), shard.file.as_str())))
        .collect();
    let index = serde_json::json!({ "metadata": { "total_size": total }, "weight_map": places });
    format!("{index:#}\n")
}

/// Sorts tensors so that each starts at a multiple of its element size when written in this order: wide dtypes first,
/// then by name, as the reference writer does.
pub fn aligned_order<T>(tensors: &mut [(String, Dtype, T)]) {
    tensors.sort_by(|a, b| b.1.bits().cmp(&a.1.bits()).then_with(|| a.0.cmp(&b.0)));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(list: &[u64]) -> Vec<(String, u64)> {
        list.iter().enumerate().map(|(n, &bytes)| (format!("t{n}"), bytes)).collect()
    }

    #[test]
    fn plan_fills_greedily_and_gives_large_tensors_their_own() {
        let plan = shard_plan(&sizes(&[4, 4, 3, 20, 1]), 10);
        let got: Vec<_> =
            plan.iter().map(|shard| (shard.file.as_str(), shard.tensors.len(), shard.bytes)).collect();
        assert_eq!(
            got,
            [
                ("model-00001-of-00004.safetensors", 2, 8),
                ("model-00002-of-00004.safetensors", 1, 3),
                ("model-00003-of-00004.safetensors", 1, 20),
                ("model-00004-of-00004.safetensors", 1, 1),
            ]
        );
    }

    #[test]
    fn plan_of_one_shard_has_the_plain_name() {
        assert_eq!(shard_plan(&sizes(&[4, 4]), 8)[0].file, "model.safetensors");
        assert!(shard_plan(&[], 8).is_empty());
    }

    #[test]
    fn index_sums_tensor_bytes() {
        let index: serde_json::Value =
            serde_json::from_str(&index_json(&shard_plan(&sizes(&[4, 9]), 9))).unwrap();
        assert_eq!(index["metadata"]["total_size"], 13);
        assert_eq!(index["weight_map"]["t1"], "model-00002-of-00002.safetensors");
    }

    #[test]
    fn aligned_order_puts_wide_dtypes_first() {
        let mut list = [
            ("b".to_owned(), Dtype::U8, ()),
            ("z".to_owned(), Dtype::F32, ()),
            ("a".to_owned(), Dtype::U8, ()),
        ];
        aligned_order(&mut list);
        assert_eq!(list.map(|(name, ..)| name), ["z", "a", "b"]);
    }
}
