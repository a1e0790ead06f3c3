"""Measures the parts of a limit: bare layers in a process of their own, the link by raw sockets."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hat_runtime.cli.processes import Children
from hat_runtime.control.limits import LimitParts
from hat_runtime.emulation.measure import measure_link
from hat_runtime.emulation.spec import LinkSpec
from hat_runtime.errors import HatError


def bare_layers(
    folder: Path,
    input_layers: int,
    dtype: str,
    prompt_tokens: int,
    cores: frozenset[int] | None = None,
    timeout_s: float = 600.0,
    drafter: Path | None = None,
) -> dict[str, float]:
    """hat_runtime.model.calibrate's ComputeParts as a dict, in seconds; nothing else should run meanwhile.

    Args:
        folder: a whole model.
        input_layers: layers on the device.
        dtype: "float32" or "bfloat16".
        prompt_tokens: length of the prompt, and of the context of a single token.
        cores: processor cores to use; default: all of ours.
        timeout_s: for all of it.
        drafter: a file of `hat train-drafter`, to have one of its guesses timed.
    """
    command = [str(folder), "--dtype", dtype]
    command += ["--input-layers", str(input_layers), "--prompt-tokens", str(prompt_tokens)]
    command += [] if drafter is None else ["--drafter", str(drafter)]
    return _calibration(command, cores, timeout_s)


def bare_prompts(
    folder: Path,
    input_layers: int,
    lengths: Sequence[int],
    dtype: str,
    cores: frozenset[int] | None = None,
    timeout_s: float = 600.0,
) -> dict[int, tuple[float, float]]:
    """hat_runtime.model.calibrate's prompt_times; nothing else should run meanwhile."""
    command = [str(folder), "--dtype", dtype, "--input-layers", str(input_layers)]
    command += ["--prompts", ",".join(map(str, lengths))]
    found: dict[str, Any] = _calibration(command, cores, timeout_s)
    return {int(length): (shallow, middle) for length, (shallow, middle) in found.items()}


def bare_passes(
    folder: Path,
    tokens: Sequence[int],
    dtype: str,
    cores: frozenset[int] | None = None,
    timeout_s: float = 600.0,
) -> dict[int, float]:
    """Seconds of a bare pass of the whole model for each number of tokens; nothing else should run meanwhile."""
    command = [
        str(folder),
        "--dtype",
        dtype,
        "--prompt-tokens",
        "200",
        "--passes",
        ",".join(map(str, tokens)),
    ]
    return {int(count): seconds for count, seconds in _calibration(command, cores, timeout_s).items()}


def _calibration(arguments: list[str], cores: frozenset[int] | None, timeout_s: float) -> dict[str, float]:
    command = [sys.executable, "-m", "hat_runtime.model.calibrate", *arguments]
    with Children() as children:
        child = children.start("calibration", command, cores=cores)
        child.wait(timeout_s)
        if child.exit_code != 0:
            child.check()
        try:
            parts: dict[str, float] = json.loads(child.output().strip().splitlines()[-1])
        except (ValueError, IndexError) as error:
            raise HatError(f"the calibration printed no result: {child.output()[-500:]!r}") from error
        return parts


def limit_parts(
    device: dict[str, float],
    cloud: dict[str, float],
    link: LinkSpec,
    prompts: dict[int, tuple[float, float]] | None = None,
) -> LimitParts:
    """Put a limit together; the link is emulated anew and measured.

    Args:
        device: bare_layers on the device's cores: t_in, t_head and s are taken.
        cloud: bare_layers on the cloud's cores: t_cloud and beta are taken.
        link: what lies between them.
        prompts: `bare_prompts`, for limits at prompts' own lengths.
    """
    seen = measure_link(link)
    return LimitParts(
        hidden_bytes=device["hidden_bytes"],
        rate_up=seen.up_bytes_per_s,
        rate_down=seen.down_bytes_per_s,
        rtt=seen.rtt_s,
        t_in=device["t_in"],
        t_head=device["t_head"],
        t_cloud=cloud["t_cloud"],
        beta=cloud["beta"],
        s=device["s"],
        device_prompts=tuple((length, shallow) for length, (shallow, _) in sorted((prompts or {}).items())),
        cloud_prompts=tuple((length, middle) for length, (_, middle) in sorted((prompts or {}).items())),
    )
