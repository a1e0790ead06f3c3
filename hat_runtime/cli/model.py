"""`hat model`: fetch, convert, split and check models."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hat_runtime.cli.command import Command
from hat_runtime.cli.processes import exits_on_sigterm
from hat_runtime.cli.progress import ProgressBar

_PREPARE = """\
Write a model as a folder of safetensors with configuration, tokenizer and hat_manifest.json, which tells device and
cloud whether they hold the same model. With --part the folder holds only what one side needs, and only that is fetched.
--part draft writes the small model for a device of --mode picospec, where one comes with HAT (for `default`).

sources:
  default    SmolLM2-135M-Instruct, a small chat model (fetched once, 98 MB)
  FOLDER     a Hugging Face model folder with safetensors
  FILE.gguf  a model in llama.cpp's format
  HUB_ID     ORGANISATION/NAME or ORGANISATION/NAME@REVISION on the Hugging Face hub
             (HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE are honoured)

examples:
  hat model prepare default
  hat model prepare Qwen/Qwen3-0.6B --out qwen3
  hat model prepare Qwen/Qwen3-0.6B --part device --input-layers 3 --out qwen3-device
  hat model prepare default --part draft --out smollm2-draft
"""


def _configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    prepare = actions.add_parser(
        "prepare",
        help="fetch or convert a model into a folder that device and cloud can load",
        description=_PREPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prepare.add_argument("source", metavar="SOURCE", help="default, FOLDER, FILE.gguf or HUB_ID")
    prepare.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to write (default: a folder of the cache)"
    )
    prepare.add_argument(
        "--part",
        choices=("all", "device", "cloud", "draft"),
        default="all",
        help="which side's part, or the draft model for it (default all)",
    )
    prepare.add_argument(
        "--input-layers",
        type=int,
        metavar="M",
        help="layers on the device; goes with --part device and cloud",
    )
    prepare.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="number format of the stored weights (default: as they are; bfloat16 for GGUF)",
    )
    prepare.add_argument("--json", action="store_true", help="print the folder and the model's ids as JSON")
    prepare.set_defaults(run=_run_prepare)
    verify = actions.add_parser(
        "verify",
        help="check every file of a prepared folder",
        description="Check size and sha256 of every file of a folder that `hat model prepare` wrote.",
    )
    verify.add_argument("folder", type=Path, metavar="FOLDER", help="as `hat model prepare` wrote it")
    verify.add_argument("--json", action="store_true", help="print the model's ids as JSON")
    verify.set_defaults(run=_run_verify)


def _run_prepare(args: argparse.Namespace) -> int:
    from hat_runtime.errors import UsageError
    from hat_runtime.model.draft_model import prepare_draft_model
    from hat_runtime.model.manifest import Manifest
    from hat_runtime.model.prepare import prepare

    # As the first process of a container it would otherwise not end by SIGTERM.
    with exits_on_sigterm(), ProgressBar() as progress:
        if args.part == "draft":
            for option, value in (("--input-layers", args.input_layers), ("--dtype", args.dtype)):
                if value is not None:
                    raise UsageError(f"{option} {value} does not go with --part draft")
            folder = prepare_draft_model(args.source, args.out, progress)
        else:
            folder = prepare(args.source, args.out, args.part, args.input_layers, args.dtype, progress)
    _print(folder, Manifest.load(folder), args.json)
    return 0


def _run_verify(args: argparse.Namespace) -> int:
    from hat_runtime.model.manifest import verify_files

    with ProgressBar() as progress:
        manifest = verify_files(args.folder, deep=True, progress=progress)
    _print(args.folder, manifest, args.json)
    return 0


def _print(folder: Path, manifest: object, as_json: bool) -> None:
    from hat_runtime.model.manifest import Manifest

    assert isinstance(manifest, Manifest)
    part = manifest.part
    if as_json:
        facts = {
            "folder": str(folder.absolute()),
            "source": manifest.source,
            "weights_id": manifest.weights_id,
            "model_revision": manifest.model_revision,
            "num_layers": manifest.num_layers,
            "dtype": manifest.dtype,
            "part": {"kind": part.kind, "lo": part.lo, "hi": part.hi},
            "bytes": sum(file.size for file in manifest.files.values()),
        }
        print(json.dumps(facts))
    else:
        ends = "" if part.kind == "cloud" else " with embedding and head"
        print(
            f"{folder}: {manifest.source}, {manifest.dtype}, layers {part.lo}:{part.hi} of {manifest.num_layers}{ends}"
        )


COMMAND = Command("model", "fetch, convert, split and check models", _configure)
