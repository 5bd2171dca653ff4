"""Resampled runs against hand-made ones, gradients against differences, and a pruning that sees attention patterns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers

import circuits
import replacement
from circuits import CircuitGraph, NodeKind
from circuits.attribution.grounding import Grounding
from circuits.cli import main
from circuits.graph.pruning import edges_among
from circuits.validation.faithful import prune_faithfully, rounds
from circuits.validation.resampling import Resampler
from circuits.validation.sufficiency import clean_output, first_of, scores, sufficiency
from replacement import Crosscoder, Intervention, LanguageModel, ReLU, ReplacementModel, Wiring
from replacement.splicing.clean_run import Conditions

OTHERS = [tiny.random_tokens(seed=seed) for seed in range(1, 4)]


def traced(lm: Any, **options: Any) -> tuple[ReplacementModel, Grounding]:
    model = ReplacementModel(lm, tiny.crosscoder_for(lm, **options))
    return model, Grounding.of(model, circuits.trace(model, tiny.random_tokens(), coverage=1.0))


def test_a_feature_that_is_left_out_gives_its_place_to_the_same_rank_of_the_other_prompt(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    model, grounding = traced(lm)  # five features of every layer at every position, in both prompts
    own, resampler = grounding.local.features, Resampler(model, grounding, OTHERS[:1])
    other = model.localize(OTHERS[0]).features
    for number in torch.nonzero(own.group == 2)[::7, 0].tolist():  # in front of it nothing reacts
        at = (int(own.group[number]), int(own.row[number]))
        mine, theirs = ((table.group == at[0]) & (table.row == at[1]) for table in (own, other))
        rank = int((own.activation[mine].abs() > own.activation[number].abs()).sum())
        chosen = torch.nonzero(theirs)[:, 0][other.activation[theirs].abs().argsort(descending=True)[rank]]
        layer, index = model.crosscoder.wiring.group_layer(at[0]), int(other.index[chosen])
        value_of = {int(own.index[number]): 0.0}
        if index not in set(own.index[mine].tolist()) - value_of.keys():  # one that is kept stays as it is
            value_of[index] = float(other.activation[chosen])
        changes = [
            Intervention(layer=layer, index=index, position=at[1], activation=value)
            for index, value in value_of.items()
        ]
        kept_S = np.ones(len(own), dtype=bool)
        kept_S[number] = False
        expected_TV = model.intervene(tiny.random_tokens(), changes).logits
        torch.testing.assert_close(resampler.logits(kept_S)[0], expected_TV, rtol=0, atol=1e-9)


def test_kl_and_output_by_hand(language_model: Any) -> None:
    lm = language_model("gemma2", torch.float64)  # with a soft-cap
    model, grounding = traced(lm)
    resampler = Resampler(model, grounding, OTHERS)
    rng = np.random.default_rng(0)
    kept_MS = np.stack([rng.random(resampler.n_features) < share for share in (0.2, 0.7, 2.0)])
    output_M, kl_M = resampler.measure(kept_MS)
    log_p = lm(tiny.random_tokens())[-1].log_softmax(-1)
    for kept_S, kl in zip(kept_MS, kl_M, strict=True):
        log_q = resampler.logits(kept_S)[:, -1].log_softmax(-1)
        assert kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-9, abs=1e-12)
    assert kl_M[2] == pytest.approx(0, abs=1e-12)
    assert output_M[2] == pytest.approx(clean_output(resampler))
    assert kl_M[0] > 1e-6


@pytest.mark.parametrize("errors", ["keep", "resample"])
def test_gradients_are_derivatives(language_model: Any, errors: str) -> None:
    """Against differences of runs with shares moved; at shares of 1, gradient times activation of the spliced model."""
    model, grounding = traced(language_model("gpt2", torch.float64), activation=ReLU())
    resampler = Resampler(model, grounding, OTHERS, errors=errors)
    rng, step = np.random.default_rng(0), 1e-6
    share_S = rng.uniform(0.3, 0.7, resampler.n_features)
    gradient_S = resampler.gradient(share_S)
    for number in np.argsort(-np.abs(gradient_S))[:40:8].tolist():
        moved = np.tile(share_S, (2, 1))
        moved[:, number] += [step, -step]
        up, down = resampler.output(resampler.logits(moved)).view(2, -1).mean(-1)
        assert gradient_S[number] == pytest.approx(float(up - down) / (2 * step), rel=1e-4)


def test_zero_ablation_and_what_is_held(language_model: Any) -> None:
    model, grounding = traced(language_model("gpt2", torch.float64), activation=ReLU())
    own = grounding.local.features
    number = int(torch.nonzero(own.group == 2)[3, 0])
    kept_S = np.ones(len(own), dtype=bool)
    kept_S[number] = False
    feature = Intervention(layer=2, index=int(own.index[number]), position=int(own.row[number]), scale=0.0)
    for held in ({}, {"patterns": "frozen"}, {"norms": "frozen"}, {"norms": "final"}):
        resampler = Resampler(model, grounding, OTHERS, ablation="zero", conditions=Conditions(**held))
        expected_TV = model.intervene(tiny.random_tokens(), [feature], **held).logits
        for logits_TV in resampler.logits(kept_S):
            torch.testing.assert_close(logits_TV, expected_TV, rtol=0, atol=1e-9)


def test_orders(language_model: Any) -> None:
    model, grounding = traced(language_model("gpt2", torch.float64))
    resampler = Resampler(model, grounding, OTHERS)
    found = scores(resampler, seed=3)
    assert found["activation"].tolist() == grounding.local.features.activation.abs().tolist()
    assert sorted(found["random"]) == list(range(resampler.n_features))
    assert (scores(resampler, seed=3)["random"] == found["random"]).all()
    influence_N = grounding.graph.influence()[grounding.graph.nodes.mask(NodeKind.FEATURE)]
    assert found["influence"].sum() == pytest.approx(influence_N.sum())
    assert first_of(np.array([2.0, 5.0, 5.0, 1.0]), [1, 3]).tolist() == [
        [False, True, False, False],
        [True, True, True, False],
    ]
    figures = sufficiency(model, grounding, OTHERS, errors="keep")
    assert list(figures["orders"]) == ["influence", "activation", "gradient x activation", "random"]
    for order in figures["orders"].values():
        assert [row["features"] for row in order["sizes"]] == sorted({row["features"] for row in order["sizes"]})
        assert order["sizes"][-1]["kl"] == pytest.approx(0, abs=1e-12)
        assert {10, 20, 50, 100} <= {row["features"] for row in order["sizes"]}
    assert figures["graph"]["features"] == int(grounding.graph.nodes.mask(NodeKind.FEATURE).sum())


CITY, OTHER_CITY, ASKS, ASKS_OTHER, LEFT, RIGHT = range(3, 9)  # token ids
QUERY, DIRECT = 0, 1  # features of layer 0 at the last position


@pytest.fixture(scope="module")
def looks_up(tmp_path_factory: pytest.TempPathFactory) -> ReplacementModel:
    """A model in which attention looks for what a feature asks for, and an exact crosscoder of its ReLU MLPs.

    Layer 0's neuron `QUERY` reads the last token `ASKS` and writes a direction that layer 1's query reads, and next to nothing
    that a logit reads; `DIRECT` reads it too and writes a little of the answer `LEFT`. Layer 1's head finds `CITY` and copies
    `LEFT` from it. Neurons 2 and 3 do the same for `ASKS_OTHER`: they find `OTHER_CITY`, and `RIGHT`.
    """
    D, inner = 32, 8
    config = transformers.GPT2Config(
        vocab_size=10,
        n_embd=D,
        n_layer=2,
        n_head=1,
        n_inner=inner,
        n_positions=8,
        activation_function="relu",
        bos_token_id=1,
    )
    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(config)
    axis = torch.eye(D) - torch.eye(D).roll(16, 1)  # zero mean, so that a LayerNorm takes nothing from it
    with torch.no_grad():
        for name, parameter in gpt2.named_parameters():
            parameter.copy_(
                torch.ones_like(parameter) if "ln_" in name and "weight" in name else torch.zeros_like(parameter)
            )
        embedding = gpt2.transformer.wte.weight
        for token, axes in {
            1: [9],
            CITY: [0, 5],
            OTHER_CITY: [1, 6],
            ASKS: [2],
            ASKS_OTHER: [3],
            LEFT: [7],
            RIGHT: [8],
        }.items():
            embedding[token] = axis[axes].sum(0)
        first, second = gpt2.transformer.h
        for neuron, (read, write) in enumerate(
            [
                (2, 4 * axis[10] + 0.02 * axis[7]),
                (2, 0.2 * axis[7]),
                (3, 4 * axis[11] + 0.02 * axis[8]),
                (3, 0.2 * axis[8]),
            ]
        ):
            first.mlp.c_fc.weight[:, neuron] = axis[read]
            first.mlp.c_proj.weight[neuron] = write
        query, key, value = (second.attn.c_attn.weight[:, part * D : (part + 1) * D] for part in range(3))
        for number, (asked, tag, content, answer) in enumerate([(10, 0, 5, 7), (11, 1, 6, 8)]):
            query[:, number] = 8 * axis[asked]
            key[:, number] = axis[tag]
            value[:, 2 + number] = axis[content]
            second.attn.c_proj.weight[2 + number] = 2 * axis[answer]
    folder = tmp_path_factory.mktemp("model")
    gpt2.save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(folder)
    lm = LanguageModel.from_pretrained(folder)
    wiring, names = Wiring.per_layer(lm, read="mlp_in"), {"model_name": lm.name, "model_fingerprint": lm.fingerprint}
    crosscoder = Crosscoder(wiring, n_features=inner, activation=ReLU(), **names)
    with torch.no_grad():
        for parameter in crosscoder.parameters():
            parameter.zero_()
        for layer, block in enumerate(gpt2.transformer.h):
            (read,), (write,) = crosscoder.wiring.reads[layer], crosscoder.wiring.writes[layer]
            crosscoder.encoder(layer, read).copy_(block.mlp.c_fc.weight.T)
            crosscoder.decoder(layer, write).copy_(block.mlp.c_proj.weight)
    return ReplacementModel(lm, crosscoder)


def test_a_feature_that_only_attention_needs_is_found(looks_up: ReplacementModel) -> None:
    prompt = torch.tensor([1, CITY, OTHER_CITY, ASKS])
    others = [torch.tensor([1, CITY, OTHER_CITY, ASKS_OTHER])]
    graph = circuits.trace(looks_up, prompt, targets=circuits.DifferenceTarget(LEFT, RIGHT), coverage=1.0)
    grounding = Grounding.of(looks_up, graph)
    kinds = graph.nodes.mask(NodeKind.FEATURE)
    assert graph.nodes.index[kinds].tolist() == [QUERY, DIRECT]

    by_influence = graph.prune()
    assert graph.nodes.ids()[np.flatnonzero(kinds)[QUERY]] not in by_influence.nodes.ids()
    resampler = Resampler(looks_up, grounding, others)
    first = next(rounds(resampler, 1))[0]
    assert grounding.local.features.index[torch.from_numpy(first)].tolist() == [QUERY]
    output, _ = resampler.measure(np.array([[False, False], [False, True], [True, False], [True, True]]))
    faithfulness = (output - output[0]) / (output[-1] - output[0])
    assert faithfulness[1] < 0.2 < 0.8 < faithfulness[2]

    fixed = len(by_influence.nodes) - int(by_influence.nodes.mask(NodeKind.FEATURE).sum())
    circuit = prune_faithfully(looks_up, graph, others, faithfulness=0.8, most_nodes=fixed + 2)
    assert circuit.nodes.index[circuit.nodes.mask(NodeKind.FEATURE)].tolist() == [QUERY]
    facts = circuit.metadata["pruning"]["faithful"]
    assert facts["reached"]
    assert facts["faithfulness"] == pytest.approx(faithfulness[2], abs=1e-4)
    everything = prune_faithfully(looks_up, graph, others, faithfulness=None, most_nodes=fixed + 2)
    assert everything.counts()["features"] == 2
    assert everything.metadata["pruning"]["faithful"]["kl"] == pytest.approx(0, abs=1e-6)


def test_edges_among_given_nodes(small: CircuitGraph) -> None:
    nodes = np.array([True, False, False, True, True, True, True, True])
    kept = edges_among(small, nodes, share=1.0)
    assert kept.nodes.tolist() == nodes.tolist()
    assert kept.edges.tolist() == small.edges.kept(nodes).tolist()
    fewer = edges_among(small, nodes, share=0.5)
    assert fewer.nodes.tolist() == nodes.tolist()
    assert 0 < fewer.edges.sum() < kept.edges.sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"faithfulness": 1.5}, "faithfulness: expected a faithfulness between 0 and 1, given 1.5"),
        ({"edges": -1.0}, "edges: expected a share of influence between 0 and 1, given -1.0"),
        ({"most_nodes": 3}, r"most_nodes: expected more than the \d+ that stay, given 3"),
        ({"most_nodes": 0}, "most_nodes must be 1 or more, got 0"),
    ],
)
def test_mistakes(language_model: Any, options: dict[str, Any], message: str) -> None:
    model, grounding = traced(language_model("gpt2"))
    with pytest.raises(ValueError, match=message):
        prune_faithfully(model, grounding.graph, OTHERS, **options)
    with pytest.raises(ValueError, match="ablation must be 'resample' or 'zero', got 'mean'"):
        Resampler(model, grounding, OTHERS, ablation="mean")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = circuits.trace(replacement.load("demo"), "the capital of the state containing Dallas is")
    full, out = graph.save(tmp_path / "graph.safetensors"), tmp_path / "circuit.safetensors"
    assert main(["prune", str(full), "--faithful", "0.7", "--out", str(out)]) == 0
    assert "measured on the 16 prompts of the search; target 0.7" in capsys.readouterr().out
    circuit = CircuitGraph.load(out)
    assert len(circuit.nodes) <= 60
    assert circuit.metadata["pruning"]["faithful"]["faithfulness"] >= 0.7
    assert set(circuit.nodes.ids()) < set(graph.nodes.ids())
    assert json.dumps(circuit.to_neuronpedia())
    for arguments, message in (
        (["--resample", "x"], "resample: expected with --faithful alone, given without it"),
        (["--most-nodes", "5"], "most-nodes: expected with --faithful alone, given without it"),
        (["--faithful", "2"], "faithful: expected a faithfulness between 0 and 1, given 2.0"),
        (["--faithful", "0.7", "--most-nodes", "5"], "most_nodes: expected more than the"),
    ):
        assert main(["prune", str(full), *arguments]) == 2
        assert message in capsys.readouterr().err
