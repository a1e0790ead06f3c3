"""When a pass should wait for sessions that are about to send their next Step.

A pass over few rows costs almost what one over many does: the weights are read once. If half of the sessions are in the
cloud while the other half are on their devices, each waits for the other's pass, and it stays so. Waiting once brings
them together.
"""

from __future__ import annotations

from collections.abc import Iterable


def worth_waiting_s(queued: int, due_s: Iterable[float], pass_s: float) -> float:
    """How long to wait before the next pass: 0, or until one of the expected Steps is due.

    Waiting w seconds costs each queued session w, and saves each session that arrives meanwhile the pass that it would
    have had to wait for; the w with the largest gain is chosen.

    Args:
        queued: sessions that could run now.
        due_s: for each session that is expected, in how many seconds.
        pass_s: seconds that a pass takes.
    """
    best_gain, best_wait = 0.0, 0.0
    for arrived, wait in enumerate(sorted(due for due in due_s if due > 0), start=1):
        gain = arrived * pass_s - queued * wait
        if wait <= pass_s and gain > best_gain:
            best_gain, best_wait = gain, wait
    return best_wait
