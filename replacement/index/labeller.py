"""Labels from a command of the user's own, such as a script that asks a language model.

The command reads one JSON object per line from its standard input, one line per feature that has a claim:

    {"layer": 2, "index": 345, "density": 0.0012, "max_activation": 7.1,
     "examples": [{"tokens": ["the", "state", ...], "activations": [0.0, 3.2, ...], "peak": 1}, ...],
     "promoted": [["Austin", 3.1], ...], "suppressed": [["?", -1.2], ...],
     "claim": {"text": "Dallas | Houston", "fires_on": {"word": ["Dallas", "Houston"]},
               "precision": 0.9, "recall": 0.8, "f1": 0.85}}

and writes one per line to its standard output, for as many of these features as it likes and in any order:

    {"layer": 2, "index": 345, "label": "cities of Texas", "fires_on": {"word": ["Dallas", "Houston", "Austin"]}}

`fires_on` is optional: a claim in the grammar of `replacement.index.claims`, which is scored on held-out text as those of rules
are. A label without one has no score and is shown only where no label has one. What the command writes to standard error is
shown. It is run without a shell, once.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from replacement.index.claims import Claim, printable
from replacement.index.records import Example, FeatureRecord, Label

LONGEST_LABEL = 200
"""Characters."""
_LONGEST_LINE = 1 << 20


@dataclass(frozen=True, slots=True)
class Answer:
    """What the command said of a feature."""

    layer: int
    index: int
    label: str
    """Printable."""
    claim: Claim | None
    """Its claim, if it made one."""


def question(record: FeatureRecord, claim: Claim, label: Label) -> dict[str, Any]:
    """What the command reads of a feature.

    Args:
        record: what the index knows of it.
        claim: the one found by counting.
        label: its label, for the scores.
    """

    def shown(example: Example) -> dict[str, Any]:
        activations = [round(activation, 4) for activation in example.activations]
        return {"tokens": example.tokens, "activations": activations, "peak": example.peak}

    scores = {"precision": label.precision, "recall": label.recall, "f1": label.f1}
    return {
        "layer": record.layer,
        "index": record.index,
        "density": record.density,
        "max_activation": record.max_activation,
        "examples": [shown(example) for example in (*record.top_examples, *record.quantile_examples)],
        "promoted": record.effects.promoted,
        "suppressed": record.effects.suppressed,
        "claim": {"text": claim.text(), "fires_on": claim.to_json(), **scores},
    }


def ask(command: str, questions: Iterable[dict[str, Any]], *, timeout_s: float | None = None) -> list[Answer]:
    """Run the command on some questions.

    Args:
        command: program and arguments, as in a shell, but run without one.
        questions: see `question`.
        timeout_s: seconds after which it is ended; None waits.

    Raises:
        ValueError: a command that cannot be run, fails or takes too long, or output that is not as this module says.
    """
    try:
        arguments = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"labeller: {command!r:.100} is no command ({error})") from None
    if not arguments:
        raise ValueError("labeller: expected a command, got an empty text")
    name = printable(arguments[0])
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as answered:  # files, because pipes may fill up
        features = set()
        for entry in questions:
            features.add((entry["layer"], entry["index"]))
            asked.write(json.dumps(entry).encode() + b"\n")
        asked.seek(0)
        try:
            done = subprocess.run(arguments, stdin=asked, stdout=answered, timeout=timeout_s, check=False)
        except OSError as error:
            raise ValueError(f"labeller: {name} cannot be run: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise ValueError(f"labeller: {name} was ended because it took more than {timeout_s:g} s") from None
        if done.returncode:
            raise ValueError(f"labeller: {name} failed with exit code {done.returncode}")
        answered.seek(0)
        return list(_answers(answered, features, f"labeller: {name}"))


def _answers(lines: IO[bytes], features: set[tuple[int, int]], name: str) -> Iterator[Answer]:
    left = set(features)
    number = 0
    while line := lines.readline(_LONGEST_LINE + 1):
        number += 1
        place = f"{name}, line {number} of its output"
        if len(line) > _LONGEST_LINE:
            raise ValueError(f"{place}: longer than {_LONGEST_LINE} bytes")
        if not line.strip():
            continue
        try:
            answer = _answer(json.loads(line.decode()))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: {error}") from None
        feature = (answer.layer, answer.index)
        if feature not in left:
            known = "answered twice" if feature in features else "not a feature that was asked about"
            raise ValueError(f"{place}: {answer.layer}/{answer.index} is {known}")
        left.remove(feature)
        yield answer


def _answer(given: Any) -> Answer:
    if not isinstance(given, dict):
        raise ValueError(f"expected a JSON object, got {type(given).__name__}")
    layer, index = given.get("layer"), given.get("index")
    if type(layer) is not int or type(index) is not int:
        raise ValueError(f"expected integers as layer and index, got {layer!r:.20} and {index!r:.20}")
    label = given.get("label")
    if not isinstance(label, str) or not 1 <= len(printable(label.strip())) <= LONGEST_LABEL:
        raise ValueError(f"expected a label of 1 to {LONGEST_LABEL} characters, got {label!r:.50}")
    claim = None if given.get("fires_on") is None else Claim.from_json(given["fires_on"])
    return Answer(layer, index, printable(label.strip()), claim)
