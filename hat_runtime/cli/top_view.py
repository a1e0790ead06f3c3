"""What `hat top` shows: a block for each device, as wide as the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hat_runtime.cli.top_watch import Device

BARS = "▁▂▃▄▅▆▇█"
LABEL, VALUE = 13, 12
"""Columns of a figure's name and of its value."""
COLUMN = 56
"""A figure with a line that is worth looking at: where two or three of these fit side by side, they stand so."""


def seconds(value: float) -> str:
    """0.0314 -> "31 ms", 1.25 -> "1.25 s"."""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.1f} ms" if value < 0.01 else f"{value * 1e3:.0f} ms"


def rate(bytes_per_s: float) -> str:
    """Mbit/s of bytes per second."""
    mbit = bytes_per_s * 8 / 1e6
    return f"{mbit:.1f} Mbit/s" if mbit < 10 else f"{mbit:.0f} Mbit/s"


def chunk(tokens: float) -> str:
    """A chunk's size; 0 is the whole prompt."""
    return f"{tokens:.0f} tokens" if tokens else "whole prompt"


@dataclass(frozen=True)
class Figure:
    """One line of a block."""

    label: str
    name: str
    show: Callable[[float], str]
    top: float | None = None
    """Value of the highest bar; None: the highest value."""


FIGURES = (
    Figure("TTFT", "ttft_s", seconds),
    Figure("  predicted", "predicted_ttft_s", seconds),
    Figure("TBT", "tbt_s", seconds),
    Figure("chunk size", "chunk_tokens", chunk),
    Figure("uplink", "uplink_bytes_per_s", rate),
    Figure("RTT", "rtt_s", seconds),
    Figure("acceptance", "acceptance", lambda share: f"{100 * share:.0f} %", top=1.0),
)


def view(devices: Sequence[Device], width: int) -> RenderableType:
    """Blocks for a terminal of `width` columns."""
    return Group(*(_block(device, width) for device in devices))


def sparkline(values: Iterable[float], width: int, top: float | None = None) -> str:
    """The last `width` values as bars, the highest for `top` (default: the highest value)."""
    shown = list(values)[-width:] if width > 0 else []
    most = max(shown, default=0.0) if top is None else top
    if most <= 0:
        return BARS[0] * len(shown)
    last = len(BARS) - 1
    return "".join(BARS[max(0, min(last, round(value / most * last)))] for value in shown)


def _block(device: Device, width: int) -> RenderableType:
    stats = device.stats
    body: list[RenderableType] = []
    if device.error is not None:
        body.append(Text(device.error, style="bold red"))
        if stats is not None:
            body.append(Text("the figures are those of before", style="dim"))
    if stats is not None:
        body += [_state(stats), _grid(device, width - 4)]
    title = Text.assemble((device.url, "bold"), f"  {stats['model']}" if stats else "")
    style = "red" if device.error or (stats and stats["cloud"]["ok"] is False) else "green"
    return Panel(
        Group(*body), title=title, title_align="left", box=box.ROUNDED, border_style=style, width=width
    )


def _state(stats: dict[str, Any]) -> Text:
    cloud, sessions = stats["cloud"], stats["sessions"]
    if cloud["ok"]:
        line = Text(f"cloud {cloud['address']}")
    elif cloud["ok"] is None:
        line = Text(f"cloud {cloud['address']}: not known yet")
    else:
        alone = "; the small model answers alone" if stats.get("offline") == "draft-only" else ""
        line = Text(f"the cloud does not answer{alone}: {cloud['reason']}", style="bold red")
    rounds = stats.get("tokens_per_round")
    parts = [
        f"mode {stats['mode']}" if "mode" in stats else "",
        "" if "drafting" not in stats else "drafting on" if stats["drafting"] else "drafting off",
        "" if rounds is None else f"{rounds:.2f} tokens a round",
        f"{sessions['running']} running, {sessions['waiting']} waiting, {sessions['idle']} kept",
    ]
    return Text.assemble(line, "\n", ", ".join(part for part in parts if part))


def _grid(device: Device, width: int) -> Table:
    columns = max(1, min(3, width // COLUMN))
    rows = -(-len(FIGURES) // columns)
    each = (width - 2 * (columns - 1)) // columns
    grid = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    for _ in range(columns):
        grid.add_column(width=each, no_wrap=True, overflow="crop")
    lines = [_line(device, figure, each) for figure in FIGURES]
    lines += [Text()] * (rows * columns - len(lines))
    for row in range(rows):
        grid.add_row(*(lines[row + column * rows] for column in range(columns)))
    return grid


def _line(device: Device, figure: Figure, width: int) -> Text:
    now = device.latest(figure.name)
    line = sparkline(device.values[figure.name], width - LABEL - VALUE - 2, figure.top)
    said = "-" if now is None else figure.show(now)
    return Text.assemble(
        (f"{figure.label:<{LABEL}}", "dim"), (f"{said:>{VALUE}}", "bold"), "  ", (line, "cyan")
    )
