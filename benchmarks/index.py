"""How fast is a feature index made, how much memory does it take, and does it survive being killed?

    python benchmarks/index.py                        the demo, two threads
    python benchmarks/index.py --model M --crosscoder C --data D

An index is made once in a process of its own. Then it is made again by processes that are killed (SIGKILL) after a few seconds,
and one that is not; both files must have the same content. The pass over text and all that follows it (what the weights say,
claims and their scores) are timed apart. Peak memory is the kernel's count for the process, less what it was when the model was
loaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import machine, peak_bytes, reset_peak


def work(options: argparse.Namespace) -> None:
    """Make the index in this process and print what it took as JSON."""
    import torch

    import replacement
    from replacement.index import gathering
    from replacement.index.build import IndexSettings, build_index, open_rows

    torch.set_num_threads(options.threads)
    gathering.SAVE_EVERY_S = 1.0
    model = replacement.load(options.model, crosscoder=options.crosscoder)
    settings = IndexSettings(data=options.data, n_tokens=options.tokens)
    source, n_rows = open_rows(settings, model.language_model)
    reset_peak()
    before, begin = peak_bytes(), time.perf_counter()
    n_read, pass_s = 0, 0.0

    def progress(n_tokens: int) -> None:
        nonlocal n_read, pass_s
        n_read += n_tokens
        if n_read == n_rows * source.context:
            pass_s = time.perf_counter() - begin

    build_index(model, options.out, settings, progress=progress)
    facts = {"tokens": n_rows * source.context, "pass_s": pass_s, "all_s": time.perf_counter() - begin}
    print(json.dumps({**facts, "peak": peak_bytes() - before}))


def killed_and_resumed(command: list[str], after: list[float]) -> int:
    """Run a command, killed after some seconds and started again; the last time it may end. How often it was killed."""
    n_killed = 0
    for seconds in [*after, None]:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            if process.wait(timeout=seconds):
                raise SystemExit(f"the index could not be made, exit code {process.returncode}")
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            n_killed += 1
    return n_killed


def main() -> None:
    """Parse the options and print."""
    parser = argparse.ArgumentParser(description="Time the making of a feature index, killed and resumed, too.")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--crosscoder", default="demo")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--kill-after", type=float, nargs="+", default=[12.0, 15.0, 20.0], help="seconds until each kill"
    )
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)  # given to the processes that do the work
    options = parser.parse_args()
    if options.out is not None:
        work(options)
        return
    from replacement import FeatureIndex

    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        whole, resumed = (Path(folder) / f"{name}.sqlite" for name in ("whole", "resumed"))
        command = [sys.executable, *sys.argv]
        facts = json.loads(subprocess.run([*command, "--out", str(whole)], check=True, capture_output=True).stdout)
        n_killed = killed_and_resumed([*command, "--out", str(resumed)], options.kill_after)
        with FeatureIndex.open(whole) as index, FeatureIndex.open(resumed) as again:
            labels, n_features = index.facts["labels"], len(index.layers) * index.n_features
            same = index.digest() == again.digest()
        rate = facts["tokens"] / facts["pass_s"]
        print(f"pass over {facts['tokens']:,} tokens, {options.threads} threads: {rate:,.0f} tokens/s")
        print(f"what follows it: {facts['all_s'] - facts['pass_s']:.0f} s")
        print(f"peak memory: {facts['peak'] / 2**20:,.0f} MiB for {n_features:,} features")
        print(f"file: {whole.stat().st_size / 1e6:.2f} MB")
        scores = f"mean F1 {labels['mean_f1']:.3f}, {labels['unclear']:.1%} unclear"
        print(f"labels: {scores}, of {labels['alive']:,} features that fire")
        print(f"killed {n_killed} times and resumed: {'the same content' if same else 'OTHER CONTENT'}")
        if not same:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
