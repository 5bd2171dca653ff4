"""Train the demo's strictly causal crosscoder on the demo language model, and measure what ships.

    python examples/train_demo_crosscoder.py --out replacement/demo/artifacts

Reads `OUT/language_model`, writes `OUT/crosscoder` (bf16) and `OUT/fidelity.json`, measured on the rounded weights and on
rows of the corpus that no training drew. `examples/train_demo.py` runs this as its second stage.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from train_demo_files import write_json

from replacement import Crosscoder, LanguageModel, Site, TopK, Wiring, checkpoint
from replacement.demo.corpus import held_out_rows, sample_rows
from replacement.fidelity import measure_fidelity
from replacement.training import Progress, TrainingConfig, activation_batches, train

CORPUS_SEED = 1_000_000  # far from the seeds the language model was trained on
ROWS_PER_SEED = 4096


@dataclass(kw_only=True, slots=True)
class CrosscoderRun:
    """Everything that decides the crosscoder."""

    read: str = "mlp_in"
    """Site each group reads; reconstruction from the normed stream is a little better than from the raw one."""
    n_features: int = 2_048
    """Features per layer."""
    active: tuple[int, ...] = (19, 7, 7, 7)
    """Features active per token in each layer. Layer 0 tells a thousand words apart and needs the most: with 10 in every
    layer, nearly all of the replacement's divergence from the original comes from layer 0."""
    steps: int = 4_500
    """Optimizer steps."""
    batch_tokens: int = 2_048
    """Tokens per step."""
    buffer_tokens: int = 131_072
    """Tokens in the shuffle buffer."""
    learning_rate: float = 3e-3
    """Peak Adam step size."""
    seed: int = 0
    threads: int = 2


def rows_of(tokenizer: object, *, context: int, n_rows: int, seed: int) -> Tensor:
    """Rows of the training corpus, `[R, T]`."""
    parts = [
        torch.from_numpy(sample_rows(tokenizer, n_rows=ROWS_PER_SEED, context=context, seed=seed + part))
        for part in range(-(-n_rows // ROWS_PER_SEED))
    ]
    return torch.cat(parts)[:n_rows]


def batches(run: CrosscoderRun, lm: LanguageModel, wiring: Wiring) -> Iterator[dict[Site, Tensor]]:
    """Shuffled activations at every site of the wiring, from one forward pass per row."""
    n_rows = -(-run.steps * run.batch_tokens // lm.context_length) + run.buffer_tokens // lm.context_length
    sites = {*wiring.read_sites, *wiring.write_sites}

    def read(chunk: Tensor) -> dict[Site, Tensor]:
        with torch.no_grad():
            return lm.read(chunk, sites)

    return activation_batches(
        rows_of(lm.tokenizer, context=lm.context_length, n_rows=n_rows, seed=CORPUS_SEED),
        read,
        batch_tokens=run.batch_tokens,
        buffer_tokens=run.buffer_tokens,
        seed=run.seed,
    )


def train_crosscoder(run: CrosscoderRun, lm: LanguageModel) -> Crosscoder:
    """A strictly causal crosscoder with TopK activations, one group per layer."""
    wiring = Wiring.strictly_causal(lm, read=run.read)
    crosscoder = Crosscoder(
        wiring,
        n_features=run.n_features,
        activation=TopK(run.active),
        model_name=lm.name,
        model_fingerprint=lm.fingerprint,
        seed=run.seed,
    )
    bar = tqdm(total=run.steps, desc="crosscoder", unit="step")

    def show(progress: Progress) -> None:
        bar.update()
        if progress.step % 50 == 0:
            bar.set_postfix(unexplained=f"{progress.unexplained:.4f}", dead=progress.n_dead)

    config = TrainingConfig(
        n_tokens=run.steps * run.batch_tokens, batch_tokens=run.batch_tokens, learning_rate=run.learning_rate
    )
    trained = train(crosscoder, batches(run, lm, wiring), config, progress=show)
    bar.close()
    return trained


def crosscoder_stage(run: CrosscoderRun, out: Path) -> None:
    """Train, round, save, measure, and print the table."""
    torch.set_num_threads(run.threads)
    started = time.monotonic()
    lm = LanguageModel.from_pretrained(out / "language_model")
    lm.name = "demo"
    crosscoder = train_crosscoder(run, lm)
    checkpoint.save(crosscoder, out / "crosscoder", dtype=torch.bfloat16, training=dataclasses.asdict(run))
    minutes = (time.monotonic() - started) / 60
    rows = torch.from_numpy(held_out_rows(lm.tokenizer, n_rows=1024, context=lm.context_length, seed=0))
    fidelity = measure_fidelity(lm, checkpoint.load(out / "crosscoder"), rows)
    report = {
        "run": dataclasses.asdict(run),
        "minutes": round(minutes, 1),
        "total_l0": fidelity.total_l0,
        "mean_unexplained": fidelity.mean_unexplained,
        "cross_entropy_recovered": fidelity.cross_entropy_recovered,
        **fidelity._asdict(),
    }
    write_json(out / "fidelity.json", report)
    print(
        f"{minutes:.1f} minutes on {run.steps * run.batch_tokens:,} tokens; measured on {fidelity.n_tokens:,} held-out"
    )
    print(f"active features per token    {fidelity.total_l0:.1f} ({', '.join(f'{x:.1f}' for x in fidelity.l0)})")
    per_layer = ", ".join(f"{x:.4f}" for x in fidelity.unexplained)
    print(f"variance unexplained         {fidelity.mean_unexplained:.4f} ({per_layer})")
    print(f"KL, errors propagating       {fidelity.kl or 0:.4f} nats")
    print(f"cross-entropy recovered      {fidelity.cross_entropy_recovered or 0:.4f}")
    print(f"top-1 agreement, p >= 0.5    {fidelity.agreement or 0:.4f} (all tokens {fidelity.agreement_all or 0:.4f})")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the demo's crosscoder.")
    parser.add_argument("--out", type=Path, required=True, help="folder that holds language_model/")
    parser.add_argument("--steps", type=int, default=CrosscoderRun().steps)
    options = parser.parse_args()
    crosscoder_stage(CrosscoderRun(steps=options.steps), options.out)


if __name__ == "__main__":
    main()
