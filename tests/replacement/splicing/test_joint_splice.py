"""A joint crosscoder in a model: the same as its parts side by side, in every kind of pass."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from replacement import Intervention, LanguageModel, ReplacementModel, TopK, Wiring, checkpoint, load
from replacement.crosscoder.joint import split
from replacement.splicing.splice import Splice, run_together
from replacement.validation.fidelity import measure_fidelity

EVERYWHERE = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
TOKENS = torch.stack([tiny.random_tokens(seed=seed) for seed in range(3)])


def joint_for(lm: LanguageModel, **options: Any) -> Any:
    """A random joint crosscoder."""
    k = tuple(range(2, 2 + 2 * lm.shape.n_layers))
    return tiny.crosscoder_for(lm, wiring=Wiring.joint(lm), activation=TopK(k), **options)


@EVERYWHERE
@pytest.mark.parametrize("reads", ["propagated", "clean"])
@pytest.mark.parametrize("errors", ["drop", "keep"])
def test_one_splice_is_two(language_model: Any, architecture: str, reads: str, errors: str) -> None:
    lm = language_model(architecture)
    joint = joint_for(lm, undecomposed_positions=1).eval()
    with torch.no_grad():
        whole = Splice(lm, joint, TOKENS, reads=reads, errors=errors)
        parts = [Splice(lm, part, TOKENS, reads=reads, errors=errors) for part in split(joint)]
        assert torch.equal(whole.run(), run_together(parts))
    inputs = parts[0].inputs | parts[1].inputs
    assert whole.inputs.keys() == inputs.keys()
    assert all(torch.equal(x_RD, inputs[site]) for site, x_RD in whole.inputs.items())


def test_the_model_is_that_of_two_crosscoders(language_model: Any, model_folder: Any, tmp_path: Any) -> None:
    """The same logits, whatever is replaced and changed, loaded or made here; and the same measurements."""
    lm = language_model("gpt2")
    joint = joint_for(lm)
    mlps, attention = split(joint)
    two = ReplacementModel(lm, mlps, attention_crosscoder=attention)
    checkpoint.save(joint, tmp_path / "joint")
    loaded = load(model_folder("gpt2"), crosscoder=tmp_path / "joint")
    changes = [Intervention(layer=1, index=3, position=2, activation=4.0, part=part) for part in ("mlp", "attention")]
    for model in (ReplacementModel(lm, joint), loaded):
        assert list(model.crosscoders) == ["mlp", "attention"]
        assert [c.fingerprint for c in model.crosscoders.values()] == [mlps.fingerprint, attention.fingerprint]
        for options in ({}, {"parts": ["attention"]}, {"reads": "clean"}, {"interventions": changes}, {"layers": [1]}):
            assert torch.equal(model(TOKENS, **options), two(TOKENS, **options))
        changed, expected = (m.intervene(TOKENS[0], changes).logits for m in (model, two))
        assert torch.equal(changed, expected)
    whole, both = measure_fidelity(lm, joint, TOKENS), measure_fidelity(lm, [mlps, attention], TOKENS)
    assert (whole.kl, whole.agreement_all, whole.l0) == (both.kl, both.agreement_all, both.l0)
    assert sorted(whole.unexplained) == sorted(both.unexplained)


def test_a_joint_crosscoder_is_the_only_one(language_model: Any) -> None:
    lm = language_model("gpt2")
    joint = joint_for(lm)
    mlps, attention = split(joint)
    with pytest.raises(
        ValueError, match="a joint crosscoder replaces attention, too: expected no attention crosscoder beside it"
    ):
        ReplacementModel(lm, joint, attention_crosscoder=attention)
    with pytest.raises(
        ValueError,
        match="attention needs a crosscoder of attention alone: a joint one is given as the crosscoder of both",
    ):
        ReplacementModel(lm, mlps, attention_crosscoder=joint)
