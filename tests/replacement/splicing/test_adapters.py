"""Adapters: base MLPs plus features equal the fine-tuned model where they should, and belong to two models."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from circuits import trace
from replacement import (
    Crosscoder,
    Intervention,
    JumpReLU,
    LanguageModel,
    ReLU,
    ReplacementModel,
    Site,
    Wiring,
    checkpoint,
)
from replacement.crosscoder.formats.convert import convert
from replacement.crosscoder.formats.layouts import writable
from replacement.splicing.splice import Splice
from replacement.validation.fidelity import measure_fidelity

NEURONS = ((0, 3), (1, 7), (1, 20), (2, 11))
"""(layer, index) of the neurons that the base model below lacks."""
FROZEN = {"patterns": "frozen", "norms": "frozen"}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, LanguageModel, Crosscoder]:
    """A model with ReLU MLPs, the same without the output of four neurons as its base, and these neurons as an adapter."""
    folder = tmp_path_factory.mktemp("adapters") / "taught"
    options = {**tiny.GPT2, "eos_token_id": 1, "activation_function": "relu"}
    lm = LanguageModel.from_pretrained(tiny.write_model("GPT2LMHeadModel", options, folder), dtype=torch.float64)
    bridge = copy.deepcopy(lm.parts.bridge)
    wiring = Wiring.adapter(lm, read="mlp_in")
    adapter = Crosscoder(wiring, n_features=2, activation=ReLU(), dtype=torch.float64, model_name=lm.name)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
        for layer, neuron in NEURONS:
            own, mlp = lm.parts.bridge.blocks[layer].mlp, bridge.blocks[layer].mlp
            place = [index for number, index in NEURONS if number == layer].index(neuron)
            adapter.W_enc[layer][place] = own.W_in[:, neuron]
            adapter.b_enc[layer][place] = own.b_in[neuron]
            adapter.W_dec[layer][place, 0] = own.W_out[neuron]
            mlp.original_component.c_proj.weight[neuron] = 0
    return lm, LanguageModel(bridge, name="untaught"), adapter


def prompts(n: int = 3) -> Tensor:
    return torch.stack([tiny.random_tokens(length=9, seed=seed) for seed in range(n)])


def test_an_exact_adapter_leaves_no_error(taught: Any) -> None:
    lm, base, adapter = taught
    model, rows = ReplacementModel(lm, adapter, base=base), prompts()
    torch.testing.assert_close(model(rows), lm(rows), rtol=0, atol=1e-10)
    assert float((base(rows) - lm(rows)).abs().max()) > 1e-2
    measured = measure_fidelity(model.language_model, adapter, rows)
    assert max(measured.unexplained) < 1e-20
    assert measured.kl == pytest.approx(0, abs=1e-12)
    zeroed = torch.log_softmax(base(rows), -1)[:, :-1].gather(-1, rows[:, 1:, None])  # without features it is the base
    assert measured.cross_entropy_zero == pytest.approx(-float(zeroed.mean()), rel=1e-10)


def test_without_its_features_it_is_the_base_model(taught: Any) -> None:
    lm, base, adapter = taught
    model, tokens = ReplacementModel(lm, adapter, base=base), tiny.random_tokens()
    off = [Intervention(layer=layer, index=i, position=None, scale=0.0) for layer in range(3) for i in range(2)]
    for errors in ("keep", "drop"):
        found = model.intervene(tokens, off, errors=errors)
        torch.testing.assert_close(found.logits, base(tokens), rtol=0, atol=1e-10)
    # The original MLPs less what the features write; nothing else of them reacts where each MLP reads a held stream.
    last = model.intervene(tokens, [change for change in off if change.layer == 2], mlps="original")
    expected = model.intervene(tokens, [change for change in off if change.layer == 2])
    torch.testing.assert_close(last.logits, expected.logits, rtol=0, atol=1e-10)


def test_its_graph_names_the_taught_neurons_and_holds_the_base_in_error_nodes(taught: Any) -> None:
    lm, base, adapter = taught
    model, tokens = ReplacementModel(lm, adapter, base=base), tiny.random_tokens()
    local = model.localize(tokens)
    active = torch.cat([local.features.dense(layer) for layer in range(3)], 1)
    own = [lm.parts.bridge.blocks[layer].mlp for layer in range(3)]
    inputs = lm.read(tokens, [Site(layer, "mlp_in") for layer in range(3)])
    neurons = [inputs[Site(n, "mlp_in")] @ own[n].W_in[:, i] + own[n].b_in[i] for n, i in NEURONS]
    columns = [0, 2, 3, 4]
    torch.testing.assert_close(active[:, columns], torch.stack(neurons, 1).relu(), rtol=0, atol=1e-12)
    for layer in range(3):
        written = base.parts.mlp_map(layer, "mlp_in")(inputs[Site(layer, "mlp_in")])
        torch.testing.assert_close(local.mlp.errors_LTD[layer], written, rtol=0, atol=1e-11)
    graph = trace(model, tokens, coverage=1.0)
    assert graph.identity_error < 1e-10
    assert {(node.layer, node.index) for node in graph.features()} <= {(0, 0), (1, 0), (1, 1), (2, 0)}


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_logits_change_as_the_local_linear_model_says(
    language_model: Any, model_folder: Any, architecture: str
) -> None:
    """With everything held, what the base MLPs write included."""
    lm, tokens = language_model(architecture, torch.float64), tiny.random_tokens()
    base = tiny.base_of(lm, folder=None if architecture == "native" else model_folder(architecture))
    model = ReplacementModel(lm, tiny.adapter_for(lm, base, skip=architecture == "llama"), base=base)
    local, layers = model.localize(tokens), range(lm.shape.n_layers)
    activation_S, number = local.features.activation.clone(), 7
    place = {name: int(getattr(local.features, name)[number]) for name in ("group", "row", "index")}
    change = Intervention(layer=place["group"], position=place["row"], index=place["index"], scale=-1.5)
    activation_S[number] *= -1.5
    found = model.intervene(tokens, [change], constrained_layers=layers, **FROZEN)
    expected = lm.parts.soft_cap(local.logits(activation_S))
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-9)
    assert float((found.logits - found.clean_logits).abs().max()) > 1e-3


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "neox", "olmo2"])
def test_the_splice_equals_one_by_hand(language_model: Any, architecture: str) -> None:
    """One site after the other: the base MLP of the spliced stream plus dense features."""
    lm, rows = language_model(architecture, torch.float64), prompts(2)
    base = tiny.base_of(lm)
    wiring = Wiring.adapter(lm, cross_layer=architecture == "gpt2")
    adapter = tiny.adapter_for(lm, base, wiring=wiring, activation=ReLU())
    fixed: dict[Site, Tensor] = {}
    dense: list[Tensor] = []
    for layer in range(lm.shape.n_layers):
        (read,) = wiring.reads[layer]
        hooks = {site: (lambda x, y=y: y.view_as(x)) for site, y in fixed.items()}
        seen: dict[str, Tensor] = {}
        lm.run(rows, {**hooks, read: lambda x, seen=seen: seen.update(x=x.flatten(0, 1))})
        dense.append((seen["x"] @ adapter.encoder(layer, read).T + adapter.b_enc[layer]).relu())
        write = Site(layer, "mlp_difference")
        written = sum(dense[group] @ adapter.decoder(group, write) for group in wiring.writers(write))
        fixed[Site(layer, "mlp_out")] = (
            base.parts.mlp_map(layer, read.kind)(seen["x"]) + adapter.decoder_bias(write) + written
        )
    expected = lm.run(rows, {site: (lambda x, y=y: y.view_as(x)) for site, y in fixed.items()})
    spliced = Splice(lm.with_base(base), adapter, rows).run()
    torch.testing.assert_close(spliced, expected, rtol=0, atol=1e-10)


def test_layers_that_fine_tuning_left_alone_differ_by_nothing(language_model: Any) -> None:
    lm = language_model("llama", torch.float32)
    base = tiny.base_of(lm, layers=[1])
    with_base = lm.with_base(base)
    assert list(with_base.base_mlps) == [1]
    sites = [Site(layer, "mlp_difference") for layer in range(3)]
    shown = with_base.read(tiny.random_tokens(), sites)
    assert [bool(shown[site].any()) for site in sites] == [False, True, False]
    adapter = tiny.adapter_for(lm, base, wiring=Wiring.adapter(lm, layers=[1]))
    model, tokens = ReplacementModel(lm, adapter, base=base), tiny.random_tokens()
    assert trace(model, tokens, coverage=1.0).identity_error <= 1e-5
    everywhere = ReplacementModel(lm, tiny.adapter_for(lm, base), base=base)
    torch.testing.assert_close(everywhere(tokens, errors="keep"), lm(tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", sorted(writable()))
def test_other_layouts_have_no_place_for_an_adapter(language_model: Any, tmp_path: Path, layout: str) -> None:
    lm = language_model("gpt2", torch.float32)
    base = tiny.base_of(lm)
    wiring = Wiring.adapter(lm, read="mlp_in")
    checkpoint.save(tiny.adapter_for(lm, base, wiring=wiring, activation=JumpReLU()), tmp_path / "adapter")
    if layout == "crosstrace":
        convert(tmp_path / "adapter", tmp_path / "copy", to=layout)
        assert checkpoint.load(tmp_path / "copy").base_fingerprint == base.fingerprint
    else:
        with pytest.raises(ValueError, match=f"the layout {layout} has no place for"):
            convert(tmp_path / "adapter", tmp_path / "copy", to=layout)


def test_a_checkpoint_records_both_models(language_model: Any, tmp_path: Path) -> None:
    lm = language_model("gpt2", torch.float32)
    base, other = tiny.base_of(lm), tiny.base_of(lm, layers=[2])
    checkpoint.save(tiny.adapter_for(lm, base), tmp_path / "adapter")
    adapter = checkpoint.load(tmp_path / "adapter")
    assert (adapter.model_fingerprint, adapter.base_fingerprint) == (lm.fingerprint, base.fingerprint)
    assert ReplacementModel(lm, adapter, base=base).crosscoder.base_name == base.name
    clt = tiny.crosscoder_for(lm)
    neox = language_model("neox", torch.float32)
    mistakes = {
        f"this adapter adds to the MLPs of the base model '{base.name}': give the base model too": (lm, adapter, None),
        f"this crosscoder was trained on another base model: on '{base.name}' with weights": (lm, adapter, other),
        "this crosscoder was trained on another model: on 'tiny-gpt2' with weights": (base, adapter, lm),
        "expected a base model of the fine-tuned model's kind (GPT2LMHeadModel, 3 layers, d_model 32, float32 on cpu), "
        "got GPTNeoXForCausalLM": (lm, adapter, neox),
        "d_model 32, float32 on cpu), got GPT2LMHeadModel, 3 layers, d_model 32, float64": (
            lm,
            adapter,
            language_model("gpt2", torch.float64),
        ),
        "the MLPs of the fine-tuned and the base model are the same": (lm, adapter, lm),
        "a base model goes with an adapter, this strictly_causal crosscoder is none": (lm, clt, base),
    }
    for message, (model, crosscoder, given) in mistakes.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            ReplacementModel(model, crosscoder, base=given)
    with pytest.raises(ValueError, match=r"mlp_difference\.0 is what a fine-tuned MLP adds to that of its base model"):
        lm.read(tiny.random_tokens(), [Site(0, "mlp_difference")])
    with pytest.raises(ValueError, match=r"the language model has no site mlp_out\.7"):
        lm.with_base(base).read(tiny.random_tokens(), [Site(7, "mlp_difference")])
