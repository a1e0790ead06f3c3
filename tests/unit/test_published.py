"""The policy's JSON form: what goes out comes in again, and what is wrong is named with its value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hat_runtime.cloud.documents import OlderDocument
from hat_runtime.cloud.policy import PolicyStore
from hat_runtime.control.published import (
    MAX_DEVICES,
    MAX_TOKENS,
    PolicyError,
    Proposal,
    PublishedPolicy,
    parse,
)
from hat_runtime.json_document import MAX_BYTES, MAX_VERSION

proposals = st.lists(st.integers(1, MAX_TOKENS), min_size=3, max_size=3).map(
    lambda found: Proposal(sorted(found)[1], sorted(found)[0], sorted(found)[2])
)
policies = st.builds(
    PublishedPolicy,
    st.integers(0, MAX_VERSION),
    st.dictionaries(st.from_regex(r"[A-Za-z0-9._-]{1,20}", fullmatch=True), proposals, max_size=5),
    st.none() | proposals,
)
GOOD: dict[str, Any] = {
    "version": 3,
    "devices": {"jetson-1": {"chunk_tokens": 192, "min_tokens": 64, "max_tokens": 512}},
    "default": {"chunk_tokens": 128, "min_tokens": 64, "max_tokens": 512},
}


@given(policies)
def test_what_is_written_is_read(policy: PublishedPolicy) -> None:
    assert parse(policy.to_json()) == policy
    assert parse(policy.to_json().encode()) == policy


def test_a_device_has_its_own_size_or_the_common_one() -> None:
    policy = parse(json.dumps(GOOD))
    assert (policy.chunk_for("jetson-1"), policy.chunk_for("jetson-2"), policy.chunk_for("")) == (
        192,
        128,
        128,
    )
    assert parse('{"version": 1}').chunk_for("jetson-1") == 0


def test_a_later_versions_fields_are_ignored() -> None:
    assert parse(json.dumps({**GOOD, "since": "1.4"})) == parse(json.dumps(GOOD))


def wrong(**change: Any) -> str:
    return json.dumps({**GOOD, **change})


def device(**change: Any) -> str:
    return wrong(devices={"a": {**GOOD["default"], **change}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "policy: '': must be JSON"),
        ("[1]", r"policy: \[1\]: must be an object"),
        ("[" * 100_000, "policy: .*: must be JSON"),
        (wrong(version=None), "version: None: must be an integer from 0 to"),
        (wrong(version=-1), "version: -1: must be an integer from 0 to"),
        (wrong(version=1.5), "version: 1.5: must be an integer"),
        (wrong(version=2**53), "version: 9007199254740992: must be"),
        (wrong(devices=[]), r"devices: \[\]: must be an object"),
        (wrong(devices={"a b": {}}), "devices: 'a b': must be a name of letters"),
        (wrong(devices={"a": 7}), "devices.a: 7: must be an object"),
        (device(chunk_tokens="x" * 500), r"devices.a.chunk_tokens: 'x{10,}\.\.\.: must be an integer"),
        (device(chunk_tokens=True), "devices.a.chunk_tokens: True: must be"),
        (device(chunk_tokens=513), "devices.a.chunk_tokens: 513: must be an integer from 64 to 512"),
        (device(chunk_tokens=float("nan")), "devices.a.chunk_tokens: nan: must be"),
        (device(min_tokens=0), "devices.a.min_tokens: 0: must be an integer from 1 to"),
        (device(max_tokens=63), "devices.a.max_tokens: 63: must be an integer from 64 to"),
        (wrong(default=[]), r"default: \[\]: must be an object"),
        (wrong(default={"chunk_tokens": 1}), "default.min_tokens: None: must be"),
        (
            wrong(devices={f"d{i}": GOOD["default"] for i in range(MAX_DEVICES + 1)}),
            "devices: '4097 devices': must be at most 4096",
        ),
        (" " * (MAX_BYTES + 1), "policy: '1048577 bytes': must be at most"),
    ],
)
def test_what_is_wrong_is_named_and_the_policy_before_stays(text: str, message: str) -> None:
    store = PolicyStore()
    store.put(json.dumps(GOOD).encode())
    with pytest.raises(PolicyError, match=message):
        store.put(text.encode())
    assert store.current == parse(json.dumps(GOOD))


def test_only_a_newer_policy_takes_the_place_of_another() -> None:
    store = PolicyStore()
    store.put(json.dumps(GOOD).encode())
    assert store.put(json.dumps(GOOD).encode()) == store.current
    for version in (2, 3):
        with pytest.raises(OlderDocument, match=f"version: {version}: must be more than 3"):
            store.put(wrong(version=version, devices={}).encode())
    assert store.put(wrong(version=4, devices={}).encode()).devices == {}


def test_the_longest_policy_that_is_taken_is_not_too_long_for_itself() -> None:
    name = "n" * 50
    proposal = Proposal(MAX_TOKENS, MAX_TOKENS, MAX_TOKENS)
    policy = PublishedPolicy(MAX_VERSION, {f"{name}-{i}": proposal for i in range(MAX_DEVICES)}, proposal)
    assert parse(policy.to_json()) == policy


def test_a_start_file_that_is_missing_or_bad_does_no_harm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    store = PolicyStore()
    store.start_from(tmp_path / "none.json")
    assert "none.json: No such file" in caplog.text
    (tmp_path / "bad.json").write_text('{"version": "seven"}')
    store.start_from(tmp_path / "bad.json")
    assert "version: 'seven': must be an integer" in caplog.text
    assert store.current == PublishedPolicy()
    (tmp_path / "good.json").write_text(json.dumps(GOOD))
    store.start_from(tmp_path / "good.json")
    assert store.current.chunk_for("jetson-1") == 192
