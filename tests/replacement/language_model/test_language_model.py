"""The adapter: every architecture is rebuilt exactly from its frozen parts, and bad input is refused by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from replacement import LanguageModel, Site
from replacement.language_model.frozen_layers import Scratch

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_frozen_attention_equals_the_models_own(language_model: Any, architecture: str, dtype: torch.dtype) -> None:
    lm = language_model(architecture, dtype)
    tokens = tiny.random_tokens()
    sites = [Site(layer, kind) for layer in range(lm.shape.n_layers) for kind in ("resid_pre", "attn_out")]
    frozen = lm.freeze(tokens, sites=sites)
    for layer, attention in enumerate(frozen.attentions):
        actual = frozen.activations[Site(layer, "attn_out")]
        rebuilt = attention.apply(frozen.activations[Site(layer, "resid_pre")])
        torch.testing.assert_close(rebuilt, actual, rtol=0, atol=TOLERANCE[dtype] * float(actual.abs().max()))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_pull_back_is_the_transpose_of_the_forward_map(language_model: Any, architecture: str) -> None:
    lm = language_model(architecture, torch.float64)
    frozen = lm.freeze(tiny.random_tokens())
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 10, 32, dtype=torch.float64, generator=generator)
    for attention in frozen.attentions:
        forward = (v * (x + attention.apply(x) - attention.constant_TD)).sum()
        pulled = v[None].clone()
        attention.add_values_back_(attention.mix_back(pulled, Scratch()), pulled)
        torch.testing.assert_close(forward, (pulled[0] * x).sum(), rtol=1e-12, atol=0)
        alone = torch.zeros_like(pulled)
        alone[0, 6] = v[6]
        short = alone.clone()
        attention.add_pull_back_from_(short, torch.tensor([6]))
        attention.add_values_back_(attention.mix_back(alone, Scratch()), alone)
        torch.testing.assert_close(short, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", list(tiny.HUGGING_FACE))
def test_logits_are_those_of_transformers(language_model: Any, model_folder: Any, architecture: str) -> None:
    lm = language_model(architecture)
    tokens = tiny.random_tokens()
    original = transformers.AutoModelForCausalLM.from_pretrained(
        model_folder(architecture), attn_implementation="eager"
    )
    with torch.no_grad():
        torch.testing.assert_close(lm(tokens), original(tokens[None]).logits[0], rtol=0, atol=1e-5)


def test_soft_capped_model_reports_logits_before_the_cap(language_model: Any) -> None:
    lm = language_model("gemma2", torch.float64)
    tokens = tiny.random_tokens()
    frozen = lm.freeze(tokens)
    torch.testing.assert_close(3.0 * torch.tanh(frozen.logits_TV / 3.0), lm(tokens), rtol=0, atol=1e-9)
    torch.testing.assert_close(frozen.probabilities_TV, lm(tokens).softmax(-1), rtol=0, atol=1e-12)


def test_fingerprint_does_not_depend_on_dtype_but_on_weights(language_model: Any) -> None:
    prints = {a: language_model(a).fingerprint for a in ("gpt2", "llama")}
    assert prints["gpt2"] == language_model("gpt2", torch.float64).fingerprint
    assert prints["gpt2"] != prints["llama"]


def test_tokenize_prepends_bos_and_reads_words(language_model: Any) -> None:
    lm = language_model("gpt2")
    assert lm.tokenize("w5 w6").tolist() == [1, 5, 6]
    assert lm.tokenize("w1 w5").tolist() == [1, 5]
    assert lm.token_strings([5, 6]) == ["w5", "w6"]
    assert lm.token_id("w7") == 7


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        (" \n ", "the prompt is empty"),
        ("w5 Quux w6 zorp Quux", r"does not know 'Quux', 'zorp'$"),
        ("w5 " * tiny.CONTEXT, "the prompt has 33 tokens: tiny-gpt2 reads at most 32"),
    ],
)
def test_prompts_the_model_cannot_read(language_model: Any, prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        language_model("gpt2").tokenize(prompt)


@pytest.mark.parametrize(
    "prompt", ["w5 w6 w7", [1, 5, 6, 7], (1, 5, 6, 7), torch.tensor([1, 5, 6, 7]), torch.tensor([1, 5, 6, 7]).byte()]
)
def test_every_form_of_a_prompt_is_the_same_prompt(language_model: Any, prompt: Any) -> None:
    lm = language_model("gpt2")
    ids_T = torch.tensor([1, 5, 6, 7])
    assert torch.equal(lm.tokens(prompt), ids_T)
    assert torch.equal(lm.batch(prompt), ids_T[None])
    site = Site(1, "attn_z")
    assert torch.equal(lm(prompt), lm(ids_T[None])[0])
    assert torch.equal(lm.read(prompt, [site])[site], lm.read(ids_T[None], [site])[site][0])
    assert torch.equal(lm.read_patterns(prompt)[2], lm.read_patterns(ids_T[None])[2])
    assert torch.equal(lm.freeze(prompt).tokens_T, ids_T)
    assert torch.equal(lm.freeze_query_key(prompt, layer=1).scores_HTT, lm.freeze_query_key(ids_T, layer=1).scores_HTT)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (torch.tensor([], dtype=torch.int64), r"expected at least one token id, got a tensor of shape \(0,\)"),
        ([], r"expected at least one token id, got a tensor of shape \(0,\)"),
        (torch.tensor([0.5]), r"expected integer token ids, got a tensor of torch\.float32"),
        (torch.tensor([True, False]), r"expected integer token ids, got a tensor of torch\.bool"),
        (torch.tensor([1j]), r"expected integer token ids, got a tensor of torch\.complex64"),
        (torch.tensor(5), r"expected a 1-D tensor of token ids, got one of shape \(\)$"),
        (torch.tensor([[1, 2]]), r"expected a 1-D tensor of token ids, got one of shape \(1, 2\)$"),
        ([1, 0.5], "expected a list of integer token ids, got one that holds 0.5; several prompts at once are a 2-D"),
        ([1, True], "expected a list of integer token ids, got one that holds True"),
        ([[1, 2], [3, 4]], r"expected a list of integer token ids, got one that holds \[1, 2\]"),
        (["w5", "w6"], "expected a list of integer token ids, got one that holds 'w5'"),
        ([list(range(10_000))], r"got one that holds \[0, 1, 2, 3, 4, 5, \.\.\.\]; several"),
        (torch.tensor([1, 97]), r"token ids must lie in \[0, 97\), got 1 to 97$"),
        ([-1, 5], r"token ids must lie in \[0, 97\), got -1 to 5$"),
        ([10**30], r"token ids must lie in \[0, 97\), got 1000000000000000000000000000000 to"),
        ([5] * 33, "the prompt has 33 tokens: tiny-gpt2 reads at most 32$"),
        (None, r"expected a prompt \(text, a list of token ids or a 1-D tensor of them\), got NoneType$"),
        ({5: 6}, r"expected a prompt .*, got dict$"),
        (b"w5", r"expected a prompt .*, got bytes$"),
    ],
)
def test_prompts_that_are_no_token_ids(language_model: Any, prompt: Any, message: str) -> None:
    """`__wrapped__`: under test beartype checks every annotated parameter before the function sees it."""
    with pytest.raises(ValueError, match=message):
        LanguageModel.tokens.__wrapped__(language_model("gpt2"), prompt)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (torch.zeros(2, 0, dtype=torch.int64), r"expected at least one token id, got a tensor of shape \(2, 0\)"),
        (torch.zeros(2, 3), "expected integer token ids"),
        (torch.full((2, 3), 97), "token ids must lie in"),
        (torch.zeros(2, 33, dtype=torch.int64), "the prompt has 33 tokens"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), "expected a 1-D tensor of token ids"),
    ],
)
def test_batches_the_model_cannot_read(language_model: Any, prompts: torch.Tensor, message: str) -> None:
    for read in (language_model("gpt2"), language_model("gpt2").batch):
        with pytest.raises(ValueError, match=message):
            read(prompts)


def test_long_inputs_are_not_echoed_whole(language_model: Any) -> None:
    lm = language_model("gpt2")
    for fails in (lm.tokenize, lm.token_id):
        for text in ("w5x" * 5_000, "unknown words " * 5_000):
            with pytest.raises(ValueError, match="tiny-gpt2") as caught:
                fails(text)
            assert len(str(caught.value)) < 200


def test_unknown_target_token(language_model: Any) -> None:
    with pytest.raises(ValueError, match="'w5 w6' is not a single token of tiny-gpt2's vocabulary"):
        language_model("gpt2").token_id("w5 w6")
    with pytest.raises(ValueError, match="tiny-native has no tokenizer"):
        language_model("native").tokenize("w5")


def test_sites_the_model_does_not_have(language_model: Any) -> None:
    with pytest.raises(ValueError, match=r"no site resid_mid\.7: it has 3 layers"):
        language_model("gpt2").read(tiny.random_tokens(), [Site(7, "resid_mid")])
    with pytest.raises(ValueError, match=r"no site resid_mid\.1: attention and MLP run in parallel"):
        language_model("neox").read(tiny.random_tokens(), [Site(1, "resid_mid")])


def test_an_architecture_without_attention_is_refused_by_name(tmp_path: Path) -> None:
    config = transformers.MambaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4, bos_token_id=1, eos_token_id=1, pad_token_id=2
    )
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="MambaForCausalLM cannot be linearised exactly"):
        LanguageModel.from_pretrained(tmp_path)


def test_a_model_whose_frozen_parts_do_not_add_up_is_refused_by_name(
    model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = LanguageModel.from_pretrained(model_folder("gpt2"))
    weights = [lm.parts.attention_weights(layer) for layer in range(lm.shape.n_layers)]
    weights[1] = dataclasses.replace(weights[1], W_V=weights[1].W_V * 1.01)  # stands for any unknown extra computation
    monkeypatch.setattr(lm.parts, "attention_weights", lambda layer: weights[layer])
    with pytest.raises(ValueError, match="GPT2LMHeadModel cannot be linearised exactly: the attention of layer 1"):
        lm.freeze([5, 6, 7])


def _copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def _edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_broken_folders(model_folder: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no language model folder at"):
        LanguageModel.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"is not a Hugging Face model folder: it has no config.json"):
        LanguageModel.from_pretrained(tmp_path / "empty")
    foreign = _copy(model_folder("gpt2"), tmp_path / "foreign")
    (foreign / "config.json").write_text(json.dumps({"model_type": "nothing-known"}))
    with pytest.raises(ValueError, match=r"cannot load the language model"):
        LanguageModel.from_pretrained(foreign)
    damaged = _copy(model_folder("gpt2"), tmp_path / "damaged")
    (damaged / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        LanguageModel.from_pretrained(damaged)
    truncated = _copy(model_folder("gpt2"), tmp_path / "truncated")
    data = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cannot load the language model .*truncated"):
        LanguageModel.from_pretrained(truncated)
    pickled = _copy(model_folder("gpt2"), tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds no .safetensors weights \(pickled weights are not loaded\)"):
        LanguageModel.from_pretrained(pickled)


def test_nan_in_weights_is_named(model_folder: Any, tmp_path: Path) -> None:
    folder = _copy(model_folder("gpt2"), tmp_path / "nan")
    _edit_weights(
        folder, lambda weights: weights["transformer.h.1.attn.c_attn.weight"].__setitem__((0, 0), float("nan"))
    )
    with pytest.raises(ValueError, match=r"weight .*holds NaN or infinity"):
        LanguageModel.from_pretrained(folder)


@pytest.mark.parametrize("architecture", [name for name in tiny.ARCHITECTURES if name != "neox"])
def test_a_replaced_resid_mid_reaches_the_stream(language_model: Any, architecture: str) -> None:
    """The stream after attention is the stream before it plus what attention writes: change either by one vector."""
    lm = language_model(architecture, torch.float64)
    tokens = tiny.random_tokens()
    change = torch.randn(1, 10, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outputs = []
    for kind in ("resid_mid", "attn_out"):
        seen: dict[str, torch.Tensor] = {}
        hooks: dict[Site, Any] = {Site(1, "resid_post"): lambda x, seen=seen: seen.update(x=x)}
        hooks[Site(1, kind)] = lambda x: x + change
        logits = lm.run(tokens, hooks)
        outputs.append((logits, seen["x"]))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-11)
    assert float((outputs[0][0] - lm(tokens)).abs().max()) > 1e-2


def test_a_model_in_the_hubs_cache_has_its_name_on_the_hub(model_folder: Any, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--google--gemma-2-2b" / "snapshots" / "0123456789"
    shutil.copytree(model_folder("gpt2"), snapshot)
    assert LanguageModel.from_pretrained(snapshot).name == "google/gemma-2-2b"
    (tmp_path / "gemma").symlink_to(snapshot)
    assert LanguageModel.from_pretrained(tmp_path / "gemma").name == "google/gemma-2-2b"
