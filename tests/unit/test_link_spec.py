from __future__ import annotations

import pytest

from hat_runtime.emulation.spec import LinkSpec
from hat_runtime.errors import UsageError


@pytest.mark.parametrize(
    ("text", "rate", "rtt", "jitter"),
    [
        ("60mbit,20ms", 7.5e6, 0.020, 0),
        ("60Mbit/s, 20 ms", 7.5e6, 0.020, 0),
        ("500kbit,0.1s", 62_500, 0.1, 0),
        ("1gbit,0ms", 125e6, 0, 0),
        ("7.5MB/s,20ms,5ms", 7.5e6, 0.020, 0.005),
        ("750kB,1500us", 750e3, 0.0015, 0),
    ],
)
def test_rate_and_times(text: str, rate: float, rtt: float, jitter: float) -> None:
    link = LinkSpec.parse(text)
    assert link.rate_bytes_per_s == pytest.approx(rate)
    assert link.rtt_s == pytest.approx(rtt)
    assert link.jitter_s == pytest.approx(jitter)
    assert LinkSpec.parse(str(link)) == link


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("60mbit", "60mbit"),
        ("60mbit,20ms,1ms,1ms", "60mbit,20ms,1ms,1ms"),
        ("60,20ms", "'60'"),
        ("60mbit,20", "'20'"),
        ("60Mb,20ms", "'60Mb'"),
        ("fast,20ms", "'fast'"),
        ("60mbit,-20ms", "'-20ms'"),
        ("0mbit,20ms", "'0mbit'"),
        ("60mbit,20h", "'20h'"),
        ("60mbit,61s", "'61s'"),
        ("60mbit,20ms,", "''"),
    ],
)
def test_a_wrong_value_is_echoed(text: str, named: str) -> None:
    with pytest.raises(UsageError) as error:
        LinkSpec.parse(text)
    assert "--link" in str(error.value)
    assert named in str(error.value)
