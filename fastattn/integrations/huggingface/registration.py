"""Our attention and its mask function in transformers' registries."""

from __future__ import annotations

from fastattn.integrations.huggingface.architectures import NAME
from fastattn.integrations.huggingface.calling import attention
from fastattn.integrations.huggingface.masking import mask


def register(name: str = NAME) -> None:
    """Make ``attn_implementation=name`` available to transformers' models: the attention and its mask function.

    Calling it again changes nothing. ``fastattn.patch`` does it by itself.

    Raises ImportError when transformers is not installed, ValueError for a name that transformers gives a meaning.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if not isinstance(name, str) or not name:
        raise ValueError(f"name: got {name!r}, expected a non-empty string")
    if ALL_ATTENTION_FUNCTIONS.get(name, attention) is not attention:
        raise ValueError(f"name: {name!r} is already another attention of transformers; choose a free name")
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
