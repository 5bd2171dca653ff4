"""An index made from a model and text: against dense activations, killed and resumed, by two processes, of byte-pair text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from replacement import Crosscoder, LanguageModel, ReplacementModel, TopK, Wiring, checkpoint
from replacement.index import build, gathering
from replacement.index.build import IndexSettings, build_index
from replacement.index.records import TokenEffects
from replacement.index.store import FeatureIndex

N_ROWS, CONTEXT = 50, 16


@pytest.fixture(scope="module")
def model(language_model: Any) -> ReplacementModel:
    lm = language_model("llama")
    return ReplacementModel(lm, tiny.crosscoder_for(lm))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of random words that begin with the beginning-of-sequence token."""
    rows = np.random.default_rng(0).integers(3, 12, (N_ROWS, CONTEXT))
    rows[:, 0] = 1
    rows[::3, 5] = 1
    path = tmp_path_factory.mktemp("data") / "rows.npy"
    np.save(path, rows)
    return path


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "TOKENS_PER_PASS", 4 * CONTEXT)


def settings(data: Path, **options: Any) -> IndexSettings:
    return IndexSettings(
        data=str(data), n_tokens=N_ROWS * CONTEXT, n_top=4, per_quantile=2, before=4, after=2, **options
    )


def test_against_dense_activations(model: ReplacementModel, data: Path, tmp_path: Path) -> None:
    n_seen: list[int] = []
    assert build_index(model, tmp_path / "a.sqlite", settings(data), progress=n_seen.append)
    assert os.listdir(tmp_path) == ["a.sqlite"]
    rows = torch.from_numpy(np.load(data))
    crosscoder = model.crosscoder
    inputs = model.language_model.read(rows, crosscoder.wiring.read_sites)
    acts = []
    for row in range(len(rows)):
        features = crosscoder.encode({site: x[row] for site, x in inputs.items()})
        acts.append(torch.stack([features.dense(group) for group in range(crosscoder.n_groups)]))
    acts_RGTF = torch.stack(acts).detach().numpy().clip(min=0)
    counted = np.asarray(rows != 1)
    counted[:, 0] = True
    acts_RGTF *= counted[:, None, :, None]
    with FeatureIndex.open(tmp_path / "a.sqlite", crosscoder=crosscoder) as index:
        n_held_out = index.facts["n_held_out_rows"]
        assert (n_held_out, index.facts["n_rows"]) == (10, 40), "a fifth of what is there"
        assert sum(n_seen) == (40 + 40 + 10) * CONTEXT, "examples, claims, scores"
        acts_RGTF, counted = acts_RGTF[n_held_out:], counted[n_held_out:]
        assert index.facts["n_tokens"] == counted.sum()
        assert len(list(index)) == crosscoder.n_groups * crosscoder.n_features
        for record in index:
            acts_RT = acts_RGTF[:, record.layer, :, record.index]
            assert record.density == pytest.approx((acts_RT > 0).sum() / counted.sum())
            assert record.max_activation == pytest.approx(acts_RT.max(), rel=1e-4)
            counts, _ = np.histogram(acts_RT[acts_RT > 0], bins=record.histogram_edges or [0, 1])
            assert abs(counts - np.array(record.histogram_counts or [0])).sum() <= 2, "but for rounding"
            by_context = {  # of each row the largest; the same context counts once
                tuple(rows[n_held_out + row, max(0, position - 7) : position + 1].tolist()): acts_RT[row, position]
                for row, position in enumerate(acts_RT.argmax(1).tolist())
            }
            best = sorted((act for act in by_context.values() if act > 0), reverse=True)[:4]
            peaks = [example.activations[example.peak] for example in record.top_examples]
            np.testing.assert_allclose(peaks, best, rtol=2e-3)
            for example in (*record.top_examples, *record.quantile_examples):
                first = example.position - example.peak
                assert first == max(0, example.position - 4)
                chosen = slice(first, example.position + 3)
                expected = model.language_model.token_strings(rows[n_held_out + example.row, chosen].tolist())
                assert list(example.tokens) == expected
                np.testing.assert_allclose(
                    example.activations, acts_RT[example.row, chosen], rtol=2e-3, atol=1e-3 * record.max_activation
                )
            lower = [example.quantile for example in record.quantile_examples]
            assert lower == sorted(lower, reverse=True)
        labels = index.facts["labels"]
        assert labels["alive"] > 100
        assert any(record.label is not None and record.label.f1 is not None for record in index)
        assert any(record.effects.promoted and record.effects.read for record in index)


def test_killed_and_resumed_the_content_is_the_same(
    model: ReplacementModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_index(model, tmp_path / "whole.sqlite", settings(data))
    n_encoded = 0
    firings = gathering.firings_of

    def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal n_encoded
        n_encoded += 1
        if n_encoded in (3, 7):
            raise KeyboardInterrupt
        return firings(*arguments, **options)

    monkeypatch.setattr(gathering, "SAVE_EVERY_S", -1.0)
    monkeypatch.setattr(gathering, "_SHARE_OF_SAVING", float("inf"))
    monkeypatch.setattr(gathering, "firings_of", counting)
    out = tmp_path / "resumed.sqlite"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            build_index(model, out, settings(data))
        assert not out.exists()
    build_index(model, out, settings(data))
    assert n_encoded == 10 + 10 + 3 + 2, "batches of examples, of claims, of scores, and two that were interrupted"
    with FeatureIndex.open(out) as resumed, FeatureIndex.open(tmp_path / "whole.sqlite") as whole:
        assert resumed.digest() == whole.digest()
    assert sorted(os.listdir(tmp_path)) == ["resumed.sqlite", "whole.sqlite"]


def test_what_other_settings_left_behind_is_not_used(
    model: ReplacementModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_index(model, tmp_path / "whole.sqlite", settings(data))
    monkeypatch.setattr(gathering.Share, "remove_parts", lambda share, out: None)
    build_index(model, tmp_path / "a.sqlite", settings(data, context=None, n_quantiles=3))
    build_index(model, tmp_path / "a.sqlite", settings(data))
    with FeatureIndex.open(tmp_path / "a.sqlite") as index, FeatureIndex.open(tmp_path / "whole.sqlite") as whole:
        assert index.digest() == whole.digest()


def test_people_s_labels_survive(model: ReplacementModel, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.sqlite"
    build_index(model, out, settings(data))
    with FeatureIndex.open(out, writable=True) as index:
        index.add_person_label(1, 7, "my favourite")
    build_index(model, out, settings(data, n_effects=2))
    with FeatureIndex.open(out) as index:
        assert index.label(1, 7).text == "my favourite"
        assert index.facts["settings"]["n_effects"] == 2


def test_two_processes_make_the_index_of_one(model_folder: Any, data: Path, tmp_path: Path) -> None:
    folder = model_folder("llama")
    lm = LanguageModel.from_pretrained(folder)
    checkpoint.save(tiny.crosscoder_for(lm), tmp_path / "crosscoder")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, replacement\n"
        "from replacement.index import gathering\n"
        "from replacement.index.build import IndexSettings, build_index\n"
        f"gathering.TOKENS_PER_PASS = {4 * CONTEXT}\n"
        f"model = replacement.load({str(folder)!r}, crosscoder={str(tmp_path / 'crosscoder')!r})\n"
        f"build_index(model, sys.argv[1], IndexSettings(data={str(data)!r}, n_tokens=800, n_top=4))\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    digests = []
    for launcher, name in (([], "one"), (torchrun, "two")):
        command = [sys.executable, *launcher, str(script), str(tmp_path / f"{name}.sqlite")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        with FeatureIndex.open(tmp_path / f"{name}.sqlite") as index:
            digests.append(index.digest())
    assert digests[0] == digests[1]
    assert not list(tmp_path.glob("*.npz"))


def byte_pair_folder(folder: Path) -> tuple[Path, Path]:
    """A Llama of a byte-pair vocabulary, and a text that its words are from."""
    text = "the old queen of Ghent has três gatos. " * 40 + "a cat may look at the queen, isn't it? " * 40
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([text], trainer)
    options = {**tiny.SIZES, **tiny.GROUPED, "vocab_size": core.get_vocab_size(), "bos_token_id": 0, "eos_token_id": 0}
    tiny.write_model("LlamaForCausalLM", {**options, "pad_token_id": 0}, folder)
    words = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<s>")
    words.save_pretrained(folder)
    path = folder / "stories.txt"
    path.write_text(text)
    return folder, path


def test_a_llama_folder_with_a_byte_pair_tokenizer(tmp_path: Path) -> None:
    folder, text = byte_pair_folder(tmp_path / "model")
    lm = LanguageModel.from_pretrained(folder)
    crosscoder = Crosscoder(Wiring.strictly_causal(lm), n_features=64, activation=TopK(4), seed=0)
    index_settings = IndexSettings(data=str(text), n_tokens=600, context=24, before=5, after=0)
    build_index(ReplacementModel(lm, crosscoder), tmp_path / "features.sqlite", index_settings)
    with FeatureIndex.open(tmp_path / "features.sqlite") as index:
        tokens = {token for record in index for example in record.top_examples for token in example.tokens}
        assert {" queen", "the"} & tokens
        assert any(match.reason.startswith("fires on") for match in index.search("queen"))
        assert index.facts["labels"]["mean_f1"] > 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_tokens": 0}, "tokens: expected at least 1, given 0"),
        ({"before": -1}, "before: expected at least 0, given -1"),
        ({"n_top": 300}, "at most 255 examples"),
        ({"after": 300}, "windows of at most 255 tokens"),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IndexSettings(**options)


def test_wrong_files_and_data(model: ReplacementModel, data: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "short.npy", np.load(data)[:1])
    with pytest.raises(ValueError, match=r"short.npy has 1 row of 16 tokens: expected at least 2"):
        build_index(model, tmp_path / "a.sqlite", settings(tmp_path / "short.npy"))
    (tmp_path / "text.sqlite").write_text("not an index")
    with pytest.raises(ValueError, match=r"text.sqlite is no feature index"):
        build_index(model, tmp_path / "text.sqlite", settings(data))
    lm = model.language_model
    other = ReplacementModel(lm, tiny.crosscoder_for(lm, n_features=32))
    build_index(other, tmp_path / "other.sqlite", settings(data))
    with pytest.raises(ValueError, match="is the index of another crosscoder"):
        build_index(model, tmp_path / "other.sqlite", settings(data))
    with pytest.raises(ValueError, match="part: expected 'mlp', got 'attention'"):
        build_index(model, tmp_path / "a.sqlite", settings(data), part="attention")


def test_labels_name_what_stands_out_among_what_is_promoted() -> None:
    clear = TokenEffects(promoted=(("Austin", 3.0), ("Boston", 2.0)))
    blurred = TokenEffects(promoted=(("final", 1.3), ("young", 1.2)))
    promoted: dict[tuple[int, int], str] = {}
    effects = [(0, 1, clear), (1, 2, blurred), (2, 3, TokenEffects())]
    assert list(build._noting(promoted, effects)) == effects
    assert promoted == {(0, 1): "Austin"}
