"""Attribution by automatic differentiation: an independent implementation that the explicit transport is compared with.

It shares no code with `circuits.transport` or `replacement.frozen`: TransformerLens runs the model itself, hooks fix the
attention patterns and norm scales, MLP outputs and embeddings become leaves, and rows of A are gradients at the leaves
times source vectors. Written to be fast as well: the forward pass runs once over B copies of the prompt, targets of one
layer share backward passes of B targets each, and a backward pass stops at the embeddings and never enters an MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from replacement import LocalReplacement, ReplacementModel, Site


class AutogradOracle:
    """Rows of A for one prompt by backward passes over `batch_size` copies of it."""

    def __init__(self, model: ReplacementModel, local: LocalReplacement, *, batch_size: int = 64) -> None:
        self.model, self.local, self.batch_size = model, local, batch_size
        self.bridge = model.language_model.parts.bridge
        self.leaves: dict[str, Tensor] = {}
        self.streams: dict[str, Tensor] = {}
        self._forward()

    def feature_rows(self, chosen_S: Tensor) -> tuple[Tensor, Tensor]:
        """`A [N, C]` in the columns of `circuits.sources`, and `bias [N]`, for numbers into `local.features`."""
        features, crosscoder = self.local.features, self.local.crosscoder
        rows_NC = self.local.mlp.errors_LTD.new_zeros(len(chosen_S), self._n_columns())
        bias_N = rows_NC.new_zeros(len(chosen_S))
        for group in range(crosscoder.n_groups):
            own = torch.nonzero(features.group[chosen_S] == group)[:, 0]
            for part in own.split(self.batch_size):
                index, position = features.index[chosen_S[part]], features.row[chosen_S[part]]
                for site in crosscoder.wiring.reads[group]:
                    name = self.model.language_model.parts.hook_name(site)
                    rows, bias = self._rows(name, crosscoder.encoder(group, site)[index], position)
                    rows_NC[part] += rows
                    bias_N[part] += bias
                bias_N[part] += crosscoder.b_enc[group][index]
        return rows_NC, bias_N

    def logit_rows(self, directions_ND: Tensor, position_N: Tensor) -> tuple[Tensor, Tensor]:
        """The same for vectors read after the final norm."""
        parts = [
            self._rows("ln_final.hook_out", directions_ND[part], position_N[part])
            for part in torch.arange(len(directions_ND)).split(self.batch_size)
        ]
        return torch.cat([rows for rows, _ in parts]), torch.cat([bias for _, bias in parts])

    def _forward(self) -> None:
        lm, crosscoder = self.model.language_model, self.local.crosscoder
        norms = [f"blocks.{i}.{n}" for i in range(lm.shape.n_layers) for n in lm.parts.norm_names(i)] + ["ln_final"]
        hooks: list[tuple[str, Any]] = []
        for path in norms:
            hooks += self._frozen_norm(path)
        for layer in range(lm.shape.n_layers):
            hooks.append((f"blocks.{layer}.attn.hook_pattern", lambda x, hook: x.detach()))
            hooks.append((f"blocks.{layer}.hook_mlp_out", self._mlp_leaf(layer)))
        hooks.append(("hook_embed", self._leaf("token")))
        if self.local.frozen.position_embedding_TD is not None:
            hooks.append(("hook_pos_embed", self._leaf("position")))
        names = {lm.parts.hook_name(site) for site in crosscoder.wiring.read_sites} | {"ln_final.hook_out"}
        hooks += [(name, self._keep(name)) for name in names]
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
        make_leaf = self._leaf(f"mlp.{layer}")

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
            self.streams[name] = x

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
            epsilon = getattr(original, "variance_epsilon", getattr(original, "eps", None))
            scale = (x.detach().pow(2).mean(-1, keepdim=True) + epsilon).sqrt()
            gain = original.weight + (1 if norm.uses_weight_offset else 0)
            bias = getattr(original, "bias", None)
            return x / scale * gain + (0 if bias is None else bias)

        return [(f"{path}.hook_in", keep), (f"{path}.hook_out", redo)]

    def _rows(self, stream: str, vectors_ND: Tensor, position_N: Tensor) -> tuple[Tensor, Tensor]:
        """One backward pass: gradients of `vectors[n] . stream[n, position[n]]` at every leaf, times the sources."""
        x_BTD = self.streams[stream]
        copies = torch.arange(len(vectors_ND))
        seed_BTD = torch.zeros_like(x_BTD)
        seed_BTD[copies, position_N] = vectors_ND
        names = list(self.leaves)
        grads: Sequence[Tensor | None] = torch.autograd.grad(
            x_BTD, [self.leaves[name] for name in names], seed_BTD, retain_graph=True, allow_unused=True
        )
        by_leaf = {name: g[: len(copies)] for name, g in zip(names, grads, strict=True) if g is not None}
        with torch.no_grad():
            value_N = (x_BTD[copies, position_N] * vectors_ND).sum(-1)
            # The stream is affine in the leaves: what the leaves do not explain is the constant part.
            explained_N = sum((g * self.leaves[name][: len(copies)]).sum((1, 2)) for name, g in by_leaf.items())
            rows_NC, decoder_bias_N = self._columns(by_leaf, len(copies))
        return rows_NC, value_N - explained_N + decoder_bias_N

    def _columns(self, by_leaf: dict[str, Tensor], n: int) -> tuple[Tensor, Tensor]:
        local = self.local
        T, crosscoder, features = local.n_positions, local.crosscoder, local.features
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
        first = column + local.shape.n_layers * T
        for layer in range(local.shape.n_layers):
            grad_NTD = by_leaf.get(f"mlp.{layer}")
            if grad_NTD is None:
                continue
            rows_NC[:, column + layer * T : column + (layer + 1) * T] = (grad_NTD * local.mlp.errors_LTD[layer]).sum(-1)
            site = Site(layer, "mlp_out")
            if site not in crosscoder.wiring.write_sites:
                continue
            bias_N += grad_NTD.sum(1) @ crosscoder.decoder_bias(site)
            for group in crosscoder.wiring.writers(site):
                chosen = features.group == group
                decoder_SD = crosscoder.decoder_vectors(group, features.index[chosen], site)
                # Features sit at a position each: one product per position keeps this as cheap as it can be.
                columns_S = first + torch.nonzero(chosen)[:, 0]
                for t in range(T):
                    here = features.row[chosen] == t
                    effect_NS = grad_NTD[:, t] @ decoder_SD[here].T
                    rows_NC[:, columns_S[here]] += effect_NS * features.activation[chosen][here]
        return rows_NC, bias_N

    def _n_columns(self) -> int:
        T, learned = self.local.n_positions, self.local.frozen.position_embedding_TD is not None
        return (2 if learned else 1) * T + self.local.shape.n_layers * T + len(self.local.features)
