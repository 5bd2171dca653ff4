"""Weights of fewer bits than the arithmetic, and weights that stay in their file: the same function as raised copies."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import circuits
from replacement import BatchTopK, Crosscoder, JumpReLU, ReLU, ReplacementModel, TopK, Wiring, checkpoint
from replacement.crosscoder import encoder
from replacement.crosscoder.formats import native, published
from replacement.crosscoder.weights_by_site import MATRICES

ACTIVATIONS = [TopK(4), BatchTopK(4), ReLU(), JumpReLU()]
ALIKE = {"rtol": 0, "atol": 1e-5}


def saved(lm: Any, folder: Path, **options: Any) -> Crosscoder:
    """A random crosscoder, written in bfloat16."""
    crosscoder = tiny.crosscoder_for(lm, **options).eval()
    checkpoint.save(crosscoder, folder, dtype=torch.bfloat16)
    return crosscoder


def inputs_of(crosscoder: Crosscoder, n_rows: int = 9) -> dict[Any, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sites = crosscoder.wiring.read_sites
    return {site: torch.randn(n_rows, crosscoder.wiring.width(site), generator=generator) for site in sites}


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.name)
@pytest.mark.parametrize("options", [{}, {"skip": True}, {"tied": True}], ids=str)
def test_weights_in_their_file_compute_what_loaded_ones_do(
    language_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activation: Any, options: dict[str, Any]
) -> None:
    saved(language_model("gpt2"), tmp_path / "c", activation=activation, **options)
    eager, lazy = (checkpoint.load(tmp_path / "c", lazy=lazy) for lazy in (False, True))
    assert {value.dtype for name, value in lazy.state_dict().items() if name.startswith(MATRICES)} == {torch.bfloat16}
    assert lazy.dtype == eager.dtype == torch.float32
    inputs = inputs_of(eager)
    monkeypatch.setattr(encoder, "_FEATURES_AT_ONCE", 7)  # several pieces
    monkeypatch.setattr(encoder, "_ROWS_AT_ONCE", 2)
    with torch.no_grad():
        (outputs, features), (expected, known) = lazy(inputs), eager(inputs)
    assert torch.equal(features.index, known.index)
    assert torch.equal(features.row, known.row)
    torch.testing.assert_close(features.activation, known.activation, **ALIKE)
    for site, y_BD in expected.items():
        torch.testing.assert_close(outputs[site], y_BD, **ALIKE)
    for group, writes in enumerate(eager.wiring.writes):
        index_S = torch.tensor([3, 0, 5])
        for site in writes:
            assert torch.equal(lazy.decoder_vectors(group, index_S, site), eager.decoder_vectors(group, index_S, site))
        for site in eager.wiring.reads[group]:
            assert torch.equal(lazy.encoder_vectors(group, index_S, site), eager.encoder_vectors(group, index_S, site))


def test_inference_in_pieces_chooses_what_the_whole_does(language_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """BatchTopK too: in use its threshold is fixed, so that rows can be encoded in chunks."""
    for activation in ACTIVATIONS:
        crosscoder = tiny.crosscoder_for(language_model("llama"), activation=activation).eval()
        if crosscoder.threshold is not None:
            crosscoder.threshold.data.fill_(0.4)
        inputs = inputs_of(crosscoder, 33)
        whole = crosscoder.encode(inputs)
        with monkeypatch.context() as patched:
            patched.setattr(encoder, "_ROWS_AT_ONCE", 4)
            pieces = crosscoder.encode(inputs)
        assert torch.equal(pieces.index, whole.index)
        torch.testing.assert_close(pieces.activation, whole.activation)


@pytest.mark.parametrize("attention", [False, True], ids=["linear", "features"])
def test_a_trace_reads_the_file_and_gives_the_same_graph(
    language_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attention: bool
) -> None:
    lm, tokens, folders = language_model("llama"), tiny.random_tokens(), [tmp_path / "mlp", tmp_path / "attention"]
    saved(lm, folders[0])
    saved(lm, folders[1], wiring=Wiring.attention(lm))

    def graph_of(*, lazy: bool) -> Any:
        loaded = [checkpoint.load(folder, lazy=lazy) for folder in folders]
        model = ReplacementModel(lm, loaded[0], attention_crosscoder=loaded[1] if attention else None)
        assert all((view.in_file is not None) == lazy for view in model.crosscoders.values())
        return circuits.trace(model, tokens)

    expected = graph_of(lazy=False)

    def forbidden(*_: Any) -> Any:
        raise AssertionError("a digest reads the whole file")

    monkeypatch.setattr(native, "sha256_of", forbidden)
    monkeypatch.setattr("replacement.crosscoder.weights.fingerprint", forbidden)
    graph = graph_of(lazy=True)
    assert graph.metadata["crosscoder_fingerprint"] == expected.metadata["crosscoder_fingerprint"]
    assert graph.nodes.ids() == expected.nodes.ids()
    assert graph.identity_error < 1e-5
    assert abs(graph.scores().replacement - expected.scores().replacement) < 1e-5


def test_inference_copies_share_narrow_matrices(language_model: Any) -> None:
    narrow = tiny.crosscoder_for(language_model("gpt2")).to(torch.bfloat16).eval()
    view = narrow.to_inference(dtype=torch.float32)
    stored = narrow.state_dict()
    for name, value in view.state_dict().items():
        assert (value.data_ptr() == stored[name].data_ptr()) == name.startswith(MATRICES)
    raised = Crosscoder.like(narrow)
    raised.load_state_dict({name: value.float() for name, value in stored.items()}, assign=True)
    inputs = inputs_of(raised)
    for site, y_BD in raised(inputs).reconstructions.items():
        torch.testing.assert_close(view(inputs).reconstructions[site], y_BD, **ALIKE)
    assert view.fingerprint == raised.fingerprint


def test_the_fingerprint_is_that_of_the_file(language_model: Any, tmp_path: Path) -> None:
    crosscoder = saved(language_model("gpt2"), tmp_path / "c")
    eager, lazy = (checkpoint.load(tmp_path / "c", lazy=lazy) for lazy in (False, True))
    assert lazy.fingerprint == eager.fingerprint == crosscoder.fingerprint
    lazy.fingerprint = "2:of another file"
    assert lazy.to_inference(dtype=torch.float64).fingerprint == "2:of another file"


def test_lazy_by_size_and_refused_when_too_large(
    language_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(language_model("gpt2"), tmp_path / "c")
    assert checkpoint.load(tmp_path / "c").in_file is None
    monkeypatch.setattr(published, "available_memory", lambda: 1000)
    assert checkpoint.load(tmp_path / "c").in_file is not None
    with pytest.raises(
        ValueError, match=r"crosscoder.safetensors: the weights take .* MB in float32, and .* of memory are"
    ):
        checkpoint.load(tmp_path / "c", lazy=False)
    with pytest.raises(ValueError, match="in their file on the device meta: only on cpu"):
        checkpoint.load(tmp_path / "c", lazy=True, device="meta")


def test_damaged_files_are_refused_before_they_are_used(language_model: Any, tmp_path: Path) -> None:
    saved(language_model("gpt2"), tmp_path / "c")
    path = tmp_path / "c" / native.TENSOR_FILE
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = whole[8 : 8 + length]
    damaged = {
        "cut off": whole[:-4],
        "longer": whole + b"....",
        "no header": whole[:4],
        "no JSON": whole[:8] + b"x" + whole[9:],
        "long header": struct.pack("<Q", 2**60) + whole[8:],
        "other numbers": whole[:8] + header.replace(b"BF16", b"I16 ") + whole[8 + length :],
        "a list": struct.pack("<Q", 2) + b"[]",
        "another shape": whole[:8] + header.replace(b'"shape":[', b'"shape":[2', 1)[:length] + whole[8 + length :],
    }
    for content in damaged.values():
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"crosscoder.safetensors(: the dtype of the| is damaged or not a safetensors)"
        ):
            checkpoint.load(tmp_path / "c", lazy=True)
    path.unlink()
    with pytest.raises(ValueError, match=r"crosscoder.safetensors does not exist"):
        checkpoint.load(tmp_path / "c", lazy=True)


def test_changes_in_place_never_reach_the_file(language_model: Any, tmp_path: Path) -> None:
    saved(language_model("gpt2"), tmp_path / "c")
    before = (tmp_path / "c" / native.TENSOR_FILE).read_bytes()
    lazy = checkpoint.load(tmp_path / "c", lazy=True)
    lazy.W_enc[0].data.fill_(1.0)
    assert lazy.in_file is not None
    lazy.in_file.release()
    assert float(lazy.W_enc[0].sum()) == lazy.W_enc[0].numel()
    assert (tmp_path / "c" / native.TENSOR_FILE).read_bytes() == before
