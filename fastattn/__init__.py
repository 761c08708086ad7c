"""fastattn: fused attention and LSTM for PyTorch, drop-ins for nn.MultiheadAttention, nn.LSTM and their functions."""

from fastattn.additive import additive_attention
from fastattn.debug import debug_checks
from fastattn.dispatch import Backend, Explanation, backend
from fastattn.functional import explain, scaled_dot_product_attention
from fastattn.kernels.kept_memory import empty_cache
from fastattn.kv_cache import attention_with_kv_cache
from fastattn.modules.additive import AdditiveAttention
from fastattn.modules.attention import MultiheadAttention
from fastattn.modules.layer_norm_lstm import LayerNormLSTM, LayerNormLSTMCell
from fastattn.modules.lstm import LSTM
from fastattn.modules.lstm_cell import LSTMCell
from fastattn.modules.luong import LuongAttention
from fastattn.modules.positional import SinusoidalPositionalEncoding
from fastattn.patching import PatchReport, patch, unpatch
from fastattn.replacing import replace_sdpa
from fastattn.varlen import varlen_attention

__version__ = "0.1.0"

__all__ = [
    "LSTM",
    "AdditiveAttention",
    "Backend",
    "Explanation",
    "LSTMCell",
    "LayerNormLSTM",
    "LayerNormLSTMCell",
    "LuongAttention",
    "MultiheadAttention",
    "PatchReport",
    "SinusoidalPositionalEncoding",
    "additive_attention",
    "attention_with_kv_cache",
    "backend",
    "debug_checks",
    "empty_cache",
    "explain",
    "patch",
    "replace_sdpa",
    "scaled_dot_product_attention",
    "unpatch",
    "varlen_attention",
]
