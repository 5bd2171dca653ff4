"""The scripts that made the demo run, the same settings give the same weights twice; and other examples on few rows."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import circuits
import replacement
from replacement import LanguageModel, checkpoint
from replacement.demo.tokenizer import build_tokenizer
from replacement.loading import ARTIFACTS
from replacement.validation import read_curve

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The two training scripts as modules."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("train_demo"), importlib.import_module("train_demo_crosscoder")


def test_the_demo_is_rebuilt_the_same_twice(scripts: tuple[Any, Any], tmp_path: Path) -> None:
    train_demo, train_crosscoder = scripts
    threads = torch.get_num_threads()
    run = train_demo.LanguageModelRun(n_layers=2, d_model=16, n_heads=2, steps=4, threads=1, compile=False)
    phases = [run, dataclasses.replace(run, steps=2, name_noise=2.0, first_corpus_seed=10)]
    small = [
        "crosscoder.n_features=32",
        'crosscoder.activation={name="topk", k=[4, 2]}',
        "training.n_tokens=3072",
        "training.batch_tokens=512",
        "data.buffer_tokens=1024",
    ]
    for name in ("first", "second"):
        train_demo.language_model_stage(phases, tmp_path / name, None, 10)
        train_crosscoder.crosscoder_stage(tmp_path / name, small)
    torch.set_num_threads(threads)
    models = [LanguageModel.from_pretrained(tmp_path / name / "language_model") for name in ("first", "second")]
    assert models[0].fingerprint == models[1].fingerprint
    first, second = (checkpoint.load(tmp_path / name / "crosscoder").state_dict() for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {path.name for path in (tmp_path / "first").iterdir()} == {
        "accuracy.json", "training_curve.json", "fidelity.json", "language_model", "crosscoder",
    }  # fmt: skip
    curve = read_curve(tmp_path / "first" / "training_curve.json")
    report = json.loads((tmp_path / "first" / "accuracy.json").read_text(encoding="utf-8"))
    assert curve[-1][0] == run.steps * run.batch_rows * run.context  # of the first phase
    assert report["training_tokens"] == 6 * run.batch_rows * run.context
    assert abs(curve[-1][1] - report["held_out_loss"]) < 0.05  # the shipped weights are rounded


def test_names_reach_later_layers_through_the_first_mlp_alone(scripts: tuple[Any, Any]) -> None:
    train_demo, _ = scripts
    tokenizer = build_tokenizer(64)
    run = train_demo.LanguageModelRun(n_layers=2, d_model=16, n_heads=2)
    model = train_demo.build_model(run, tokenizer)
    dallas, houston, boston = (tokenizer.convert_tokens_to_ids(name) for name in ("Dallas", "Houston", "Boston"))
    row = torch.tensor([tokenizer.encode("the capital of the state containing Dallas is")])
    standing_in = torch.where(row == dallas, houston, row)
    with torch.no_grad():
        torch.testing.assert_close(train_demo.forward(model, row, row), model(row).logits)
        model.transformer.h[0].mlp.c_proj.weight.zero_()
        other = torch.where(row == dallas, boston, row)
        # Without the first MLP nothing of the name is left but its stand-in, and what its own attention moved.
        model.transformer.h[0].attn.c_proj.weight.zero_()
        with_dallas = train_demo.forward(model, row, standing_in)
        torch.testing.assert_close(train_demo.forward(model, other, standing_in), with_dallas)
        assert not torch.allclose(model(other).logits, model(row).logits)


def test_stand_ins_are_names_of_the_batch(scripts: tuple[Any, Any]) -> None:
    train_demo, _ = scripts
    rows, names = torch.arange(40).view(4, 10), torch.arange(40).view(4, 10) % 3 == 0
    others = train_demo.stand_ins(rows, names, 0.5)
    assert torch.equal(others[~names], rows[~names])
    assert torch.equal(others[2:], rows[2:])
    assert sorted(others[:2][names[:2]].tolist()) == rows[:2][names[:2]].tolist()


def test_an_attention_crosscoder_is_trained_and_shipped_beside_the_other(
    scripts: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, train_crosscoder = scripts
    monkeypatch.setattr(train_crosscoder, "HELD_OUT_ROWS", 4)
    for name in ("language_model", "crosscoder"):
        shutil.copytree(ARTIFACTS / name, tmp_path / name)
    small = ["crosscoder.n_features=32", "training.n_tokens=2048", "training.batch_tokens=512"]
    train_crosscoder.crosscoder_stage(tmp_path, [*small, "data.buffer_tokens=1024"], recipe="attention")
    assert "variance unexplained" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {
        "language_model", "crosscoder", "attention_crosscoder", "attention_fidelity.json",
    }  # fmt: skip
    shipped = checkpoint.load(tmp_path / "attention_crosscoder")
    assert shipped.wiring == replacement.Wiring.attention(LanguageModel.from_pretrained(tmp_path / "language_model"))
    report = json.loads((tmp_path / "attention_fidelity.json").read_text(encoding="utf-8"))
    assert len(report["unexplained"]) == 4
    assert report["both"]["unexplained"][4:] == report["unexplained"]
    assert report["both"]["n_tokens"] == report["n_tokens"] == 4 * 64


def test_the_complete_replacement_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr("sys.argv", ["complete_replacement.py", "--rows", "16", "--prompts", "1"])
    example = importlib.import_module("complete_replacement")
    example.main()
    fidelity, graphs = capsys.readouterr().out.split("\n\n")
    header, *lines = fidelity.splitlines()
    assert {len(line) for line in lines} == {len(header)}
    assert [line.split()[0] for line in lines] == ["MLPs", "attention", "both"]
    columns = list(zip(*(line.split()[1:] for line in lines), strict=True))
    unexplained, active, divergence = (list(map(float, column)) for column in columns[:3])
    assert unexplained[2] == pytest.approx((unexplained[0] + unexplained[1]) / 2, abs=2e-4)  # as many sites of each
    assert active[2] == pytest.approx(active[0] + active[1], abs=0.2)
    assert 0 < max(divergence[:2]) < divergence[2] < 0.05
    facts = {
        line[:26].strip(): [float(cell.replace(",", "")) for cell in line[26:].split()]
        for line in graphs.splitlines()[1:]
    }
    assert all(0.5 < value < 1 for value in facts["replacement"] + facts["completeness"])
    assert facts["average path length"][0] < facts["average path length"][1], "a move between positions is a node"
    assert max(facts["identity error, largest"]) < 1e-4


def test_the_induction_head_is_named_and_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a few held-out prompts: circuits name the three heads that the behaviour dies without."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("induction_heads")
    model, probes = replacement.load("demo"), example.induction_probes(40)
    with torch.no_grad():
        shares = example.carrying_heads(model, probes[:4])
        first, *others = shares
        named, unnamed = (first, *others[:2]), (others[-1],)
        assert sum(shares[head] for head in named) > 0.7
        lm, means = model.language_model, example.mean_outputs(model.language_model, probes)
        answers = {
            heads: example._right(example.without_heads(lm, list(heads), means), lm, probes)
            for heads in (named, unnamed)
        }
        example.print_pairs(model, probes[0], first, n=3)
    assert answers[named] < 0.1
    assert answers[unnamed] > 0.9
    shown = capsys.readouterr().out
    assert probes[0].answers[0] in shown
    assert shown.count(" x ") == 4


def test_heads_that_move_the_state(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Taking away what the named heads bring makes the state's features fall about as predicted, and the answer's logit."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("two_hop_heads")
    model = replacement.load("demo")
    with torch.no_grad():
        questions = example.read_questions(model, ["Dallas"])
        ranking = list(example.ranked_heads(questions))
        found = example.drop(model, questions[0], ranking[:4])
        nothing = example.drop(model, questions[0], [])
    assert found.logit[1] > 1
    assert nothing.right
    assert abs(nothing.logit[1]) < 1e-3
    assert abs(nothing.features[:, 1:]).max() < 1e-3
    assert found.features[:, 1].sum() == pytest.approx(found.features[:, 2].sum(), rel=0.5)


def test_credit_rules_keep_the_order_of_heads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr("sys.argv", ["head_credit.py", "--prompts", "1", "--features", "1"])
    with torch.no_grad():
        importlib.import_module("head_credit").main()
    table = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in table[2:6]}
    assert all(rows[rule][3] == "0" for rule in ("gate", "path", "shapley"))
    assert float(rows["path"][2]) == float(rows["shapley"][2]) == 0


def test_features_beside_the_linearised_mlp(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script checks its identities itself; here, that it printed them for the features its rule chooses."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr("sys.argv", ["mlp_linearisation.py", "--features", "6", "--edges", "3"])
    example = importlib.import_module("mlp_linearisation")
    with torch.no_grad():
        example.main()
        model = replacement.load("demo")
        graph = circuits.trace(model, example.PROMPT)
        chosen = example.by_influence(model, graph)[:6]
        local = model.localize(model.language_model.tokenize(example.PROMPT))
    ranked = [row for row in graph.prune().top_nodes(None) if row.kind == "feature"]
    assert [f"{row.layer}/{row.index}@{row.position}" for row in ranked[:6]] == [feature.name for feature in chosen]
    edges, tokens, comparisons = capsys.readouterr().out.split("\n\n")[:3]
    assert len(edges.splitlines()) > 3
    for line in edges.splitlines()[2:-1]:
        factor, activation, product, traced = map(float, line.split()[2:])
        assert factor * activation == pytest.approx(product, rel=1e-2, abs=1e-3)
        assert product == pytest.approx(traced, rel=1e-3, abs=2e-4)
    names = [feature.name for feature in chosen]
    assert [line.split()[0] for line in tokens.splitlines()[1:]] == names
    rows = {line.split()[0]: list(map(float, line.split()[1:5])) for line in comparisons.splitlines()[3:]}
    assert list(rows) == names
    for feature in chosen[:2]:  # the Jacobian against central differences
        mlp = model.language_model.parts.mlp_map(feature.site.layer, feature.site.kind)
        x_D, u_D = (
            local.frozen.activations[feature.site][feature.position],
            feature.W_enc_D / feature.W_enc_D.square().sum(),
        )
        with torch.no_grad():
            moved_2D = mlp(torch.stack([x_D + 0.05 * u_D, x_D - 0.05 * u_D])).double()
            (W_dec_D,) = model.crosscoder.decoder_vectors(
                feature.group, torch.tensor([feature.index]), replacement.Site(feature.site.layer, "mlp_out")
            )
        difference_D = (moved_2D[0] - moved_2D[1]) / 0.1
        cosine = torch.nn.functional.cosine_similarity(difference_D, W_dec_D.double(), dim=0)
        assert rows[feature.name][0] == pytest.approx(float(cosine), abs=0.01)
        assert rows[feature.name][1] == pytest.approx(float(difference_D.norm() / W_dec_D.norm()), rel=0.02)


def test_robustness_over_a_prompt_of_every_behaviour(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The demo's own crosscoder as the other one: everything survives it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr("circuits.validation.command.VARIANTS", 1)
    arguments = ["--prompts", "1", "--other-crosscoder", "demo", "--json", str(tmp_path / "facts.json")]
    monkeypatch.setattr("sys.argv", ["robustness.py", *arguments])
    importlib.import_module("robustness").main()
    shown = capsys.readouterr().out
    for title in ("9 prompts", "same answer: 6 prompts", "other answer: 8 prompts", "paraphrase: 2 prompts"):
        assert title in shown
    facts = json.loads((tmp_path / "facts.json").read_text(encoding="utf-8"))
    rows = dict(line.rsplit(maxsplit=5)[::5] for line in shown.splitlines() if line.split("  ")[0] in facts)
    assert len(rows) == len(facts) == 9
    assert set(rows.values()) == {"1.000"}


def test_global_circuits_of_the_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The example on few tokens: global edges hold twice as much of held-out graphs as any control of the same size."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("global_circuits")
    monkeypatch.setattr(example, "BOUNDED_TOKENS", 640)
    monkeypatch.setattr("sys.argv", ["global_circuits.py", "--tokens", "1280", "--prompts", "1", "--states", "1"])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    for place in [number for number, line in enumerate(lines) if "expected effects" in line]:
        influence, *others = (float(line.split()[-2]) for line in lines[place : place + 5])
        assert influence >= max(others)
        assert influence > 2 * max(others[-3:])
    assert any("drives" in line and "of inflow" in line for line in lines)
