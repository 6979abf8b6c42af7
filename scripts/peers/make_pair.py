#!/usr/bin/env python3
"""Two folders in the shape of Qwen2-0.5B whose difference is known: FOLDER/aligned and FOLDER/degraded.

aligned    every weight and bias N(0, 0.02^2) as bf16, norms one
degraded   bf16(aligned + change) for the linear weights of all layers, everything else equal; the change has rank 64,
           singular values i^-0.7 and 3 % of the weight's Frobenius norm

Both are 0.99 GB with tied embeddings and come from one seed. Rounding to bf16 adds a little noise of full rank, so no
factors of any rank reproduce the difference. No tokenizer: nothing here reads text.

Usage: make_pair.py FOLDER       an existing pair of this recipe is kept
"""

import json
import shutil
import sys
from pathlib import Path

RECIPE = {"shape": "Qwen2-0.5B", "dtype": "bfloat16", "seed": 1, "std": 0.02, "change_rank": 64,
          "change_singular_values": "i^-0.7", "change_relative_frobenius": 0.03, "version": 1}
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 131072,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def shapes():
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    kv = hidden // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    yield "model.embed_tokens.weight", (CONFIG["vocab_size"], hidden)
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.mlp.down_proj.weight", (hidden, inner)
        yield f"{at}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{at}.mlp.up_proj.weight", (inner, hidden)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        for name, rows in (("k", kv), ("q", hidden), ("v", kv)):
            yield f"{at}.self_attn.{name}_proj.bias", (rows,)
            yield f"{at}.self_attn.{name}_proj.weight", (rows, hidden)
        yield f"{at}.self_attn.o_proj.weight", (hidden, hidden)
    yield "model.norm.weight", (hidden,)


def make(folder):
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(RECIPE["seed"])

    def normal(*shape):
        return torch.empty(shape).normal_(generator=draw)

    aligned, degraded = {}, {}
    sigma = torch.arange(1, RECIPE["change_rank"] + 1, dtype=torch.float64).pow(-0.7).float()
    for name, shape in shapes():
        if name.endswith("norm.weight"):
            weight = torch.ones(shape).bfloat16()
        else:
            weight = (normal(*shape) * RECIPE["std"]).bfloat16()
        aligned[name] = degraded[name] = weight
        if name.endswith("_proj.weight"):
            left, right = (torch.linalg.qr(normal(n, len(sigma))).Q for n in shape)
            change = (left * sigma) @ right.T
            change *= RECIPE["change_relative_frobenius"] * weight.float().norm() / change.norm()
            degraded[name] = (weight.float() + change).bfloat16()
    for side, tensors in (("aligned", aligned), ("degraded", degraded)):
        (folder / side).mkdir(parents=True)
        save_file(tensors, folder / side / "model.safetensors", metadata={"format": "pt"})
        (folder / side / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def main():
    folder = Path(sys.argv[1])
    stamp = folder / "recipe.json"
    if stamp.exists() and json.loads(stamp.read_text()) == RECIPE:
        return
    if folder.exists() and not stamp.exists():
        sys.exit(f"`{folder}` exists and is not a pair")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    make(partial)
    (partial / "recipe.json").write_text(json.dumps(RECIPE) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


if __name__ == "__main__":
    main()
