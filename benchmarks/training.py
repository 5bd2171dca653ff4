"""How fast is training? Sparse steps against a dense crosscoder and against SAELens, on a CPU.

    python benchmarks/training.py                                      CLT against a dense CLT
    python benchmarks/training.py --saelens-python /tmp/sl/bin/python  also a TopK SAE against SAELens
    python benchmarks/training.py --only demo                          the sizes of the shipped crosscoder
    python benchmarks/training.py --only process                       page faults and threads of `replacement train`

For SAELens make an environment of its own: `python -m venv /tmp/sl`, `/tmp/sl/bin/pip install torch==2.13.0`, then
`/tmp/sl/bin/pip install sae-lens`. Both sides train in float32 without auxiliary loss, SAELens with `SAETrainer.step`, this
project with `Trainer.step`.

Every implementation (`training_steps.py`) lives in a process of its own, and they take steps in turns, so that a noisy
machine hurts all of them alike; medians are printed. Peak memory is the kernel's own count for the process, less what
it was after the imports: weights, gradients, optimizer state and the batch are in it. The batch is 4,096 tokens, the
default of both trainers.

The prediction counts flops at the rate of the encoder's product, measured in the same turns, and bytes at 50 GB/s; the columns
Gflop/s and GB/s are those flops and bytes over the measured time. Time and memory are given in multiples of the sparse step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import torch
from machine import machine
from training_process import compare_processes
from training_steps import CASES, Case

STEPS = Path(__file__).parent / "training_steps.py"
BYTES_PER_SECOND = 50e9
FLOAT = 4
COLUMNS = ("tokens/s", "step", "predicted", "Gflop/s", "GB/s", "peak memory", "time", "memory")


class Worker:
    """A process that takes training steps."""

    def __init__(self, python: str, name: str, case: Case, threads: int) -> None:
        arguments = [python, "-W", "ignore", str(STEPS), name, case.name, str(case.batch), str(threads)]
        self.name = name
        self.process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def step(self) -> dict[str, float]:
        """Take one step and return what it cost."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"the {self.name} process ended early")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def sizes(case: Case) -> tuple[int, int, int]:
    """Encoder weights, decoder weights, and decoder vectors read per row."""
    if case.name == "sae":
        return case.width * case.n_features, case.width * case.n_features, case.k[0]
    written = [case.n_layers - group for group in range(case.n_layers)]
    vectors = sum(k * n for k, n in zip(case.k, written, strict=True))
    return case.n_layers * case.width * case.n_features, sum(written) * case.width * case.n_features, vectors


def predicted(case: Case) -> dict[str, tuple[float, float]]:
    """Flops and bytes of a step.

    Both: Adam reads and writes 7 numbers per weight, clipping 3. Dense: three products per decoder, two per encoder (inputs
    need no gradient); topk and scatter pass over the activations about 8 times. Sparse: one product per encoder, a pass to
    choose, and one gathered vector per (active feature, written site) forward, for the gradient of the activation and for
    that of the weight, and one per active feature for the encoder.
    """
    encoder, decoder, vectors = sizes(case)
    weights = encoder + decoder
    optimizer = 10 * weights * FLOAT
    activations = case.batch * case.n_features * len(case.k) * FLOAT
    gathered = case.batch * (3 * vectors + sum(case.k)) * case.width * FLOAT
    return {
        "sparse": (2 * case.batch * encoder, optimizer + weights * FLOAT + 2 * activations + gathered),
        "dense": (case.batch * (4 * encoder + 6 * decoder), optimizer + weights * FLOAT + 8 * activations),
    }


def take_turns(workers: list[Worker], steps: int) -> dict[str, dict[str, list[float]]]:
    """What every worker measured, one list per quantity; the first turn is left out of the times."""
    found: dict[str, dict[str, list[float]]] = {worker.name: defaultdict(list) for worker in workers}
    for turn in range(steps + 1):
        for worker in workers:
            for quantity, value in worker.step().items():
                if turn or quantity != "seconds":
                    found[worker.name][quantity].append(value)
    return found


def against_prediction(cost: tuple[float, float] | None, seconds: float, rate: float) -> list[str]:
    """Columns: the predicted time, and the flops and bytes of the prediction per second of the measured time."""
    if cost is None:
        return ["-", "-", "-"]
    flops, moved = cost
    prediction = flops / rate + moved / BYTES_PER_SECOND
    return [f"{prediction * 1e3:,.0f} ms", f"{flops / seconds / 1e9:.0f}", f"{moved / seconds / 1e9:.1f}"]


def compare(case: Case, pythons: dict[str, str], steps: int, threads: int) -> None:
    """Run and print one comparison."""
    workers = [Worker(python, name, case, threads) for name, python in pythons.items()]
    found = take_turns(workers, steps)
    for worker in workers:
        worker.close()
    rate, base = statistics.median(found.pop("matmul")["rate"]), found["sparse"]
    shape = f"L={len(case.k)}, D={case.width}, F={case.n_features}, k={max(case.k)}"
    print(f"\n{case.name}: {shape}, {case.batch} tokens per step, {steps} steps each")
    print(f"  the encoder's product alone runs at {rate / 1e9:.0f} Gflop/s")
    print(f"  {'':<15}" + "".join(f"{title:>12}" for title in COLUMNS))
    for name, values in found.items():
        seconds, peak = statistics.median(values["seconds"]), max(values["peak"])
        times = statistics.median(a / b for a, b in zip(values["seconds"], base["seconds"], strict=True))
        columns = [f"{case.batch / seconds:,.0f}", f"{seconds * 1e3:,.0f} ms"]
        columns += against_prediction(predicted(case).get(name), seconds, rate)
        columns += [f"{peak / 2**20:,.0f} MiB", f"{times:.2f}x", f"{peak / max(base['peak']):.2f}x"]
        print(f"  {name:<15}" + "".join(f"{column:>12}" for column in columns))
    loss, norm = (abs(found["dense"][q][0] / base[q][0] - 1) for q in ("loss", "gradient_norm"))
    print(f"  first step, dense against sparse: loss {loss:.0e} and gradient norm {norm:.0e} apart")


def main() -> None:
    """Parse the options and print."""
    parser = argparse.ArgumentParser(description="Time training steps against dense ones and against SAELens.")
    parser.add_argument("--only", choices=[*CASES, "process"], action="append", help="default: all but demo")
    parser.add_argument("--steps", type=int, default=5, help="steps of each implementation, taken in turns")
    parser.add_argument("--batch", type=int, help="tokens per step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--saelens-python", help="python of an environment with sae-lens")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {options.threads} threads, float32; {machine()}")
    for name in options.only or ["clt", "sae", "process"]:
        if name == "process":
            compare_processes(max(1, options.steps // 2))
            continue
        case = CASES[name]._replace(batch=options.batch or CASES[name].batch)
        pythons = {"matmul": sys.executable, "sparse": sys.executable, "dense": sys.executable}
        if name == "clt":
            pythons["einsum"] = sys.executable
        if name == "sae" and options.saelens_python:
            pythons |= dict.fromkeys(("saelens", "saelens-sparse"), options.saelens_python)
        elif name == "sae":
            print("\nsae: SAELens is left out; name the python of its environment with --saelens-python")
        compare(case, pythons, options.steps, options.threads)


if __name__ == "__main__":
    main()
