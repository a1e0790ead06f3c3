"""A drafter's forward pass over whole texts, for training: every position at once, several guesses deep.

While drafting, a `feature` drafter reads its own guesses. So it is trained on them: depth 1 reads true deep states,
depth j the guesses of depth j - 1 ("training-time test", EAGLE-3, arXiv 2503.01840; HASS, arXiv 2408.15766). The
attention sees what it would see while drafting: keys of depth 1 up to the chain's start, then the chain's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hat_runtime.model.drafter import DrafterNet, rotate, rotation
from hat_runtime.training.features import TextStates


def split_rows(rows: torch.Tensor, counts: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Rows of several texts, text by text."""
    parts: tuple[torch.Tensor, ...] = rows.split(list(counts))  # type: ignore[no-untyped-call]
    return parts


@dataclass(frozen=True)
class Guesses:
    """What one depth says of all texts."""

    texts: list[int]
    """Which texts; those that are too short for the depth are left out."""
    first: list[int]
    """Of each of them the first position that is guessed; the others follow, up to the last but one."""
    rows: torch.Tensor
    """[n, hidden_size] in the head's input space, text after text."""
    counts: list[int]
    """Rows of each text."""

    def split(self) -> list[torch.Tensor]:
        """The rows of each text."""
        return list(split_rows(self.rows, self.counts))


@dataclass(frozen=True)
class _Heads:
    """Of one text, after rotation, with a key and value for every query head: [n, heads, head_dim] each."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def guess_all(net: DrafterNet, texts: Sequence[TextStates], depths: int) -> list[Guesses]:
    """Guesses of every text at every depth.

    Depth j of a text with P prompt tokens of T covers positions P + j - 1 <= t <= T - 2: the guess at t is compared
    with the teacher's at t.
    """
    prompts = [text.prompt_tokens for text in texts]
    counts = [len(text.ids) - 1 for text in texts]
    shallow = [text.shallow[:count] for text, count in zip(texts, counts, strict=True)]
    rows = net.rows(torch.cat(shallow), _true_features(net, texts))
    heads = _heads(net, rows, [0] * len(texts), counts)
    answers = [part[first:] for part, first in zip(split_rows(rows, counts), prompts, strict=True)]
    attended = [_causal(own, first) for own, first in zip(heads, prompts, strict=True)]
    depth_one = net.finish(torch.cat(answers), torch.cat(attended))
    found = [Guesses(list(range(len(texts))), prompts, depth_one, [len(part) for part in answers])]
    chains: list[list[_Heads]] = [[own] for own in heads]
    for depth in range(2, depths + 1):
        before = found[-1]
        kept = [
            (text, first + 1, guesses[:-1])
            for text, first, guesses in zip(before.texts, before.first, before.split(), strict=True)
            if len(guesses) > 1
        ]
        if not kept:
            break
        sizes = [len(guesses) for _, _, guesses in kept]
        own_shallow = torch.cat([shallow[text][first:] for text, first, _ in kept])
        rows = net.rows(own_shallow, torch.cat([guesses for _, _, guesses in kept]))
        attended = []
        for (text, first, _), own in zip(
            kept, _heads(net, rows, [first for _, first, _ in kept], sizes), strict=True
        ):
            chains[text].append(own)
            attended.append(_along_chain(own.query, chains[text], first, depth))
        guessed = net.finish(rows, torch.cat(attended))
        found.append(Guesses([text for text, _, _ in kept], [first for _, first, _ in kept], guessed, sizes))
    return found


def _true_features(net: DrafterNet, texts: Sequence[TextStates]) -> torch.Tensor | None:
    """For each position the deep state of the one before it; the mask where the device does not know it."""
    if net.shape.kind != "feature":
        return None
    parts = []
    for text in texts:
        mask = net.mask.to(text.deep.dtype).expand(text.prompt_tokens, -1)
        parts += [mask, text.deep[: len(text.ids) - 1 - text.prompt_tokens]]
    return torch.cat(parts)


def _heads(net: DrafterNet, rows: torch.Tensor, first: Sequence[int], counts: Sequence[int]) -> list[_Heads]:
    """Of packed rows of several texts; each text's positions begin at `first`."""
    shape, group = net.shape, net.shape.heads // net.shape.kv_heads
    positions = torch.cat([torch.arange(f, f + n) for f, n in zip(first, counts, strict=True)])
    turn = rotation(positions.to(rows.device), shape)
    query, key, value = torch.split(net.project(rows), [shape.heads, shape.kv_heads, shape.kv_heads], 1)
    key = rotate(key, turn).repeat_interleave(group, 1)
    packed = (rotate(query, turn), key, value.repeat_interleave(group, 1))
    return [_Heads(*parts) for parts in zip(*(split_rows(whole, counts) for whole in packed), strict=True)]


def _causal(own: _Heads, first: int) -> torch.Tensor:
    """Attention of positions from `first` on over all before them and themselves: [n, heads * head_dim]."""
    query = own.query[first:].transpose(0, 1)
    total = len(own.key)
    mask = (
        torch.arange(total, device=query.device)[None]
        <= torch.arange(first, total, device=query.device)[:, None]
    )
    key, value = own.key.transpose(0, 1), own.value.transpose(0, 1)
    attended = F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=mask)
    return attended[0].transpose(0, 1).flatten(1)


def _along_chain(query: torch.Tensor, chain: Sequence[_Heads], start: int, depth: int) -> torch.Tensor:
    """Attention of depth `depth` at positions start, start + 1, ...

    A query at t sees depth 1 up to t - depth + 1, and one key of each later depth i, at t - depth + i.
    """
    n, scale = len(query), query.shape[-1] ** -0.5
    true, positions = chain[0], torch.arange(start, start + n, device=query.device)
    hidden = torch.arange(len(true.key), device=query.device)[None] > (positions - depth + 1)[:, None]
    scores = torch.einsum("nhd,shd->hns", query, true.key).masked_fill(hidden, float("-inf"))
    # Depth i begins at position start - depth + i, so its row r is at this depth's row r.
    own = [torch.einsum("nhd,nhd->hn", query, later.key[:n])[..., None] for later in chain[1:]]
    weights = torch.softmax(torch.cat([scores, *own], -1).float() * scale, -1).to(query.dtype)
    attended = torch.einsum("hns,shd->nhd", weights[..., : len(true.key)], true.value)
    for index, later in enumerate(chain[1:]):
        attended = attended + weights[..., len(true.key) + index].transpose(0, 1)[..., None] * later.value[:n]
    return attended.flatten(1)
