"""Messages of every recorded protocol version are read by the current code, and those of a later one too.

Recorded by scripts/record_frames.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from hat_runtime.proto.hat.v1 import runtime_pb2 as pb

FRAMES = Path(__file__).resolve().parents[1] / "data/frames"
RECORDED = sorted(FRAMES.glob("*/*.bin"))

# Field 1999 as a varint, 2000 as bytes: what a later minor version might add.
UNKNOWN = b"\xf8\x7c\x07" + b"\x82\x7d\x03new"


def read(path: Path) -> tuple[type[Message], bytes, dict[str, Any]]:
    record = json.loads(path.with_suffix(".json").read_text())
    descriptor = descriptor_pool.Default().FindMessageTypeByName(record["message"])
    return message_factory.GetMessageClass(descriptor), path.read_bytes(), record["fields"]


def fields(message: Message) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True)


def with_unknown_fields(message: Message) -> bytes:
    """The message as a later version would send it: an unknown field more at every level."""
    later = type(message)()
    later.CopyFrom(message)
    for field, value in later.ListFields():
        if field.message_type is not None and not field.is_repeated:
            value.ParseFromString(with_unknown_fields(value))
    return later.SerializeToString() + UNKNOWN


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: f"{path.parent.name}-{path.stem}")
class TestRecorded:
    def test_is_read(self, path: Path) -> None:
        kind, data, expected = read(path)
        assert fields(kind.FromString(data)) == expected

    def test_later_version_adds_fields_that_are_ignored(self, path: Path) -> None:
        kind, data, expected = read(path)
        later = with_unknown_fields(kind.FromString(data))
        assert len(later) > len(data)
        assert fields(kind.FromString(later)) == expected

    def test_earlier_version_lacks_a_field(self, path: Path) -> None:
        """Each field in turn is taken away, as if its version had not known it: the rest is read as before."""
        kind, data, expected = read(path)
        for field, _ in kind.FromString(data).ListFields():
            message = kind.FromString(data)
            message.ClearField(field.name)
            earlier = kind.FromString(message.SerializeToString())
            assert fields(earlier) == {key: value for key, value in expected.items() if key != field.name}
            if field.message_type is None and not field.is_repeated:
                assert getattr(earlier, field.name) == field.default_value


def test_every_kind_of_message_and_every_field_is_recorded() -> None:
    """A field that nobody recorded could change its number or type unseen."""
    recorded: set[str] = set()

    def note(message: Message) -> None:
        for field, value in message.ListFields():
            recorded.add(field.full_name)
            if field.message_type is not None:
                for part in value if field.is_repeated else [value]:
                    note(part)

    for path in RECORDED:
        kind, data, _ = read(path)
        note(kind.FromString(data))
    defined = {
        field.full_name
        for message in pb.DESCRIPTOR.message_types_by_name.values()
        for field in message.fields
    }
    assert defined - recorded == set(), "record the new fields: scripts/record_frames.py"


def test_unknown_kind_of_message_is_told_from_a_known_one() -> None:
    """A message kind added later arrives as a message of no kind, not as an error."""
    for kind in (pb.DeviceMessage, pb.CloudMessage):
        assert kind.FromString(UNKNOWN).WhichOneof("message") is None


def test_enum_numbers_never_change() -> None:
    assert dict(pb.Want.items()) == {"WANT_UNSPECIFIED": 0, "WANT_NONE": 1, "WANT_LAST": 2, "WANT_ALL": 3}
    assert dict(pb.Status.items()) == {"STATUS_UNSPECIFIED": 0, "STATUS_OK": 1, "STATUS_STALE": 2}
