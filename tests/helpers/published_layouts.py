"""Small published checkpoints: seeded tensors to write, and the check that a loaded crosscoder computes what a formula says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from replacement import checkpoint
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.formats import convert
from replacement.crosscoder.formats.layouts import LAYOUTS, open_published
from replacement.crosscoder.formats.reference import Asked
from replacement.crosscoder.sites import Site

N_ROWS = 7
Change = Callable[[Path], Any]
"""Something that goes wrong with a checkpoint's folder."""
Reference = Callable[[Mapping[Site, Tensor]], tuple[list[Tensor], dict[Site, Tensor]]]
"""From the sites read to dense activations `[B, F]` per group and outputs `[B, D]` per written site, all in float64."""


class RandomTensors:
    """Seeded random tensors of any shape."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator).mul_(scale).to(self.dtype)


def inputs_for(crosscoder: Crosscoder, *, n_rows: int = N_ROWS) -> dict[Site, Tensor]:
    """Random activations in float64 of all sites that are read."""
    generator = torch.Generator().manual_seed(1)
    return {
        site: torch.randn(n_rows, crosscoder.wiring.width(site), generator=generator, dtype=torch.float64)
        for site in crosscoder.wiring.read_sites
    }


def assert_computes(path: Path, reference: Reference, scratch: Path, *, decomposed_from: int = 0) -> Crosscoder:
    """A checkpoint computes what the reference says, loaded and left in its files, and so does a native copy of it.

    It is detected as its own layout and no other.

    Args:
        scratch: folder for the copy.
        decomposed_from: rows before this one have no features.

    Returns:
        The crosscoder in float64.
    """
    bare, _ = Asked.split(path)
    assert [layout.name for layout in LAYOUTS if layout.detect(bare)] == [open_published(path).layout]
    convert.convert(path, scratch / "native", to="crosstrace", dtype=torch.float64)
    eager = checkpoint.load(path, dtype=torch.float64, lazy=False)
    lazy = checkpoint.load(path, dtype=torch.float64, lazy=True)
    copy = checkpoint.load(scratch / "native", dtype=torch.float64)
    assert eager.fingerprint == lazy.fingerprint == copy.fingerprint
    inputs = inputs_for(eager)
    acts, outputs = reference(inputs)
    for crosscoder in (eager, lazy, copy):
        with torch.no_grad():
            reconstructions, features = crosscoder(inputs)
        for group, acts_BF in enumerate(acts):
            expected_BF = acts_BF.clone()
            expected_BF[:decomposed_from] = 0
            torch.testing.assert_close(features.dense(group), expected_BF, rtol=1e-9, atol=1e-9)
        assert reconstructions.keys() == outputs.keys()
        for site, y_BD in outputs.items():  # the reference decodes all rows
            torch.testing.assert_close(
                reconstructions[site][decomposed_from:], y_BD[decomposed_from:], rtol=1e-9, atol=1e-9
            )
        index_S = torch.tensor([2, 0])
        for group, (reads, writes) in enumerate(zip(eager.wiring.reads, eager.wiring.writes, strict=True)):
            for site in reads:
                rows = crosscoder.encoder_vectors(group, index_S, site)
                torch.testing.assert_close(rows, eager.encoder(group, site)[index_S], rtol=1e-12, atol=1e-12)
            for site in writes:
                rows = crosscoder.decoder_vectors(group, index_S, site)
                torch.testing.assert_close(rows, eager.decoder(group, site)[index_S], rtol=1e-12, atol=1e-12)
    return eager


def entries_changed(name: str, **changes: Any) -> Change:
    """Entries of a JSON or YAML file are other ones, or missing (None)."""

    def change(folder: Path) -> None:
        path = folder / name
        load, dump = (yaml.safe_load, yaml.safe_dump) if path.suffix == ".yaml" else (json.loads, json.dumps)
        values = {**load(path.read_text()), **changes}
        path.write_text(dump({entry: value for entry, value in values.items() if value is not None}))

    return change


def tensors_changed(name: str, **changes: Tensor | None) -> Change:
    """Tensors of a file are other ones, or missing (None)."""

    def change(folder: Path) -> None:
        tensors = {**load_file(folder / name), **changes}
        save_file({tensor: value for tensor, value in tensors.items() if value is not None}, folder / name)

    return change


def cut_off(name: str) -> Change:
    """A file ends too early."""

    def change(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-5])

    return change
