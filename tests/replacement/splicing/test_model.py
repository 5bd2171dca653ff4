"""The replacement model: exact with errors kept, equal to a hand-written splice without, and strict about its input."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from replacement import Crosscoder, Intervention, JumpReLU, ReLU, ReplacementModel, Site, TopK, Wiring
from replacement.splicing.clean_run import CleanRun, Conditions

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
WIRINGS = ["strictly_causal", "per_layer", "transcoder"]


def wiring_of(name: str, lm: Any) -> Wiring:
    """Wirings that write MLP outputs."""
    return Wiring.transcoder(lm, layer=1) if name == "transcoder" else getattr(Wiring, name)(lm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_keeping_errors_gives_the_original_logits(language_model: Any, architecture: str, dtype: torch.dtype) -> None:
    lm = language_model(architecture, dtype)
    model = ReplacementModel(lm, tiny.crosscoder_for(lm))
    tokens = torch.stack([tiny.random_tokens(seed=seed) for seed in range(3)])
    original = lm(tokens)
    torch.testing.assert_close(model(tokens, errors="keep"), original, rtol=0, atol=TOLERANCE[dtype])
    assert float((model(tokens) - original).abs().max()) > 0.1  # the random crosscoder is no copy of the MLPs


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_every_wiring_keeps_errors_and_localizes_exactly(language_model: Any, wiring: str, skip: bool) -> None:
    lm = language_model("gpt2", torch.float64)
    model = ReplacementModel(lm, tiny.crosscoder_for(lm, wiring=wiring_of(wiring, lm), skip=skip))
    tokens = tiny.random_tokens()
    torch.testing.assert_close(model(tokens, errors="keep"), lm(tokens), rtol=0, atol=1e-12)
    local = model.localize(tokens)
    torch.testing.assert_close(local.logits(), local.frozen.logits_TV, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["same", "converted"])
def test_the_crosscoder_given_is_left_as_it_was(language_model: Any, dtype: torch.dtype) -> None:
    lm = language_model("gpt2", torch.float32)
    crosscoder = tiny.crosscoder_for(lm, activation=JumpReLU()).to(dtype).train().requires_grad_(True)
    attention = tiny.crosscoder_for(lm, wiring=Wiring.attention(lm)).to(dtype).train()
    before = {name: value.clone() for name, value in crosscoder.state_dict().items()}
    model = ReplacementModel(lm, crosscoder, attention_crosscoder=attention)
    model(tiny.random_tokens(), errors="keep")
    model.localize(tiny.random_tokens())
    for given in (crosscoder, attention):
        assert given.training
        assert given.dtype == dtype
        assert all(parameter.requires_grad and parameter.grad is None for parameter in given.parameters())
    for name, value in crosscoder.state_dict().items():
        assert torch.equal(value, before[name])
    held = model.crosscoder
    assert not held.training
    assert held.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in held.parameters())
    shares = held.b_enc[0].data_ptr() == crosscoder.b_enc[0].data_ptr()
    assert shares == (dtype == torch.float32), "memory is shared where nothing had to be converted"


def test_all_passes_over_a_prompt_share_one_clean_run(language_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model("gpt2", torch.float64)
    model = ReplacementModel(lm, tiny.crosscoder_for(lm))
    runs: list[int] = []
    run = type(lm).run
    monkeypatch.setattr(type(lm), "run", lambda *args, **options: (runs.append(1), run(*args, **options))[1])
    clean = CleanRun(lm, model.crosscoders, tiny.random_tokens()[None])
    assert not runs, "nothing was asked for yet"
    conditions = [Conditions(constrained_layers=layers, mlps="original") for layers in (None, [0], range(3))]
    for options in (*conditions, Conditions(), Conditions(errors="drop")):
        clean.run(options, n_copies=2)
    assert len(runs) == 1 + 5


def test_replaced_reads_equal_a_splice_written_by_hand(language_model: Any) -> None:
    """Independent oracle: run layer by layer with dense features and overwrite MLP outputs one at a time."""
    lm = language_model("llama", torch.float64)
    crosscoder = tiny.crosscoder_for(lm, activation=ReLU())
    tokens = tiny.random_tokens()
    outputs: dict[Site, torch.Tensor] = {}
    acts = []
    for layer in range(3):
        stream: dict[Site, torch.Tensor] = {}
        hooks: dict[Site, Any] = {site: (lambda x, y=y: y[None]) for site, y in outputs.items()}
        hooks[Site(layer, "resid_mid")] = lambda x, kept=stream: kept.update(x=x[0])
        lm.run(tokens, hooks)
        pre = stream["x"] @ crosscoder.encoder(layer, Site(layer, "resid_mid")).T + crosscoder.b_enc[layer]
        acts.append(pre.relu())
        site = Site(layer, "mlp_out")
        outputs[site] = crosscoder.decoder_bias(site) + sum(a @ crosscoder.decoder(g, site) for g, a in enumerate(acts))
    expected = lm.run(tokens, {site: (lambda x, y=y: y[None]) for site, y in outputs.items()})
    torch.testing.assert_close(ReplacementModel(lm, crosscoder)(tokens), expected, rtol=0, atol=1e-12)


def test_clean_reads_of_one_layer_change_that_layer_only(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    model = ReplacementModel(lm, tiny.crosscoder_for(lm))
    tokens = tiny.random_tokens()
    sites = [Site(layer, "mlp_out") for layer in range(3)]
    clean = lm.read(tokens, [*sites, *model.crosscoder.wiring.read_sites])
    expected = model.crosscoder({site: clean[site] for site in model.crosscoder.wiring.read_sites}).reconstructions
    spliced = lm.run(tokens, {sites[2]: lambda x: expected[sites[2]][None]})
    torch.testing.assert_close(model(tokens, layers=[2], reads="clean"), spliced, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(tokens, layers=[]), lm(tokens), rtol=0, atol=0)


def test_dropped_and_kept_errors_differ_by_the_error_terms(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    model = ReplacementModel(lm, tiny.crosscoder_for(lm))
    tokens = tiny.random_tokens()
    local = model.localize(tokens)
    outputs = local.mlp.outputs()
    clean = lm.read(tokens, [Site(layer, "mlp_out") for layer in range(3)])
    for layer in range(3):
        torch.testing.assert_close(outputs[layer], clean[Site(layer, "mlp_out")], rtol=0, atol=1e-12)
    assert float(local.mlp.errors_LTD.abs().max()) > 0.1


def test_intervention_sets_what_it_names(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    model = ReplacementModel(lm, tiny.crosscoder_for(lm))
    tokens = tiny.random_tokens()
    features = model.localize(tokens).features
    last = features.of(2)
    group, position, index = 2, int(last.row[-1]), int(last.index[-1])
    own = Intervention(layer=group, index=index, position=position, activation=float(last.activation[-1]))
    torch.testing.assert_close(model(tokens, errors="keep", interventions=[own]), lm(tokens), rtol=0, atol=1e-12)
    # The last layer's features reach the logits through the final norm alone: add the vector by hand.
    off = Intervention(layer=group, index=index, position=position, activation=0.0)
    site = Site(2, "mlp_out")
    vector = model.crosscoder.decoder(2, site)[index] * last.activation[-1]

    def subtract(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[0, position] -= vector
        return x

    expected = lm.run(tokens, {site: subtract})
    torch.testing.assert_close(model(tokens, errors="keep", interventions=[off]), expected, rtol=0, atol=1e-12)


def test_intervention_switches_an_inactive_feature_on_in_every_prompt_of_a_batch(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    model = ReplacementModel(lm, tiny.crosscoder_for(lm))
    tokens = torch.stack([tiny.random_tokens(seed=seed) for seed in range(2)])
    on = [Intervention(layer=0, index=i, position=4, activation=2.0) for i in range(3)]
    together = model(tokens, interventions=on)
    alone = torch.stack([model(row, interventions=on) for row in tokens])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    assert float((together - model(tokens))[:, 4:].abs().max()) > 1e-3
    torch.testing.assert_close(together[:, :4], model(tokens)[:, :4], rtol=0, atol=1e-12)  # causality


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"errors": "add"}, "errors must be 'drop' or 'keep', got 'add'"),
        ({"reads": "dirty"}, "reads must be 'propagated' or 'clean', got 'dirty'"),
        ({"layers": [1, 7]}, r"the crosscoder writes layers \[0, 1, 2\], not layer 7"),
        (
            {"interventions": [Intervention(layer=5, index=0, position=0, activation=0.0)]},
            "layer 5: the crosscoder has features in layers 0, 1, 2",
        ),
        (
            {"interventions": [Intervention(layer=0, index=0, position=10, activation=0.0)]},
            "position 10: expected 0 to 9",
        ),
        (
            {"interventions": [Intervention(layer=0, index=48, position=0, activation=0.0)]},
            "index 48: expected 0 to 47",
        ),
        (
            {"interventions": [Intervention(layer=0, index=1, position=0, activation=float("nan"))]},
            "activation=nan is not a finite",
        ),
        ({"interventions": [Intervention(layer=0, index=1, position=0, activation=1.0)] * 2}, "set the same feature"),
    ],
)
def test_bad_options(language_model: Any, options: dict[str, Any], message: str) -> None:
    lm = language_model("gpt2")
    model = ReplacementModel(lm, tiny.crosscoder_for(lm))
    with pytest.raises(ValueError, match=message):
        model(tiny.random_tokens(), **options)


def test_crosscoders_of_another_model(language_model: Any) -> None:
    gpt2, native = language_model("gpt2"), language_model("native")
    with pytest.raises(ValueError, match="spans 3 layers, the model has 2"):
        ReplacementModel(native, tiny.crosscoder_for(gpt2))
    with pytest.raises(ValueError, match="trained on another model: on 'tiny-gpt2'"):
        ReplacementModel(language_model("llama"), tiny.crosscoder_for(gpt2))
    wide = Wiring.strictly_causal(type(gpt2.shape)(3, 40, 4, 10))
    with pytest.raises(ValueError, match=r"40.*32"):
        ReplacementModel(gpt2, Crosscoder(wide, n_features=16, activation=TopK(2), model_name=gpt2.name))


def test_crosscoders_that_cannot_be_spliced(language_model: Any) -> None:
    lm = language_model("gpt2")
    autoencoder = Crosscoder(Wiring.autoencoder(lm, layers=1), n_features=16, activation=TopK(2))
    with pytest.raises(ValueError, match=r"writes mlp_out sites, this one writes resid_post.1"):
        ReplacementModel(lm, autoencoder)
    backwards = Wiring(
        "backwards", ((Site(2, "resid_mid"),),), ((Site(0, "mlp_out"),),), {"resid_mid": 32, "mlp_out": 32}
    )
    with pytest.raises(ValueError, match="needs a causal crosscoder"):
        ReplacementModel(lm, Crosscoder(backwards, n_features=16, activation=TopK(2)))
    broken = tiny.crosscoder_for(lm)
    with torch.no_grad():
        broken.b_enc[1][0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        ReplacementModel(lm, broken)


def test_a_crosscoder_that_writes_what_it_reads_is_refused(language_model: Any) -> None:
    lm = language_model("gpt2")
    for wiring in (Wiring.autoencoder(lm, layers=1, site="mlp_out"), Wiring.weakly_causal(lm, site="mlp_out")):
        with pytest.raises(ValueError, match="writes other sites than it reads: mlp_out"):
            ReplacementModel(lm, tiny.crosscoder_for(lm, wiring=wiring))


def test_undecomposed_positions_keep_their_own_mlp_output(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    model = ReplacementModel(lm, tiny.crosscoder_for(lm, undecomposed_positions=2))
    tokens = tiny.random_tokens()
    torch.testing.assert_close(model(tokens)[:2], lm(tokens)[:2], rtol=0, atol=1e-12)
    torch.testing.assert_close(model(tokens, errors="keep"), lm(tokens), rtol=0, atol=1e-12)
    assert int(model.localize(tokens).features.row.min()) == 2


def test_tokens_are_checked_before_the_model_runs(language_model: Any) -> None:
    lm = language_model("gpt2")
    model = ReplacementModel(lm, tiny.crosscoder_for(lm))
    with pytest.raises(ValueError, match=r"token ids must lie in \[0, 97\), got 5 to 97"):
        model(torch.tensor([[5, 97]]))
    with pytest.raises(ValueError, match="the prompt has 33 tokens"):
        model(torch.ones(2, 33, dtype=torch.int64))


def test_localize_refuses_what_the_model_cannot_read(language_model: Any) -> None:
    lm = language_model("gpt2")
    model = ReplacementModel(lm, tiny.crosscoder_for(lm))
    with pytest.raises(ValueError, match="the prompt has 33 tokens"):
        model.localize(torch.ones(33, dtype=torch.int64))


def test_an_intervention_that_nothing_would_feel_is_a_mistake(language_model: Any) -> None:
    lm = language_model("llama", torch.float32)
    model = ReplacementModel(lm, tiny.crosscoder_for(lm))
    late = Intervention(layer=2, index=1, position=3, activation=1.0)
    with pytest.raises(ValueError, match=r"intervention on layer 2 would do nothing: only mlp_out\.0 is replaced"):
        model(tiny.random_tokens(6), layers=[0], interventions=[late])


def test_before_soft_cap_undoes_it(language_model: Any) -> None:
    parts = language_model("gemma2", torch.float64).parts
    logits = torch.linspace(-8, 8, 33, dtype=torch.float64)
    capped = parts.soft_cap(logits)
    assert float((capped - logits).abs().max()) > 1, "the tiny Gemma 2 has a soft-cap"
    torch.testing.assert_close(parts.before_soft_cap(capped), logits, rtol=1e-6, atol=1e-6)
    plain = language_model("llama", torch.float64).parts
    assert torch.equal(plain.before_soft_cap(logits), logits)
