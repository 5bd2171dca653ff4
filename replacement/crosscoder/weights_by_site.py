"""The weights of a crosscoder by group and site: as they are stored, raised to the dtype that is computed in, and scaled.

Weights may stay in their files (`in_file`), have fewer bits than is computed in, or act on scaled inputs; everybody who takes
them through these methods need not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from replacement.crosscoder.checks import indices
from replacement.crosscoder.mapped_file import WeightsInFile
from replacement.crosscoder.sites import Site
from replacement.crosscoder.wiring import Wiring
from replacement.number_checks import number

MATRICES = ("W_enc", "W_dec", "W_skip")
"""Names of the large tensors. They may have fewer bits than `dtype`: what is used of them is then raised to it."""


class WeightsBySite(nn.Module):
    """Access to parameters that `CrosscoderWeights` allocates and describes."""

    wiring: Wiring
    n_features: int
    tied: bool
    skip: bool
    W_enc: nn.ParameterList
    b_enc: nn.ParameterList
    W_dec: nn.ParameterList
    b_dec: nn.ParameterList
    W_skip: nn.ParameterList
    in_file: WeightsInFile | None
    """The files that matrices are views of, where only what is used is read; None for weights in memory."""

    @property
    def n_groups(self) -> int:
        """Number of feature groups G."""
        return self.wiring.n_groups

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that this crosscoder computes in, and that of its biases and thresholds."""
        return self.b_dec[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.b_dec[0].device

    def encoders(self, group: int) -> list[Tensor]:
        """Encoders `[F, D]` of a group, one per read site, as they are stored.

        Raises:
            ValueError: no such group.
        """
        self._check_group(group)
        first = sum(map(len, self.wiring.reads[:group]))
        return list(self.W_enc[first : first + len(self.wiring.reads[group])])

    def encoder(self, group: int, site: Site) -> Float[Tensor, "F D"]:
        """Encoder `[F, D]` of a group at one of its read sites.

        Raises:
            ValueError: the group does not read the site.
        """
        return self._scaled(self.encoders(group)[self._place(group, "read", site)], read=site)

    def encoder_vectors(self, group: int, index_S: Int[Tensor, " S"], site: Site) -> Float[Tensor, "S D"]:
        """Encoder vectors `[S, D]` of chosen features at one read site; reads these rows only.

        Raises:
            ValueError: the group does not read the site, or indices that are no int64 numbers from 0 to F - 1.
        """
        indices("the feature indices", index_S, self.n_features)
        return self._scaled(self.encoders(group)[self._place(group, "read", site)][index_S], read=site)

    def decoder(self, group: int, site: Site) -> Float[Tensor, "F D"]:
        """Decoder `[F, D]` of a group to one of its written sites (a view).

        Raises:
            ValueError: the group does not write the site.
        """
        return self._scaled(self._decoder(group, site), write=site)

    def _scaled(self, weight: Tensor, *, read: Site | None = None, write: Site | None = None) -> Tensor:
        """Stored weights in the dtype that is computed in, with the scales that are left to apply to them in their file."""
        weight = weight.to(self.dtype)
        if self.in_file is None:
            return weight
        scale = self.in_file.input_scale.get(read, 1.0) if read is not None else 1.0
        scale /= self.in_file.output_scale.get(write, 1.0) if write is not None else 1.0
        return weight if scale == 1.0 else weight * scale

    def _decoder(self, group: int, site: Site) -> Tensor:
        place = self._place(group, "write", site)
        if self.in_file is not None and (group, place) in self.in_file.decoders:
            return self.in_file.decoders[group, place]
        if self.tied:
            return self.W_dec[self.wiring.write_sites.index(site)]
        number, place = self._stored_places[group, site]
        return self.W_dec[number][:, place]

    @cached_property
    def _stored_places(self) -> dict[tuple[int, Site], tuple[int, int]]:
        """Where the decoder of a group to a site is: number of its tensor in `W_dec`, place in it."""
        blocks = enumerate(self.wiring.write_blocks)
        return {(group, site): (number, place) for number, (group, sites) in blocks for place, site in enumerate(sites)}

    def decoder_vectors(self, group: int, index_S: Int[Tensor, " S"], site: Site) -> Float[Tensor, "S D"]:
        """Decoder vectors `[S, D]` of chosen features to one written site; reads these rows only.

        Raises:
            ValueError: the group does not write the site, or indices that are no int64 numbers from 0 to F - 1.
        """
        indices("the feature indices", index_S, self.n_features)
        return self._scaled(self._decoder(group, site)[index_S], write=site)

    def decoder_norms(self) -> tuple[Float[Tensor, "F W"], ...]:
        """Norm of every decoder vector: per group `[F, W]`, columns as `wiring.writes[group]`."""
        return tuple(
            torch.stack([self.decoder(group, site).norm(dim=1) for site in writes], dim=1)
            for group, writes in enumerate(self.wiring.writes)
        )

    def decoder_bias(self, site: Site) -> Float[Tensor, " D"]:
        """Bias `b_dec` of a written site."""
        return self.b_dec[self.wiring.write_sites.index(site)]

    def skip_matrix(self, group: int, read: Site, write: Site) -> Float[Tensor, "W R"]:
        """Skip matrix `[D_write, D_read]` of a group, applied as `x @ W.T`.

        Raises:
            ValueError: this crosscoder has no skip, or the group does not read or write the site.
        """
        if not self.skip:
            raise ValueError("this crosscoder has no skip connection")
        r, w = self._place(group, "read", read), self._place(group, "write", write)
        sizes = [len(reads) * len(writes) for reads, writes in zip(self.wiring.reads, self.wiring.writes, strict=True)]
        stored = self.W_skip[sum(sizes[:group]) + r * len(self.wiring.writes[group]) + w]
        return self._scaled(stored, read=read, write=write)

    def whole_tensors(self) -> Iterator[tuple[str, torch.Size, Callable[[], Tensor]]]:
        """Every tensor of `state_dict` by name, with its shape and a function that gives its values, all scales applied.

        One is made at a time: what stays in its file need not fit memory together.
        """
        made = dict(self._matrices())
        for name, value in self.state_dict().items():
            yield name, value.shape, made.get(name, partial(Tensor.detach, value))

    def _matrices(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """How to make each matrix of weights that stay in their files."""
        if self.in_file is None:
            return
        reads = ((group, site) for group, sites in enumerate(self.wiring.reads) for site in sites)
        for n, (group, site) in enumerate(reads):
            yield f"W_enc.{n}", partial(self.encoder, group, site)
        if self.tied:
            for n, site in enumerate(self.wiring.write_sites):
                yield f"W_dec.{n}", partial(self.decoder, self.wiring.writers(site)[0], site)
        else:
            for n, (group, sites) in enumerate(self.wiring.write_blocks):
                yield f"W_dec.{n}", partial(self._joined_decoder, group, sites)
        if self.skip:
            triples = (
                (group, read, write)
                for group, reads in enumerate(self.wiring.reads)
                for read in reads
                for write in self.wiring.writes[group]
            )
            for n, (group, read, write) in enumerate(triples):
                yield f"W_skip.{n}", partial(self.skip_matrix, group, read, write)

    def _joined_decoder(self, group: int, sites: tuple[Site, ...]) -> Tensor:
        return torch.stack([self.decoder(group, site) for site in sites], dim=1)

    @torch.no_grad()
    def fold_input_scale(
        self, input_scale: Mapping[Site, float], output_scale: Mapping[Site, float] | None = None
    ) -> None:
        """Fold scales in: a crosscoder fitted to `input_scale * x` and `output_scale * y` then maps x to y itself.

        `W_enc *= s_r`, `W_dec, b_dec /= s_w`, `W_skip *= s_r / s_w`; pre-activations and thresholds do not change.

        Args:
            input_scale: factor per read site, 1 where absent.
            output_scale: factor per written site, 1 where absent.

        Raises:
            ValueError: a factor that is not finite and above 0, or a site this crosscoder does not read or write.
        """
        output_scale = output_scale or {}
        if not input_scale and not output_scale:
            return
        for scales, sites in ((input_scale, self.wiring.read_sites), (output_scale, self.wiring.write_sites)):
            for site, scale in scales.items():
                if site not in sites:
                    raise ValueError(f"expected scales for {', '.join(map(str, sites))}; got one for {site!s:.50}")
                number(f"the scale for {site}", scale, positive=True)
        for group, (reads, writes) in enumerate(zip(self.wiring.reads, self.wiring.writes, strict=True)):
            for read in reads:
                self.encoder(group, read).mul_(input_scale.get(read, 1.0))
                for write in writes if self.skip else ():
                    ratio = input_scale.get(read, 1.0) / output_scale.get(write, 1.0)
                    self.skip_matrix(group, read, write).mul_(ratio)
            for write in () if self.tied else writes:
                self.decoder(group, write).div_(output_scale.get(write, 1.0))
        for place, site in enumerate(self.wiring.write_sites):
            self.b_dec[place].div_(output_scale.get(site, 1.0))
            if self.tied:
                self.W_dec[place].div_(output_scale.get(site, 1.0))

    def release(self) -> None:
        """Let the system take back what was read of weights that stay in their files: it counts as memory of this process."""
        if self.in_file is not None:
            self.in_file.release()

    def _check_group(self, group: int) -> None:
        if group not in range(self.n_groups):
            raise ValueError(f"there is no group {group!r:.50}: this crosscoder has groups 0 to {self.n_groups - 1}")

    def _place(self, group: int, verb: str, site: Site) -> int:
        """Place of a site among those that a group reads or writes."""
        self._check_group(group)
        sites = (self.wiring.reads if verb == "read" else self.wiring.writes)[group]
        if site not in sites:
            raise ValueError(f"group {group} does not {verb} {site}; it does {verb} {', '.join(map(str, sites))}")
        return sites.index(site)
