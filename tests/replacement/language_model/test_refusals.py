"""Models, tokenizers and loading options that cannot work are refused at once, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import replacement
from replacement import LanguageModel
from replacement.language_model.bridge_parts import BridgeParts


def save(folder: Path, kind: str, options: dict[str, Any], head: str = "ForCausalLM") -> Path:
    """A random model in Hugging Face layout."""
    config = getattr(transformers, f"{kind}Config")(**options)
    getattr(transformers, f"{kind}{head}")(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "head", "options", "message"),
    [
        ("Bert", "ForMaskedLM", {}, "BertForMaskedLM cannot be linearised exactly"),
        ("GPT2", "LMHeadModel", {**tiny.GPT2, "n_layer": 0}, "n_layers must be 1 or more, got 0"),
    ],
)
def test_architectures_are_refused_when_the_model_is_made(
    tmp_path: Path, kind: str, head: str, options: dict[str, Any], message: str
) -> None:
    sizes = {} if kind == "GPT2" else tiny.SIZES
    with pytest.raises(ValueError, match=message):
        LanguageModel.from_pretrained(save(tmp_path, kind, {**sizes, **options}, head))


@pytest.mark.parametrize(
    ("factor", "part"), [("_residual_scale", "attention of layer 0"), ("_logit_scale", "unembedding")]
)
def test_a_factor_that_is_left_out_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: str, part: str
) -> None:
    save(tmp_path, "Granite", {**tiny.SIZES, "residual_multiplier": 0.2, "logits_scaling": 2.0})
    monkeypatch.setattr(BridgeParts, factor, lambda self, *given: 1.0)
    with pytest.raises(ValueError, match=f"GraniteForCausalLM cannot be linearised exactly: the {part}, rebuilt"):
        LanguageModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [{"n_layer": 1}, {"n_positions": 1}, {"n_head": 1}])
def test_small_models_work(tmp_path: Path, size: dict[str, int]) -> None:
    lm = LanguageModel.from_pretrained(save(tmp_path, "GPT2", {**tiny.GPT2, **size}, "LMHeadModel"))
    frozen = lm.freeze([5])
    torch.testing.assert_close(frozen.logits_TV, lm([5]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("role", ["bos", "eos", "pad", "unk"])
def test_a_tokenizer_of_another_model(tmp_path: Path, role: str) -> None:
    save(tmp_path, "GPT2", tiny.GPT2, "LMHeadModel")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(120)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    roles = {"unk_token": "w0", "bos_token": "w1", "pad_token": "w2", "eos_token": "w1", f"{role}_token": "w110"}
    PreTrainedTokenizerFast(tokenizer_object=words, **roles).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"the tokenizer's {role} token has the id 110, .* vocabulary ends at 96"):
        LanguageModel.from_pretrained(tmp_path)


def test_words_past_the_vocabulary(tmp_path: Path) -> None:
    """A tokenizer may know more words than the model, as long as a prompt holds none of them."""
    save(tmp_path, "GPT2", tiny.GPT2, "LMHeadModel")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(120)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w96").save_pretrained(tmp_path)
    lm = LanguageModel.from_pretrained(tmp_path)
    assert lm("w5 w6").shape == (3, 97)
    with pytest.raises(ValueError, match=r"token ids must lie in \[0, 97\), got 5 to 110"):
        lm("w5 w110")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "x"}, r"expected a crosscoder for the model 'x': give load\(\.\.\., crosscoder=FOLDER\)"),
        ({"dtype": "float31"}, "dtype: expected one of float32, bfloat16, float16, float64, got 'float31'"),
        ({"dtype": "int64"}, "dtype: expected one of float32, .*, got 'int64'"),
        ({"dtype": torch.bool}, "dtype: expected one of float32, .*, got 'bool'"),
        ({"device": "quantum"}, "device: 'quantum' cannot be used here"),
        ({"device": "cuda:99"}, "device: 'cuda:99' cannot be used here"),
        (
            {"crosscoder": "/nowhere"},
            "/nowhere does not exist: expected the folder of a crosscoder, or hf:ORG/REPO on the hub",
        ),
    ],
)
def test_options_of_load(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replacement.load(**options)


def test_load_takes_names_of_dtypes() -> None:
    assert replacement.load(dtype="float64").language_model.dtype == torch.float64
