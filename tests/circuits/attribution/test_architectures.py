"""Every row of the architecture table: what it says works is exact, and what it says is refused is refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from architectures import SETTINGS
from autograd_oracle import compare_with_oracle

from circuits import NodeKind, attribute_score, trace
from replacement import LanguageModel, QueryKeys, ReplacementModel, Site, Wiring
from replacement.cli import main
from replacement.crosscoder.rotation import Rotary
from replacement.language_model.architectures import ARCHITECTURES, Architecture, markdown_table

ROOT = Path(__file__).parents[3]
TRACED = [row for row in ARCHITECTURES if not row.refused]
REFUSED = [row for row in ARCHITECTURES if row.refused]


LOADED: dict[tuple[Path, torch.dtype], LanguageModel] = {}
EMBEDDING = "cannot be linearised exactly: the embedding, rebuilt from frozen parts, is off by"
NO_FINAL_NORM = "cannot be linearised exactly: it has no norm in front of the unembedding"
NO_ATTENTION = "cannot be linearised exactly: layer 0 has no 'attn' to freeze"
MESSAGES = {
    "BERT (as a decoder)": f"BertLMHeadModel {EMBEDDING}",
    "DeepSeek V3": "DeepseekV3ForCausalLM cannot be linearised exactly: layer 0 has no 'attn.v' to freeze",
    "Falcon (11B: new decoder, one norm)": "cannot load the language model .*'FalconDecoderLayer' .* no attribute 'ln_attn'",
    "GPT": f"OpenAIGPTLMHeadModel {NO_FINAL_NORM}",
    "Mamba": f"MambaForCausalLM {NO_ATTENTION}",
    "nanochat": f"NanoChatForCausalLM {EMBEDDING}",
    "OPT (350M)": f"OPTForCausalLM {NO_FINAL_NORM}",
    "RecurrentGemma": f"RecurrentGemmaForCausalLM {NO_ATTENTION}",
    "T5": "T5ForConditionalGeneration cannot be linearised exactly: it has no plain stack of blocks",
    "XGLM": f"XGLMForCausalLM {EMBEDDING}",
}


@pytest.fixture(params=TRACED, ids=[row.name for row in TRACED], scope="module")
def traced(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Architecture, Path]]:
    """A row that works, and the folder of a tiny model."""
    folder = tmp_path_factory.mktemp("architecture")
    yield request.param, tiny.write_model(request.param.model_class, SETTINGS[request.param.name], folder)
    LOADED.clear()


def load(folder: Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model of a folder, loaded once."""
    if (folder, dtype) not in LOADED:
        LOADED[folder, dtype] = LanguageModel.from_pretrained(folder, dtype=dtype)
    return LOADED[folder, dtype]


def test_every_row_has_a_model() -> None:
    assert list(SETTINGS) == [row.name for row in ARCHITECTURES]


def test_logits_are_those_of_transformers(traced: tuple[Architecture, Path]) -> None:
    row, folder = traced
    lm, tokens_T = load(folder), tiny.random_tokens()
    original = getattr(transformers, row.model_class).from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        expected_TV = original(tokens_T[None]).logits[0]
    torch.testing.assert_close(lm(tokens_T), expected_TV, rtol=0, atol=1e-5 * float(expected_TV.abs().max()))
    in_float64 = load(folder, torch.float64)(tokens_T)
    torch.testing.assert_close(in_float64.float(), expected_TV, rtol=0, atol=1e-4 * float(expected_TV.abs().max()))


def test_a_graph_is_exact(traced: tuple[Architecture, Path]) -> None:
    lm = load(traced[1])
    graph = trace(ReplacementModel(lm, tiny.crosscoder_for(lm)), tiny.random_tokens(), coverage=1.0)
    assert 0 < graph.identity_error <= 1e-5
    lm = load(traced[1], torch.float64)
    compare_with_oracle(
        ReplacementModel(lm, tiny.crosscoder_for(lm, n_features=16)), tiny.random_tokens(6), tolerance=1e-11
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_a_graph_with_a_joint_crosscoder_is_exact(traced: tuple[Architecture, Path], dtype: torch.dtype) -> None:
    lm = load(traced[1], dtype)
    model = ReplacementModel(lm, tiny.crosscoder_for(lm, wiring=Wiring.joint(lm), n_features=16))
    graph = trace(model, tiny.random_tokens(6), coverage=1.0)
    nodes = graph.nodes
    assert nodes.expanded[nodes.mask(NodeKind.FEATURE) & nodes.of_attention].any()
    assert 0 < graph.identity_error <= {torch.float32: 1e-4, torch.float64: 1e-10}[dtype]


def test_a_graph_with_low_rank_sparse_attention_is_exact(traced: tuple[Architecture, Path]) -> None:
    tokens_T, settings = tiny.random_tokens(6), QueryKeys(n_groups=2, width=6, rotary=Rotary.of_base(4))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        lm = load(traced[1], dtype)
        lorsa = tiny.lorsa_for(lm, query_keys=settings, n_features=16)
        model = ReplacementModel(lm, tiny.crosscoder_for(lm, n_features=16), attention_crosscoder=lorsa)
        graph = trace(model, tokens_T, coverage=1.0)
        assert 0 < graph.identity_error <= tolerance
        of_lorsa = graph.nodes.of_attention & graph.nodes.mask(NodeKind.FEATURE)
        assert graph.nodes.expanded[of_lorsa].any()
        score = attribute_score(model, tokens_T, layer=1, head=1, heads="replaced")
        assert score.identity_error <= tolerance
    compare_with_oracle(model, tokens_T, tolerance=1e-11)


def test_a_graph_of_an_adapter_is_exact(traced: tuple[Architecture, Path]) -> None:
    """And errors kept give the fine-tuned model, dropped ones do not."""
    row, folder = traced
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        lm, tokens_T = load(folder, dtype), tiny.random_tokens()
        if row.name == "OPT":
            with pytest.raises(ValueError, match="OPTForCausalLM has no MLP that can be computed apart from its layer"):
                lm.with_base(lm)
            return
        base = tiny.base_of(lm, folder=folder)
        model = ReplacementModel(lm, tiny.adapter_for(lm, base), base=base)
        size, original_TV = float(lm(tokens_T).abs().max()), lm(tokens_T)
        torch.testing.assert_close(model(tokens_T, errors="keep"), original_TV, rtol=0, atol=tolerance * size)
        assert float((model(tokens_T) - original_TV).abs().max()) > 1e-3 * size
        assert 0 < trace(model, tokens_T, coverage=1.0).identity_error <= tolerance


def test_a_massive_first_token_hides_no_error(traced: tuple[Architecture, Path]) -> None:
    row, folder = traced
    lm = LanguageModel.from_pretrained(folder)  # changed below, so not the one that is shared
    prompt = tiny.with_massive_first_token(lm)
    frozen = lm.freeze(prompt, sites=[Site(1, "resid_post")])
    size_T = frozen.activations[Site(1, "resid_post")].abs().amax(-1)
    if row.name != "BLOOM":  # it normalises embeddings, so that no token of it is massive
        assert size_T[0] > 100 * size_T[1:].max()
    if not row.scores.startswith("no"):
        lm.freeze_query_key(prompt, layer=1)


def test_frozen_patterns_and_norms_are_held(traced: tuple[Architecture, Path]) -> None:
    """With both of another prompt the logits are neither prompt's; with its own they are the model's."""
    lm, (first, second) = load(traced[1]), (tiny.random_tokens(seed=seed) for seed in (0, 1))
    held = {"patterns": lm.read_patterns(first), "norm_scales": lm.read_norm_scales(first)}
    size = float(lm(first).abs().max())
    torch.testing.assert_close(lm.run(first, {}, **held), lm(first), rtol=0, atol=1e-4 * size)
    for name, value in held.items():
        assert float((lm.run(second, {}, **{name: value}) - lm(second)).abs().max()) > 1e-3 * size


def test_the_map_of_an_mlp(traced: tuple[Architecture, Path]) -> None:
    row, folder = traced
    lm = load(folder, torch.float64)
    reads = [Site(1, "mlp_in"), Site(1, "mlp_normalized"), Site(1, "resid_pre" if lm.shape.parallel else "resid_mid")]
    activations = lm.read(tiny.random_tokens(), [*reads, Site(1, "mlp_out")])
    for read in reads:
        if row.name == "OPT":
            with pytest.raises(ValueError, match="OPTForCausalLM has no MLP that can be computed apart from its layer"):
                lm.parts.mlp_map(1, read.kind)
        else:
            written = lm.parts.mlp_map(1, read.kind)(activations[read])
            torch.testing.assert_close(written, activations[Site(1, "mlp_out")], rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_attention_scores(traced: tuple[Architecture, Path], dtype: torch.dtype) -> None:
    (row, folder), tokens_T = traced, tiny.random_tokens()
    lm = load(folder, dtype)
    if row.scores == "yes" or (row.scores == "float32 only" and dtype == torch.float32):
        for layer in range(lm.shape.n_layers):
            lm.freeze_query_key(tokens_T, layer=layer)
        score = attribute_score(ReplacementModel(lm, tiny.crosscoder_for(lm)), tokens_T, layer=1, head=2)
        assert score.identity_error <= {torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    else:
        with pytest.raises(ValueError, match=f"attention scores of {row.model_class} cannot be attributed exactly"):
            lm.freeze_query_key(tokens_T, layer=0)


@pytest.mark.parametrize("row", REFUSED, ids=[row.name for row in REFUSED])
def test_refused(row: Architecture, tmp_path: Path) -> None:
    tiny.write_model(row.model_class, SETTINGS[row.name], tmp_path)
    with pytest.raises(ValueError, match=MESSAGES[row.name]):
        LanguageModel.from_pretrained(tmp_path)


def test_the_readme_holds_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["architectures"]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed == markdown_table()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (held,) = re.findall(r"<!-- replacement architectures -->\n(.*?)\n<!-- end -->", readme, re.S)
    assert held.strip() == printed
    assert f"{len({row.model_class for row in TRACED})} architectures are linearised exactly" in readme
