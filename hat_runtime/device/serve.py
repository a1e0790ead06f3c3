"""A whole device: its part of the model, the link to the cloud, the HTTP API."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry

from hat_runtime import http
from hat_runtime.device.api.answers import Offline, Served
from hat_runtime.device.api.app import MAX_BODY_BYTES, Api, make_app
from hat_runtime.device.api.gate import Gate
from hat_runtime.device.api.stream import KEEP_ALIVE_S
from hat_runtime.device.chat import PromptEncoder
from hat_runtime.device.connect import connect
from hat_runtime.device.drafting.factory import AUTO, check_name
from hat_runtime.device.generator import Generator, GeneratorConfig
from hat_runtime.device.metrics import DeviceMetrics
from hat_runtime.device.offline import CHOICES, DRAFT_ONLY, REFUSE, CloudPresence, OfflineGenerator
from hat_runtime.device.token_answer import SpeculationConfig
from hat_runtime.device.token_connect import connect_tokens
from hat_runtime.device.token_steps import MODE
from hat_runtime.errors import CloudUnavailable, HandshakeError, UsageError
from hat_runtime.log import announce
from hat_runtime.model.hf import load_config, load_tokenizer
from hat_runtime.process import spare_collector
from hat_runtime.security.exposure import check_dialled, check_exposed
from hat_runtime.security.folder import TlsFolder
from hat_runtime.security.keys import KeyFile
from hat_runtime.security.metrics import measure_expiry
from hat_runtime.security.spiffe import DEVICE
from hat_runtime.signals import wait_for_termination
from hat_runtime.wire.codec import CodecChoice

log = logging.getLogger(__name__)

RECONNECT_S = 2.0
"""Between two tries to reach the cloud while starting."""

READY_TIMEOUT_S = 3.0
"""For the cloud's answer to a readiness check; kubelet's own timeout is often 1 to 5 s."""


@dataclass(frozen=True)
class DeviceConfig:
    """What `hat device serve` was told."""

    model: Path
    cloud: str
    """HOST:PORT of the cloud's gRPC server."""
    mode: str = "hat"
    draft_model: Path | None = None
    """Of mode "picospec", which needs one."""
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    """Of mode "picospec"."""
    listen_host: str = "127.0.0.1"
    listen_port: int = 0
    """0 takes a free port."""
    dtype: str = "bfloat16"
    codecs: CodecChoice = field(default_factory=CodecChoice)
    """How shallow states travel."""
    device: str = "auto"
    """torch device of the device's layers: "auto" (CUDA where there is one), "cpu" or "cuda"."""
    kv_tokens: int = 32768
    """Tokens that all sessions of this device may hold together."""
    drafter: str = AUTO
    """What drafts, as --drafter names it."""
    model_name: str | None = None
    """In the API; None for the folder's name."""
    max_concurrent: int = 8
    max_waiting: int = 32
    api_key_file: Path | None = None
    tls: Path | None = None
    """Folder of --tls; None: without TLS."""
    insecure: bool = False
    """The cloud may be elsewhere without TLS, and the API listen elsewhere than on loopback without keys."""
    max_body_bytes: int = MAX_BODY_BYTES
    keep_alive_s: float = KEEP_ALIVE_S
    grace_s: float = 10.0
    """For running answers when the server ends."""
    offline: str = REFUSE
    """What new requests get while the cloud is away: "refuse" an error, "draft-only" the small model's own answer."""
    cloud_wait_s: float = 0.0
    """How long to try to reach the cloud while starting."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    """Further policies."""

    def __post_init__(self) -> None:
        check_name(self.drafter)
        if self.max_concurrent < 1:
            raise UsageError(f"--max-concurrent {self.max_concurrent}: must be at least 1")
        if self.max_waiting < 0:
            raise UsageError(f"--max-waiting {self.max_waiting}: must be 0 or more")
        if self.mode == MODE and self.draft_model is None:
            raise UsageError("--mode picospec needs --draft-model")
        if self.offline not in CHOICES:
            raise UsageError(f"--offline {self.offline!r}: must be one of {', '.join(CHOICES)}")
        if self.offline == DRAFT_ONLY and self.mode != MODE and not self.drafter.startswith("model:"):
            raise UsageError(
                f"--offline {DRAFT_ONLY} needs a whole small model on this device: --drafter model:FOLDER or --mode "
                f"picospec. With --drafter {self.drafter} only a part of a model is here, without text of its own"
            )
        if self.grace_s < 0:
            raise UsageError(f"--grace {self.grace_s}: must be 0 or more seconds")
        check_dialled(self.cloud, self.tls, insecure=self.insecure)
        check_exposed(
            self.listen_host,
            self.listen_port,
            "--listen",
            protected=self.api_key_file is not None,
            needs="it needs --api-key-file FILE",
            insecure=self.insecure,
        )

    @property
    def name(self) -> str:
        """The model's name in the API."""
        return self.model_name or self.model.resolve().name


@dataclass(frozen=True)
class RunningDevice:
    """A device that serves."""

    url: str
    """Base URL without /v1."""
    model_name: str
    generator: Generator
    metrics: DeviceMetrics


@asynccontextmanager
async def running_device(config: DeviceConfig) -> AsyncIterator[RunningDevice]:
    """Serve health at once, load the model, then serve the API until the context ends.

    On exit, running answers get `grace_s` seconds to end, and then an error.

    Raises:
        HatError: the address cannot be listened on, the cloud cannot be reached or holds another model, or the model
            folder cannot be used.
    """
    metrics = DeviceMetrics(CollectorRegistry())
    tls = None if config.tls is None else TlsFolder(config.tls, DEVICE)
    if tls is not None:
        measure_expiry(tls, metrics.registry)
    gate = Gate(config.max_concurrent, config.max_waiting)
    generator: Generator | None = None
    presence = CloudPresence(lambda: check_cloud())

    async def check_cloud() -> None:
        assert generator is not None
        await _check_cloud(generator)

    api = Api(
        model_name=config.name,
        registry=metrics.registry,
        gate=gate,
        check_cloud=check_cloud,
        keys=None if config.api_key_file is None else KeyFile(config.api_key_file),
        max_body_bytes=config.max_body_bytes,
        keep_alive_s=config.keep_alive_s,
        created=int(time.time()),
    )
    bound = http.bind(config.listen_host, config.listen_port, "--listen")
    async with http.serving(make_app(api), bound) as url:
        try:
            encoder = await asyncio.to_thread(_load_encoder, config.model)
            generator = await _connect(config, metrics, api, tls)
            revision = generator.binding.model_revision[:12]
            offline = None
            if config.offline == DRAFT_ONLY:
                offline = Offline(OfflineGenerator(generator), presence)
            api.served = Served(generator, encoder, f"hat_{revision}", offline)
            yield RunningDevice(url, config.name, generator, metrics)
        finally:
            try:
                await gate.drain(config.grace_s)
            finally:
                await presence.close()
                if generator is not None:
                    await generator.close()


async def serve_device(config: DeviceConfig) -> None:
    """Serve until SIGTERM or Ctrl-C (a second one cuts the grace time short); says on standard output where.

    Raises:
        HatError: as `running_device`, but a cloud that is away is waited for where the config says so.
    """
    asked = asyncio.create_task(wait_for_termination())
    serving = asyncio.create_task(_serve_forever(config))
    await asyncio.wait((asked, serving), return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    serving.cancel()
    again = asyncio.create_task(wait_for_termination())
    await asyncio.wait((again, serving), return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    serving.cancel()  # asked twice: no more waiting for answers
    with contextlib.suppress(asyncio.CancelledError):
        await serving


async def _serve_forever(config: DeviceConfig) -> None:
    async with running_device(config) as device:
        spare_collector()
        announce(f"hat device: {device.model_name} on {device.url}/v1, cloud {config.cloud}. Try:")
        announce(_example(device, with_key=config.api_key_file is not None))
        await asyncio.Event().wait()


def _example(device: RunningDevice, *, with_key: bool) -> str:
    key = " -H 'Authorization: Bearer KEY'" if with_key else ""
    return (
        f"  curl {device.url}/v1/chat/completions{key} -H 'Content-Type: application/json' "
        f"""-d '{{"model": "{device.model_name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'"""
    )


async def _connect(
    config: DeviceConfig, metrics: DeviceMetrics, api: Api, tls: TlsFolder | None
) -> Generator:
    """A generator, as soon as the cloud can be reached."""
    until = time.monotonic() + config.cloud_wait_s
    while True:
        api.why_not_ready = f"asking the cloud at {config.cloud}, then loading the model"
        try:
            return await _connect_once(config, config.generator, metrics, tls)
        except CloudUnavailable as error:
            if time.monotonic() >= until:
                raise
            api.why_not_ready = str(error)
            log.warning("%s; trying again every %g s", error, RECONNECT_S)
            await asyncio.sleep(RECONNECT_S)


async def _connect_once(
    config: DeviceConfig, policy: GeneratorConfig, metrics: DeviceMetrics, tls: TlsFolder | None
) -> Generator:
    device = _torch_device(config.device)
    if config.draft_model is None:
        return await connect(
            config.model,
            config.cloud,
            config.dtype,
            codecs=config.codecs,
            config=policy,
            metrics=metrics,
            device=device,
            kv_tokens=config.kv_tokens,
            drafter=config.drafter,
            tls=tls,
        )
    return await connect_tokens(
        config.model,
        config.draft_model,
        config.cloud,
        config.dtype,
        speculation=config.speculation,
        config=policy,
        metrics=metrics,
        device=device,
        kv_tokens=config.kv_tokens,
        tls=tls,
    )


def _load_encoder(folder: Path) -> PromptEncoder:
    load_config(folder)  # says what is wrong with the folder; transformers would look for its name on the hub
    return PromptEncoder(load_tokenizer(folder))


def _torch_device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {name!r}: torch {torch.__version__} sees no CUDA device here")
    return name


async def _check_cloud(generator: Generator) -> None:
    """Is the cloud there, and still the same?

    Raises:
        CloudUnavailable: not reachable.
        HandshakeError: it was replaced by one that this device does not fit.
    """
    link, binding = generator.link, generator.binding
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            cloud = (await link.describe()).model
    except TimeoutError:
        raise CloudUnavailable(
            f"the cloud at {link.address} did not answer in {READY_TIMEOUT_S:g} s"
        ) from None
    here = (binding.model_revision, binding.layers.lo, binding.layers.hi)
    if (cloud.model_revision, cloud.lo, cloud.hi) != here:
        raise HandshakeError(
            f"the cloud at {link.address} serves another model or split now; restart this device"
        )
