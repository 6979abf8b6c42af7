#!/usr/bin/env python3
"""Does `safegene recover` compute what its methods' papers say, and does PEFT load what it writes?

Every method is applied to a target of the shipped lab, stored as f32, and computed again with torch in f64 from its formula,
with no code in common: square matrices C, exact singular value decompositions, PEFT's own `linear` combination.

  resta, wise-ft          weights                                                <= 1e-6 of a tensor's largest value
  low-rank-restore, lox   what the cut difference misses, over the optimum's     <= 1.005 (squared norms)
  safelora                cosines and norm ratios                                <= 1e-5; the same modules; weights as above
  safemerge exact         weights as above
  safemerge published     B A against PEFT's add_weighted_adapter                <= 1e-5 of a product's largest value
  adapters                merged by PEFT against our merged folder               <= 1e-5 of a tensor's largest value

Usage: check_recover.py --bin FOLDER [--lab lab/llama] [--out RESULT.json]
FOLDER holds the binary `safegene` (target/release). Exit status 1 if any check fails.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from check_logits import call, copy_as

WEIGHTS, FACTORS, NUMBERS, OPTIMUM = 1e-6, 1e-5, 1e-5, 1.005


def weights(folder):
    return {name: t.double() for name, t in load_file(Path(folder) / "model.safetensors").items()}


def linear(name):
    return ".layers." in name and name.endswith("proj.weight")


def lora(folder):
    """B, A and scale of every weight that an adapter changes."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[key.replace("lora_A", "lora_B")].double()
            found[module + ".weight"] = (b, tensors[key].double(), config["lora_alpha"] / config["r"])
    return found


def cut(difference, rank):
    u, s, vh = torch.linalg.svd(difference, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


class Check:
    def __init__(self, args, tmp):
        self.bin, self.lab, self.tmp = Path(args.bin), Path(args.lab), Path(tmp)
        self.results, self.failed = [], False
        copy_as(self.lab / "aligned", self.tmp / "aligned", "f32")
        for name in ("targets/topic-1", "targets/sentiment-0", "degraded-mild"):
            self.adapter(name)
        self.aligned = weights(self.tmp / "aligned")
        copy_as(self.lab / "base", self.tmp / "base", "f32")
        self.base = weights(self.tmp / "base")
        self.update = {name: s * b @ a for name, (b, a, s) in lora(self.tmp / "topic-1").items()}
        self.target = {name: w + self.update.get(name, 0) for name, w in self.aligned.items()}

    def note(self, what, ok, **numbers):
        self.failed |= not ok
        self.results.append({"check": what, "ok": bool(ok), **numbers})
        shown = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
        print(f"{'ok' if ok else 'FAILED':7}{what}: {shown}", flush=True)

    def adapter(self, name):
        """An adapter over the f32 copy, its factors as they are."""
        folder = self.tmp / Path(name).name
        copy_as(self.lab / name, folder, "f32")
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "../aligned"
        (folder / "adapter_config.json").write_text(json.dumps(config))

    def recover(self, method, target, out, *more):
        sides = ["--aligned", self.tmp / "aligned"] if method != "lox" else []
        text = call(self.bin / "safegene", "-q", "recover", "--json", "--method", method, "--target", self.tmp / target,
                    "--out", self.tmp / out, *sides, *more)
        return json.loads(text)

    def same(self, what, got, want, tolerance=WEIGHTS):
        worst = max(((got[n] - want[n]).abs().max() / want[n].abs().max().clamp_min(1e-30)).item() for n in want)
        self.note(what, worst <= tolerance and got.keys() == want.keys(), tensors=len(want), worst_relative=worst)

    def arithmetic(self):
        degraded = {n: self.aligned[n] + s * b @ a for n, (b, a, s) in lora(self.tmp / "degraded-mild").items()}
        self.recover("resta", "topic-1", "resta", "--degraded", self.tmp / "degraded-mild", "--gamma", 0.7)
        want = {n: w + 0.7 * (self.aligned[n] - degraded.get(n, self.aligned[n])) for n, w in self.target.items()}
        self.same("resta", weights(self.tmp / "resta"), want)
        self.recover("wise-ft", "topic-1", "wise", "--lambda", 0.3)
        self.same("wise-ft", weights(self.tmp / "wise"), {n: 0.7 * self.aligned[n] + 0.3 * w for n, w in self.target.items()})

    def low_rank(self):
        self.recover("low-rank-restore", "topic-1", "restored", "--rank", 4, "--gamma", 0.5)
        self.missed("low-rank-restore", "restored", self.target, self.aligned, self.target, 4, 0.5)
        self.recover("lox", "aligned", "lox", "--base", self.tmp / "base")
        self.missed("lox", "lox", self.aligned, self.aligned, self.base, 6, 1.25)

    def missed(self, what, out, start, one, other, rank, coefficient):
        got, worst = weights(self.tmp / out), 0.0
        for name in filter(linear, got):
            difference = one[name] - other[name]
            best = (difference - cut(difference, rank)).square().sum()
            ours = (difference - (got[name] - start[name]) / coefficient).square().sum()
            worst = max(worst, (ours / best).item())
        self.note(what, worst <= OPTIMUM, rank=rank, worst_missed_over_optimum=worst)

    def seen(self):
        """Cosine, norm ratio and C times the update of every module, by square matrices."""
        found = {}
        for name, update in self.update.items():
            v = self.aligned[name] - self.base[name]
            through = v @ v.T / v.norm() @ update
            cosine = torch.nn.functional.cosine_similarity(through.reshape(1, -1), update.reshape(1, -1)).item()
            found[name] = (cosine, (through.norm() / update.norm()).item(), through)
        return found

    def safelora(self):
        seen, base = self.seen(), ["--base", self.tmp / "base"]
        chosen = set(sorted(seen, key=lambda n: seen[n][0])[:10])
        want = {n: self.aligned[n] + seen[n][2] if n in chosen else w for n, w in self.target.items()}
        report = self.recover("safelora", "topic-1", "safelora", *base, "--modules", 10, "--as", "both")
        worst = max(
            max(abs(m["cosine"] - seen[m["name"] + ".weight"][0]), abs(m["norm_ratio"] / seen[m["name"] + ".weight"][1] - 1))
            for m in report["modules"])
        ours = {m["name"] + ".weight" for m in report["modules"] if m["action"] == "projected"}
        self.note("safelora: cosines and norm ratios", worst <= NUMBERS and len(report["modules"]) == len(seen),
                  modules=len(seen), worst=worst)
        self.note("safelora: modules", ours == chosen, projected=len(ours))
        self.same("safelora", weights(self.tmp / "safelora" / "merged"), want)
        self.by_peft("safelora", "safelora")
        # The same target as a whole model.
        self.recover("wise-ft", "topic-1", "whole", "--lambda", 1)
        self.recover("safelora", "whole", "safelora-whole", *base, "--modules", 10)
        self.same("safelora of a whole model", weights(self.tmp / "safelora-whole"), want, FACTORS)
        # Through orthonormal directions: where singular values lie near each other the subspace is known less well.
        self.recover("safelora", "topic-1", "orthonormal", *base, "--tau", 1, "--variant", "orthonormal", "--rank", 12)
        want = {}
        for name, update in self.update.items():
            u = torch.linalg.svd(self.aligned[name] - self.base[name])[0][:, :12]
            want[name] = self.aligned[name] + u @ (u.T @ update)
        got = weights(self.tmp / "orthonormal")
        self.same("safelora orthonormal", {n: got[n] for n in want}, want, 1e-2)

    def safemerge(self):
        seen, more = self.seen(), ["--base", self.tmp / "base", "--safety-adapter", self.tmp / "sentiment-0"]
        ours, theirs = lora(self.tmp / "topic-1"), lora(self.tmp / "sentiment-0")
        tau = sum(sorted(cosine for cosine, _, _ in seen.values())[19:21]) / 2
        want = dict(self.target)
        for name, (cosine, _, _) in seen.items():
            if cosine < tau:
                b, a, s = theirs[name]
                want[name] = self.aligned[name] + 0.8 * self.update[name] + 0.2 * s * b @ a
        report = self.recover("safemerge", "topic-1", "safemerge", *more, "--tau", tau, "--as", "both")
        merged = sum(m["action"] == "merged" for m in report["modules"])
        self.note("safemerge: modules", merged == 20, merged=merged, of=len(seen))
        self.same("safemerge exact", weights(self.tmp / "safemerge" / "merged"), want)
        self.by_peft("safemerge", "safemerge")
        # PEFT's own combination of the two adapters, every module merged.
        self.recover("safemerge", "topic-1", "published", *more, "--tau", 1, "--variant", "published", "--as", "adapter")
        model = AutoModelForCausalLM.from_pretrained(self.tmp / "aligned", dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(model, self.tmp / "topic-1", adapter_name="target")
        model.load_adapter(self.tmp / "sentiment-0", adapter_name="safety")
        model.add_weighted_adapter(["target", "safety"], [0.8, 0.2], adapter_name="both", combination_type="linear")
        made, products = lora(self.tmp / "published"), {}
        for name, module in model.base_model.model.named_modules():
            if hasattr(module, "lora_A") and "both" in module.lora_A:
                b, a = module.lora_B["both"].weight.double(), module.lora_A["both"].weight.double()
                products[name + ".weight"] = module.scaling["both"] * (b @ a).detach()
        self.same("safemerge published, ours vs peft", {n: s * b @ a for n, (b, a, s) in made.items()}, products, FACTORS)

    def by_peft(self, what, out):
        model = AutoModelForCausalLM.from_pretrained(self.tmp / "aligned", dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(model, self.tmp / out / "adapter").merge_and_unload()
        theirs = {name: t.double() for name, t in model.state_dict().items()}
        ours = weights(self.tmp / out / "merged")
        self.same(f"{what}: adapter merged by peft vs our merged folder", {n: theirs[n] for n in ours}, ours, FACTORS)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", required=True)
    parser.add_argument("--lab", default="lab/llama")
    parser.add_argument("--out")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as tmp:
        check = Check(args, tmp)
        check.arithmetic()
        check.low_rank()
        check.safelora()
        check.safemerge()
        result = {
            "schema": 1,
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "transformers": transformers.__version__, "peft": peft.__version__},
            "machine": {"arch": platform.machine(), "cores": os.cpu_count()},
            "checks": check.results,
        }
        if args.out:
            Path(args.out).write_text(json.dumps(result, indent=2) + "\n")
        sys.exit(1 if check.failed else 0)


if __name__ == "__main__":
    main()
