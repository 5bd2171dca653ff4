"""Folders of EleutherAI's sparsify and clt-training, opened: one folder per hookpoint with `cfg.json` and `sae.safetensors`.

Both projects write the same files; clt-training adds cross-layer transcoders and some of what `OFF` and `Coder` name. Read from
the sources of sparsify (commits 001d98e, 0faa4b5 and 7c2dd15), clt-training (047af6d) and their predecessor sae (00bbb22).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replacement.crosscoder.formats.single_layers import bias_for_shifted_input
from replacement.crosscoder.formats.tensor_files import Settings, TensorFile, listed, norm_scale
from replacement.crosscoder.sites import Site
from replacement.crosscoder.topk import TopK
from replacement.files import read_json

CONFIG_FILE = "cfg.json"
TENSOR_FILE = "sae.safetensors"
RUN_FILE = "config.json"
"""Settings of the whole training beside the hookpoints, where they were published, too."""
WRITTEN = {
    "": "resid_post",
    "mlp": "mlp_out",
    "feed_forward": "mlp_out",
    "attn": "attn_out",
    "self_attn": "attn_out",
    "attention": "attn_out",
    "self_attention": "attn_out",
}
"""Our site for the output of each submodule of a layer."""
NORMS_BEFORE_MLP = ("post_attention_layernorm", "pre_feedforward_layernorm", "ln_2")
"""Norms whose input is `resid_mid`. In Gemma 2 and 3 `post_attention_layernorm` lies elsewhere; the settings do not tell."""
EMBEDDINGS = ("embed_tokens", "wte", "embed_in")
OFF = {
    "signed": "keeps the largest magnitudes",
    "embed_skip": "adds a map from the embeddings",
    "gram_lookup": "subtracts a table of n-grams",
    "matching_pursuit": "encodes in several rounds",
    "slice_encoder": "encodes in several rounds",
    "slice_decoder": "encodes in several rounds",
    "secondary_target_tied": "decodes twice",
    "divide_cross_layer": "divides what lower layers write by their number",
    "topk_coalesced": "chooses other features for each written layer",
}
"""Settings that change the function in a way that a `Crosscoder` cannot say, and what they do."""
NO_ACTIVATIONS = {
    "groupmax": "one feature of every block of features is not supported",
    "batchtopk": "it chooses over a batch, and no threshold was recorded for use on single prompts",
}
HARMLESS = (
    "dtype",
    "normalize_decoder",
    "normalize_encoder",
    "multi_topk",
    "tp_output",
    "train_post_encoder",
    "use_fp8",
    "matryoshka",
    "matryoshka_expansion_factors",
    "matryoshka_k_values",
    "lookup_max_order",
    "gram_table_hash",
)
"""Settings of a training: weights are stored as they are used."""
_HOOKPOINT = re.compile(r"(?:[A-Za-z_]\w*\.)*?(?:layers|h|blocks)\.(\d{1,9})(?:\.(\w+))?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Coder:
    """What one hookpoint's folder says."""

    layer: int
    written: str
    """Kind of the site at the hookpoint."""
    file: TensorFile
    n_features: int
    width: int
    k: int
    transcode: bool
    skip: bool
    n_targets: int
    """Layers that it writes; 0 unless it was trained across layers."""
    n_sources: int
    coalesce_topk: str
    per_source_tied: bool
    normalize_io: bool
    post_encoder_scale: bool

    def encoder(self) -> Tensor:
        """Encoder `[F, D]`."""
        return self.file.take("encoder.weight", self.n_features, self.width)

    def encoder_bias(self, decoder_bias_D: Tensor | None = None) -> Tensor:
        """Encoder bias `[F]`, for an input from which a bias is subtracted: `b - W_enc b_dec`."""
        bias_F = self.file.take("encoder.bias", self.n_features)
        if decoder_bias_D is None:
            return bias_F
        return bias_for_shifted_input(self.encoder(), bias_F, decoder_bias_D, self.file.mapped)

    def scale(self, name: str) -> float:
        """`sqrt(D) / norm` for the mean norm of the inputs or outputs of its training; 1 where it was trained without."""
        return norm_scale(self.file, name, 1, width=self.width) if self.normalize_io else 1.0

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and offset `[F]` behind the activation function: `(a + post_enc) * post_enc_scale` where a is above 0.

        Raises:
            ValueError: they differ between written layers.
        """
        names = [("post_enc", "post_enc_scale")]
        if self.n_targets:
            names = [(f"post_encs.{index}", f"post_enc_scales.{index}") for index in range(self.n_targets)]
        found = []
        for offset_name, scale_name in names:
            offset_F = self.file.take_if_there(offset_name, self.n_features)
            scale_F = self.file.take(scale_name, self.n_features) if self.post_encoder_scale else None
            offset_F = torch.zeros(self.n_features) if offset_F is None else offset_F
            found.append((torch.ones(self.n_features) if scale_F is None else scale_F, offset_F))
        for (name, _), (scale_F, offset_F) in zip(names, found, strict=True):
            if not (torch.equal(scale_F, found[0][0]) and torch.equal(offset_F, found[0][1])):
                raise ValueError(
                    f"{self.file.path}: {name} or its scale differs from that of another written layer: activations that "
                    "depend on the layer they are written to are not supported"
                )
        scale_F, offset_F = found[0]
        return scale_F.double(), offset_F.double() * scale_F.double()


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the settings of a whole training say besides."""

    model_name: str = ""
    read: str = "mlp_in"
    """Site that transcoders read."""
    undecomposed_positions: int = 0
    """1 where the training left out BOS (`filter_bos`)."""


def hookpoints(folder: Path) -> list[Path]:
    """Folders of hookpoints: this folder itself, or those in it."""
    if not folder.is_dir():
        return []
    candidates = [folder] if (folder / CONFIG_FILE).is_file() else sorted(folder.iterdir())
    return [path for path in candidates if (path / CONFIG_FILE).is_file() or (path / TENSOR_FILE).is_file()]


def detect(folder: Path, *, cross_layer: bool) -> bool:
    """Whether a folder holds hookpoints, of transcoders that write several layers or of others."""
    paths = hookpoints(folder)
    if not any((path / TENSOR_FILE).is_file() for path in paths):
        return False
    return any(map(_is_cross_layer, paths)) == cross_layer


def _is_cross_layer(path: Path) -> bool:
    try:
        config = json.loads((path / CONFIG_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    targets = config.get("n_targets") if isinstance(config, dict) else 0
    return isinstance(targets, int) and targets > 0 and config.get("transcode") is True


def open_coders(folder: Path) -> tuple[list[Coder], list[str]]:
    """All hookpoints in the order of their layers, and the names of those at embeddings, which are left out.

    Raises:
        ValueError: names the file: hookpoints of several kinds or of an unknown one, settings that are not known, or sizes or
            parts that differ between hookpoints.
    """
    paths = {path.absolute().name: path for path in hookpoints(folder)}
    left_out = [name for name in paths if name.rpartition(".")[2] in EMBEDDINGS]
    coders = [_coder(path, name) for name, path in paths.items() if name not in left_out]
    if not coders:
        raise ValueError(f"{folder} holds no hookpoint of a layer: {listed(paths)}")
    coders.sort(key=lambda coder: coder.layer)
    for before, coder in itertools.pairwise(coders):
        if coder.layer == before.layer:
            raise ValueError(f"{folder} holds two hookpoints of layer {coder.layer}: expected one")
        for name in ("written", "width", "n_features", "transcode", "skip", "coalesce_topk"):
            given, expected = getattr(coder, name), getattr(before, name)
            if given != expected:
                beside = before.file.path.parent.name
                raise ValueError(f"{coder.file.path.parent}: {name} is {given!r}, that of {beside} is {expected!r}")
    return coders, left_out


def _coder(path: Path, name: str) -> Coder:
    layer, written = _site(path, name)
    settings = Settings(path / CONFIG_FILE)
    transcode = settings.take("transcode", bool, default=False)
    n_targets = settings.take("n_targets", int, default=0) if transcode else 0
    coalesce = settings.take("coalesce_topk", str, default="none")
    if coalesce not in ("none", "concat", "per-layer"):
        raise ValueError(f"{settings.path}: coalesce_topk: expected none, concat or per-layer, got {coalesce!r:.50}")
    across = {"secondary_target_tied", "divide_cross_layer", "topk_coalesced"}
    if n_targets and coalesce != "none":
        settings.take("topk_coalesced", bool)  # earlier versions chose again whenever layers were joined
    for option, effect in OFF.items():
        if settings.take(option, bool, default=False) and (n_targets or option not in across):
            raise ValueError(f"{settings.path}: {option} is not supported: it {effect}")
    if transcode and written != "mlp_out":
        raise ValueError(f"{settings.path}: transcoders of {name} are not supported: only those of an MLP")
    width = settings.take("d_in", int)
    n_latents, factor = settings.take("num_latents", int, default=0), settings.take("expansion_factor", int, default=32)
    coder = Coder(
        layer=layer,
        written=written,
        file=TensorFile(path / TENSOR_FILE),
        n_features=n_latents or width * factor,
        width=width,
        k=settings.take("k", int),
        transcode=transcode,
        skip=settings.take("skip_connection", bool, default=False),
        n_targets=n_targets,
        n_sources=settings.take("n_sources", int, default=0),
        coalesce_topk=coalesce if n_targets else "none",
        per_source_tied=settings.take("per_source_tied", bool, default=False),
        normalize_io=settings.take("normalize_io", bool, default=False),
        post_encoder_scale=settings.take("post_encoder_scale", bool, default=False),
    )
    activation = settings.take("activation", str, default="topk")
    settings.ignore("n_targets", *HARMLESS)
    settings.finish()
    if activation != "topk":
        why = NO_ACTIVATIONS.get(activation, "it is not known")
        raise ValueError(f"{settings.path}: activation: expected topk, got {activation!r:.50}: {why}")
    if not 1 <= coder.k <= coder.n_features:
        raise ValueError(f"{settings.path}: k: expected 1 to {coder.n_features} features, got {coder.k}")
    return coder


def _site(path: Path, name: str) -> tuple[int, str]:
    match = _HOOKPOINT.fullmatch(name)
    part = match.group(2) or "" if match is not None else ""
    if match is None or part not in WRITTEN:
        known = ", ".join(f"layers.N.{part}" if part else "layers.N" for part in WRITTEN)
        raise ValueError(f"{path}: the hookpoint {name!r:.80} is not supported: expected one such as {known}")
    return int(match.group(1)), WRITTEN[part]


def described(
    folder: Path, coders: Sequence[Coder], left_out: Sequence[str], read: str, run: Run, tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What `Published` needs but for the name, rule, wiring, decoders and sources.

    Args:
        read: kind of the sites that are read.
        tensors: all that the layout takes of the files; those of the activation function are added.

    Raises:
        ValueError: a file holds tensors that nothing took.
    """
    counts = tuple(coder.k for coder in coders)
    scale_GF, offset_GF = (torch.stack(column) for column in zip(*(coder.affine() for coder in coders), strict=True))
    is_affine = bool((scale_GF != 1).any()) or bool((offset_GF != 0).any())
    input_scale = {Site(coder.layer, read): coder.scale("in_norm") for coder in coders}
    output_scale = {Site(coder.layer, coder.written): coder.scale("out_norm") for coder in coders}
    for coder in coders:
        coder.file.finish()
    return {
        "path": folder,
        "n_features": coders[0].n_features,
        "activation": TopK(counts[0] if len(set(counts)) == 1 else counts, affine=is_affine),
        "tensors": {**tensors, **({"post_scale": scale_GF, "post_offset": offset_GF} if is_affine else {})},
        "files": [coder.file.mapped for coder in coders],
        "skip": coders[0].skip,
        "undecomposed_positions": run.undecomposed_positions,
        "model_name": run.model_name,
        "input_scale": {site: scale for site, scale in input_scale.items() if scale != 1.0},
        "output_scale": {site: scale for site, scale in output_scale.items() if scale != 1.0},
        "facts": {"l0": sum(counts) / len(counts), **({"left out": ", ".join(left_out)} if left_out else {})},
    }


def run_of(folder: Path, coders: Sequence[Coder]) -> Run:
    """The training's settings beside the hookpoints, where there are any; `hookpoints_in` names modules whose input is read.

    Raises:
        ValueError: inputs of another kind than a norm in front of an MLP, or the MLP itself.
    """
    path = folder / RUN_FILE
    config = read_json(path) if path.is_file() else None
    if not isinstance(config, dict) or "hookpoints" not in config:
        return Run()
    given = config.get("hookpoints_in") or []
    kinds, layers = set(), set()
    for name in given if isinstance(given, list) else [given]:
        match = _HOOKPOINT.fullmatch(str(name))
        part = match.group(2) if match is not None else None
        if match is None or part not in (*NORMS_BEFORE_MLP, "mlp"):
            expected = ", ".join(("mlp", *NORMS_BEFORE_MLP))
            raise ValueError(f"{path}: hookpoints_in: expected one of {expected} of a layer, got {name!r:.80}")
        kinds.add("mlp_in" if part == "mlp" else "resid_mid")
        layers.add(int(match.group(1)))
    if given and (len(kinds) > 1 or not {coder.layer for coder in coders} <= layers):
        raise ValueError(
            f"{path}: hookpoints_in: expected one kind of input for every layer, got {listed(map(str, given))}"
        )
    name = config.get("model")
    return Run(
        model_name=name if isinstance(name, str) else "",
        read=kinds.pop() if kinds else "mlp_in",
        undecomposed_positions=int(config.get("filter_bos") is True),
    )
