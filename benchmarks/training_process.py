"""What the commands' settings of a process are worth: `replacement train` with and without them, told by `training.py`.

Trains a cross-layer transcoder of a random Llama (five layers of width 64) on 40,000 tokens, in batches of 4,096 and rows of
512, and measures it on held-out rows. Every run is a process of its own; ways to run take turns. Page faults, CPU time and wall
time are those of the run, imports apart; CPU time hardly depends on what else the machine does.

    as it is   glibc gives freed memory back, one thread
    kept       `keep_freed_memory`, one thread
    threads    `keep_freed_memory`, PyTorch's own number of threads, which spin while they wait
    asleep     the same, but they sleep while they wait
    command    what `replacement train` does: `prepare` and `fit_threads`
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

N_TOKENS, N_LAYERS, WIDTH, VOCABULARY = 40_000, 5, 64, 2000
ENVIRONMENT = {
    "as it is": {"OMP_NUM_THREADS": "1"},
    "kept": {"OMP_NUM_THREADS": "1"},
    "threads": {"OMP_WAIT_POLICY": "ACTIVE"},
    "asleep": {"OMP_WAIT_POLICY": "PASSIVE"},
    "command": {},
}
TUNED = ("MALLOC_", "OMP_", "MKL_")
"""Beginnings of the variables that would decide what is compared."""


def make_inputs(folder: Path) -> Path:
    """A random model, random token ids and a settings file."""
    import numpy as np
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 172, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=512, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), unk_token="w0")
    tokenizer.save_pretrained(folder / "model")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(3, VOCABULARY, 200_000, dtype=np.uint16))
    settings = folder / "settings.toml"
    settings.write_text(
        f'model = "{folder / "model"}"\n[data]\nsource = "{folder / "tokens.npy"}"\ncontext = 512\nshards = 8\n'
        f"[training]\nn_tokens = {N_TOKENS}\nbatch_tokens = 4096\n",
        encoding="utf-8",
    )
    return settings


def train(way: str, settings: Path) -> None:
    """Train once in this process, and print what it cost as a line of JSON."""
    from replacement.allocator import keep_freed_memory
    from replacement.start import prepare

    if way == "command":
        prepare()
    elif way != "as it is":
        keep_freed_memory()
    import replacement.training.runs as runs
    from replacement.cli import main

    if way != "command":
        runs.fit_threads = lambda width: None
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        assert main(["train", str(settings), "--out", f"{out}/run"]) == 0
    after, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - started
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak = after.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    print(json.dumps({"wall": wall, "cpu": cpu, "faults": after.ru_minflt - before.ru_minflt, "peak": peak}))


def compare_processes(turns: int) -> None:
    """Run every way `turns` times and print medians."""
    print(
        f"\nprocess: {N_LAYERS} layers, D={WIDTH}, {N_TOKENS:,} tokens of `replacement train`, {turns} turns each",
        flush=True,
    )
    found: dict[str, dict[str, list[float]]] = {way: defaultdict(list) for way in ENVIRONMENT}
    with tempfile.TemporaryDirectory() as folder:
        settings = make_inputs(Path(folder))
        for way in [way for _ in range(turns) for way in ENVIRONMENT]:
            environment = {name: value for name, value in os.environ.items() if not name.startswith(TUNED)}
            command = [sys.executable, "-W", "ignore", __file__, way, str(settings)]
            ran = subprocess.run(
                command, env=environment | ENVIRONMENT[way], check=True, capture_output=True, text=True
            )
            cost = json.loads(ran.stdout.splitlines()[-1])
            print(f"  {way:<10} {', '.join(f'{name} {value:,.1f}' for name, value in cost.items())}", flush=True)
            for quantity, value in cost.items():
                found[way][quantity].append(value)
    columns = ("tokens/s", "wall", "CPU time", "page faults", "peak memory", "CPU against `as it is`")
    print(f"  {'':<10}" + "".join(f"{column:>{max(13, len(column) + 2)}}" for column in columns))
    for way, values in found.items():
        median = {quantity: statistics.median(entries) for quantity, entries in values.items()}
        times = statistics.median(a / b for a, b in zip(found["as it is"]["cpu"], values["cpu"], strict=True))
        cells = [f"{N_TOKENS / median['wall']:,.0f}", f"{median['wall']:.1f} s", f"{median['cpu']:.1f} s"]
        cells += [f"{median['faults'] / 1e6:.2f} M", f"{median['peak']:,.0f} MiB", f"{times:.2f}x the speed"]
        print(f"  {way:<10}" + "".join(f"{c:>{max(13, len(h) + 2)}}" for c, h in zip(cells, columns, strict=True)))


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]))
