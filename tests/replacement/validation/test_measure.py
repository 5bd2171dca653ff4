"""Figures of a validation against dense recomputation: hooks by hand, torch's own losses, all tokens at once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional

from replacement import ReplacementModel, Site, TopK, Wiring
from replacement.validation import ValidationConfig, validate
from replacement.validation.measure import Measured, measure
from replacement.validation.outputs import OriginalOutput, OutputSums, compare
from replacement.validation.protocols import protocols
from replacement.validation.slices import Batch, Slice, shuffled

N_ROWS, T = 9, 12


def rows() -> Tensor:
    """Random token ids `[R, T]`."""
    return torch.stack([tiny.random_tokens(length=T, seed=seed) for seed in range(N_ROWS)])


def replacement_model(language_model: Any, architecture: str, *, attention: bool = False, **options: Any) -> Any:
    """A random CLT spliced into a tiny model, in fp64; with or without a crosscoder for attention."""
    lm = language_model(architecture, torch.float64)
    wiring = Wiring.strictly_causal(lm, read="mlp_in")
    second = tiny.crosscoder_for(lm, wiring=Wiring.attention(lm)) if attention else None
    return ReplacementModel(lm, tiny.crosscoder_for(lm, wiring=wiring, **options), attention_crosscoder=second)


def in_batches(tokens_RT: Tensor, size: int, **options: Any) -> Slice:
    """A slice of rows, a few at a time."""

    def batches() -> Any:
        return (Batch(some, **options) for some in tokens_RT.split(size))

    return Slice(name="rows", about="", batches=batches, n_tokens=tokens_RT.numel())


def measure_slice(lm: Any, crosscoders: Any, part: Slice, means: Any, names: Any = None, **options: Any) -> Measured:
    """Measure a slice in the protocols named; all by default."""
    known = protocols(crosscoders)
    chosen = [known[name] for name in names or known]
    return measure(lm, crosscoders, part.batches(), chosen, means=means, **options)


def dense_kl(original_BTV: Tensor, changed_BTV: Tensor) -> Tensor:
    """KL of every token, by torch."""
    log_q, log_p = changed_BTV.log_softmax(-1), original_BTV.log_softmax(-1)
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def losses(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """Next-token losses, by torch."""
    return functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten(), reduction="none")


@pytest.mark.parametrize(
    ("architecture", "attention"), [("gpt2", True), ("llama", False), ("neox", False), ("native", True)]
)
def test_every_protocol_equals_the_model_run_by_hand(language_model: Any, architecture: str, attention: bool) -> None:
    model, tokens = replacement_model(language_model, architecture, attention=attention), rows()
    lm, crosscoders = model.language_model, list(model.crosscoders.values())
    part = in_batches(tokens, 4)
    means = measure(lm, crosscoders, part.batches(), []).means
    sites = [site for each in crosscoders for site in each.wiring.write_sites]
    clean = lm.read(tokens, sites)
    for site in sites:
        torch.testing.assert_close(means[site], clean[site].flatten(0, 1).mean(0))
    found = measure_slice(lm, crosscoders, part, means).facts()["protocols"]

    def constant(value_of: Any) -> Tensor:
        return lm.run(tokens, {s: lambda x, s=s: torch.zeros_like(x) + value_of(s, x) for s in sites})

    def alone(site: Site) -> Tensor:
        which = "attention" if site.kind == "attn_out" else "mlp"
        return model(tokens, layers=[site.layer], parts=[which])

    expected = {
        "clean": model(tokens, reads="clean"),
        "propagated": model(tokens),
        "errors kept": model(tokens, errors="keep"),
        "zero": constant(lambda site, x: 0.0),
        "mean": constant(lambda site, x: means[site].view(x.shape[2:])),
        **{f"single {site}": alone(site) for site in sites},
        **{f"first {k} layers": model(tokens, layers=range(k)) for k in range(1, lm.shape.n_layers)},
    }
    assert found.keys() == expected.keys()
    original = lm(tokens)
    gaps = {name: float((losses(expected[name], tokens) - losses(original, tokens)).mean()) for name in expected}
    for name, logits in expected.items():
        own, kl = found[name], dense_kl(original, logits)
        assert own["n_tokens"] == tokens.numel()
        assert own["kl"]["mean"] == pytest.approx(float(kl.mean()), rel=1e-9, abs=1e-13)
        assert own["kl"]["max"] == pytest.approx(float(kl.max()), rel=1e-9, abs=1e-13)
        assert own["cross_entropy"] == pytest.approx(float(losses(logits, tokens).mean()), rel=1e-10)
        assert own["cross_entropy_increase"] == pytest.approx(gaps[name], rel=1e-8, abs=1e-12)
        for ablation in ("zero", "mean"):
            recovered = (gaps[ablation] - gaps[name]) / gaps[ablation]
            assert own["cross_entropy_recovered"][ablation] == pytest.approx(recovered, abs=1e-8)
        agreed = (logits.argmax(-1) == original.argmax(-1)).double().mean()
        assert own["agreement"]["all"] == pytest.approx(float(agreed))
    assert found["errors kept"]["kl"]["max"] < 1e-8


def test_reconstruction_and_firing_equal_dense_formulas(language_model: Any) -> None:
    model, tokens = replacement_model(language_model, "llama", undecomposed_positions=1, activation=TopK(1)), rows()
    lm, crosscoder = model.language_model, model.crosscoder
    part = in_batches(tokens, 2)
    facts = measure_slice(
        lm, [crosscoder], part, measure(lm, [crosscoder], part.batches(), []).means, names=["propagated"]
    ).facts()
    wiring = crosscoder.wiring
    clean = {s: x[:, 1:].flatten(0, 1) for s, x in lm.read(tokens, [*wiring.read_sites, *wiring.write_sites]).items()}
    outputs, features = crosscoder(clean, positions=torch.ones(N_ROWS * (T - 1), dtype=torch.int64))
    errors, variances = [], []
    for row, site in zip(facts["reconstruction"]["sites"], wiring.write_sites, strict=True):
        y, z = clean[site], outputs[site]
        errors.append((y - z).square().sum())
        variances.append((y - y.mean(0)).square().sum())
        assert row["unexplained"] == pytest.approx(float(errors[-1] / variances[-1]), rel=1e-9)
        cosine = (y * z).sum(1) / y.norm(dim=1) / z.norm(dim=1)
        assert row["cosine"] == pytest.approx(float(cosine.mean()), rel=1e-9)
    assert facts["reconstruction"]["unexplained"] == pytest.approx(float(sum(errors) / sum(variances)), rel=1e-9)
    n_tokens = N_ROWS * (T - 1)
    assert facts["n_tokens"] == n_tokens
    for row in facts["reconstruction"]["crosscoders"][0]["groups"]:
        own = features.of(row["group"])
        fires = (
            torch.zeros(n_tokens, crosscoder.n_features).index_put((own.row, own.index), own.activation.float()) != 0
        )
        assert row["l0"] == pytest.approx(float(fires.sum() / n_tokens))
        assert row["dead"] == int((fires.sum(0) == 0).sum())
        assert row["dense"] == int((fires.double().mean(0) > 0.1).sum())
        assert 0 < row["dead"] < crosscoder.n_features


def test_agreement_where_the_original_is_right_but_unsure() -> None:
    torch.manual_seed(0)
    original_BTV, changed_BTV = 3 * torch.randn(6, 30, 4), 3 * torch.randn(6, 30, 4)
    changed_BTV[::2] = original_BTV[::2] + 0.5 * changed_BTV[::2]
    tokens_BT = torch.randint(0, 4, (6, 30))
    everything = torch.ones_like(tokens_BT, dtype=torch.bool)
    sums, read = OutputSums(), OriginalOutput(original_BTV, tokens_BT, everything)
    sums.add(read, compare(read, changed_BTV))
    p, best = original_BTV[:, :-1].softmax(-1).max(-1)
    counted = (best == tokens_BT[:, 1:]) & (p < 0.8)
    agreed = changed_BTV[:, :-1].argmax(-1) == best
    assert 10 < int(counted.sum()) < 100
    assert sums.facts({})["agreement"]["right_but_unsure"] == pytest.approx(float(agreed[counted].double().mean()))


def test_infinite_logits_cost_nothing_where_both_rule_a_token_out() -> None:
    tokens_BT = torch.zeros(1, 2, dtype=torch.int64)
    p = torch.tensor([[[0.0, 1.0, -torch.inf], [0.0, 1.0, -torch.inf]]])
    q = torch.tensor([[[1.0, 0.0, -torch.inf], [0.0, -torch.inf, 0.0]]])
    original = OriginalOutput(p, tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool))
    kl_P = compare(original, q).kl_P
    a, b = math.exp(0) / (1 + math.e), math.e / (1 + math.e)
    assert float(kl_P[0]) == pytest.approx(a * math.log(a / b) + b * math.log(b / a))
    assert float(kl_P[1]) == math.inf


def test_what_is_kept_does_not_grow_with_the_tokens(language_model: Any) -> None:
    model = replacement_model(language_model, "gpt2")
    lm, crosscoders = model.language_model, [model.crosscoder]

    def numbers_held(value: Any, seen: set[int]) -> int:
        if isinstance(value, int | float | str | None):
            return 1
        if id(value) in seen:
            return 0
        seen.add(id(value))
        if isinstance(value, Tensor):
            return value.numel()
        inner = value if isinstance(value, list | tuple | dict) else getattr(value, "__dict__", {})
        return 1 + sum(numbers_held(value, seen) for value in (inner.values() if isinstance(inner, dict) else inner))

    held = []
    for repeats in (1, 3):
        part = in_batches(rows().repeat(repeats, 1), 3)
        means = measure(lm, crosscoders, part.batches(), []).means
        measured = measure_slice(lm, crosscoders, part, means, n_worst=5)
        assert len(measured.worst.facts(lm)) == 5
        measured.worst = None
        held.append(numbers_held(measured, set()))
    assert held[0] == held[1] > 0


def test_worst_tokens_are_those_of_largest_kl(language_model: Any) -> None:
    model, tokens = replacement_model(language_model, "gpt2"), rows()
    lm = model.language_model
    part = in_batches(tokens, 4)
    measured = measure_slice(lm, [model.crosscoder], part, {}, names=["propagated"], n_worst=6)
    original, changed = lm(tokens), model(tokens)
    kl_BT = dense_kl(original, changed)
    values, places = kl_BT.flatten().sort(descending=True)
    for row, value, place in zip(measured.worst.facts(lm), values[:6].tolist(), places[:6].tolist(), strict=True):
        b, t = divmod(place, T)
        assert (row["row"], row["position"]) == (b, t)
        assert row["kl"] == pytest.approx(value)
        words = [f"w{i}" for i in tokens[b].tolist()]
        assert [*row["before"], row["token"]] == words[max(0, t - 10) : t + 1]
        assert row["next"] == (words[t + 1] if t + 1 < T else None)
        assert row["original"] == f"w{int(original[b, t].argmax())}"
        assert row["replacement"] == f"w{int(changed[b, t].argmax())}"
        assert row["original_probability"] == pytest.approx(float(original[b, t].softmax(-1).max()))


def test_only_the_tokens_asked_for_count_and_answers_are_sets(language_model: Any) -> None:
    model, tokens = replacement_model(language_model, "gpt2"), rows()
    lm = model.language_model
    asked = torch.zeros_like(tokens, dtype=torch.bool)
    asked[:, 5] = True
    logits = model(tokens)
    best = logits[:, 5].argmax(-1).tolist()
    answers = [[3, token] if row % 2 else [3, 4] for row, token in enumerate(best)]
    right = sum(token in some for token, some in zip(best, answers, strict=True)) / N_ROWS
    part = Slice(name="asked", about="", batches=lambda: [Batch(tokens, None, asked, answers)], n_tokens=tokens.numel())
    facts = measure_slice(lm, [model.crosscoder], part, {}, names=["propagated"]).facts()["protocols"]["propagated"]
    assert facts["n_tokens"] == N_ROWS
    assert facts["accuracy"] == pytest.approx(right)
    assert facts["kl"]["mean"] == pytest.approx(float(dense_kl(lm(tokens), logits)[:, 5].mean()), rel=1e-9)


def test_tokens_that_are_not_kept_keep_their_output_and_do_not_count(language_model: Any) -> None:
    model, tokens = replacement_model(language_model, "gpt2"), rows()
    lm = model.language_model
    keep = torch.ones_like(tokens, dtype=torch.bool)
    keep[:, 4] = False
    part = Slice(name="kept", about="", batches=lambda: [Batch(tokens, keep)], n_tokens=tokens.numel())
    facts = measure_slice(lm, [model.crosscoder], part, {}, names=["clean"]).facts()
    wiring = model.crosscoder.wiring
    clean = {s: x.flatten(0, 1) for s, x in lm.read(tokens, [*wiring.read_sites, *wiring.write_sites]).items()}
    outputs, _ = model.crosscoder(clean)
    hooks = {
        site: lambda x, site=site: torch.where(keep[..., None], outputs[site].view_as(x), x)
        for site in wiring.write_sites
    }
    kl_BT = dense_kl(lm(tokens), lm.run(tokens, hooks))
    own = facts["protocols"]["clean"]
    assert own["n_tokens"] == N_ROWS * (T - 1)
    assert own["kl"]["mean"] == pytest.approx(float(kl_BT[keep].mean()), rel=1e-9)
    has_next = keep[:, :-1] & keep[:, 1:]
    increase = (losses(lm.run(tokens, hooks), tokens) - losses(lm(tokens), tokens)).view(N_ROWS, T - 1)
    assert own["cross_entropy_increase"] == pytest.approx(float(increase[has_next].mean()), rel=1e-8)


def test_shuffled_rows_hold_the_same_tokens_after_the_first() -> None:
    tokens = rows()
    part = shuffled(in_batches(tokens, 4))
    first, again = (torch.cat([batch.tokens_BT for batch in part.batches()]) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first[:, 0], tokens[:, 0])
    assert torch.equal(first.sort(1).values, tokens.sort(1).values)
    assert not torch.equal(first, tokens)


def test_summary_is_made_of_the_protocols(language_model: Any, tmp_path: Any) -> None:
    model = replacement_model(language_model, "llama", activation=TopK(4))
    np.save(tmp_path / "ids.npy", rows().numpy())
    config = ValidationConfig(
        data=str(tmp_path / "ids.npy"), slices=(("same", str(tmp_path / "ids.npy")),), curve=((1.0, 9.0), (4.0, 1.0))
    )
    done: list[int] = []
    facts = validate(model, config, progress=done.append)
    protocols, summary = facts["protocols"], facts["summary"]
    singles = [own["kl"]["mean"] for name, own in protocols.items() if name.startswith("single")]
    three = [protocols["clean"]["kl"]["mean"], protocols["propagated"]["kl"]["mean"], sum(singles) / len(singles)]
    assert [summary[key]["kl"] for key in ("clean", "propagated", "single")] == pytest.approx(three)
    assert summary["spread"]["kl"] == pytest.approx(max(three) - min(three))
    assert summary["is_within"] == all(value <= 0.05 for value in summary["spread"].values())
    assert [row["layers"] for row in summary["first_layers"]] == [1, 2, 3]
    assert summary["first_layers"][-1]["kl"] == protocols["propagated"]["kl"]["mean"]
    whole, *_, same = facts["slices"]
    assert {row["name"] for row in facts["slices"]} == {"whole", "shuffled words", "same"}
    assert whole["gap"] == {"kl": 0.0, "cross_entropy_increase": 0.0}
    assert same["gap"]["kl"] == pytest.approx(0, abs=1e-12)
    shuffled_row = facts["slices"][1]
    assert shuffled_row["gap"]["kl"] == pytest.approx(shuffled_row["kl"]["mean"] - whole["kl"]["mean"])
    assert sum(done) > 9 * T * len(protocols)
    equivalent = facts["compute_equivalent"]
    assert equivalent["target_loss"] == pytest.approx(1 + max(0, whole["cross_entropy_increase"]))


def test_mean_ablation_asks_for_means(language_model: Any) -> None:
    model = replacement_model(language_model, "gpt2")
    crosscoders = [model.crosscoder]
    with pytest.raises(ValueError, match="mean ablation needs the means of the written sites: give means"):
        measure(model.language_model, crosscoders, in_batches(rows(), 4).batches(), protocols(crosscoders).values())
