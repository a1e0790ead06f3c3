"""A cloud and a device process on this machine, with or without an emulated link between them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hat_runtime.cli.completions import Answer, stream_chat
from hat_runtime.cli.processes import Child, Children, free_address, hat_command
from hat_runtime.emulation.link import EmulatedLink
from hat_runtime.emulation.spec import LinkSpec
from hat_runtime.errors import HatError

INPUT_LAYERS = 3
READY_S = 180.0
"""For both processes to load the model; a crowded machine takes its time."""
_DEATH_S = 0.3
"""A dying process closes its connections a little before its parent can see that it has ended."""


@dataclass(frozen=True)
class PairConfig:
    """What to start."""

    model: Path
    link: LinkSpec | None = None
    """None: loopback as it is."""
    input_layers: int = INPUT_LAYERS
    dtype: str = "bfloat16"
    chunk_tokens: int = 128
    drafter: str = "none"
    listen: str = "127.0.0.1:0"
    """Of the device's API; port 0: a free one."""
    device_cores: frozenset[int] | None = None
    """Processor cores that the device may use; None: all of ours."""
    cloud_cores: frozenset[int] | None = None
    draft_model: Path | None = None
    """Mode picospec, with this model on the device; None: mode hat."""
    speculation: tuple[str, ...] = ()
    """Further options of `hat device serve`."""

    @property
    def cloud_options(self) -> list[str]:
        """What makes the cloud one of the mode."""
        if self.draft_model is not None:
            return ["--mode", "picospec"]
        return ["--input-layers", str(self.input_layers)]

    @property
    def device_options(self) -> list[str]:
        """What makes the device one of the mode."""
        if self.draft_model is None:
            return [*self.speculation]
        return ["--mode", "picospec", "--draft-model", str(self.draft_model), *self.speculation]


@dataclass(frozen=True)
class Asked:
    """An answer, and what crossed the emulated link for it (TCP payload bytes)."""

    answer: Answer
    up_bytes: int
    down_bytes: int


@dataclass(frozen=True)
class Pair:
    """Device and cloud, ready to answer."""

    config: PairConfig
    url: str
    """The device's base URL, without /v1."""
    cloud_http: str
    """The cloud's health and metrics, base URL."""
    link: EmulatedLink | None
    device: Child
    cloud: Child

    def ask(
        self, question: str, max_tokens: int, chunk_tokens: int, on_text: Callable[[str], None] | None = None
    ) -> Asked:
        """One question, greedily; chunk_tokens 0 is the plain U-shape.

        Raises:
            HatError: something broke; if a process has ended, the text shows its last lines.
        """
        up, down = self.link.transferred() if self.link else (0, 0)
        try:
            answer = stream_chat(
                self.url, question, max_tokens=max_tokens, chunk_tokens=chunk_tokens, on_text=on_text
            )
        except HatError:
            time.sleep(_DEATH_S)
            for child in (self.cloud, self.device):
                child.check()
            raise
        up_after, down_after = self.link.transferred() if self.link else (0, 0)
        return Asked(answer, up_after - up, down_after - down)


@contextlib.contextmanager
def running_pair(
    config: PairConfig, children: Children, say: Callable[[str], None] = lambda _: None
) -> Iterator[Pair]:
    """Start link, cloud and device, and wait until they are ready.

    Conversations are not kept: every prompt goes up whole, so that answers can be compared.

    Raises:
        HatError: one of them ends or takes too long.
    """
    cloud_address, cloud_http, api = free_address(), free_address(), config.listen
    if api.endswith(":0"):
        api = free_address()
    common = ["--model", str(config.model), "--dtype", config.dtype]
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(EmulatedLink(cloud_address, config.link)) if config.link else None
        say("Starting the cloud and the device ...")
        # Together, because most of the time goes into loading libraries; the device waits for the cloud.
        command = hat_command("cloud", "serve", *common, *config.cloud_options)
        command += ["--listen", cloud_address, "--http-listen", cloud_http]
        cloud = children.start("cloud", command, cores=config.cloud_cores)
        command = hat_command("device", "serve", *common, *config.device_options, "--listen", api)
        command += ["--cloud", link.address if link else cloud_address]
        command += ["--chunk-tokens", str(config.chunk_tokens), "--keep-sessions", "0", "--grace", "1"]
        command += ["--drafter", config.drafter] if config.draft_model is None else []
        device = children.start("device", command, cores=config.device_cores)
        cloud.wait_ready(f"http://{cloud_http}/readyz", READY_S, tick=device.check)
        device.wait_ready(f"http://{api}/readyz", READY_S, tick=cloud.check)
        yield Pair(config, f"http://{api}", f"http://{cloud_http}", link, device, cloud)
