"""The `circuits` command: what it writes, what it prints, and one line for every mistake."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import replacement
from circuits import CircuitGraph
from circuits.cli import main
from circuits.graph.edge_heads import EdgeHeads
from circuits.report import page
from circuits.trace_options import FORMATS, files_of
from replacement.console import show

FILES = files_of(FORMATS)


@pytest.fixture
def tracer(monkeypatch, small) -> list[dict]:
    """Stands in for the model rooms: records how it was called and traces the small graph, printing on the way."""
    calls: list[dict] = []
    tracing = types.ModuleType("circuits.attribution.trace")
    splitting = types.ModuleType("circuits.heads.edge_split")

    class Loaded(str):
        language_model = types.SimpleNamespace(shape=types.SimpleNamespace(d_model=1024))

    def load(
        model: str, *, crosscoder: str, attention_crosscoder: str | None, base: str | None, dtype: object, device: str
    ) -> Loaded:
        sys.stdout.write("a library greets\n")
        loaded = [f"{model} with {crosscoder}", *([attention_crosscoder] if attention_crosscoder else [])]
        default = (dtype, device) == ("float32", "cpu")
        return Loaded(" and ".join(loaded) + ("" if default else f" as {dtype} on {device}"))

    def with_heads(model: str, graph: CircuitGraph) -> CircuitGraph:
        """All of every edge through the head 2 of layer 1."""
        heads = np.zeros((len(graph.edges), 2, 3))
        heads[:, 1, 2] = graph.edges.weight
        return dataclasses.replace(graph, heads=EdgeHeads.from_dense(np.zeros(len(heads)), heads))

    def trace(model: str, prompt: str, *, progress, announce, **options: object) -> CircuitGraph:
        progress(3, 0.5)
        calls.append({"model": model, "prompt": prompt, **options})
        return small

    tracing.trace, splitting.with_heads, splitting.replaces_heads = trace, with_heads, lambda model: False
    monkeypatch.setattr(replacement, "load", load)
    monkeypatch.setattr("circuits.attribution.labels.with_labels", lambda model, graph, **_: graph)
    monkeypatch.setitem(sys.modules, "circuits.heads.edge_split", splitting)
    monkeypatch.setitem(sys.modules, "circuits.attribution.trace", tracing)
    return calls


@pytest.fixture
def saved(small, tmp_path) -> Path:
    return small.save(tmp_path / "graph.safetensors")


def fails(capsys, *arguments: object) -> str:
    """The one line a mistake gives; nothing on stdout."""
    assert main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err


def test_trace_writes_every_file(tracer, tmp_path, capsys, small) -> None:
    out = tmp_path / "new" / "folder"
    assert main(["trace", "a b", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == set(FILES.values())
    assert CircuitGraph.load(out / "graph.safetensors") == small
    circuit = CircuitGraph.load(out / "circuit.safetensors")
    assert dataclasses.replace(circuit, heads=None) == small.prune()
    assert circuit.heads is not None
    assert circuit.heads.text(0) == "L1H2 100 %"
    assert "L1H2" in (out / "circuit.svg").read_text()
    assert "L1H2" in (out / "circuit.dot").read_text()
    assert tracer == [
        {
            "model": "demo with demo",
            "prompt": "a b",
            "targets": None,
            "coverage": 0.99,
            "max_nodes": 2000,
            "drop_below": 0.0,
            "conventions": "exact",
            "memory": None,
        }
    ]
    printed = capsys.readouterr().out
    for text in ("replacement", "completeness", "Strongest path", "␣x", "60.0 %", "graph.safetensors", "1.0e-06"):
        assert text in printed
    assert "a library greets" not in printed


@pytest.mark.parametrize(
    ("position", "token", "titles"),
    [(1, " x", ["Next token"]), (0, " x", ["Token after position 0 (a)"]), (1, " q", ["Next token", "Targets"])],
)
def test_the_page_says_which_token_is_meant(small, position: int, token: str, titles: list[str]) -> None:
    facts = {
        **small.metadata,
        "tokens": ["a", " b"],
        "targets": [{"token": token, "position": position, "probability": 0.1}],
        "top_tokens": [{"token": " x", "probability": 0.6}],
    }
    console = Console(file=io.StringIO(), width=100)
    show(page({"full": dataclasses.replace(small, metadata=facts)}, {}), console)
    lines = console.file.getvalue().splitlines()
    assert [line for line in lines if line in ("Next token", "Targets") or line.startswith("Token after")] == titles


def test_the_page_says_what_conventions_left_out(small) -> None:
    facts = {**small.metadata, "conventions": "circuit-tracer", "left_out_share": 0.25}
    console = Console(file=io.StringIO(), width=200)
    show(page({"full": dataclasses.replace(small, metadata=facts)}, {}), console)
    assert "0 % not expanded, 25 % left out by the graph's conventions, 0.10 s" in console.file.getvalue()


def test_trace_passes_options_on(tracer, tmp_path) -> None:
    options = ["--model", "gpt2", "--crosscoder", "here", "--target", " x", "--target", " y", "--coverage", "0.5"]
    options += ["--conventions", "circuit-tracer"]
    assert main(["trace", "hi", *options, "--max-nodes", "7", "--memory", "4GB", "--out", str(tmp_path)]) == 0
    assert tracer[0]["conventions"] == "circuit-tracer"
    assert tracer[0]["targets"] == [" x", " y"]
    assert (tracer[0]["model"], tracer[0]["coverage"], tracer[0]["max_nodes"]) == ("gpt2 with here", 0.5, 7)
    assert tracer[0]["memory"] == "4GB"
    assert main(["trace", "hi", "--attention", "features", "--attention-crosscoder", "z", "--out", str(tmp_path)]) == 0
    assert main(["trace", "hi", "--attention", "features", "--out", str(tmp_path)]) == 0
    assert main(["trace", "hi", "--attention-crosscoder", "z", "--dtype", "float64", "--out", str(tmp_path)]) == 0
    assert [call["model"] for call in tracer[1:]] == [
        "demo with demo and z", "demo with demo and demo", "demo with demo and z as float64 on cpu"
    ]  # fmt: skip


def test_trace_prunes_by_the_thresholds(tracer, tmp_path, small) -> None:
    options = ["--node-threshold", "1", "--edge-threshold", "0.7", "--no-heads"]
    assert main(["trace", "hi", *options, "--out", str(tmp_path)]) == 0
    assert CircuitGraph.load(tmp_path / "circuit.safetensors") == small.prune(nodes=1.0, edges=0.7)


def test_inclusion_is_noted_and_drawn(tracer, tmp_path, small) -> None:
    note = "the fewer pruning thresholds keep it"
    assert main(["trace", "hi", "--inclusion", "--out", str(tmp_path / "noted")]) == 0
    assert CircuitGraph.load(tmp_path / "noted" / "graph.safetensors") == small.with_inclusion()
    assert note in (tmp_path / "noted" / "circuit.svg").read_text(encoding="utf-8")
    assert main(["trace", "hi", "--out", str(tmp_path / "plain")]) == 0
    assert "inclusion" not in CircuitGraph.load(tmp_path / "plain" / "graph.safetensors").metadata
    assert note not in (tmp_path / "plain" / "circuit.svg").read_text(encoding="utf-8")


def test_groups_are_carried_and_drawn(tracer, tmp_path) -> None:
    assert main(["trace", "hi", "--groups", "--out", str(tmp_path)]) == 0
    circuit = CircuitGraph.load(tmp_path / "circuit.safetensors")
    assert circuit.metadata["groups"] == circuit.group().metadata()


def test_default_folder_is_named_after_the_prompt(tracer, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["trace", "The capital of Texas, is"]) == 0
    assert (tmp_path / "circuit-the-capital-of-texas-is" / "circuit.svg").exists()


def test_show_says_the_same_paths_as_json(tmp_path, capsys, small) -> None:
    small.save(tmp_path / "graph.safetensors")
    assert main(["show", str(tmp_path / "graph.safetensors"), "--json"]) == 0
    through_feature, direct = json.loads(capsys.readouterr().out)["paths"]
    assert [node["label"] for node in through_feature["nodes"]] == ["a", "second", "␣x"]
    assert (through_feature["token"], through_feature["position"], through_feature["weights"]) == ("a", 0, [1.0, 3.0])
    assert [node["id"] for node in direct["nodes"]] == ["E_12_1", "4_5_1"]
    assert main(["show", str(tmp_path / "graph.safetensors")]) == 0
    page = capsys.readouterr().out
    assert page.index("14.1 %") < page.index("second") < page.index("18.8 %")


def test_what_a_budget_costs_is_said(tracer, tmp_path, capsys, small) -> None:
    assert main(["trace", "a b", "--out", str(tmp_path), "--node-threshold", "1", "--circuit-edges", "2"]) == 0
    circuit = CircuitGraph.load(tmp_path / "circuit.safetensors")
    assert len(circuit.edges) <= 2
    before, after = small.prune(nodes=1.0).scores().replacement, circuit.scores().replacement
    assert f"replacement {before:.2f} -> {after:.2f}" in capsys.readouterr().out
    lifted = ["--circuit-edges", "0", "--circuit-nodes", "0"]
    assert main(["trace", "a b", "--out", str(tmp_path), "--node-threshold", "1", *lifted]) == 0
    assert "by the budget" not in capsys.readouterr().out


def test_an_index_that_is_none_is_refused(tracer, tmp_path, capsys) -> None:
    (tmp_path / "other").write_text("text")
    for name, message in (("missing", "does not exist: expected a feature index"), ("other", "is no feature index")):
        assert main(["trace", "a b", "--index", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main(["trace", "a b", "--circuit-nodes", "-1", "--out", str(tmp_path / "out")]) == 2
    assert "circuit-nodes: expected at least 0, given -1" in capsys.readouterr().err


def test_json_is_exactly_one_object(tracer, tmp_path, capsys, small) -> None:
    assert main(["trace", "a b", "--json", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr()
    facts = json.loads(output.out)
    assert "a library greets" in output.err
    assert list(facts) == [
        "prompt", "tokens", "targets", "nodes", "edges", "pruned", "scores", "pruned_scores", "identity_error",
        "average_path_length", "logit_gap_16bit", "stopped_by", "seconds", "paths", "files",
    ]  # fmt: skip
    assert facts["targets"] == [{"token": " x", "probability": 0.6}, {"token": " y", "probability": 0.2}]
    assert facts["nodes"] == {"total": 8, "features": 2, "errors": 1, "tokens": 2, "positions": 1, "logits": 2}
    assert facts["edges"] == 8
    pruned = small.prune()
    assert facts["pruned"] == {"nodes": len(pruned.nodes), "edges": len(pruned.edges)}
    assert facts["scores"]["replacement"] == pytest.approx(small.scores().replacement)
    assert facts["pruned_scores"]["completeness"] == pytest.approx(pruned.scores().completeness)
    assert facts["stopped_by"] == "coverage"
    assert set(facts["files"]) == set(FILES)
    assert CircuitGraph.load(facts["files"]["graph"]) == small


def test_prune_and_show_and_export(saved, tmp_path, capsys, small) -> None:
    assert main(["prune", str(saved), "--node-threshold", "0.5"]) == 0
    pruned = CircuitGraph.load(tmp_path / "graph-pruned.safetensors")
    assert pruned == small.prune(nodes=0.5)
    assert main(["show", str(tmp_path / "graph-pruned.safetensors")]) == 0
    assert "pruned" in capsys.readouterr().out
    assert main(["export", str(saved), "--format", "svg", "--out", str(tmp_path / "c.svg")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "c.svg")
    assert (tmp_path / "c.svg").read_text() == small.to_svg()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trace", "  "], "prompt: expected some text, given none"),
        (["trace", "a", "--coverage", "2"], "coverage: expected a share of influence between 0 and 1, given 2.0"),
        (["trace", "a", "--attention", "none"], "attention: expected linear or features, given 'none'"),
        (
            ["trace", "a", "--attention", "linear", "--attention-crosscoder", "z"],
            "expected features with --attention-cr",
        ),
        (["trace", "a", "--model", "gpt2"], "crosscoder: expected a crosscoder made for gpt2, given none"),
        (
            ["trace", "a", "--model", "gpt2", "--crosscoder", "demo", "--attention", "features"],
            "attention-crosscoder: expected a crosscoder made for gpt2, given none",
        ),
        (["trace", "a", "--dtype", "int8"], "dtype: expected one of float32, bfloat16, float16, float64, given 'int8'"),
        (["trace", "a", "--crosscoder", " "], "crosscoder: expected a name or folder, given ' '"),
        (["trace", "x\udce9"], "prompt: expected text in UTF-8, given other bytes"),
        (["trace", ""], "prompt: expected some text, given none"),
        (["trace", "a", "--coverage", "nan"], "coverage: expected a share of influence between 0 and 1, given nan"),
        (
            ["trace", "a", "--out", "/proc/foo"],
            "/proc/foo: expected a folder that can be written to, but /proc takes no",
        ),
        (["trace", "a", "--out", "x" * 300], "cannot be a file name (File name too long)"),
        (["export", "a", "--format", "", "--out", "x"], "format: expected one of dot, dot-pdf"),
        (["export", "a", "--format", "svg", "--out", "/proc/foo"], "but /proc takes no new files"),
        (["export", "a", "--format", "svg", "--out", ""], "'--out': expected the name of a file or folder, given ''"),
        (["prune", "a", "--out", "/proc"], "/proc: expected a file name, given a folder"),
        (["prune", "a", "--node-threshold", "inf"], "node-threshold: expected a share of influence between 0 and 1"),
        (["prune", "a", "--edge-threshold", "half"], "Invalid value for '--edge-threshold'"),
        (["show", "/dev/zero"], "/dev/zero: expected a circuit file, given a device or pipe"),
        (["show", "a", "extra"], "Got unexpected extra argument"),
        (["validate", "a", "--seed", "-1"], "Invalid value for '--seed'"),
        (["trace", "a", "--max-nodes", "0"], "max-nodes: expected at least 1, given 0"),
        (["trace", "a", "--drop-below", "2"], "drop-below: expected a share of influence between 0 and 1, given 2.0"),
        (["trace", "a", "--memory", "lots"], "memory: expected a size above 0 such as 4GB or 512MiB, given 'lots'"),
        (["trace", "a", "--memory", "-1"], "memory: expected a size above 0 such as 4GB or 512MiB, given '-1'"),
        (["trace", "a", "--memory", "0"], "memory: expected a size above 0 such as 4GB or 512MiB, given '0'"),
        (["trace", "a", "--node-threshold", "-1"], "node-threshold: expected a share of influence between 0 and 1"),
        (["trace", "a", "--edge-threshold", "nan"], "edge-threshold: expected a share of influence between 0 and 1"),
        (["trace", "a", "--coverage", "much"], "Invalid value for '--coverage'"),
        (["trace", "a", "--max-nodes", "1.5"], "Invalid value for '--max-nodes'"),
        (["trace", "a", "--bogus"], "No such option: --bogus"),
        (["trace"], "prompt: expected some text, given none"),
        (["bogus"], "No such command"),
        (["show", "missing.safetensors"], "missing.safetensors: expected a circuit file, but there is no such file"),
        (["prune", "missing.safetensors"], "missing.safetensors: expected a circuit file, but there is no such file"),
        (
            ["show", "."],
            ".: expected a circuit file, given a folder; a traced one holds graph.safetensors and circuit.safetensors",
        ),
        (["export", "missing.safetensors", "--format", "gif", "--out", "x"], "expected one of dot, dot-pdf"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(tracer, tmp_path, monkeypatch, capsys, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *arguments)
    assert tracer == []
    assert list(tmp_path.iterdir()) == []


def test_folder_is_checked_before_anything_is_loaded(tracer, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert "expected a folder, but" in fails(capsys, "trace", "a", "--out", tmp_path / "file" / "out")
    assert tracer == []


SPECIAL = {
    "device": lambda path: Path("/dev/full"),
    "named pipe": lambda path: os.mkfifo(path) or path,
    "symbolic link": lambda path: path.symlink_to("elsewhere") or path,
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("verb", ["prune", "export"])
def test_only_regular_files_are_replaced(saved, tmp_path, capsys, monkeypatch, verb, kind) -> None:
    """And it is said before any work is done."""
    path = SPECIAL[kind](tmp_path / "out")
    before = os.lstat(path)
    monkeypatch.setattr(CircuitGraph, "load", None)
    options = ["--format", "svg"] if verb == "export" else []
    assert f"{path}: expected a file name, given a {kind}, which is never replaced" in fails(
        capsys, verb, saved, *options, "--out", path
    )
    assert os.lstat(path).st_mode == before.st_mode


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_trace_replaces_regular_files_only(tracer, tmp_path, capsys, kind) -> None:
    out = tmp_path / "out"
    out.mkdir()
    path = SPECIAL[kind](out / "circuit.svg")
    if kind == "device":
        assert "/dev/full: expected a folder, but /dev/full is a device" in fails(capsys, "trace", "a", "--out", path)
    else:
        assert f"given a {kind}" in fails(capsys, "trace", "a", "--out", out)
        assert "expected a folder" in fails(capsys, "trace", "a", "--out", path)
    assert tracer == []


def test_a_trace_keeps_other_files_and_links_to_folders(tracer, tmp_path, small) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to("real")
    assert main(["trace", "a b", "--out", str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink()
    names = {"notes.txt", *FILES.values()}
    assert {path.name for path in (tmp_path / "real").iterdir()} == names


def test_the_next_trace_removes_what_a_killed_one_left(tracer, saved, tmp_path) -> None:
    folder = tmp_path / "folder"
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom circuits.trace_command import CircuitGraph, write_all\n"
        "graph = CircuitGraph.load(sys.argv[1])\n"
        "CircuitGraph.export = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_all(graph, graph, Path(sys.argv[2]))"
    )
    ran = subprocess.run([sys.executable, "-c", script, saved, folder / "out"], capture_output=True, timeout=60)
    assert ran.returncode == -9
    assert len(list(folder.iterdir())) == 1
    assert not (folder / "out").exists()
    assert main(["trace", "a b", "--out", str(folder / "out")]) == 0
    assert [path.name for path in folder.iterdir()] == ["out"]


def test_errors_of_the_model_rooms_are_one_line(tracer, tmp_path, capsys, monkeypatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise OSError("no such model\non the hub")

    monkeypatch.setattr(replacement, "load", load)
    assert "error: no such model on the hub" in fails(capsys, "trace", "a", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("device", "message"),
    [("warp", "device: 'warp' cannot be used here (Expected one of cpu"), ("meta", "'meta' cannot be used here")],
)
def test_an_unknown_device_is_one_line(capsys, device, message) -> None:
    assert message in fails(capsys, "trace", "a", "--device", device)


def test_damaged_file(tmp_path, capsys) -> None:
    (tmp_path / "graph.safetensors").write_bytes(b"nonsense")
    assert "damaged or foreign" in fails(capsys, "show", tmp_path / "graph.safetensors")


def test_interrupt_exits_130(tracer, tmp_path, monkeypatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(replacement, "load", load)
    assert main(["trace", "a", "--out", str(tmp_path / "out")]) == 130
    assert not (tmp_path / "out").exists()


def test_an_interrupted_trace_is_written_and_said_to_be_partial(tracer, tmp_path, capsys, monkeypatch, small) -> None:
    facts = {**small.metadata, "stopped_by": "interrupt", "unexpanded_share": 0.25}
    partial = dataclasses.replace(small, metadata=facts)
    monkeypatch.setattr(sys.modules["circuits.attribution.trace"], "trace", lambda *_, **__: partial)
    assert main(["trace", "a b", "--out", str(tmp_path)]) == 130
    assert CircuitGraph.load(tmp_path / "graph.safetensors") == partial
    message = "interrupted: the graph is partial, 25 % of the influence is not expanded\n"
    assert capsys.readouterr().err.endswith(message)


def test_a_file_too_large_for_neuronpedia_is_written_and_said_so(tracer, tmp_path, capsys, monkeypatch) -> None:
    path = tmp_path / FILES["neuronpedia"]
    arguments = ["trace", "a b", "--out", str(tmp_path), "--edge-threshold", "0.9"]
    assert main(arguments) == 0
    size = path.stat().st_size
    for limit, is_too_large in ((size, False), (size - 1, True)):
        monkeypatch.setattr("circuits.trace_command.UPLOAD_BYTES", limit)
        capsys.readouterr()
        assert main(arguments) == 0
        error = capsys.readouterr().err
        assert error.endswith("use a tighter --edge-threshold (here 0.9)\n") == is_too_large
        assert (str(path) in error) == is_too_large
        assert path.stat().st_size == size


def test_help_is_the_answer_to_nothing(capsys) -> None:
    assert main([]) == 0
    assert "trace" in capsys.readouterr().out


def test_help_loads_no_model_code() -> None:
    script = "import sys; from circuits.cli import main; main(['trace', '--help']); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.strip().endswith("False")
