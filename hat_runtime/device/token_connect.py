"""Token mode: from a draft model's folder and a cloud's address to a generator."""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch

from hat_runtime.device.generator import GeneratorConfig
from hat_runtime.device.handshake import check_mode
from hat_runtime.device.link import CloudLink
from hat_runtime.device.metrics import DeviceMetrics
from hat_runtime.device.steps import Binding
from hat_runtime.device.token_answer import SpeculationConfig
from hat_runtime.device.token_drafting import DraftModel
from hat_runtime.device.token_generator import TokenGenerator
from hat_runtime.device.token_steps import CODEC, MODE
from hat_runtime.errors import HandshakeError
from hat_runtime.model.hf import eos_token_ids
from hat_runtime.model.manifest import read_config
from hat_runtime.model.split import LayerRange
from hat_runtime.model.tokenizer_id import tokenizer_id
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from hat_runtime.security.folder import TlsFolder
from hat_runtime.threads import in_passing_thread
from hat_runtime.wire.codec import DTYPES


async def connect_tokens(
    folder: Path,
    draft_folder: Path,
    cloud: str,
    dtype: str = "bfloat16",
    *,
    speculation: SpeculationConfig | None = None,
    config: GeneratorConfig | None = None,
    metrics: DeviceMetrics | None = None,
    device: str = "cpu",
    kv_tokens: int = 32768,
    page_tokens: int = 16,
    tls: TlsFolder | None = None,
) -> TokenGenerator:
    """Ask the cloud what it serves, compare, and load the draft model. End it with `TokenGenerator.close`.

    Args:
        folder: the target's tokenizer and stop tokens; the draft model's own folder will do.
        draft_folder: a whole small model.
        cloud: "HOST:PORT" of `hat cloud serve --mode picospec`.
        dtype: compute dtype of the draft model; the cloud's may differ.
        speculation: how to speculate.
        config: policies of the generator.
        metrics: where it counts; a registry of its own by default.
        device: torch device for the draft model.
        kv_tokens: tokens that all sessions of this device may hold together, drafts included.
        page_tokens: tokens of one KV page on this device.
        tls: certificates; None: without TLS.

    Raises:
        CloudUnavailable: not reachable, or the certificates of both sides do not go together.
        DeviceForbidden: the cloud does not let this device in.
        HandshakeError: the cloud is of the other mode, or its vocabulary is not the draft model's.
        ModelError: a folder cannot be used.
    """
    config = config or GeneratorConfig()
    link = CloudLink(cloud, metrics, tls=tls, keepalive_s=config.recovery.keepalive_s)
    try:
        description = await link.describe()
        binding = await asyncio.to_thread(bind_tokens, folder, draft_folder, description, cloud)
        model = await in_passing_thread(
            DraftModel.load_whole,
            draft_folder,
            DTYPES[dtype],
            device=device,
            kv_tokens=kv_tokens,
            page_tokens=page_tokens,
        )
        model.eos_token_ids = eos_token_ids(folder) or model.eos_token_ids
    except BaseException:
        await link.close()
        raise
    return TokenGenerator(model, link, binding, config, speculation)


def bind_tokens(folder: Path, draft_folder: Path, description: pb.DescribeReply, address: str) -> Binding:
    """What sessions with this cloud are opened with.

    Raises:
        HandshakeError: names the first thing that differs, with both values.
    """
    check_mode(MODE, description.mode, address)
    vocabulary = read_config(draft_folder).get("vocab_size")
    if vocabulary != description.vocab_size:
        raise HandshakeError(
            f"vocab_size differs: {vocabulary} of the draft model ({draft_folder}), {description.vocab_size} in the "
            f"cloud at {address}; a draft model must share the target's vocabulary"
        )
    for what, place in (("the draft model", draft_folder), ("--model", folder)):
        here = tokenizer_id(place)
        if here and description.tokenizer_id and here != description.tokenizer_id:
            raise HandshakeError(
                f"the tokenizer differs: {here[:12]} of {what} ({place}), {description.tokenizer_id[:12]} in the cloud "
                f"at {address}: the same text has other token ids there; use a model with the target's tokenizer"
            )
    cloud = description.model
    dtype: torch.dtype = DTYPES[cloud.dtype]
    layers = LayerRange(cloud.lo, cloud.hi)
    return Binding(
        cloud.model_revision, layers, dtype, cloud.hidden_size, codec=CODEC, decode_codec=CODEC, mode=MODE
    )
