"""The ConfigMap with the chunk policy that a replica starts with.

A pod's template names it but not its content, so a new policy replaces no pod; the policy in effect is pushed.
"""

from __future__ import annotations

from typing import Any

from hat_operator import names
from hat_operator.spec import HatDeployment

KEY = "policy.json"
FOLDER = "/policy"
FILE = f"{FOLDER}/{KEY}"
_VOLUME = "policy"


def config_map(hat: HatDeployment, text: str) -> dict[str, Any]:
    """The ConfigMap; `text` is a policy in JSON."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": names.metadata(hat, names.CLOUD, names.cloud_policy(hat), hat.namespace),
        "data": {KEY: text},
    }


def volume(hat: HatDeployment) -> dict[str, Any]:
    """Of the cloud's pods; it may be missing when they start."""
    return {"name": _VOLUME, "configMap": {"name": names.cloud_policy(hat), "optional": True}}


def mount() -> dict[str, Any]:
    """Where the container sees it."""
    return {"name": _VOLUME, "mountPath": FOLDER, "readOnly": True}
