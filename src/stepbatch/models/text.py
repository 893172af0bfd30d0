"""Token ids on their way into text encoders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence


def pad(ids: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of any lengths for one pass of a causal encoder: ids and mask, ``[P, L]`` each.

    The pads are on the right, behind everything that a causal encoder lets a token look at, so each prompt comes out
    as it would alone.
    """
    rows = [torch.tensor(row) for row in ids]
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return pad_sequence(rows, batch_first=True).to(device), mask.to(device)
