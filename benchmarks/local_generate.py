"""transformers' own generate on the whole model, as a process that answers one request a line.

Nothing of HAT runs in that process. It reads {"ids": [...], "new": N}, prints {"tokens": [...], "ttft_s": ...,
"tbt_s": ...}, and ends with its standard input.

    python benchmarks/local_generate.py FOLDER bfloat16
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hat_runtime.errors import HatError


class Local:
    """The process, seen by a benchmark."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(folder), dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def generate(self, ids: list[int], new: int) -> dict[str, Any]:
        """Greedy tokens and their times."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"ids": ids, "new": new}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise HatError(f"the reference process ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def local_model(folder: Path, dtype: str) -> Iterator[Local]:
    """The reference, ready."""
    local = Local(folder, dtype)
    try:
        yield local
    finally:
        local.close()


class Clock:
    """A transformers streamer that notes when tokens come; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder, dtype = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(generate(model, **json.loads(line))), flush=True)


def generate(model: Any, ids: list[int], new: int) -> dict[str, Any]:
    """Greedy tokens and their times."""
    import torch

    clock = Clock()
    prompt = torch.tensor([ids])
    start = time.perf_counter()
    mask = torch.ones_like(prompt)
    out = model.generate(prompt, attention_mask=mask, max_new_tokens=new, do_sample=False, streamer=clock)
    first, last = clock.times[1], clock.times[-1]
    tokens = out[0, len(ids) :].tolist()
    tbt = (last - first) / (len(tokens) - 1) if len(tokens) > 1 else None
    return {"tokens": tokens, "ttft_s": first - start, "tbt_s": tbt}


if __name__ == "__main__":
    main()
