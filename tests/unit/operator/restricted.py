"""The restricted pod security standard, as far as this project's pods can break it.

https://kubernetes.io/docs/concepts/security/pod-security-standards/
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


def pods(objects: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and pod spec of every object that makes pods."""
    for thing in objects:
        template = thing.get("spec", {}).get("template")
        if template is not None:
            yield f"{thing['kind']} {thing['metadata']['name']}", template["spec"]


def violations(pod: dict[str, Any]) -> list[str]:
    """What an admission controller that enforces the standard would refuse."""
    found = [f"{key} is true" for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)]
    for volume in pod.get("volumes", []):
        kinds = set(volume) - {"name"}
        if not kinds <= VOLUMES:
            found.append(f"volume {volume['name']}: {sorted(kinds)}")
    outer = pod.get("securityContext", {})
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        name, inner = container["name"], container.get("securityContext", {})
        both = {**outer, **inner}
        capabilities = inner.get("capabilities", {})
        if inner.get("privileged"):
            found.append(f"{name}: privileged")
        if inner.get("allowPrivilegeEscalation") is not False:
            found.append(f"{name}: allowPrivilegeEscalation")
        if both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0:
            found.append(f"{name}: may run as root")
        if both.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            found.append(f"{name}: seccompProfile")
        if "ALL" not in capabilities.get("drop", []) or set(capabilities.get("add", [])) - {
            "NET_BIND_SERVICE"
        }:
            found.append(f"{name}: capabilities")
        found += [f"{name}: hostPort" for port in container.get("ports", []) if port.get("hostPort")]
    return found
