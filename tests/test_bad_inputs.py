"""Bad inputs of both commands and of the Python API, as a user meets them: one clear `ValueError`, or one line on stderr.

All run in one process without the type checker that tests run under, which would refuse wrong types first.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import circuits
import replacement
from circuits import CircuitGraph, FeatureTarget, TokenTarget
from circuits.cli import main as circuits_main
from replacement import Intervention
from replacement.cli import main as replacement_main

PROMPT = "the capital of Texas is"
HUGE = "9" * 5000


class Demo:
    """The demo model, a graph traced in it, and a head view and an attention score of that prompt."""

    def __init__(self) -> None:
        self.model = replacement.load("demo")
        self.graph = circuits.trace(self.model, PROMPT, coverage=0.5)
        self.feature = self.graph.features()[0].name

    def trace(self, **options: Any) -> object:
        return circuits.trace(self.model, PROMPT, **options)

    def intervene(self, *, on: Any = (), **options: Any) -> object:
        return self.model.intervene(PROMPT, on, **options)

    def view(self) -> circuits.HeadView:
        return circuits.head_view(self.model, PROMPT, self.feature)

    def score(self, **options: Any) -> circuits.QKAttribution:
        return circuits.attribute_score(self.model, PROMPT, **{"layer": 0, "head": 0} | options)


def change(**options: Any) -> Intervention:
    return Intervention(**{"layer": 0, "index": 1, "position": 1} | options)


API: dict[str, tuple[Callable[[Demo], object], str]] = {
    "lone surrogate in a prompt": (lambda demo: demo.model("\udce9"), "the prompt: expected text that UTF-8 can hold"),
    "lone surrogate in a target": (lambda demo: demo.trace(targets="\ud800"), "a token: expected text that UTF-8 can"),
    "sparse token ids": (
        lambda demo: circuits.trace(demo.model, torch.tensor([5, 6]).to_sparse()),
        "expected a dense tensor of token ids, got a torch.sparse_coo one",
    ),
    "unsigned token ids": (
        lambda demo: circuits.trace(demo.model, torch.tensor([2**63 + 1], dtype=torch.uint64)),
        "token ids must lie in [0, 1297), got",
    ),
    "coverage as text": (lambda demo: demo.trace(coverage="0.9"), "coverage must be a number, got '0.9'"),
    "no coverage": (lambda demo: demo.trace(coverage=None), "coverage must be a number, got None"),
    "half a node": (lambda demo: demo.trace(max_nodes=1.5), "max_nodes must be a whole number, got 1.5"),
    "max_nodes NaN": (lambda demo: demo.trace(max_nodes=float("nan")), "max_nodes must be a whole number, got nan"),
    "target True": (lambda demo: demo.trace(targets=True), "cannot read target True: expected a text, a token id"),
    "target of bytes": (lambda demo: demo.trace(targets=b"Austin"), "cannot read target b'Austin': expected a text"),
    "fraction of a token": (
        lambda demo: demo.trace(targets=TokenTarget(1.5)),
        "expected the text of a token or its id, got 1.5",
    ),
    "position in words": (
        lambda demo: demo.trace(targets=TokenTarget("Austin", "last")),
        "target position must be a whole number, got 'last'",
    ),
    "no position": (
        lambda demo: demo.trace(targets=FeatureTarget(0, 1, None)),
        "target position must be a whole number",
    ),
    "index as text": (lambda demo: demo.trace(targets=FeatureTarget(0, "1")), "the index of a target must be a whole"),
    "layer below 0": (
        lambda demo: demo.trace(targets="feature:-1/3@4"),
        "expected the name of a feature such as 2/345@7 or attention:2/345@7, got 'feature:-1/3@4'",
    ),
    "position that is none": (
        lambda demo: demo.trace(targets="feature:2/3@x"),
        "expected the name of a feature such as",
    ),
    "layer of 5,000 digits": (
        lambda demo: demo.trace(targets=f"feature:{HUGE}/1@1"),
        "expected the name of a feature such as",
    ),
    "name of a model": (lambda _: circuits.trace("demo", PROMPT), "expected a replacement model, as replacement.load"),
    "one layer": (lambda demo: demo.model(PROMPT, layers=2), "layers must be a list of whole numbers, got 2"),
    "layers and texts": (
        lambda demo: demo.model(PROMPT, layers=["a", 7]),
        "number in layers must be a whole number, g",
    ),
    "number of parts": (lambda demo: demo.model(PROMPT, parts=3), "parts must be 'mlp', 'attention' or a list of both"),
    "one intervention": (
        lambda demo: demo.intervene(on=change(scale=0.0)),
        "interventions must be a list of Intervention, got Intervention",
    ),
    "interventions as dictionaries": (
        lambda demo: demo.intervene(on=[{"layer": 0}]),
        "interventions must be a list of Intervention, got one that holds {'layer': 0}",
    ),
    "generate True": (lambda demo: demo.intervene(generate=True), "generate must be a whole number, got True"),
    "constrained layers as text": (
        lambda demo: demo.intervene(constrained_layers="all"),
        "constrained_layers must be a list of whole numbers, got 'all'",
    ),
    "constrained layers as a number": (
        lambda demo: demo.intervene(constrained_layers=0),
        "constrained_layers must be a list of whole numbers, got 0",
    ),
    "position of an intervention in words": (
        lambda _: change(position="all", scale=0.0),
        "the position of an intervention must be a whole number, got 'all'",
    ),
    "index True": (lambda _: change(index=True, scale=0.0), "the index of an intervention must be a whole number"),
    "activation as text": (lambda _: change(activation="5"), "the activation of an intervention must be a number, got"),
    "complex scale": (lambda _: change(scale=1j), "the scale of an intervention must be a number, got 1j"),
    "activation beyond floats": (
        lambda demo: demo.intervene(on=[change(activation=10**400)]),
        "is not a finite number of at most 1e+18",
    ),
    "feature as a tuple": (
        lambda demo: circuits.head_view(demo.model, PROMPT, (0, 1, 2)),
        "expected a FeatureTarget or the name of a feature such as 2/345@7, got (0, 1, 2)",
    ),
    "seed of credit": (lambda demo: demo.view().credit("shapley", seed=-1), "seed must be 0 or more, got -1"),
    "samples of credit": (lambda demo: demo.view().credit(samples=2.5), "samples must be a whole number, got 2.5"),
    "half a head": (lambda demo: demo.score(head=0.5), "head must be a whole number, got 0.5"),
    "layer of a head as text": (lambda demo: demo.score(layer="0"), "layer must be a whole number, got '0'"),
    "key as a word": (lambda demo: demo.score(key="Texas"), "key position must be a whole number, got 'Texas'"),
    "contrast True": (lambda demo: demo.score(contrast=True), "contrast position must be a whole number, got True"),
    "half a pair": (lambda demo: demo.score().top(1.5), "n must be a whole number, got 1.5"),
    "count as text": (lambda demo: demo.graph.top_nodes("5"), "the count must be a whole number, got '5'"),
    "threshold True": (lambda demo: demo.graph.prune(nodes=True), "nodes must be a number, got True"),
    "node of 5,000 digits": (lambda demo: demo.graph.node(f"0/{HUGE}"), "expected the name of a feature such as"),
    "formats": (lambda demo: demo.graph.export(["svg"], "x.svg"), "format: expected one of dot,"),
    "no path": (lambda demo: demo.graph.export("svg", None), "expected the path of a file or folder, given None"),
    "half a node drawn": (lambda demo: demo.graph.to_svg(max_nodes=2.5), "max_nodes must be a whole number, got 2.5"),
    "no file": (lambda _: CircuitGraph.load(None), "expected the path of a file or folder, given None"),
    "long file name": (lambda _: CircuitGraph.load("a" * 5000), "cannot be a file name (File name too long)"),
    "no nodes": (
        lambda demo: CircuitGraph(None, demo.graph.edges, demo.graph.metadata),
        "CircuitGraph.nodes: expected NodeTable, given NoneType",
    ),
    "heads in the name of a model": (
        lambda demo: circuits.split_heads("demo", demo.graph),
        "expected a replacement model",
    ),
    "heads of a file": (
        lambda demo: circuits.split_heads(demo.model, "graph.safetensors"),
        "expected a graph, as circuits.trace or CircuitGraph.load gives it, got 'graph.safetensors'",
    ),
    "credit of half a node": (
        lambda demo: circuits.source_credit(demo.model, demo.graph, 1.5),
        "node: expected a name, an id or a number, given float",
    ),
    "crosscoder without a name": (
        lambda _: replacement.load("demo", crosscoder=""),
        "expected the path of a file or folder, given ''",
    ),
    "8-bit floats": (
        lambda _: replacement.load("demo", dtype=torch.float8_e4m3fn),
        "dtype: expected one of float32, bfloat16, float16, float64, got 'float8_e4m3fn'",
    ),
}

NO_NAME = "expected the name of a file or folder, given ''"
TRAIN = ["replacement", "train", "run.toml", "--out", "run"]
VALIDATE = ["replacement", "validate", "--no-controls", "--tokens", "64"]
COMMANDS: dict[str, tuple[list[str], str]] = {
    "trace to no folder": (["circuits", "trace", PROMPT, "--out", ""], f"Invalid value for '--out': {NO_NAME}"),
    "report to no folder": ([*VALIDATE, "--report", ""], f"Invalid value for '--report': {NO_NAME}"),
    "plot to no file": (
        ["circuits", "heads", "graph.safetensors", "--feature", "0/1", "--plot", ""],
        f"Invalid value for '--plot': {NO_NAME}",
    ),
    "target that is not UTF-8": (
        ["circuits", "trace", PROMPT, "--target", "\udce9"],
        "a token: expected text that UTF-8 can hold",
    ),
    "target in layer -1": (
        ["circuits", "trace", PROMPT, "--target", "feature:-1/3@4"],
        "expected the name of a feature such as 2/345@7",
    ),
    "head of 5,000 digits": (
        ["circuits", "heads", "graph.safetensors", "--attends", f"{HUGE}.0"],
        "attends: expected layer.head, layer.head@query or layer.head@query<key, given '999",
    ),
    "resample from a folder": (
        ["circuits", "validate", "graph.safetensors", "--resample", "folder"],
        "folder is a folder: expected a text file with one prompt per line",
    ),
    "resample from a device": (
        ["circuits", "validate", "graph.safetensors", "--resample", "/dev/zero"],
        "/dev/zero is a device: expected a text file with one prompt per line",
    ),
    "resample from other bytes": (
        ["circuits", "validate", "graph.safetensors", "--resample", "latin.txt"],
        "latin.txt: expected a text file with one prompt per line in UTF-8",
    ),
    "seed beyond 64 bits": (
        ["circuits", "validate", "graph.safetensors", "--seed", "9" * 40],
        "Invalid value for '--seed': Input should be less than or equal to",
    ),
    "graph that is a pipe": (["circuits", "show", "pipe"], "pipe: expected a circuit file, given a device or pipe"),
    "tokens without end": ([*VALIDATE, "--tokens", "9" * 40], "tokens: expected at most 1_000_000_000, given 999"),
    "dataset without a name": (
        [*VALIDATE, "--data", "hf:"],
        "cannot open the dataset hf:: expected hf:NAME or hf:NAME:CONFIGURATION",
    ),
    "curve that is a device": (
        [*VALIDATE, "--training-curve", "/dev/zero"],
        "/dev/zero is a device: expected a JSON file",
    ),
    "text that UTF-8 cannot hold": (
        [*VALIDATE, "--data", "surrogate.jsonl"],
        "surrogate.jsonl, line 1: expected text that UTF-8 can hold",
    ),
    "settings that are a folder": (
        ["replacement", "train", "folder", "--out", "run"],
        "folder is a folder: expected a TOML",
    ),
    "training to no folder": (
        ["replacement", "train", "run.toml", "--out", ""],
        f"Invalid value for '--out': {NO_NAME}",
    ),
    "training to a file": (
        ["replacement", "train", "run.toml", "--out", "run.toml"],
        "run.toml: expected a folder, but run.toml is a file",
    ),
    "a billion shards": (
        [*TRAIN, "--set", "data.shards=1_000_000_000"],
        "batch_tokens=512 is not a multiple of shards=1000000000",
    ),
    "held-out rows without end": (
        [*TRAIN, "--set", "data.held_out_rows=100_000_000_000"],
        "held_out_rows must be at most 1_000_000, got 100000000000",
    ),
    "data without a name": ([*TRAIN, "--set", 'data.source=""'], "expected the path of a file or folder, given ''"),
    "cache without a name": ([*TRAIN, "--set", 'data.cache=""'], "cache must be a name or left out, got ''"),
    "seed of 63 bits": (
        [*TRAIN, "--set", f"training.seed={2**63 - 1}"],
        f"seed must be below 2^32, got {2**63 - 1}",
    ),
    "model without a name": ([*TRAIN, "--set", 'model=""'], "expected the path of a file or folder, given ''"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Type and message of what every case raises; a command's line without `error: ` counts as a `ValueError`."""
    folder = tmp_path_factory.mktemp("cases")
    ran = subprocess.run([sys.executable, "-P", __file__], cwd=folder, capture_output=True, timeout=200)
    assert ran.returncode == 0, ran.stderr.decode()
    assert not list(folder.glob("run*/*")), "nothing is written"
    return json.loads(ran.stdout)


@pytest.mark.parametrize("name", [*API, *COMMANDS])
def test_every_mistake_is_one_clear_error(name: str, outcomes: dict[str, list[str]]) -> None:
    kind, message = outcomes[name]
    assert kind == "ValueError", message
    assert (API | COMMANDS)[name][1] in message
    assert "\n" not in message


def write_files() -> None:
    """What the commands are given, in the working directory."""
    Path("folder").mkdir()
    os.mkfifo("pipe")
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("surrogate.jsonl").write_text('{"text": "\\ud800"}\n', encoding="utf-8")
    Path("run.toml").write_text("[training]\nn_tokens = 4096\nbatch_tokens = 512\n", encoding="utf-8")


def run_command(arguments: list[str]) -> None:
    """Raise the one line that a command printed as a `ValueError`; anything else is left as it is."""
    main = {"circuits": circuits_main, "replacement": replacement_main}[arguments[0]]
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main(arguments[1:])
    line = errors.getvalue()
    if code == 2 and not output.getvalue() and line.startswith("error: ") and line.count("\n") == 1:
        raise ValueError(line.removeprefix("error: ").strip())
    raise AssertionError(f"exit code {code}, {line!r:.300}, {output.getvalue()!r:.100}")


def main() -> None:
    """Print what every case raises, as JSON."""
    write_files()
    demo = Demo()
    demo.graph.save("graph.safetensors")
    calls: dict[str, Callable[[], object]] = {}
    for name, (call, _) in API.items():
        calls[name] = lambda call=call: call(demo)
    for name, (arguments, _) in COMMANDS.items():
        calls[name] = lambda arguments=arguments: run_command(arguments)
    raised = {}
    for name, run in calls.items():
        try:
            run()
        except Exception as error:
            kind = "ValueError" if isinstance(error, ValueError) else type(error).__name__
            raised[name] = [kind, str(error)]
        else:
            raised[name] = ["nothing", "was accepted"]
    sys.stdout.write(json.dumps(raised))


if __name__ == "__main__":
    main()
