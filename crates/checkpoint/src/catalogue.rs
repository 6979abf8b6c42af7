//! What a tensor is for, from its name and shape alone.
//!
//! A linear module is any 2-D `weight` below a decoder layer; embeddings and head are known by their names; whatever is
//! none of these is `Outside`. Names of the plain families and of text models nested in a larger one are understood.
//!
//! Not here: which tensors a method changes; that is the caller's choice.

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The weight of a linear module of a decoder layer.
    Linear {
        /// Layer number.
        layer: u32,
    },
    /// Another tensor of a decoder layer: a norm, a bias.
    LayerOther {
        /// Layer number.
        layer: u32,
    },
    /// The token embedding.
    Embedding,
    /// The output head.
    Head,
    /// Part of the model but of no layer, such as the final norm.
    Outside,
    /// A buffer that is computed, not trained.
    Buffer,
}

impl Role {
    /// The layer, for tensors of one.
    pub fn layer(self) -> Option<u32> {
        match self {
            Role::Linear { layer } | Role::LayerOther { layer } => Some(layer),
            _ => None,
        }
    }
}

/// Prefixes of decoder layers: plain, and two nestings of text models in larger ones.
const LAYERS: [&str; 3] = ["model.layers.", "model.language_model.layers.", "language_model.model.layers."];

/// What the tensor of this name and shape is for.
pub fn role(name: &str, shape: &[u64]) -> Role {
    if ends_in(name, "rotary_emb.inv_freq") {
        return Role::Buffer;
    }
    if let Some((layer, rest)) = layer_of(name) {
        let linear = shape.len() == 2 && rest.ends_with(".weight");
        return if linear { Role::Linear { layer } } else { Role::LayerOther { layer } };
    }
    if ends_in(name, "embed_tokens.weight") {
        Role::Embedding
    } else if ends_in(name, "lm_head.weight") {
        Role::Head
    } else {
        Role::Outside
    }
}

/// The module of a `weight`: `model.layers.0.mlp.up_proj` of `model.layers.0.mlp.up_proj.weight`.
pub fn module_of(tensor: &str) -> Option<&str> {
    tensor.strip_suffix(".weight").filter(|module| !module.is_empty())
}

/// Layer number and what follows its dot.
fn layer_of(name: &str) -> Option<(u32, &str)> {
    let rest = LAYERS.iter().find_map(|prefix| name.strip_prefix(prefix))?;
    let (number, rest) = rest.split_once('.')?;
    let layer: u32 = number.parse().ok()?;
    // `+1` and `01` parse but are not how any writer spells a layer.
    (layer.to_string() == number).then_some((layer, rest))
}

/// Whether `name` is `ending` or ends in a dot and `ending`.
fn ends_in(name: &str, ending: &str) -> bool {
    name.strip_suffix(ending).is_some_and(|front| front.is_empty() || front.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_of_a_decoder() {
        let cases: &[(&str, &[u64], Role)] = &[
            ("model.layers.0.self_attn.q_proj.weight", &[8, 8], Role::Linear { layer: 0 }),
            ("model.layers.31.mlp.experts.7.w1.weight", &[8, 8], Role::Linear { layer: 31 }),
            ("model.layers.3.input_layernorm.weight", &[8], Role::LayerOther { layer: 3 }),
            ("model.layers.3.self_attn.q_proj.bias", &[8], Role::LayerOther { layer: 3 }),
            ("model.layers.3.mlp.experts.gate_up_proj", &[4, 8, 8], Role::LayerOther { layer: 3 }),
            ("model.layers.3.self_attn.rotary_emb.inv_freq", &[4], Role::Buffer),
            ("rotary_emb.inv_freq", &[4], Role::Buffer),
            ("model.embed_tokens.weight", &[100, 8], Role::Embedding),
            ("lm_head.weight", &[100, 8], Role::Head),
            ("model.norm.weight", &[8], Role::Outside),
            ("model.language_model.layers.2.mlp.up_proj.weight", &[8, 8], Role::Linear { layer: 2 }),
            ("vision_tower.encoder.layers.2.fc1.weight", &[8, 8], Role::Outside),
            ("model.layers.01.mlp.up_proj.weight", &[8, 8], Role::Outside),
            ("model.layers.99999999999.mlp.up_proj.weight", &[8, 8], Role::Outside),
            ("model.layers.+1.mlp.up_proj.weight", &[8, 8], Role::Outside),
            ("not_embed_tokens.weight", &[8, 8], Role::Outside),
        ];
        for &(name, shape, want) in cases {
            assert_eq!(role(name, shape), want, "{name}");
        }
    }

    #[test]
    fn module_of_a_weight() {
        assert_eq!(module_of("model.layers.0.mlp.up_proj.weight"), Some("model.layers.0.mlp.up_proj"));
        assert_eq!(module_of("model.layers.0.mlp.up_proj.bias"), None);
        assert_eq!(module_of(".weight"), None);
    }
}
