"""A whole cloud: model part, engine, gRPC server, HTTP server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from google.protobuf.descriptor_pool import Default
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from hat_runtime import __version__
from hat_runtime.cloud.access import Access
from hat_runtime.cloud.admin import control_routes, health_routes
from hat_runtime.cloud.admission import Admission, AdmissionConfig
from hat_runtime.cloud.devices import DeviceTable
from hat_runtime.cloud.engine import Engine, EngineConfig
from hat_runtime.cloud.handshake import Served
from hat_runtime.cloud.metrics import CloudMetrics
from hat_runtime.cloud.policy import PolicyStore
from hat_runtime.cloud.ports import add_grpc_port, serving_http
from hat_runtime.cloud.quotas import QuotaStore
from hat_runtime.cloud.resumption import TTL_S
from hat_runtime.cloud.server import SERVICE, RuntimeService, make_server
from hat_runtime.cloud.token_engine import TokenEngine
from hat_runtime.cloud.tokens import MODE as PICOSPEC
from hat_runtime.cloud.watchdog import LIMIT_S, Watchdog
from hat_runtime.errors import UsageError
from hat_runtime.http import bind
from hat_runtime.model import hf
from hat_runtime.model.attention import make_backend
from hat_runtime.model.manifest import PartSpan, identity
from hat_runtime.model.runner import LayerRunner, make_cache
from hat_runtime.model.speculation import TOP_K
from hat_runtime.model.split import LayerRange, cloud_layers
from hat_runtime.model.tokenizer_id import tokenizer_id
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from hat_runtime.security.exposure import check_exposed
from hat_runtime.security.metrics import measure_expiry
from hat_runtime.threads import in_passing_thread
from hat_runtime.wire import codec, frames

log = logging.getLogger(__name__)

CPU_KV_BYTES = 1 << 30
CUDA_KV_SHARE = 0.8
_LAST_WORDS_S = 2.0
"""For the statuses of streams whose engine serves nobody any more."""


@dataclass(frozen=True)
class CloudConfig:
    """What `hat cloud serve` was told."""

    model: Path
    input_layers: int | None = None
    """m; None takes it from the manifest of a folder that holds the cloud's part only."""
    mode: str = "hat"
    """"hat": the layers from m on, for hidden states; "picospec": the whole model, for token ids."""
    host: str = "127.0.0.1"
    port: int = 0
    http_host: str = "127.0.0.1"
    http_port: int = 0
    dtype: str = "bfloat16"
    device: str = "auto"
    """"auto" (CUDA where there is one), "cpu" or "cuda"."""
    attention: str = "sdpa"
    page_tokens: int = 16
    kv_bytes: int | None = None
    """Memory for the KV cache; None for 1 GiB on a CPU, 80 % of the free memory on a GPU."""
    kv_pages: int | None = None
    """Pages of the KV cache, instead of kv_bytes."""
    max_sessions: int = 64
    max_waiting: int = 0
    """Devices that may wait for a session where there is no place; 0: they are refused at once."""
    tbt_target_s: float | None = None
    """No session is let in that would make a decoding Step take longer; None: no bound."""
    quotas_file: Path | None = None
    """Limits of tenants and devices, read again when it changes."""
    top_k: int = TOP_K
    """Tokens that answer a refusal with sampler "topk" (mode "picospec")."""
    max_step_tokens: int = frames.MAX_STEP_TOKENS
    max_inflight_steps: int = 32
    drain_s: float = 5.0
    """What running answers get to end when the cloud ends."""
    resume_ttl_s: float = TTL_S
    """How long a session is kept after its stream was lost; 0: not at all."""
    watchdog_s: float = LIMIT_S
    """A pass that takes longer ends the cloud; 0: none does."""
    policy_file: Path | None = None
    """Chunk sizes to propose from the start on, until others are pushed."""
    tls: Path | None = None
    """Folder of --tls; None: without TLS."""
    admin_host: str = "127.0.0.1"
    admin_port: int = 0
    """Of the admin port; with TLS only."""
    denied_file: Path | None = None
    """Deny-list to start with; with TLS only."""
    insecure: bool = False
    """Without TLS: addresses need not be loopback."""
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.tls is None and self.denied_file is not None:
            raise UsageError(
                f"--denied-file {self.denied_file} needs --tls: without certificates nobody can be told apart"
            )
        for host, port, option in (
            (self.host, self.port, "--listen"),
            (self.http_host, self.http_port, "--http-listen"),
        ):
            check_exposed(
                host,
                port,
                option,
                protected=self.tls is not None,
                needs="it needs --tls DIR",
                insecure=self.insecure,
            )


@dataclass(frozen=True)
class RunningCloud:
    """A cloud that serves."""

    address: str
    """HOST:PORT of the gRPC server."""
    admin_url: str
    """Base URL of /v1/...; with TLS https, and another port than that of `http_url`."""
    http_url: str
    """Base URL of health and metrics."""
    identity: pb.ModelIdentity
    limits: pb.Limits
    engine: Engine
    metrics: CloudMetrics
    broken: asyncio.Task[str]
    """Done when the cloud can serve nobody any more; says why. The process should end, and not with success."""


@dataclass
class _Loaded:
    runner: LayerRunner
    identity: pb.ModelIdentity
    context: int
    ends: hf.DeviceEnds | None = None
    """Embedding and head; mode "picospec" only."""


@asynccontextmanager
async def running_cloud(config: CloudConfig) -> AsyncIterator[RunningCloud]:
    """Load the model's middle and serve it until the context ends.

    Raises:
        HatError: the model cannot be loaded, or an address cannot be listened on.
    """
    metrics, devices, policy = CloudMetrics(CollectorRegistry()), DeviceTable(), PolicyStore()
    quotas = QuotaStore(config.quotas_file)
    metrics.tenant_label = quotas.label
    scheduler = replace(config.engine.scheduler, quotas=lambda: quotas.current)
    config = replace(config, engine=replace(config.engine, scheduler=scheduler))
    if config.policy_file is not None:
        policy.start_from(config.policy_file)
    state: dict[str, str | None] = {"why": "the model is loading"}
    access = Access.of(config.tls, config.denied_file)
    if access.folder is not None:
        measure_expiry(access.folder, metrics.registry)
    http_socket = bind(config.http_host, config.http_port, "--http-listen")
    bind(config.host, config.port, "--listen").close()  # say so before minutes of loading
    watchdog: Watchdog | None = None
    service: RuntimeService | None = None

    def why_not_ready() -> str | None:
        return state["why"] or (None if watchdog is None else watchdog.reason)

    def tuning() -> dict[str, Any]:
        return {} if service is None else service.tuning()

    health_side = health_routes(metrics.registry, why_not_ready)
    control_side = control_routes(devices, policy, tuning)
    admin = (config.admin_host, config.admin_port)
    http = serving_http(health_side, control_side, http_socket, admin, access)
    async with http as (http_url, admin_url), quotas.following():
        loaded = await in_passing_thread(_load, config)
        limits = _limits(config, loaded)
        engine, served = _assemble(config, loaded, limits, metrics)
        admission = _admission(config, engine, metrics, quotas)
        service = RuntimeService(
            engine, served, metrics, devices, admission, policy, access, resume_ttl_s=config.resume_ttl_s
        )
        server = make_server(service)
        health_service = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
        reflection.enable_server_reflection(
            (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server, pool=Default()
        )
        port = add_grpc_port(server, config.host, config.port, access)
        metrics.model.info(
            {"weights_id": loaded.identity.weights_id, "layers": f"{loaded.identity.lo}:{loaded.identity.hi}"}
            | {"dtype": config.dtype, "version": __version__}
        )
        engine.start()
        watchdog = Watchdog(engine, config.watchdog_s)
        broken = asyncio.create_task(_watch(watchdog, service, health_service))
        await server.start()
        for name in ("", SERVICE):
            await health_service.set(name, health_pb2.HealthCheckResponse.SERVING)
        state["why"] = None
        enforcing = asyncio.create_task(access.enforce(service.end_refused))
        try:
            address = f"{config.host}:{port}"
            yield RunningCloud(address, admin_url, http_url, loaded.identity, limits, engine, metrics, broken)
        finally:
            enforcing.cancel()
            state["why"] = watchdog.reason or "draining"
            await health_service.enter_graceful_shutdown()
            service.drain(config.drain_s)
            await server.stop(config.drain_s if watchdog.reason is None else _LAST_WORDS_S)
            broken.cancel()
            if not watchdog.stuck:  # else nothing ends the thread but the process
                await asyncio.to_thread(engine.stop)


async def _watch(watchdog: Watchdog, service: RuntimeService, health_service: Any) -> str:
    """Wait until the engine serves nobody any more, and tell everybody."""
    reason = await watchdog.wait()
    log.critical("%s; this cloud ends", reason)
    service.give_up(reason)
    await health_service.enter_graceful_shutdown()
    return reason


def _load(config: CloudConfig) -> _Loaded:
    manifest = identity(config.model)
    layers_total = hf.num_layers(config.model)
    layers = _layers(config, manifest.part, layers_total)
    dtype, device = codec.DTYPES[config.dtype], _device(config.device)
    part = hf.load_decoder_slice(config.model, layers, dtype, device)
    ends = hf.load_device_ends(config.model, dtype, device) if config.mode == PICOSPEC else None
    pages = config.kv_pages or _pages(config, part)
    cache = make_cache(part, num_pages=pages, page_tokens=config.page_tokens)
    log.info(
        "layers %s of %s in %s on %s; KV cache of %d tokens",
        layers,
        config.model,
        config.dtype,
        part.device,
        cache.capacity_tokens,
    )
    served = pb.ModelIdentity(
        weights_id=manifest.weights_id,
        model_revision=manifest.model_revision,
        lo=layers.lo,
        hi=layers.hi,
        dtype=config.dtype,
        hidden_size=part.hidden_size,
    )
    return _Loaded(
        LayerRunner(part, cache, make_backend(config.attention)),
        served,
        hf.context_length(config.model),
        ends,
    )


def _layers(config: CloudConfig, held: PartSpan, total: int) -> LayerRange:
    """The layers that this cloud runs.

    Raises:
        UsageError: the mode is none, or --input-layers or the folder does not go with it.
    """
    if config.mode == PICOSPEC:
        if config.input_layers is not None:
            raise UsageError(
                f"--input-layers {config.input_layers} goes with --mode hat; a picospec cloud runs every layer"
            )
        if held.kind != "all":
            raise UsageError(
                f"--mode picospec needs the whole model, but {config.model} holds part {held.kind}"
            )
        return LayerRange(0, total)
    if config.mode != "hat":
        raise UsageError(f"--mode {config.mode!r}: write hat or picospec")
    if config.input_layers is not None:
        return cloud_layers(config.input_layers, total)
    if held.kind != "cloud":
        raise UsageError(f"--input-layers is needed: {config.model} holds more than the cloud's part")
    return cloud_layers(held.lo, total)


def _assemble(
    config: CloudConfig, loaded: _Loaded, limits: pb.Limits, metrics: CloudMetrics
) -> tuple[Engine, Served]:
    """The engine of the mode, and what handshakes are compared with."""
    loop = asyncio.get_running_loop()
    if loaded.ends is None:
        engine = Engine(loaded.runner, config.engine, metrics, loop)
        return engine, Served(loaded.identity, limits)
    served = Served(
        loaded.identity,
        limits,
        mode=config.mode,
        vocab_size=loaded.ends.vocab_size,
        tokenizer_id=tokenizer_id(config.model),
    )
    tokens = TokenEngine(loaded.runner, loaded.ends, config.engine, metrics, loop, top_k=config.top_k)
    return tokens, served


def _admission(config: CloudConfig, engine: Engine, metrics: CloudMetrics, quotas: QuotaStore) -> Admission:
    cache = engine.runner.cache
    bounds = AdmissionConfig(
        config.max_sessions,
        cache.capacity_tokens,
        cache.page_tokens,
        config.engine.scheduler.idle_after_s,
        config.max_waiting,
        config.tbt_target_s,
    )
    return Admission(bounds, metrics, lambda: quotas.current, lambda: engine.cost.fit())


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {name!r}: torch {torch.__version__} sees no CUDA device here")
    return torch.device(name)


def _pages(config: CloudConfig, part: hf.DecoderSlice) -> int:
    token_bytes = 2 * len(part.layers) * part.kv_heads * part.head_dim * part.dtype.itemsize
    budget = config.kv_bytes
    if budget is None:
        budget = CPU_KV_BYTES
        if part.device.type == "cuda":
            budget = int(CUDA_KV_SHARE * torch.cuda.mem_get_info(part.device)[0])
    pages = budget // (token_bytes * config.page_tokens)
    if pages < 1:
        raise UsageError(
            f"--kv-memory {budget} bytes hold no page: {config.page_tokens} tokens are "
            f"{token_bytes * config.page_tokens} bytes"
        )
    return pages


def _limits(config: CloudConfig, loaded: _Loaded) -> pb.Limits:
    return pb.Limits(
        max_tokens=min(loaded.context, loaded.runner.cache.capacity_tokens),
        max_step_tokens=config.max_step_tokens,
        max_frame_bytes=frames.MAX_FRAME_BYTES,
        max_inflight_steps=config.max_inflight_steps,
        max_sessions=config.max_sessions,
    )
