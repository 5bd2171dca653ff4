"""What weights say of tokens, against products written out by hand: token by token, head by head, site by site, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from replacement import Crosscoder, Site, Wiring
from replacement.index import token_effects as module
from replacement.index.records import TokenEffects
from replacement.index.token_effects import HEADS_TRIED, FeatureWeights, token_effects

N_TOKENS = 5
WIRINGS: dict[str, Callable[[Any], Wiring]] = {
    "stream": Wiring.strictly_causal,
    "mlp_in": lambda lm: Wiring.strictly_causal(lm, read="mlp_in"),
    "mlp_normalized": lambda lm: Wiring.per_layer(lm, read="mlp_normalized"),
    "attention": Wiring.attention,
    "lorsa": Wiring.lorsa,
    "lorsa before the gain": lambda lm: Wiring.lorsa(lm, read="attn_normalized"),
    "weakly causal": Wiring.weakly_causal,
    "acausal": Wiring.acausal,
}


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


class Oracle:
    """Everything about one feature from the modules of the model itself."""

    def __init__(self, lm: Any, crosscoder: Crosscoder, group: int, index: int) -> None:
        self.lm, self.crosscoder, self.group, self.index = lm, crosscoder, group, index
        self.bridge = lm.parts.bridge
        E = self.bridge.W_E.detach()
        self.e = torch.stack([row / row.square().mean().sqrt() for row in E - E.mean(0)])
        special = lm.tokenizer.all_special_ids if lm.tokenizer else []
        self.ordinary = [token for token in range(len(E)) if token not in special]

    def norm(self, path: str | None, x: Tensor) -> Tensor:
        """A norm without its scale and offset."""
        if path is None:
            return x
        weights = self.lm.parts.norm_weights(path)
        return (centred(x) if weights.centred else x) * weights.weight_D

    def site(self, site: Site, x: Tensor) -> Tensor:
        """What a site shows of the stream, the scale of a norm left out."""
        path = self.lm.parts.norm_before(site.layer, "attention" if site.kind.startswith("attn") else "mlp")
        if site.kind in ("mlp_in", "attn_in"):
            return self.norm(path, x)
        if site.kind in ("mlp_normalized", "attn_normalized") and path is not None:
            return centred(x) if self.lm.parts.norm_weights(path).centred else x
        return x

    def below(self, site: Site) -> int:
        """Attention layers whose outputs the site shows."""
        if site.kind == "resid_post":
            return site.layer + 1
        in_front = site.kind in ("resid_pre", "attn_in", "attn_normalized")
        return site.layer + (not in_front and not self.lm.shape.parallel)

    def head(self, layer: int, head: int, x: Tensor) -> Tensor:
        """Value vectors of one head for streams x, the scale of the norm left out."""
        attention = self.bridge.blocks[layer].attn
        repeats = len(attention.W_O) // len(attention.W_V)
        return self.norm(self.lm.parts.norm_before(layer, "attention"), x) @ attention.W_V[head // repeats]

    def output(self, layer: int, head: int, z: Tensor) -> Tensor:
        """What the head writes to the stream, a norm behind it at its typical scale."""
        names, attention = self.lm.parts.norm_names(layer), self.bridge.blocks[layer].attn
        written = z @ attention.W_O[head]
        scale = getattr(self.bridge.blocks[layer], "residual_contribution_scale", 1.0)
        if "ln1_post" not in names:
            return written * scale
        path, total = f"blocks.{layer}.ln1_post", 0.0
        after_centring = centred if self.lm.parts.norm_weights(path).centred else lambda x: x
        for other in range(len(attention.W_O)):
            readers_DK = self.head(layer, other, torch.eye(self.lm.shape.d_model).double())
            total += float(readers_DK.square().sum(0) @ after_centring(attention.W_O[other]).square().sum(1))
        return self.norm(path, written) / (total / self.lm.shape.d_model) ** 0.5 * scale

    def encoder(self, site: Site) -> Tensor:
        return self.crosscoder.encoder(self.group, site)[self.index].detach()

    def read(self) -> list[float]:
        sites = self.crosscoder.wiring.reads[self.group]
        return sum(self.site(site, self.e) @ self.encoder(site) for site in sites).tolist()

    def through(self, layer: int, head: int) -> list[float] | None:
        """Score of every token through one head; None if the feature does not see it."""
        reads = self.crosscoder.wiring.reads[self.group]
        z_VK = self.head(layer, head, self.e)
        streams = [site for site in reads if site.kind != "attn_z" and layer < self.below(site)]
        terms = [self.site(site, self.output(layer, head, z_VK)) @ self.encoder(site) for site in streams]
        by_z = [site for site in reads if site.kind == "attn_z" and site.layer == layer]
        terms += [z_VK @ self.encoder(site).unflatten(0, (self.lm.shape.n_heads, -1))[head] for site in by_z]
        return sum(terms).tolist() if terms else None

    def promoted(self) -> list[float]:
        sites = self.crosscoder.wiring.writes[self.group]
        if sites[0].kind.startswith("resid"):
            sites = sites[-1:]
        written = sum(self.crosscoder.decoder(self.group, site)[self.index].detach() for site in sites)
        logits = self.norm("ln_final", written) @ self.bridge.W_U * self.lm.parts.unembedding().scale
        return (logits - logits.mean()).tolist()

    def strongest(self, scores: list[float], *, sign: int = 1) -> tuple[tuple[str, float], ...]:
        order = sorted(self.ordinary, key=lambda token: -sign * scores[token])[:N_TOKENS]
        return tuple((self.lm.token_strings([token])[0], scores[token]) for token in order)

    def effects(self) -> TokenEffects:
        reads = self.crosscoder.wiring.reads[self.group]
        heads = {}
        for layer in range(self.lm.shape.n_layers):
            for head in range(self.lm.shape.n_heads):
                if (scores := self.through(layer, head)) is not None:
                    heads[layer, head] = scores
        tried = sorted(heads, key=lambda head: -sum(score**2 for score in heads[head]))[:HEADS_TRIED]
        means = {head: sum(sorted(heads[head][t] for t in self.ordinary)[-N_TOKENS:]) for head in tried}
        best = max(means, key=lambda head: means[head]) if means else None
        return TokenEffects(
            promoted=self.strongest(self.promoted()),
            suppressed=self.strongest(self.promoted(), sign=-1),
            read=() if reads[0].kind == "attn_z" else self.strongest(self.read()),
            read_through_heads=() if best is None else self.strongest(heads[best]),
            head=best,
        )


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_effects_are_those_of_products_by_hand(language_model: Any, architecture: str, wiring: str) -> None:
    lm = language_model(architecture, torch.float64)
    crosscoder = tiny.crosscoder_for(lm, wiring=WIRINGS[wiring](lm), n_features=6)
    weights, group = FeatureWeights(lm, crosscoder, n_tokens=N_TOKENS), crosscoder.n_groups - 1
    index_N = torch.tensor([4, 1])
    for index, effects in zip(index_N.tolist(), weights.effects(group, index_N), strict=True):
        expected = Oracle(lm, crosscoder, group, index).effects()
        assert effects.head == expected.head
        for name in ("promoted", "suppressed", "read", "read_through_heads"):
            ours, theirs = getattr(effects, name), getattr(expected, name)
            assert [token for token, _ in ours] == [token for token, _ in theirs], name
            assert [score for _, score in ours] == pytest.approx([score for _, score in theirs], rel=1e-8, abs=1e-10)


def test_every_feature_comes_once_whatever_the_chunk(language_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model("llama")
    crosscoder = tiny.crosscoder_for(lm, n_features=7)
    whole = list(token_effects(lm, crosscoder, n_tokens=3))
    assert [(layer, index) for layer, index, _ in whole] == [(layer, index) for layer in range(3) for index in range(7)]
    assert {len(effects.read) for _, _, effects in whole} == {3}
    monkeypatch.setattr(module, "CHUNK", 2)
    in_pieces = list(token_effects(lm, crosscoder, n_tokens=3))
    for (_, _, ours), (_, _, theirs) in zip(in_pieces, whole, strict=True):
        assert ours.head == theirs.head
        assert [token for token, _ in ours.promoted] == [token for token, _ in theirs.promoted]


def test_a_tied_pair_is_found_through_its_head(language_model: Any) -> None:
    """A feature built to read one token through one head, and to promote another, says so."""
    lm = language_model("llama", torch.float64)
    crosscoder, parts = tiny.crosscoder_for(lm, n_features=8), lm.parts
    attention, E = parts.attention_weights(1), parts.bridge.W_E.detach()
    e_D = E[40] - E.mean(0)
    W_V_KD, W_O_KD = (matrix.unflatten(0, (4, -1))[2] for matrix in (attention.W_V_XD, attention.W_O_XD))
    written_D = torch.linalg.solve(W_O_KD @ W_O_KD.T, W_V_KD @ e_D) @ W_O_KD  # reads what head 2 writes for token 40
    promoted_D = torch.linalg.lstsq(parts.bridge.W_U.T, torch.eye(len(E)).double()[50]).solution
    with torch.no_grad():
        crosscoder.W_enc[2][3] = written_D
        crosscoder.W_dec[2][3] = promoted_D / parts.norm_weights("ln_final").weight_D
    (effects,) = FeatureWeights(lm, crosscoder).effects(2, torch.tensor([3]))
    assert effects.head == (1, 2)
    assert effects.read_through_heads[0][0] == "w40"
    assert effects.promoted[0][0] == "w50"


def test_tokens_without_text_are_left_out(language_model: Any) -> None:
    lm = language_model("llama")
    crosscoder = tiny.crosscoder_for(lm, n_features=8)
    (effects,) = FeatureWeights(lm, crosscoder, n_tokens=1000).effects(0, torch.tensor([0]))
    tokens = [token for token, _ in effects.promoted]
    assert sorted(tokens) == sorted(f"w{i}" for i in range(3, tiny.VOCABULARY))
    assert [token for token, _ in effects.suppressed] == tokens[::-1]


def test_numbers_of_tokens_are_checked(language_model: Any) -> None:
    lm = language_model("llama")
    with pytest.raises(ValueError, match="n_tokens"):
        FeatureWeights(lm, tiny.crosscoder_for(lm), n_tokens=0)
