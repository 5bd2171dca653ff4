"""A layout is told by content: what is written is found again and by no other layout, and junk is no layout and no crash."""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replacement import JointTopK, JumpReLU, ReLU, TopK
from replacement.crosscoder.activation import Activation
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.families import MLP_READS
from replacement.crosscoder.formats.layouts import LAYOUTS, open_published, writable
from replacement.crosscoder.sites import ModelShape
from replacement.crosscoder.wiring import Wiring

L, F, D = 3, 10, 6
SHAPE = ModelShape(n_layers=L, d_model=D, n_heads=2, d_head=3)
WIRINGS = [
    *(Wiring.per_layer(SHAPE, read=read) for read in MLP_READS),
    *(Wiring.strictly_causal(SHAPE, read=read) for read in MLP_READS),
    *(Wiring.autoencoder(SHAPE, layers=layers, site="resid_post") for layers in ([1], [0, 2])),
    Wiring.transcoder(SHAPE, layer=1, read="mlp_in"),
    Wiring.weakly_causal(SHAPE),
    Wiring.acausal(SHAPE),
]
ACTIVATIONS: list[Activation] = [ReLU(), JumpReLU(), TopK(2), TopK(2, relu=False), JointTopK(2 * L, scored=True)]


def crosscoders() -> Iterator[Crosscoder]:
    for wiring, activation, skip, first in itertools.product(WIRINGS, ACTIVATIONS, (False, True), (0, 1)):
        yield Crosscoder(wiring, n_features=F, activation=activation, skip=skip, undecomposed_positions=first)


def detected(path: Path) -> list[str]:
    return [layout.name for layout in LAYOUTS if layout.detect(path)]


@pytest.mark.parametrize("name", writable())
def test_what_is_written_is_found_again(tmp_path: Path, name: str) -> None:
    write, refusals, found = writable()[name].write, [], []
    assert write is not None
    for number, crosscoder in enumerate(crosscoders()):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            write(crosscoder, folder, torch.float32)
        except ValueError as error:
            refusals.append(str(error))
            assert not any(folder.iterdir())  # before anything is written
            continue
        assert detected(folder) == [name]
        published = open_published(folder)
        assert published.layout == name
        assert (published.wiring.reads, published.wiring.writes) == (crosscoder.wiring.reads, crosscoder.wiring.writes)
        assert published.undecomposed_positions == crosscoder.undecomposed_positions
        assert published.skip == crosscoder.skip
        found.append(crosscoder)
    assert found
    assert all(f"the layout {name} has no place for " in refusal for refusal in refusals)


NAMES = [
    *("config.json", "config.yaml", "cfg.json", "crosscoder.safetensors", "sae_weights.safetensors", "sae.safetensors"),
    *(
        "params.npz",
        "params.safetensors",
        "params_layer_0.safetensors",
        "layer_0.safetensors",
        "W_dec_norm.safetensors",
    ),
    *("W_enc_0.safetensors", "W_dec_0.safetensors", "layers.0.mlp", "layer0", "layer_0", "width_1", "average_l0_1"),
]
EMPTY_TENSORS = (2).to_bytes(8, "little") + b"{}"
CONTENTS = [
    *(b"", b"null", b"[]", b"{", b"\xff\xfe\x00", b"[" * 20_000, b"PK\x03\x04", EMPTY_TENSORS, b"a: [b"),
    b'{"format": "crosstrace crosscoder", "version": 2}',
    b"model_kind: transcoder_set\nfeature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out",
    b'{"model_kind": "cross_layer_transcoder"}',
    b'{"n_targets": 3, "transcode": true, "d_in": 2, "k": 1}',
    b'{"n_targets": true, "hookpoints": 1, "hookpoints_in": 5}',
    b'{"sae_type": "clt", "d_model": 2, "expansion_factor": 1e400, "hook_points_in": [], "hook_points_out": []}',
    b'{"d_feature": 3, "k": -1}',
    b'{"architecture": "standard", "metadata": {"hook_name": []}}',
    json.dumps({"architecture": "jump_relu", "hf_hook_point_in": "model.layers.{}.output"}).encode(),
]
TREES = st.recursive(
    st.sampled_from(CONTENTS) | st.sampled_from(["nowhere", ".", "config.json"]),
    lambda inside: st.dictionaries(st.sampled_from(NAMES), inside, max_size=4),
    max_leaves=8,
)


def plant(path: Path, tree: bytes | str | dict) -> None:
    """Make a file of bytes, a symbolic link of a text, and a folder of a dictionary."""
    if isinstance(tree, bytes):
        path.write_bytes(tree)
    elif isinstance(tree, str):
        path.symlink_to(tree)
    else:
        path.mkdir()
        for name, inside in tree.items():
            plant(path / name, inside)


@settings(max_examples=300)
@given(name=st.sampled_from(NAMES), tree=TREES)
def test_junk_is_no_crash(name: str, tree: bytes | str | dict) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / name
        plant(path, tree)
        for inside in (path, *path.rglob("*")):
            assert set(map(type, (layout.detect(inside) for layout in LAYOUTS))) == {bool}
            with contextlib.suppress(ValueError):
                open_published(inside)
