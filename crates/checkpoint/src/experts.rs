//! Which stored tensor holds which expert matrices, by declared family.
//!
//! A stack of experts is recognised by `model_type` (top level, then `text_config`) and the ending of the tensor's name,
//! never by its sides: [E, 2I, H] and [E, H, 2I] look alike. The sides are then checked against the `hidden_size` of the
//! config, so that a folder saved in another layout is refused where the numbers can tell; a family that is written in
//! two layouts has both in the table, and exactly one has to fit. Names are brought to one form, as transformers 5 has
//! them in memory, with the experts apart: `….experts.E.gate_proj.weight`, `.up_proj.weight`, `.down_proj.weight`.
//!
//! Layouts are those of transformers 5: the expert classes of its models and, for names on disk, its conversion table.
//!
//! Not here: reading, and projections fused outside of experts (`qkv_proj`), which stay whole.

use serde_json::Value;

use crate::config::{ModelConfig, look_up};
use crate::units::Slice;

/// Most experts that one tensor may hold.
const EXPERTS_MAX: u64 = 1 << 16;

/// How one expert's matrices lie in the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// [E, out, in]; of gate and up, gate is the first half of the rows.
    OutIn,
    /// [E, in, out]; of gate and up, gate is the first half of the columns.
    InOut,
    /// [E, in, out]; of gate and up, gate is the even columns.
    InOutInterleaved,
}

/// What a stack holds for each expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holds {
    GateUp,
    Down,
}

struct Family {
    model_types: &'static [&'static str],
    layout: Layout,
    /// Where the canonical names of the experts live.
    container: &'static str,
    gate_up: &'static str,
    down: &'static str,
    /// Names on disk and the canonical ones, whole parts of a dotted name, tried in this order.
    renames: &'static [(&'static str, &'static str)],
    /// Whether `experts.E.w1`, `w3`, `w2` are gate, up, down.
    numbered: bool,
}

const MLP: Family = Family {
    model_types: &[],
    layout: Layout::OutIn,
    container: "mlp.experts",
    gate_up: "mlp.experts.gate_up_proj",
    down: "mlp.experts.down_proj",
    renames: &[],
    numbered: false,
};

const FEED_FORWARD: Family = Family {
    container: "feed_forward.experts",
    gate_up: "feed_forward.experts.gate_up_proj",
    down: "feed_forward.experts.down_proj",
    ..MLP
};

const GRANITE: Family = Family {
    model_types: &["granitemoe", "granitemoeshared", "granitemoehybrid"],
    container: "block_sparse_moe.experts",
    gate_up: "block_sparse_moe.experts.gate_up_proj",
    down: "block_sparse_moe.experts.down_proj",
    renames: &[("block_sparse_moe.router.layer", "block_sparse_moe.router")],
    ..MLP
};

#[rustfmt::skip]
const FAMILIES: &[Family] = &[
    Family {
        model_types: &[
            "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "flex_olmo", "glm4_moe",
            "glm4_moe_lite", "glm4v_moe", "glm4v_moe_text", "glm_moe_dsa", "hunyuan_v1_moe",
            "mellum", "olmoe", "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next",
            "qwen3_omni_moe_text", "solar_open",
        ],
        ..MLP
    },
    Family {
        model_types: &["ernie4_5_moe"],
        renames: &[("mlp.moe_statics", "mlp.gate.moe_statics")],
        ..MLP
    },
    Family {
        model_types: &["exaone_moe"],
        renames: &[("mlp.e_score_correction_bias", "mlp.gate.e_score_correction_bias")],
        ..MLP
    },
    Family {
        model_types: &["mixtral", "minimax", "minimax_m2"],
        renames: &[("block_sparse_moe", "mlp")],
        numbered: true,
        ..MLP
    },
    Family {
        model_types: &["phimoe"],
        renames: &[("block_sparse_moe.gate", "mlp.router"), ("block_sparse_moe", "mlp")],
        numbered: true,
        ..MLP
    },
    Family { model_types: &["jamba"], ..FEED_FORWARD },
    Family { model_types: &["lfm2_moe"], numbered: true, ..FEED_FORWARD },
    Family {
        model_types: &["gemma4", "gemma4_text"],
        container: "experts",
        gate_up: "experts.gate_up_proj",
        down: "experts.down_proj",
        ..MLP
    },
    GRANITE,
    // The same family as it was written before its experts had names of their own.
    Family { gate_up: "block_sparse_moe.input_linear.weight", down: "block_sparse_moe.output_linear.weight", ..GRANITE },
    Family { model_types: &["llama4", "llama4_text"], layout: Layout::InOut, ..FEED_FORWARD },
    // As published, and as transformers 5 saves it.
    Family { model_types: &["qwen3_vl_moe", "qwen3_vl_moe_text"], layout: Layout::InOut, ..MLP },
    Family { model_types: &["qwen3_vl_moe", "qwen3_vl_moe_text"], ..MLP },
    Family { model_types: &["gpt_oss"], layout: Layout::InOutInterleaved, ..MLP },
];

/// One matrix of a stack.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) name: String,
    /// [out, in].
    pub(crate) shape: [u64; 2],
    pub(crate) slice: Slice,
    pub(crate) expert: u64,
    /// First row inside its expert's stored matrix; counts for [`Layout::OutIn`] only.
    pub(crate) row: u64,
}

/// A tensor that the table knows as a stack of experts.
struct Stack {
    container: String,
    holds: Holds,
    layout: Layout,
}

/// The families of one model.
pub(crate) struct Experts {
    families: Vec<&'static Family>,
    model_types: Vec<String>,
    hidden: Option<u64>,
}

impl Experts {
    pub(crate) fn of(config: &ModelConfig) -> Experts {
        let text = config.raw.get("text_config");
        let mut model_types = vec![config.model_type.clone()];
        let nested = text.and_then(|text| text.get("model_type")).and_then(Value::as_str);
        model_types.extend(nested.filter(|nested| *nested != config.model_type).map(str::to_owned));
        // The first type that the table knows decides alone.
        let families = model_types
            .iter()
            .map(|known| {
                FAMILIES.iter().filter(|family| family.model_types.contains(&known.as_str())).collect()
            })
            .find(|families: &Vec<_>| !families.is_empty())
            .unwrap_or_default();
        let hidden = text
            .and_then(|text| text.get("hidden_size"))
            .or_else(|| look_up(&config.raw, "hidden_size"))
            .and_then(Value::as_u64);
        Experts { families, model_types, hidden }
    }

    /// The model's types as messages show them.
    pub(crate) fn model_type(&self) -> String {
        self.model_types.join("/")
    }

    /// The canonical name of a tensor.
    pub(crate) fn canonical(&self, name: &str) -> String {
        let Some(family) = self.families.first() else { return name.to_owned() };
        let mut name = format!(".{name}.");
        for (from, to) in family.renames {
            name = name.replace(&format!(".{from}."), &format!(".{to}."));
        }
        let mut parts: Vec<&str> = name[1..name.len() - 1].split('.').collect();
        for at in 2..parts.len() {
            let expert = parts[at - 1];
            let is_expert = !expert.is_empty() && expert.bytes().all(|byte| byte.is_ascii_digit());
            if family.numbered && is_expert && parts[at - 2] == "experts" {
                parts[at] = match parts[at] {
                    "w1" => "gate_proj",
                    "w3" => "up_proj",
                    "w2" => "down_proj",
                    other => other,
                };
            }
        }
        parts.join(".")
    }

    /// The matrices of a tensor that the table has as a stack, or what is wrong with its sides; `None` if it is none.
    pub(crate) fn take_apart(
        &self,
        canonical: &str,
        shape: &[u64],
    ) -> Option<Result<(Layout, Vec<Part>), String>> {
        let stacks: Vec<Stack> = self.families.iter().filter_map(|family| stack(family, canonical)).collect();
        let mut fitting = stacks.iter().map(|stack| Ok((stack.layout, self.parts(stack, shape)?)));
        let first = fitting.next()?;
        let others: Vec<_> = fitting.filter_map(Result::ok).collect();
        Some(match (first, others.as_slice()) {
            (first, []) => first,
            (Err(_), [_]) => Ok(others.into_iter().next()?),
            _ => {
                Err(format!("its shape is {shape:?}, which fits both layouts that this family is written in"))
            }
        })
    }

    /// The matrices of a stack of these sides, or what is wrong with the sides.
    fn parts(&self, stack: &Stack, shape: &[u64]) -> Result<Vec<Part>, String> {
        let &[experts, rows, cols] = shape else {
            return Err(format!("its shape is {shape:?}, a stack of experts has three sides"));
        };
        if shape.contains(&0) {
            return Err(format!("its shape is {shape:?}, a side of a stack of experts is above zero"));
        }
        if experts > EXPERTS_MAX {
            return Err(format!("its shape is {shape:?}, at most {EXPERTS_MAX} experts are read"));
        }
        let (out, into) = if stack.layout == Layout::OutIn { (rows, cols) } else { (cols, rows) };
        let (hidden_is, side) = match stack.holds {
            Holds::GateUp => (into, "in"),
            Holds::Down => (out, "out"),
        };
        if let Some(hidden) = self.hidden.filter(|hidden| *hidden != hidden_is) {
            return Err(format!(
                "its shape is {shape:?}, which has {hidden_is} where this family's layout has the {side} side of \
                 {hidden}"
            ));
        }
        let halves = stack.holds == Holds::GateUp;
        if halves && !out.is_multiple_of(2) {
            return Err(format!("its shape is {shape:?}, gate and up do not halve {out}"));
        }
        let half = out / 2;
        let mut parts = Vec::with_capacity(experts as usize * if halves { 2 } else { 1 });
        for expert in 0..experts {
            // Below the element count of the tensor, which was checked to fit.
            let start = expert * rows * cols;
            let mut add = |projection: &str, shape: [u64; 2], row: u64, start: u64, strides: [u64; 2]| {
                let [row_stride, col_stride] = strides;
                let name = format!("{}.{expert}.{projection}.weight", stack.container);
                parts.push(Part { name, shape, slice: Slice { start, row_stride, col_stride }, expert, row });
            };
            match (stack.holds, stack.layout) {
                (Holds::Down, Layout::OutIn) => add("down_proj", [out, into], 0, start, [cols, 1]),
                (Holds::Down, _) => add("down_proj", [out, into], 0, start, [1, cols]),
                (Holds::GateUp, Layout::OutIn) => {
                    add("gate_proj", [half, into], 0, start, [cols, 1]);
                    add("up_proj", [half, into], half, start + half * cols, [cols, 1]);
                }
                (Holds::GateUp, Layout::InOut) => {
                    add("gate_proj", [half, into], 0, start, [1, cols]);
                    add("up_proj", [half, into], 0, start + half, [1, cols]);
                }
                (Holds::GateUp, Layout::InOutInterleaved) => {
                    add("gate_proj", [half, into], 0, start, [2, cols]);
                    add("up_proj", [half, into], 0, start + 1, [2, cols]);
                }
            }
        }
        Ok(parts)
    }
}

/// What a tensor of this canonical name is in a family, if it is a stack.
fn stack(family: &Family, canonical: &str) -> Option<Stack> {
    [(family.gate_up, Holds::GateUp), (family.down, Holds::Down)].into_iter().find_map(|(ending, holds)| {
        let front = canonical.strip_suffix(ending)?;
        let container = format!("{front}{}", family.container);
        (front.is_empty() || front.ends_with('.')).then_some(Stack {
            container,
            holds,
            layout: family.layout,
        })
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use serde_json::json;

    fn experts(raw: Value) -> Experts {
        Experts::of(&ModelConfig::from_json(raw, Path::new("config.json")).unwrap())
    }

    #[test]
    fn model_type_is_in_the_table_once_per_ending() {
        for (n, family) in FAMILIES.iter().enumerate() {
            for other in &FAMILIES[n + 1..] {
                let both = family.model_types.iter().any(|name| other.model_types.contains(name));
                let differ = family.gate_up != other.gate_up || family.layout != other.layout;
                assert!(!both || differ, "{:?}", family.model_types);
                assert!(!both || family.renames == other.renames, "{:?}", family.model_types);
            }
        }
    }

    #[test]
    fn names_of_mixtral_and_its_kin() {
        let cases = [
            ("mixtral", "block_sparse_moe.experts.10.w1.weight", "mlp.experts.10.gate_proj.weight"),
            ("mixtral", "block_sparse_moe.experts.0.w3.weight", "mlp.experts.0.up_proj.weight"),
            ("mixtral", "block_sparse_moe.experts.0.w2.bias", "mlp.experts.0.down_proj.bias"),
            ("mixtral", "block_sparse_moe.gate.weight", "mlp.gate.weight"),
            ("phimoe", "block_sparse_moe.gate.weight", "mlp.router.weight"),
            ("lfm2_moe", "feed_forward.experts.1.w2.weight", "feed_forward.experts.1.down_proj.weight"),
            ("lfm2_moe", "feed_forward.w2.weight", "feed_forward.w2.weight"),
            ("granitemoe", "block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"),
            ("ernie4_5_moe", "mlp.moe_statics.x", "mlp.gate.moe_statics.x"),
            ("ernie4_5_moe", "mlp.gate.moe_statics.x", "mlp.gate.moe_statics.x"),
            ("exaone_moe", "mlp.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),
            ("llama", "block_sparse_moe.experts.0.w1.weight", "block_sparse_moe.experts.0.w1.weight"),
        ];
        for (model_type, stored, canonical) in cases {
            let experts = experts(json!({"model_type": model_type, "num_hidden_layers": 1}));
            let layer = "model.layers.3.";
            assert_eq!(experts.canonical(&format!("{layer}{stored}")), format!("{layer}{canonical}"));
        }
    }

    #[test]
    fn nested_text_model_decides_where_the_outer_type_is_unknown() {
        let experts = experts(json!({"model_type": "wrapper", "num_hidden_layers": 1,
            "text_config": {"model_type": "gpt_oss", "hidden_size": 6}}));
        assert_eq!((experts.model_type().as_str(), experts.hidden), ("wrapper/gpt_oss", Some(6)));
        let (layout, _) =
            experts.take_apart("model.layers.0.mlp.experts.down_proj", &[2, 4, 6]).unwrap().unwrap();
        assert_eq!(layout, Layout::InOutInterleaved);
        assert!(experts.take_apart("model.layers.0.xmlp.experts.down_proj", &[2, 4, 6]).is_none());
    }

    #[test]
    fn family_that_is_written_in_two_layouts() {
        let name = "model.language_model.layers.0.mlp.experts.gate_up_proj";
        let mut raw = json!({"model_type": "qwen3_vl_moe", "text_config": {"model_type": "qwen3_vl_moe_text",
            "num_hidden_layers": 1, "hidden_size": 6}});
        let known = experts(raw.clone());
        let layout = |shape: &[u64]| known.take_apart(name, shape).unwrap().map(|(layout, _)| layout);
        assert_eq!(layout(&[2, 6, 8]), Ok(Layout::InOut));
        assert_eq!(layout(&[2, 8, 6]), Ok(Layout::OutIn));
        assert!(layout(&[2, 6, 6]).unwrap_err().contains("fits both"));
        assert!(layout(&[2, 8, 10]).unwrap_err().contains("side of 6"));
        raw["text_config"]["hidden_size"] = Value::Null;
        assert!(experts(raw).take_apart(name, &[2, 6, 8]).unwrap().unwrap_err().contains("fits both"));
    }

    #[test]
    fn sides_that_cannot_be_a_stack() {
        let experts = experts(json!({"model_type": "qwen3_moe", "num_hidden_layers": 1, "hidden_size": 6}));
        let parts = |shape| experts.take_apart("model.layers.0.mlp.experts.gate_up_proj", shape).unwrap();
        assert_eq!(parts(&[3, 8, 6]).unwrap().1.len(), 6);
        for (shape, problem) in [
            (&[8, 6][..], "three sides"),
            (&[3, 6, 8], "in side of 6"),
            (&[3, 7, 6], "do not halve 7"),
            (&[1 << 40, 0, 6], "above zero"),
            (&[1 << 20, 2, 6], "at most 65536 experts"),
        ] {
            let found = parts(shape).unwrap_err();
            assert!(found.contains(problem), "{found}");
        }
    }
}
