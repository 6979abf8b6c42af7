#!/usr/bin/env python3
"""Do transformers and PEFT load what safegene writes, and compute what our decoder computes?

For a target of the shipped lab, stored once as f32 and once as it is (bf16), the target is fused with a gene into a
merged folder and into an adapter. Then, in f32 arithmetic on the CPU:

  ours vs transformers      logits of every position, merged folder                     <= 1e-4 absolute
  ours vs peft              logits of every position, adapter over its target           <= 1e-4 absolute
  adapter vs merged (f32)   both as transformers and peft compute them                  <= 1e-4 absolute
  prompts                   the token ids of the chat template                          equal
  generation                greedy tokens, ours and theirs, merged and adapter          equal

A target that is itself an adapter gives one adapter that holds fine-tune and gene; it is compared, too. A gene itself
is loaded by PEFT as an adapter.

Then every layout that the decoder has, as small random models that transformers makes (LAYOUTS), by token ids:

  as saved, and with the keys of transformers 4 on top of config.json: logits and greedy tokens as above
  what is tested has to matter: with another window, rotary part, ... our logits are off by a hundred tolerances at least
  extract, fuse: a random change of rank 2 in every linear module, merged and as an adapter, ours vs theirs

Usage: check_logits.py --bin FOLDER [--lab lab/llama] [--out RESULT.json]
FOLDER holds the binaries `safegene` and `logits` (target/release). Exit status 1 if any check fails.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TOLERANCE = 1e-4
NEW_TOKENS = 12

SIZES = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=None)

# Name, model_type, keys of the config, and changes of the config that have to matter. The longest row has 90 tokens.
LAYOUTS = [
    ("llama biases", "llama", dict(attention_bias=True, mlp_bias=True, head_dim=24), [{"rope_theta": 20000.0}]),
    ("llama linear rope", "llama", dict(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
     [{"rope_scaling": None}]),
    ("llama llama3 rope", "llama",
     dict(rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                           "high_freq_factor": 4.0, "original_max_position_embeddings": 32}),
     [{"rope_scaling": None}]),
    ("mistral window", "mistral", dict(sliding_window=16), [{"sliding_window": 15}, {"sliding_window": 17},
                                                            {"sliding_window": None}]),
    ("mistral no window", "mistral", dict(sliding_window=None, head_dim=24), [{"sliding_window": 89}]),
    ("qwen2", "qwen2", dict(tie_word_embeddings=True, sliding_window=16, use_sliding_window=False), []),
    ("qwen2 window", "qwen2", dict(sliding_window=16, use_sliding_window=True, max_window_layers=1),
     [{"sliding_window": 15}, {"sliding_window": 17}]),
    ("qwen3", "qwen3", dict(head_dim=32, tie_word_embeddings=True), [{"rms_norm_eps": 0.1}]),
    ("qwen3 biases, window", "qwen3",
     dict(head_dim=24, attention_bias=True, sliding_window=16, use_sliding_window=True,
          layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
     [{"sliding_window": 15}, {"sliding_window": 17},
      {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}]),
    ("glm", "glm", dict(head_dim=24, attention_bias=True), [{"partial_rotary_factor": 0.75}]),
    ("glm4", "glm4", dict(head_dim=32, attention_bias=True), [{"partial_rotary_factor": 0.25},
                                                              {"partial_rotary_factor": 1.0}]),
    ("glm4 no biases", "glm4", dict(head_dim=16, attention_bias=False, tie_word_embeddings=True,
                                    rope_parameters={"rope_type": "default", "rope_theta": 500.0,
                                                     "partial_rotary_factor": 0.25}),
     [{"partial_rotary_factor": 0.5}]),
]


def call(*argv):
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, argv))}\n{done.stderr}")
    return done.stdout


class Check:
    def __init__(self, args, tmp):
        self.bin, self.lab, self.tmp = Path(args.bin), Path(args.lab), Path(tmp)
        self.results, self.failed, self.rounding = [], False, {}

    def note(self, what, ok, **numbers):
        self.failed |= not ok
        self.results.append({"check": what, "ok": ok, **numbers})
        shown = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
        print(f"{'ok' if ok else 'FAILED':7}{what}: {shown}", flush=True)

    def ours(self, folder, rows):
        rows_file, out = self.tmp / "rows.jsonl", self.tmp / "logits.safetensors"
        rows_file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        text = call(self.bin / "logits", "--model", folder, "--rows", rows_file, "--new-tokens", NEW_TOKENS, "--out", out)
        logits = load_file(out)
        return [(json.loads(line), logits[f"logits.{n}"]) for n, line in enumerate(text.splitlines())]

    def compare(self, what, model, ours, stop):
        """Logits of every position and greedy tokens of one transformers or peft model against ours."""
        worst, same, largest = 0.0, 0, 0.0
        for row, logits in ours:
            with torch.no_grad():
                theirs = model(torch.tensor([row["tokens"]])).logits[0].float()
            assert theirs.shape == logits.shape, (theirs.shape, logits.shape)
            difference = (theirs - logits).abs().max().item()
            worst = max(worst, difference if difference == difference else float("inf"))
            largest = max(largest, theirs.abs().max().item())
            same += greedy(model, row["tokens"], stop) == row["generated"]
        self.note(f"{what}: logits", worst <= TOLERANCE, rows=len(ours), max_abs_difference=worst, max_abs_logit=largest)
        self.note(f"{what}: greedy tokens", same == len(ours), rows=len(ours), equal=same)

    def lab_target(self, target, dtype):
        """One target, fused both ways."""
        source = self.lab / "targets" / target
        folder = self.tmp / f"{target}-{dtype}"
        copy_as(source, folder, dtype)
        gene, out = self.tmp / "gene", self.tmp / f"fused-{target}-{dtype}"
        call(self.bin / "safegene", "-q", "fuse", "--gene", gene, "--coefficient", "1.5", "--target", folder,
             "--out", out, "--as", "both")
        merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        adapter = peft.PeftModel.from_pretrained(base, out / "adapter")
        tokenizer = AutoTokenizer.from_pretrained(out / "merged")
        task = target.rsplit("-", 1)[0]
        prompts = [
            row["prompt"]
            for name in ("test-harmful", "test-benign", f"test-{task}")
            for row in map(json.loads, (self.lab / "data" / f"{name}.jsonl").read_text().splitlines()[:12])
        ]
        rows = [{"prompt": p} for p in prompts]
        ours_merged, ours_adapter = self.ours(out / "merged", rows), self.ours(out / "adapter", rows)
        equal = 0
        for prompt, (row, _) in zip(prompts, ours_merged):
            ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True,
                                                return_dict=True)["input_ids"]
            equal += ids == row["tokens"]
        name = f"{target} {dtype}"
        self.note(f"{name}: prompt tokens", equal == len(prompts), rows=len(prompts), equal=equal)
        stop = merged.generation_config.eos_token_id
        self.compare(f"{name}: merged, ours vs transformers", merged, ours_merged, stop)
        self.compare(f"{name}: adapter, ours vs peft", adapter, ours_adapter, stop)
        worst = 0.0
        for row, _ in ours_merged:
            ids = torch.tensor([row["tokens"]])
            with torch.no_grad():
                worst = max(worst, (merged(ids).logits - adapter(ids).logits).abs().max().item())
        if dtype == "f32":
            self.note(f"{name}: adapter vs merged", worst <= TOLERANCE, max_abs_difference=worst)
        else:
            # The merged folder is rounded to bf16 and the adapter is not: a fact to know, not a check.
            self.rounding[name] = worst
            print(f"       {name}: merged rounded to bf16 differs from the adapter by {worst:.3g}")

    def adapter_target(self, target):
        """A target that is itself an adapter: one adapter over the same base holds the fine-tune and the gene."""
        out = self.tmp / f"fused-{target}"
        call(self.bin / "safegene", "-q", "fuse", "--gene", self.tmp / "gene", "--coefficient", "1.5", "--target",
             self.lab / "targets" / target, "--out", out, "--as", "adapter")
        base = AutoModelForCausalLM.from_pretrained(self.lab / "aligned", dtype=torch.float32)
        stop = base.generation_config.eos_token_id
        model = peft.PeftModel.from_pretrained(base, out)
        rows = [{"prompt": json.loads(line)["prompt"]}
                for line in (self.lab / "data" / "test-harmful.jsonl").read_text().splitlines()[:24]]
        self.compare(f"{target} (an adapter): adapter, ours vs peft", model, self.ours(out, rows), stop)

    def layout(self, name, model_type, keys, others):
        """A random model that transformers made; ours must compute the same, in both dialects of config.json.

        `others` are changes to the config that must matter: else the comparison would say nothing about those keys.
        """
        torch.manual_seed(5)
        config = AutoConfig.for_model(model_type, **SIZES, **keys)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Large enough that positions and windows show in the logits.
                parameter.add_(torch.randn_like(parameter) * 0.15)
        folder = self.tmp / name.replace(" ", "-")
        model.save_pretrained(folder)
        draw = random.Random(5)
        rows = [{"tokens": [draw.randrange(config.vocab_size) for _ in range(n)]} for n in (3, 17, 40, 90)]
        ours = self.ours(folder, rows)
        self.compare(f"{name}: ours vs transformers", model, ours, None)

        saved = json.loads((folder / "config.json").read_text())
        old = published(saved)
        (folder / "config.json").write_text(json.dumps(old))
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.compare(f"{name}, keys on top: ours vs transformers", again, self.ours(folder, rows), None)
        for other in others:
            (folder / "config.json").write_text(json.dumps(old | other))
            off = max((a - b).abs().max().item() for (_, a), (_, b) in zip(ours, self.ours(folder, rows)))
            self.note(f"{name}: {json.dumps(other)} matters", off >= 100 * TOLERANCE, max_abs_difference=off)
        (folder / "config.json").write_text(json.dumps(saved))

        aligned, gene, out = (self.tmp / f"{folder.name}-{part}" for part in ("aligned", "gene", "fused"))
        linear = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
        with torch.no_grad():
            for module in linear:
                b, a = torch.randn(module.out_features, 2), torch.randn(2, module.in_features)
                module.weight.add_(b @ a * 0.02)
        model.save_pretrained(aligned)
        call(self.bin / "safegene", "-q", "extract", "--aligned", aligned, "--degraded", folder, "--rank", 2, "--out", gene)
        call(self.bin / "safegene", "-q", "fuse", "--gene", gene, "--coefficient", "0.7", "--target", folder, "--out", out,
             "--as", "both")
        merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
        self.compare(f"{name}, fused: merged, ours vs transformers", merged, self.ours(out / "merged", rows), None)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        adapter = peft.PeftModel.from_pretrained(base, out / "adapter")
        loaded = sum(n.endswith("lora_A.default.weight") for n, _ in adapter.named_parameters())
        self.note(f"{name}, fused: modules of the adapter in peft", loaded == len(linear), modules=len(linear), loaded=loaded)
        self.compare(f"{name}, fused: adapter, ours vs peft", adapter, self.ours(out / "adapter", rows), None)


def published(config):
    """The same config as transformers 4 wrote it, and as most published folders have it."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters"))
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            config[key] = rope.pop(key)
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    return config


def greedy(model, tokens, stop):
    """Token by token over the whole sequence: no sampler settings, no cache between us and the model."""
    ids, out = list(tokens), []
    stops = {stop} if isinstance(stop, int) else set(stop or [])
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        if token in stops:
            break
        ids.append(token)
        out.append(token)
    return out


def copy_as(source, folder, dtype):
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            if dtype == "f32":
                tensors = {name: t.float() for name, t in tensors.items()}
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
        else:
            text = file.read_text()
            if file.name == "config.json" and dtype == "f32":
                config = json.loads(text)
                config.update(dtype="float32", torch_dtype="float32")
                text = json.dumps(config)
            (folder / file.name).write_text(text)


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
        gene = check.tmp / "gene"
        call(check.bin / "safegene", "-q", "extract", "--aligned", check.lab / "aligned", "--degraded",
             check.lab / "degraded-mild", "--rank", 8, "--out", gene)
        for target in ("topic-1-full", "sentiment-1-second"):
            for dtype in ("f32", "bf16"):
                check.lab_target(target, dtype)
        check.adapter_target("topic-1")
        aligned = AutoModelForCausalLM.from_pretrained(check.lab / "aligned", dtype=torch.float32)
        loaded = peft.PeftModel.from_pretrained(aligned, gene)
        pairs = sum(name.endswith("lora_A.default.weight") for name, _ in loaded.named_parameters())
        stored = sum(name.endswith("lora_A.weight") for name in load_file(gene / "adapter_model.safetensors"))
        whole = pairs == stored and pairs > 0
        check.note("the gene folder is a PEFT adapter", whole, modules=stored, loaded=pairs)
        for layout in LAYOUTS:
            check.layout(*layout)
        result = {
            "schema": 1,
            "tolerance": TOLERANCE,
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "transformers": transformers.__version__, "peft": peft.__version__},
            "machine": {"arch": platform.machine(), "cores": os.cpu_count()},
            "merged_bf16_vs_adapter_max_abs_difference": check.rounding,
            "checks": check.results,
        }
        if args.out:
            Path(args.out).write_text(json.dumps(result, indent=2) + "\n")
        sys.exit(1 if check.failed else 0)


if __name__ == "__main__":
    main()
