"""The parameters of a crosscoder: allocation, initial values, copies, fingerprint and checks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from replacement.crosscoder.activation import Activation
from replacement.crosscoder.checks import finite_values, float_dtype
from replacement.crosscoder.fingerprint import fingerprint, legacy_fingerprint
from replacement.crosscoder.topk import TopK
from replacement.crosscoder.weights_by_site import MATRICES, WeightsBySite
from replacement.crosscoder.wiring import Wiring
from replacement.number_checks import whole_number

Kind = TypeVar("Kind", bound="CrosscoderWeights")


class CrosscoderWeights(WeightsBySite):
    """Parameters of a crosscoder; `Crosscoder` adds what is computed with them.

    Args:
        wiring: which sites each group reads and writes.
        n_features: features per group F.
        activation: `TopK`, `BatchTopK`, `ReLU` or `JumpReLU`.
        tied: one decoder per written site, shared by every group that writes it (decoders tied per target): feature i
            of all groups then writes one common vector at a site, and decoders grow with L instead of L^2.
        skip: add a linear map from each read to each written site of a group (Paulo et al. 2025, skip transcoders).
        model_name: name of the language model this crosscoder belongs to.
        model_fingerprint: digest of that model's weights (`LanguageModel.fingerprint`), checked on use.
        base_name, base_fingerprint: of an adapter, the same of the base model.
        undecomposed_positions: the first n positions of a prompt have no features (the beginning-of-sequence token has
            unusual MLP outputs); their output is left to the error term.
        seed: seed of the initial weights; None draws from torch's global generator.

    Parameters (`x @ W.T` maps rows): `W_enc[n]` `[F, D_r]`, `b_enc[g]` `[F]`, `W_dec[p]` `[F, W, D_w]` or, tied,
    `W_dec[w]` `[F, D_w]`, `b_dec[w]` `[D_w]`, `W_skip[m]` `[D_w, D_r]`; n counts (group,
    read) pairs, m (group, read, write) triples, p `wiring.write_blocks` (one per group where all it writes has one width), w
    `wiring.write_sites`. Where the activation has them: `threshold`, and the
    buffers `score_factor`, `post_scale` and `post_offset`, `[G, F]`.

    Raises:
        ValueError: an argument of another kind, `n_features` below 1 or too large for the memory, fewer features than the
            activation keeps, or a negative number of positions.
    """

    ARGUMENTS: ClassVar[tuple[str, ...]] = (
        "n_features",
        "activation",
        "tied",
        "skip",
        "dtype",
        "model_name",
        "model_fingerprint",
        "base_name",
        "base_fingerprint",
        "undecomposed_positions",
    )
    """Arguments besides the wiring; each is an attribute, too."""
    score_factor: Tensor | None
    post_scale: Tensor | None
    post_offset: Tensor | None

    def __init__(
        self,
        wiring: Wiring,
        *,
        n_features: int,
        activation: Activation = TopK(16),  # noqa: B008 - a frozen value
        tied: bool = False,
        skip: bool = False,
        dtype: torch.dtype = torch.float32,
        model_name: str = "",
        model_fingerprint: str = "",
        base_name: str = "",
        base_fingerprint: str = "",
        undecomposed_positions: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        kinds = {
            "wiring": (wiring, Wiring),
            "activation": (activation, Activation),
            "tied": (tied, bool),
            "skip": (skip, bool),
            "model_name": (model_name, str),
            "model_fingerprint": (model_fingerprint, str),
            "base_name": (base_name, str),
            "base_fingerprint": (base_fingerprint, str),
        }
        for name, (value, kind) in kinds.items():
            if not isinstance(value, kind):
                raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r:.50}")
        self.wiring, self.activation, self.tied, self.skip = wiring, activation, tied, skip
        self.model_name, self.model_fingerprint = model_name, model_fingerprint
        self.base_name, self.base_fingerprint = base_name, base_fingerprint
        float_dtype("the dtype of a crosscoder", dtype)
        self.n_features = whole_number("n_features", n_features, least=1)
        self.undecomposed_positions = whole_number("undecomposed_positions", undecomposed_positions)
        activation.check_fits(wiring.n_groups, self.n_features)
        self._fingerprint: tuple[object, str] = (None, "")
        self.in_file = None
        try:
            self._allocate(dtype)
        except (RuntimeError, MemoryError) as error:
            reason = str(error).splitlines()[0][:200]
            raise ValueError(f"no memory for {wiring.n_groups} groups of {n_features} features: {reason}") from error
        self.initialise(seed)

    def _allocate(self, dtype: torch.dtype) -> None:
        wiring, n_features = self.wiring, self.n_features

        def weights(*shapes: tuple[int, ...]) -> nn.ParameterList:
            return nn.ParameterList(nn.Parameter(torch.empty(shape, dtype=dtype)) for shape in shapes)

        reads, writes = ([[wiring.width(s) for s in sites] for sites in side] for side in (wiring.reads, wiring.writes))
        target_widths = [wiring.width(site) for site in wiring.write_sites]
        self.W_enc = weights(*((n_features, d) for widths in reads for d in widths))
        self.b_enc = weights(*((n_features,) for _ in reads))
        if self.tied:
            self.W_dec = weights(*((n_features, d) for d in target_widths))
        else:
            blocks = wiring.write_blocks
            self.W_dec = weights(*((n_features, len(sites), wiring.width(sites[0])) for _, sites in blocks))
        self.b_dec = weights(*((d,) for d in target_widths))
        if self.skip:
            self.W_skip = weights(*((d_w, d_r) for r, w in zip(reads, writes, strict=True) for d_r in r for d_w in w))
        threshold = self.activation.initial_threshold(wiring.n_groups, n_features)
        if threshold is not None and self.activation.learns_threshold:
            self.threshold: Tensor | None = nn.Parameter(threshold.to(dtype))
        else:
            self.register_buffer("threshold", None if threshold is None else threshold.to(dtype))
        for name, initial in self.activation.initial_buffers(wiring.n_groups, n_features).items():
            self.register_buffer(name, None if initial is None else initial.to(dtype))

    @torch.no_grad()
    def initialise(self, seed: int | None, *, part: int = 0, n_parts: int = 1) -> None:
        """Encoder uniform in +-1/sqrt(D), so that unit-variance inputs give pre-activations of order 1; decoders zero.

        A decoder that starts at zero begins at the mean prediction and leaves fewest features dead. Measured on a
        synthetic CLT after 600 steps (unexplained variance, dead of 1536): zero 0.446, 49; uniform 0.590, 202;
        transposed encoder 0.661, 302; zero without the centred encoder bias of `train` 0.463, 78.

        Args:
            part, n_parts: this crosscoder holds the features of part `part` out of `n_parts` equal parts of a larger one,
                and starts with the weights they have there.
        """
        generator = None if seed is None else torch.Generator().manual_seed(whole_number("seed", seed))
        if self.device.type == "meta":
            return
        for parameter in self.parameters():
            parameter.zero_()
        threshold = self.activation.initial_threshold(self.n_groups, self.n_features)
        if threshold is not None and self.threshold is not None:
            self.threshold.copy_(threshold)
        for group in range(self.n_groups):
            weights = self.encoders(group)
            width = sum(weight_FD.shape[1] for weight_FD in weights)
            for weight_FD in weights:
                shape = (n_parts * self.n_features, weight_FD.shape[1])
                whole_FD = torch.empty(shape, dtype=self.dtype, device="cpu")
                whole_FD.uniform_(-(width**-0.5), width**-0.5, generator=generator)
                weight_FD.copy_(whole_FD.chunk(n_parts)[part])

    @classmethod
    def like(
        cls: type[Kind],
        other: CrosscoderWeights,
        *,
        n_features: int | None = None,
        activation: Activation | None = None,
        device: torch.device | str | None = None,
    ) -> Kind:
        """A crosscoder with the settings of another one, apart from the changes given; its tensors are left uninitialised.

        Raises:
            ValueError: the activation keeps more features than there are.
        """
        made = cls._without_memory(other, n_features=n_features, activation=activation)
        made.to_empty(device=other.device if device is None else device)
        return made.train(other.training)

    @classmethod
    def _without_memory(cls: type[Kind], other: CrosscoderWeights, **changes: Any) -> Kind:
        """A crosscoder on the meta device with the arguments of another one, apart from the changes that are not None."""
        arguments = {name: getattr(other, name) for name in ("wiring", *cls.ARGUMENTS)}
        arguments |= {name: value for name, value in changes.items() if value is not None}
        with torch.device("meta"):
            return cls(**arguments)

    def to_inference(
        self: Kind,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        wiring: Wiring | None = None,
    ) -> Kind:
        """A frozen copy in evaluation mode, for splicing into a model; this crosscoder is left as it is.

        Tensors that already have the dtype and device (by default those of this crosscoder) are shared, not copied: the
        copy then takes no memory, and follows later changes of these weights in place. So are 16-bit matrices where 32 bits
        or more are asked for, and matrices that stay in their file: they are raised piece by piece when they are used.

        Args:
            wiring: the same sites under other names, such as `Wiring.as_outputs`.
        """
        dtype = self.dtype if dtype is None else dtype
        tensors = {
            name: value.detach().to(device=device, dtype=None if self._stays(name, value, dtype) else dtype)
            for name, value in self.state_dict().items()
        }
        made = self._without_memory(self, dtype=dtype, wiring=wiring)
        made.load_state_dict(tensors, assign=True)
        made.in_file = self.in_file
        if self._fingerprint[0] == self._state():
            made._fingerprint = (made._state(), self._fingerprint[1])
        return made.eval().requires_grad_(False)

    def _stays(self, name: str, value: Tensor, dtype: torch.dtype) -> bool:
        """Whether a tensor keeps its dtype where the crosscoder is to compute in another one."""
        return name.startswith(MATRICES) and (self.in_file is not None or value.dtype.itemsize < min(4, dtype.itemsize))

    @property
    def fingerprint(self) -> str:
        """Digest of all that decides what this crosscoder computes: settings, weights and thresholds.

        Equal for every dtype from bfloat16 on that the weights are loaded in; see `fingerprint.fingerprint`. It is
        computed again only after a change that autograd could see (not through `.data`).
        """
        state = self._state()
        if state is None or self._fingerprint[0] != state:
            settings = json.dumps(self.settings(), sort_keys=True)
            self._fingerprint = (state, fingerprint(self._one_by_one(), settings))
        return self._fingerprint[1]

    @fingerprint.setter
    def fingerprint(self, recorded: str) -> None:
        """The digest of these weights is known already, from the file that holds them."""
        self._fingerprint = (self._state(), recorded)

    def _one_by_one(self) -> Iterator[tuple[str, Tensor]]:
        for named in self.state_dict().items():
            yield named
            self.release()

    def _state(self) -> object:
        """Differs after every change that autograd could see; None where torch does not count changes."""
        tensors = self.state_dict().values()
        if any(value.is_inference() for value in tensors):
            return None
        settings = json.dumps(self.settings(), sort_keys=True)
        return settings, [(value.data_ptr(), value._version) for value in tensors]

    @property
    def legacy_fingerprint(self) -> str:
        """What `fingerprint` was in earlier versions, for comparison with their graphs: a sample of the parameters alone."""
        return legacy_fingerprint(self.named_parameters())

    def settings(self) -> dict[str, Any]:
        """What decides the function besides the tensors, as plain JSON values."""
        return {
            "wiring": self.wiring.to_dict(),
            "n_features": self.n_features,
            "activation": self.activation.to_dict(),
            "tied": self.tied,
            "skip": self.skip,
            "undecomposed_positions": self.undecomposed_positions,
        }

    def check_finite(self) -> None:
        """Check every weight for NaN, infinity and magnitudes above 1e18, whose squares do not fit float32.

        Raises:
            ValueError: names the first such tensor, or gives a score factor below 0.
        """
        for name, value in self.state_dict().items():
            if self.in_file is None or not name.startswith(
                MATRICES
            ):  # they are not read for this: activations are checked
                finite_values(f"the tensor {name}", value)
        if self.score_factor is not None and bool((self.score_factor < 0).any()):
            raise ValueError(f"score factors must be 0 or more, got {float(self.score_factor.min())}")
