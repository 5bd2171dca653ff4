"""The core on every device present, in float32: attribution, interventions, a training run, sparse products.

The oracle is the CPU in float64.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import circuits
import replacement
from replacement import Crosscoder, Intervention, TopK, checkpoint
from replacement.crosscoder.sparse import Pattern, dots, weighted_rows
from replacement.training import TrainingConfig, train

PROMPT = "the capital of the state containing Dallas is"


@pytest.fixture(params=["cpu", "cuda", "mps"])
def device(request: pytest.FixtureRequest) -> str:
    """Every device in turn; those that this machine lacks are skipped."""
    name: str = request.param
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not torch.backends.mps.is_available()):
        pytest.skip(f"this machine has no {name} device")
    return name


def test_a_trace_gives_the_same_graph(device: str) -> None:
    graph = circuits.trace(replacement.load("demo", device=device), PROMPT)
    expected = circuits.trace(replacement.load("demo", dtype="float64"), PROMPT)
    assert graph.identity_error < 1e-4
    weights = []
    for circuit in (graph.prune(), expected.prune()):
        ids, edges = circuit.nodes.ids(), circuit.edges
        ends = zip(edges.target, edges.source, edges.weight, strict=True)
        weights.append({(ids[target], ids[source]): weight for target, source, weight in ends})
    shared = weights[0].keys() & weights[1].keys()
    assert len(shared) > 0.95 * len(weights[1])  # a node on the threshold may fall either way
    largest = max(abs(weight) for weight in weights[1].values())
    np.testing.assert_allclose(
        [weights[0][edge] for edge in shared], [weights[1][edge] for edge in shared], rtol=1e-3, atol=1e-4 * largest
    )


def test_heads_add_up(device: str) -> None:
    model = replacement.load("demo", device=device)
    circuit = circuits.trace(model, PROMPT).prune()
    assert circuits.split_heads(model, circuit).sum_error < 1e-4


def test_an_intervention_changes_the_same_logits(device: str) -> None:
    logits = []
    for place, dtype in (("cpu", "float64"), (device, "float32")):
        model = replacement.load("demo", device=place, dtype=dtype)
        local = model.localize(PROMPT)
        strongest = int(local.features.activation.argmax())
        columns = (local.features.group, local.features.index, local.features.row)
        layer, index, position = (int(column[strongest]) for column in columns)
        change = Intervention(layer=layer, index=index, position=position, scale=-1.0)
        logits.append(model(PROMPT, interventions=[change], errors="keep").cpu().double())
    assert float((logits[0] - replacement.load("demo", dtype="float64")(PROMPT, errors="keep")).abs().max()) > 0.1
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)


def test_a_training_run_falls_as_fast(device: str) -> None:
    """Losses, not weights: Adam divides by the size of a gradient, so the rounding of tiny ones moves weights at full size."""
    lm = replacement.load("demo").language_model
    wiring = replacement.Wiring.strictly_causal(lm)
    tokens_T = lm.tokenize(PROMPT)
    rows = lm.read(tokens_T, {*wiring.read_sites, *wiring.write_sites})
    config = TrainingConfig(n_tokens=8 * len(tokens_T), batch_tokens=len(tokens_T), learning_rate=1e-2)
    losses: list[list[float]] = []
    for place, dtype in (("cpu", torch.float64), (device, torch.float32)):
        batch = {site: values.to(place, dtype) for site, values in rows.items()}
        crosscoder = Crosscoder(wiring, n_features=64, activation=TopK(4), seed=0).to(place, dtype)
        seen: list[float] = []
        train(crosscoder, [batch] * 8, config, progress=lambda report, seen=seen: seen.append(report.loss))
        losses.append(seen)
    assert losses[0][-1] < 0.8 * losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


def test_sparse_products_are_dense_ones(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x_BD, weight_FD = (torch.randn(size, 8, generator=generator).to(device) for size in (5, 20))
    row_S, index_S = torch.tensor([0, 0, 1, 3, 3, 4]), torch.tensor([2, 7, 19, 0, 5, 5])
    pattern = Pattern.of(row_S.to(device), index_S.to(device), 5)
    products_BF = x_BD @ weight_FD.T
    torch.testing.assert_close(dots(x_BD, weight_FD, pattern), products_BF[pattern.row_S, pattern.index_S])
    scale_S = torch.arange(1.0, 7.0, device=device)
    dense_BF = torch.zeros(5, 20, device=device)
    dense_BF[pattern.row_S, pattern.index_S] = scale_S
    found_BD = weighted_rows(weight_FD, pattern.index_S, scale_S, pattern.offsets)
    torch.testing.assert_close(found_BD, dense_BF @ weight_FD)


def test_weights_in_their_file_stay_on_the_cpu(device: str) -> None:
    folder = replacement.loading.ARTIFACTS / "crosscoder"
    if device == "cpu":
        assert checkpoint.load(folder, lazy=True, device=device).in_file is not None
    else:
        with pytest.raises(ValueError, match="only on cpu"):
            checkpoint.load(folder, lazy=True, device=device)
