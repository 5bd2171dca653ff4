"""The command of the user's own: what it reads and writes, and one clear error for everything else."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from replacement.index.claims import Claim
from replacement.index.labeller import Answer, ask, question
from replacement.index.records import Example, FeatureRecord, Label, TokenEffects

RECORD = FeatureRecord(
    2,
    345,
    density=0.01,
    max_activation=3.0,
    top_examples=(Example(("in", " Dallas"), (0.0, 3.00004), 1, row=7, position=5),),
    quantile_examples=(Example((" Houston",), (1.0,), 0, row=9, position=0, quantile=0.5),),
    effects=TokenEffects(promoted=((" Austin", 2.5),)),
)
CLAIM = Claim.of(word=["Dallas", "Houston"])
QUESTION = question(RECORD, CLAIM, Label("Dallas | Houston", "rule", "Dallas | Houston", 0.5, 1.0, 2 / 3))
GOOD = {"layer": 2, "index": 345, "label": "cities of Texas"}


def command(folder: Path, body: str) -> str:
    """A Python script as a command."""
    script = folder / "my labeller.py"
    script.write_text(f"import json, sys\n{body}\n")
    return shlex.join([sys.executable, str(script)])


def replies(folder: Path, *lines: Any) -> str:
    """A command that reads everything and answers with these lines."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    return command(folder, f"sys.stdin.read()\nsys.stdout.write({chr(10).join([*texts, ''])!r})")


def test_the_question_holds_the_evidence() -> None:
    read = json.loads(json.dumps(QUESTION))
    assert read["examples"] == [
        {"tokens": ["in", " Dallas"], "activations": [0.0, 3.0], "peak": 1},
        {"tokens": [" Houston"], "activations": [1.0], "peak": 0},
    ]
    assert read["promoted"] == [[" Austin", 2.5]]
    assert read["claim"] == {
        "text": "Dallas | Houston",
        "fires_on": {"word": ["Dallas", "Houston"]},
        "precision": 0.5,
        "recall": 1.0,
        "f1": 2 / 3,
    }


def test_answers_are_read(tmp_path: Path) -> None:
    body = """
for line in sys.stdin:
    feature = json.loads(line)
    rule = feature["claim"]["fires_on"]
    print(json.dumps({"layer": feature["layer"], "index": feature["index"], "label": " Texas\\x1b[2J ", "fires_on": rule}))
    print()
"""
    assert ask(command(tmp_path, body), [QUESTION]) == [Answer(2, 345, "Texas\\x1b[2J", CLAIM)]


def test_answers_may_be_few_and_lack_a_claim(tmp_path: Path) -> None:
    other = {**QUESTION, "index": 1}
    assert ask(replies(tmp_path, GOOD), [QUESTION, other]) == [Answer(2, 345, "cities of Texas", None)]


def test_much_text_both_ways_does_not_block(tmp_path: Path) -> None:
    body = "for i, line in enumerate(sys.stdin):\n    print(json.dumps({'layer': 0, 'index': i, 'label': 'x' * 200}))"
    questions = [{"layer": 0, "index": i, "text": "y" * 1000} for i in range(2000)]
    assert len(ask(command(tmp_path, body), questions)) == 2000


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Texas", "line 1 of its output: Expecting value"),
        ("[" * 100_000, "line 1 of its output: "),
        (" " * (1 << 20) + "{}", "line 1 of its output: longer than 1048576 bytes"),
        ([GOOD], "expected a JSON object, got list"),
        ({**GOOD, "layer": "2"}, "expected integers as layer and index, got '2' and 345"),
        ({**GOOD, "index": True}, "expected integers as layer and index, got 2 and True"),
        ({**GOOD, "index": 9}, "2/9 is not a feature that was asked about"),
        ({**GOOD, "label": "x" * 201}, "expected a label of 1 to 200 characters, got 'xxx"),
        ({**GOOD, "label": " "}, "expected a label of 1 to 200 characters"),
        ({"layer": 2, "index": 345}, "expected a label of 1 to 200 characters, got None"),
        ({**GOOD, "fires_on": {"next": ["a"]}}, "expected a condition among"),
        ({**GOOD, "fires_on": ["a"]}, "expected an object of conditions, got list"),
    ],
)
def test_bad_output_is_one_clear_error(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"^labeller: .*python") as raised:
        ask(replies(tmp_path, line), [QUESTION])
    assert message in str(raised.value)


def test_output_that_is_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 1 of its output: 'utf-8' codec"):
        ask(command(tmp_path, "sys.stdout.buffer.write(b'\\xff\\xfe\\n')"), [QUESTION])


def test_a_feature_is_answered_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 2 of its output: 2/345 is answered twice"):
        ask(replies(tmp_path, GOOD, GOOD), [QUESTION])


def test_commands_that_do_not_work(tmp_path: Path) -> None:
    for given, message in (
        ("", "labeller: expected a command, got an empty text"),
        ("say 'x", 'labeller: "say \'x" is no command'),
        ("no-such-program --x", "labeller: no-such-program cannot be run: No such file or directory"),
        (command(tmp_path, "sys.exit(3)"), "failed with exit code 3"),
    ):
        with pytest.raises(ValueError, match=r"^labeller: ") as raised:
            ask(given, [QUESTION])
        assert message in str(raised.value)


def test_a_command_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"was ended because it took more than 0\.5 s"):
        ask(command(tmp_path, "import time; time.sleep(60)"), [QUESTION], timeout_s=0.5)


def test_no_shell_reads_the_command(tmp_path: Path) -> None:
    target = tmp_path / "written"
    assert ask(f"{sys.executable} -c pass > {target}; touch {target}", [QUESTION]) == []
    assert not target.exists()
