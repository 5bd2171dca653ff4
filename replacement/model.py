"""The replacement model: a language model whose MLP outputs are overwritten by a crosscoder.

Letters: B batch, T tokens, R = B T rows, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from replacement.checkpoint import check_fits
from replacement.crosscoder import Crosscoder
from replacement.interventions import Intervention, check_interventions, intervene
from replacement.language_model import Hook, LanguageModel
from replacement.local import LocalReplacement, localize
from replacement.sites import Site


class ReplacementModel:
    """A language model with a crosscoder spliced in.

    >>> model = ReplacementModel(lm, crosscoder)                # doctest: +SKIP
    >>> model(tokens)                                           # every MLP replaced, errors propagate
    >>> model(tokens, errors="keep")                            # equals the original model
    >>> model(tokens, layers=[2], reads="clean")                # one layer, reading the original activations
    """

    def __init__(self, language_model: LanguageModel, crosscoder: Crosscoder) -> None:
        """Splice a crosscoder that writes MLP outputs into a language model.

        The crosscoder itself is used, not a copy: it is moved to the model's dtype and device, set to evaluation mode, and
        its gradients are switched off.

        Raises:
            ValueError: the crosscoder was made for another width, depth or model, is not causal, writes other sites than
                MLP outputs, or holds NaN; or the architecture cannot be linearised exactly.
        """
        check_fits(
            crosscoder,
            language_model.shape,
            model_name=language_model.name,
            model_fingerprint=language_model.fingerprint,
        )
        for site in crosscoder.wiring.write_sites:
            if site.kind != "mlp_out" or site.model != 0:
                raise ValueError(
                    f"a replacement model needs a crosscoder that writes mlp_out sites, this one writes {site}"
                )
        both = set(crosscoder.wiring.read_sites) & set(crosscoder.wiring.write_sites)
        if both:
            raise ValueError(
                f"a replacement model needs a crosscoder that writes other sites than it reads: {min(both)}"
            )
        if not crosscoder.wiring.is_causal:
            raise ValueError(
                f"a replacement model needs a causal crosscoder: this {crosscoder.wiring.name} one writes "
                "sites before those it reads"
            )
        crosscoder.check_finite()
        language_model.check_linearisable()
        self.language_model = language_model
        self.crosscoder = crosscoder.to(dtype=language_model.dtype, device=language_model.device).eval()
        self.crosscoder.requires_grad_(False)

    def __call__(
        self,
        tokens: Tensor,
        *,
        errors: str = "drop",
        layers: Iterable[int] | None = None,
        reads: str = "replaced",
        interventions: Iterable[Intervention] = (),
    ) -> Tensor:
        """Logits `[B, T, V]` of tokens `[B, T]`, or `[T, V]` of tokens `[T]`.

        Args:
            tokens: token ids.
            errors: `drop` lets reconstruction errors propagate; `keep` adds the error of the clean run back to every
                replaced MLP output, which gives the original logits when there are no interventions.
            layers: layers whose MLP is replaced; all that the crosscoder writes by default.
            reads: `replaced` encodes the stream that the replaced layers produced; `clean` encodes the original one.
            interventions: features to set, the same in every prompt of the batch.

        Raises:
            ValueError: tokens the model cannot read, an option outside its choices, a layer the crosscoder does not write,
                an unknown feature.
        """
        lm = self.language_model
        batch_BT = lm.check_batch(tokens) if tokens.ndim == 2 else lm.check_tokens(tokens)[None]
        splice = _Splice(self, batch_BT, errors=errors, layers=layers, reads=reads, interventions=interventions)
        logits = lm.run(batch_BT, splice.hooks())
        return logits if tokens.ndim == 2 else logits[0]

    def localize(self, tokens_T: Tensor) -> LocalReplacement:
        """The local replacement model of one prompt.

        Raises:
            ValueError: tokens that are empty, too many or unknown.
        """
        lm = self.language_model
        frozen = lm.freeze(lm.check_tokens(tokens_T), sites=self.crosscoder.wiring.read_sites)
        return localize(shape=lm.shape, crosscoder=self.crosscoder, frozen=frozen, unembedding=lm.parts.unembedding())


class _Splice:
    """One forward pass of the replacement model: what the hooks at read and written sites share."""

    def __init__(
        self,
        model: ReplacementModel,
        tokens_BT: Tensor,
        *,
        errors: str,
        layers: Iterable[int] | None,
        reads: str,
        interventions: Iterable[Intervention],
    ) -> None:
        for name, given, choices in (("errors", errors, ("drop", "keep")), ("reads", reads, ("replaced", "clean"))):
            if given not in choices:
                raise ValueError(f"{name} must be {choices[0]!r} or {choices[1]!r}, got {given!r}")
        self.crosscoder = model.crosscoder
        wiring = self.crosscoder.wiring
        self.n_positions = tokens_BT.shape[1]
        self.written = _written_sites(wiring.write_sites, layers)
        self.interventions = check_interventions(
            interventions,
            n_groups=self.crosscoder.n_groups,
            n_positions=self.n_positions,
            n_features=self.crosscoder.n_features,
        )
        self.sums: dict[Site, Tensor] = {}
        self.inputs: dict[Site, Tensor] = {}
        self.errors: dict[Site, Tensor] = {}
        self.reads_replaced = reads == "replaced"
        if errors == "keep" or reads == "clean":
            clean = model.language_model.read(tokens_BT, {*wiring.read_sites, *self.written})
            rows = {site: x_BTD.flatten(0, 1) for site, x_BTD in clean.items()}
            if errors == "keep":
                self.errors = self._clean_errors(rows)
            if reads == "clean":
                for site in wiring.read_sites:
                    self._take(site, rows[site])

    def hooks(self) -> dict[Site, Hook]:
        """Hooks for the language model: one per read site (unless reads are clean) and one per written site."""
        hooks: dict[Site, Hook] = {site: self._writer(site) for site in self.written}
        if self.reads_replaced:
            hooks |= {site: self._reader(site) for site in self.crosscoder.wiring.read_sites}
        return hooks

    def _reader(self, site: Site) -> Hook:
        return lambda x_BTD: self._take(site, x_BTD.flatten(2).flatten(0, 1))

    def _writer(self, site: Site) -> Hook:
        def hook(x_BTD: Tensor) -> Tensor:
            y_RD = self.sums.pop(site) + self.crosscoder.decoder_bias(site)
            if site in self.errors:
                y_RD = y_RD + self.errors[site]
            y_BTD, n = y_RD.view_as(x_BTD), self.crosscoder.undecomposed_positions
            # Positions without features keep what the original MLP wrote.
            return torch.cat([x_BTD[:, :n], y_BTD[:, n:]], dim=1) if n else y_BTD

        return hook

    def _take(self, site: Site, x_RD: Tensor) -> None:
        """Receive one read site; encode and add up every group whose reads are now complete."""
        self.inputs[site] = x_RD
        for group, group_reads in enumerate(self.crosscoder.wiring.reads):
            if site in group_reads and all(read in self.inputs for read in group_reads):
                self._add_group(group)

    def _add_group(self, group: int) -> None:
        positions = torch.arange(self.n_positions, device=next(iter(self.inputs.values())).device)
        n_prompts = next(iter(self.inputs.values())).shape[0] // self.n_positions
        features = self.crosscoder.encode_group(group, self.inputs, positions=positions.repeat(n_prompts))
        features = intervene(features, self.interventions, group=group, n_positions=self.n_positions)
        sites = [site for site in self.crosscoder.wiring.writes[group] if site in self.written]
        parts = [self.crosscoder.skip_contribution(self.inputs, groups=[group])]
        if sites:
            parts.append(self.crosscoder.decode_contribution(features, groups=[group], sites=sites))
        for part in parts:
            for site in sites:
                if site in part:
                    self.sums[site] = self.sums[site] + part[site] if site in self.sums else part[site]

    def _clean_errors(self, rows: dict[Site, Tensor]) -> dict[Site, Tensor]:
        n_prompts = next(iter(rows.values())).shape[0] // self.n_positions
        positions = torch.arange(self.n_positions, device=next(iter(rows.values())).device).repeat(n_prompts)
        clean = self.crosscoder(
            {site: rows[site] for site in self.crosscoder.wiring.read_sites}, positions=positions
        ).reconstructions
        return {site: rows[site] - clean[site] for site in self.written}


def _written_sites(write_sites: Sequence[Site], layers: Iterable[int] | None) -> tuple[Site, ...]:
    if layers is None:
        return tuple(write_sites)
    chosen = set(layers)
    known = {site.layer for site in write_sites}
    if chosen - known:
        raise ValueError(f"the crosscoder writes layers {sorted(known)}, not layer {min(chosen - known)}")
    return tuple(site for site in write_sites if site.layer in chosen)
