"""From the settings of a run to its parts: language models, crosscoder, source of tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from replacement.crosscoder import checkpoint
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.families import ADAPTERS, WHOLE_DEPTH
from replacement.crosscoder.lorsa import Lorsa
from replacement.crosscoder.query_keys import QueryKeys
from replacement.crosscoder.sites import ModelShape, Site
from replacement.crosscoder.wiring import Wiring
from replacement.data.aligned_texts import Aligned, TextReader, tokenizer_numbers
from replacement.data.documents import special_ids
from replacement.data.open_tokens import MAX_CONTEXT, open_source
from replacement.data.token_sources import TokenSource
from replacement.language_model.language_model import LanguageModel
from replacement.loading import ARTIFACTS, crosscoder_folder
from replacement.training.config import STARTS, CrosscoderConfig, DataConfig
from replacement.training.head_start import check_can_begin, query_keys_like

FEATURES_PER_DIMENSION = 16
"""Features per group and dimension of the residual stream where the settings do not say."""


@dataclass(slots=True)
class Models:
    """The language models of a run: one, or those that a model-diffing crosscoder spans, of any shapes and tokenizers."""

    all: tuple[LanguageModel, ...]
    tokenizers: tuple[int, ...] = field(init=False)
    """Which tokenizer each model reads text with, counted from 0 as they appear."""

    def __post_init__(self) -> None:
        self.tokenizers = tokenizer_numbers(self.all)

    @property
    def first(self) -> LanguageModel:
        """The model whose tokens positions are counted in."""
        return self.all[0]

    @property
    def only(self) -> LanguageModel | None:
        """The model into which a crosscoder can be spliced; None for several."""
        return self.first if len(self.all) == 1 else None

    @property
    def loaded(self) -> tuple[LanguageModel, ...]:
        """Every model that the settings name: these, and the base model of an adapter's."""
        return tuple(lm for model in self.all for lm in (model, model.base) if lm is not None)

    @property
    def shapes(self) -> tuple[ModelShape, ...]:
        """Sizes of every model."""
        return tuple(lm.shape for lm in self.all)

    @property
    def fingerprint(self) -> str:
        """Digest of the weights of every model."""
        return "+".join(model.fingerprint for model in self.loaded)

    def read(self, rows: Tensor | Sequence[Aligned], sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Activations `[R, T, D]` at sites, from one forward pass of each model.

        Args:
            rows: tokens `[R, T]`, or the same texts in the tokens of each tokenizer. T counts those of the first; what is read
                of another tokenizer's model is the activation of the token's counterpart, of any token where it has none.
        """
        parts = [Aligned(rows)] if isinstance(rows, Tensor) else rows
        acts: dict[Site, Tensor] = {}
        for number in sorted({site.model for site in sites}):
            wanted = {Site(site.layer, site.kind): site for site in sites if site.model == number}
            if number >= len(self.all):
                raise ValueError(f"{len(self.all)} models are too few to read {next(iter(wanted.values()))}")
            model, (tokens_RT, place_RT) = self.all[number], parts[self.tokenizers[number]]
            read = model.read(tokens_RT.to(model.device), list(wanted))
            if place_RT is not None and self.tokenizers[number]:
                row_R1 = torch.arange(len(place_RT), device=model.device)[:, None]
                place_RT = place_RT.clamp(min=0).to(model.device)
                read = {site: x_RTD[row_R1, place_RT] for site, x_RTD in read.items()}
            acts |= {wanted[site]: x_RTD for site, x_RTD in read.items()}
        return acts


def load_models(names: str | Sequence[str], *, wiring: str = "", device: str = "cpu") -> Models:
    """Load one model, or several for model diffing; `demo` is the one that ships with the project.

    Args:
        wiring: family of the crosscoder. For an adapter the two models become one: the first, with the second as its base.

    Raises:
        ValueError: no model, one that cannot be loaded or is named twice, models whose texts cannot be aligned (with several
            tokenizers, each must say where in a text its tokens end), or models that an adapter cannot be trained on.
    """
    given = [names] if isinstance(names, str) else list(names)
    if not given:
        raise ValueError("expected one model, or several for model diffing; got none")
    places = [name if name == "demo" else os.path.realpath(name) for name in given]
    if wiring in ADAPTERS and len(given) != 2:
        raise ValueError(f'the wiring {wiring} needs two models, model = ["fine_tuned", "base"]; got {len(given)}')
    if twice := [name for name, place in zip(given, places, strict=True) if places.count(place) > 1]:
        raise ValueError(f"the model {twice[0]} is named twice: expected different models")
    first, *others = (_load(name, device) for name in given)
    models = Models((first.with_base(others[0]),) if wiring in ADAPTERS else (first, *others))
    if max(models.tokenizers):
        for lm in models.all:
            TextReader.of(lm, lm.context_length)
    return models


def _load(name: str, device: str) -> LanguageModel:
    if name != "demo":
        return LanguageModel.from_pretrained(name, device=device)
    lm = LanguageModel.from_pretrained(ARTIFACTS / "language_model", device=device)
    lm.name = "demo"
    return lm


def open_tokens(config: DataConfig, models: Models, *, default_context: int = MAX_CONTEXT) -> TokenSource:
    """The source of tokens that the settings name; see `open_source`."""
    return open_source(
        config.source,
        models.first,
        others=models.all[1:],
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
    wiring = build_wiring(config, models.shapes)
    if wiring.writes_differences:
        _check_changed(wiring, lm)
    undecomposed = config.undecomposed_positions
    if undecomposed is None:
        special = special_ids(lm)
        undecomposed = int(all(int(token) in special for token in rows_RT[:, 0]))
    make = Crosscoder if wiring.name != "lorsa" else partial(Lorsa, query_keys=_query_keys(config, lm))
    crosscoder = make(
        wiring,
        n_features=config.n_features or FEATURES_PER_DIMENSION * max(shape.d_model for shape in models.shapes),
        activation=config.activation,
        tied=config.tied,
        skip=config.skip,
        model_name=lm.name,
        model_fingerprint=lm.fingerprint,
        base_name="" if lm.base is None else lm.base.name,
        base_fingerprint="" if lm.base is None else lm.base.fingerprint,
        undecomposed_positions=undecomposed,
        seed=seed,
    )
    if isinstance(crosscoder, Lorsa) and config.start == "heads":
        check_can_begin(crosscoder, lm)
    if config.start not in STARTS:
        trained = checkpoint.load(crosscoder_folder(config.start))
        mine, theirs = crosscoder.settings(), trained.settings()
        if differing := [name for name, value in mine.items() if theirs.get(name) != value]:
            raise ValueError(
                f"start: the crosscoder in {config.start} has another {differing[0]} than the settings say"
            )
        crosscoder.load_state_dict(trained.state_dict())
    return crosscoder


def build_wiring(config: CrosscoderConfig, shapes: Sequence[ModelShape]) -> Wiring:
    """The wiring that the settings name.

    Args:
        shapes: of every model of the run.

    Raises:
        ValueError: an unknown family or site, layers that are missing, unwanted or not in the model, or a family that takes
            another number of models.
    """
    shape = shapes[0]
    site, read, layers = config.read or "resid_post", config.read, config.layers
    makers: dict[str, Callable[[], Wiring]] = {
        "autoencoder": lambda: Wiring.autoencoder(shape, layers=layers, site=site),
        "transcoder": lambda: Wiring.transcoder(shape, layer=_only_layer(config, shape), read=read),
        "per_layer": lambda: Wiring.per_layer(shape, read=read),
        "strictly_causal": lambda: Wiring.strictly_causal(shape, read=read),
        "weakly_causal": lambda: Wiring.weakly_causal(shape, site=site),
        "attention": lambda: _attention(config, shape),
        "joint": lambda: Wiring.joint(shape, read=read),
        "lorsa": lambda: _lorsa(config, shape),
        "adapter": lambda: Wiring.adapter(shape, read=read, layers=layers),
        "cross_layer_adapter": lambda: Wiring.adapter(shape, read=read, layers=layers, cross_layer=True),
        "acausal": lambda: Wiring.acausal(shape, site=site, layers=layers),
        "model_diffing": lambda: _model_diffing(config, shapes, site),
    }
    if config.wiring not in makers:
        raise ValueError(f"unknown wiring {config.wiring!r}: expected one of {', '.join(makers)}")
    if config.layers is not None and config.wiring in WHOLE_DEPTH:
        raise ValueError(f"the wiring {config.wiring} covers every layer; layers={config.layers} does not apply")
    if config.wiring != "model_diffing" and len(shapes) > 1:
        raise ValueError(f"the wiring {config.wiring} takes one model, {len(shapes)} were given")
    return makers[config.wiring]()


def _check_changed(wiring: Wiring, lm: LanguageModel) -> None:
    written = {site.layer for site in wiring.write_sites}
    if same := sorted(written - lm.base_mlps.keys()):
        raise ValueError(
            f"the MLP of layer {same[0]} is the same in both models, an adapter has nothing to learn there: set "
            f"crosscoder.layers={sorted(written & lm.base_mlps.keys())}"
        )


def _model_diffing(config: CrosscoderConfig, shapes: Sequence[ModelShape], site: str) -> Wiring:
    if len(shapes) < 2:
        raise ValueError('model diffing needs two models or more: model = ["first", "second"]')
    layers = config.layers or [shape.n_layers // 2 for shape in shapes]
    return Wiring.model_diffing(shapes, layer=layers[0] if len(layers) == 1 else layers, site=site)


def _attention(config: CrosscoderConfig, shape: ModelShape) -> Wiring:
    if config.read not in (None, "attn_z"):
        raise ValueError(f"the wiring attention reads attn_z; read={config.read!r} does not apply")
    return Wiring.attention(shape)


def _lorsa(config: CrosscoderConfig, shape: ModelShape) -> Wiring:
    if config.read not in (None, "attn_in"):
        raise ValueError(f"the wiring lorsa reads attn_in; read={config.read!r} does not apply")
    return Wiring.lorsa(shape)


def _query_keys(config: CrosscoderConfig, lm: LanguageModel) -> QueryKeys:
    """Queries and keys as the settings say, otherwise like those of the model's heads."""
    n_groups, width = config.query_key_groups or 4 * lm.shape.n_heads, config.query_key_width or lm.shape.d_head
    return query_keys_like(lm, n_groups=n_groups, width=width)


def _only_layer(config: CrosscoderConfig, shape: ModelShape) -> int:
    layers = [shape.n_layers // 2] if config.layers is None else config.layers
    if len(layers) != 1:
        raise ValueError(f"the wiring {config.wiring} takes one layer, got {layers}")
    return layers[0]
