"""Random models and crosscoders on disk, in the layouts that circuit-tracer and this package both read.

A model is a Hugging Face folder. A crosscoder is a folder in circuit-tracer's own layout, `config.yaml` and

    layer_{i}.safetensors                              per-layer transcoders, with or without skip
    W_enc_{i}.safetensors, W_dec_{i}.safetensors       a cross-layer transcoder

Thresholds are measured on the prompt, so that the wanted number of features is active, and decoders are as large as the MLP
outputs they stand for.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from replacement import LanguageModel, Site

VOCABULARY, CONTEXT = 1000, 1024
_NAMES = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
MODELS = {"GPT-2": "GPT2LMHeadModel", "Llama": "LlamaForCausalLM", "Gemma 2": "Gemma2ForCausalLM"}
READS = {
    "GPT-2": ("hook_resid_mid", "resid_mid"),
    "Llama": ("mlp.hook_in", "mlp_in"),
    "Gemma 2": ("ln2.hook_normalized", "mlp_normalized"),
}
"""Where the crosscoders of each model read, in TransformerLens's words and in this package's."""


@dataclass(frozen=True)
class Setting:
    """A model, a crosscoder for it, and their sizes."""

    model: str
    """One of `MODELS`."""
    crosscoder: str
    """`PLT`, `skip PLT` or `CLT`."""
    activation: str
    """`relu`, `jumprelu` or `topk`."""
    n_layers: int = 4
    d_model: int = 64
    n_features: int = 512
    """Features of each layer."""
    n_active: int = 25
    """Features active in each layer for the average token."""
    n_tokens: int = 12

    def __str__(self) -> str:
        return f"{self.model} {self.crosscoder} {self.activation}"


def write_model(setting: Setting, folder: Path) -> Tensor:
    """Write a random model; returns a random prompt, which begins with the beginning-of-sequence token."""
    torch.manual_seed(0)
    n_heads = max(2, setting.d_model // 64)
    if setting.model == "GPT-2":
        sizes = {"n_embd": setting.d_model, "n_layer": setting.n_layers, "n_head": n_heads, "n_positions": CONTEXT}
    else:
        sizes = {"hidden_size": setting.d_model, "num_hidden_layers": setting.n_layers, "head_dim": 32}
        sizes |= {"num_attention_heads": n_heads, "num_key_value_heads": n_heads // 2 or 1}
        sizes |= {"intermediate_size": 4 * setting.d_model, "max_position_embeddings": CONTEXT}
    build = getattr(transformers, MODELS[setting.model])
    model = build(build.config_class(**_NAMES, **sizes, tie_word_embeddings=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 1:  # norms and biases
                parameter.add_(0.1 * noise)
            else:
                embeds = any(word in name for word in ("wte", "wpe", "embed", "lm_head"))
                parameter.copy_((2.5 if embeds else 0.7) * setting.d_model**-0.5 * noise)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {f"{name}_token": "w0" for name in ("bos", "eos", "pad", "unk")}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return torch.cat([torch.zeros(1, dtype=torch.long), torch.randint(1, VOCABULARY, (setting.n_tokens - 1,))])


@torch.no_grad()
def write_crosscoder(setting: Setting, lm: LanguageModel, tokens_T: Tensor, folder: Path) -> None:
    """Write a random crosscoder for a model."""
    folder.mkdir()
    layers, (hook, kind) = range(setting.n_layers), READS[setting.model]
    inputs = lm.read(tokens_T, [Site(layer, kind) for layer in layers])
    outputs = lm.read(tokens_T, [Site(layer, "mlp_out") for layer in layers])
    sizes = [float(outputs[Site(layer, "mlp_out")][1:].pow(2).mean().sqrt()) for layer in layers]
    is_clt, generator = setting.crosscoder == "CLT", torch.Generator().manual_seed(1)
    for layer in layers:
        x_TD = inputs[Site(layer, kind)][1:]
        written = {w: sizes[w] / (w + 1) ** 0.5 for w in layers[layer:]} if is_clt else {layer: sizes[layer]}
        tensors = _layer(setting, x_TD, list(written.values()), sizes[layer], generator)
        if is_clt:
            tensors = {f"{name}_{layer}": value for name, value in tensors.items()}
            save_file({f"W_dec_{layer}": tensors.pop(f"W_dec_{layer}")}, folder / f"W_dec_{layer}.safetensors")
            save_file(tensors, folder / f"W_enc_{layer}.safetensors")
        else:
            names = {"threshold": "activation_function.threshold"}
            tensors = {names.get(name, name): value for name, value in tensors.items()}
            save_file(tensors | {"W_dec": tensors["W_dec"][:, 0].contiguous()}, folder / f"layer_{layer}.safetensors")
    config = {
        "model_name": lm.name,
        "model_kind": "cross_layer_transcoder" if is_clt else "transcoder_set",
        "feature_input_hook": hook,
        "feature_output_hook": "hook_mlp_out",
        "scan": "random",
    }
    if setting.activation == "topk":
        config |= {"activation": "topk", "k": setting.n_active}
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML too


def _layer(
    setting: Setting, x_TD: Tensor, written: list[float], size: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Weights of one layer's features.

    Args:
        x_TD: what they read, which sets their thresholds.
        written: size of what they are to write to each layer, all features active at a token together.
        size: size of the layer's MLP output.
    """

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    F, D, norm = setting.n_features, setting.d_model, float(x_TD.norm(dim=1).mean())
    tensors = {"W_enc": noise(F, D) / norm, "b_enc": 0.1 * noise(F), "b_dec": 0.1 * size * noise(D)}
    pre_TF = x_TD @ tensors["W_enc"].T + tensors["b_enc"]
    largest = pre_TF.flatten().topk(setting.n_active * len(x_TD) + 1).values
    threshold = float(largest[-2:].mean())  # half-way between the last active feature and the next
    activation = float(largest[:-1].mean())
    if setting.activation == "relu":
        tensors["b_enc"] -= threshold
        activation -= threshold
    elif setting.activation == "jumprelu":
        tensors["threshold"] = torch.full((F,), threshold)
    if setting.crosscoder == "skip PLT":
        tensors["W_skip"] = 0.5 * size / norm * noise(D, D)
    scale_W = torch.tensor(written) / (activation * setting.n_active**0.5)
    return tensors | {"W_dec": noise(F, len(written), D) * scale_W[:, None]}


def run_apart(*command: str, threads: int | None = None) -> dict[str, Any]:
    """The JSON that another process prints last; it runs on that many threads, or as many as it likes."""
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:3])} failed: {done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result
