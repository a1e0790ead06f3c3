"""The ConfigMap with the deny-list that a replica starts with, and what the operator knows of who left the fleet.

A pod's template names it but not its content; the list in effect is pushed. A replica does not start without it: it
would let everybody in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hat_operator import names
from hat_operator.spec import HatDeployment

KEY = "denied.json"
FOLDER = "/denied"
FILE = f"{FOLDER}/{KEY}"
_VOLUME = "denied"


def config_map(hat: HatDeployment, data: Mapping[str, str]) -> dict[str, Any]:
    """The ConfigMap; `data` holds the deny-list under KEY."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": names.metadata(hat, names.CLOUD, names.cloud_denied(hat), hat.namespace),
        "data": dict(data),
    }


def volume(hat: HatDeployment) -> dict[str, Any]:
    """Of the cloud's pods."""
    items = [{"key": KEY, "path": KEY}]
    return {"name": _VOLUME, "configMap": {"name": names.cloud_denied(hat), "items": items}}


def mount() -> dict[str, Any]:
    """Where the container sees it."""
    return {"name": _VOLUME, "mountPath": FOLDER, "readOnly": True}
