"""Pages as HTML: aligned numbers, marks, nothing that a name could break out of; and reports that stay short as text."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from html_reader import HOSTILE, read
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Group
from rich.text import Text

import replacement
from replacement import Intervention, LanguageModel, console
from replacement.index.records import Example, FeatureRecord, Label, TokenEffects
from replacement.notebook import Report, to_html
from replacement.validation.fidelity import measure_fidelity
from replacement.validation.validate import ValidationConfig, validate


@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), max_size=4), st.text(min_size=1, max_size=20))
def test_texts_of_any_kind_come_back_as_they_are(rows: list[tuple[str, str]], title: str) -> None:
    page = console.section(title, console.table("a", "b", rows=rows, texts=("b",)))
    cells = [cell for row in [("a", "b"), *rows] for cell in row]
    shown = [_without_controls(cell) for cell in cells]
    assert [_without_controls(cell) for cell in read(to_html(page)).cells] == shown


def _without_controls(text: str) -> str:
    """Without what rich (control codes) and HTML parsers (line ends) do not keep."""
    return "".join(c for c in text if c.isprintable() and c != "\r")


def test_a_hostile_name_stays_text() -> None:
    page = Group(Text(HOSTILE), console.pairs([(HOSTILE, HOSTILE)]), console.table(HOSTILE, rows=[[HOSTILE]]))
    shown = read(to_html(page))
    assert shown.text.count("<img src=x onerror=\"alert('1')\">&amp;</script></table>") == 5
    assert shown.text.count("[red]x[/red] 👩‍🚀") == 5


def test_numbers_are_aligned_and_texts_marked() -> None:
    text = Text("plain ")
    text.append("strong", "bold red")
    shown = to_html(console.table("name", "number", "note", rows=[("a", 1, text)], texts=("note",)))
    aligned = ["right" in style for style in read(shown).styles]
    assert aligned == [False, True, False] * 2
    assert '>plain <span style="font-weight:600;background:' in shown
    assert read(shown).cells[-1] == "plain strong"
    assert to_html(Text("title", style="bold")).count("font-weight:600") == 1
    assert to_html(Text()) == ""


def test_long_tables_say_how_much_is_left_out() -> None:
    def rows(number: int) -> Any:
        return ((str(place),) for place in range(number))

    assert "more" not in to_html(console.first_rows("n", rows=rows(20), n_rows=20))
    shown = read(to_html(console.first_rows("n", rows=rows(1234), n_rows=1234)))
    assert len(shown.cells) == 21
    assert shown.text.endswith("... and 1,214 more")


def test_a_report_is_a_json_object_with_a_page() -> None:
    facts = {"a": 1, "b": [1.5] * 1000}
    report = Report(facts, title="numbers", page=_page)
    assert report == facts
    assert json.loads(json.dumps(report)) == facts
    assert repr(report) == "Report(numbers: a, b)"
    assert read(report._repr_html_()).text == "a is 1"
    assert pickle.loads(pickle.dumps(report))._repr_html_() == report._repr_html_()


def _page(facts: Any) -> Text:
    return Text(f"a is {facts['a']}")


def test_interventions_show_what_changed() -> None:
    model = replacement.load("demo")
    tokens = model.language_model.tokenize("the capital of the state containing Dallas is")
    features = model.localize(tokens).features
    strongest = int(torch.where(features.row == len(tokens) - 2, features.activation, 0).argmax())
    layer, index = int(features.group[strongest]), int(features.index[strongest])
    found = model.intervene(tokens, [Intervention(layer=layer, index=index, position=-2, scale=0.0)])
    shown = read(found._repr_html_())
    name = f"{layer}/{index}@{len(tokens) - 2}"
    assert shown.cells[shown.cells.index(name) + 2] == "0"
    top = int(found.clean_logits[-1].argmax())
    place = shown.cells.index(model.language_model.token_strings([top])[0])
    clean, changed = (float(logits[-1].double().softmax(0)[top]) for logits in (found.clean_logits, found.logits))
    assert shown.cells[place + 1 : place + 3] == [f"{clean:.4f}", f"{changed:.4f}"]
    unchanged = read(model.intervene(tokens, [])._repr_html_())
    assert "(0 of 0)" in unchanged.text


def test_interventions_on_attention_are_named(language_model: Callable[..., LanguageModel]) -> None:
    lm = language_model("llama")
    crosscoders = (
        replacement.Crosscoder(wiring, n_features=24, activation=replacement.TopK(4), seed=0)
        for wiring in (replacement.Wiring.strictly_causal(lm), replacement.Wiring.attention(lm))
    )
    model = replacement.ReplacementModel(lm, next(crosscoders), attention_crosscoder=next(crosscoders))
    prompt = torch.tensor([1, 5, 9, 12])
    changed = Intervention(layer=0, index=3, position=1, part="attention", activation=7.0)
    cells = read(model.intervene(prompt, [changed])._repr_html_()).cells
    place = cells.index("attention:0/3@1")
    assert cells[place + 2] == "7"


@pytest.fixture
def record() -> FeatureRecord:
    example = Example(("a", HOSTILE, "b"), (0.0, 2.0, 0.5), 1, row=0, position=1)
    label = Label(HOSTILE, "person", f1=0.9)
    effects = TokenEffects(promoted=((HOSTILE, 1.5),))
    return FeatureRecord(1, 2, 0.25, 2.0, (0.0, 1.0, 2.0), (3, 4), (example,), (), effects, label)


def test_a_feature_of_an_index_is_a_page(record: FeatureRecord) -> None:
    assert repr(record).startswith("FeatureRecord(1/2: <img")
    shown = read(record._repr_html_())
    assert shown.text.count("<img") == 3
    assert "F1 0.90" in shown.text
    assert record._repr_html_().count("background:") == 2


def test_measurements_are_tables() -> None:
    model = replacement.load("demo")
    lm = model.language_model
    rows = torch.arange(64).view(2, 32) + 100
    fidelity = measure_fidelity(lm, model.crosscoder, rows)
    cells = read(fidelity._repr_html_()).cells
    assert cells[cells.index("KL") + 1] == f"{fidelity.kl:.4f}"
    report = validate(model, ValidationConfig(n_tokens=128, n_probes=2, controls=False))
    assert len(repr(report)) < 250
    shown = read(report._repr_html_())
    assert {"slice", "replaced", "layer"} <= set(shown.cells)
    assert f"{report['summary']['propagated']['kl']:.4f}" in shown.cells


def test_no_repr_dumps_tensors() -> None:
    model = replacement.load("demo")
    prompt = model.language_model.tokenize("the capital of the state containing Dallas is")
    local = model.localize(prompt)
    for value in (model, model.language_model, local, local.mlp, local.features, model.intervene(prompt, [])):
        assert len(repr(value)) < 150
        assert "tensor" not in repr(value)
