#!/usr/bin/env python3
"""How much of D = aligned - degraded do adapters miss, and how much must any factors of that rank miss?

residual   sum |D - s B A|^2 / sum |D|^2 over all linear weights, in f64, s = alpha / r as PEFT applies it; a module
           that the adapter lacks is missed whole
optimum    the same with the exact singular values instead: the squares beyond the rank. They are the eigenvalues of
           the smaller Gram matrix of D in f64, kept in PAIR/spectrum.safetensors. Relative to |D|^2 they carry an
           error near 1e-15, far below any residual here.

Usage: residual.py PAIR ADAPTER...       one JSON object on stdout: modules, parameters, spectrum, residuals
"""

import json
import math
import re
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


class Adapter:
    def __init__(self, folder):
        self.config = json.loads((Path(folder) / "adapter_config.json").read_text())
        self.tensors = load_file(Path(folder) / "adapter_model.safetensors")
        self.used = set()

    def product(self, module):
        """s B A of one module, or None."""
        names = [f"base_model.model.{module}.lora_{side}.weight" for side in "AB"]
        if not set(names) & self.tensors.keys():
            return None
        a, b = (self.tensors[name].double() for name in names)
        self.used.update(names)
        rank, alpha = self.setting("r", "rank_pattern", module), self.setting("lora_alpha", "alpha_pattern", module)
        assert rank == a.shape[0] == b.shape[1], f"{module}: rank {rank}, factors {a.shape} and {b.shape}"
        return (b @ a) * (alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))

    def setting(self, key, patterns, module):
        for pattern, value in (self.config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return self.config[key]

    def leftover(self):
        """Factors that belong to no module of the pair: then the number would not describe the whole adapter."""
        return sorted(name for name in self.tensors.keys() - self.used if re.search(r"lora_(embedding_)?[AB]", name)
                      and not name.endswith(".bias"))


def spectrum(difference):
    """Squared singular values, largest first."""
    tall = difference if difference.shape[0] >= difference.shape[1] else difference.T
    return torch.linalg.eigvalsh(tall.T @ tall).clamp(min=0).flip(0)


def main():
    pair, folders = Path(sys.argv[1]), sys.argv[2:]
    adapters = {folder: Adapter(folder) for folder in folders}
    cache = pair / "spectrum.safetensors"
    squares = load_file(cache) if cache.exists() else {}
    missed, total, parameters = dict.fromkeys(folders, 0.0), 0.0, 0
    with (safe_open(pair / "aligned" / "model.safetensors", "pt") as left,
          safe_open(pair / "degraded" / "model.safetensors", "pt") as right):
        names = [name for name in left.keys() if name.endswith("_proj.weight")]
        for name in names:
            difference = left.get_tensor(name).double() - right.get_tensor(name).double()
            energy = difference.square().sum().item()
            total += energy
            parameters += difference.numel()
            if not cache.exists():
                squares[name] = spectrum(difference)
            for folder, adapter in adapters.items():
                product = adapter.product(name.removesuffix(".weight"))
                missed[folder] += energy if product is None else (difference - product).square().sum().item()
    for folder, adapter in adapters.items():
        if adapter.leftover():
            sys.exit(f"`{folder}` has factors of no module of the pair: {adapter.leftover()[:3]}")
    if not cache.exists():
        save_file(squares, cache.with_suffix(".partial"))
        cache.with_suffix(".partial").rename(cache)
    rank_max = max(min(s.shape) for s in squares.values())
    print(json.dumps({
        "modules": len(names),
        "parameters": parameters,
        "optimum": [sum(s[rank:].sum().item() for s in squares.values()) / total for rank in range(rank_max)],
        "residuals": {folder: missed[folder] / total for folder in folders},
    }))


if __name__ == "__main__":
    main()
