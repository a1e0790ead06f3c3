"""Records one message of every kind of the session protocol, as tests/data/frames/MAJOR.MINOR/NAME.{bin,json}.

Run it once for each new minor version and commit the result; older folders stay as they are. The test
tests/unit/test_protocol_compat.py reads all of them with the current code.

Usage: scripts/record_frames.py MAJOR.MINOR [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from hat_runtime.proto.hat.v1 import runtime_pb2 as pb

FOLDER = Path(__file__).resolve().parent.parent / "tests/data/frames"
# Two rows of width 4 in float32, little endian.
ROWS = struct.pack("<8f", 0.5, -1.25, 3.0, 1e-3, -0.0, 65504.0, -2.5e-8, 7.0)
LIMITS = pb.Limits(
    max_tokens=8192, max_step_tokens=2048, max_frame_bytes=524288, max_inflight_steps=64, max_sessions=256
)


def messages() -> dict[str, Message]:
    """One message of every kind, with every field set to something that is not its default."""
    identity = pb.ModelIdentity(
        weights_id="5b" * 32, model_revision="c4" * 32, lo=3, hi=30, dtype="float32", hidden_size=4
    )
    return {
        "describe_request": pb.DescribeRequest(padding=b"\x00\xff", reply_padding_bytes=3),
        "describe_reply": pb.DescribeReply(
            protocol_major=1,
            protocol_minor=4,
            software="0.1.0",
            model=identity,
            codecs=["raw", "int8"],
            limits=LIMITS,
            pages=pb.PageBudget(page_tokens=16, total=4096, free=4000),
            padding=b"\x00\xff\x7f",
            mode="picospec",
            vocab_size=49152,
            tokenizer_id="7e" * 32,
        ),
        "device_open": pb.DeviceMessage(
            open=pb.Open(
                model_revision=identity.model_revision,
                lo=3,
                hi=30,
                dtype="float32",
                codec="int8",
                decode_codec="raw",
                max_tokens=640,
                tenant="tenant-a",
                request_id="req-1",
                resume=pb.Resume(session_id="0a" * 16),
                protocol_minor=4,
                device="jetson-1.site-a",
                resumable=True,
                pad_results=8,
                deadline_ms=8000,
                mode="picospec",
            )
        ),
        "device_close": pb.DeviceMessage(close=pb.Close()),
        "device_step": pb.DeviceMessage(
            step=pb.Step(
                epoch=2,
                start_pos=17,
                n=1,
                want=pb.WANT_ALL,
                payload=ROWS,
                more=True,
                request_id="req-1",
                decode=True,
                alternatives=[18],
                padding=b"\x00\x00",
            )
        ),
        "device_token_step": pb.DeviceMessage(
            step=pb.Step(
                epoch=2,
                start_pos=17,
                n=3,
                want=pb.WANT_LAST,
                tokens=pb.TokenStep(
                    ids=[49151, 1, 300],
                    drafts=2,
                    q=[0.5, 0.0625],
                    sampling=pb.Sampling(
                        sampler="thinning",
                        temperature=0.75,
                        top_p=0.875,
                        seed=2**64 - 2,
                        ahead=1,
                        stop_ids=[2, 7],
                        end=640,
                    ),
                    redraw=1,
                ),
            )
        ),
        "device_telemetry": pb.DeviceMessage(
            telemetry=pb.Telemetry(
                uplink_bytes_per_s=7.5e6,
                rtt_s=0.02,
                shallow_s_per_token=1.5e-4,
                acceptance=0.75,
                chunk_tokens=128,
                ttft_s=1.25,
            )
        ),
        "cloud_opened": pb.CloudMessage(
            opened=pb.Opened(
                session_id="0a" * 16,
                committed=5,
                limits=LIMITS,
                cost=pb.CostHints(
                    fixed_s=0.02, per_token_s=0.001, per_pair_s=1e-7, per_cached_s=1e-5, prompt_rows=96
                ),
                replica="10.0.0.7:7070",
                protocol_minor=4,
                resume_ms=60000,
            )
        ),
        "cloud_result": pb.CloudMessage(
            result=pb.Result(
                status=pb.STATUS_STALE,
                epoch=2,
                start_pos=17,
                n=2,
                payload=ROWS,
                more=True,
                queue_us=120,
                compute_us=33000,
                batch_tokens=9,
                suggested_chunk=96,
                padding=b"\x00\x00",
                cost=pb.CostHints(
                    fixed_s=0.02, per_token_s=0.001, per_pair_s=1e-7, per_cached_s=1e-5, prompt_rows=96
                ),
            )
        ),
        "cloud_verdict": pb.CloudMessage(
            result=pb.Result(
                status=pb.STATUS_OK,
                epoch=2,
                start_pos=17,
                n=3,
                verdict=pb.Verdict(
                    accepted=1, refused=True, next=12, ids=[12, 4000], probabilities=[0.5, 0.25]
                ),
            )
        ),
        "cloud_decoded": pb.CloudMessage(
            notice=pb.Notice(decoded=pb.Decoded(epoch=3, start_pos=19, ids=[12, 300]))
        ),
        "cloud_evicted": pb.CloudMessage(notice=pb.Notice(evicted=pb.Evicted(committed=11))),
        "cloud_drain": pb.CloudMessage(notice=pb.Notice(drain=pb.Drain(deadline_ms=30000))),
        "cloud_retry": pb.CloudMessage(notice=pb.Notice(retry=pb.Retry(after_ms=250))),
    }


def main() -> None:
    """Write the files; refuses to change a recorded version."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("version", metavar="MAJOR.MINOR", help="the protocol version of this code")
    parser.add_argument(
        "--out", type=Path, default=FOLDER, help="folder of all versions (default %(default)s)"
    )
    args = parser.parse_args()
    folder: Path = args.out / args.version
    if folder.exists():
        parser.error(f"{folder} exists: recorded versions stay as they are")
    folder.mkdir(parents=True)
    for name, message in messages().items():
        (folder / f"{name}.bin").write_bytes(message.SerializeToString(deterministic=True))
        record = {
            "message": message.DESCRIPTOR.full_name,
            "fields": MessageToDict(message, preserving_proto_field_name=True),
        }
        (folder / f"{name}.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    print(f"recorded {len(messages())} messages in {folder}")


if __name__ == "__main__":
    main()
