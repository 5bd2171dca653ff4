"""Attention replaced with its patterns (low-rank sparse attention, "Lorsa") against attention replaced between them.

    python examples/low_rank_attention.py --out runs/lorsa

Trains on the demo's language model, with equal budgets and 8 active features per token and layer each: the attention crosscoder
of `recipes/attention.toml`, which reads the heads' outputs and so leaves the patterns to the model; the Lorsa of
`recipes/lorsa.toml`, whose query-key groups begin as the model's heads; and the same Lorsa begun at random. Then, on rows and
prompts that no training drew:

1. fidelity, errors propagating: attention replaced alone, and together with the shipped crosscoder of the MLPs;
2. how many sparse heads are one of the model's heads. Sparse head f matches head h of its layer where both hold:
   - OV: what h writes when it reads `W_V[f]` has a cosine of 0.5 or more with `W_O[f]`, and so has `W_V[f]` with what h reads
     in order to write `W_O[f]`. Each is a product with `W_V W_O` of head h; for a pair of its singular vectors both are 1.
   - patterns: where f is active, its pattern and that of h share 0.7 of their mass or more (`mean_t sum_s min(P[t, s],
     A[t, s])`), at positions 8 and later alone, because early patterns are alike for want of keys.
   Controls: a Lorsa with random weights, and the trained heads compared with the model's heads of the next layer;
3. graphs of the same prompts: attention linear between its patterns, as features, as sparse heads.

A finished training is not repeated, and one that was stopped goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from complete_replacement import graph_facts
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

import replacement
from replacement import Crosscoder, LanguageModel, Lorsa, ReplacementModel, Site
from replacement.crosscoder.features import Features
from replacement.demo.corpus import behaviours, held_out_rows
from replacement.language_model.bridge_scores import value_weights
from replacement.training.run_config import read_config
from replacement.training.run_folder import holds_run
from replacement.training.runs import run
from replacement.validation.fidelity import measure_fidelity

RECIPES = Path(__file__).parent / "recipes"
RUNS = {
    "attention": ("attention", []),
    "lorsa": ("lorsa", []),
    "lorsa, random start": ("lorsa", ["crosscoder.start=random"]),
}
"""Recipe of each run, and settings that differ from it."""
OV_AT_LEAST, PATTERNS_AT_LEAST, FIRST_POSITION = 0.5, 0.7, 8
ROWS_AT_ONCE = 32


def train(name: str, out: Path, *, n_tokens: int, overrides: Sequence[str] = ()) -> Crosscoder:
    """Train one of `RUNS`, or read what it trained."""
    recipe, changes = RUNS[name]
    budget = [f"training.n_tokens={n_tokens}", "checkpoint_every=250"]
    config = read_config(RECIPES / f"{recipe}.toml", overrides=[*budget, *changes, *overrides])
    folder = out / name.replace(", ", "-").replace(" ", "-")
    with tqdm(total=config.training.n_steps, desc=name, unit="step", disable=None) as bar:
        return run(config, folder, resume=holds_run(folder), progress=lambda _: bar.update())


def print_fidelity(lm: LanguageModel, mlps: Crosscoder, attention: dict[str, Crosscoder], rows_RT: Tensor) -> None:
    """One line for each choice of what is replaced."""
    print(f"\n{rows_RT.numel():,} held-out tokens             unexplained      L0  KL (nats)  agreement (p >= 0.5)")
    choices: dict[str, list[Crosscoder]] = {"MLPs alone": [mlps], **{name: [each] for name, each in attention.items()}}
    choices |= {f"MLPs and {name}": [mlps, crosscoder] for name, crosscoder in attention.items()}
    for name, crosscoders in choices.items():
        fidelity = measure_fidelity(lm, crosscoders, rows_RT)
        agreement = float("nan") if fidelity.agreement is None else fidelity.agreement
        print(f"{name:32}{fidelity.mean_unexplained:12.4f}{fidelity.total_l0:9.1f}{fidelity.kl:11.4f}{agreement:22.4f}")


def ov_cosines(lm: LanguageModel, lorsa: Lorsa, layer: int, model_layer: int) -> Tensor:
    """`[F, H]`: the smaller of both cosines between what a sparse head and an original head read and write."""
    site, W_V_HDK = Site(layer, "attn_out"), value_weights(lm.parts, model_layer)
    ov_HDD = W_V_HDK @ lm.parts.attention_weights(model_layer).W_O.to(W_V_HDK)
    v_FD, o_FD = lorsa.encoders(layer)[0], lorsa.decoder(layer, site)
    written_HFD, read_HFD = v_FD @ ov_HDD, o_FD @ ov_HDD.transpose(1, 2)
    return torch.minimum(cosine_similarity(written_HFD, o_FD, dim=2), cosine_similarity(read_HFD, v_FD, dim=2)).T


def shared_patterns(
    lm: LanguageModel, lorsa: Lorsa, rows_RT: Tensor, *, shift: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """For each layer the mean mass `[F, H]` that the patterns of a sparse and of an original head share where the sparse head
    is active (NaN where it never is), and how often it is `[F]`.

    Args:
        shift: compare with the model's heads of this many layers later.
    """
    n_layers, n_heads = lm.shape.n_layers, lm.shape.n_heads
    sums = [torch.zeros(lorsa.n_features, n_heads) for _ in range(n_layers)]
    counts = [torch.zeros(lorsa.n_features) for _ in range(n_layers)]
    for tokens_BT, rows, features in _batches(lm, lorsa, rows_RT):
        original = lm.read_patterns(tokens_BT)
        positions_R = torch.arange(tokens_BT.shape[1]).repeat(len(tokens_BT))
        for layer in range(n_layers):
            own_BQTT = lorsa.patterns(rows, layer, positions=positions_R)
            heads_BHTT = original[(layer + shift) % n_layers].unbind(1)
            shared = [torch.minimum(own_BQTT, head_BTT[:, None]).sum(-1).transpose(1, 2) for head_BTT in heads_BHTT]
            shared_RQH = torch.stack(shared, -1).flatten(0, 1)
            part = features.of(layer)
            part = part.select(part.row % tokens_BT.shape[1] >= FIRST_POSITION)
            sums[layer].index_add_(0, part.index, shared_RQH[part.row, lorsa.query_key_group(part.index)])
            counts[layer] += torch.bincount(part.index, minlength=lorsa.n_features)
    return [total / count[:, None] for total, count in zip(sums, counts, strict=True)], counts


def _batches(lm: LanguageModel, lorsa: Lorsa, rows_RT: Tensor) -> Iterator[tuple[Tensor, dict[Site, Tensor], Features]]:
    for tokens_BT in rows_RT.split(ROWS_AT_ONCE):
        read = lm.read(tokens_BT, lorsa.wiring.read_sites)
        rows = {site: x_BTD.flatten(0, 1) for site, x_BTD in read.items()}
        positions_R = torch.arange(tokens_BT.shape[1]).repeat(len(tokens_BT))
        yield tokens_BT, rows, lorsa.encode(rows, positions=positions_R)


@torch.no_grad()
def matches(lm: LanguageModel, lorsa: Lorsa, rows_RT: Tensor, *, shift: int = 0) -> dict[str, float]:
    """Shares of the sparse heads that are active somewhere, and medians of their best original head's scores."""
    shared, counts = shared_patterns(lm, lorsa, rows_RT, shift=shift)
    ov, patterns, used = [], [], []
    for layer in range(lm.shape.n_layers):
        active_F = counts[layer] > 0
        cosine_FH = ov_cosines(lm, lorsa, layer, (layer + shift) % lm.shape.n_layers)
        ov.append(cosine_FH[active_F])
        patterns.append(shared[layer][active_F])
        used.append(int(active_F.sum()))
    ov_FH, patterns_FH = torch.cat(ov), torch.cat(patterns)
    alike_FH, together_FH = ov_FH >= OV_AT_LEAST, patterns_FH >= PATTERNS_AT_LEAST
    return {
        "active heads": sum(used),
        "OV matches": float(alike_FH.any(1).float().mean()),
        "patterns match": float(together_FH.any(1).float().mean()),
        "both, one head": float((alike_FH & together_FH).any(1).float().mean()),
        "OV, median": float(ov_FH.amax(1).median()),
        "patterns, median": float(patterns_FH.amax(1).median()),
    }


def random_lorsa(like: Lorsa) -> Lorsa:
    """The control: Gaussian values, outputs, queries and keys of the same sizes and norms."""
    made = Lorsa.like(like)
    made.load_state_dict(like.state_dict())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.startswith(("W_", "b_Q", "b_K")):
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn * (parameter.norm() / drawn.norm()))
    return made.eval()


def print_matches(lm: LanguageModel, attention: dict[str, Crosscoder], rows_RT: Tensor) -> None:
    """One line for each Lorsa and each control."""
    lorsas = {name: crosscoder for name, crosscoder in attention.items() if isinstance(crosscoder, Lorsa)}
    table = {name: matches(lm, lorsa, rows_RT) for name, lorsa in lorsas.items()}
    table |= {f"{name}, next layer": matches(lm, lorsa, rows_RT, shift=1) for name, lorsa in lorsas.items()}
    table["random weights"] = matches(lm, random_lorsa(lorsas["lorsa"]), rows_RT)
    columns = next(iter(table.values()))
    print(f"\n{'sparse heads':32}" + "".join(f"{column:>18}" for column in columns))
    for name, row in table.items():
        cells = (f"{value:18,d}" if isinstance(value, int) else f"{value:18.3f}" for value in row.values())
        print(f"{name:32}" + "".join(cells))


def print_graphs(lm: LanguageModel, mlps: Crosscoder, attention: dict[str, Crosscoder], n_prompts: int) -> None:
    """Graphs of held-out prompts, side by side."""
    prompts = [probe.prompt for skill in behaviours() for probe in skill.probes[:n_prompts]]
    facts = {"linear": graph_facts(ReplacementModel(lm, mlps), prompts)}
    for name in ("attention", "lorsa"):
        facts[name] = graph_facts(ReplacementModel(lm, mlps, attention_crosscoder=attention[name]), prompts)
    print(f"\n{f'graphs of {len(prompts)} prompts':32}" + "".join(f"{name:>12}" for name in facts))
    for key in facts["linear"]:
        cells = (f"{fact[key]:12.1e}" if "error" in key else f"{fact[key]:12,.3f}" for fact in facts.values())
        print(f"{key:32}" + "".join(cells))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--tokens", type=int, default=512_000, help="tokens of each training")
    parser.add_argument("--rows", type=int, default=128, help="held-out rows of 64 tokens")
    parser.add_argument("--prompts", type=int, default=2, help="held-out prompts of every behaviour that are traced")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting for all trainings")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = replacement.load("demo")
    lm, mlps = model.language_model, model.crosscoder
    attention = {name: train(name, arguments.out, n_tokens=arguments.tokens, overrides=arguments.set) for name in RUNS}
    rows_RT = torch.from_numpy(held_out_rows(lm.tokenizer, n_rows=arguments.rows, context=lm.context_length, seed=1))
    print_fidelity(lm, mlps, attention, rows_RT)
    print_matches(lm, attention, rows_RT)
    print_graphs(lm, mlps, attention, arguments.prompts)


if __name__ == "__main__":
    main()
