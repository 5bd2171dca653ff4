"""What both commands share: Ctrl-C from the first moment on, the version, long inputs, options that load a model."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from circuits.cli import main as circuits_main
from replacement.cli import main as replacement_main
from replacement.command_line import ModelOptions
from replacement.console import PIPE_WIDTH, add_row, show, table

COMMANDS = [("replacement", replacement_main), ("circuits", circuits_main)]
INTERRUPT = """
import os, signal, sys
wanted = sys.argv.pop(1)
class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == wanted:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupts())
from {package}.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("package", ["replacement", "circuits"])
@pytest.mark.parametrize("module", ["{package}.cli", "typer", "rich.console", "replacement.command_line", "torch"])
def test_interrupted_import_ends_without_a_traceback(package: str, module: str, tmp_path: Path) -> None:
    """Ctrl-C at the very moment in which a module is imported."""
    verb = ["trace", "a b"] if package == "circuits" else ["show", "demo"]
    script = INTERRUPT.format(package=package)
    ran = subprocess.run(
        [sys.executable, "-c", script, module.format(package=package), *verb],
        capture_output=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert ran.returncode in (-signal.SIGINT, 130)
    assert ran.stdout + ran.stderr == b""


def test_interrupted_at_any_moment_after_the_start() -> None:
    """At moments drawn at random, from the first import of ours on."""
    script = (
        "import sys\nfrom circuits.__main__ import main\nimport replacement.start as start\n"
        "real = start.signal.signal\n"
        "def told(*given):\n    result = real(*given)\n    print('started', flush=True)\n    return result\n"
        "start.signal.signal = told\nsys.argv[1:] = ['show', '/nowhere']\nsys.exit(main())"
    )
    for _ in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        time.sleep(random.uniform(0, 0.3))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode in (-signal.SIGINT, 130, 2)
        assert errors in ("", "error: /nowhere: expected a circuit file, but there is no such file\n")


def test_an_ignored_interrupt_stays_ignored() -> None:
    """As under nohup, and in scripts that start a command in the background."""
    script = INTERRUPT.format(package="circuits").replace(
        "import os", "import signal; signal.signal(2, 1)\nimport os", 1
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, "typer", "--version"], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0
    assert ran.stdout.startswith("crosstrace ")


@pytest.mark.parametrize(("name", "main"), COMMANDS)
def test_version(name, main, capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split()[0] == "crosstrace"
    assert main(["--help"]) == 0
    assert "--version" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "main"), COMMANDS)
def test_long_inputs_are_not_echoed_whole(name, main, capsys) -> None:
    assert main(["show", "x" * 5000]) == 2
    error = capsys.readouterr().err
    assert len(error) < 400
    assert "xxx…xxx" in error
    assert main(["show", "many words " * 5000]) == 2
    assert len(capsys.readouterr().err) < 1000


@pytest.mark.parametrize("package", ["replacement", "circuits"])
def test_a_reader_that_leaves_early_is_no_error(package: str) -> None:
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run(
        [sys.executable, "-m", package, "--help"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(write)
    assert ran.returncode == 1
    assert ran.stderr == ""


def test_options_are_filled_up_from_the_graph() -> None:
    stored = {"model": "/m", "crosscoder": "/c", "attention_crosscoder": "/a"}
    facts = {"model": "m", "loaded_from": stored, "attention": "attention, 2 x 8 features, ReLU"}
    assert ModelOptions().for_graph(facts) == ModelOptions(**stored)
    assert ModelOptions(crosscoder="x").for_graph(facts) == ModelOptions(**{**stored, "crosscoder": "x"})
    linear = {"model": "m", "loaded_from": {"model": "/m", "crosscoder": "/c"}, "attention": "linear"}
    assert ModelOptions(device="cuda").for_graph(linear) == ModelOptions(model="/m", crosscoder="/c", device="cuda")
    with pytest.raises(ValueError, match="attention-crosscoder: the graph was traced with linear attention"):
        ModelOptions(attention_crosscoder="demo").for_graph(linear)


def test_graphs_that_do_not_say_where_their_model_is() -> None:
    """Those of earlier releases, and of models that were put together by hand."""
    assert ModelOptions().for_graph({"model": "demo", "attention": "linear"}) == ModelOptions()
    both = ModelOptions().for_graph({"model": "demo", "attention": "attention, 4 x 512 features, JumpReLU"})
    assert both == ModelOptions(attention_crosscoder="demo")
    with pytest.raises(ValueError, match="model: the graph was traced in gpt2 and does not say where that is"):
        ModelOptions().for_graph({"model": "gpt2"})
    assert ModelOptions(model="gpt2", crosscoder="c").for_graph({"model": "gpt2"}).crosscoder == "c"


def test_a_trace_says_where_its_model_was_loaded_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from circuits import trace
    from replacement import load
    from replacement.loading import ARTIFACTS

    monkeypatch.chdir(ARTIFACTS)
    graph = trace(load("demo", crosscoder="crosscoder"), "the capital of Texas is", max_nodes=1)
    assert graph.metadata["loaded_from"] == {"model": "demo", "crosscoder": str(ARTIFACTS / "crosscoder")}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "crosscoder").symlink_to(ARTIFACTS / "crosscoder")
    assert load("demo", crosscoder=tmp_path / "run").crosscoder.n_features == 2048


def test_cells_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    shown = table("name", "[b]number[/b]")
    add_row(shown, "[red]x[/red]", 3)
    show(shown)
    printed = capsys.readouterr().out
    assert "[red]x[/red]" in printed
    assert "[b]number[/b]" in printed
    assert max(map(len, printed.splitlines())) <= PIPE_WIDTH


def test_a_wrapped_cell_begins_beside_the_name_of_its_row() -> None:
    printed = io.StringIO()
    console = Console(width=30, file=printed)
    show(
        table("setting", "meaning", texts=("meaning",), rows=[("k", "how many features are kept of a token")]), console
    )
    lines = printed.getvalue().splitlines()
    assert lines[1].split() == ["k", "how", "many", "features"]
    assert len(lines) == 3
