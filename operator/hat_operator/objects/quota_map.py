"""The ConfigMap with the quota file that replicas follow.

A pod's template names it but not its content: the kubelet brings a change into the pods that run, which read the file
again, so that other limits replace no pod. A replica does not start without it: it would limit nobody.

Only where the spec has quotas is it mounted. Mounted always, a new operator would restart every cloud, and images from
before --quotas would not start.
"""

from __future__ import annotations

from typing import Any

from hat_operator import names
from hat_operator.spec import HatDeployment

KEY = "quotas.json"
FOLDER = "/quotas"
FILE = f"{FOLDER}/{KEY}"
_VOLUME = "quotas"


def config_map(hat: HatDeployment, text: str) -> dict[str, Any]:
    """The ConfigMap; `text` is a quota file."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": names.metadata(hat, names.CLOUD, names.cloud_quotas(hat), hat.namespace),
        "data": {KEY: text},
    }


def volume(hat: HatDeployment) -> dict[str, Any]:
    """Of the cloud's pods."""
    return {"name": _VOLUME, "configMap": {"name": names.cloud_quotas(hat)}}


def mount() -> dict[str, Any]:
    """Where the container sees it; the folder as a whole, since a single file would never change."""
    return {"name": _VOLUME, "mountPath": FOLDER, "readOnly": True}
