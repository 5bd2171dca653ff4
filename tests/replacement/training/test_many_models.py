"""Crosscoders over several models: other widths, depths, architectures and tokenizers; and what cannot be put together."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import training_runs
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import ModelShape, Site
from replacement.crosscoder.topk import TopK
from replacement.crosscoder.wiring import Wiring
from replacement.data.activation_stream import ActivationStream
from replacement.data.documents import special_ids
from replacement.data.open_tokens import open_source, store_rows
from replacement.training.build import Models, load_models
from replacement.training.config import TrainingConfig
from replacement.training.metrics_log import read_metrics
from replacement.training.run_config import run_config
from replacement.training.runs import Interrupted, run
from replacement.training.trainer import train
from replacement.validation.across_models import decoder_norms_by_model, lifetimes, spread

WEIGHTS = "crosscoder/crosscoder.safetensors"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words of the tiny models, some of them in no tokenizer's vocabulary."""
    words = np.random.default_rng(0).integers(3, 120, 4000)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(
        "\n".join(" ".join(f"w{word}" for word in line) for line in words.reshape(-1, 20)), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="module")
def pieces_model(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wider and deeper model of another architecture, whose tokens are pieces of words and of digits across them."""
    folder = tmp_path_factory.mktemp("pieces") / "llama"
    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "bos_token_id": 0, "pad_token_id": 0, "eos_token_id": 0}
    tiny.write_model("LlamaForCausalLM", {**tiny.SIZES, **tiny.GROUPED, **sizes}, folder)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")  # pieces may hold the space between two words
    backend.train([str(text)], trainers.BpeTrainer(vocab_size=90, special_tokens=["<s>"], show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", pad_token="<s>").save_pretrained(folder)
    return folder


@pytest.fixture
def both(model_folder: Callable[[str], Path], pieces_model: Path) -> list[str]:
    """Two models of different architectures, widths, depths and tokenizers."""
    return [str(model_folder("gpt2")), str(pieces_model)]


def settings(models: list[str], source: Path, *, n_steps: int = 6) -> dict[str, Any]:
    value = training_runs.settings(Path(), source, n_steps=n_steps, crosscoder={"wiring": "model_diffing"})
    return value | {"model": models, "checkpoint_every": 3, "data": value["data"] | {"context": 16}}


def test_two_architectures_that_share_no_tokenizer_are_trained_and_resumed(
    both: list[str], text: Path, tmp_path: Path
) -> None:
    value = settings(both, text)
    crosscoder = run(run_config(value), tmp_path / "whole")
    first, second = crosscoder.wiring.write_sites
    assert (str(first), str(second)) == ("resid_post.1", "resid_post.2@1")  # the middle of each
    assert (crosscoder.wiring.width(first), crosscoder.wiring.width(second)) == (32, 48)
    assert crosscoder.n_features == 64

    def stop(progress: Any) -> None:
        if progress.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(run_config(value), tmp_path / "stopped", progress=stop)
    run(run_config(value), tmp_path / "stopped", resume=True)
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (tmp_path / "stopped" / WEIGHTS).read_bytes()
    for kind in ("train", "held_out"):
        records = read_metrics(tmp_path / "whole", kind=kind)
        assert records[-1].keys() >= {"text_tokens", "not_aligned"}
        text_tokens, not_aligned = records[-1]["text_tokens"], records[-1]["not_aligned"]
        assert list(text_tokens) == list(not_aligned) == both
        aligned = {n - not_aligned[name] for name, n in text_tokens.items()}
        assert len(aligned) == 1
        assert 0 < aligned.pop() < min(text_tokens.values())
        assert kind == "train" or min(records[-1]["unexplained"].values()) > 0
    resumed = read_metrics(tmp_path / "stopped", kind="train")
    assert [record["not_aligned"] for record in resumed] == [
        record["not_aligned"] for record in read_metrics(tmp_path / "whole", kind="train")
    ]


def test_processes_share_rows_or_features(both: list[str], text: Path, tmp_path: Path) -> None:
    value = settings(both, text)
    outs = {name: str(tmp_path / name) for name in ("rows", "features")}
    runs = [{"config": value, "out": outs["rows"]}, {"config": value, "out": outs["features"], "feature_shards": 2}]
    training_runs.execute(runs, tmp_path, n_processes=2)
    one = run(run_config(value), tmp_path / "one")
    for out in outs.values():
        two = run(run_config(value), out, resume=True)  # a finished run is only read
        for name, values in one.state_dict().items():
            torch.testing.assert_close(two.state_dict()[name], values, rtol=1e-3, atol=1e-4)


def test_activations_are_those_of_the_counterparts(both: list[str], text: Path) -> None:
    """Against each model run on its own tokens, and texts compared character by character."""
    loaded = load_models(both)
    assert loaded.tokenizers == (0, 1)
    source = open_source(text, loaded.first, others=loaded.all[1:], context=16, n_held_out=4)
    rows = source.held_out()
    sites = [Site(0, "resid_post"), Site(3, "resid_post", 1)]
    acts = loaded.read(source.by_tokenizer(rows), sites)
    stream = ActivationStream(
        source, lambda rows: loaded.read(source.by_tokenizer(rows), sites),
        batch_tokens=8, buffer_tokens=64, seed=0, shards=2, excluded_ids=special_ids(loaded.first),
    )  # fmt: skip
    kept_RT, n = stream.kept(rows), 0
    parts = source.by_tokenizer(rows)
    for row in range(len(rows)):
        read = [tokens_RT[row] for tokens_RT, _ in parts]
        kinds = [Site(site.layer, site.kind) for site in sites]
        own = [lm.read(t, [kind])[kind] for lm, t, kind in zip(loaded.all, read, kinds, strict=True)]
        for position in kept_RT[row].nonzero()[:, 0].tolist():
            there = int(parts[1].place_RT[row, position])
            assert torch.equal(acts[sites[0]][row, position], own[0][position])
            torch.testing.assert_close(acts[sites[1]][row, position], own[1][there])
            texts = [
                "".join(lm.tokenizer.decode(t[1 : end + 1], skip_special_tokens=False).split())
                for lm, t, end in zip(loaded.all, read, (position, there), strict=True)
            ]
            assert "w0" in texts[0] or texts[0] == texts[1]  # w0 stands for the words that the first does not know
            n += position > 0
    assert n > 20
    # Every position that starts at a step is reached again, and every process serves its own shards.
    later = [batch[sites[0]] for batch in islice(stream.batches(start=5), 2)]
    assert all(map(torch.equal, later, [batch[sites[0]] for batch in islice(stream.batches(), 5, 7)]))


def test_models_that_share_a_tokenizer_need_no_alignment(model_folder: Callable[[str], Path]) -> None:
    loaded = load_models([str(model_folder(name)) for name in ("gpt2", "neox", "gemma2")])
    assert loaded.tokenizers == (0, 0, 0)
    rows = torch.randint(3, 97, (2, 8), generator=torch.Generator().manual_seed(0))
    source = open_source(rows, loaded.first, others=loaded.all[1:])
    assert source.layout is None
    acts = loaded.read(rows, [Site(1, "mlp_in", 2), Site(0, "attn_z")])
    assert torch.equal(acts[Site(1, "mlp_in", 2)], loaded.all[2].read(rows, [Site(1, "mlp_in")])[Site(1, "mlp_in")])
    with pytest.raises(ValueError, match="3 models are too few to read"):
        loaded.read(rows, [Site(1, "mlp_in", 3)])


def test_texts_that_cannot_be_aligned_are_refused(
    both: list[str], text: Path, tmp_path: Path, language_model: Any
) -> None:
    loaded, native = load_models(both), language_model("native")
    with pytest.raises(ValueError, match=r"gives token ids of one tokenizer, .* have several: expected text"):
        open_source(torch.ones(4, 8, dtype=torch.int64), loaded.first, others=loaded.all[1:])
    with pytest.raises(ValueError, match="gives token ids of one tokenizer"):
        open_source("demo", loaded.first, others=loaded.all[1:])
    with pytest.raises(ValueError, match="texts cannot be aligned: tiny-native has no tokenizer, and other models"):
        open_source(text, loaded.first, others=[native])
    slow = Models(loaded.all).all[1]
    slow.tokenizer = type("Slow", (), {"is_fast": False, "get_vocab": dict, "all_special_ids": [], "bos_token_id": 0,
                                       "eos_token_id": 0, "pad_token_id": 0, "unk_token_id": None})()  # fmt: skip
    with pytest.raises(ValueError, match="llama has a tokenizer that does not say where its tokens end"):
        open_source(text, loaded.first, others=[slow])
    aligned = open_source(text, (again := load_models(both)).first, others=again.all[1:], context=16)
    with pytest.raises(ValueError, match="is read by several tokenizers: only rows of one are stored"):
        store_rows(aligned, tmp_path / "rows.npy")


def test_no_common_text_is_refused(both: list[str], text: Path, tmp_path: Path) -> None:
    """Words of one tokenizer, and whole lines of the other."""
    folder = tmp_path / "lines"
    shutil.copytree(both[1], folder)
    lines = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1}, unk_token="<unk>"))
    lines.pre_tokenizer = pre_tokenizers.Split("\n", "merged_with_next")
    PreTrainedTokenizerFast(tokenizer_object=lines, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)
    words = text.read_text(encoding="utf-8").replace("\n", " \n")
    (tmp_path / "spaced.txt").write_text(words, encoding="utf-8")
    names = f"{Path(both[0]).name} and lines"
    with pytest.raises(ValueError, match=re.escape(f"no common text: the tokenizers of {names} never end a token")):
        run(run_config(settings([both[0], str(folder)], tmp_path / "spaced.txt")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def planted() -> tuple[Wiring, Iterator[dict[Site, Tensor]], list[Tensor]]:
    """Four models of 16 known features: model 0 lacks the last four; 1 is what it becomes with them; 2 and 3 are 1 rotated and
    scaled, and 3 is wider."""
    generator = torch.Generator().manual_seed(0)
    widths, scales = (24, 24, 24, 40), (1.0, 1.0, 3.0, 0.5)
    wiring = Wiring.model_diffing([ModelShape(1, width, 1, width) for width in widths], layer=0)
    base_FD = torch.nn.functional.normalize(torch.randn(16, 24, generator=generator), dim=1)
    turns = [torch.linalg.qr(torch.randn(width, width, generator=generator))[0][:24] for width in widths]
    turns[0] = turns[1] = torch.eye(24)
    vectors = [scale * base_FD @ turn for scale, turn in zip(scales, turns, strict=True)]
    vectors[0] = vectors[0] * (torch.arange(16) < 12)[:, None]

    def batches() -> Iterator[dict[Site, Tensor]]:
        while True:
            f_NF = (torch.rand(256, 16, generator=generator) < 0.12) * (0.5 + torch.rand(256, 16, generator=generator))
            yield {site: f_NF @ vector for site, vector in zip(wiring.writes[0], vectors, strict=True)}

    return wiring, batches(), vectors


def test_shared_features_turn_with_their_models_and_late_ones_are_born_late() -> None:
    wiring, batches, vectors = planted()
    crosscoder = Crosscoder(wiring, n_features=24, activation=TopK(4), seed=0)
    trained = train(crosscoder, batches, TrainingConfig(n_tokens=400 * 256, batch_tokens=256, learning_rate=1e-2))
    decoders = [trained.decoder(0, site).detach() for site in wiring.writes[0]]
    cosine = torch.nn.functional.cosine_similarity
    owner_F = torch.stack([cosine(decoders[1], vector[None], dim=1) for vector in vectors[1]]).argmax(dim=1)
    assert len(owner_F.unique()) == 16
    for model in range(4):
        has_F = vectors[model].any(dim=1)
        own_FD, true_FD = decoders[model][owner_F], vectors[model]
        assert float(cosine(own_FD, true_FD, dim=1)[has_F].min()) > 0.95
        # As long as it is there, relative to model 1.
        lengths_F = own_FD.norm(dim=1) / decoders[1][owner_F].norm(dim=1)
        torch.testing.assert_close(lengths_F, true_FD.norm(dim=1) / vectors[1].norm(dim=1), rtol=0.1, atol=0.1)
    spreads = {site: spread(x_ND) for site, x_ND in next(batches).items()}
    born_F, died_F = lifetimes(decoder_norms_by_model(trained, spreads)[owner_F])
    assert born_F.tolist() == [0] * 12 + [1] * 4
    assert died_F.tolist() == [4] * 16
