"""Writes the digests of the base images into images/variants.toml, as their registry says them now.

Usage: scripts/pin_images.py   (`make pin-images`). Needs skopeo or docker's buildx. A base whose registry does not
answer keeps what stands there, and the command fails: no digest is made up.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ROOT / "images" / "variants.toml"
TIMEOUT_S = 60.0
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class PinError(Exception):
    """A digest cannot be had; the text says why in one line."""


def resolve(reference: str) -> str:
    """Digest of an image for all its platforms, from its registry: sha256:... Raises PinError."""
    if shutil.which("skopeo"):
        # The digest of a manifest is that of its bytes; of an index they are those of the index.
        manifest = _ask(["skopeo", "inspect", "--raw", f"docker://{reference}"])
        return f"sha256:{hashlib.sha256(manifest).hexdigest()}"
    if shutil.which("docker"):
        said = _ask(
            ["docker", "buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}", reference]
        )
        found = said.decode(errors="replace").strip()
        if not _DIGEST.fullmatch(found):
            raise PinError(f"docker says {found!r}, which is no digest")
        return found
    raise PinError("neither skopeo nor docker is here; on Debian and Ubuntu: apt-get install skopeo")


def _ask(command: list[str]) -> bytes:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise PinError(f"the registry did not answer within {TIMEOUT_S:.0f} s") from None
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        raise PinError(words[-1] if words else f"{command[0]} failed with exit code {done.returncode}")
    return done.stdout


def pinned(text: str, resolve: Callable[[str], str] = resolve) -> tuple[str, list[str]]:
    """variants.toml with new digests, and one line for each base that could not be asked for (its digest stays)."""
    digests: dict[str, str] = {}
    problems: dict[str, str] = {}
    for table in tomllib.loads(text).values():
        base = table["base"]
        if not base or base in digests or base in problems:
            continue
        try:
            digests[base] = resolve(base)
        except PinError as error:
            problems[base] = f"{base}: {error}"

    def line(match: re.Match[str]) -> str:
        base = match["base"]
        return f'base = "{base}"\ndigest = "{digests.get(base, match["digest"])}"'

    new = re.sub(r'^base = "(?P<base>[^"]*)"\ndigest = "(?P<digest>[^"]*)"$', line, text, flags=re.M)
    # The lines must stand as this expects them: a digest that is not written must not look like one that is.
    for table in tomllib.loads(new).values():
        if table["base"] in digests and table["digest"] != digests[table["base"]]:
            raise ValueError(f"images/variants.toml: `digest` must follow `base = {table['base']!r}`")
    return new, list(problems.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when all bases are pinned, 1 when a registry did not answer."""
    parser = argparse.ArgumentParser(prog="scripts/pin_images.py", description="Pin the base images.")
    parser.add_argument("--file", type=Path, default=VARIANTS, help="default: images/variants.toml")
    options = parser.parse_args(arguments)
    old = options.file.read_text()
    new, problems = pinned(old)
    if new != old:
        options.file.write_text(new)
    for table, found in tomllib.loads(new).items():
        print(f"{table:6}{found['base'] or '(given at build time)'} {found['digest'] or '(not pinned)'}")
    for problem in problems:
        print(f"pin-images: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
