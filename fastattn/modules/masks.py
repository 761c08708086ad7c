"""nn.MultiheadAttention's masks (True is ignored) as those of scaled_dot_product_attention (True takes part).

Each mask keeps its own shape and dtype: nothing is expanded over batch, heads or rows, and nothing is merged.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastattn.reference import band


def taking_part(mask: Tensor | None) -> Tensor | None:
    """A boolean mask inverted; a floating one as it is."""
    return ~mask if mask is not None and mask.dtype == torch.bool else mask


def with_open_columns(mask: Tensor | None, count: int) -> Tensor | None:
    """``mask`` (True takes part) with ``count`` more keys that every row sees."""
    if mask is None:
        return None
    return pad(mask, (0, count), value=1.0 if mask.dtype == torch.bool else 0.0)


def with_triangle(mask: Tensor | None, rows: int, columns: int, device: torch.device) -> Tensor:
    """``mask`` (True takes part) and the causal triangle (rows, columns) as one mask.

    For keys that come after the triangle and belong to every row, which no band can say.
    """
    triangle = band(rows, columns, None, 0, device)
    if mask is None:
        return triangle
    if mask.dtype == torch.bool:
        return mask & triangle
    return mask.masked_fill(~triangle, float("-inf"))
