"""Which architectures of transformers may use our attention, and why the others may not."""

from __future__ import annotations

from typing import Any

NAME = "fastattn"

# Architectures whose outputs, gradients and generated tokens are tested against "eager" (docs/huggingface.md), with
# the classes of their attention layers. The name is the configuration's model_type; see ``home``.
VERIFIED: dict[str, tuple[str, ...]] = {
    "bart": ("BartAttention",),
    "bert": ("BertSelfAttention", "BertCrossAttention"),
    "deit": ("DeiTAttention",),
    "distilbert": ("DistilBertSelfAttention",),
    "electra": ("ElectraSelfAttention", "ElectraCrossAttention"),
    "gemma": ("GemmaAttention",),
    "gemma2": ("Gemma2Attention",),
    "gpt2": ("GPT2Attention",),
    "gpt_neox": ("GPTNeoXAttention",),
    "gpt_oss": ("GptOssAttention",),
    "hubert": ("HubertAttention",),
    "llama": ("LlamaAttention",),
    "marian": ("MarianAttention",),
    "mbart": ("MBartAttention",),
    "mistral": ("MistralAttention",),
    "mixtral": ("MixtralAttention",),
    "modernbert": ("ModernBertAttention",),
    "opt": ("OPTAttention",),
    "phi3": ("Phi3Attention",),
    "qwen2": ("Qwen2Attention",),
    "qwen3": ("Qwen3Attention",),
    "qwen3_moe": ("Qwen3MoeAttention",),
    "roberta": ("RobertaSelfAttention", "RobertaCrossAttention"),
    "t5": ("T5Attention",),
    "vit": ("ViTAttention",),
    "wav2vec2": ("Wav2Vec2Attention",),
    "whisper": ("WhisperAttention",),
    "xlm-roberta": ("XLMRobertaSelfAttention", "XLMRobertaCrossAttention"),
}

# Architectures that cannot use a registered attention, whatever we do: their classes never ask for one.
_OWN_LOOP = "computes its attention itself and never looks up a registered one"
_OWN_TABLE = "chooses its attention from a table of its own, which has no entry for a registered name"
_ADDS_MASK = "computes its attention itself and adds the mask, which a boolean or structured mask would falsify"
REFUSED: dict[str, str] = {
    "bark": _OWN_TABLE,
    "bloom": _ADDS_MASK,
    "deberta": f"{_OWN_LOOP} (disentangled attention to content and position)",
    "deberta-v2": f"{_OWN_LOOP} (disentangled attention to content and position)",
    "falcon": f'{_OWN_TABLE}; fastattn.replace_sdpa() reaches it with attn_implementation="sdpa"',
    "gpt_neo": _OWN_TABLE,
    "led": f"{_OWN_LOOP} (windows in chunks with global tokens)",
    "longformer": f"{_OWN_LOOP} (windows in chunks with global tokens)",
    "mpnet": _ADDS_MASK,
    "wavlm": f"{_OWN_LOOP} (gated position bias through torch's multi_head_attention_forward)",
    "xlnet": f"{_OWN_LOOP} (two streams with relative positions)",
}


def home(architecture: str) -> str:
    """The module that holds the classes of an architecture."""
    folder = architecture.replace("-", "_")
    return f"transformers.models.{folder}.modeling_{folder}"


def why_not(architecture: Any) -> str | None:
    """Why a model type cannot use our attention; None for a verified one."""
    if architecture in VERIFIED:
        return None
    if architecture in REFUSED:
        return f"architecture {architecture!r} {REFUSED[architecture]}"
    return f"architecture {architecture!r} not verified yet"


def check(config: Any) -> None:
    """Other architectures pass other arguments, or use the mask in ways of their own: refuse rather than err."""
    reason = why_not(getattr(config, "model_type", None))
    if reason is not None:
        raise NotImplementedError(
            f"attention {NAME!r}: {reason}; verified are {', '.join(map(repr, VERIFIED))}; "
            "use another attn_implementation"
        )
