"""Low-rank sparse attention (Lorsa): a crosscoder that replaces attention, patterns included.

He et al. 2025, "Towards Understanding the Nature of Attention with Low-Rank Sparse Decomposition". A layer has many heads, of
which few are active at a token. Head f is a feature: it moves one number, what the value vector `W_V[f]` reads off the
keys' positions, and writes it along one output vector `W_O[f]`. Heads share their queries and keys in Q groups of F / Q:

    h_f[t] = sum_{s <= t} P_q(f)[t, s] (x_s . W_V[f]) + b_V[f]          q(f) = f // (F / Q)
    P_q    = causal softmax of (x_t W_Q[q] + b_Q[q]) . (x_s W_K[q] + b_K[q]) / sqrt(C)
    a = f(h),  y = a W_O + b_O

`W_V`, `b_V`, `W_O` and `b_O` are the encoder, its bias, the decoder and its bias of any crosscoder, so that whatever names,
decodes, lists or draws features does the same with heads. Letters: Q groups of queries and keys, C width of a query or key.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.features import Features
from replacement.crosscoder.query_keys import QueryKeys
from replacement.crosscoder.sites import Site
from replacement.crosscoder.wiring import Wiring
from replacement.number_checks import whole_number

_SEED_OF_QUERIES = 2**33
"""Added to the seed, so that queries and keys do not begin as copies of the value vectors."""


class Lorsa(Crosscoder):
    """Low-rank sparse attention: one group of F heads for every layer, each a feature of a crosscoder.

    The rows it encodes are whole prompts of one length, one behind the other: positions run from 0 to T - 1 in each.

    Args:
        wiring: groups that read one site each, such as `Wiring.lorsa`.
        query_keys: sizes of queries and keys.
        n_features: heads F of a layer, a multiple of the query-key groups Q.
        options: as for every crosscoder.

    Parameters besides those of a crosscoder, one per layer: `W_Q[g]`, `W_K[g]` `[Q, D, C]`, `b_Q[g]`, `b_K[g]` `[Q, C]`, and
    with a norm of queries and keys its gains `gain_Q[g]`, `gain_K[g]` `[Q, C]`.

    Raises:
        ValueError: groups that read several sites, F that Q does not divide, or options that attention does not have.
    """

    reads_prompts: ClassVar[bool] = True
    ARGUMENTS: ClassVar[tuple[str, ...]] = (*Crosscoder.ARGUMENTS, "query_keys")
    W_Q: nn.ParameterList
    W_K: nn.ParameterList
    b_Q: nn.ParameterList
    b_K: nn.ParameterList
    gain_Q: nn.ParameterList
    gain_K: nn.ParameterList

    def __init__(self, wiring: Wiring, *, query_keys: QueryKeys, n_features: int, **options: Any) -> None:
        if whole_number("n_features", n_features, least=1) % query_keys.n_groups:
            raise ValueError(
                f"{n_features} heads cannot share {query_keys.n_groups} query-key groups equally: expected a multiple of "
                f"{query_keys.n_groups}"
            )
        for name in ("tied", "skip"):
            if options.get(name):
                raise ValueError(f"low-rank sparse attention has no option {name}")
        if any(len(reads) > 1 for reads in wiring.reads):
            raise ValueError("every layer of low-rank sparse attention reads one site: queries, keys and values")
        self.query_keys = query_keys
        self._held_patterns: dict[int, Tensor] = {}
        super().__init__(wiring, n_features=n_features, **options)
        if self.activation.chooses_over_groups:
            raise ValueError(f"heads of low-rank sparse attention are chosen by layer, not by {self.activation.name}")

    def _allocate(self, dtype: torch.dtype) -> None:
        super()._allocate(dtype)
        n_groups, width = self.query_keys.n_groups, self.query_keys.width
        inputs = [self.wiring.width(reads[0]) for reads in self.wiring.reads]
        for name in ("W_Q", "W_K"):
            shapes = [(n_groups, d, width) for d in inputs]
            setattr(self, name, nn.ParameterList(nn.Parameter(torch.empty(shape, dtype=dtype)) for shape in shapes))
        gains = ("gain_Q", "gain_K") if self.query_keys.norm_epsilon is not None else ()
        for name in ("b_Q", "b_K", *gains):
            made = [nn.Parameter(torch.empty(n_groups, width, dtype=dtype)) for _ in inputs]
            setattr(self, name, nn.ParameterList(made))

    @torch.no_grad()
    def initialise(self, seed: int | None, *, part: int = 0, n_parts: int = 1) -> None:
        """As for every crosscoder; queries and keys of unit variance where inputs have it, gains 1."""
        assert n_parts == 1, "queries and keys are not shared between processes"
        super().initialise(seed)
        if self.device.type == "meta":
            return
        generator = None if seed is None else torch.Generator().manual_seed(seed + _SEED_OF_QUERIES)
        for weight_QDC in (*self.W_Q, *self.W_K):
            bound = (3 / weight_QDC.shape[1]) ** 0.5
            drawn_QDC = torch.empty(weight_QDC.shape, dtype=self.dtype, device="cpu")
            weight_QDC.copy_(drawn_QDC.uniform_(-bound, bound, generator=generator))
        for gain_QC in (*self.gain_Q, *self.gain_K) if self.query_keys.norm_epsilon is not None else ():
            gain_QC.fill_(1)

    def settings(self) -> dict[str, Any]:
        """As for every crosscoder, and the sizes of queries and keys."""
        return super().settings() | {"query_keys": self.query_keys.to_dict()}

    @property
    def heads_per_group(self) -> int:
        """Heads F / Q that share queries and keys."""
        return self.n_features // self.query_keys.n_groups

    def query_key_group(self, index_S: Int[Tensor, " S"]) -> Int[Tensor, " S"]:
        """The query-key group of each head."""
        return index_S // self.heads_per_group

    def input_scale(self, group: int) -> float:
        """Factor of a layer's input in front of its stored weights; 1 unless these stay in a file that expects another."""
        return 1.0 if self.in_file is None else self.in_file.input_scale.get(self.wiring.reads[group][0], 1.0)

    def _matrices(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        yield from super()._matrices()
        for name, group in itertools.product(("W_Q", "W_K"), range(self.n_groups)) if self.in_file is not None else ():
            yield f"{name}.{group}", partial(torch.mul, getattr(self, name)[group].detach(), self.input_scale(group))

    def patterns(
        self, inputs: Mapping[Site, Tensor], group: int, *, positions: Int[Tensor, " R"] | None = None
    ) -> Float[Tensor, "B Q T T"]:
        """Attention patterns `[prompt, query-key group, query, key]` of one layer; see `pre_activations`."""
        return self._patterns(self._prompts(inputs, group, positions), group)

    def queries_and_keys(
        self, x_BTD: Float[Tensor, "B T D"], group: int
    ) -> tuple[Float[Tensor, "B Q T C"], Float[Tensor, "B Q T C"]]:
        """Queries, already divided by sqrt(C), and keys of one layer, both with their norm and rotation."""
        rotary, n_positions = self.query_keys.rotary, x_BTD.shape[1]
        rotation = None if rotary is None else rotary.rotation(n_positions, dtype=self.dtype, device=self.device)
        made = []
        for name in ("Q", "K"):
            weight_QDC, bias_QC = getattr(self, f"W_{name}")[group], getattr(self, f"b_{name}")[group]
            y_BQTC = torch.einsum("btd,qdc->bqtc", x_BTD, weight_QDC) + bias_QC[:, None]
            if self.query_keys.norm_epsilon is not None:
                scale_BQT1 = (y_BQTC.square().mean(-1, keepdim=True) + self.query_keys.norm_epsilon).sqrt()
                y_BQTC = y_BQTC / scale_BQT1 * getattr(self, f"gain_{name}")[group][:, None]
            made.append(y_BQTC if rotation is None else rotation.apply(y_BQTC))
        return made[0] * self.query_keys.width**-0.5, made[1]

    def pre_activations(
        self, inputs: Mapping[Site, Tensor], group: int, *, positions: Int[Tensor, " R"] | None = None
    ) -> Float[Tensor, "R F"]:
        """What every head of a layer moves to each row, `h` above; differentiable in inputs and weights.

        Args:
            inputs: activations `[R, D]` of (at least) the site the layer reads, whole prompts of one length.
            positions: position of every row in its prompt; by default the rows are one prompt.

        Raises:
            ValueError: as for every crosscoder, or rows that are not whole prompts of one length.
        """
        x_BTD = self._prompts(inputs, group, positions)
        with torch.autocast(self.device.type, enabled=False):
            pattern_BQTT = self._patterns(x_BTD, group)
            v_BTF = functional.linear(x_BTD, self.encoders(group)[0].to(self.dtype))
            v_BQTf = v_BTF.unflatten(2, (self.query_keys.n_groups, -1)).transpose(1, 2)
            moved_BQTf = pattern_BQTT @ v_BQTf
            return moved_BQTf.transpose(1, 2).reshape(-1, self.n_features) + self.b_enc[group]

    def pre_activations_at(
        self,
        inputs: Mapping[Site, Tensor],
        group: int,
        row_S: Int[Tensor, " S"],
        index_S: Int[Tensor, " S"],
        *,
        pre_S: Float[Tensor, " S"],
        positions: Int[Tensor, " R"] | None = None,
    ) -> Float[Tensor, " S"]:
        """As for every crosscoder, by a dense product."""
        if not torch.is_grad_enabled():
            return pre_S
        return self.pre_activations(inputs, group, positions=positions)[row_S, index_S]

    def encode_group(
        self,
        group: int,
        inputs: Mapping[Site, Tensor],
        *,
        positions: Int[Tensor, " R"] | None = None,
        keep: Bool[Tensor, " R"] | None = None,
    ) -> Features:
        """Active heads of one layer: queries of rows that are not kept have none, but their keys and values are seen."""
        pre_RF = self.pre_activations(inputs, group, positions=positions)
        with torch.no_grad():
            self._check_finite_reads(inputs, group)
            place_R = torch.arange(len(pre_RF), device=self.device) if positions is None else positions
            chosen_R = place_R >= self.undecomposed_positions
            row_P = (chosen_R if keep is None else chosen_R & keep).nonzero()[:, 0]
            place_S, index_S = self._selection(pre_RF.detach()[row_P], group)
            row_S = row_P[place_S]
        return self._table(group, row_S, index_S, pre_RF[row_S, index_S], n_rows=len(pre_RF))

    def holding_patterns(self, inputs: Mapping[Site, Tensor], *, positions: Int[Tensor, " R"] | None = None) -> Lorsa:
        """A view whose patterns are held at what these inputs give, whatever it reads; it shares all memory."""
        held = copy.copy(self)
        held._held_patterns = {
            group: self.patterns(inputs, group, positions=positions) for group in range(self.n_groups)
        }
        return held

    @torch.no_grad()
    def fold_input_scale(
        self, input_scale: Mapping[Site, float], output_scale: Mapping[Site, float] | None = None
    ) -> None:
        """As for every crosscoder; `W_Q` and `W_K` are multiplied by the scale of what they read, too."""
        super().fold_input_scale(input_scale, output_scale)
        for group, (site,) in enumerate(self.wiring.reads):
            for weights in (self.W_Q, self.W_K):
                weights[group].mul_(input_scale.get(site, 1.0))

    def __repr__(self) -> str:
        sizes = f"{self.n_groups} layers of {self.n_features} heads in {self.query_keys.n_groups} query-key groups"
        return f"Lorsa({sizes}, {self.activation!r})"

    def _patterns(self, x_BTD: Tensor, group: int) -> Tensor:
        if group in self._held_patterns:
            return self._held_patterns[group].expand(len(x_BTD), -1, -1, -1)
        q_BQTC, k_BQTC = self.queries_and_keys(x_BTD, group)
        score_BQTT = q_BQTC @ k_BQTC.transpose(2, 3)
        future_TT = torch.ones(score_BQTT.shape[2:], dtype=torch.bool, device=self.device).triu(1)
        score_BQTT = score_BQTT.masked_fill(future_TT, -torch.inf)
        return score_BQTT.softmax(-1, dtype=torch.promote_types(self.dtype, torch.float32)).to(self.dtype)

    def _prompts(self, inputs: Mapping[Site, Tensor], group: int, positions_R: Tensor | None) -> Tensor:
        """What a layer reads, as prompts `[B, T, D]`."""
        (x_RD,) = self._scaled_reads(self._reads(inputs, group), group)
        n_rows = len(x_RD)
        n_positions = n_rows if positions_R is None or not n_rows else 1 + int(positions_R.max())
        if positions_R is not None and n_rows:
            expected_R = torch.arange(n_rows, device=positions_R.device) % n_positions
            if n_rows % n_positions or not torch.equal(positions_R, expected_R):
                raise ValueError(
                    "low-rank sparse attention reads whole prompts of one length: expected positions 0 to T - 1 for each, got "
                    f"{n_rows} rows at other ones"
                )
        return x_RD.view(-1, max(1, n_positions), x_RD.shape[1])
