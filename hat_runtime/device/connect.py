"""From a model folder and a cloud's address to a generator."""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch

from hat_runtime.device.drafting.factory import NONE, drafter_maker
from hat_runtime.device.generator import Generator, GeneratorConfig
from hat_runtime.device.handshake import bind, padded
from hat_runtime.device.link import CloudLink
from hat_runtime.device.metrics import DeviceMetrics
from hat_runtime.device.submodels import DeviceModel
from hat_runtime.model.manifest import identity
from hat_runtime.security.folder import TlsFolder
from hat_runtime.threads import in_passing_thread
from hat_runtime.wire.codec import DTYPES, RAW_ONLY, CodecChoice


async def connect(
    folder: Path,
    cloud: str,
    dtype: str | torch.dtype = "bfloat16",
    *,
    codecs: CodecChoice = RAW_ONLY,
    config: GeneratorConfig | None = None,
    metrics: DeviceMetrics | None = None,
    device: str = "cpu",
    kv_tokens: int = 32768,
    page_tokens: int = 16,
    tls: TlsFolder | None = None,
    drafter: str = NONE,
) -> Generator:
    """Ask the cloud what it serves, compare, and load this device's part. End it with `Generator.close`.

    Args:
        folder: the whole model or its device part.
        cloud: "HOST:PORT" of `hat cloud serve`.
        dtype: compute dtype, the cloud's.
        codecs: how shallow states travel.
        config: policies of the generator.
        metrics: where it counts; a registry of its own by default.
        device: torch device for the device's submodels.
        kv_tokens: tokens that all sessions of this device may hold together.
        page_tokens: tokens of one KV page on this device.
        tls: certificates; None: without TLS.
        drafter: what drafts, as --drafter names it.

    Raises:
        CloudUnavailable: not reachable, or the certificates of both sides do not go together.
        DeviceForbidden: the cloud does not let this device in.
        HandshakeError: the cloud serves another model, split or dtype, or lacks a codec.
        ModelError: the folder, or the drafter's, cannot be used.
        UsageError: there is no such drafter.
    """
    compute = DTYPES[dtype] if isinstance(dtype, str) else dtype
    config = config or GeneratorConfig()
    link = CloudLink(cloud, metrics, tls=tls, keepalive_s=config.recovery.keepalive_s)
    try:
        description = await link.describe()
        manifest = await asyncio.to_thread(identity, folder)
        binding = bind(manifest, folder, description, compute, cloud, codecs)
        if config is not None and config.pad_frames:
            binding = padded(binding, config.drafting, config.chunking, description, cloud)
        model = await in_passing_thread(
            DeviceModel.load,
            folder,
            binding.layers.lo,
            compute,
            device=device,
            kv_tokens=kv_tokens,
            page_tokens=page_tokens,
            make_drafter=drafter_maker(
                drafter, folder, manifest.weights_id, binding.layers.lo, compute, kv_tokens=kv_tokens
            ),
        )
    except BaseException:
        await link.close()
        raise
    return Generator(model, link, binding, config)
