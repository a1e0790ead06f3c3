"""What gives a pod its certificate: a container beside the one that serves, and the only one with an API token."""

from __future__ import annotations

from typing import Any

from hat_operator.identity import who
from hat_operator.objects import pods
from hat_operator.spec import HatDeployment

FOLDER = "/tls"
_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
_TLS, _TOKEN = "tls", "api-access"
START_S = 600
"""Then the container is started anew, which is no more than a new try."""


def sidecar(hat: HatDeployment, component: str, image: str, identity: str) -> dict[str, Any]:
    """A native sidecar (an init container that goes on): the next container starts when the certificate is there.

    Args:
        hat: whose pod it is.
        component: names.CLOUD or names.EDGE.
        image: the pod's own: one image less for a device to fetch.
        identity: the SPIFFE id; $(HAT_NODE_NAME) in it is the pod's node.
    """
    labels = who.request_labels(hat, component)
    args = ["identity", "--id", identity, "--out", FOLDER]
    args += [word for key, value in labels.items() for word in ("--label", f"{key}={value}")]
    limits = {"requests": {"cpu": "10m", "memory": "48Mi"}, "limits": {"memory": "128Mi"}}
    mounts: list[dict[str, Any]] = [
        {"name": _TLS, "mountPath": FOLDER},
        {"name": _TOKEN, "mountPath": _ACCOUNT, "readOnly": True},
    ]
    found = pods.container("identity", image, args, limits, mounts, {})
    node = {"fieldRef": {"apiVersion": "v1", "fieldPath": "spec.nodeName"}}
    found["env"].append({"name": "HAT_NODE_NAME", "valueFrom": node})
    found["restartPolicy"] = "Always"
    found["startupProbe"] = {
        "exec": {"command": ["test", "-f", f"{FOLDER}/tls.crt"]},
        "periodSeconds": 1,
        "timeoutSeconds": 5,
        "failureThreshold": START_S,
    }
    return found


def mount() -> dict[str, Any]:
    """Where the container that serves sees the certificate."""
    return {"name": _TLS, "mountPath": FOLDER, "readOnly": True}


def volumes() -> list[dict[str, Any]]:
    """The certificate and its key, in memory; and the token, which only the sidecar mounts."""
    token = {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}}
    authority = {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}}
    return [
        {"name": _TLS, "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
        {"name": _TOKEN, "projected": {"defaultMode": 0o440, "sources": [token, authority]}},
    ]


def insecure() -> dict[str, str]:
    """The environment variable that lets a process listen to everybody: in a pod NetworkPolicies stand in front."""
    return {"HAT_INSECURE": "1"}
