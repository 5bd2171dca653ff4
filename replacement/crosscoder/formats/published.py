"""A crosscoder as a file describes it: what it computes, and its weights, which are still in the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replacement.crosscoder.activation import Activation
from replacement.crosscoder.checks import finite_values, float_dtype
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.fingerprint import sampled_fingerprint
from replacement.crosscoder.formats.reference import Asked
from replacement.crosscoder.lorsa import Lorsa
from replacement.crosscoder.mapped_file import MappedFile, WeightsInFile
from replacement.crosscoder.query_keys import QueryKeys
from replacement.crosscoder.sites import Site
from replacement.crosscoder.weights_by_site import MATRICES
from replacement.crosscoder.wiring import Wiring
from replacement.memory import available_memory, size_text


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a layout's reader finds; `load` makes a `Crosscoder` of it."""

    layout: str
    """Name of the layout, such as `circuit-tracer-plt`."""
    path: Path
    """File or folder, for messages."""
    rule: str
    """The function in one line: where it reads, what it scales, how it chooses features, where its biases belong."""
    wiring: Wiring
    n_features: int
    activation: Activation
    tensors: Mapping[str, Tensor]
    """By the names of `Crosscoder.state_dict()`: views of the files wherever the layout allows."""
    decoders: Mapping[tuple[int, int], Tensor] = field(default_factory=dict)
    """Decoders `[F, D]` by (group, place among its written sites), where a layout keeps the sites apart; `W_dec.*` is then
    absent from `tensors`."""
    derived: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """What to make of small tensors of `tensors` where that takes a pass over whole matrices: done on loading, not before."""
    files: Sequence[MappedFile] = ()
    """What the tensors are views of."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Which file a tensor was taken from, for messages."""
    tied: bool = False
    skip: bool = False
    query_keys: QueryKeys | None = None
    """Sizes of queries and keys, which make it a `Lorsa`."""
    undecomposed_positions: int = 0
    model_name: str = ""
    model_fingerprint: str = ""
    base_name: str = ""
    base_fingerprint: str = ""
    input_scale: Mapping[Site, float] = field(default_factory=dict)
    """Weights of the file act on `scale * x`."""
    output_scale: Mapping[Site, float] = field(default_factory=dict)
    """Weights of the file give `scale * y`."""
    fingerprint: str = ""
    """Recorded digest of the weights; a sample of them is taken where it is empty."""
    whole_fingerprint: bool = False
    """Whether the digest is taken of every value, when it is asked for; if none is recorded."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the file says of itself besides, such as a training's settings or the number of active features."""
    verify: Callable[[], None] = lambda: None
    """Reads the whole content to find damage; called where the weights are read anyway."""

    @property
    def stored_dtype(self) -> torch.dtype:
        """Dtype of the first encoder in the file."""
        return self.tensors["W_enc.0"].dtype

    def load(self, *, dtype: torch.dtype, device: torch.device | str, lazy: bool | None) -> Crosscoder:
        """The crosscoder, in evaluation mode; see `checkpoint.load` for the arguments.

        Raises:
            ValueError: tensors that do not fit the description or are no finite floats, weights that do not fit memory, or a
                device that cannot be used.
        """
        crosscoder = self.described(dtype)
        expected = crosscoder.state_dict()
        self._check_shapes(expected)
        lazy = self._is_lazy(expected, dtype, device, lazy)
        kept = {}
        for name, value in self.tensors.items():
            float_dtype(f"{self._file(name)}: the dtype of the tensor {name}", value.dtype)
            if lazy and name.startswith(MATRICES):
                kept[name] = value
                continue
            kept[name] = self._copy(name, self.derived[name](value) if name in self.derived else value, dtype)
        if lazy:
            # What is in `decoders` stays without memory.
            kept |= {name: value for name, value in expected.items() if name not in kept}
        else:
            kept |= self._joined_decoders(expected, dtype)
            self.verify()
        crosscoder.load_state_dict(kept, assign=True)
        if lazy:
            crosscoder.in_file = WeightsInFile(self.files, self.decoders, self.input_scale, self.output_scale)
            crosscoder.requires_grad_(False)
            for bias_D, site in zip(crosscoder.b_dec, self.wiring.write_sites, strict=True):
                bias_D.div_(self.output_scale.get(site, 1.0))
        else:
            crosscoder.fold_input_scale(self.input_scale, self.output_scale)
            crosscoder = self._on_device(crosscoder, device)
        if recorded := self.known_fingerprint():
            crosscoder.fingerprint = recorded
        return crosscoder.eval()

    def described(self, dtype: torch.dtype = torch.float32) -> Crosscoder:
        """The crosscoder without memory for its tensors.

        Raises:
            ValueError: parts that do not fit together.
        """
        make = Crosscoder if self.query_keys is None else partial(Lorsa, query_keys=self.query_keys)
        with torch.device("meta"):
            return make(
                self.wiring,
                n_features=self.n_features,
                activation=self.activation,
                tied=self.tied,
                skip=self.skip,
                dtype=dtype,
                model_name=self.model_name,
                model_fingerprint=self.model_fingerprint,
                base_name=self.base_name,
                base_fingerprint=self.base_fingerprint,
                undecomposed_positions=self.undecomposed_positions,
            )

    def known_fingerprint(self) -> str:
        """The recorded digest, or one of a sample of the file's values; empty where every value is to be read for it."""
        if self.fingerprint or self.whole_fingerprint:
            return self.fingerprint
        named = {**self.tensors, **{f"W_dec.{group}.{place}": value for (group, place), value in self.decoders.items()}}
        scales = [
            [str(site), scale] for scales in (self.input_scale, self.output_scale) for site, scale in scales.items()
        ]
        derived = sorted(
            (name, make.__name__) for name, make in self.derived.items()
        )  # other values of the same tensors
        return sampled_fingerprint(named.items(), f"{self.described().settings()}{scales}{derived or ''}")

    def _check_shapes(self, expected: Mapping[str, Tensor]) -> None:
        in_parts = {name for name in expected if self.decoders and name.startswith("W_dec")}
        given = self.tensors.keys()
        for problem, names in (("lacks", expected.keys() - given - in_parts), ("has", given - expected.keys())):
            if names:
                verb = "the tensor" if problem == "lacks" else "an unexpected tensor"
                raise ValueError(
                    f"{self.path} {problem} {verb} {min(names)}, which does not agree with its configuration"
                )
        for name, value in self.tensors.items():
            if value.shape != expected[name].shape:
                shapes = f"expected {list(expected[name].shape)}, got {list(value.shape)}"
                raise ValueError(f"{self._file(name)}: the tensor {name} has the wrong shape: {shapes}")

    def _file(self, name: str) -> str:
        return self.sources.get(name, str(self.path))

    def _copy(self, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        """In aligned memory of its own, so that sums are the same as those of the crosscoder that was saved."""
        copy = torch.empty(value.shape, dtype=dtype).copy_(value)
        finite_values(f"{self._file(name)}: the tensor {name}", copy)
        self._release()
        return copy

    def _joined_decoders(self, expected: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        joined: dict[str, Tensor] = {}
        for (group, place), value in self.decoders.items():
            name = f"W_dec.{group}"
            joined.setdefault(name, torch.empty(expected[name].shape, dtype=dtype))[:, place].copy_(value)
            self._release()
        for name, value in joined.items():
            finite_values(f"{self._file(name)}: the tensor {name}", value)
        return joined

    def _release(self) -> None:
        for mapped in self.files:
            mapped.release()

    def _is_lazy(
        self, expected: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str, lazy: bool | None
    ) -> bool:
        """Whether to leave the weights in their file."""
        size = sum(value.numel() for value in expected.values()) * dtype.itemsize
        available, on_cpu = available_memory(), torch.device(device).type == "cpu"
        if lazy and not on_cpu:
            raise ValueError(
                f"cannot leave the weights of {self.path} in their file on the device {device}: only on cpu"
            )
        if lazy is None:
            return on_cpu and available is not None and size > available / 2
        if not lazy and on_cpu and available is not None and size > available:
            raise ValueError(
                f"{self.path}: the weights take {size_text(size)} in {str(dtype).removeprefix('torch.')}, and "
                f"{size_text(available)} of memory are free: load them with lazy=True, which leaves them in the file"
            )
        return lazy

    def _on_device(self, crosscoder: Crosscoder, device: torch.device | str) -> Crosscoder:
        try:
            return crosscoder.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"cannot load a crosscoder to the device {str(device)!r:.50}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to publish crosscoders."""

    name: str
    description: str
    detect: Callable[[Path], bool]
    """Whether a folder or file has this layout: reads no weights, and raises nothing."""
    read: Callable[[Path], Published]
    """Open it. Raises ValueError, naming the file, for whatever is wrong."""
    read_asked: Callable[[Path, Asked], Published] | None = None
    """The same with what a reference says of sites; None for layouts whose files say themselves what they read and write."""
    write: Callable[[Crosscoder, Path, torch.dtype], None] | None = None
    """Write a crosscoder into an empty folder in a dtype; None where nothing writes this layout.

    Raises ValueError, before anything is written, for whatever the layout cannot say.
    """
    holds_lorsa: bool = False
    """Whether the layout has a place for queries and keys (`Lorsa`)."""
