"""Writes the chart's dashboards.

Usage: python -m scripts.dashboards   (writes charts/hat-operator/dashboards/*.json)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from scripts.dashboards.cloud import cloud
from scripts.dashboards.controller import controller
from scripts.dashboards.device import device
from scripts.dashboards.fleet import fleet

FOLDER = Path(__file__).resolve().parents[2] / "charts" / "hat-operator" / "dashboards"


def files() -> dict[str, str]:
    """The content of every file in FOLDER."""
    boards = [make().build() for make in (fleet, device, cloud, controller)]
    return {
        f"{board.uid}.json": json.dumps(board, cls=JSONEncoder, indent=1, sort_keys=True, ensure_ascii=False)
        + "\n"
        for board in boards
    }


def main() -> int:
    """Writes the files, and deletes those that are no more."""
    FOLDER.mkdir(exist_ok=True)
    wanted = files()
    for path in FOLDER.glob("*.json"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
