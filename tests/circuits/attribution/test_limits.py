"""What a trace costs, said before it starts; refusals; and what Ctrl-C leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import circuits
from circuits.attribution import estimate as estimating
from circuits.attribution.columns import Columns
from circuits.attribution.expansion import Attributor
from circuits.attribution.limits import memory_bytes
from circuits.graph.nodes import NodeKind
from circuits.progress import ProgressText
from replacement import ReplacementModel, Wiring, memory


def model_of(lm: Any, *, attention: bool = False) -> ReplacementModel:
    of_attention = tiny.crosscoder_for(lm, wiring=Wiring.attention(lm)) if attention else None
    return ReplacementModel(lm, tiny.crosscoder_for(lm), attention_crosscoder=of_attention)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4GB", 4 * 10**9), ("1.5 gb", 15 * 10**8), ("512MiB", 2**29), ("2K", 2000), ("7", 7), (7, 7), ("1TiB", 2**40)],
)
def test_sizes_are_read(text: str | int, expected: int) -> None:
    assert memory_bytes(text) == expected


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ("lots", "memory: expected a size above 0 such as 4GB or 512MiB, given 'lots'"),
        ("-1", "memory: expected a size above 0 such as 4GB or 512MiB, given '-1'"),
        ("0GB", "memory: expected a size above 0 such as 4GB or 512MiB, given '0GB'"),
        ("4iB", "memory: expected a size above 0"),
        (0, "memory must be 1 or more, got 0"),
        (-1, "memory must be 1 or more, got -1"),
        (True, "memory must be a whole number, got True"),
    ],
)
def test_bad_sizes(language_model: Any, memory: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        circuits.trace(model_of(language_model("gpt2")), tiny.random_tokens(), memory=memory)


def test_a_trace_above_the_limit_is_refused(language_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of(language_model("gpt2")), tiny.random_tokens()
    monkeypatch.setattr(estimating, "resident_memory", lambda: 3 * 10**9)
    costs: list[circuits.Estimate] = []
    circuits.trace(model, tokens, memory="4GB", announce=costs.append)
    cost = costs[0]
    assert circuits.trace(model, tokens, memory=3 * 10**9 + cost.bytes).metadata["stopped_by"] == "coverage"
    message = (
        f"memory: the trace needs about .* beside the 3 GB in use, and the limit is 3 GB in all: lower --max-nodes "
        rf"\(here {cost.n_expanded}\), raise --memory, or shorten the prompt of {len(tokens)} tokens"
    )
    with pytest.raises(ValueError, match=message):
        circuits.trace(model, tokens, memory=3 * 10**9 + cost.bytes - 1)
    monkeypatch.setattr(estimating, "available_memory", lambda: 1)
    with pytest.raises(ValueError, match="and what is available is 3 GB in all"):
        circuits.trace(model, tokens)


@pytest.mark.parametrize("attention", [False, True], ids=["linear", "features"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_expected_edges_are_those_of_dense_rows(language_model: Any, architecture: str, attention: bool) -> None:
    """With every feature expanded the count of places below each feature bounds the graph's edges, and nearly reaches them."""
    model, tokens = model_of(language_model(architecture), attention=attention), tiny.random_tokens()
    costs: list[circuits.Estimate] = []
    graph = circuits.trace(model, tokens, targets="w5", coverage=1.0, max_nodes=None, announce=costs.append)
    local = model.localize(tokens)
    lengths_S, _ = estimating._row_lengths(local)
    attributor = Attributor(local, [])
    attributor.expand_features(np.arange(len(lengths_S)))
    first = Columns.of(local).features.start
    for block in (block for blocks in attributor.rows.blocks.values() for block in blocks):
        assert (block.counts <= lengths_S.numpy()[block.node - first]).all()
    assert attributor.rows.blocks
    made = sum(len(block.source) for blocks in attributor.rows.blocks.values() for block in blocks)
    assert 0.8 * float(lengths_S.sum()) <= made
    assert costs[0].n_active == len(lengths_S)
    assert len(graph.edges) <= costs[0].n_edges
    assert str(costs[0]).startswith("about ")
    assert "\n" not in str(costs[0])


def test_free_memory_of_a_control_group_counts(tmp_path: Path) -> None:
    """Version 2 with a limit on the parent alone, and version 1."""
    (tmp_path / "cgroup").write_text("0::/a/b\n5:memory:/c\n3:cpu:/d\n")
    for folder, files in {
        "a/b": {"memory.max": "max", "memory.current": "10", "memory.stat": "inactive_file 1\n"},
        "a": {"memory.max": "1000", "memory.current": "300", "memory.stat": "anon 5\ninactive_file 100\n"},
        "memory/c": {"memory.limit_in_bytes": "500", "memory.usage_in_bytes": "100", "memory.stat": "total_inactive_file 7\n"},
    }.items():  # fmt: skip
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
    assert list(memory._free_in_groups(tmp_path, tmp_path / "cgroup")) == [800, 407]
    assert list(memory._free_in_groups(tmp_path, tmp_path / "missing")) == []


def test_progress_says_speed_and_time_to_go() -> None:
    times = iter([10.0, 12.0, 110.0])
    line = ProgressText(2000, clock=lambda: next(times))
    assert line(0, 0.775) == "0 of at most 2,000 features expanded, 78 % of the influence left"
    assert line(128, 0.5).endswith("50 % of the influence left, 64 features/s, at most 29 s to go")
    assert line(1000, 0.25).endswith("10 features/s, at most 1 min 40 s to go")


@pytest.mark.parametrize("inside", [False, True], ids=["between rounds", "inside a round"])
def test_an_interrupt_after_the_first_round_leaves_the_complete_rounds(
    language_model: Any, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    """The graph equals that of a trace whose `max_nodes` is what was expanded until then."""
    monkeypatch.setattr("circuits.attribution.expansion.FIRST_ROUND", 4)
    model, tokens = model_of(language_model("llama")), tiny.random_tokens()
    rounds: list[int] = []
    add = Attributor._add

    def progress(expanded: int, share: float) -> None:
        rounds.append(expanded)
        if expanded == 12 and not inside:
            raise KeyboardInterrupt

    def interrupted(self: Attributor, *arguments: Any, **options: Any) -> None:
        add(self, *arguments, **options)
        if inside and rounds and rounds[-1] == 12:  # after some of the rows of the round that follows
            raise KeyboardInterrupt

    monkeypatch.setattr(Attributor, "_add", interrupted)
    partial = circuits.trace(model, tokens, coverage=1.0, progress=progress)
    assert partial.metadata["stopped_by"] == "interrupt"
    monkeypatch.setattr(Attributor, "_add", add)
    whole = circuits.trace(model, tokens, coverage=1.0, max_nodes=12)
    assert partial.nodes == whole.nodes
    assert partial.edges == whole.edges
    assert (partial.nodes.expanded & partial.nodes.mask(NodeKind.FEATURE)).sum() == 12
    assert partial.metadata["unexpanded_share"] == whole.metadata["unexpanded_share"] > 0


def test_an_interrupt_before_the_first_round_is_done_ends_the_trace(language_model: Any) -> None:
    def progress(expanded: int, share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        circuits.trace(model_of(language_model("gpt2")), tiny.random_tokens(), progress=progress)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX systems")
def test_ctrl_c_of_the_command_writes_a_partial_graph(tmp_path: Path) -> None:
    """The process gets the signal as soon as its second round is announced."""
    script = (
        "import os, signal, sys\nimport circuits.progress, circuits.attribution.expansion as expansion\n"
        "expansion.FIRST_ROUND = 16\ntext = circuits.progress.ProgressText.__call__\n"
        "def call(self, expanded, share):\n"
        "    if expanded >= 16: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return text(self, expanded, share)\n"
        "circuits.progress.ProgressText.__call__ = call\n"
        "from circuits.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    prompt = "the capital of the state containing Dallas is"
    arguments = ["trace", prompt, "--out", str(tmp_path / "out"), "--no-heads"]
    ran = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 128 + signal.SIGINT, ran.stderr
    assert ran.stderr.splitlines()[0].startswith("estimate: about ")
    assert ran.stderr.splitlines()[-1].startswith("interrupted: the graph is partial, ")
    graph = circuits.CircuitGraph.load(tmp_path / "out" / "graph.safetensors")
    assert graph.metadata["stopped_by"] == "interrupt"
    assert (graph.nodes.expanded & graph.nodes.mask(NodeKind.FEATURE)).sum() == 16


def test_the_most_influential_features_get_a_label(language_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("circuits.attribution.trace.LABELLED", 0)
    model = model_of(language_model("llama"))
    graph = circuits.trace(model, tiny.random_tokens())
    features = graph.nodes.mask(NodeKind.FEATURE)
    labelled = np.array(circuits.with_labels(model, graph, most=5).nodes.label, dtype=bool) & features
    assert labelled.sum() == 5 < features.sum()
    influence = graph.influence()
    assert influence[labelled].min() >= influence[features & ~labelled].max()
    with pytest.raises(ValueError, match="most must be 0 or more, got -1"):
        circuits.with_labels(model, graph, most=-1)
