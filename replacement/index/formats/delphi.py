"""Caches of EleutherAI's delphi: the activations of a sparse coder's latents on some rows of tokens.

`{module}/{start}_{end}.safetensors` holds the latents `start` to `end`, both included: `locations` [n, 3] of unsigned integers
(row, position, latent less `start`), `activations` [n] in float16, and `tokens` [rows, length], unless the cache was made
without them. Values within 1e-5 of 0 are left out. From `save_splits` and `get_nonzeros` in `delphi/latents/cache.py`, and
`TensorBuffer.load` in `delphi/latents/loader.py`.

A latent becomes a feature of the layer that the module's name holds (`layers.3.mlp`). Latents that never fire are in no cache.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from replacement.index.records import Example, FeatureRecord

Texts = Callable[[Iterable[int]], Sequence[str]]
TOP_EXAMPLES = 20
QUANTILES = 10
BINS = 40
WINDOW = 16
"""Tokens on each side of an example's peak."""
_SPLIT = re.compile(r"(\d{1,15})_(\d{1,15})")
_LAYER = re.compile(r"(?:^|[^0-9A-Za-z])(\d{1,6})(?![0-9A-Za-z])")


def read(folder: Path, *, texts: Texts | None = None) -> Iterator[FeatureRecord]:
    """Every latent that fires, module by module; one split is in memory at a time.

    Args:
        folder: of the cache, of one of its modules, or one split.
        texts: texts of token ids; `#id` by default.

    Raises:
        ValueError: names the file and what is wrong with its name or tensors.
    """
    files = [folder] if folder.is_file() else folder.rglob("*.safetensors")
    splits = []
    for file in files:
        layer, span = _LAYER.search(file.parent.name), _SPLIT.fullmatch(file.stem)
        if layer is None or span is None:
            expected = "such as layers.3.mlp/0_1023.safetensors in a delphi cache"
            raise ValueError(f"{file}: expected a module and a span of latents, {expected}")
        splits.append((int(layer[1]), file.parent.name, int(span[1]), int(span[2]), file))
    for number, _, start, end, file in sorted(splits):
        yield from _split(file, number, start, end, texts or (lambda tokens: [f"#{token}" for token in tokens]))


def _split(file: Path, layer: int, start: int, end: int, texts: Texts) -> Iterator[FeatureRecord]:
    locations_N3, activation_N, tokens_RT = _tensors(file, end - start)
    fires_N = activation_N > 0
    columns = [*locations_N3[fires_N].T, activation_N[fires_N]]
    order = np.lexsort((columns[1], columns[0], -columns[3], columns[2]))  # by latent, then the strongest first
    row_N, position_N, latent_N, activation_N = (column[order] for column in columns)
    latents, first = np.unique(latent_N, return_index=True)
    for latent, begin, stop in zip(latents.tolist(), first, [*first[1:], len(latent_N)], strict=True):
        here = slice(begin, stop)
        fires = _Fires(row_N[here], position_N[here], activation_N[here], tokens_RT, texts)
        yield fires.record(layer, start + latent)


@dataclass(frozen=True, slots=True, eq=False)
class _Fires:
    """Where one latent fires, the strongest place first."""

    row_N: np.ndarray
    position_N: np.ndarray
    activation_N: np.ndarray
    tokens_RT: np.ndarray
    texts: Texts

    def record(self, layer: int, index: int) -> FeatureRecord:
        n, largest = len(self.row_N), float(self.activation_N[0])
        middles = {int(n * (1 - (k + 0.5) / QUANTILES)): k / QUANTILES for k in range(QUANTILES)}  # place -> quantile
        counts, edges = np.histogram(self.activation_N, bins=BINS, range=(0.0, largest))
        return FeatureRecord(
            layer=layer,
            index=index,
            density=n / self.tokens_RT.size,
            max_activation=largest,
            histogram_edges=tuple(edges.tolist()),
            histogram_counts=tuple(counts.tolist()),
            top_examples=tuple(self._example(place, None) for place in range(min(n, TOP_EXAMPLES))),
            quantile_examples=tuple(self._example(place, quantile) for place, quantile in sorted(middles.items())),
        )

    def _example(self, place: int, quantile: float | None) -> Example:
        row, position = int(self.row_N[place]), int(self.position_N[place])
        left = max(0, position - WINDOW)
        tokens = self.tokens_RT[row, left : position + WINDOW + 1].tolist()
        values = np.zeros(len(tokens))
        offset_N = self.position_N - left
        inside_N = (self.row_N == row) & (offset_N >= 0) & (offset_N < len(tokens))
        values[offset_N[inside_N]] = self.activation_N[inside_N]
        return Example(tuple(self.texts(tokens)), tuple(values.tolist()), position - left, row, position, quantile)


def _tensors(file: Path, largest_latent: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Locations, activations and tokens of a split, as int64, float32 and int64."""
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is no safetensors file: {error}") from None
    columns = []
    for name, kinds, expected in (
        ("locations", "ui", "[n, 3] of integers"),
        ("activations", "f", "[n] of floats"),
        ("tokens", "ui", "[rows, length] of integers"),
    ):
        if name not in tensors:
            raise ValueError(
                f"{file}: {name} is missing" + ("; make the cache with its tokens" if name == "tokens" else "")
            )
        tensor, n_axes = tensors[name], 1 if name == "activations" else 2
        if tensor.ndim != n_axes or tensor.dtype.kind not in kinds or (name == "locations" and tensor.shape[1] != 3):
            raise ValueError(f"{file}: expected {name} {expected}, given {tensor.dtype} {list(tensor.shape)}")
        columns.append(tensor.astype(np.float32 if kinds == "f" else np.int64))
    locations_N3, activation_N, tokens_RT = columns
    if len(locations_N3) != len(activation_N):
        raise ValueError(f"{file}: locations has {len(locations_N3)} rows, activations {len(activation_N)}")
    if not np.isfinite(activation_N).all():
        raise ValueError(f"{file}: activations must be finite")
    limits = (*tokens_RT.shape, largest_latent + 1)
    for axis, (name, limit) in enumerate(zip(("rows", "positions", "latents"), limits, strict=True)):
        column = locations_N3[:, axis]
        if len(column) and not (column.min() >= 0 and column.max() < limit):
            raise ValueError(
                f"{file}: expected {name} from 0 to {limit - 1} in locations, given {column.min()} to {column.max()}"
            )
    return locations_N3, activation_N, tokens_RT
