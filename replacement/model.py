"""The replacement model: a language model whose MLP outputs are overwritten by a crosscoder.

Letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from replacement.checkpoint import check_fits
from replacement.crosscoder import Crosscoder
from replacement.interventions import Intervention
from replacement.language_model import LanguageModel
from replacement.local import LocalReplacement, localize
from replacement.sites import Site
from replacement.splice import Splice


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
        self.attention_crosscoder: Crosscoder | None = None

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
        splice = Splice(
            lm,
            self.crosscoder,
            batch_BT,
            sites=_sites_of(self.crosscoder.wiring.write_sites, layers),
            reads=reads,
            errors=errors,
            interventions=interventions,
        )
        logits = splice.run()
        return logits if tokens.ndim == 2 else logits[0]

    def localize(self, tokens_T: Tensor) -> LocalReplacement:
        """The local replacement model of one prompt.

        Raises:
            ValueError: tokens that are empty, too many or unknown.
        """
        lm = self.language_model
        attention = self.attention_crosscoder
        sites = set(self.crosscoder.wiring.read_sites)
        if attention is not None:
            sites |= {*attention.wiring.read_sites, *(Site(layer, "attn_out") for layer in range(lm.shape.n_layers))}
        return localize(
            shape=lm.shape,
            crosscoder=self.crosscoder,
            attention=attention,
            frozen=lm.freeze(lm.check_tokens(tokens_T), sites=sites),
            unembedding=lm.parts.unembedding(),
        )


def _sites_of(write_sites: Sequence[Site], layers: Iterable[int] | None) -> tuple[Site, ...]:
    if layers is None:
        return tuple(write_sites)
    chosen = set(layers)
    known = {site.layer for site in write_sites}
    if chosen - known:
        raise ValueError(f"the crosscoder writes layers {sorted(known)}, not layer {min(chosen - known)}")
    return tuple(site for site in write_sites if site.layer in chosen)
