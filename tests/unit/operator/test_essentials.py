from __future__ import annotations

from typing import Any

import pytest

from hat_operator.essentials import essentials
from hat_operator.spec import HatDeployment, SpecError
from tests.unit.operator.samples import REMOTE, body

TWICE = [{"name": "a", "arch": "amd64"}, {"name": "b", "arch": "amd64"}]


def stored(**edge: Any) -> dict[str, Any]:
    found = body({"clusterRef": REMOTE, "deletionTimeoutSeconds": 7, **edge})
    found["metadata"] |= {"finalizers": ["hat.dev/edge-cleanup"]}
    found["spec"]["security"] |= {"tls": "mutual", "certificateHours": 2, "deniedDevices": ["x"]}
    return found


def test_they_are_those_of_the_whole_object() -> None:
    whole, part = HatDeployment.parse(stored()), essentials(stored())
    for name in ("name", "namespace", "uid", "generation", "finalizers"):
        assert getattr(part, name) == getattr(whole, name)
    assert part.spec.security == whole.spec.security
    assert part.spec.edge is not None
    assert whole.spec.edge is not None
    for name in ("cluster", "match_labels", "deletion_timeout_s"):
        assert getattr(part.spec.edge, name) == getattr(whole.spec.edge, name)
    without = stored()
    del without["spec"]["edge"]
    assert essentials(without).spec.edge is None


def test_they_are_read_whatever_is_wrong_elsewhere() -> None:
    broken = stored(images=TWICE)
    with pytest.raises(SpecError):
        HatDeployment.parse(broken)
    assert essentials(broken) == essentials(stored())
    broken["spec"] = {key: broken["spec"][key] for key in ("edge", "security")}
    assert essentials(broken) == essentials(stored())


def test_what_is_wrong_in_them_is_told() -> None:
    broken = stored()
    broken["spec"]["security"]["deniedDevices"] = "x"
    with pytest.raises(SpecError, match=r"spec\.security\.deniedDevices: 'x'"):
        essentials(broken)
