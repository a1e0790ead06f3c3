"""Places that are kept for tenants that were refused."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from hat_runtime.control.claims import MARGIN_S, MOST, PATIENCE, Claims


def held(**sessions: int) -> Callable[[str], float]:
    return lambda tenant: sessions.get(tenant, 0) + 1


def test_who_was_refused_goes_before_who_has_more() -> None:
    claims = Claims()
    assert claims.ahead("greedy", held(greedy=3), 0.0) == 0
    claims.refused("modest", 0.0, 1.0)
    assert claims.ahead("greedy", held(greedy=3), 0.5) == 1
    assert claims.ahead("modest", held(greedy=3), 0.5) == 0
    assert claims.ahead("greedy", held(greedy=1, modest=2), 0.5) == 0
    claims.served("modest")
    assert claims.ahead("greedy", held(greedy=3), 0.5) == 0


def test_of_two_alike_who_was_refused_first() -> None:
    claims = Claims()
    claims.refused("a", 1.0, 5.0)
    claims.refused("b", 2.0, 5.0)
    claims.refused("a", 3.0, 5.0)  # its place is the one of the first time
    assert [claims.ahead(tenant, held(), 3.0) for tenant in ("a", "b", "c")] == [0, 1, 2]


def test_claims_of_those_who_stay_away_end() -> None:
    claims = Claims()
    claims.refused("modest", 0.0, 2.0)
    assert claims.ahead("greedy", held(), 2.0 * PATIENCE + MARGIN_S) == 1
    assert claims.ahead("greedy", held(), 2.0 * PATIENCE + MARGIN_S + 0.001) == 0


def test_there_are_so_many_claims_and_no_more() -> None:
    claims = Claims()
    for number in range(3 * MOST):
        claims.refused(f"tenant-{number}", 0.0, 1.0)
    assert claims.ahead("other", held(other=1), 0.1) == MOST


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["refused", "served"])), max_size=30))
def test_somebody_may_always_enter(events: list[tuple[str, str]]) -> None:
    """Claims that wait for each other would keep a place empty until they end."""
    claims, sessions = Claims(), dict.fromkeys("abcd", 0)
    for at, (tenant, event) in enumerate(events):
        if event == "refused":
            claims.refused(tenant, float(at), 100.0)
        else:
            sessions[tenant] += 1
            claims.served(tenant)
    assert min(claims.ahead(tenant, held(**sessions), 99.0) for tenant in "abcd") == 0
