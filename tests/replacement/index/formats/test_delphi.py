"""delphi's caches: a small one written as delphi writes it, features counted by hand, and damaged ones."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from replacement.index import formats
from replacement.index.formats import delphi

TOKENS = np.arange(12, dtype=np.int64).reshape(2, 6)


def cache(folder: Path, **changed: Any) -> Path:
    """A split of latents 10 to 13 of layer 3: 11 fires at (0, 2), (0, 3), (1, 5), 13 at (1, 0); 12 is negative there."""
    tensors = {
        "locations": np.array([[0, 2, 1], [0, 3, 1], [1, 0, 2], [1, 0, 3], [1, 5, 1]], dtype=np.uint16),
        "activations": np.array([0.5, 2.0, -1.0, 4.0, 1.0], dtype=np.float16),
        "tokens": TOKENS,
    } | changed
    path = folder / "layers.3.mlp" / "10_13.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    (path.parent / "config.json").write_text('{"model_name": "tiny", "ctx_len": 6}')
    return path


def test_a_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delphi, "WINDOW", 2)
    cache(tmp_path)
    first, second = formats.read(tmp_path, texts=lambda ids: [f"t{token}" for token in ids])
    assert [(record.layer, record.index) for record in (first, second)] == [(3, 11), (3, 13)]
    assert (first.density, first.max_activation) == (3 / 12, 2.0)
    assert (second.density, second.max_activation) == (1 / 12, 4.0)
    assert sum(first.histogram_counts) == 3
    assert (first.histogram_edges[0], first.histogram_edges[-1]) == (0.0, 2.0)
    strongest, middle, weakest = first.top_examples
    assert strongest.tokens == ("t1", "t2", "t3", "t4", "t5")
    assert strongest.activations == (0.0, 0.5, 2.0, 0.0, 0.0)
    assert (strongest.peak, strongest.row, strongest.position) == (2, 0, 3)
    assert (middle.tokens, middle.activations) == (("t9", "t10", "t11"), (0.0, 0.0, 1.0))
    assert (middle.row, middle.position, weakest.activations[weakest.peak]) == (1, 5, 0.5)
    assert [example.activations[example.peak] for example in first.quantile_examples] == [2.0, 1.0, 0.5]
    quantiles = [example.quantile for example in first.quantile_examples]
    assert quantiles == sorted(quantiles, reverse=True)


def test_quantiles_are_those_of_the_activations(tmp_path: Path) -> None:
    """With ten activations for each quantile the example of each is one of its ten."""
    n = 10 * delphi.QUANTILES
    locations = np.stack([np.arange(n), np.zeros(n), np.zeros(n)], 1).astype(np.uint32)
    acts = np.random.default_rng(0).permutation(np.arange(1, n + 1)).astype(np.float32)
    cache(tmp_path, locations=locations, activations=acts, tokens=np.zeros((n, 3), dtype=np.int64))
    (record,) = formats.read(tmp_path)
    assert len(record.quantile_examples) == delphi.QUANTILES
    for example in record.quantile_examples:
        assert example.quantile is not None
        assert example.quantile * n < example.activations[example.peak] <= (example.quantile + 0.1) * n + 1e-9
    assert record.top_examples[0].tokens == ("#0", "#0", "#0")


def test_modules_and_splits_are_read_in_order(tmp_path: Path) -> None:
    for module, name in (("layers.10.mlp", "0_3"), ("layers.2.mlp", "4_7"), ("layers.2.mlp", "0_3")):
        source = cache(tmp_path / "source")
        (tmp_path / "cache" / module).mkdir(parents=True, exist_ok=True)
        (tmp_path / "cache" / module / f"{name}.safetensors").write_bytes(source.read_bytes())
    found = [(record.layer, record.index) for record in formats.read(tmp_path / "cache")]
    assert found == [(2, 1), (2, 3), (2, 5), (2, 7), (10, 1), (10, 3)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"locations": np.zeros((5, 2), dtype=np.uint16)},
            r"expected locations \[n, 3\] of integers, given uint16 \[5, 2\]",
        ),
        ({"locations": np.zeros((5, 3), dtype=np.float32)}, r"expected locations \[n, 3\] of integers, given float32"),
        ({"locations": np.zeros((4, 3), dtype=np.uint16)}, "locations has 4 rows, activations 5"),
        ({"activations": np.zeros((5, 1), dtype=np.float16)}, r"expected activations \[n\] of floats"),
        ({"activations": np.full(5, np.inf, dtype=np.float16)}, "activations must be finite"),
        ({"locations": np.full((5, 3), -1, dtype=np.int64)}, "expected rows from 0 to 1 in locations, given -1 to -1"),
        ({"tokens": TOKENS[:, :4].copy()}, "expected positions from 0 to 3 in locations, given 0 to 5"),
        (
            {"locations": np.full((5, 3), [0, 0, 4], dtype=np.uint16)},
            "expected latents from 0 to 3 in locations, given 4 to 4",
        ),
        ({"tokens": TOKENS[0].copy()}, r"expected tokens \[rows, length\] of integers"),
        ({"tokens": None}, "tokens is missing; make the cache with its tokens"),
        ({"activations": None}, "10_13.safetensors: activations is missing"),
    ],
)
def test_tensors_of_wrong_shape_are_named(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    cache(tmp_path, **changed)
    with pytest.raises(ValueError, match=message):
        list(formats.read(tmp_path))


def test_foreign_files_are_named(tmp_path: Path) -> None:
    path = cache(tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"10_13.safetensors is no safetensors file"):
        list(formats.read(tmp_path))
    path.write_bytes(pickle.dumps({"locations": [1]}))
    with pytest.raises(ValueError, match=r"10_13.safetensors is no safetensors file"):
        list(formats.read(tmp_path))
    path.rename(path.with_name("model.safetensors"))
    with pytest.raises(
        ValueError, match=r"model.safetensors: expected a module and a span of latents, such as layers.3.mlp/0_1023"
    ):
        list(formats.read(tmp_path))
