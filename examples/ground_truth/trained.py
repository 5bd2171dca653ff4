"""Dictionaries trained on a Boolean network, and which of their features compute which true variable.

V vocabulary (every assignment of the inputs), B batch, F features per group, G groups, M true variables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from models import GroundTruth
from program import Node, run
from torch import Tensor

from circuits import NodeKind
from replacement import Crosscoder, Wiring
from replacement.crosscoder.activation import Activation
from replacement.crosscoder.sites import Site
from replacement.training import TrainingConfig, train
from replacement.training.losses import Loss

BATCH = 256


@dataclass(frozen=True, slots=True)
class Activations:
    """All there is to know of a network without attention: its activations on every token, and how often each occurs."""

    by_site: dict[Site, Tensor]
    """`[V, D]` per site."""
    probability_V: Tensor

    @classmethod
    def of(cls, truth: GroundTruth, wiring: Wiring) -> Activations:
        """One forward pass over the whole vocabulary; see `token_probability`."""
        lm, probability_V = truth.language_model, token_probability(truth)
        sites = {*wiring.read_sites, *wiring.write_sites}
        with torch.no_grad():
            read = lm.read(torch.arange(lm.vocabulary_size)[:, None], sites)
        return cls({site: x[:, 0] for site, x in read.items()}, probability_V)

    def batches(self, seed: int) -> Iterator[dict[Site, Tensor]]:
        """Tokens drawn by their probabilities, without end."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            drawn_B = torch.multinomial(self.probability_V, BATCH, replacement=True, generator=generator)
            yield {site: x_VD[drawn_B] for site, x_VD in self.by_site.items()}


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained dictionary with its quality, over the whole vocabulary."""

    crosscoder: Crosscoder
    l0: float
    """Active features per token, summed over groups."""
    unexplained: float
    """Fraction of the MLP outputs' variance that is not explained, mean over layers."""
    activations_GVF: Tensor


def token_probability(truth: GroundTruth) -> Tensor:
    """How often each token occurs.

    Raises:
        ValueError: the model reads sequences, whose tokens do not stand alone.
    """
    if truth.token_probability_V is None:
        raise ValueError(f"expected a network whose tokens stand alone (two-hop, and-or), got {truth.name}")
    return truth.token_probability_V


def train_dictionary(
    truth: GroundTruth,
    *,
    wiring: Wiring,
    activation: Activation,
    losses: Sequence[Loss],
    seed: int,
    n_features: int = 64,
    n_steps: int = 500,
) -> Trained:
    """Train a dictionary of the MLPs; what its wiring writes besides their outputs only guides the training."""
    lm = truth.language_model
    fresh = Crosscoder(
        wiring,
        n_features=n_features,
        activation=activation,
        model_name=lm.name,
        model_fingerprint=lm.fingerprint,
        seed=seed,
    )
    data = Activations.of(truth, wiring)
    config = TrainingConfig(
        n_tokens=n_steps * BATCH,
        batch_tokens=BATCH,
        losses=list(losses),
        dead_after_tokens=50_000,
        seed=seed,
    )
    return measure(of_mlps(train(fresh, data.batches(seed), config)), data)


def of_mlps(crosscoder: Crosscoder) -> Crosscoder:
    """The crosscoder without what it writes elsewhere than to MLP outputs, the same one where there is nothing such."""
    wiring = crosscoder.wiring
    writes = tuple(tuple(site for site in sites if site.kind == "mlp_out") for sites in wiring.writes)
    if writes == wiring.writes:
        return crosscoder
    widths = {site.kind: wiring.width(site) for sites in (*wiring.reads, *writes) for site in sites}
    part = Crosscoder(
        Wiring(wiring.name, wiring.reads, writes, widths),
        n_features=crosscoder.n_features,
        activation=crosscoder.activation,
        dtype=crosscoder.dtype,
        model_name=crosscoder.model_name,
        model_fingerprint=crosscoder.model_fingerprint,
    )
    weights = {name: value for name, value in crosscoder.state_dict().items() if "dec" not in name}
    part.load_state_dict(weights, strict=False)
    with torch.no_grad():
        for group, sites in enumerate(writes):
            for site in sites:
                part.decoder(group, site).copy_(crosscoder.decoder(group, site))
        for site, bias_D in zip(part.wiring.write_sites, part.b_dec, strict=True):
            bias_D.copy_(crosscoder.b_dec[wiring.write_sites.index(site)])
    return part.eval()


def measure(crosscoder: Crosscoder, data: Activations) -> Trained:
    """L0, unexplained variance and all activations of a dictionary."""
    with torch.no_grad():
        made, features = crosscoder(data.by_site)
    acts_GVF = torch.zeros(crosscoder.n_groups, features.n_rows, crosscoder.n_features)
    acts_GVF[features.group, features.row, features.index] = features.activation.float()
    p_V1 = data.probability_V.float()[:, None]
    unexplained = []
    for site, y_VD in made.items():
        x_VD = data.by_site[site]
        variance = (p_V1 * (x_VD - (p_V1 * x_VD).sum(0)) ** 2).sum()
        unexplained.append(float((p_V1 * (x_VD - y_VD) ** 2).sum() / variance))
    l0 = float(((acts_GVF > 0).sum((0, 2)) * p_V1[:, 0]).sum())
    return Trained(crosscoder, l0, sum(unexplained) / len(unexplained), acts_GVF)


@dataclass(frozen=True, slots=True)
class Variables:
    """The M variables that a dictionary may find: outputs of gates and, for gates of several neurons, each neuron."""

    names: list[str]
    """Name of the gate; its neurons go by it too."""
    layers: list[int]
    """Layer that computes each."""
    values_VM: Tensor
    """Values on every token."""
    probability_V: Tensor

    @classmethod
    def of(cls, truth: GroundTruth) -> Variables:
        """Run the true program on every token; see `token_probability`."""
        probability_V = token_probability(truth)
        names: list[str] = []
        layers: list[int] = []
        columns: list[list[float]] = []
        runs = [run(truth.program, [token]) for token in range(len(truth.program.tokens))]
        for number, layer in enumerate(truth.program.layers):
            gates = [neuron.gate for neuron in layer.neurons]
            for gate in dict.fromkeys(gates):
                names.append(gate)
                columns.append([one.values[0].get(gate, 0.0) for one in runs])
            for index, gate in enumerate(gates):
                if gates.count(gate) > 1:
                    names.append(gate)
                    node = Node(NodeKind.FEATURE, number, 0, index)
                    columns.append([one.activations.get(node, 0.0) for one in runs])
            layers += [number] * (len(names) - len(layers))
        return cls(names, layers, torch.tensor(columns).T, probability_V)


def identify(trained: Trained, variables: Variables, *, least: float) -> list[list[str]]:
    """The true variable each feature `[group][index]` computes: the one its activation correlates with most.

    Empty where no correlation (over the distribution of tokens) reaches `least`.
    """
    found = []
    for acts_VF in trained.activations_GVF:
        best_F, number_F = correlations(acts_VF, variables.values_VM, variables.probability_V).max(1)
        pairs = zip(best_F.tolist(), number_F.tolist(), strict=True)
        found.append([variables.names[number] if best >= least else "" for best, number in pairs])
    return found


def correlations(x_VF: Tensor, y_VM: Tensor, probability_V: Tensor) -> Tensor:
    """Pearson correlations `[F, M]` under the probabilities of the rows; 0 where a column does not vary."""
    p_V1 = probability_V.double()[:, None]
    x, y = (z.double() - (p_V1 * z).sum(0) for z in (x_VF, y_VM))
    size_F, size_M = ((p_V1 * z**2).sum(0).sqrt() for z in (x, y))
    product_FM = (p_V1 * x).T @ y
    return torch.where(size_F[:, None] * size_M > 1e-12, product_FM / (size_F[:, None] * size_M).clamp(min=1e-12), 0.0)
