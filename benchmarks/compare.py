"""How long do `circuits compare` and `circuits statistics` take for 1,000 prompts once they are traced, and in how much memory?

    python benchmarks/compare.py --out graphs                 1,000 held-out prompts of the demo, traced first (resumes)
    python benchmarks/compare.py --out graphs --prompts 100   fewer

Full graphs and pruned circuits are read from their files, one after the other. Every measurement is a process of its own:
seconds on the clock and of the processor from start to end, Python's start included, and the largest resident memory. Copies of
the folder (links to the same files) show how memory grows with the number of prompts alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import machine

import circuits
import replacement
from replacement.demo.corpus.behaviours import behaviours

MEASURE = (
    f"import sys; sys.path.append({str(Path(__file__).parent)!r}); from machine import peak_bytes; "
    "from circuits.cli import main; code = main(sys.argv[1:]); sys.stderr.write(str(peak_bytes())); sys.exit(code)"
)


def trace(out: Path, n_prompts: int) -> list[Path]:
    """Trace different held-out prompts of all behaviours, in random order, those apart that are there; gives their folders."""
    prompts = sorted({probe.prompt for behaviour in behaviours() for probe in behaviour.probes})
    random.Random(0).shuffle(prompts)
    lines = [circuits.PromptLine(id=f"{i:04d}", prompt=prompt) for i, prompt in enumerate(prompts[:n_prompts])]
    circuits.trace_many(replacement.load("demo"), lines, out, formats=["safetensors"])
    return [out / line.id for line in lines]


def run(*arguments: str) -> str:
    """Run the command and give seconds, processor seconds and megabytes."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stderr)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    megabytes = int(done.stderr.split()[-1]) / 1e6
    size = json.loads(done.stdout)
    counts = f"{size['consensus']['counts']['edges']['any']:,} different edges" if "consensus" in size else ""
    return f"{seconds:7.1f} s  {used:7.1f} s of processor  {megabytes:7.0f} MB  {counts}"


def linked(folders: list[Path], into: Path, copies: int) -> Path:
    """A folder with links to those of prompts, several times over."""
    into.mkdir()
    for copy in range(copies):
        for folder in folders:
            os.symlink(folder.resolve(), into / f"{folder.name}-{copy}")
    return into


def main() -> None:
    """Trace, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True, help="folder for the graphs")
    options = parser.parse_args()
    folders = trace(options.out, options.prompts)
    print(f"{machine()}; {len(folders)} prompts")
    with tempfile.TemporaryDirectory() as scratch:
        few = linked(folders[: max(len(folders) // 10, 2)], Path(scratch) / "few", 1)
        twice = linked(folders, Path(scratch) / "twice", 2)
        for name, place in (("a tenth", few), ("all", options.out), ("twice", twice)):
            for graphs in ("--full", "--pruned"):
                print(f"compare    {name:8} {graphs:9} {run('compare', str(place), graphs, '--json')}", flush=True)
            csv = str(Path(scratch) / "statistics.csv")
            print(
                f"statistics {name:8} {'--full':9} {run('statistics', str(place), '--out', csv, '--json')}", flush=True
            )


if __name__ == "__main__":
    main()
