"""A HatDeployment of which only those parts are read that must work whatever the others say."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from hat_operator.schema import apply_defaults, load_schema
from hat_operator.spec import HatDeployment

_EDGE = ("deviceSelector", "clusterRef", "deletionTimeoutSeconds")


def essentials(body: Mapping[str, Any]) -> HatDeployment:
    """Who it is, who its devices are and where, and its certificates: enough to sign, to refuse and to clean up.

    All else is that of the smallest HatDeployment, whatever the object says: make no pods of it.

    Raises:
        SpecError: not even these parts can be read.
    """
    spec = body["spec"]
    found = {"model": {"source": {"hub": "default"}}, "split": {"inputLayers": 1}}
    if "security" in spec:
        found["security"] = spec["security"]
    if "edge" in spec:
        found["edge"] = {key: spec["edge"][key] for key in _EDGE if key in spec["edge"]}
    return HatDeployment.parse(apply_defaults(_schema(), {**body, "spec": found}))


@cache
def _schema() -> dict[str, Any]:
    return load_schema()
