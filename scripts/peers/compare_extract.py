#!/usr/bin/env python3
"""Is `safegene extract` faster than what people use today, and as good? Side by side, whole process against process.

The pair is make_pair.py's (shape of Qwen2-0.5B, bf16, 2 x 0.99 GB). Each round runs, from the page cache and in an
order that rotates:

  mergekit    mergekit-extract-lora: exact SVD, on the CPU
  svd_loop    svd_loop.py: torch.svd_lowrank in a loop; also its time without imports
  ours        safegene extract

All may use every core. Wall time is from before the start to after the exit of the process, peak RSS is what the
kernel counted for it (mapped pages of the inputs included). Residuals are measured afterwards by residual.py, the same
for all, beside the optimum that exact singular values give. Ours also runs once at rank 64.

The machine must be idle: a core that is busy elsewhere makes torch's threads wait for each other and the loop up to ten
times slower, which flatters us. The share of the cores that other work took is recorded for every run, and said if it
matters; the fastest round of each is compared beside the medians.

Usage: compare-extract VENV [options]        VENV is a folder that `setup VENV mergekit` made
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

# Nothing large may be imported here: Linux counts the memory of the process that starts another one into the peak RSS
# of the latter, so torch lives in processes of its own.

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
RANK, RANK_WIDE = 16, 64
DISTURBED = 0.05  # share of all cores; writing back and the kernel's own threads stay below it
CORES = len(os.sched_getaffinity(0))


def commands(args, rank):
    """Tool -> argv, with ALIGNED, DEGRADED and OUT still to be filled in. All factor aligned - degraded."""
    tools = {
        # Its fastest way: what is no linear layer is left out, not stored whole. Its threads are one for each core
        # unless told otherwise; the other performance flags are for GPUs, pickles and sharded outputs.
        "mergekit": [Path(sys.executable).parent / "mergekit-extract-lora", "--model", "ALIGNED", "--base-model",
                     "DEGRADED", "--out-path", "OUT", "--max-rank", rank, "--exclude-regex", "embed_tokens|lm_head",
                     "--skip-undecomposable", "--quiet"],
        "svd_loop": [sys.executable, HERE / "svd_loop.py", "ALIGNED", "DEGRADED", rank, CORES, "OUT"],
        "ours": [args.safegene, "extract", "--aligned", "ALIGNED", "--degraded", "DEGRADED", "--rank", rank, "--out",
                 "OUT", "--json"],
    }
    if args.skip_mergekit:
        del tools["mergekit"]
    return tools


def starts(args):
    """Tool -> argv that loads the program and what it imports."""
    return {"mergekit": [Path(sys.executable).parent / "mergekit-extract-lora", "--help"],
            "svd_loop": [sys.executable, "-c", "import torch, safetensors.torch"],
            "ours": [args.safegene, "--version"]}


def run(argv, start, pair, out):
    """One process: its facts and stdout. `start` is the same program doing next to nothing, to warm its own files."""
    if out.exists():
        shutil.rmtree(out)
    os.sync()  # what the run before wrote must not be flushed during this one
    subprocess.run(start, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for side in ("aligned", "degraded"):
        warm(pair / side / "model.safetensors")
    places = {"ALIGNED": pair / "aligned", "DEGRADED": pair / "degraded", "OUT": out}
    argv = [str(places.get(a, a)) for a in argv]
    stdout, stderr = (out.with_name(f"{out.name}.{stream}") for stream in ("stdout", "stderr"))
    with open(stdout, "wb") as o, open(stderr, "wb") as e:
        busy, started = busy_s(), time.perf_counter()
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=o, stderr=e)
        _, status, usage = os.wait4(child.pid, 0)
        wall, busy = time.perf_counter() - started, busy_s() - busy
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        sys.exit(f"{' '.join(argv)}\nexit {child.returncode}\n{stderr.read_text()[-4000:]}")
    # ru_maxrss is in KiB on Linux.
    cpu = usage.ru_utime + usage.ru_stime
    facts = {"wall_s": round(wall, 4), "cpu_s": round(cpu, 4), "peak_rss_bytes": usage.ru_maxrss * 1024,
             "others_cpu_share": round(max(0.0, busy - cpu) / (wall * os.cpu_count()), 4)}
    return facts, stdout.read_text()


def busy_s():
    """Seconds that all cores together have spent on any work, a hypervisor's theft included."""
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def warm(file):
    buffer = bytearray(1 << 22)
    with open(file, "rb", buffering=0) as f:
        while f.readinto(buffer):
            pass


def helper(script, *argv):
    done = subprocess.run([sys.executable, HERE / script, *map(str, argv)], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{script} failed")
    return done.stdout


def machine():
    cpu = Path("/proc/cpuinfo").read_text()
    memory = Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]
    flags = set(next((line for line in cpu.splitlines() if line.startswith("flags")), "").split())
    return {
        "cpu": next((l.split(":")[1].strip() for l in cpu.splitlines() if l.startswith("model name")), "unknown"),
        "arch": platform.machine(),
        "cores": CORES,
        "memory_gb": round(int(memory) * 1024 / 1e9, 1),
        "simd": sorted(flags & {"avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16"}),
        "os": f"{platform.system()} {platform.release()}",
    }


def versions(args):
    names = ["torch", "safetensors", "numpy"] + ([] if args.skip_mergekit else ["mergekit", "transformers", "peft"])
    ours = subprocess.run([args.safegene, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    return {"safegene": ours, "python": platform.python_version(), **{name: version(name) for name in names}}


def shown(argv):
    """A command without the places of this machine."""
    return " ".join(Path(str(a)).name if os.path.isabs(str(a)) else str(a) for a in argv)


def median(rounds, key):
    return statistics.median(r[key] for r in rounds)


def compare(args):
    work = Path(args.work).resolve()
    pair, runs = work / "pair", work / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    print("pair", flush=True)
    helper("make_pair.py", pair)
    tools = commands(args, RANK)
    rounds = {tool: [] for tool in tools}
    outs = {}

    def one(tool, argv, out):
        print(f"{out.name:14}", end="", flush=True)
        facts, stdout = run(argv, starts(args)[tool], pair, out)
        last = json.loads(stdout.splitlines()[-1]) if tool != "mergekit" else {}
        if tool == "svd_loop":
            facts["loop_s"] = round(last["loop_s"], 4)
        if tool == "ours":
            facts["reported_residual"] = 1 - last["captured"]
        print(f"{facts['wall_s']:8.2f} s", flush=True)
        outs[str(out)] = facts
        return facts

    for number in range(args.rounds):
        order = list(tools)
        order = order[number % len(order):] + order[:number % len(order)]
        for tool in order:
            rounds[tool].append(one(tool, tools[tool], runs / f"{tool}-{number + 1}"))
    wide_argv = commands(args, RANK_WIDE)["ours"]
    wide = one("ours", wide_argv, runs / f"ours-rank-{RANK_WIDE}")

    print("residuals", flush=True)
    measured = json.loads(helper("residual.py", pair, *outs))
    optimum = measured["optimum"]
    for out, facts in outs.items():
        facts["residual"] = measured["residuals"][out]
        reported = facts.get("reported_residual", facts["residual"])
        if abs(reported - facts["residual"]) > 1e-3 * facts["residual"]:
            print(f"note: {Path(out).name} reported a residual of {reported:.6f}, measured {facts['residual']:.6f}")
        if facts["others_cpu_share"] > DISTURBED:
            print(f"note: other work took {facts['others_cpu_share']:.0%} of the cores during {Path(out).name}: "
                  "the times are not to be relied on")

    result = {
        "schema": 1,
        "pair": {**json.loads((pair / "recipe.json").read_text()), "modules": measured["modules"],
                 "linear_parameters": measured["parameters"],
                 "bytes_each": (pair / "aligned" / "model.safetensors").stat().st_size},
        "machine": machine(),
        "others_cpu_share_max": max(facts["others_cpu_share"] for facts in outs.values()),
        "versions": versions(args),
        "rank": RANK,
        "optimum": optimum[RANK],
        "tools": {},
        "wide": {"rank": RANK_WIDE, "command": shown(wide_argv), "optimum": optimum[RANK_WIDE], **wide,
                 "residual_over_optimum": wide["residual"] / optimum[RANK_WIDE]},
    }
    for tool, of_tool in rounds.items():
        residual = max(r["residual"] for r in of_tool)  # the worst round
        row = {"command": shown(tools[tool]), "wall_s_median": median(of_tool, "wall_s"),
               "wall_s_fastest": min(r["wall_s"] for r in of_tool),
               "peak_rss_bytes_median": median(of_tool, "peak_rss_bytes"), "residual": residual,
               "residual_over_optimum": residual / optimum[RANK], "rounds": of_tool}
        if tool == "svd_loop":
            row["loop_s_median"] = median(of_tool, "loop_s")
            row["loop_s_fastest"] = min(r["loop_s"] for r in of_tool)
        result["tools"][tool] = row
    for which in ("median", "fastest"):
        ours = result["tools"]["ours"][f"wall_s_{which}"]
        ratios = {t: r[f"wall_s_{which}"] / ours for t, r in result["tools"].items() if t != "ours"}
        ratios["svd_loop_without_imports"] = result["tools"]["svd_loop"][f"loop_s_{which}"] / ours
        result[f"wall_peer_over_ours_{which}"] = ratios
    return result


def table(result):
    tools, wide = result["tools"], result["wide"]

    def times(row, key, name):
        cells = [f"{row[f'{key}_{which}']:.2f} s" for which in ("median", "fastest")]
        if name in result["wall_peer_over_ours_median"]:
            cells += [f"{result[f'wall_peer_over_ours_{which}'][name]:.2f} x" for which in ("median", "fastest")]
        return (cells + ["", ""])[:4]

    def quality(row, rss):
        return [f"{row[rss] / 1e9:.2f} GB", f"{row['residual']:.5f}", f"{row['residual_over_optimum']:.5f}"]

    rows = [[f"rank {result['rank']}, {len(tools['ours']['rounds'])} rounds", "median", "fastest", "/ ours", "/ ours",
             "peak RSS", "residual", "/ optimum"]]
    for tool, row in tools.items():
        rows.append([tool, *times(row, "wall_s", tool), *quality(row, "peak_rss_bytes_median")])
        if tool == "svd_loop":
            rows.append(["  without imports", *times(row, "loop_s", "svd_loop_without_imports"), "", "", ""])
    rows.append(["optimum", "", "", "", "", "", f"{result['optimum']:.5f}", ""])
    rows.append([f"ours, rank {wide['rank']}, once", f"{wide['wall_s']:.2f} s", "", "", "",
                 *quality(wide, "peak_rss_bytes")])
    return "\n".join(f"{row[0]:20}" + "".join(f"{cell:>11}" for cell in row[1:]) for row in rows)


def main():
    parser = argparse.ArgumentParser(prog="compare-extract VENV")
    parser.add_argument("--work", required=True, help="folder, 3 GB: the pair, which is reused, and what the runs write")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each tool [default: 3]")
    parser.add_argument("--skip-mergekit", action="store_true", help="leave out mergekit, by far the slowest")
    parser.add_argument("--safegene", default=REPOSITORY / "target/release/safegene", type=Path,
                        help="our binary [default: target/release/safegene]")
    parser.add_argument("--out", default=REPOSITORY / "benches/results/extract-peers.json", type=Path,
                        help="JSON to write [default: benches/results/extract-peers.json]")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    args.safegene = args.safegene.resolve()
    if not args.safegene.exists():
        sys.exit(f"no binary at `{args.safegene}`; `cargo build --release` makes it")
    if not args.skip_mergekit and not (Path(sys.executable).parent / "mergekit-extract-lora").exists():
        sys.exit("mergekit is not in this environment; `setup VENV mergekit` adds it, --skip-mergekit leaves it out")
    result = compare(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
