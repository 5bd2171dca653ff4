"""The crosscoder: encoder, activation function and sparse decoder over a wiring.

    h_g = sum_{r in reads(g)} x_r W_enc[g, r]^T + b_enc[g]        pre-activations
    a_g = f(h_g)                                                  activations, kept sparse
    y_w = sum_{g writes w} (a_g W_dec[g, w] + sum_r x_r W_skip[g, r, w]^T) + b_dec[w]

Autoencoders, transcoders, cross-layer transcoders and crosscoders differ only in the wiring. The first two lines are
computed in `encoder.py`, the third here. Decoding visits active features only: a feature's decoder vectors to its written
sites are contiguous, as in the published CLT layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar, NamedTuple

from jaxtyping import Bool, Int
from torch import Tensor

from replacement.crosscoder.encoder import Encoder
from replacement.crosscoder.features import Features
from replacement.crosscoder.sites import Site
from replacement.crosscoder.sparse import Block, Pattern, add_blocks


class CrosscoderOutput(NamedTuple):
    """Result of `Crosscoder.forward`."""

    reconstructions: dict[Site, Tensor]
    """Reconstruction of every written site, `[B, D]`, biases and skip included."""
    features: Features
    """Active features of all groups."""


class _StoredDecoders(NamedTuple):
    """Tensors `[F, W, D]`, and the (tensor, place) of each (number of the group among those chosen, place of the site)."""

    weights: list[Tensor]
    places: dict[tuple[int, int], tuple[int, int]]


class Crosscoder(Encoder):
    """Sparse features read from some sites of a transformer and written to others.

    Construction and parameters: see `CrosscoderWeights`. `reads_prompts` says whether a row's features depend on other rows, so
    that rows must be whole prompts (`Lorsa`); of any other crosscoder they may be any tokens.

    >>> clt = Crosscoder(Wiring.strictly_causal(lm), n_features=4096, activation=TopK(16))  # doctest: +SKIP
    >>> outputs, features = clt({site: activations[site] for site in clt.wiring.read_sites})  # doctest: +SKIP
    >>> outputs[Site(3, "mlp_out")]                             # [B, D] reconstruction      # doctest: +SKIP
    >>> features.of(2).index                                    # active features of group 2 # doctest: +SKIP
    """

    reads_prompts: ClassVar[bool] = False

    def holding_patterns(
        self, inputs: Mapping[Site, Tensor], *, positions: Int[Tensor, " B"] | None = None
    ) -> Crosscoder:
        """This crosscoder with its attention patterns held at what these inputs give; most have none (see `Lorsa`)."""
        return self

    def decode(self, features: Features) -> dict[Site, Tensor]:
        """Reconstruction `[B, D]` of every written site from the features, with `b_dec` and without skip terms."""
        sums = self.decode_contribution(features)  # new tensors, so that biases can be added in place
        return {s: sums[s].add_(bias_D) for s, bias_D in zip(self.wiring.write_sites, self.b_dec, strict=True)}

    def decode_contribution(
        self, features: Features, *, groups: Iterable[int] | None = None, sites: Iterable[Site] | None = None
    ) -> dict[Site, Tensor]:
        """Partial sums `sum_g a_g W_dec[g, w]`, `[B, D]`, without biases.

        Args:
            groups: groups to add up, all by default; one at a time in a forward pass that goes layer by layer.
            sites: written sites to compute, all that these groups write by default.

        Raises:
            ValueError: features of another number of groups or features, of another dtype or device, a group that does not
                exist, or a site that none of the groups writes.
        """
        self._check_features(features)
        chosen = tuple(range(self.n_groups) if groups is None else groups)
        for group in chosen:
            self._check_group(group)
        wanted = None if sites is None else set(sites)
        written = {site for group in chosen for site in self.wiring.writes[group]}
        if wanted is not None and wanted - written:
            raise ValueError(f"the groups {chosen} do not write {min(wanted - written)}")
        targets: dict[Site, int] = {}
        blocks, stored = [], self._stored_decoders(chosen)
        for source, group in enumerate(chosen):
            for place, site in enumerate(self.wiring.writes[group]):
                if wanted is None or site in wanted:
                    target = targets.setdefault(site, len(targets))
                    blocks.append(Block(target, source, *stored.places[source, place]))
        parts = [features.of(group) for group in chosen]
        patterns = [Pattern.of(part.row, part.index, features.n_rows) for part in parts]
        sums = add_blocks(blocks, patterns, [part.activation for part in parts], stored.weights)
        scales = self.in_file.output_scale if self.in_file is not None else {}
        return {site: y_BD / scales[site] if site in scales else y_BD for site, y_BD in zip(targets, sums, strict=True)}

    def _stored_decoders(self, groups: tuple[int, ...]) -> _StoredDecoders:
        """The decoders of some groups as they are stored: by group, by written site, or one for each of both."""
        sites = [
            (source, place) for source, group in enumerate(groups) for place in range(len(self.wiring.writes[group]))
        ]
        if self.in_file is not None and self.in_file.decoders:
            weights = [self.in_file.decoders[groups[source], place][:, None] for source, place in sites]
            return _StoredDecoders(weights, {pair: (n, 0) for n, pair in enumerate(sites)})
        if self.tied:
            order = {site: n for n, site in enumerate(self.wiring.write_sites)}
            shared = {pair: (order[self.wiring.writes[groups[pair[0]]][pair[1]]], 0) for pair in sites}
            return _StoredDecoders([w_FD[:, None] for w_FD in self.W_dec], shared)
        stored = {
            pair: self._stored_places[groups[pair[0]], self.wiring.writes[groups[pair[0]]][pair[1]]] for pair in sites
        }
        numbers = list(dict.fromkeys(number for number, _ in stored.values()))
        places = {pair: (numbers.index(number), place) for pair, (number, place) in stored.items()}
        return _StoredDecoders([self.W_dec[number] for number in numbers], places)

    def skip_contribution(
        self, inputs: Mapping[Site, Tensor], *, groups: Iterable[int] | None = None
    ) -> dict[Site, Tensor]:
        """Sum of skip terms `x_r W_skip[g, r, w]^T`, `[B, D]` per written site; empty for crosscoders without skip."""
        sums: dict[Site, Tensor] = {}
        if not self.skip:
            return sums
        for group in range(self.n_groups) if groups is None else groups:
            for read, x_BD in zip(self.wiring.reads[group], self._reads(inputs, group), strict=True):
                for write in self.wiring.writes[group]:
                    y_BD = x_BD @ self.skip_matrix(group, read, write).T
                    sums[write] = sums[write] + y_BD if write in sums else y_BD
        return sums

    def __repr__(self) -> str:
        sizes = f"{self.n_groups} groups of {self.n_features} features"
        return f"Crosscoder({self.wiring.name}, {sizes}, {self.activation!r})"

    def forward(
        self,
        inputs: Mapping[Site, Tensor],
        *,
        positions: Int[Tensor, " B"] | None = None,
        keep: Bool[Tensor, " B"] | None = None,
    ) -> CrosscoderOutput:
        """Encode and decode, skip terms included; see `encode` for the arguments. Of rows that are not kept there is no output:
        rows of reconstructions and features are those that are, in order."""
        features = self.encode(inputs, positions=positions, keep=keep)
        if keep is not None:
            features = features.of_rows(keep)
            inputs = {site: inputs[site][keep] for site in self.wiring.read_sites} if self.skip else {}
        outputs = self.decode(features)
        for site, y_BD in self.skip_contribution(inputs).items():
            outputs[site] = outputs[site] + y_BD
        return CrosscoderOutput(outputs, features)

    def _check_features(self, features: Features) -> None:
        given, expected = (features.n_groups, features.n_features), (self.n_groups, self.n_features)
        if given != expected:
            raise ValueError(
                f"this crosscoder has {expected[0]} groups of {expected[1]} features; the features given come from "
                f"{given[0]} groups of {given[1]}"
            )
        self._check_kind("the column activation of the features", features.activation)
