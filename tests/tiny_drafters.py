"""Drafters for the tiny models: trained ones that are right now and then, and a small model that is right often."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from hat_runtime.model.drafter import DrafterInfo, DrafterNet, file_name, save_drafter
from hat_runtime.model.hf import load_config
from hat_runtime.model.manifest import identity
from hat_runtime.training.answers import AnswerOptions, read_answers, write_answers
from hat_runtime.training.features import read_features, write_features
from hat_runtime.training.teacher import Teacher
from hat_runtime.training.trainer import Trainer, TrainOptions, shape_for

INPUT_LAYERS = 2
PROMPTS = [[random.Random(n).randrange(3, 199) for _ in range(8 + n % 9)] for n in range(24)]


def train_tiny_drafters(
    model: Path,
    folder: Path,
    kinds: tuple[str, ...],
    epochs: float = 40,
    *,
    prompts: Sequence[list[int]] = PROMPTS,
    draft_ids: range = range(3, 199),  # not all of the vocabulary
) -> Path:
    """Drafters of a tiny model, trained on its own answers, with the names by which they are found."""
    folder.mkdir(parents=True, exist_ok=True)
    teacher = Teacher(model, INPUT_LAYERS, torch.float32, "cpu", kv_tokens=4096)
    write_answers(
        teacher, prompts, folder / "answers.jsonl", AnswerOptions(40, concurrency=8), lambda done, total: None
    )
    answers = read_answers(folder / "answers.jsonl")
    shards = write_features(teacher, answers, folder / "states", lambda done, total: None)
    texts = list(read_features(shards))
    weights_id = identity(model).weights_id
    ids = torch.tensor(list(draft_ids))
    head = teacher.ends.head_rows(torch.arange(teacher.ends.vocab_size))
    for kind in kinds:
        torch.manual_seed(0)
        net = DrafterNet(shape_for(kind, load_config(model)))
        options = TrainOptions(epochs=epochs, batch_rows=256, learning_rate=3e-3)
        Trainer(net, texts, head, ids, options).run(folder / f"{kind}.checkpoint", lambda progress: None)
        info = DrafterInfo(net.shape, weights_id, INPUT_LAYERS)
        save_drafter(folder / file_name(kind, weights_id, INPUT_LAYERS), net, info, ids)
    return folder


def perturbed(model: Path, folder: Path, noise: float) -> Path:
    """A copy of a tiny model with noise on its weights: it often says what the model says."""
    torch.manual_seed(5)
    copy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    copy.save_pretrained(folder)
    return folder
