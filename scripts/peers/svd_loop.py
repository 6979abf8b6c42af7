#!/usr/bin/env python3
"""The loop one writes by hand: rank-R factors of ALIGNED - DEGRADED by torch.svd_lowrank, as a PEFT adapter.

Every linear weight of the layers, f32 difference, svd_lowrank(q=2R, niter=2), the R largest kept as f32 factors. The
last line on stdout is JSON: seconds from after the imports to the file written, and the peak resident set.

Usage: svd_loop.py ALIGNED DEGRADED RANK THREADS OUT
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def main():
    started = time.perf_counter()
    aligned, degraded, rank, threads, out = sys.argv[1:]
    rank, out = int(rank), Path(out)
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    factors, modules = {}, []
    with (safe_open(Path(aligned) / "model.safetensors", "pt") as left,
          safe_open(Path(degraded) / "model.safetensors", "pt") as right):
        for name in left.keys():
            if not name.endswith("_proj.weight"):
                continue
            difference = left.get_tensor(name).float() - right.get_tensor(name).float()
            u, s, v = torch.svd_lowrank(difference, q=2 * rank, niter=2)
            root, module = s[:rank].sqrt(), name.removesuffix(".weight")
            factors[f"base_model.model.{module}.lora_A.weight"] = (v[:, :rank] * root).T.contiguous()
            factors[f"base_model.model.{module}.lora_B.weight"] = (u[:, :rank] * root).contiguous()
            modules.append(module)
    out.mkdir()
    save_file(factors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": degraded, "r": rank,
              "lora_alpha": rank, "target_modules": modules, "lora_dropout": 0.0, "bias": "none",
              "inference_mode": True}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    elapsed = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"loop_s": elapsed, "peak_rss_bytes": peak}))


if __name__ == "__main__":
    main()
