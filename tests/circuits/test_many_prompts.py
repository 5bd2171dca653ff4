"""A file of prompts: every line checked first, results that do not depend on who made them, nothing finished redone."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import replacement
from circuits import CircuitGraph
from circuits.cli import main
from circuits.many_prompts import PromptLine, read_prompts, trace_many
from circuits.trace_options import TraceOptions

PROMPTS = [
    {"prompt": "the capital of the state containing Dallas is", "id": "dallas"},
    {"prompt": "33 + 45 ="},
    {"prompt": "no such words"},
    {"prompt": "the opposite of hot is", "target": ["cold", "big - small"]},
    {"prompt": "le contraire de chaud est", "target": "Texas"},
    {"prompt": "the hammer was"},
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def model() -> Any:
    return replacement.load("demo")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(map(json.dumps, PROMPTS)) + "\n")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """All files, by path; scratch folders of killed processes are hidden."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if not path.parent.name.startswith(".")}


def test_rows_folders_and_errors(model: Any, file: Path, tmp_path: Path) -> None:
    finished: list[int] = []
    rows = trace_many(model, read_prompts(file), tmp_path / "out", progress=finished.append)
    assert finished == list(range(7))
    assert [row["id"] for row in rows] == ["dallas", "3", "5", "7", "9", "11"]
    assert [row["status"] for row in rows] == ["traced", "traced", "failed", "traced", "traced", "traced"]
    assert "does not know 'no', 'such', 'words'" in rows[2]["error"]
    with (tmp_path / "out" / "summary.csv").open(newline="") as table:
        read = list(csv.DictReader(table))
    assert [row["prompt"] for row in read] == [line["prompt"] for line in PROMPTS]
    assert float(read[0]["circuit_replacement"]) == rows[0]["circuit_replacement"]
    circuit = CircuitGraph.load(tmp_path / "out" / "dallas" / "circuit.safetensors")
    assert len(circuit.nodes) == rows[0]["circuit_nodes"]
    assert circuit.heads is not None
    assert "seconds" not in circuit.metadata
    assert [
        target["token"]
        for target in CircuitGraph.load(tmp_path / "out" / "9" / "graph.safetensors").metadata["targets"]
    ]


def test_the_split_shows_nowhere(model: Any, file: Path, tmp_path: Path) -> None:
    """Parts of the work, in any order and with a failure between them, give the files that one process gives."""
    lines = read_prompts(file)
    trace_many(model, lines, tmp_path / "one")
    trace_many(model, lines[1::2], tmp_path / "two", part=1, n_parts=3)  # some are there already
    trace_many(model, lines, tmp_path / "two", part=2, n_parts=3)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_finished_prompts_are_not_traced_again(
    model: Any, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    lines = [line for line in read_prompts(file) if line.prompt != "no such words"]
    trace_many(model, lines, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.parent != out}

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("traced again")

    monkeypatch.setattr(TraceOptions, "trace", forbidden)
    trace_many(model, lines, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.parent != out} == before


def test_failed_prompts_are_tried_again(model: Any, tmp_path: Path) -> None:
    """With more memory, and with another prompt in the same line; a failure that stays the same is not written again."""
    line, record = PromptLine(id="a", prompt="the hammer was"), tmp_path / "a" / "record.json"
    (row,) = trace_many(model, [line], tmp_path, options=TraceOptions(memory="1MB"))
    assert (row["status"], row["nodes"]) == ("failed", "")
    assert "raise --memory" in row["error"]
    (row,) = trace_many(model, [line], tmp_path)
    assert (row["status"], row["error"]) == ("traced", "")
    wrong = PromptLine(id="b", prompt="no such words")
    trace_many(model, [line, wrong], tmp_path)
    before = record.stat().st_mtime_ns, (tmp_path / "b" / "record.json").stat().st_mtime_ns
    trace_many(model, [line, wrong], tmp_path, part=1, n_parts=2)
    assert (record.stat().st_mtime_ns, (tmp_path / "b" / "record.json").stat().st_mtime_ns) == before
    rows = trace_many(model, [line, PromptLine(id="b", prompt="33 + 45 =")], tmp_path)
    assert [row["status"] for row in rows] == ["traced", "traced"]
    with (tmp_path / "summary.csv").open(newline="") as table:
        assert [row["prompt"] for row in csv.DictReader(table)] == ["the hammer was", "33 + 45 ="]


def test_memory_that_runs_out_is_an_error_of_its_prompt(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trace(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TraceOptions, "trace", trace)
    rows = trace_many(model, [PromptLine(id=name, prompt="33 + 45 =") for name in "ab"], tmp_path)
    assert [row["error"] for row in rows] == ["CUDA out of memory"] * 2


def test_the_bar_is_shown_on_a_terminal(file: Path, tmp_path: Path) -> None:
    """And it is the only thing that moves there: the model's spinner has ended."""
    pty, termios = (pytest.importorskip(name, reason="no terminals to imitate") for name in ("pty", "termios"))
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    command = [sys.executable, "-m", "circuits", "trace", "--prompts", str(file), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=theirs, stdout=subprocess.DEVNULL, env={**ENVIRONMENT, "TERM": "xterm"})
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 1
    last_spinner = shown.rfind(b"loading the model")
    assert 0 < last_spinner < shown.find(b"trace:") < shown.find(b"6/6")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": TraceOptions(max_nodes=7)}, "made with another max_nodes (2000, now 7)"),
        ({"options": TraceOptions(heads=False)}, "made with another heads (True, now False)"),
        ({"formats": ["json"]}, "made with another formats (['safetensors', 'neuronpedia'], now ['json'])"),
    ],
)
def test_other_options_are_refused_before_any_work(
    model: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    lines = [PromptLine(id="a", prompt="the hammer was"), PromptLine(id="b", prompt="33 + 45 =")]
    trace_many(model, lines[1:], tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        trace_many(model, lines, tmp_path, **change)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match=r"another prompt \('33 \+ 45 =', now 'the hammers were'\)"):
        trace_many(model, [PromptLine(id="b", prompt="the hammers were")], tmp_path)


def test_options_that_an_older_record_lacks_were_at_their_defaults(model: Any, tmp_path: Path) -> None:
    lines = [PromptLine(id="a", prompt="the hammer was")]
    trace_many(model, lines, tmp_path)
    path = tmp_path / "a" / "record.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    for name in ("groups", "inclusion"):
        assert record["made_by"].pop(name) is False
    path.write_text(json.dumps(record), encoding="utf-8")
    before = path.stat().st_mtime_ns
    trace_many(model, lines, tmp_path)
    assert path.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=re.escape("made with another groups (False, now True)")):
        trace_many(model, lines, tmp_path, options=TraceOptions(groups=True))


def test_a_folder_of_something_else_is_refused(model: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match=r"record.json does not exist"):
        trace_many(model, [PromptLine(id="a", prompt="the hammer was")], tmp_path)
    (tmp_path / "a" / "record.json").write_text("{}")
    with pytest.raises(ValueError, match=r"record.json is no record of a traced prompt"):
        trace_many(model, [PromptLine(id="a", prompt="the hammer was")], tmp_path)


def test_ctrl_c_leaves_no_partial_prompt(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = TraceOptions.trace

    def interrupted(self: TraceOptions, *arguments: Any, **options: Any) -> Any:
        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        return trace(self, *arguments, **options | {"progress": stop})

    monkeypatch.setattr(TraceOptions, "trace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trace_many(model, [PromptLine(id="a", prompt="the hammer was")], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_and_kills(file: Path, tmp_path: Path) -> None:
    """One process, and two under torchrun that are killed and started again, write equal files."""
    trace = ["-m", "circuits", "trace", "--prompts", str(file), "--out"]
    single = subprocess.run([sys.executable, *trace, str(tmp_path / "one")], env=ENVIRONMENT, check=False, timeout=300)
    assert single.returncode == 1  # one prompt fails
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*torchrun, *trace, str(tmp_path / "two")]
    quiet: dict[str, Any] = {"env": ENVIRONMENT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    killed = subprocess.Popen(command, **quiet)
    end = time.monotonic() + 240
    while not list((tmp_path / "two").glob("[!.]*/record.json")) and time.monotonic() < end and killed.poll() is None:
        time.sleep(0.02)
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    workers = [int(pid) for pid, parent in map(str.split, listed.splitlines()) if int(parent) == killed.pid]
    assert len(workers) == 2
    for process in (killed.pid, *workers):  # workers outlive their launcher
        os.kill(process, signal.SIGKILL)
    killed.wait()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").glob("[!.]*/*")}
    assert finished
    subprocess.run(command, check=False, timeout=300, **quiet)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no JSON (Expecting"),
        ("[1]", "line 2: expected an object with a prompt, got list"),
        ('"text"', "line 2: expected an object with a prompt, got str"),
        ("{}", "line 2: prompt: expected some text, got None"),
        ('{"prompt": " "}', "line 2: prompt: expected some text, got ' '"),
        ('{"prompt": 5}', "line 2: prompt: expected some text, got 5"),
        ('{"prompt": "a", "text": "b"}', "line 2: unknown entry 'text': expected prompt, id and target"),
        ('{"prompt": "a", "id": "x"}', "line 2: line 1 has the id 'x' too"),
        (
            '{"prompt": "a", "id": "../x"}',
            "line 2: id: expected up to 100 letters, digits, dots, dashes and underscores",
        ),
        ('{"prompt": "a", "id": ".x"}', "line 2: id: expected"),
        ('{"prompt": "a", "id": "x."}', "line 2: id: expected"),
        ('{"prompt": "a", "id": "Summary.csv"}', "line 2: id: expected"),
        ('{"prompt": "a", "id": "X"}', "line 2: line 1 has the id 'X' too"),
        ('{"prompt": "a", "id": 5}', "line 2: id: expected"),
        ('{"prompt": "a", "target": 5}', "line 2: target: expected a text or a list of texts, got 5"),
        ('{"prompt": "a", "target": [5]}', "line 2: target: expected a text or a list of texts, got [5]"),
        (b'{"prompt": "\xff"}', "line 2: no JSON ('utf-8' codec"),
        ("[" * 100_000, "line 2: no JSON ("),
    ],
)
def test_a_bad_line_is_named(line: str | bytes, message: str, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "a", "id": "x"}\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    assert main(["trace", "--prompts", str(path), "--out", str(tmp_path / "out")]) == 2
    assert f"{path} {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_mistakes_of_the_command(file: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").write_text("\n")
    out = ["--out", str(tmp_path / "out")]
    for arguments, message in (
        (["--prompts", str(file)], "out: expected a folder for the prompts' folders, given none"),
        (
            ["a prompt", "--prompts", str(file), *out],
            "prompts: expected a file alone, given a prompt or a target beside it",
        ),
        (
            ["--prompts", str(tmp_path / "none"), *out],
            "none: expected a file of prompts, but it cannot be read (No such",
        ),
        (["--prompts", str(tmp_path / "empty"), *out], "empty holds no prompts: expected one JSON object per line"),
        (["--prompts", str(file), *out, "--format", "docx"], "format: expected one of"),
        ([], "prompt: expected some text, given none"),
    ):
        assert main(["trace", *arguments]) == 2
        assert message in capsys.readouterr().err
