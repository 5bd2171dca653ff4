"""Training steps to be timed by `training.py`, one implementation per process. B rows, D width, F features, L layers.

A process prints a line of JSON when it is ready, takes one training step for every line it reads, and prints what the step
cost. Implementations:

    sparse   `replacement.training.Trainer`
    dense    the same crosscoder with dense activations `[B, F]`: product, topk, scatter, one product per (group, site)
    saelens  `SAETrainer.step` of SAELens; `saelens-sparse` with `use_sparse_activations`
    matmul   one `[1024, D] x [D, F]` product: the machine's rate for the encoder

SAELens is imported only where it is asked for, and then nothing of this project is.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from machine import peak_bytes
from torch import Tensor
from torch.nn import functional

Step = Callable[[], dict[str, float]]


class Case(NamedTuple):
    """Sizes of a comparison."""

    name: str
    """`clt` (strictly causal), `sae` (autoencoder) or `demo` (the wiring and sizes of the shipped crosscoder)."""
    n_layers: int
    width: int
    n_features: int
    k: list[int]
    """Features kept per group and row."""
    batch: int


CASES = {
    "clt": Case("clt", 12, 256, 4096, [16] * 12, 4096),
    "sae": Case("sae", 1, 512, 8192, [32], 4096),
    "demo": Case("demo", 4, 128, 2048, [19, 7, 7, 7], 2048),
}
DECODER_SCALE = 0.02  # decoders start at zero in training; a step on random ones costs the same and says more


def sparse(case: Case) -> Step:
    """A step of this project's trainer; no auxiliary loss, because nothing is dead yet in a fresh run."""
    from replacement.training import Trainer, TrainingConfig
    from replacement.training.scaling import measure

    crosscoder, batch = _crosscoder(case)
    config = TrainingConfig(n_tokens=10**9, batch_tokens=case.batch, losses=[])
    trainer = Trainer(crosscoder, config, measure(crosscoder, [batch]))

    def step() -> dict[str, float]:
        report = trainer.step(batch)
        return {"loss": report.loss, "gradient_norm": report.gradient_norm}

    return step


def dense(case: Case, *, einsum: bool = False) -> Step:
    """The same crosscoder, loss and optimizer on dense activations.

    Pre-activations are let go layer by layer, decoders are separate contiguous `[F, D]` matrices and sums run inside `addmm`:
    the fastest and smallest of the dense ways. With `einsum` groups are stacked, and a written site is one
    `einsum("gbf,gfd->bd")` over those that write it, as research code has it.
    """
    from replacement.training.scaling import measure, start

    crosscoder, batch = _crosscoder(case)
    statistics = measure(crosscoder, [batch])
    start(crosscoder, statistics)
    wiring = crosscoder.wiring

    def own(x: Tensor) -> torch.nn.Parameter:
        return torch.nn.Parameter(x.detach().clone(memory_format=torch.contiguous_format))

    encoders = [own(crosscoder.encoders(group)[0]) for group in range(wiring.n_groups)]
    encoder_biases = [own(bias_F) for bias_F in crosscoder.b_enc]
    decoders = {(group, s): own(crosscoder.decoder(group, s)) for group, to in enumerate(wiring.writes) for s in to}
    biases = {site: own(crosscoder.decoder_bias(site)) for site in wiring.write_sites}
    stacked = {}
    if einsum:
        stacked = {s: own(torch.stack([decoders.pop((g, s)) for g in wiring.writers(s)])) for s in wiring.write_sites}
    del crosscoder
    parameters = [*encoders, *encoder_biases, *decoders.values(), *stacked.values(), *biases.values()]
    optimizer = torch.optim.Adam(parameters, fused=True)

    def forward() -> Tensor:
        x = {site: batch[site] * scale for site, scale in statistics.scales.items()}
        acts = []
        for group, reads in enumerate(wiring.reads):
            pre_BF = functional.linear(x[reads[0]], encoders[group], encoder_biases[group])
            value_BK, index_BK = pre_BF.topk(case.k[group], dim=1, sorted=False)
            acts.append(torch.zeros_like(pre_BF).scatter(1, index_BK, value_BK.relu()))
        losses = []
        acts_GBF = torch.stack(acts) if einsum else None
        for site in wiring.write_sites:
            y_BD = biases[site].expand(case.batch, -1)
            if acts_GBF is not None:
                writers = wiring.writers(site)
                y_BD = y_BD + torch.einsum("gbf,gfd->bd", acts_GBF[: len(writers)], stacked[site])
            for group in () if einsum else wiring.writers(site):
                y_BD = torch.addmm(y_BD, acts[group], decoders[group, site])
            losses.append(
                functional.mse_loss(y_BD, x[site], reduction="sum") / (case.batch * statistics.variances[site])
            )
        return torch.stack(losses).sum()

    def step() -> dict[str, float]:
        loss = forward()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": float(loss.detach()), "gradient_norm": float(norm)}

    return step


def saelens(case: Case, *, sparse_activations: bool = False) -> Step:
    """A step of SAELens' own trainer, with its own optimizer; without auxiliary loss and rescaling by decoder norms."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=case.width,
            d_sae=case.n_features,
            k=case.k[0],
            aux_loss_coefficient=0.0,
            rescale_acts_by_decoder_norm=False,
            use_sparse_activations=sparse_activations,
        )
    )
    config = SAETrainerConfig(total_training_samples=10**9, train_batch_size_samples=case.batch, lr_end=3e-4)
    batch_BD = torch.randn(case.batch, case.width, generator=torch.Generator().manual_seed(0))
    trainer = SAETrainer(config, sae, iter(()))

    def step() -> dict[str, float]:
        result = trainer.step(batch_BD)
        trainer.n_training_steps += 1
        return {"loss": float(result.loss.detach())}

    return step


def matmul(case: Case) -> Step:
    """Flops per second of the encoder's product, over about a tenth of a second."""
    x_BD, weight_FD = torch.randn(1024, case.width), torch.randn(case.n_features, case.width)
    out_BF, flops = torch.empty(1024, case.n_features), 2 * 1024 * case.width * case.n_features
    repeats = max(1, int(1.5e10 / flops))

    def step() -> dict[str, float]:
        started = time.perf_counter()
        for _ in range(repeats):
            torch.mm(x_BD, weight_FD.T, out=out_BF)
        return {"rate": repeats * flops / (time.perf_counter() - started)}

    return step


def _crosscoder(case: Case) -> tuple:
    """A crosscoder with random decoders, and a batch for it."""
    from replacement import Crosscoder, TopK, Wiring
    from replacement.crosscoder.sites import ModelShape

    shape = ModelShape(n_layers=case.n_layers, d_model=case.width, n_heads=1, d_head=case.width)
    if case.name == "sae":
        wiring, k = Wiring.autoencoder(shape, layers=[0], site="resid_pre"), case.k[0]
    else:
        wiring = Wiring.strictly_causal(shape, read="mlp_in" if case.name == "demo" else None)
        k = tuple(case.k)
    crosscoder = Crosscoder(wiring, n_features=case.n_features, activation=TopK(k), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in crosscoder.W_dec:
            weight.normal_(std=DECODER_SCALE, generator=generator)
    sites = dict.fromkeys((*wiring.read_sites, *wiring.write_sites))
    return crosscoder, {site: torch.randn(case.batch, case.width, generator=generator) for site in sites}


def main() -> None:
    """Serve steps of one implementation; arguments: implementation, case, batch size, threads."""
    name, case_name, batch, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    case = CASES[case_name]._replace(batch=int(batch))
    if name in ("sparse", "dense", "einsum"):
        import replacement.training  # noqa: F401 - imports are not part of a step's memory
    elif name.startswith("saelens"):
        import sae_lens.training.sae_trainer  # noqa: F401
    before = peak_bytes()
    implementations: dict[str, Callable[[Case], Step]] = {
        "sparse": sparse,
        "dense": dense,
        "einsum": functools.partial(dense, einsum=True),
        "saelens": saelens,
        "saelens-sparse": lambda case: saelens(case, sparse_activations=True),
        "matmul": matmul,
    }
    step = implementations[name](case)
    print(json.dumps({"ready": name}), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        report = step()
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "peak": peak_bytes() - before, **report}), flush=True)


if __name__ == "__main__":
    main()
