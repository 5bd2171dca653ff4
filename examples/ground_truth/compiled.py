"""From a program to a transformer that computes it and to the dictionary that decomposes it exactly.

V vocabulary, T context, N variables, D d_model (= N), M neurons per layer, X = heads x d_head.

Every matrix is written in the coordinates of the variables and then turned by one orthogonal matrix, the basis: the identity,
or a random rotation that leaves no variable on an axis. Norms stay in the model but do nothing: their epsilon is 2^40 and
their gain 2^20, so that `x / sqrt(mean x^2 + eps) * gain = x` to the last bit of a float32 (and to 1e-12 in float64).
"""

from __future__ import annotations

import torch
from program import Layer, Program
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from replacement import Crosscoder, LanguageModel, ReLU, Wiring
from replacement.crosscoder.sites import Site

NORM_GAIN = 2.0**20


def random_rotation(size: int, *, seed: int) -> Tensor:
    """A random orthogonal matrix `[size, size]` in float64, uniformly distributed."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * torch.diagonal(r).sign()


def language_model(
    program: Program, *, name: str, basis_ND: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """The transformer of a program.

    Args:
        basis_ND: direction of every variable, orthonormal rows; the axes if None.
    """
    n_heads = max(1, *(len(layer.heads) for layer in program.layers))
    d_head = max(1, *(_head_width(layer) for layer in program.layers))
    config = {
        "n_layers": len(program.layers),
        "d_model": len(program.variables),
        "n_heads": n_heads,
        "d_head": d_head,
        "d_mlp": n_neurons(program),
        "n_ctx": len(program.positions),
        "d_vocab": len(program.tokens),
        "act_fn": "relu",
        "normalization_type": "RMS",
        "eps": NORM_GAIN**2,
        "seed": 0,
    }
    bridge = TransformerBridge.boot_native(config, dtype=dtype)
    basis = torch.eye(len(program.variables), dtype=torch.float64) if basis_ND is None else basis_ND
    weights = _weights(program, basis, n_heads, d_head)
    with torch.no_grad():
        for path, parameter in bridge.named_parameters():
            short = path.replace("_original_component.", "")
            parameter.fill_(NORM_GAIN if short.split(".")[-2].startswith("ln") else 0.0)
            if short in weights:
                parameter.copy_(weights.pop(short))
    assert not weights, f"no parameter for {sorted(weights)}"
    return LanguageModel(bridge, name=name)


def exact_crosscoder(
    program: Program, lm: LanguageModel, *, basis_ND: Tensor | None = None, wiring: str = "strictly_causal"
) -> Crosscoder:
    """The dictionary whose features are the program's neurons: feature i of group l is neuron i of layer l.

    It reconstructs every MLP exactly. A strictly causal one could write to later layers too; it does not need to.

    Args:
        wiring: `strictly_causal` or `per_layer`.
    """
    wired = Wiring.strictly_causal(lm) if wiring == "strictly_causal" else Wiring.per_layer(lm)
    made = Crosscoder(
        wired,
        n_features=n_neurons(program),
        activation=ReLU(),
        dtype=lm.dtype,
        model_name=lm.name,
        model_fingerprint=lm.fingerprint,
    )
    basis = torch.eye(len(program.variables), dtype=torch.float64) if basis_ND is None else basis_ND
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
        for number, layer in enumerate(program.layers):
            reads_MN, bias_M, writes_MN = _neurons(program, layer)
            made.encoder(number, Site(number, "resid_mid")).copy_(reads_MN @ basis)
            made.b_enc[number].copy_(bias_M)
            made.decoder(number, Site(number, "mlp_out")).copy_(writes_MN @ basis)
    return made.eval()


def n_neurons(program: Program) -> int:
    """Neurons per layer: as many as the largest layer has. The others are filled up with silent ones."""
    return max(1, *(len(layer.neurons) for layer in program.layers))


def _weights(program: Program, basis: Tensor, n_heads: int, d_head: int) -> dict[str, Tensor]:
    number = {name: place for place, name in enumerate(program.variables)}

    def rows(entries: tuple | list) -> Tensor:
        matrix = torch.zeros(len(entries), len(number), dtype=torch.float64)
        for row, variables in enumerate(entries):
            for name, weight in variables.items():
                matrix[row, number[name]] = weight
        return matrix @ basis

    weights = {
        "tok_embed.weight": rows(program.tokens),
        "pos.weight": rows(program.positions),
        "head.weight": rows([program.outputs.get(token, {}) for token in range(len(program.tokens))]),
    }
    for place, layer in enumerate(program.layers):
        query, key, value, out = ([{} for _ in range(n_heads * d_head)] for _ in range(4))
        for h, head in enumerate(layer.heads):
            queries = sorted({q for q, _ in head.scores})
            for (q, k), weight in head.scores.items():
                row = h * d_head + queries.index(q)
                query[row][q] = 1.0
                key[row][k] = weight * d_head**0.5  # the model divides by it
            for i, (source, target) in enumerate(head.moves.items()):
                value[h * d_head + i][source] = 1.0
                out[h * d_head + i][target] = 1.0
        reads_MN, bias_M, writes_MN = _neurons(program, layer)
        weights |= {
            f"layers.{place}.attn.q.weight": rows(query),
            f"layers.{place}.attn.k.weight": rows(key),
            f"layers.{place}.attn.v.weight": rows(value),
            f"layers.{place}.attn.o.weight": rows(out).T,
            f"layers.{place}.mlp.fc_in.weight": reads_MN @ basis,
            f"layers.{place}.mlp.fc_in.bias": bias_M,
            f"layers.{place}.mlp.fc_out.weight": (writes_MN @ basis).T,
        }
    return weights


def _neurons(program: Program, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """What the neurons of a layer read, their biases, and what they write; silent ones have a bias of -1."""
    number = {name: place for place, name in enumerate(program.variables)}
    reads = torch.zeros(n_neurons(program), len(number), dtype=torch.float64)
    bias, writes = -torch.ones(len(reads), dtype=torch.float64), torch.zeros_like(reads)
    for row, neuron in enumerate(layer.neurons):
        bias[row] = neuron.bias
        for matrix, entries in ((reads, neuron.reads), (writes, neuron.writes)):
            for name, weight in entries.items():
                matrix[row, number[name]] = weight
    return reads, bias, writes


def _head_width(layer: Layer) -> int:
    return max((max(len({q for q, _ in head.scores}), len(head.moves)) for head in layer.heads), default=1)
