"""`hat generate`: answers to a file of prompts, through a cloud or by the plain local model."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hat_runtime.cli import picospec_options
from hat_runtime.cli.chunking_options import add_chunking, chunking_config
from hat_runtime.cli.command import Command
from hat_runtime.cli.drafting_options import add_drafting, drafting_config
from hat_runtime.cli.options import (
    add_dtype,
    add_pad_frames,
    add_tls,
    add_uplink_codec,
    parse_host_port,
    parse_uplink_codec,
)
from hat_runtime.cli.progress import ProgressBar
from hat_runtime.errors import UsageError
from hat_runtime.security.exposure import check_dialled
from hat_runtime.wire.codec_choice import RAW

if TYPE_CHECKING:
    from hat_runtime.data import Prompt

Record = dict[str, Any]
"""What one prompt gives, ready for JSON."""

SPARE_KV_TOKENS = 64
"""Of the device's KV cache, a session: its last page is never quite full."""

_TEXT = """\
Answer every prompt of a file: through a cloud (--cloud), or with transformers' own generate on the whole model
(--local), which is the reference for tokens and time. Decoding is greedy unless --temperature says otherwise.

Prompt files have one JSON object a line, as in Spec-Bench, CNN/DailyMail, GSM8K and HumanEval:
  {"question_id": 81, "turns": ["..."]}         the first turn becomes a chat message
  {"question": "..."} or {"prompt": "..."}      becomes a chat message
  {"task_id": "HumanEval/0", "prompt": "..."}   raw text to be continued

With --json every prompt gives one line with id, prompt_tokens, token_ids, text, finish_reason, ttft_s, tbt_s,
uplink_bytes, downlink_bytes and rounds, in the file's order; a prompt that cannot be answered gives id and error, and
the exit code is 1 at the end.
"""


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.description = _TEXT
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE.jsonl", help="one JSON object a line, as above"
    )
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="model folder, as `hat model prepare` writes it",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--cloud", metavar="HOST:PORT", help="where `hat cloud serve` listens")
    where.add_argument(
        "--local", action="store_true", help="the whole model here, without HAT: the reference"
    )
    add_tls(parser, "reach a cloud that is not on loopback without --tls")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="most new tokens (default 128)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    parser.add_argument(
        "--concurrency", type=int, default=1, metavar="K", help="prompts at a time (default 1)"
    )
    add_chunking(parser)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="keep the likeliest tokens of this total probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default 0)")
    add_drafting(parser)
    picospec_options.add_mode(parser)
    picospec_options.add_speculation(parser)
    add_dtype(parser)
    add_uplink_codec(parser)
    add_pad_frames(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt")


def _run(args: argparse.Namespace) -> int:
    from hat_runtime.data import read_prompts

    _check(args)
    prompts = read_prompts(args.prompts, args.limit)
    failed = 0
    done = 0
    with ProgressBar() as progress:

        def emit(record: Record) -> None:
            nonlocal done, failed
            done += 1
            failed += "error" in record
            print(json.dumps(record, ensure_ascii=False) if args.json else _for_people(record), flush=True)
            progress("answering prompts", done, len(prompts))

        progress("answering prompts", 0, len(prompts))
        if args.local:
            _answer_locally(args, prompts, emit)
        else:
            asyncio.run(_answer_through_cloud(args, prompts, emit))
    return 1 if failed else 0


def _check(args: argparse.Namespace) -> None:
    for option, least in (("max_new_tokens", 1), ("limit", 1), ("concurrency", 1)):
        value = getattr(args, option)
        if value is not None and value < least:
            raise UsageError(f"--{option.replace('_', '-')} {value}: must be {least} or more")
    picospec_options.check(args)
    if args.local:
        if args.mode != "hat":
            raise UsageError(f"--local is the whole model here; --mode {args.mode} goes with --cloud")
        if args.temperature:
            raise UsageError("--local is the greedy reference; --temperature goes with --cloud")
        if args.concurrency != 1:
            raise UsageError("--local answers one prompt at a time; --concurrency goes with --cloud")
        if parse_uplink_codec(args.uplink_codec).names != (RAW,):
            raise UsageError("--local sends nothing; --uplink-codec goes with --cloud")
        if args.pad_frames:
            raise UsageError("--local sends nothing; --pad-frames goes with --cloud")
    else:
        parse_host_port(args.cloud, "--cloud")
        check_dialled(args.cloud, args.tls, insecure=args.insecure)
        parse_uplink_codec(args.uplink_codec)


def _answer_locally(args: argparse.Namespace, prompts: list[Prompt], emit: Callable[[Record], None]) -> None:
    import torch

    from hat_runtime.model.reference import LocalModel

    model = LocalModel(args.model, getattr(torch, args.dtype))
    for prompt in prompts:
        ids = model.encode(prompt.text, prompt.chat)
        record: Record = {"id": prompt.id, "prompt_tokens": len(ids)}
        try:
            answer = model.generate(ids, args.max_new_tokens)
        except UsageError as error:
            emit(record | {"error": str(error)})
            continue
        emit(
            record
            | {
                "token_ids": answer.token_ids,
                "text": answer.text,
                "finish_reason": "stop" if answer.token_ids[-1] in model.eos_token_ids else "length",
                "ttft_s": answer.ttft_s,
                "tbt_s": answer.tbt_s,
                "uplink_bytes": 0,
                "downlink_bytes": 0,
                "rounds": 0,
            }
        )


async def _answer_through_cloud(
    args: argparse.Namespace, prompts: list[Prompt], emit: Callable[[Record], None]
) -> None:
    from hat_runtime.device.bulk import BulkOptions, answer_all
    from hat_runtime.device.chat import PromptEncoder
    from hat_runtime.device.connect import connect
    from hat_runtime.device.generator import Generator, GeneratorConfig
    from hat_runtime.device.sampling import SamplingParams
    from hat_runtime.device.token_connect import connect_tokens
    from hat_runtime.model.hf import context_length, load_tokenizer
    from hat_runtime.security.folder import TlsFolder
    from hat_runtime.security.spiffe import DEVICE

    tls = None if args.tls is None else TlsFolder(args.tls, DEVICE)
    options = BulkOptions(
        max_new_tokens=args.max_new_tokens,
        sampling=SamplingParams(args.temperature, args.top_p, args.seed),
        concurrency=args.concurrency,
    )
    encoder = PromptEncoder(load_tokenizer(args.model))
    if any(prompt.chat for prompt in prompts) and not encoder.has_chat_template:
        raise UsageError(f"--model {args.model} has no chat template, which chat prompts need")
    encoded = [
        encoder.encode_chat([{"role": "user", "content": prompt.text}])
        if prompt.chat
        else encoder.encode_text(prompt.text)
        for prompt in prompts
    ]
    context = context_length(args.model)
    longest = sorted(min(len(ids) + args.max_new_tokens, context) for ids in encoded)[-args.concurrency :]
    # Every prompt stands for itself: no session is kept, so bytes and times do not depend on the one before.
    config = GeneratorConfig(
        max_idle_conversations=0,
        chunking=chunking_config(args),
        drafting=drafting_config(args),
        pad_frames=args.pad_frames,
    )
    kv_tokens = sum(longest) + SPARE_KV_TOKENS * len(longest)
    if (draft := picospec_options.draft_folder(args)) is not None:
        speculation = picospec_options.speculation(args)
        generator: Generator = await connect_tokens(
            args.model,
            draft,
            args.cloud,
            args.dtype,
            config=config,
            kv_tokens=kv_tokens,
            speculation=speculation,
            tls=tls,
        )
    else:
        generator = await connect(
            args.model,
            args.cloud,
            args.dtype,
            codecs=parse_uplink_codec(args.uplink_codec),
            config=config,
            drafter=args.drafter,
            kv_tokens=kv_tokens,
            tls=tls,
        )
    answers = answer_all(generator, encoded, options)
    try:
        for prompt, ids in zip(prompts, encoded, strict=True):
            answer = await anext(answers)
            record: Record = {"id": prompt.id, "prompt_tokens": len(ids)}
            if answer.error is not None:
                emit(record | {"error": answer.error})
                continue
            stats = answer.stats
            emit(
                record
                | {
                    "token_ids": answer.token_ids,
                    "text": encoder.detokenizer.decode(answer.token_ids),
                    "finish_reason": stats.finish_reason,
                    "ttft_s": stats.ttft_s,
                    "tbt_s": stats.tbt_s,
                    "uplink_bytes": stats.uplink_bytes,
                    "downlink_bytes": stats.downlink_bytes,
                    "rounds": stats.rounds,
                    "draft_tokens": stats.draft_tokens,
                    "accepted_tokens": stats.accepted_tokens,
                }
            )
    finally:
        await answers.aclose()
        await generator.close()


def _for_people(record: Record) -> str:
    if "error" in record:
        return f"== {record['id']}: not answered: {record['error']}\n"
    figures = (
        f"{record['prompt_tokens']} prompt tokens, {len(record['token_ids'])} new, "
        f"first after {record['ttft_s'] * 1000:.0f} ms, then {record['tbt_s'] * 1000:.0f} ms each"
    )
    return f"== {record['id']} ({figures})\n{record['text']}\n"


COMMAND = Command("generate", "answer a file of prompts, through a cloud or locally", _configure, _run)
