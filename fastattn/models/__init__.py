"""Sequence models built from fastattn's modules, and decoding from them."""

from fastattn.models.generation import Generated, Generator, generate
from fastattn.models.seq2seq import Seq2Seq
from fastattn.models.seq2seq_config import Seq2SeqConfig
from fastattn.models.transformer import Transformer
from fastattn.models.transformer_config import TransformerConfig

__all__ = ["Generated", "Generator", "Seq2Seq", "Seq2SeqConfig", "Transformer", "TransformerConfig", "generate"]
