"""Attribution by automatic differentiation: an independent implementation that the explicit transport is compared with.

It shares no code with `circuits.attribution.direct_effects` or `replacement.language_model.frozen_layers`: TransformerLens runs
the model itself, hooks fix the attention patterns and norm scales, MLP outputs and embeddings become leaves (and attention
outputs, where a crosscoder writes those too), and rows of A are gradients at the leaves times source vectors. Written to be
fast as well: the forward pass runs once over B copies of the prompt, targets of one layer share backward passes of B targets
each, and a backward pass stops at the embeddings and never enters an MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.expansion import Attributor
from circuits.attribution.targets import LogitTarget, resolve_logit, top_logits
from replacement import Decomposition, LocalReplacement, Lorsa, ReplacementModel, Site


class AutogradOracle:
    """Rows of A for one prompt by backward passes over `batch_size` copies of it."""

    def __init__(self, model: ReplacementModel, local: LocalReplacement, *, batch_size: int = 64) -> None:
        self.model, self.local, self.batch_size = model, local, batch_size
        self.bridge = model.language_model.parts.bridge
        self.leaves: dict[str, Tensor] = {}
        self.streams: dict[str, Tensor] = {}
        self._forward()

    def feature_rows(self, chosen_S: Tensor) -> tuple[Tensor, Tensor]:
        """`A [N, C]` in the columns of `circuits.attribution.columns`, and `bias [N]`, for features of all parts."""
        rows_NC = self.local.mlp.errors_LTD.new_zeros(len(chosen_S), self._n_columns())
        bias_N = rows_NC.new_zeros(len(chosen_S))
        first = 0
        for part in self.local.decompositions:
            mine = torch.nonzero((chosen_S >= first) & (chosen_S < first + len(part.features)))[:, 0]
            rows_NC[mine], bias_N[mine] = self._part_rows(part, chosen_S[mine] - first)
            first += len(part.features)
        return rows_NC, bias_N

    def _part_rows(self, part: Decomposition, chosen_S: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of features of one part, for numbers into its features."""
        features, crosscoder = part.features, part.crosscoder
        rows_NC = part.errors_LTD.new_zeros(len(chosen_S), self._n_columns())
        bias_N = rows_NC.new_zeros(len(chosen_S))
        for group in range(crosscoder.n_groups):
            own = torch.nonzero(features.group[chosen_S] == group)[:, 0]
            for some in own.split(self.batch_size) if len(own) else ():
                index, position = features.index[chosen_S[some]], features.row[chosen_S[some]]
                for site in crosscoder.wiring.reads[group]:
                    name = self.model.language_model.parts.hook_name(site)
                    weights_NT = None
                    if isinstance(crosscoder, Lorsa):
                        pattern_QTT = crosscoder.patterns({site: self.streams[name][0].detach()}, group)[0]
                        weights_NT = pattern_QTT[index // crosscoder.heads_per_group, position]
                    rows, bias = self._rows(name, crosscoder.encoder(group, site)[index], position, weights_NT)
                    rows_NC[some] += rows
                    bias_N[some] += bias
                bias_N[some] += crosscoder.b_enc[group][index]
        return rows_NC, bias_N

    def logit_rows(self, directions_ND: Tensor, position_N: Tensor) -> tuple[Tensor, Tensor]:
        """The same for vectors read after the final norm."""
        parts = [
            self._rows("ln_final.hook_out", directions_ND[part], position_N[part])
            for part in torch.arange(len(directions_ND)).split(self.batch_size)
        ]
        return torch.cat([rows for rows, _ in parts]), torch.cat([bias for _, bias in parts])

    def _forward(self) -> None:
        lm = self.model.language_model
        hooks: list[tuple[str, Any]] = []
        for path in lm.parts.norm_paths:
            hooks += self._frozen_norm(path)
        # Norms of queries and keys, which some models compute in float32, are as exact in these as in the local model.
        names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(lm.shape.n_layers)]
        _, patterns = lm.parts.capture(self.local.frozen.tokens_T, set(names))
        for layer, name in enumerate(names):
            hooks += self._frozen_pattern(layer, patterns[name])
            hooks.append((f"blocks.{layer}.hook_mlp_out", self._mlp_leaf(layer)))
            if self.local.attention is not None:
                hooks.append((f"blocks.{layer}.hook_attn_out", self._leaf(f"attn_out.{layer}")))
        hooks.append(("hook_embed", self._leaf("token")))
        if self.local.frozen.position_embedding_TD is not None:
            hooks.append(("hook_pos_embed", self._leaf("position")))
        read_sites = {site for part in self.local.decompositions for site in part.crosscoder.wiring.read_sites}
        kept = {lm.parts.hook_name(site) for site in read_sites} | {"ln_final.hook_out"}
        hooks += [(name, self._keep(name)) for name in kept]
        tokens_BT = self.local.frozen.tokens_T.expand(self.batch_size, -1)
        with torch.enable_grad():
            self.bridge.run_with_hooks(tokens_BT, fwd_hooks=hooks)

    def _leaf(self, name: str) -> Any:
        def hook(x: Tensor, hook: Any) -> Tensor:
            # Position embeddings may come without a batch axis; every copy of the prompt needs its own leaf.
            shape = (self.batch_size, *x.shape[-2:])
            self.leaves[name] = x.detach().expand(shape).clone().requires_grad_()
            return self.leaves[name]

        return hook

    def _mlp_leaf(self, layer: int) -> Any:
        """The leaf holds features, error and decoder bias; what skip matrices write stays connected to what they read."""
        site, crosscoder = Site(layer, "mlp_out"), self.local.crosscoder
        make_leaf = self._leaf(f"mlp_out.{layer}")

        def hook(x: Tensor, hook: Any) -> Tensor:
            skipped = torch.zeros_like(x)
            for group in crosscoder.wiring.writers(site) if crosscoder.skip else ():
                for read in crosscoder.wiring.reads[group]:
                    stream = self.streams[self.model.language_model.parts.hook_name(read)]
                    skipped = skipped + stream @ crosscoder.skip_matrix(group, read, site).T
            return make_leaf(x - skipped.detach(), hook) + skipped

        return hook

    def _keep(self, name: str) -> Any:
        def hook(x: Tensor, hook: Any) -> None:
            self.streams[name] = x.flatten(2)  # the heads of `attn_z` are one axis to an encoder

        return hook

    def _frozen_norm(self, path: str) -> list[tuple[str, Any]]:
        """Redo a norm with its scale detached; the hooked input and output keep the autograd graph connected."""
        norm = self.model.language_model.parts._component(path)
        seen: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: Any) -> None:
            seen["x"] = x

        def redo(y: Tensor, hook: Any) -> Tensor:
            x, original = seen.pop("x"), norm.original_component
            if not norm.uses_rms_norm:
                x = x - x.mean(-1, keepdim=True)
            epsilon = getattr(original, "variance_epsilon", getattr(original, "eps", 1e-5))  # OLMo 1 names none
            scale = (x.detach().pow(2).mean(-1, keepdim=True) + epsilon).sqrt()
            self.streams[f"{path}.hook_normalized"] = (
                x / scale
            )  # shown by TransformerLens with a scale that is not frozen
            gain = getattr(original, "weight", 1) + (1 if norm.uses_weight_offset else 0)
            bias = getattr(original, "bias", None)
            return x / scale * gain + (0 if bias is None else bias)

        return [(f"{path}.hook_in", keep), (f"{path}.hook_out", redo)]

    def _frozen_pattern(self, layer: int, pattern_HTT: Tensor) -> list[tuple[str, Any]]:
        """Mix the values by a constant pattern; some modules show theirs only when it has been used."""
        seen: dict[str, Tensor] = {}

        def keep(v: Tensor, hook: Any) -> None:
            seen["v"] = v.reshape(*v.shape[:2], -1, self.model.language_model.shape.d_head)

        def mix(z: Tensor, hook: Any) -> Tensor:
            v = seen.pop("v")
            group_H = torch.arange(len(pattern_HTT)) * v.shape[2] // len(pattern_HTT)
            return torch.einsum("hts,bshk->bthk", pattern_HTT, v[:, :, group_H])

        return [(f"blocks.{layer}.attn.v.hook_out", keep), (f"blocks.{layer}.attn.hook_z", mix)]

    def _rows(
        self, stream: str, vectors_ND: Tensor, position_N: Tensor, weights_NT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One backward pass: gradients of `vectors[n] . stream[n, position[n]]`, or of `vectors[n] . (weights[n] stream[n])`,
        at every leaf, times the sources."""
        x_BTD = self.streams[stream]
        copies = torch.arange(len(vectors_ND))
        seed_BTD = torch.zeros_like(x_BTD)
        if weights_NT is None:
            seed_BTD[copies, position_N] = vectors_ND
        else:
            seed_BTD[copies] = weights_NT[:, :, None] * vectors_ND[:, None]
        names = list(self.leaves)
        grads: Sequence[Tensor | None] = torch.autograd.grad(
            x_BTD, [self.leaves[name] for name in names], seed_BTD, retain_graph=True, allow_unused=True
        )
        by_leaf = {name: g[: len(copies)] for name, g in zip(names, grads, strict=True) if g is not None}
        with torch.no_grad():
            value_N = (x_BTD[copies] * seed_BTD[copies]).sum((1, 2))
            # The stream is affine in the leaves: what the leaves do not explain is the constant part.
            explained_N = sum((g * self.leaves[name][: len(copies)]).sum((1, 2)) for name, g in by_leaf.items())
            rows_NC, decoder_bias_N = self._columns(by_leaf, len(copies))
        return rows_NC, value_N - explained_N + decoder_bias_N

    def _columns(self, by_leaf: dict[str, Tensor], n: int) -> tuple[Tensor, Tensor]:
        local = self.local
        T, L = local.n_positions, local.shape.n_layers
        rows_NC = local.mlp.errors_LTD.new_zeros(n, self._n_columns())
        bias_N = rows_NC.new_zeros(n)
        column = 0
        for name, source_TD in (
            ("token", local.frozen.token_embedding_TD),
            ("position", local.frozen.position_embedding_TD),
        ):
            if source_TD is not None:
                rows_NC[:, column : column + T] = (by_leaf[name] * source_TD).sum(-1)
                column += T
        feature = column + len(local.decompositions) * L * T
        for part in local.decompositions:
            for layer in range(L):
                grad_NTD = by_leaf.get(f"{part.kind}.{layer}")
                if grad_NTD is not None:
                    error = slice(column + layer * T, column + (layer + 1) * T)
                    rows_NC[:, error] = (grad_NTD * part.errors_LTD[layer]).sum(-1)
                    bias_N += self._meet_features(part, layer, grad_NTD, rows_NC[:, feature:])
            column += L * T
            feature += len(part.features)
        return rows_NC, bias_N

    def _meet_features(self, part: Decomposition, layer: int, grad_NTD: Tensor, rows_NS: Tensor) -> Tensor:
        """Add the effects of what a part's features write at one layer; return those of its decoder bias, `[N]`."""
        crosscoder, features, site = part.crosscoder, part.features, Site(layer, part.kind)
        if site not in crosscoder.wiring.write_sites:
            return grad_NTD.new_zeros(len(grad_NTD))
        for group in crosscoder.wiring.writers(site):
            chosen = features.group == group
            decoder_SD = crosscoder.decoder_vectors(group, features.index[chosen], site)
            # Features sit at a position each: one product per position keeps this as cheap as it can be.
            number_S = torch.nonzero(chosen)[:, 0]
            for t in range(grad_NTD.shape[1]):
                here = features.row[chosen] == t
                effect_NS = grad_NTD[:, t] @ decoder_SD[here].T
                rows_NS[:, number_S[here]] += effect_NS * features.activation[chosen][here]
        return grad_NTD.sum(1) @ crosscoder.decoder_bias(site)

    def _n_columns(self) -> int:
        local = self.local
        embeddings = 1 if local.frozen.position_embedding_TD is None else 2
        parts = len(local.decompositions)
        per_position = embeddings + parts * local.shape.n_layers
        return per_position * local.n_positions + sum(len(part.features) for part in local.decompositions)


def expand_all(model: ReplacementModel, tokens_T: Tensor) -> tuple[Attributor, list[LogitTarget]]:
    """An attributor with the rows of all nodes that the top logits depend on, and these logits."""
    with torch.no_grad():
        local = model.localize(tokens_T)
        logits = [resolve_logit(target, local, model.language_model) for target in top_logits(local)]
        attributor = Attributor(local, logits)
        output = np.zeros(attributor.rows.n_nodes)
        output[attributor.rows.n_columns :] = 1 / len(logits)
        attributor.expand(output, coverage=1.0, max_nodes=None)
    return attributor, logits


def compare_with_oracle(model: ReplacementModel, tokens_T: Tensor, *, tolerance: float) -> Attributor:
    """Compare every edge and every constant part of a full graph with the gradients of TransformerLens's forward pass.

    Args:
        tolerance: relative to the largest edge and, for constants, to the largest value.
    """
    attributor, logits = expand_all(model, tokens_T)
    rows, features = attributor.rows, attributor.columns.features
    oracle = AutogradOracle(model, attributor.local, batch_size=8)
    chosen = np.flatnonzero(rows.expanded[features])
    assert len(chosen)
    directions_ND = torch.stack([logit.direction_D for logit in logits])
    of_logits = oracle.logit_rows(directions_ND, torch.tensor([logit.position for logit in logits]))
    unembedding_N = torch.tensor([logit.bias for logit in logits], dtype=torch.float64)
    dense_NC = torch.zeros(rows.n_nodes, rows.n_columns, dtype=torch.float64)
    for block in (block for blocks in rows.blocks.values() for block in blocks):
        dense_NC[np.repeat(block.node, block.counts), block.source] = torch.from_numpy(block.weight).double()
    for nodes, (expected_NC, bias_N), constant in (
        (features.start + chosen, oracle.feature_rows(torch.from_numpy(chosen)), 0.0),
        (np.arange(rows.n_columns, rows.n_nodes), of_logits, unembedding_N),
    ):
        scale = float(expected_NC.abs().max())
        torch.testing.assert_close(dense_NC[nodes], expected_NC.double(), rtol=0, atol=tolerance * scale)
        # The oracle's constant is what is left of the value, so it is as exact as the value is.
        scale, bias = float(np.abs(rows.value).max()), torch.from_numpy(rows.bias[nodes])
        torch.testing.assert_close(bias, bias_N.double() + constant, rtol=0, atol=tolerance * scale)
    return attributor
