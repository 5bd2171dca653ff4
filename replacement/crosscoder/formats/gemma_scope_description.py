"""What surrounds a file of Gemma Scope and says where it reads and writes: a reference, a configuration, names in its path."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from replacement.crosscoder.formats.hooks import MODULES
from replacement.crosscoder.formats.reference import Asked
from replacement.crosscoder.formats.tensor_files import Settings
from replacement.crosscoder.sites import Site

SUFFIX = ".safetensors"
NAMES = (
    (r"gemma-scope-\d+b-\w+-transcoders", "mlp_normalized", "mlp_out"),
    (r"gemma-scope-\d+b-\w+-res", "resid_post", "resid_post"),
    (r"gemma-scope-\d+b-\w+-mlp", "mlp_out", "mlp_out"),
    (r"gemma-scope-\d+b-\w+-att", "attn_z", "attn_z"),
    (r"transcoder(_all)?|clt", "mlp_in", "mlp_out"),
    (r"(resid_post(_all)?|crosscoder)", "resid_post", "resid_post"),
    (r"mlp_out(_all)?", "mlp_out", "mlp_out"),
    (r"attn_out(_all)?", "attn_z", "attn_z"),
)
"""A part of the path (on the hub's cache, the repository is one), what is read, and what is written."""
_POINT = re.compile(r"model\.(?:language_model\.)?layers\.(\d+|\{all\}|\{\d+(?:,\s*\d+)*\})\.(.+)")
_MODEL = re.compile(r"gemma-scope-(2-)?(\d+[bm])-(pt|it)")


class Description:
    """What a file's surroundings say of it."""

    def __init__(
        self, path: Path, read: str, write: str, layers: Sequence[int], *, affine: bool | None, facts: dict[str, Any]
    ) -> None:
        self.path, self.layers, self.affine, self.facts = path, layers, affine, facts
        self.layer = layers[0]
        self.read, self.write = Site(self.layer, read), Site(self.layer, write)
        match = next((match for part in reversed(path.parts) if (match := _MODEL.search(part))), None)
        named = "" if match is None else f"google/gemma-{'3' if match[1] else '2'}-{match[2]}-{match[3]}"
        self.model_name: str = facts.pop("model_name", "") or named.removesuffix(
            "-pt" if match and not match[1] else ""
        )

    @classmethod
    def of(cls, path: Path, asked: Asked, *, n_layers: int | None = None) -> Description:
        config = path.parent / "config.json"
        if config.is_file() and path.suffix == SUFFIX and not asked:
            return cls._configured(path, Settings(config), n_layers)
        named = next(
            (
                (read, write)
                for part in reversed(path.parts)
                for name, read, write in NAMES
                if re.fullmatch(name, _repo(part))
            ),
            (None, None),
        )
        layers = asked.layers or _layers_of(path, n_layers)
        read, write = asked.read or named[0], asked.write or asked.read or named[1]
        asked.require(path, read=read, write=write, layer=layers or None)
        assert read is not None
        assert write is not None
        return cls(path, read, write, layers, affine=None, facts={})

    @classmethod
    def _configured(cls, path: Path, settings: Settings, n_layers: int | None) -> Description:
        architecture = settings.take("architecture", str)
        if architecture != "jump_relu":
            raise ValueError(f"{settings.path}: architecture: expected jump_relu, got {architecture!r:.50}")
        layers, read = _point(settings, "hf_hook_point_in", n_layers)
        written, write = _point(settings, "hf_hook_point_out", n_layers, default=settings.take("hf_hook_point_in", str))
        if layers != written or len(layers) != (n_layers or 1):
            raise ValueError(
                f"{settings.path}: expected {n_layers or 1} layers that are read and written, got {layers} and {written}"
            )
        facts = {
            "type": settings.take("type", str, default=""),
            "l0": settings.take("l0", (int, float), default=None),
            "model_name": settings.take("model_name", str, default=""),
        }
        affine = settings.take("affine_connection", bool, default=None)
        settings.ignore("width")
        settings.finish()
        return cls(path, read, write, layers, affine=affine, facts={k: v for k, v in facts.items() if v})

    def check_skip(self, has_skip: bool) -> None:
        """Compare with what the configuration says."""
        if self.affine is not None and self.affine != has_skip:
            given = "has one" if has_skip else "has none"
            raise ValueError(f"{self.path} {given}, but its config.json says affine_connection {self.affine}")


def _repo(part: str) -> str:
    """A folder's name; of the hub's cache, the repository's."""
    return part.rpartition("--")[2] if part.startswith("models--") else part


def _layers_of(path: Path, n_layers: int | None) -> list[int]:
    if n_layers is not None and path.parent.parent.name == "clt":
        return list(range(n_layers))
    match = next(
        (m for part in reversed(path.parts[:-1]) if (m := re.match(r"layer_(\d+(?:_\d+)*)(?:_|$)", part))), None
    )
    layers = [] if match is None else [int(number) for number in match[1].split("_")]
    return layers if len(layers) == (n_layers or 1) else []


def _point(settings: Settings, entry: str, n_layers: int | None, **options: Any) -> tuple[list[int], str]:
    point = settings.take(entry, str, **options)
    match = _POINT.fullmatch(point)
    if match is None or match[2] not in MODULES:
        raise ValueError(
            f"{settings.path}: {entry}: expected model.layers.N. and one of {', '.join(MODULES)}, got {point!r:.80}"
        )
    if match[1] == "{all}":
        return list(range(n_layers or 1)), MODULES[match[2]]
    return [int(number) for number in match[1].strip("{}").split(",")], MODULES[match[2]]
