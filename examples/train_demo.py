"""Train the demo from scratch: a small language model on a generated corpus.

    python examples/train_demo.py --out replacement/demo/artifacts

Two stages read and write folders under `--out`: the language model here, then its crosscoders
(`examples/train_demo_crosscoder.py`). Everything is seeded; weights are rounded to bf16 before they are measured and saved,
so the numbers in `accuracy.json`, `fidelity.json` and `attention_fidelity.json` are those of the shipped files.
"""

import argparse
import copy
import dataclasses
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from train_demo_crosscoder import crosscoder_stage
from train_demo_files import N_SNAPSHOTS, snapshot_folders, write_json
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from replacement.demo.accuracy import Accuracy, measure_accuracy
from replacement.demo.corpus import behaviours, held_out_rows, sample_marked_rows
from replacement.demo.tokenizer import build_tokenizer
from replacement.training.co_training import next_token_loss as weighted_loss
from replacement.training.optimizers import decaying_adamw, warmup_and_cosine

ROWS_PER_SEED = 4096  # training rows drawn from one corpus seed before the next one is used
PROBE_SEED = 0


@dataclass(kw_only=True, slots=True)
class LanguageModelRun:
    """Everything that decides the language model."""

    n_layers: int = 4
    d_model: int = 128
    n_heads: int = 4
    context: int = 64
    steps: int = 9_000
    batch_rows: int = 32
    learning_rate: float = 2e-3
    """Peak value, reached after the warm-up and followed by a cosine down to a twentieth of it."""
    warm_up_steps: int = 200
    weight_decay: float = 0.2
    """On matrices only (embeddings included)."""
    open_weight: float = 0.1
    """Loss weight of tokens that nothing before them decides (random names, operands); the others weigh 1.

    Their loss cannot be lowered, so at full weight they are mostly noise in the gradient.
    """
    lookup_share: float = 0.75
    """Share of the rows in which names reach later layers through the first MLP alone, see `forward`."""
    name_noise: float = 0.0
    """Size of the noise on the embeddings of those names, as a multiple of the embedding's."""
    seed: int = 0
    first_corpus_seed: int = 0
    """Training rows come from this seed of the corpus and those after it."""
    threads: int = 1
    compile: bool = True
    """Compile the training step (a quarter faster on a CPU; needs a C++ compiler)."""


PHASES = (
    LanguageModelRun(),
    LanguageModelRun(steps=3_000, learning_rate=1e-3, name_noise=2.0, first_corpus_seed=1000),
)
"""The second goes on from the weights of the first, rounded to bf16."""


def build_model(run: LanguageModelRun, tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """A randomly initialised GPT-2 with the shape of `run`."""
    torch.manual_seed(run.seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=run.context,
        n_embd=run.d_model,
        n_layer=run.n_layers,
        n_head=run.n_heads,
        # The same function as GPT-2's `gelu_new`, as one fused kernel: a quarter of the training time on a CPU.
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return GPT2LMHeadModel(config)


def training_batches(run: LanguageModelRun, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Tensor, ...]]:
    """Endless fresh batches, all [batch_rows, context]: tokens, the loss weight of each, and which are names."""
    corpus_seed = run.first_corpus_seed
    while True:
        rows = sample_marked_rows(tokenizer, n_rows=ROWS_PER_SEED, context=run.context, seed=corpus_seed)
        weights = torch.from_numpy(rows.determined).float().clamp(min=run.open_weight)
        parts = (torch.from_numpy(rows.tokens), weights, torch.from_numpy(rows.names))
        yield from zip(*(part.split(run.batch_rows) for part in parts), strict=True)
        corpus_seed += 1


def build_optimizer(run: LanguageModelRun, model: GPT2LMHeadModel) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and none on biases and norms."""
    return decaying_adamw(
        model.parameters(), learning_rate=run.learning_rate, weight_decay=run.weight_decay, fused=True
    )


def learning_rate_factor(run: LanguageModelRun, step: int) -> float:
    """Linear warm-up, then a cosine from 1 to 0.05."""
    return warmup_and_cosine(step, n_steps=run.steps, warmup_steps=run.warm_up_steps)


def stand_ins(rows_BT: Tensor, names_BT: Tensor, share: float) -> Tensor:
    """In the first `share` of the rows every name is replaced by another name of the batch, drawn at random; `[B, T]`."""
    chosen_BT = names_BT.clone()
    chosen_BT[round(share * len(rows_BT)) :] = False
    names_N = rows_BT[chosen_BT]
    return rows_BT.masked_scatter(chosen_BT, names_N[torch.randperm(len(names_N))])


def forward(model: GPT2LMHeadModel, rows_BT: Tensor, stand_ins_BT: Tensor, name_noise: float = 0.0) -> Tensor:
    """Logits where names reach later layers through the first MLP alone.

    A name is hidden from other positions in the first layer's attention, and behind that layer the residual stream holds
    the embedding of its stand-in instead of its own. So what a name means has to be written by the first MLP, as in
    models whose vocabulary is too large for embeddings to hold facts. Noise on the embedding lets names of the same facts
    lie close together: what tells them apart is of no use to the model. Without stand-ins this is the model as it is.
    """
    gpt, T = model.transformer, rows_BT.shape[1]
    own_BTD = gpt.wte(rows_BT)
    replaced_BT = stand_ins_BT != rows_BT
    sees_BTT = (~replaced_BT[:, None] | torch.eye(T, dtype=torch.bool)) & torch.ones(T, T, dtype=torch.bool).tril()
    mask_BTT = torch.zeros(sees_BTT.shape).masked_fill(~sees_BTT, torch.finfo(torch.float32).min)
    seen_BTD = own_BTD
    if name_noise:
        size_BT1 = own_BTD.detach().square().mean(-1, keepdim=True).sqrt() * replaced_BT[..., None]
        seen_BTD = own_BTD + name_noise * size_BT1 * torch.randn_like(own_BTD)
    x_BTD = gpt.h[0](seen_BTD + gpt.wpe.weight[:T], attention_mask=mask_BTT[:, None])
    x_BTD = x_BTD + gpt.wte(stand_ins_BT) - seen_BTD
    for block in gpt.h[1:]:
        x_BTD = block(x_BTD)
    return model.lm_head(gpt.ln_f(x_BTD))


def next_token_loss(
    model: GPT2LMHeadModel, rows_BT: Tensor, weights_BT: Tensor, stand_ins_BT: Tensor, name_noise: float = 0.0
) -> Tensor:
    """Weighted mean cross-entropy of every token after the first."""
    with torch.autocast("cpu", torch.bfloat16, enabled=model.training):
        logits_BTV = forward(model, rows_BT, stand_ins_BT, name_noise)
    return weighted_loss(logits_BTV, rows_BT, weights_BT[:, 1:])


def evaluate(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> list[Accuracy]:
    """Accuracy on every behaviour's held-out probes."""
    model.eval()
    rows = measure_accuracy(lambda tokens: model(tokens).logits, tokenizer, behaviours(PROBE_SEED))
    model.train()
    return rows


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, context: int) -> float:
    """Loss on rows of the corpus that training never drew."""
    model.eval()
    rows = torch.from_numpy(held_out_rows(tokenizer, n_rows=256, context=context, seed=0))
    loss = float(next_token_loss(model, rows, torch.ones(rows.shape), rows))
    model.train()
    return loss


def curve_steps(n_steps: int) -> set[int]:
    """Steps after which the training curve has a point: six per doubling, and the last."""
    return {round(2 ** (place / 6)) for place in range(6 * n_steps.bit_length())} & set(range(n_steps)) | {n_steps}


def train_language_model(
    run: LanguageModelRun,
    tokenizer: PreTrainedTokenizerFast,
    checkpoints: Path | None,
    every: int,
    start: GPT2LMHeadModel | None = None,
    *,
    snapshots: Mapping[int, Path] | None = None,
) -> tuple[GPT2LMHeadModel, list[tuple[int, float]]]:
    """Train, and every `every` steps report the accuracies and leave a checkpoint (in a scratch folder, if given).

    Args:
        snapshots: folders that keep the model as it is after so many steps, 0 for before the first.

    Returns:
        The model, and its training curve: (tokens, loss on held-out rows).
    """
    torch.set_num_threads(run.threads)
    model = build_model(run, tokenizer)
    if start is not None:
        model.load_state_dict(start.state_dict())
    model.train()
    optimizer = build_optimizer(run, model)
    batches = training_batches(run, tokenizer)
    loss_of = torch.compile(next_token_loss) if run.compile else next_token_loss
    curve, measured, snapshots = [], curve_steps(run.steps), snapshots or {}
    if 0 in snapshots:
        save_language_model(model, tokenizer, snapshots[0])
    progress = tqdm(range(run.steps), desc="language model", unit="step")
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate * learning_rate_factor(run, step)
        rows_BT, weights_BT, names_BT = next(batches)
        others_BT = stand_ins(rows_BT, names_BT, run.lookup_share)
        loss = loss_of(model, rows_BT, weights_BT, others_BT, run.name_noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{float(loss.detach()):.3f}")
        if step + 1 in measured:
            n_tokens = (step + 1) * run.batch_rows * run.context
            curve.append((n_tokens, held_out_loss(model, tokenizer, run.context)))
        if step + 1 in snapshots:
            save_language_model(model, tokenizer, snapshots[step + 1])
        if (step + 1) % every == 0:
            summary = "  ".join(f"{row.name} {row.top1:.3f}" for row in evaluate(model, tokenizer))
            progress.write(f"step {step + 1}  loss {held_out_loss(model, tokenizer, run.context):.4f}  {summary}")
            if checkpoints is not None:
                save_language_model(model, tokenizer, checkpoints)
    return model, curve


def round_to_bfloat16(model: GPT2LMHeadModel) -> None:
    """Round every weight to the nearest bf16 value, in place; the type stays float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()


def save_language_model(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model (as bf16) and its tokenizer in Hugging Face layout, replacing `folder` as a whole."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = copy.deepcopy(model.config)
    config.activation_function = "gelu_new"  # the same function under the name every GPT-2 reader knows
    config.use_cache = True
    shipped = GPT2LMHeadModel(config)
    shipped.load_state_dict(model.state_dict())
    shipped.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for file in partial.iterdir():
        file.chmod(0o644)  # safetensors writes files only their owner may read
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def language_model_stage(
    phases: Sequence[LanguageModelRun],
    out: Path,
    checkpoints: Path | None,
    every: int,
    *,
    snapshots: Mapping[int, Path] | None = None,
) -> None:
    """Train the language model, measure it after rounding, and save it under `out`; `snapshots` are of the first phase."""
    started = time.monotonic()
    tokenizer = build_tokenizer(phases[0].context)
    model, curves = None, []
    for run in phases:
        kept = snapshots if run is phases[0] else None
        model, curve = train_language_model(run, tokenizer, checkpoints, every, start=model, snapshots=kept)
        round_to_bfloat16(model)
        curves.append(curve)
    rows = evaluate(model, tokenizer)
    minutes = (time.monotonic() - started) / 60
    out.mkdir(parents=True, exist_ok=True)
    save_language_model(model, tokenizer, out / "language_model")
    report = {
        "phases": [dataclasses.asdict(run) for run in phases],
        "minutes": round(minutes, 1),
        "training_tokens": sum(run.steps * run.batch_rows * run.context for run in phases),
        "held_out_loss": held_out_loss(model, tokenizer, phases[0].context),
        "behaviours": [row._asdict() for row in rows],
    }
    write_json(out / "accuracy.json", report)
    # Read by `replacement validate`: the loss of a replacement as a share of this compute. Later phases lower no loss.
    write_json(out / "training_curve.json", {"unit": "tokens", "curve": curves[0]})
    print(f"{len(tokenizer)} tokens, {minutes:.1f} minutes, held-out loss {report['held_out_loss']:.4f}")
    for row in rows:
        print(f"{row.name:28} {row.n_probes:4d} probes  top-1 {row.top1:.3f}  probability {row.probability:.3f}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the artifacts")
    parser.add_argument("--stage", choices=("language-model", "crosscoder", "all"), default="all")
    parser.add_argument("--steps", type=int, help="language model training steps of every phase, for a try")
    parser.add_argument("--checkpoints", type=Path, help="scratch folder for the latest unfinished model")
    parser.add_argument("--every", type=int, default=500, help="steps between two evaluations")
    parser.add_argument(
        "--snapshots", type=Path, help="folder that keeps ten snapshots of the first phase, each after twice the steps"
    )
    arguments = parser.parse_args()
    if arguments.stage in ("language-model", "all"):
        phases = [run if arguments.steps is None else dataclasses.replace(run, steps=arguments.steps) for run in PHASES]
        snapshots = arguments.snapshots and snapshot_folders(arguments.snapshots, phases[0].steps, N_SNAPSHOTS)
        language_model_stage(phases, arguments.out, arguments.checkpoints, arguments.every, snapshots=snapshots)
    if arguments.stage in ("crosscoder", "all"):
        crosscoder_stage(arguments.out)
        crosscoder_stage(arguments.out, recipe="attention")


if __name__ == "__main__":
    main()
