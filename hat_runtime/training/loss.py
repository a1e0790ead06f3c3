"""The loss of a drafter: cross-entropy with the teacher's likeliest tokens."""

from __future__ import annotations

from typing import Any

import torch

BLOCK_ROWS = 256
"""Rows whose logits are in memory at once."""


class TopTokensCrossEntropy(torch.autograd.Function):
    """Mean over rows of -sum_k p_k log softmax(guess head^T)_k, for a frozen head.

    The gradient is computed with the loss, block by block, so that the logits of all rows never exist at once (as
    Liger Kernel, arXiv 2410.10989, does it).
    """

    @staticmethod
    def forward(
        ctx: Any, guesses: torch.Tensor, head: torch.Tensor, columns: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """See the class.

        Args:
            ctx: autograd's.
            guesses: [n, hidden_size].
            head: [k, hidden_size].
            columns: int64 [n, top], rows of the head.
            weights: float32 [n, top], the teacher's probabilities p; 0 for what the head lacks.
        """
        rows = guesses.detach().to(head.dtype)
        gradient = torch.empty_like(rows)
        total = torch.zeros((), dtype=torch.float64, device=rows.device)
        for first in range(0, len(rows), BLOCK_ROWS):
            block = slice(first, first + BLOCK_ROWS)
            mass = weights[block].sum(-1, keepdim=True)
            logits = (rows[block] @ head.T).float()
            total -= (weights[block] * logits.gather(-1, columns[block])).sum()
            highest = logits.amax(-1, keepdim=True)
            odds = logits.sub_(highest).exp_()
            sums = odds.sum(-1, keepdim=True)
            total += (mass * (sums.log() + highest)).sum()
            slope = odds.mul_(mass / sums).scatter_add_(-1, columns[block], -weights[block])
            gradient[block] = slope.to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        return total.float() / len(rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """The stored gradient, scaled."""
        (gradient,) = ctx.saved_tensors
        return gradient * (grad / len(gradient)), None, None, None
