"""Operations that plain PyTorch does with more memory or more passes than they need."""

from __future__ import annotations

from albireo.ops.linear_cross_entropy import default_piece_rows, linear_cross_entropy

__all__ = ["default_piece_rows", "linear_cross_entropy"]
