"""Weights under Hugging Face's names: trained in place, saved, read again, made anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import transformers

from replacement import LanguageModel
from replacement.language_model.hugging_face import (
    fingerprint_now,
    hugging_face_weights,
    randomise,
    save_language_model,
    trainable_weights,
)

TRAINED = [name for name in tiny.HUGGING_FACE if name != "neox"]


@pytest.mark.parametrize("architecture", TRAINED)
def test_changed_weights_are_saved_and_read_again(
    architecture: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """By `LanguageModel`, and by transformers, to which TransformerLens's names mean nothing."""
    lm, prompt = LanguageModel.from_pretrained(model_folder(architecture)), tiny.random_tokens()
    original_TV = lm(prompt)
    with torch.no_grad():
        for weight in trainable_weights(lm).values():
            weight.mul_(1.05).add_(0.01)
    save_language_model(lm, tmp_path / "saved")
    again = LanguageModel.from_pretrained(tmp_path / "saved")
    assert not torch.allclose(lm(prompt), original_TV)
    assert torch.equal(again(prompt), lm(prompt))
    assert again.fingerprint == fingerprint_now(lm) != lm.fingerprint
    assert again.tokenizer.get_vocab() == lm.tokenizer.get_vocab()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager").eval()
    expected_TV = model(prompt[None]).logits[0].detach()
    torch.testing.assert_close(lm(prompt), expected_TV, rtol=0, atol=1e-5 * float(expected_TV.abs().max()))


def test_the_demo_keeps_its_vocabulary(tmp_path: Path) -> None:
    """TransformerLens gives its tokenizer a token that the vocabulary does not have."""
    from replacement.loading import ARTIFACTS

    lm = LanguageModel.from_pretrained(ARTIFACTS / "language_model")
    save_language_model(lm, tmp_path / "saved")
    again = LanguageModel.from_pretrained(tmp_path / "saved")
    text = "the capital of the state containing Dallas is"
    assert again.fingerprint == lm.fingerprint
    assert again.tokenize(text).tolist() == lm.tokenize(text).tolist()


def test_random_weights_are_those_of_a_new_model(model_folder: Callable[[str], Path]) -> None:
    lm = LanguageModel.from_pretrained(model_folder("gpt2"))
    state = torch.random.get_rng_state()
    randomise(lm, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(3)
    fresh = transformers.GPT2LMHeadModel(lm.parts.bridge.original_model.config)
    weights = hugging_face_weights(lm)
    assert weights.keys() == dict(fresh.named_parameters()).keys()  # tied ones once
    assert all(torch.equal(weights[name], parameter) for name, parameter in fresh.named_parameters())
    torch.testing.assert_close(lm(tiny.random_tokens()), fresh.eval()(tiny.random_tokens()[None]).logits[0].detach())
