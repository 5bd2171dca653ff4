"""Measured effects: exact where everything is frozen, a hand-built chain, resampled ablation, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from rich.console import Console

import circuits
import replacement
from circuits.attribution.grounding import Grounding
from circuits.cli import main
from circuits.graph.nodes import NodeKind
from circuits.validation import command as validate_command
from circuits.validation import effects as effects_module
from circuits.validation.command import other_prompts
from circuits.validation.effects import Edit, Effects, Measured, sample_features
from circuits.validation.prediction import predicted_changes, scaled_alone
from circuits.validation.report import figure, in_short, page
from circuits.validation.resampling import Resampler
from circuits.validation.sufficiency import sufficiency
from circuits.validation.validate import one_layer_cosine, validate
from replacement import Intervention, JointTopK, ReLU, ReplacementModel, Site, TopK, Wiring

PROMPT = "the capital of the state containing Dallas is"
OTHERS = [tiny.random_tokens(seed=seed) for seed in range(1, 4)]


def traced(lm: Any, **options: Any) -> tuple[ReplacementModel, Grounding]:
    """A random replacement model and the full graph of a random prompt."""
    attention = tiny.crosscoder_for(lm, wiring=Wiring.attention(lm)) if options.pop("attention", False) else None
    model = ReplacementModel(lm, tiny.crosscoder_for(lm, **options), attention_crosscoder=attention)
    graph = circuits.trace(model, tiny.random_tokens(), coverage=1.0)
    return model, Grounding.of(model, graph)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("gpt2", {"attention": True}),
        ("gemma2", {}),
        ("neox", {}),
        ("llama", {"skip": True}),
        ("neox", {"skip": True}),
        ("gpt2", {"activation": TopK(30, relu=False)}),  # activations below 0 among the sources
    ],
)
def test_direct_edges_are_exact_where_everything_is_frozen(
    language_model: Any, architecture: str, options: dict[str, Any]
) -> None:
    model, grounding = traced(language_model(architecture, torch.float64), **options)
    predicted, measured = Effects(model, grounding).self_check(sample_features(grounding, 12, seed=0))
    assert len(predicted) > 50
    np.testing.assert_allclose(measured, predicted, atol=1e-6 * np.abs(measured).max())  # edges are stored in float32


@pytest.mark.parametrize("skip", [False, True])
def test_logits_and_activations_are_predicted_in_the_frozen_linear_case(language_model: Any, skip: bool) -> None:
    """ReLU features that stay active change by exactly what their edges say, and so do the logits."""
    model, grounding = traced(language_model("gpt2", torch.float64), activation=ReLU(), skip=skip)
    graph, effects = grounding.graph, Effects(model, grounding)
    changed = sample_features(grounding, 10, seed=1)
    predicted = predicted_changes(graph, scaled_alone(changed, 1e-3), total=False)
    found = effects.measure(changed, 1.001, "constrained", "frozen", norms="frozen")
    logits = graph.nodes.mask(NodeKind.LOGIT)
    scale = np.abs(predicted[:, logits]).max()
    np.testing.assert_allclose(found.change_BN[:, logits], predicted[:, logits], atol=1e-5 * scale)
    features = graph.nodes.mask(NodeKind.FEATURE) & graph.nodes.expanded
    later = features & (graph.nodes.layer[None] > graph.nodes.layer[changed][:, None])
    np.testing.assert_allclose(found.change_BN[later], predicted[later], atol=1e-5 * np.abs(predicted[later]).max())
    assert one_layer_cosine(graph, changed, predicted, found)["cosine"] == pytest.approx(1)


def test_one_layer_cosines_by_hand(build_graph: Any) -> None:
    """Two changed features: one predicted well and to do much, one predicted badly and to do little."""
    feature = {"kind": NodeKind.FEATURE, "expanded": True}
    rows = [feature | {"layer": layer, "index": i, "output_weight": 0.5 * layer} for layer in (0, 1) for i in (0, 1)]
    graph = build_graph(rows, [(2, 0, 1.0), (3, 1, 1.0)])
    predicted = np.array([[0, 0, 3.0, 0], [0, 0, 0, 1.0]])
    change = np.array([[0, 0, 6.0, 0], [0, 0, 4.0, 3.0]])
    measured = Measured(change, np.zeros(2), np.array([[0, 12.0], [0, 5.0]]))
    found = one_layer_cosine(graph, np.array([0, 1]), predicted, measured)
    assert found == {
        "features": 2,
        "cosine": pytest.approx((1 + 0.6) / 2),
        "median": pytest.approx((1 + 0.6) / 2),
        "larger_half": pytest.approx(1),
        "all_features": pytest.approx((18 / 36 + 3 / 5) / 2),
    }
    nothing = one_layer_cosine(graph, np.array([2]), np.zeros((1, 4)), measured)
    assert nothing["features"] == 0
    assert np.isnan([nothing[name] for name in ("cosine", "median", "larger_half", "all_features")]).all()


@pytest.mark.parametrize("patching", ["propagated", "original", "window"])
def test_measured_effects_equal_single_interventions(
    language_model: Any, patching: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effects_module, "WINDOW", 2)  # layers behind the window react again
    lm = language_model("gpt2", torch.float64)
    model, grounding = traced(lm)
    nodes, effects = grounding.graph.nodes, Effects(model, grounding)
    changed = sample_features(grounding, 6, seed=2)
    found = effects.measure(changed, 0.0, patching, "live")
    tokens = tiny.random_tokens()
    for number, node in enumerate(changed.tolist()):
        layer, place = int(nodes.layer[node]), {"position": int(nodes.position[node]), "index": int(nodes.index[node])}
        held = {"propagated": None, "original": range(layer + 1), "window": range(layer, min(layer + 2, 3))}[patching]
        options: Any = {} if held is None else {"mlps": "original", "constrained_layers": held}
        alone = model.intervene(tokens, [Intervention(layer=layer, scale=0.0, **place)], **options)
        log_p, log_q = (logits[-1].log_softmax(-1) for logits in (alone.clean_logits, alone.logits))
        divergence = float(torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True))
        assert found.kl_B[number] == pytest.approx(divergence, rel=1e-5, abs=1e-9)  # activations are float32 in graphs
        for target in np.flatnonzero(nodes.mask(NodeKind.FEATURE))[::7].tolist():
            at = (int(nodes.layer[target]), int(nodes.position[target]), int(nodes.index[target]))
            before, after = (
                float(table.activation[(table.group == at[0]) & (table.row == at[1]) & (table.index == at[2])].sum())
                for table in (alone.clean_features, alone.features)
            )
            assert found.change_BN[number, target] == pytest.approx(after - before, abs=1e-5)


@pytest.mark.parametrize("patching", ["constrained", "propagated", "original"])
def test_features_changed_together_equal_one_run_with_all_interventions(language_model: Any, patching: str) -> None:
    model, grounding = traced(language_model("gpt2", torch.float64))
    nodes = grounding.graph.nodes
    rows = np.flatnonzero(nodes.mask(NodeKind.FEATURE) & (nodes.layer < 2))[::9]
    together = tuple(
        Intervention(
            layer=int(nodes.layer[row]), index=int(nodes.index[row]), position=int(nodes.position[row]), activation=0.3
        )
        for row in rows
    )
    found = Effects(model, grounding).measure_edits([Edit(together), Edit(together[:1])], patching, "live")
    held = {"constrained": range(3), "propagated": None, "original": range(2)}[patching]
    mlps = "original" if patching == "original" else "replaced"
    run = model.intervene(tiny.random_tokens(), together, mlps=mlps, constrained_layers=held)
    logits = np.flatnonzero(nodes.mask(NodeKind.LOGIT))
    for node, target in zip(logits, grounding.logits, strict=True):
        change = float(target.read(run.logits[None, -1]) - target.read(run.clean_logits[None, -1]))
        assert found.change_BN[0, node] == pytest.approx(change, abs=1e-9)
    np.testing.assert_allclose(found.change_BN[0, rows], 0.3 - nodes.activation[rows], atol=1e-6)
    assert (found.change_BN[1, rows[1:]] != 0.3 - nodes.activation[rows[1:]]).all()


def test_a_token_put_in_the_place_of_another_is_the_other_prompt(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    model, grounding = traced(lm)
    nodes, tokens = grounding.graph.nodes, tiny.random_tokens()
    other = tokens.clone()
    other[4] = 77
    effects, logits = Effects(model, grounding), np.flatnonzero(nodes.mask(NodeKind.LOGIT))
    found = effects.measure_edits([Edit(tokens={4: 77}), Edit()], "original", "live")
    expected = [
        float(target.read(lm(other)[None, -1]) - target.read(lm(tokens)[None, -1])) for target in grounding.logits
    ]
    np.testing.assert_allclose(found.change_BN[0, logits], expected, atol=1e-9)
    before = (nodes.position < 4) & nodes.mask(NodeKind.FEATURE)
    for unchanged in (found.change_BN[1], found.change_BN[0, before]):
        np.testing.assert_allclose(unchanged, 0, atol=1e-9)


def test_a_token_of_no_embedding_removes_exactly_the_edges_of_the_one_it_replaces(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    with torch.no_grad():
        lm.parts.bridge.embed.original_component.weight[77] = 0
    model, grounding = traced(lm)
    nodes, edges = grounding.graph.nodes, grounding.graph.edges
    found = Effects(model, grounding).measure_edits([Edit(tokens={4: 77})], "constrained", "frozen", norms="frozen")
    (token,) = np.flatnonzero(nodes.mask(NodeKind.TOKEN) & (nodes.position == 4))
    predicted = np.bincount(edges.target, -edges.weight * (edges.source == token), minlength=len(nodes))
    logits = nodes.mask(NodeKind.LOGIT)
    assert np.abs(predicted[logits]).min() > 1e-3
    np.testing.assert_allclose(found.change_BN[0, logits], predicted[logits], atol=1e-6)


def test_influence_follows_a_chain_with_known_effects(language_model: Any) -> None:
    """One feature in the last layer is left: what it does to the logits is its decoder vector through the final norm."""
    lm = language_model("gpt2", torch.float64)
    model, grounding = traced(lm)
    nodes, frozen = grounding.graph.nodes, grounding.local.frozen
    last = np.flatnonzero(nodes.mask(NodeKind.FEATURE) & (nodes.layer == 2) & (nodes.position == 9))
    found = Effects(model, grounding).measure(last, 0.0, "original", "live", norms="frozen")
    for row, node in zip(found.change_BN, last.tolist(), strict=True):
        vector = model.crosscoder.decoder(2, Site(2, "mlp_out"))[int(nodes.index[node])]
        change = -float(nodes.activation[node]) * (vector - vector.mean()) * frozen.norm_final.gain_TD[9]
        expected = [float(target.direction_D @ change) for target in grounding.logits]
        np.testing.assert_allclose(row[nodes.mask(NodeKind.LOGIT)], expected, atol=1e-6)


@pytest.mark.parametrize(("activation", "attention"), [(ReLU(), True), (None, False)], ids=["relu", "topk"])
def test_everything_resampled_writes_what_the_other_prompt_writes(
    language_model: Any, activation: Any, attention: bool
) -> None:
    lm = language_model("gpt2", torch.float64)
    options = {} if activation is None else {"activation": activation}
    model, grounding = traced(lm, attention=attention, **options)
    resampler = Resampler(model, grounding, OTHERS, errors="resample")
    n_features = sum(len(part.features) for part in grounding.local.decompositions)
    nothing, everything = np.zeros(n_features, dtype=bool), np.ones(n_features, dtype=bool)
    kinds = ["mlp_out", "attn_out"] if attention else ["mlp_out"]
    for logits, other in zip(resampler.logits(nothing), OTHERS, strict=True):
        written = lm.read(other, [Site(layer, kind) for layer in range(3) for kind in kinds])
        expected = lm.run(tiny.random_tokens(), {site: lambda x, y=y: y[None] for site, y in written.items()})
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    for logits in resampler.logits(everything, keep_errors=True):
        torch.testing.assert_close(logits, lm(tiny.random_tokens()), rtol=0, atol=1e-9)


def test_resampling_from_the_prompt_itself_changes_nothing(language_model: Any) -> None:
    lm = language_model("llama", torch.float64)
    model, grounding = traced(lm, activation=ReLU())
    resampler = Resampler(model, grounding, [tiny.random_tokens()], errors="resample")
    nothing = np.zeros(len(grounding.local.features), dtype=bool)
    torch.testing.assert_close(resampler.logits(nothing)[0], lm(tiny.random_tokens()), rtol=0, atol=1e-9)


@pytest.mark.parametrize("skip", [False, True])
def test_faithfulness_ends_at_one(language_model: Any, skip: bool) -> None:
    model, grounding = traced(language_model("gpt2", torch.float64), skip=skip)
    found = sufficiency(model, grounding, OTHERS, errors="keep")
    for order in found["orders"].values():
        sizes = order["sizes"]
        assert sizes[-1]["faithfulness"] == pytest.approx(1)
        assert sizes[-1]["necessity"] == pytest.approx(1)
        assert sizes[-1]["kl"] == pytest.approx(0, abs=1e-9)
        assert sizes[-1]["features"] == len(grounding.local.features)
        assert order["cmd"] >= abs(0.999 - order["cpr"]) - 1e-12
    assert found["clean"] != pytest.approx(found["resampled"])


def test_mistakes(language_model: Any) -> None:
    model, grounding = traced(language_model("gpt2"))
    with pytest.raises(ValueError, match="features: expected at least 1, given 0"):
        sample_features(grounding, 0, seed=0)
    with pytest.raises(ValueError, match=r"expected other prompts of 10 tokens, given \[4, 10\]"):
        Resampler(model, grounding, [tiny.random_tokens(4), *OTHERS])
    with pytest.raises(ValueError, match="expected other prompts of 10 tokens, given none"):
        Resampler(model, grounding, [])
    with pytest.raises(ValueError, match="errors must be 'keep' or 'resample', got 'drop'"):
        Resampler(model, grounding, OTHERS, errors="drop")
    feature = circuits.trace(model, tiny.random_tokens(), targets=_last_feature(grounding))
    with pytest.raises(ValueError, match="explains features, not logits"):
        sufficiency(model, Grounding.of(model, feature), OTHERS, errors="keep")
    for activation, message in (
        (ReLU(affine=True), "cannot predict activations that are scaled and shifted"),
        (JointTopK(12), "chooses features over all layers together: it can be spliced with reads='clean' only"),
    ):
        model, grounding = traced(language_model("gpt2"), activation=activation)
        with pytest.raises(ValueError, match=message):
            validate(model, grounding.graph, n_features=2)


def test_a_graph_of_a_feature_has_no_output_to_speak_of(language_model: Any) -> None:
    model, grounding = traced(language_model("gpt2"))
    facts = validate(model, circuits.trace(model, tiny.random_tokens(), targets=_last_feature(grounding)), n_features=2)
    assert facts["circuit"] is None
    assert facts["influence_against_ablation"] == []
    assert {row["distance"] for row in facts["effects"]} <= {"1", "2"}


def _last_feature(grounding: Grounding) -> Any:
    nodes = grounding.graph.nodes
    node = int(np.flatnonzero(nodes.mask(NodeKind.FEATURE))[-1])
    return circuits.FeatureTarget(int(nodes.layer[node]), int(nodes.index[node]), int(nodes.position[node]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    graph = circuits.trace(replacement.load("demo"), PROMPT)
    return graph.save(tmp_path_factory.mktemp("graphs") / "graph.safetensors")


def test_the_command(saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate_command, "OTHERS", 3)
    assert main(["validate", str(saved), "--features", "16", "--other-crosscoder", "demo", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["prompt"] == PROMPT
    assert facts["features"] == 16
    assert facts["self_check"]["relative_error"] < 1e-4
    assert len(facts["influence_against_ablation"]) == 6
    assert min(row["spearman"] for row in facts["influence_against_ablation"]) > 0.4
    exact = [row for row in facts["one_layer_cosine"] if (row["patterns"], row["norms"]) == ("frozen", "frozen")]
    assert min(row["cosine"] for row in exact) > 0.9
    assert {row["distance"] for row in facts["effects"]} == {"1", "2", "3", "logits"}
    on_logits = {
        row["norms"]: row["pearson"]
        for row in facts["effects"]
        if (row["patching"], row["patterns"], row["change"], row["distance"])
        == ("constrained", "frozen", "ablated", "logits")
    }
    assert on_logits["frozen"] > 0.9999  # a graph's paths to the logits are exact with everything held
    assert on_logits["final"] > on_logits["live"]
    assert set(facts["circuit"]) == {"keep", "resample"}
    assert facts["circuit"]["keep"]["orders"]["influence"]["sizes"][-1]["faithfulness"] == pytest.approx(1, abs=1e-3)
    robustness = facts["robustness"]
    assert [row["class"] for row in robustness["thresholds"]["classes"]] == ["core", "contingent", "noise"]
    same, other = robustness["prompts"]
    assert (same["kind"], same["same_answers"], other["kind"]) == ("same answer", same["prompts"], "other answer")
    assert same["influence_kept"] > 0.8 > other["influence_kept"]
    itself = robustness["crosscoder"]
    assert (itself["matched"], itself["kept"], itself["edges_kept"]) == (1, 1, 1)
    assert itself["overlap"] == pytest.approx(1, abs=1e-6)
    Console(width=120).print(page(facts))
    shown = capsys.readouterr().out
    for text in (
        PROMPT,
        "Self-check",
        "Spearman",
        "3 prompts resampled",
        "CPR",
        "hop fidelity",
        "contingent",
        "other answer",
        "another crosscoder",
    ):
        assert text in shown
    (on_answer,) = [
        row["spearman"]
        for row in facts["effects"]
        if (row["patching"], row["patterns"], row["norms"], row["change"], row["distance"])
        == ("original", "live", "live", "ablated", "logits")
    ]
    pruned, questions = facts["circuit"]["keep"]["pruned"], dict(in_short(facts))
    assert questions["the same in the original model, everything live"] == f"{on_answer:.3f}"
    assert questions["the pruned circuit alone: faithfulness (1: all it takes)"] == f"{pruned['faithfulness']:.3f}"
    assert shown.index("In short") < shown.index("Self-check")
    bare = {**facts, "circuit": None, "effects": []}
    assert len(in_short(bare)) == len(questions) - 4, "no line without a figure"


def test_numbers_of_the_page() -> None:
    assert [figure(value) for value in (None, -0.0004, 0.5, -9_999.0, 140_579_815.4)] == [
        "–",
        "0.000",
        "0.500",
        "-9999.000",
        "1.4e+08",
    ]


def test_other_prompts(language_model: Any) -> None:
    model, grounding = traced(language_model("gpt2"))
    lines = ["w5 w6", "", " ".join(f"w{number}" for number in range(30, 45))]
    (found,) = other_prompts(model, grounding.graph, lines, is_demo=False)
    assert found.tolist() == [1, *range(30, 39)]
    assert other_prompts(model, grounding.graph, None, is_demo=False) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--features", "0"], "'--features': Input should be greater than or equal to 1"),
        (["--seed", "-1"], "'--seed': Input should be greater than or equal to 0"),
        (["--resample", "SHORT"], "resample: expected a prompt of at least 9 tokens, the graph's number; given none"),
        (["--paraphrases", "EMPTY"], "paraphrases: expected at least one prompt in "),
        (["--paraphrases", "/nowhere"], "/nowhere does not exist: expected a text file with one prompt per line"),
        (["--paraphrases", "SHORT", "--other-crosscoder", "/nowhere"], "/nowhere"),
        (["--resample", "/nowhere"], "/nowhere does not exist: expected a text file with one prompt per line"),
        (["--model", "/nowhere"], "no language model folder at /nowhere"),
    ],
)
def test_mistakes_on_the_command_line(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    short, empty = tmp_path / "short.txt", tmp_path / "empty.txt"
    short.write_text("the capital\n", encoding="utf-8")
    empty.write_text("\n  \n", encoding="utf-8")
    files = {"SHORT": str(short), "EMPTY": str(empty)}
    assert main(["validate", str(saved), *(files.get(one, one) for one in arguments)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
