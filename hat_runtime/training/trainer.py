"""Training a drafter on the target's states: loss, schedule, checkpoints, held-out acceptance."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from hat_runtime.model.drafter import DrafterNet, DrafterShape
from hat_runtime.training.features import TextStates
from hat_runtime.training.loss import TopTokensCrossEntropy
from hat_runtime.training.network import Guesses, guess_all, split_rows

CHECKPOINT_S = 60.0


@dataclass(frozen=True)
class TrainOptions:
    """How a drafter is trained."""

    epochs: float = 10.0
    batch_rows: int = 2048
    """Positions of a step, about."""
    learning_rate: float = 1e-3
    depths: int = 3
    """Guesses deep, for kind "feature"."""
    feature_weight: float = 0.2
    """Of the distance to the true deep state (HAT and EAGLE: SmoothL1), beside the cross-entropy's 1."""
    depth_decay: float = 0.8
    seed: int = 0


@dataclass(frozen=True)
class Progress:
    """Where training is."""

    step: int
    steps: int
    loss: float
    rows_per_s: float


@dataclass(frozen=True)
class Acceptance:
    """How often a drafter's first choice is the target's, on texts that it has not seen."""

    by_depth: list[float]
    """Of drafts whose predecessors in the chain were right."""

    def tokens_a_round(self, drafts: int = 6) -> float:
        """1 + a1 + a1 a2 + ...: with the bonus token, for chains of `drafts` drafts that never stop early."""
        total, product = 1.0, 1.0
        for index in range(drafts):
            product *= self.by_depth[min(index, len(self.by_depth) - 1)]
            total += product
        return total


class Trainer:
    """Trains one network. Resumable: everything that matters is in its checkpoint."""

    def __init__(
        self,
        net: DrafterNet,
        texts: Sequence[TextStates],
        head: torch.Tensor,
        draft_ids: torch.Tensor,
        options: TrainOptions,
        *,
        device: str = "cpu",
    ) -> None:
        """Prepare.

        Args:
            net: float32, trained in place.
            texts: what to learn from.
            head: the model's head, [vocabulary, hidden_size].
            draft_ids: int64 [k], the rows of it that drafts use.
            options: how.
            device: where.
        """
        self.net = net.to(device)
        self.options = options
        self._texts = texts
        self._device = device
        self._head = head[draft_ids].to(device, torch.bfloat16)
        self._column = torch.full((len(head),), -1, dtype=torch.int64, device=device)
        self._column[draft_ids] = torch.arange(len(draft_ids), device=device)
        self._optimiser = torch.optim.AdamW(
            net.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
        )
        rows = sum(_rows(text) for text in texts)
        self.steps = max(1, round(options.epochs * rows / options.batch_rows))
        self.step = 0
        self._order_of = 0
        self._order = self._shuffled(0)
        self._epoch_steps = len(self._order)

    def run(self, checkpoint: Path, progress: Callable[[Progress], None]) -> None:
        """Train to the end, from the checkpoint if there is one."""
        self._restore(checkpoint)
        saved, began, seen = time.monotonic(), time.monotonic(), 0
        while self.step < self.steps:
            batch = self._batch(self.step)
            loss = self._learn(batch)
            self.step += 1
            seen += sum(_rows(text) for text in batch)
            progress(Progress(self.step, self.steps, loss, seen / (time.monotonic() - began)))
            if time.monotonic() - saved > CHECKPOINT_S or self.step == self.steps:
                self._save(checkpoint)
                saved = time.monotonic()

    @torch.no_grad()
    def acceptance(self, texts: Sequence[TextStates], depths: int = 4) -> Acceptance:
        """Measured on `texts`, teacher-forced. Kinds without features stay at depth 1: they never read guesses."""
        self.net.eval()
        depths = depths if self.net.shape.kind == "feature" else 1
        right, tried = [0] * depths, [0] * depths
        with self._autocast():
            for first in range(0, len(texts), 8):
                part = [self._moved(text) for text in texts[first : first + 8]]
                alive: dict[int, torch.Tensor] = {}
                for depth, found in enumerate(guess_all(self.net, part, depths)):
                    hits = split_rows(self._hits(part, found), found.counts)
                    for index, hit in zip(found.texts, hits, strict=True):
                        before = alive[index][: len(hit)] if depth else torch.ones_like(hit)
                        alive[index] = hit & before
                        right[depth] += int(alive[index].sum())
                        tried[depth] += int(before.sum())
        return Acceptance([r / max(1, t) for r, t in zip(right, tried, strict=True)])

    def _hits(self, texts: Sequence[TextStates], found: Guesses) -> torch.Tensor:
        chosen = (found.rows.to(self._head.dtype) @ self._head.T).argmax(-1)
        return chosen == self._column[_taught(texts, found, "top_ids")[:, 0].long()]

    def _learn(self, batch: Sequence[TextStates]) -> float:
        self.net.train()
        for group in self._optimiser.param_groups:
            group["lr"] = self.options.learning_rate * self._schedule()
        depths = self.options.depths if self.net.shape.kind == "feature" else 1
        with self._autocast():
            found = guess_all(self.net, batch, depths)
        shares = [self.options.depth_decay**depth for depth in range(len(found))]
        losses = [share * self._loss(batch, guesses) for share, guesses in zip(shares, found, strict=True)]
        loss = torch.stack(losses).sum() / sum(shares)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 0.5)
        self._optimiser.step()
        return float(loss.detach())

    def _loss(self, texts: Sequence[TextStates], found: Guesses) -> torch.Tensor:
        """Cross-entropy with the teacher's likeliest tokens, among those that drafts may be, and SmoothL1."""
        columns = self._column[_taught(texts, found, "top_ids").long()]
        weights = _taught(texts, found, "top_p").float() * (columns >= 0)
        loss: torch.Tensor = TopTokensCrossEntropy.apply(
            found.rows, self._head, columns.clamp_min(0), weights
        )
        if self.options.feature_weight:
            deep = _taught(texts, found, "deep").float()
            loss = loss + self.options.feature_weight * F.smooth_l1_loss(found.rows.float(), deep)
        return loss

    def _batch(self, step: int) -> list[TextStates]:
        """The texts of a step: the epoch's order depends on nothing but seed and epoch, so it can be resumed."""
        epoch, index = divmod(step, self._epoch_steps)
        if self._order_of != epoch:
            self._order_of, self._order = epoch, self._shuffled(epoch)
        # An epoch's texts may fill one batch more or less than the first one's.
        return [self._moved(self._texts[text]) for text in self._order[index % len(self._order)]]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        """All texts in batches of about `batch_rows` rows."""
        order = list(range(len(self._texts)))
        random.Random(f"{self.options.seed}/{epoch}").shuffle(order)
        batches: list[list[int]] = [[]]
        rows = 0
        for index in order:
            batches[-1].append(index)
            rows += _rows(self._texts[index])
            if rows >= self.options.batch_rows:
                batches.append([])
                rows = 0
        return [batch for batch in batches if batch]

    def _moved(self, text: TextStates) -> TextStates:
        if self._device == "cpu":
            return text
        where = self._device
        return replace(
            text,
            shallow=text.shallow.to(where),
            deep=text.deep.to(where),
            top_ids=text.top_ids.to(where),
            top_p=text.top_p.to(where),
        )

    def _schedule(self) -> float:
        """Linear warm-up over 100 steps (or a tenth), then a cosine down to a twentieth."""
        warm = min(100, self.steps / 10)
        if self.step < warm:
            return (self.step + 1) / warm
        done = (self.step - warm) / max(1, self.steps - warm)
        return 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2

    def _autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self._device).type, dtype=torch.bfloat16)

    def _save(self, path: Path) -> None:
        partial = path.with_name(path.name + ".part")
        state = {"net": self.net.state_dict(), "optimiser": self._optimiser.state_dict()}
        torch.save(state | {"step": self.step, "steps": self.steps}, partial)
        partial.replace(path)

    def _restore(self, path: Path) -> None:
        if not path.is_file():
            return
        state = torch.load(path, weights_only=True)
        self.net.load_state_dict(state["net"])
        self._optimiser.load_state_dict(state["optimiser"])
        self.step = min(state["step"], self.steps)


def shape_for(kind: str, config: object, *, norm_eps: float = 1e-5) -> DrafterShape:
    """The drafter's shape for a model's configuration (transformers): the model's own head size and MLP width."""
    heads: int = config.num_attention_heads  # type: ignore[attr-defined]
    hidden: int = config.hidden_size  # type: ignore[attr-defined]
    head_dim: int = getattr(config, "head_dim", None) or hidden // heads
    adapter = kind == "adapter"
    return DrafterShape(
        kind=kind,
        hidden_size=hidden,
        heads=heads,
        kv_heads=heads if adapter else config.num_key_value_heads,  # type: ignore[attr-defined]
        head_dim=head_dim,
        mlp_size=0 if adapter else config.intermediate_size,  # type: ignore[attr-defined]
        rope_theta=float(_rope_theta(config)),
        norm_eps=getattr(config, "rms_norm_eps", norm_eps),
    )


def _rope_theta(config: object) -> float:
    parameters = getattr(config, "rope_parameters", None) or {}
    found = parameters.get("rope_theta") if isinstance(parameters, dict) else None
    return float(found or getattr(config, "rope_theta", None) or 10000.0)


def frequent_ids(texts: Sequence[TextStates], vocab_size: int, count: int) -> torch.Tensor:
    """The `count` tokens that the teacher chooses most often, int64 ascending (FR-Spec, arXiv 2502.14856).

    A head with fewer rows is read faster, and what is never drafted is only a token that the target has to add itself.
    """
    seen = torch.zeros(vocab_size, dtype=torch.float64)
    for text in texts:
        seen += torch.bincount(text.ids.long(), minlength=vocab_size)
        seen.index_add_(0, text.top_ids.long().flatten(), text.top_p.double().flatten())
    chosen = seen.topk(min(count, vocab_size)).indices.sort().values
    return chosen[seen[chosen] > 0]


def _taught(texts: Sequence[TextStates], found: Guesses, name: str) -> torch.Tensor:
    """What the teacher says of the guessed positions: a field of TextStates that has a row per answer position."""
    parts = []
    for index, first, count in zip(found.texts, found.first, found.counts, strict=True):
        start = first - (texts[index].prompt_tokens - 1)
        parts.append(getattr(texts[index], name)[start : start + count])
    return torch.cat(parts)


def _rows(text: TextStates) -> int:
    return len(text.ids) - 1 - text.prompt_tokens
