"""`hat train-drafter`: train what drafts tokens on the device, on the model's own answers."""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hat_runtime.cli.command import Command
from hat_runtime.cli.options import check_positive
from hat_runtime.cli.progress import ProgressBar
from hat_runtime.errors import UsageError

if TYPE_CHECKING:
    from hat_runtime.training.answers import AnsweredText
    from hat_runtime.training.features import TextStates
    from hat_runtime.training.teacher import Teacher

_TEXT = """\
The model answers the prompts; a small network learns from its hidden states to guess what it says next. The result is
one file, for this model and this number of device layers, that `hat device serve --drafter KIND:FILE` takes; in the
folder `drafters` of the model's folder it is found without being named.

Everything is kept in the work folder: a run that was interrupted goes on where it was, and a second kind, or more
epochs, use the answers and states that are there.

kinds:
  feature   reads the deep state of the token before: accepts most (default)
  adapter   reads shallow states only, as HAT does: the smallest
  layer     a decoder layer behind the device's layers: --out becomes the folder of a small model, which
            `--mode picospec --draft-model` and `--drafter model:FOLDER` take

example:
  hat train-drafter --model ./smollm2 --prompts prompts.jsonl --out ./smollm2/drafters
"""
HELD_OUT = 32
"""Every 32nd prompt is not trained on: acceptance is measured on its answers."""


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.description = _TEXT
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the whole model, as `hat model prepare` writes it",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help="as for `hat generate`; thousands of them",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="file to write, or a folder for a file with its usual name",
    )
    parser.add_argument("--kind", choices=("feature", "adapter", "layer"), default="feature")
    parser.add_argument(
        "--input-layers", type=int, default=3, metavar="M", help="layers on the device (default %(default)s)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        metavar="FOLDER",
        help="answers, states and checkpoints (default: a folder of the cache)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    parser.add_argument(
        "--samples",
        type=int,
        default=1,
        metavar="N",
        help="answers of each prompt, the first one greedy (default 1)",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=160, metavar="N", help="of an answer (default 160)"
    )
    parser.add_argument(
        "--max-prompt-tokens",
        type=int,
        default=320,
        metavar="N",
        help="longer prompts are left out (default 320)",
    )
    parser.add_argument(
        "--epochs", type=float, default=8.0, help="passes over the answers (default %(default)s)"
    )
    parser.add_argument(
        "--learning-rate", type=float, default=1e-3, help="at its highest (default %(default)s)"
    )
    parser.add_argument(
        "--draft-vocab",
        type=int,
        default=8192,
        metavar="N",
        help="tokens that may be guessed (default %(default)s)",
    )
    parser.add_argument(
        "--concurrency", type=int, default=96, metavar="K", help="prompts answered at a time (default 96)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default %(default)s)")


def _run(args: argparse.Namespace) -> int:
    for name in (
        "limit",
        "samples",
        "max_new_tokens",
        "max_prompt_tokens",
        "draft_vocab",
        "concurrency",
        "input_layers",
    ):
        check_positive(getattr(args, name), f"--{name.replace('_', '-')}")
    if not 0 < args.epochs < 1e4:
        raise UsageError(f"--epochs {args.epochs}: must be above 0")
    if not 0 < args.learning_rate < 1:
        raise UsageError(f"--learning-rate {args.learning_rate}: must be above 0 and below 1")
    import torch

    from hat_runtime.model.drafter import DrafterInfo, DrafterNet, file_name, save_drafter, save_layer
    from hat_runtime.model.hf import load_config
    from hat_runtime.model.manifest import identity
    from hat_runtime.training.trainer import Trainer, TrainOptions, frequent_ids, shape_for

    began = time.monotonic()
    weights_id = identity(args.model).weights_id
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    folder = args.work or _work_folder(args, weights_id)
    folder.mkdir(parents=True, exist_ok=True)
    out = args.out
    if args.kind != "layer" and out.is_dir():
        out /= file_name(args.kind, weights_id, args.input_layers)
    if not out.parent.is_dir():
        raise UsageError(f"--out {args.out}: there is no folder {out.parent}")
    teacher = _teacher(args, device)
    texts, answers = _states(args, teacher, folder)
    held_out = {answer.key for answer in answers if answer.key[0] % HELD_OUT == 0}
    usable = [answer for answer in answers if len(answer.ids) - answer.prompt_tokens >= 2]
    seen = [text for text, answer in zip(texts, usable, strict=True) if answer.key not in held_out]
    unseen = [text for text, answer in zip(texts, usable, strict=True) if answer.key in held_out]
    if not seen or not unseen:
        raise UsageError(
            f"--prompts {args.prompts}: too few answers to learn from; at least {HELD_OUT + 1} are needed"
        )
    ids = frequent_ids(seen, teacher.ends.vocab_size, args.draft_vocab)
    head = teacher.ends.head_rows(torch.arange(teacher.ends.vocab_size))
    del teacher
    torch.manual_seed(0)
    net = DrafterNet(shape_for(args.kind, load_config(args.model)))
    options = TrainOptions(epochs=args.epochs, learning_rate=args.learning_rate)
    trainer = Trainer(net, seen, head, ids, options, device=device)
    with ProgressBar() as progress:
        trainer.run(
            folder / f"{args.kind}-m{args.input_layers}.checkpoint",
            lambda now: progress(f"training (loss {now.loss:.2f})", now.step, now.steps),
        )
    found = trainer.acceptance(unseen)
    rows = sum(len(text.ids) - 1 - text.prompt_tokens for text in seen)
    notes = {
        "trained_on": f"{len(seen)} answers, {rows} tokens",
        "epochs": args.epochs,
        "held_out_acceptance": [round(share, 4) for share in found.by_depth],
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    if args.kind == "layer":
        from hat_runtime.model.draft_model import build_draft_model

        layer = folder / f"layer-m{args.input_layers}.safetensors"
        save_layer(layer, net)
        build_draft_model(args.model, layer, args.out, args.input_layers)
    else:
        save_drafter(out, net, DrafterInfo(net.shape, weights_id, args.input_layers, notes), ids)
    depths = ", ".join(f"{share:.3f}" for share in found.by_depth)
    print(f"held-out acceptance by depth: {depths}; {found.tokens_a_round():.2f} tokens a round of 6 drafts")
    print(f"wrote {out}")
    return 0


def _work_folder(args: argparse.Namespace, weights_id: str) -> Path:
    from hat_runtime.model.cache import cache_dir

    # Answers depend on all of these.
    about = (weights_id, args.prompts.resolve(), args.limit, args.max_new_tokens, args.max_prompt_tokens)
    name = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
    return cache_dir() / "drafters" / name


def _teacher(args: argparse.Namespace, device: str) -> Teacher:
    import torch

    from hat_runtime.training.teacher import Teacher

    longest = args.max_prompt_tokens + args.max_new_tokens + 16
    return Teacher(
        args.model, args.input_layers, torch.bfloat16, device, kv_tokens=args.concurrency * longest
    )


def _states(
    args: argparse.Namespace, teacher: Teacher, folder: Path
) -> tuple[list[TextStates], list[AnsweredText]]:
    from hat_runtime.data import read_prompts
    from hat_runtime.device.chat import PromptEncoder
    from hat_runtime.model.hf import load_tokenizer
    from hat_runtime.training.answers import AnswerOptions, read_answers, write_answers
    from hat_runtime.training.features import read_features, write_features

    encoder = PromptEncoder(load_tokenizer(args.model))
    prompts = [
        encoder.encode_chat([{"role": "user", "content": prompt.text}])
        if prompt.chat and encoder.has_chat_template
        else encoder.encode_text(prompt.text)
        for prompt in read_prompts(args.prompts, args.limit)
    ]
    options = AnswerOptions(
        args.max_new_tokens,
        args.samples,
        concurrency=args.concurrency,
        max_prompt_tokens=args.max_prompt_tokens,
    )
    with ProgressBar() as progress:
        path = folder / "answers.jsonl"
        write_answers(
            teacher, prompts, path, options, lambda done, total: progress("answering prompts", done, total)
        )
        answers = read_answers(path)
        shards = write_features(
            teacher,
            answers,
            folder / f"states-m{args.input_layers}",
            lambda done, total: progress("computing states", done, total),
        )
    return list(read_features(shards)), answers


COMMAND = Command("train-drafter", "train what guesses tokens on the device", _configure, _run)
