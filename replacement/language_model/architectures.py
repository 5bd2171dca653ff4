"""Which architectures can be traced, and why the others cannot: the table of the README, every row of it run by a test.

An architecture that is not listed may work all the same: `freezing.freeze` checks every model when it is loaded, and refuses
what it cannot rebuild.
"""

from __future__ import annotations

from dataclasses import dataclass

_ALIBI = "no: ALiBi adds to them"
_SINGLE = "float32 only"  # Hugging Face rotates, or takes the softmax, in float32 whatever the dtype of the weights


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row of the table."""

    name: str
    model_class: str
    """Class in `transformers`."""
    refused: str = ""
    """Why it cannot be traced; empty if it can."""
    scores: str = "yes"
    """Whether attention scores can be attributed to queries and keys."""


ARCHITECTURES = (
    Architecture("Apertus", "ApertusForCausalLM"),
    Architecture("Arcee", "ArceeForCausalLM"),
    Architecture("BLOOM", "BloomForCausalLM", scores=_ALIBI),
    Architecture("CodeGen", "CodeGenForCausalLM", scores=_SINGLE),
    Architecture("Cohere (Command R)", "CohereForCausalLM", scores=_SINGLE),
    Architecture("Cohere (Command R+, norms of queries and keys)", "CohereForCausalLM", scores=_SINGLE),
    Architecture("Cohere 2", "Cohere2ForCausalLM", scores=_SINGLE),
    Architecture("ERNIE 4.5", "Ernie4_5ForCausalLM", scores=_SINGLE),
    Architecture("EXAONE 4", "Exaone4ForCausalLM"),
    Architecture("Falcon (7B: parallel, one norm)", "FalconForCausalLM"),
    Architecture("Falcon (40B, 180B: parallel, two norms)", "FalconForCausalLM"),
    Architecture("Falcon (RW: ALiBi, sequential)", "FalconForCausalLM", scores=_ALIBI),
    Architecture("Gemma", "GemmaForCausalLM"),
    Architecture("Gemma 2", "Gemma2ForCausalLM"),
    Architecture("Gemma 3", "Gemma3ForCausalLM"),
    Architecture("GLM", "GlmForCausalLM", scores=_SINGLE),
    Architecture("GLM 4", "Glm4ForCausalLM", scores=_SINGLE),
    Architecture("GPT-2", "GPT2LMHeadModel"),
    Architecture("GPT-BigCode (StarCoder)", "GPTBigCodeForCausalLM"),
    Architecture("GPT-J", "GPTJForCausalLM", scores=_SINGLE),
    Architecture("GPT-Neo", "GPTNeoForCausalLM", scores="no: computed inside a module that does not show their factor"),
    Architecture("GPT-NeoX (Pythia)", "GPTNeoXForCausalLM"),
    Architecture("GPT-NeoX (sequential)", "GPTNeoXForCausalLM"),
    Architecture("GPT-OSS", "GptOssForCausalLM"),
    Architecture("Granite", "GraniteForCausalLM"),
    Architecture("Granite MoE", "GraniteMoeForCausalLM"),
    Architecture(
        "HunYuan", "HunYuanDenseV1ForCausalLM", scores="no: queries and keys are normalised after the rotation"
    ),
    Architecture("Llama", "LlamaForCausalLM"),
    Architecture("Ministral 3", "Ministral3ForCausalLM"),
    Architecture("Mistral", "MistralForCausalLM"),
    Architecture("Mixtral", "MixtralForCausalLM"),
    Architecture("MPT", "MptForCausalLM", scores=_ALIBI),
    Architecture("Nemotron", "NemotronForCausalLM"),
    Architecture("OLMo", "OlmoForCausalLM"),
    Architecture("OLMo 2", "Olmo2ForCausalLM"),
    Architecture("OLMo 3", "Olmo3ForCausalLM"),
    Architecture("OLMoE", "OlmoeForCausalLM"),
    Architecture("OPT", "OPTForCausalLM", scores=_SINGLE),
    Architecture("Phi", "PhiForCausalLM"),
    Architecture("Phi 3", "Phi3ForCausalLM"),
    Architecture("Qwen 2", "Qwen2ForCausalLM"),
    Architecture("Qwen 2 MoE", "Qwen2MoeForCausalLM"),
    Architecture("Qwen 3", "Qwen3ForCausalLM"),
    Architecture("Qwen 3 MoE", "Qwen3MoeForCausalLM"),
    Architecture("Seed-OSS", "SeedOssForCausalLM"),
    Architecture("SmolLM 3", "SmolLM3ForCausalLM"),
    Architecture("StableLM", "StableLmForCausalLM"),
    Architecture("StableLM (12B: parallel)", "StableLmForCausalLM", scores="no: every head has a norm of its own"),
    Architecture("StarCoder 2", "Starcoder2ForCausalLM"),
    Architecture("VaultGemma", "VaultGemmaForCausalLM"),
    Architecture("BERT (as a decoder)", "BertLMHeadModel", refused="norms on the residual stream itself"),
    Architecture(
        "DeepSeek V3", "DeepseekV3ForCausalLM", refused="latent attention: values come out of a norm of their own"
    ),
    Architecture("Falcon (11B: new decoder, one norm)", "FalconForCausalLM", refused="TransformerLens cannot load it"),
    Architecture("GPT", "OpenAIGPTLMHeadModel", refused="norms on the residual stream itself"),
    Architecture("Mamba", "MambaForCausalLM", refused="a state space in the place of attention"),
    Architecture("nanochat", "NanoChatForCausalLM", refused="a norm between the embedding and the residual stream"),
    Architecture("OPT (350M)", "OPTForCausalLM", refused="norms on the residual stream itself"),
    Architecture("RecurrentGemma", "RecurrentGemmaForCausalLM", refused="recurrent layers in the place of attention"),
    Architecture("T5", "T5ForConditionalGeneration", refused="an encoder and cross-attention"),
    Architecture("XGLM", "XGLMForCausalLM", refused="TransformerLens does not show its position embedding"),
)


def markdown_table() -> str:
    """The table as Markdown: works, or refused and why."""
    lines = ["| architecture | class | traced | attention scores |", "|---|---|---|---|"]
    for row in ARCHITECTURES:
        verdict = f"refused: {row.refused} | no" if row.refused else f"yes | {row.scores}"
        lines.append(f"| {row.name} | `{row.model_class}` | {verdict} |")
    return "\n".join(lines)
