"""Names that published files give to places in a model, and our sites for them."""

from __future__ import annotations

from replacement.crosscoder.sites import ModelShape

MLP_READS = {
    "hook_resid_mid": "resid_mid",
    "hook_resid_pre": "resid_pre",
    "hook_mlp_in": "resid_mid",
    "ln2.hook_normalized": "mlp_normalized",
    "mlp.hook_in": "mlp_in",
}
"""TransformerLens's hooks in front of an MLP. Its `hook_mlp_in` is the stream before the norm."""
MLP_WRITES = {"hook_mlp_out": "mlp_out", "mlp.hook_out": "mlp_out"}
"""TransformerLens's hooks behind an MLP."""
MLP_OUT = "hook_mlp_out"
"""The one of them that is written."""
ATTENTION_READS = {"ln1.hook_normalized": "attn_normalized", "attn.hook_in": "attn_in"}
"""TransformerLens's hooks in front of attention, behind its norm."""
ATTENTION_OUT = "hook_attn_out"
"""TransformerLens's hook behind attention."""
HOOKS = {
    **MLP_READS,
    **ATTENTION_READS,
    "hook_resid_post": "resid_post",
    "hook_mlp_out": "mlp_out",
    "hook_attn_out": "attn_out",
    "attn.hook_z": "attn_z",
}
"""TransformerLens's hooks of a layer that an SAE or transcoder may have."""
MODULES = {
    "output": "resid_post",
    "self_attn.o_proj.input": "attn_z",
    "pre_feedforward_layernorm.output": "mlp_in",
    "post_feedforward_layernorm.output": "mlp_out",
}
"""Inputs and outputs of modules of a layer of Hugging Face's Gemma 3."""


def hook_of(kind: str) -> str:
    """TransformerLens's hook of a kind of site, without the layer."""
    return next(hook for hook, known in HOOKS.items() if known == kind)


def shape_of(n_layers: int, width: int) -> ModelShape:
    """What a wiring to MLPs depends on; heads do not count."""
    return ModelShape(n_layers=n_layers, d_model=width, n_heads=1, d_head=width)
