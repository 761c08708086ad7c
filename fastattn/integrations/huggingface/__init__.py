"""Hugging Face transformers: our attention and its mask function under one name, and which models may use it.

transformers asks a model's configuration for the name of its attention and looks it up in two registries. The
mask function of that name (masking.py) decides what the attention function (calling.py) gets; without one every
mask would be dropped. Between them padding, causality and windows travel as structure (structure.py).
"""

from fastattn.integrations.huggingface.architectures import NAME, REFUSED, VERIFIED
from fastattn.integrations.huggingface.calling import attention
from fastattn.integrations.huggingface.masking import mask
from fastattn.integrations.huggingface.registration import register
from fastattn.integrations.huggingface.structure import StructuredMask
from fastattn.integrations.huggingface.switching import patch_models, unpatch_models

__all__ = [
    "NAME",
    "REFUSED",
    "VERIFIED",
    "StructuredMask",
    "attention",
    "mask",
    "patch_models",
    "register",
    "unpatch_models",
]
