"""From the settings of a run to its parts: language models, crosscoder, source of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import ModelShape, Site
from replacement.crosscoder.wiring import WHOLE_DEPTH, Wiring
from replacement.data.documents import special_ids
from replacement.data.open_tokens import MAX_CONTEXT, open_source
from replacement.data.token_sources import TokenSource
from replacement.language_model.language_model import LanguageModel
from replacement.loading import ARTIFACTS
from replacement.training.config import CrosscoderConfig, DataConfig

FEATURES_PER_DIMENSION = 16
"""Features per group and dimension of the residual stream where the settings do not say."""


@dataclass(slots=True)
class Models:
    """The language model of a run; two of them, of one shape and vocabulary, for model diffing."""

    first: LanguageModel
    second: LanguageModel | None = None

    @property
    def all(self) -> tuple[LanguageModel, ...]:
        """Both models, or the only one, in order."""
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def only(self) -> LanguageModel | None:
        """The model into which a crosscoder can be spliced; None for two."""
        return self.first if self.second is None else None

    @property
    def fingerprint(self) -> str:
        """Digest of the weights of every model."""
        return "+".join(model.fingerprint for model in self.all)

    def read(self, tokens_RT: Tensor, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Activations `[R, T, D]` at sites, from one forward pass of each model."""
        acts: dict[Site, Tensor] = {}
        for number in sorted({site.model for site in sites}):
            wanted = {Site(site.layer, site.kind): site for site in sites if site.model == number}
            if number >= len(self.all):
                raise ValueError(f"a second model is needed to read {next(iter(wanted.values()))}")
            model = self.all[number]
            read = model.read(tokens_RT.to(model.device), list(wanted))
            acts |= {wanted[site]: x_RTD for site, x_RTD in read.items()}
        return acts


def load_models(names: str | Sequence[str], *, device: str = "cpu") -> Models:
    """Load one model, or two for model diffing; `demo` is the one that ships with the project.

    Raises:
        ValueError: a model that cannot be loaded, more than two, or two that differ in shape or vocabulary.
    """
    given = [names] if isinstance(names, str) else list(names)
    if not 1 <= len(given) <= 2:
        raise ValueError(f"expected one model, or two for model diffing; got {len(given)}")
    models = Models(*(_load(name, device) for name in given))
    sizes = [(lm.shape, lm.vocabulary_size) for lm in models.all]
    if sizes[0] != sizes[-1]:
        raise ValueError(f"two models must have one shape and vocabulary to be compared; got {sizes[0]} and {sizes[1]}")
    return models


def _load(name: str, device: str) -> LanguageModel:
    if name != "demo":
        return LanguageModel.from_pretrained(name, device=device)
    lm = LanguageModel.from_pretrained(ARTIFACTS / "language_model", device=device)
    lm.name = "demo"
    return lm


def open_tokens(config: DataConfig, lm: LanguageModel, *, default_context: int = MAX_CONTEXT) -> TokenSource:
    """The source of tokens that the settings name; see `open_source`."""
    return open_source(
        config.source,
        lm,
        context=config.context,
        default_context=default_context,
        n_held_out=config.held_out_rows,
        text_field=config.text_field,
    )


def build_crosscoder(config: CrosscoderConfig, models: Models, rows_RT: Tensor, *, seed: int) -> Crosscoder:
    """A fresh crosscoder.

    Args:
        rows_RT: a sample of the data; where every row begins with a special token, position 0 is not decomposed.

    Raises:
        ValueError: an unknown wiring or site, a layer the model does not have, or options that do not go together.
    """
    lm = models.first
    wiring = build_wiring(config, lm.shape)
    if wiring.name == "model_diffing" and models.second is None:
        raise ValueError('model diffing needs two models: model = ["first", "second"]')
    if wiring.name != "model_diffing" and models.second is not None:
        raise ValueError(f"the wiring {wiring.name} takes one model, two were given")
    undecomposed = config.undecomposed_positions
    if undecomposed is None:
        special = special_ids(lm)
        undecomposed = int(all(int(token) in special for token in rows_RT[:, 0]))
    return Crosscoder(
        wiring,
        n_features=config.n_features or FEATURES_PER_DIMENSION * lm.shape.d_model,
        activation=config.activation,
        tied=config.tied,
        skip=config.skip,
        model_name=lm.name,
        model_fingerprint=lm.fingerprint,
        undecomposed_positions=undecomposed,
        seed=seed,
    )


def build_wiring(config: CrosscoderConfig, shape: ModelShape) -> Wiring:
    """The wiring that the settings name.

    Raises:
        ValueError: an unknown family or site, or layers that are missing, unwanted or not in the model.
    """
    site, read, layers = config.read or "resid_post", config.read, config.layers
    makers: dict[str, Callable[[], Wiring]] = {
        "autoencoder": lambda: Wiring.autoencoder(shape, layers=layers, site=site),
        "transcoder": lambda: Wiring.transcoder(shape, layer=_only_layer(config, shape), read=read),
        "per_layer": lambda: Wiring.per_layer(shape, read=read),
        "strictly_causal": lambda: Wiring.strictly_causal(shape, read=read),
        "weakly_causal": lambda: Wiring.weakly_causal(shape, site=site),
        "attention": lambda: _attention(config, shape),
        "acausal": lambda: Wiring.acausal(shape, site=site, layers=layers),
        "model_diffing": lambda: Wiring.model_diffing(shape, layer=_only_layer(config, shape), site=site),
    }
    if config.wiring not in makers:
        raise ValueError(f"unknown wiring {config.wiring!r}: expected one of {', '.join(makers)}")
    if config.layers is not None and config.wiring in WHOLE_DEPTH:
        raise ValueError(f"the wiring {config.wiring} covers every layer; layers={config.layers} does not apply")
    return makers[config.wiring]()


def _attention(config: CrosscoderConfig, shape: ModelShape) -> Wiring:
    if config.read not in (None, "attn_z"):
        raise ValueError(f"the wiring attention reads attn_z; read={config.read!r} does not apply")
    return Wiring.attention(shape)


def _only_layer(config: CrosscoderConfig, shape: ModelShape) -> int:
    layers = [shape.n_layers // 2] if config.layers is None else config.layers
    if len(layers) != 1:
        raise ValueError(f"the wiring {config.wiring} takes one layer, got {layers}")
    return layers[0]
