"""Mixed traffic with random faults for a long time: every answer is checked, and nothing grows.

    python benchmarks/soak.py                 thirty minutes; writes docs/benchmarks/soak.md
    python benchmarks/soak.py --minutes 1     shorter

Both modes at once with tiny random models in float32, whose answers transformers' whole model gave beforehand.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from common import REPORTS, ROOT, facts, progress, report, table, warn_if_busy

sys.path.insert(0, str(ROOT))  # the tiny models of the tests

from soaking.questions import Exam, make_exam
from soaking.site import Census, Site, census, running_site
from soaking.traffic import CANCELLED, CUT, EXACT, REFUSED, WRONG, Client, Tally

from hat_runtime.cloud.serve import CloudConfig
from hat_runtime.device.serve import DeviceConfig
from hat_runtime.errors import HatError
from tests.runtime.picospec_pair import perturbed
from tests.tiny_chat import make_tiny_chat_model

NAME = "tiny"
CLIENTS = 5
ANSWER_S = 120.0
"""Most that an answer takes."""
"""Of each device; it generates four answers at once."""
LOOKS = 10
"""Times that traffic is halted to look for growth; the first is after a tenth of the time."""
ENDINGS = (EXACT, CANCELLED, CUT, REFUSED, WRONG)
FAULT_EVERY_S = (1.0, 6.0)


@dataclass
class Outcome:
    """Of one mode, and of the process."""

    tallies: dict[str, Tally]
    faults: dict[str, Counter[str]]
    looks: list[tuple[float, Census]] = field(default_factory=list)
    """Seconds from the start, and what was seen."""

    def problems(self) -> list[str]:
        """What must not be."""
        found = [problem for tally in self.tallies.values() for problem in tally.problems]
        first, last = self.looks[0][1], self.looks[-1][1]
        if last.rss_mib > 1.05 * first.rss_mib + 16:
            found.append(f"memory grew from {first.rss_mib:.0f} to {last.rss_mib:.0f} MiB")
        if last.descriptors > first.descriptors + 8:
            found.append(f"file descriptors grew from {first.descriptors} to {last.descriptors}")
        if last.tasks > first.tasks + 8:
            found.append(f"tasks grew from {first.tasks} to {last.tasks}")
        middle = self.looks[len(self.looks) // 2][
            1
        ]  # a label's value may come late, a series for each request not
        if last.series > middle.series + 40:
            found.append(f"series grew from {middle.series} to {last.series}")
        found += [f"{look.pages} pages in use without traffic" for _, look in self.looks if look.pages]
        return found


async def soak(seconds: float, folder: Path, seed: int = 1, looks: int = LOOKS) -> Outcome:
    """Traffic and faults for so long.

    Args:
        seconds: of traffic; looks come on top.
        folder: for the models.
        seed: of questions and faults.
        looks: how often to look for growth.
    """
    target = make_tiny_chat_model(folder / "target")
    draft = perturbed(target, folder / "draft", 0.01)
    exam = make_exam(target, NAME)
    tiny: dict[str, Any] = {"model": target, "dtype": "float32"}
    common_cloud: dict[str, Any] = {"kv_pages": 512, "drain_s": 0.1, "max_sessions": 32}
    common_device: dict[str, Any] = {
        "cloud": "127.0.0.1:0",  # replaced by the link's
        "model_name": NAME,
        "kv_tokens": 8192,
        "max_concurrent": 4,
        "grace_s": 0.5,
    }
    async with AsyncExitStack() as stack:
        sites = {
            "hat": await stack.enter_async_context(
                running_site(
                    CloudConfig(**tiny, **common_cloud, input_layers=2), DeviceConfig(**tiny, **common_device)
                )
            ),
            "picospec": await stack.enter_async_context(
                running_site(
                    CloudConfig(**tiny, **common_cloud, mode="picospec"),
                    DeviceConfig(**tiny, **common_device, mode="picospec", draft_model=draft),
                )
            ),
        }
        outcome = Outcome(
            {mode: Tally() for mode in sites}, {mode: site.faults for mode, site in sites.items()}
        )
        clients = [
            client
            for number, (mode, site) in enumerate(sites.items())
            for client in await _clients(stack, site, exam, outcome.tallies[mode], 1000 * seed + 100 * number)
        ]
        rng = random.Random(seed)
        for look in range(looks):
            await _traffic(clients, list(sites.values()), seconds / looks, rng)
            outcome.looks.append((seconds * (look + 1) / looks, await census(list(sites.values()))))
            done = sum(sum(tally.counts.values()) for tally in outcome.tallies.values())
            progress(f"{100 * (look + 1) // looks} %: {done} requests, {outcome.looks[-1][1]}")
    return outcome


async def _clients(stack: AsyncExitStack, site: Site, exam: Exam, tally: Tally, seed: int) -> list[Client]:
    assert site.device is not None
    http = httpx.AsyncClient(base_url=site.device.url, timeout=ANSWER_S)
    await stack.enter_async_context(http)
    clients = [Client(http, exam, seed + number, tally) for number in range(CLIENTS)]
    tasks = [asyncio.create_task(client.run()) for client in clients]
    stack.push_async_callback(_end, tasks)
    return clients


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _traffic(
    clients: Sequence[Client], sites: Sequence[Site], seconds: float, rng: random.Random
) -> None:
    """Open the gates for so long, with faults, and wait for the requests that are under way at the end."""
    for client in clients:
        client.open.set()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while (left := deadline - loop.time()) > 0:
        await asyncio.sleep(min(left, rng.uniform(*FAULT_EVERY_S)))
        await rng.choice(sites).harm(rng)
    for client in clients:
        client.open.clear()
    for client in clients:
        await asyncio.wait_for(client.resting.wait(), ANSWER_S)


def markdown(outcome: Outcome) -> str:
    """Three tables."""
    rows = [
        [mode, kind, *(f"{tally.counts[kind, ending]:,}" for ending in ENDINGS)]
        for mode, tally in outcome.tallies.items()
        for kind in sorted({kind for kind, _ in tally.counts})
    ]
    faults = [
        [mode, *(count[kind] for kind in ("stall", "cut", "slow", "restart"))]
        for mode, count in outcome.faults.items()
    ]
    looks = [
        [
            f"{at / 60:.1f}",
            f"{one.rss_mib:.0f}",
            one.descriptors,
            one.tasks,
            one.series,
            one.pages,
            one.sessions,
        ]
        for at, one in outcome.looks
    ]
    tokens = sum(tally.tokens for tally in outcome.tallies.values())
    return "\n\n".join(
        [
            table(["mode", "requests", *ENDINGS], rows),
            f"{tokens:,} tokens were compared.",
            table(["mode", "stalls", "cuts", "slow spells", "restarts of the cloud"], faults),
            table(
                ["minute", "RSS, MiB", "file descriptors", "tasks", "series", "pages in use", "sessions"],
                looks,
            ),
        ]
    )


ABOUT = """
Two devices with their clouds, one in each mode, under traffic without a pause: chats, completions, streams and clients
that go away, at four temperatures. Links stall, break and turn slow, and clouds are ended and started again, at random.
Every answer is compared with that of transformers' whole model; of one that is cut, what came before the error.
"exact" is the whole answer, "cut with an error" one that a fault ended, "refused" one that never began (429, 503).
Devices, clouds and clients share a process, whose growth is looked for ten times, without traffic. RSS is what is left
once free memory was given back (malloc_trim: each cloud that is started again in this process leaves some to glibc);
it includes the models and torch.
"""


def main() -> int:
    """Run, print, write the report. Returns 1 if something was wrong or grew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="of traffic (default 30)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=REPORTS / "soak.md", metavar="FILE")
    args = parser.parse_args()
    warn_if_busy()
    seen_on = facts(None)
    with tempfile.TemporaryDirectory() as folder:
        outcome = asyncio.run(soak(60 * args.minutes, Path(folder), args.seed))
    problems = outcome.problems()
    verdict = "\n".join(f"- PROBLEM: {one}" for one in problems) or "Nothing grew, and no answer was wrong."
    text = report("Soak", ABOUT, seen_on, f"{markdown(outcome)}\n\n{verdict}")
    print(text)
    args.out.write_text(text, encoding="utf-8")
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HatError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
