"""Quota files, shares and rates."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hat_runtime.cloud.quotas import read
from hat_runtime.control.fair_share import FairShare
from hat_runtime.control.quotas import Limits, QuotaError, Quotas, parse
from hat_runtime.control.throttle import MOST_KEPT, Throttle
from hat_runtime.errors import UsageError


def test_what_is_not_set_is_the_default_s() -> None:
    quotas = parse(
        {
            "tenant_default": {"sessions": 8, "tokens_per_second": 100, "kv_share": 0.5},
            "tenants": {"acme": {"sessions": 32, "weight": 2, "tokens_per_second": None}, "same": None},
            "device_default": {"sessions": 2},
            "devices": {"jetson-1": {"kv_share": 0.1}},
        }
    )
    assert quotas.tenant("acme") == Limits(32, None, None, 0.5, 2)
    assert quotas.tenant("same") == quotas.tenant("anybody") == Limits(8, 100, None, 0.5)
    (_, tenant), (_, device) = quotas.scopes("acme", "jetson-1")
    assert (tenant.sessions, device) == (32, Limits(2, kv_share=0.1))
    assert quotas.max_pages("acme", "jetson-1", 200) == 20
    assert quotas.max_pages("acme", "other", 200) == 100
    assert quotas.rated


def test_a_burst_of_the_default_goes_with_its_rate() -> None:
    default = {"tokens_per_second": 100, "burst_tokens": 500}
    named = {"free": {"tokens_per_second": None}, "same": {}, "slow": {"tokens_per_second": 1}}
    quotas = parse({"tenant_default": default, "tenants": named})
    assert quotas.tenant("free") == Limits()
    assert (quotas.tenant("same").burst, quotas.tenant("slow").burst) == (500, 500)


def test_the_file_in_the_documents_is_one() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text()
    (file,) = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.S) if "tenant_default" in block]
    quotas = read(Path("FILE"), file.encode())
    assert quotas.tenant("acme") == Limits(64, None, None, 0.5, 2)
    assert quotas.tenant("other").burst == 2000


def test_numbers_of_json_and_yaml() -> None:
    for text in ('{"device_default": {"kv_share": 1e-06}}', "device_default: {kv_share: 0.000001}"):
        assert read(Path("FILE"), text.encode()).device_default.kv_share == 1e-6


def test_an_empty_file_limits_nobody() -> None:
    assert parse(None) == parse({}) == Quotas()
    assert not Quotas().rated
    assert Quotas().max_pages("", "", 7) == 7


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], "quotas: []: must be a mapping"),
        ({"tenant": {}}, "quotas: 'tenant': is not a field; fields are tenant_default, tenants,"),
        ({"tenants": {"a": {"session": 1}}}, "tenants.a: 'session': is not a field; fields are sessions,"),
        ({"tenants": {"a": 3}}, "tenants.a: 3: must be a mapping"),
        ({"tenants": {3: {}}}, "tenants: 3: must be a name"),
        ({"tenants": {"a\n": {}}}, "tenants: 'a\\n': must be a name"),
        ({"devices": {"d": {"weight": 2}}}, "devices.d: 'weight': is not a field"),
        ({"tenant_default": {"sessions": 1.5}}, "tenant_default.sessions: 1.5: must be an integer from 0"),
        ({"tenant_default": {"sessions": True}}, "tenant_default.sessions: True: must be an integer"),
        ({"tenant_default": {"tokens_per_second": 0}}, "tokens_per_second: 0: must be a number from 0.01"),
        ({"tenant_default": {"tokens_per_second": math.nan}}, "tokens_per_second: nan: must be a number"),
        ({"tenant_default": {"kv_share": 1.2}}, "tenant_default.kv_share: 1.2: must be a number"),
        ({"tenant_default": {"kv_share": "half"}}, "tenant_default.kv_share: 'half': must be a number"),
        ({"tenant_default": {"weight": None}}, "tenant_default.weight: None: must be a number"),
        (
            {"tenant_default": {"burst_tokens": 9}},
            "tenant_default.burst_tokens: 9: goes with tokens_per_second",
        ),
        (
            {
                "device_default": {"tokens_per_second": 9},
                "devices": {"d": {"tokens_per_second": None, "burst_tokens": 9}},
            },
            "devices.d.burst_tokens: 9: goes with tokens_per_second",
        ),
        ({"tenants": {"x" * 300: {}}}, "must be a name of 1 to 253"),
    ],
)
def test_what_is_wrong_is_named(content: object, says: str) -> None:
    with pytest.raises(QuotaError) as wrong:
        parse(content)
    assert says in str(wrong.value)


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)
fields = st.sampled_from(
    [
        "sessions",
        "tokens_per_second",
        "burst_tokens",
        "kv_share",
        "weight",
        "tenants",
        "devices",
        "tenant_default",
    ]
)


@given(json | st.dictionaries(fields, json | st.dictionaries(fields, json)))
def test_whatever_is_given_there_are_limits_or_an_error(content: object) -> None:
    try:
        quotas = parse(content)
    except QuotaError:
        return
    assert quotas.max_pages("a", "b", 100) >= 1


spends = st.lists(st.tuples(st.floats(0, 3), st.floats(0, 50)), max_size=60)


@given(st.floats(0.1, 100), st.floats(1, 200), spends)
def test_a_rate_holds_in_the_long_run(rate: float, burst: float, wishes: list[tuple[float, float]]) -> None:
    throttle, now, spent = Throttle(), 50.0, 0.0
    for later, amount in wishes:
        now += later
        if throttle.level("a", rate, burst, now) > 0:
            throttle.spend("a", amount)
            spent += amount
    assert spent <= (burst + rate * (now - 50.0)) * (1 + 1e-9) + 50


@given(st.floats(0.1, 100), st.floats(1, 200), st.floats(0, 500))
def test_a_debt_is_paid_back(rate: float, burst: float, amount: float) -> None:
    throttle = Throttle()
    throttle.level("a", rate, burst, 0.0)
    throttle.spend("a", amount)
    after_s = max(0.0, amount - burst) / rate
    assert throttle.level("a", rate, burst, after_s + 0.1) > 0
    assert throttle.level("a", rate, burst, 1e9) == burst


def test_a_rate_may_change_and_end() -> None:
    throttle = Throttle()
    throttle.level("a", 1.0, 10.0, 0.0)
    throttle.spend("a", 30)
    assert throttle.level("a", 100.0, 10.0, 1.0) == -19
    assert throttle.level("a", 100.0, 10.0, 1.1) == pytest.approx(-9)
    assert throttle.level("a", 100.0, 10.0, 0.5) == pytest.approx(-9), "a clock that goes back"
    assert throttle.level("a", None, 10.0, 1.1) == math.inf
    throttle.spend("a", 1000)
    assert throttle.level("a", 1.0, 10.0, 1.1) == 10


def test_full_buckets_are_forgotten() -> None:
    throttle = Throttle()
    for number in range(3 * MOST_KEPT):
        throttle.level(number, 1.0, 10.0, float(number))
        throttle.spend(number, 5)
    assert len(throttle) <= MOST_KEPT
    throttle.spend(3 * MOST_KEPT - 1, 20)
    assert throttle.level(3 * MOST_KEPT - 1, 1.0, 10.0, 3.0 * MOST_KEPT) < 0, "one in debt is not"


wants = st.lists(st.sets(st.sampled_from("abcd"), min_size=1), min_size=1, max_size=80)


@given(wants, st.dictionaries(st.sampled_from("abcd"), st.floats(0.5, 4)), st.data())
def test_no_two_that_want_grow_apart(
    rounds: list[set[str]], weights: dict[str, float], data: st.DataObject
) -> None:
    """Between two rounds in which both wanted all the time, their shares differ by at most two amounts."""
    share, got = FairShare(), dict.fromkeys("abcd", 0.0)
    both_since: dict[str, float] | None = None
    for wanting in rounds:
        share.begin(wanting)
        if not {"a", "b"} <= wanting:
            both_since = None
        elif both_since is None:
            both_since = dict(got)
        first = min(wanting, key=lambda name: (share.used(name), name))
        amount = data.draw(st.floats(1, 10))
        share.charge(first, amount, weights.get(first, 1.0))
        got[first] += amount / weights.get(first, 1.0)
        share.end(wanting)
        if both_since is not None:
            grown = [got[name] - both_since[name] for name in "ab"]
            assert abs(grown[0] - grown[1]) <= 2 * 10 / min([1.0, *weights.values()])


def test_who_is_away_is_forgotten_and_saves_up_nothing() -> None:
    share, got = FairShare(), 0
    share.begin({"early", "stays"})
    share.end({"stays"})
    visitors = [f"visitor-{number}" for number in range(600)]
    for _ in range(1000):  # each leaves when it has been served
        share.begin({visitors[-1], "stays"})
        first = min(("stays", visitors[-1]), key=share.used)
        share.charge(first, 1)
        got += first == "stays"
        if first != "stays":
            visitors.pop()
        share.end({"stays"} if first != "stays" else {visitors[-1], "stays"})
    assert len(share) <= 3
    assert 490 <= got <= 510
    share.begin({"early", "stays"})
    assert share.used("stays") - share.used("early") <= 2


def test_who_wants_little_holds_nobody_back() -> None:
    """One wants all, one a little at a time; a third that comes later gets half, not all, of what the first had."""
    share, got = FairShare(), {"all": 0.0, "late": 0.0}
    for number in range(300):
        late = {"late"} if number >= 200 else set()
        share.begin({"all", "little"} | late)
        share.charge("little", 0.1)
        first = min(("all", *late), key=share.used)
        share.charge(first, 1)
        got[first] += number >= 200
        share.end({"all"} | late)
    assert abs(got["all"] - got["late"]) <= 2


@pytest.mark.parametrize(
    "text", ["since: 2026-11-31", "a: !!bool x", "a: " + "9" * 5000, "a: 0x_", "a: !!timestamp x"]
)
def test_whatever_yaml_raises_names_the_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "quotas.yaml"
    with pytest.raises(UsageError, match=r"--quotas .*quotas\.yaml: must be YAML or JSON: "):
        read(file, text.encode())
