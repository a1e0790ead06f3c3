"""`hat demo`: the whole of HAT on one machine, in one command."""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

from hat_runtime.cli.command import Command
from hat_runtime.cli.options import add_dtype, check_positive, parse_host_port

EXAMPLES = """\
examples:
  hat demo
  hat demo --prompt "Why is the sky blue?" --link 10mbit,80ms
"""


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Prepare a small chat model, start a cloud and a device process on this machine with an emulated link between "
        "them, and let them answer a question. A table then shows how long it took, how many bytes crossed the link, "
        "what physics would have allowed, and the same without chunks (the plain U-shape)."
    )
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--prompt", metavar="TEXT", help="what to ask (default: a story and a question about it)"
    )
    parser.add_argument(
        "--link",
        default="60mbit,20ms",
        metavar="RATE,RTT",
        help="the link between device and cloud: rate each way and round-trip time (default %(default)s)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=96,
        metavar="N",
        help="most tokens of the answer (default %(default)s)",
    )
    parser.add_argument(
        "--chunk-tokens",
        type=int,
        default=128,
        metavar="N",
        help="tokens of the prompt that travel together (default %(default)s)",
    )
    parser.add_argument(
        "--input-layers", type=int, default=3, metavar="M", help="layers on the device (default %(default)s)"
    )
    parser.add_argument(
        "--model",
        default="default",
        metavar="SOURCE",
        help="as in `hat model prepare` (default: a small chat model)",
    )
    parser.add_argument(
        "--listen",
        default="127.0.0.1:0",
        metavar="HOST:PORT",
        help="where the device serves its API meanwhile (default: a free port)",
    )
    add_dtype(parser)
    parser.add_argument(
        "--json", action="store_true", help="print the figures as one JSON object, and no text"
    )


def _run(args: argparse.Namespace) -> int:
    from hat_runtime.cli import demo_report
    from hat_runtime.cli.demo_text import PROMPT
    from hat_runtime.cli.limit_parts import bare_layers, limit_parts
    from hat_runtime.cli.processes import Children, check_free, exits_on_sigterm
    from hat_runtime.cli.progress import ProgressBar
    from hat_runtime.cli.split_pair import PairConfig, running_pair
    from hat_runtime.emulation.spec import LinkSpec

    link = LinkSpec.parse(args.link)
    host, port = parse_host_port(args.listen, "--listen")
    for option in ("max_new_tokens", "chunk_tokens", "input_layers"):
        check_positive(getattr(args, option), "--" + option.replace("_", "-"))
    check_free(host, port, "--listen")
    prompt = PROMPT if args.prompt is None else args.prompt

    def say(text: str = "", end: str = "\n") -> None:
        if not args.json:
            print(text, end=end, flush=True)

    with exits_on_sigterm(), Children() as children:
        from hat_runtime.model.prepare import prepare

        with ProgressBar() as progress:
            folder = prepare(args.model, progress=progress)
        config = PairConfig(
            folder,
            link,
            input_layers=args.input_layers,
            dtype=args.dtype,
            chunk_tokens=args.chunk_tokens,
            listen=args.listen,
        )
        with running_pair(config, children, say) as pair:
            for chunk in (args.chunk_tokens, 0):  # what is done for the first time is slow everywhere
                pair.ask(prompt, 2, chunk, lambda _: None)
            say(f"\n{_wrapped(prompt)}\n\n--- the answer ---")
            hat = pair.ask(prompt, args.max_new_tokens, args.chunk_tokens, lambda text: say(text, end=""))
            say("\n---\n\nThe same without chunks ...")
            u_shape = pair.ask(prompt, args.max_new_tokens, 0)
            say("Measuring what this machine and this link allow ...")
            tokens = hat.answer.usage["prompt_tokens"]
            bare = bare_layers(folder, args.input_layers, args.dtype, tokens)
            report = demo_report.Report(
                link, limit_parts(bare, bare, link), demo_report.figures(hat), demo_report.figures(u_shape)
            )
    if args.json:
        print(json.dumps(demo_report.as_json(report)))
    else:
        print(f"\n{demo_report.as_text(report)}\n\nThe model is in {_short(folder)}.")
        print("Start the parts yourself: hat cloud serve --help, hat device serve --help")
    return 0


def _wrapped(text: str) -> str:
    """Paragraphs for a terminal."""
    return "\n".join(textwrap.fill(line, 100) for line in text.strip().splitlines())


def _short(folder: Path) -> str:
    """With ~ for the home folder."""
    try:
        return f"~/{folder.relative_to(Path.home())}"
    except ValueError:
        return str(folder)


COMMAND = Command("demo", "See it work: a model split over two processes and a slow link.", _configure, _run)
