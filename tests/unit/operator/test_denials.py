from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from hat_operator.denials import KEPT_S, Denials, news
from hat_runtime.security.denied import parse
from tests.unit.operator.samples import SETTINGS, hat

NODES = st.sets(st.sampled_from("abcdef"))


def refused(found: Denials) -> set[str]:
    """As a cloud reads it."""
    return {identity.name for identity in parse(found.data()["denied.json"]).identities}


def test_who_leaves_is_refused_until_no_certificate_is_left_and_who_comes_back_is_not() -> None:
    one = Denials().next(hat(), SETTINGS, ["a", "b"], 0.0)
    assert (refused(one), one.listed.version) == (set(), 0)
    two = one.next(hat(), SETTINGS, ["a"], 100.0)
    assert (refused(two), two.listed.version) == ({"b"}, 1)
    assert two.next(hat(), SETTINGS, ["a"], 200.0) == two
    assert refused(two.next(hat(), SETTINGS, ["a", "b"], 300.0)) == set()
    assert refused(two.next(hat(), SETTINGS, ["a"], 99.0 + KEPT_S)) == {"b"}
    last = two.next(hat(), SETTINGS, ["a"], 101.0 + KEPT_S)
    assert (refused(last), last.listed.version) == (set(), 2)


def test_names_of_the_spec() -> None:
    wanted = hat(security={"deniedDevices": ["a", "z"]})
    found = Denials().next(wanted, SETTINGS, ["a", "b"], 0.0)
    assert refused(found) == {"a", "z"}
    assert refused(found.next(hat(), SETTINGS, ["a", "b"], 1.0)) == set()
    identities = json.loads(found.data()["denied.json"])["denied"]
    assert identities[0] == "spiffe://hat.internal/tenant/team/device/a"


def test_nobody_has_left_who_cannot_be_seen() -> None:
    found = Denials().next(hat(), SETTINGS, ["a", "b"], 0.0)
    assert found.next(hat(), SETTINGS, None, 100.0) == found


def test_a_pod_with_another_list_is_overtaken() -> None:
    found = Denials().next(hat(), SETTINGS, ["a"], 0.0, least=8)
    assert found.listed.version == 8
    assert found.next(hat(), SETTINGS, ["a"], 1.0, least=8) == found
    # The pod's has the same version and other entries.
    assert found.next(hat(), SETTINGS, ["a"], 2.0, least=9).listed.version == 9
    assert found.next(hat(), SETTINGS, [], 2.0, least=8).listed.version == 9


def test_a_new_process_goes_on_where_the_last_one_was() -> None:
    found = Denials().next(hat(), SETTINGS, ["a", "b"], 0.0).next(hat(), SETTINGS, ["a"], 5.0)
    assert Denials.read(found.data()) == found
    assert Denials.read({"denied.json": "{", "fleet.json": "[]"}) == Denials()


def test_news_tell_who_is_refused_and_not_who_no_more() -> None:
    one = Denials().next(
        hat(security={"deniedDevices": [f"d{i:02}" for i in range(30)]}), SETTINGS, None, 0.0
    )
    text = news(Denials().listed, one.listed)
    assert text is not None
    assert text.startswith("refused by the cloud from now on: d00, d01")
    assert text.endswith(" and 10 more")
    assert news(one.listed, Denials().listed) is None


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.tuples(NODES, NODES, st.floats(1, 2 * 3600)), max_size=8))
def test_whoever_has_been_a_device_and_is_none_is_refused(
    steps: list[tuple[set[str], set[str], float]],
) -> None:
    found, now, seen, version = Denials(), 0.0, dict[str, float](), 0
    for nodes, named, passed in steps:
        now += passed
        before = refused(found)
        found = Denials.read(found.data()).next(
            hat(security={"deniedDevices": sorted(named)}), SETTINGS, nodes, now
        )
        seen |= dict.fromkeys(nodes, now)
        left = {name for name in seen if name not in nodes}  # each of them within a day
        assert refused(found) == named | left
        assert (found.listed.version > version) == (refused(found) != before)
        version = found.listed.version
