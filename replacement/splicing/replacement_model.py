"""The replacement model: a language model whose MLP outputs (and attention outputs) are overwritten by crosscoders."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from replacement.crosscoder.checkpoint import check_fits
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.families import JOINT, LORSA_READS
from replacement.crosscoder.joint import split
from replacement.crosscoder.lorsa import Lorsa
from replacement.crosscoder.sites import Site
from replacement.language_model.language_model import LanguageModel
from replacement.language_model.prompts import Prompt, is_batch
from replacement.number_checks import integer, integers
from replacement.splicing.clean_run import WRITES, CleanRun, Conditions
from replacement.splicing.intervened import Intervened
from replacement.splicing.intervention import PARTS, Intervention
from replacement.splicing.interventions_by_part import changes_of, check_felt, interventions_by_part
from replacement.splicing.local_replacement import LocalReplacement, localize
from replacement.splicing.splice_options import check_together


class ReplacementModel:
    """A language model with a crosscoder spliced in for its MLPs, and a second one for attention where that is given.

    >>> model = ReplacementModel(lm, crosscoder)                # doctest: +SKIP
    >>> model(tokens)                                           # every MLP replaced, errors propagate
    >>> model(tokens, errors="keep")                            # equals the original model
    >>> model(tokens, layers=[2], reads="clean")                # one layer, reading the original activations
    >>> model = ReplacementModel(lm, crosscoder, attention_crosscoder=other)    # doctest: +SKIP
    >>> model(tokens, parts=["attention"])                      # attention replaced, MLPs left as they are
    >>> model = ReplacementModel(fine_tuned, adapter, base=base_model)  # doctest: +SKIP
    >>> model(tokens)                                           # every MLP is that of the base model plus the adapter

    Attributes:
        language_model: the original; the fine-tuned one where the crosscoder is an adapter (`language_model.base` is then the
            base model, whose MLPs run live, on the stream of the replacement).
        crosscoder: writes the MLP outputs, or as an adapter what they add to those of the base model.
        attention_crosscoder: writes the attention outputs; None where attention is left as it is.
        loaded_from: the arguments `model`, `crosscoder`, `attention_crosscoder` and `base` of `replacement.load`; None where
            the model was put together otherwise.
    """

    loaded_from: dict[str, str] | None = None

    def __repr__(self) -> str:
        return f"ReplacementModel({self.language_model!r}, {' and '.join(self.crosscoders)} replaced)"

    def __init__(
        self,
        language_model: LanguageModel,
        crosscoder: Crosscoder,
        *,
        attention_crosscoder: Crosscoder | None = None,
        base: LanguageModel | None = None,
    ) -> None:
        """Splice a crosscoder that writes MLP outputs, or a joint one that writes attention outputs too, into a model.

        The crosscoders given are left as they are: the model holds views of them in its own dtype and on its device, in
        evaluation mode and without gradients, which share their memory where nothing had to be converted.

        Args:
            attention_crosscoder: one that reads `attn_z` and writes attention outputs, such as `Wiring.attention`, or a
                `Lorsa`. The attention part of a joint crosscoder (`Wiring.joint`) takes its place.
            base: where the crosscoder is an adapter, the model that this one was fine-tuned from.

        Raises:
            ValueError: a crosscoder was made for another width, depth or model, is not causal, writes other sites than
                MLP outputs (attention: reads others than `attn_z`, a Lorsa than `attn_in`, writes others than attention
                outputs), or holds NaN; both use one site; a joint crosscoder beside one of attention; the architecture cannot
                be linearised exactly; an adapter without its base model, or a base model of another kind or for a crosscoder
                that is no adapter.
        """
        if base is not None:
            if not crosscoder.wiring.writes_differences:
                raise ValueError(
                    f"a base model goes with an adapter, this {crosscoder.wiring.name} crosscoder is none: leave base out"
                )
            language_model = language_model.with_base(base)
        crosscoders = split(crosscoder)
        if attention_crosscoder is not None:
            if len(crosscoders) > 1:
                raise ValueError(
                    "a joint crosscoder replaces attention, too: expected no attention crosscoder beside it"
                )
            crosscoders.append(attention_crosscoder)
        for part, given in zip(PARTS, crosscoders, strict=False):
            _check(given, language_model, part)
        check_together(crosscoders)
        language_model.check_linearisable()
        dtype, device = language_model.dtype, language_model.device
        views = [given.to_inference(dtype=dtype, device=device) for given in crosscoders]
        self.language_model, self.crosscoder = language_model, views[0]
        self.attention_crosscoder = views[1] if len(views) > 1 else None

    @property
    def crosscoders(self) -> dict[str, Crosscoder]:
        """The crosscoder of every part that has one: `mlp`, and `attention` where it is replaced too."""
        attention = {} if self.attention_crosscoder is None else {"attention": self.attention_crosscoder}
        return {"mlp": self.crosscoder, **attention}

    def __call__(
        self,
        prompt: Prompt,
        *,
        errors: str = "drop",
        layers: Iterable[int] | None = None,
        parts: Iterable[str] | None = None,
        reads: str = "propagated",
        patterns: str = "live",
        interventions: Iterable[Intervention] = (),
    ) -> Tensor:
        """Logits `[T, V]` of a prompt, or `[B, T, V]` of several.

        Args:
            prompt: text, a list or 1-D tensor of token ids; or a 2-D tensor of them, one prompt per row.
            errors: `drop` lets reconstruction errors propagate; `keep` adds the error of the clean run back to every
                replaced output, which gives the original logits when there are no interventions.
            layers: layers that are replaced, in every part; all that the crosscoders write by default.
            parts: `mlp`, `attention` or both; all that there are crosscoders for by default.
            reads: `propagated` encodes the stream that the replaced layers produced; `clean` encodes the original one.
            patterns: `live` lets the attention patterns follow the stream; `frozen` holds them at their values in the
                original model.
            interventions: features to change, the same in every prompt of the batch.

        Raises:
            ValueError: a prompt the model cannot read, an option outside its choices, a layer the crosscoders do not write,
                a part without a crosscoder, an unknown feature or one of a part that is not replaced.
        """
        lm = self.language_model
        tokens_BT = lm.batch(prompt)
        conditions = Conditions(errors=errors, reads=reads, patterns=patterns)
        crosscoders = self._chosen(parts)
        sites = _sites_of(crosscoders, layers)
        by_part = interventions_by_part(interventions, crosscoders, n_positions=tokens_BT.shape[1])
        for part, crosscoder in crosscoders.items():
            check_felt(by_part[part], crosscoder, sites[part])
        changes = changes_of(by_part, crosscoders, tokens_BT)
        logits_BTV = CleanRun(lm, crosscoders, tokens_BT).run(conditions, changes, sites=sites).logits_BTV
        return logits_BTV if is_batch(prompt) else logits_BTV[0]

    def _chosen(self, parts: Iterable[str] | None) -> dict[str, Crosscoder]:
        """The crosscoders of the parts named."""
        crosscoders = self.crosscoders
        if parts is not None and not isinstance(parts, Iterable):
            raise ValueError(f"parts must be 'mlp', 'attention' or a list of both, got {parts!r:.50}")
        names = list(crosscoders) if parts is None else [parts] if isinstance(parts, str) else list(parts)
        for name in names:
            if name not in PARTS:
                raise ValueError(f"parts must be 'mlp' or 'attention', got {name!r}")
            if name not in crosscoders:
                raise ValueError(
                    "this replacement model has no attention crosscoder: give one with attention_crosscoder=..."
                )
        if not names:
            raise ValueError("parts names nothing to replace: expected 'mlp', 'attention' or both")
        return {name: crosscoders[name] for name in PARTS if name in names}

    @torch.no_grad()
    def intervene(
        self,
        prompt: Prompt,
        interventions: Iterable[Intervention],
        *,
        errors: str = "keep",
        reads: str = "propagated",
        patterns: str = "live",
        norms: str = "live",
        mlps: str = "replaced",
        constrained_layers: Collection[int] | None = None,
        generate: int = 0,
    ) -> Intervened:
        """Run a prompt with features changed.

        With errors kept, norms and patterns frozen and all layers held, logits change exactly as `LocalReplacement.logits`
        says (in front of a soft-cap, where the model has one).

        Args:
            prompt: text, or token ids.
            interventions: features to set, scale or add to.
            errors: `keep` adds the clean run's reconstruction errors back, `drop` lets them propagate.
            reads: as in a call of the model; with `clean` no feature reacts to the interventions.
            patterns: attention patterns `live`, or `frozen` at their values in the original model.
            norms: scales of the residual stream's norms, `live` or `frozen`.
            mlps: outputs outside `constrained_layers` come from the crosscoder (`replaced`), whose features react, or are
                the model's own (`original`), to which the change of the intervened features is added (inside them only).
            constrained_layers: constrained patching (Ameisen et al. 2025): inside this range every replaced output is held at
                its clean value plus what the change of the intervened features writes there (skip terms follow the stream);
                behind it the model runs on. Multiples and sums refer to the clean activations there. None for no layer.
            generate: tokens to generate greedily, each with the interventions; the errors, patterns and scales kept are
                those of the original model on the tokens so far.

        Raises:
            UnknownFeatureError: a layer, index or position that does not exist.
            ValueError: a prompt the model cannot read, an option outside its choices, or more tokens than the context.
        """
        lm, crosscoders = self.language_model, self.crosscoders
        tokens_T = lm.tokens(prompt)
        if not 0 <= integer("generate", generate) <= lm.context_length - len(tokens_T):
            room = lm.context_length - len(tokens_T)
            raise ValueError(f"generate must be 0 to {room} after {len(tokens_T)} tokens, got {generate}")
        conditions = Conditions(
            errors=errors,
            reads=reads,
            patterns=patterns,
            norms=norms,
            mlps=mlps,
            constrained_layers=constrained_layers,
        )
        by_part = interventions_by_part(interventions, crosscoders, n_positions=len(tokens_T))
        for step in range(generate + 1):
            original = CleanRun(lm, crosscoders, tokens_T[None])
            changed = original.run(conditions, changes_of(by_part, crosscoders, tokens_T[None]))
            if step < generate:
                tokens_T = torch.cat([tokens_T, changed.logits_BTV[0, -1:].argmax(-1)])
        # With errors kept, or the model's own MLPs, the run without interventions is the original model's.
        is_original = errors == "keep" or mlps == "original"
        reference = None if is_original else original.run(conditions)
        clean_logits_BTV = original.logits if reference is None else reference.logits_BTV
        clean = original.features if reference is None else reference.features
        return Intervened(
            tokens=tokens_T,
            logits=changed.logits_BTV[0],
            clean_logits=clean_logits_BTV[0],
            features=changed.features["mlp"],
            clean_features=clean["mlp"],
            language_model=lm,
            crosscoders=crosscoders,
            attention_features=changed.features.get("attention"),
            clean_attention_features=clean.get("attention"),
        )

    def localize(self, prompt: Prompt) -> LocalReplacement:
        """The local replacement model of one prompt, computed in at least 32 bits.

        Where language model and crosscoders have 16-bit weights, it is that of "these weights, float32 arithmetic";
        `frozen.logit_gap_16bit` says how far its logits are from those of the model itself. Of an adapter, what the MLPs of the
        base model write on this prompt is part of the error terms: held, and not followed back any further.

        Raises:
            ValueError: a prompt the model cannot read, or a crosscoder that is no affine function of the frozen stream.
        """
        lm, dtype = self.language_model, self.language_model.parts.exact_dtype
        exact = {
            part: crosscoder.to_inference(dtype=dtype, wiring=crosscoder.wiring.as_outputs())
            for part, crosscoder in self.crosscoders.items()
        }
        attention = exact.get("attention")
        sites = set(self.crosscoder.wiring.read_sites)
        if attention is not None:
            sites |= {*attention.wiring.read_sites, *(Site(layer, "attn_out") for layer in range(lm.shape.n_layers))}
        return localize(
            shape=lm.shape,
            crosscoder=exact["mlp"],
            attention=attention,
            frozen=lm.freeze(lm.tokens(prompt), sites=sites),
            unembedding=lm.parts.unembedding(),
        )


def _check(crosscoder: Crosscoder, language_model: LanguageModel, part: str) -> None:
    """Check that a crosscoder can stand in for a part of this model."""
    check_fits(crosscoder, language_model)
    wiring, writes = crosscoder.wiring, WRITES[part]
    whose = "a replacement model needs" if part == "mlp" else "attention needs"
    if wiring.name == JOINT:
        raise ValueError(
            "attention needs a crosscoder of attention alone: a joint one is given as the crosscoder of both"
        )
    for site in wiring.as_outputs().write_sites:
        if site.kind != writes or site.model != 0:
            raise ValueError(f"{whose} a crosscoder that writes {writes} sites, this one writes {site}")
    reads = LORSA_READS if isinstance(crosscoder, Lorsa) else ("attn_z",)
    for site in wiring.read_sites if part == "attention" else ():
        if site.kind not in reads or site.model != 0:
            raise ValueError(f"{whose} a crosscoder that reads {' or '.join(reads)} sites, this one reads {site}")
    both = set(wiring.read_sites) & set(wiring.write_sites)
    if both:
        raise ValueError(f"{whose} a crosscoder that writes other sites than it reads: {min(both)}")
    if not wiring.is_causal:
        raise ValueError(f"{whose} a causal crosscoder: this {wiring.name} one writes sites before those it reads")
    crosscoder.check_finite()


def _sites_of(crosscoders: Mapping[str, Crosscoder], layers: Iterable[int] | None) -> dict[str, tuple[Site, ...]]:
    """Written sites at the layers named, by part."""
    written = {part: crosscoder.wiring.write_sites for part, crosscoder in crosscoders.items()}
    if layers is None:
        return written
    chosen = set(integers("layers", layers))
    known = {site.layer for sites in written.values() for site in sites}
    if chosen - known:
        raise ValueError(f"the crosscoder writes layers {sorted(known)}, not layer {min(chosen - known)}")
    return {part: tuple(site for site in sites if site.layer in chosen) for part, sites in written.items()}
