"""Do this device's model folder and the cloud belong together? Compared before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hat_runtime.device.chunking import ChunkConfig
from hat_runtime.device.policy import DraftConfig, most_round_rows
from hat_runtime.device.steps import Binding
from hat_runtime.errors import HandshakeError
from hat_runtime.model.manifest import Manifest, read_config
from hat_runtime.model.split import LayerRange
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from hat_runtime.wire.codec import RAW, RAW_ONLY, CodecChoice, dtype_name
from hat_runtime.wire.padding import Padding

HAT = "hat"
"""The mode of hidden states, as people call it; "" on the wire."""
PADDING_SINCE = 4
"""Minor protocol version."""


@dataclass(frozen=True)
class Comparison:
    """One thing that device and cloud must agree on."""

    name: str
    device: str
    cloud: str
    agree: bool
    fix: str


def check_mode(device: str, cloud: str, address: str) -> None:
    """Refuse a cloud of the other mode.

    Args:
        device: "" for hat, or "picospec".
        cloud: as DescribeReply.mode.
        address: the cloud's.

    Raises:
        HandshakeError: names both modes, and what to do.
    """
    here, there = device or HAT, cloud or HAT
    if here != there:
        raise HandshakeError(
            f"mode differs: {here} on this device, {there} in the cloud at {address}; "
            f"start this side with --mode {there}, or the cloud with --mode {here}"
        )


def compare(
    manifest: Manifest,
    folder: Path,
    description: pb.DescribeReply,
    dtype: torch.dtype,
    codecs: CodecChoice = RAW_ONLY,
) -> list[Comparison]:
    """Compare the device's folder, dtype and codecs with what the cloud describes, most important first."""
    cloud = description.model
    mode = Comparison(
        "mode",
        HAT,
        description.mode or HAT,
        (description.mode or HAT) == HAT,
        f"start this side with --mode {description.mode}, or the cloud with --mode {HAT}",
    )
    other_model = "prepare the same model on both sides with `hat model prepare`"
    weights = Comparison(
        "weights_id",
        manifest.weights_id,
        cloud.weights_id,
        manifest.weights_id == cloud.weights_id,
        other_model,
    )
    revision = Comparison(
        "model_revision",
        manifest.model_revision,
        cloud.model_revision,
        manifest.model_revision == cloud.model_revision,
        "the configurations differ (config.json): copy the cloud's folder" if weights.agree else other_model,
    )
    held = LayerRange(manifest.part.lo, manifest.part.hi)
    wanted = LayerRange(0, cloud.lo)
    layers = Comparison(
        "layers",
        f"{held} of {manifest.num_layers}",
        f"{LayerRange(cloud.lo, cloud.hi)}, so the device runs {wanted}",
        held.lo == 0
        and held.hi >= cloud.lo
        and manifest.part.kind != "cloud"
        and cloud.hi == manifest.num_layers,
        f"prepare {folder} again with --part device --input-layers {cloud.lo}, or whole",
    )
    width = read_config(folder).get("hidden_size")
    unknown = [name for name in codecs.names if name not in description.codecs]
    return [
        mode,
        weights,
        revision,
        layers,
        Comparison(
            "hidden_size", str(width), str(cloud.hidden_size), width == cloud.hidden_size, other_model
        ),
        Comparison(
            "dtype",
            dtype_name(dtype),
            cloud.dtype,
            dtype_name(dtype) == cloud.dtype,
            f"start this side with --dtype {cloud.dtype}",
        ),
        Comparison(
            "codec",
            ", ".join(codecs.names),
            ", ".join(description.codecs),
            not unknown,
            f"the cloud does not know {', '.join(map(repr, unknown))}: install the same version of HAT on both sides"
            + (f", or start this side with --uplink-codec {RAW}" if RAW not in unknown else ""),
        ),
    ]


def bind(
    manifest: Manifest,
    folder: Path,
    description: pb.DescribeReply,
    dtype: torch.dtype,
    address: str,
    codecs: CodecChoice,
) -> Binding:
    """What sessions with this cloud are opened with.

    Raises:
        HandshakeError: names the first thing that differs, with both values.
    """
    for item in compare(manifest, folder, description, dtype, codecs):
        if not item.agree:
            raise HandshakeError(
                f"{item.name} differs: {item.device} on this device ({folder}), {item.cloud} "
                f"in the cloud at {address}; {item.fix}"
            )
    cloud = description.model
    layers = LayerRange(cloud.lo, cloud.hi)
    return Binding(cloud.model_revision, layers, dtype, cloud.hidden_size, codecs.prompt, codecs.decode)


def padded(
    binding: Binding,
    drafting: DraftConfig,
    chunking: ChunkConfig,
    description: pb.DescribeReply,
    address: str,
) -> Binding:
    """The same with frames of fixed sizes: of the most rows that a round may have, and of a prompt's least chunk.

    Raises:
        HandshakeError: the cloud is of a version that does not pad.
    """
    if description.protocol_minor < PADDING_SINCE:
        raise HandshakeError(
            f"--pad-frames: the cloud at {address} speaks protocol {description.protocol_major}."
            f"{description.protocol_minor} and pads no frames; upgrade it, or start this side without --pad-frames"
        )
    rows = most_round_rows(drafting)
    chunk = chunking.bounds.least if chunking.tokens is None else chunking.tokens or chunking.bounds.least
    return replace(binding, padding=Padding(min(rows, description.limits.max_step_tokens), chunk))
