"""Writes CycloneDX bills of materials of the distribution and of each image, from uv.lock.

Usage: scripts/sbom.py [FOLDER]   (`make sbom` calls it; default dist/sbom)

An image that brings a torch of its own (another index, a Jetson's base) lists it nowhere: what came with the base image
is the base image's. Each image holds its own bill in /opt/hat/share/sbom.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXTRAS: Mapping[str, Sequence[str]] = {
    "hat-platform": ("cloud", "device", "operator", "convert"),
    "hat-operator": ("operator",),
    "hat-cloud": ("cloud", "convert"),
    "hat-edge": ("device", "convert"),
}
"""What is installed, by the name of the distribution or image."""


def bill(extras: Sequence[str]) -> dict[str, Any]:
    """The packages of uv.lock that these extras need, with their files' hashes, as CycloneDX 1.5."""
    wanted = [word for extra in extras for word in ("--extra", extra)]
    command = [str(ROOT / "scripts" / "uv"), "export", "--quiet", "--frozen", "--no-dev", "--no-emit-project"]
    done = subprocess.run(
        [*command, *wanted, "--format", "cyclonedx1.5"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def write(folder: Path) -> list[Path]:
    """NAME.cdx.json in `folder` for each of EXTRAS."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, extras in EXTRAS.items():
        path = folder / f"{name}.cdx.json"
        path.write_text(json.dumps(bill(extras), indent=1) + "\n", encoding="utf-8")
        written.append(path)
    return written


if __name__ == "__main__":
    for path in write(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist" / "sbom"):
        print(path)
