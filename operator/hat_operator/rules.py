"""The CRD's CEL rules in Python, for checks without an API server.

Keys are the rules' texts in the CRD; messages are there and only there. Rules with oldSelf are about changes and have
no entry. A test holds both sides together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

_RESOURCES = ("cpu", "memory", "ephemeral-storage")


def _other_cluster_can_dial(spec: Mapping[str, Any]) -> bool:
    expose = spec["cloud"]["expose"]
    return "clusterRef" not in spec.get("edge", {}) or expose["type"] != "ClusterIP" or expose["host"] != ""


def _only_resources(field: str) -> Callable[[Any], bool]:
    return lambda self: all(key in _RESOURCES for key in self.get(field, {}))


RULES: dict[str, Callable[[Any], bool]] = {
    "size(self.metadata.name) <= 40": lambda self: len(self.get("metadata", {}).get("name", "")) <= 40,
    "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')": lambda self: bool(
        re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", self.get("metadata", {}).get("name", ""))
    ),
    "self.mode == 'hat'": lambda self: bool(self["mode"] == "hat"),
    (
        "!has(self.edge) || !has(self.edge.clusterRef) || self.cloud.expose.type != 'ClusterIP' "
        "|| self.cloud.expose.host != ''"
    ): _other_cluster_can_dial,
    "!has(self.edge) || !has(self.model.source.claim) || has(self.edge.weights)": lambda self: (
        "edge" not in self or "claim" not in self["model"]["source"] or "weights" in self["edge"]
    ),
    "!has(self.tokenSecretRef) || has(self.source.hub)": lambda self: (
        "tokenSecretRef" not in self or "hub" in self["source"]
    ),
    "self.revision == '' || has(self.source.hub)": lambda self: (
        self["revision"] == "" or "hub" in self["source"]
    ),
    "has(self.hub) != has(self.claim)": lambda self: ("hub" in self) != ("claim" in self),
    "!self.startsWith('/') && !self.contains('..')": lambda self: (
        not self.startswith("/") and ".." not in self
    ),
    "self.type == 'none' ? self.count == 0 : self.count >= 1": lambda self: (
        (self["count"] == 0) if self["type"] == "none" else self["count"] >= 1
    ),
    "self == 1": lambda self: bool(self == 1),
    "!has(self.requests) || self.requests.all(k, k in ['cpu', 'memory', 'ephemeral-storage'])": _only_resources(
        "requests"
    ),
    "!has(self.limits) || self.limits.all(k, k in ['cpu', 'memory', 'ephemeral-storage'])": _only_resources(
        "limits"
    ),
    "self.type != 'NodePort' || self.host != ''": lambda self: (
        self["type"] != "NodePort" or self["host"] != ""
    ),
    "self.nodePort == 0 || self.type == 'NodePort'": lambda self: (
        self["nodePort"] == 0 or self["type"] == "NodePort"
    ),
    "self.nodePort == 0 || self.nodePort >= 1024": lambda self: (
        self["nodePort"] == 0 or self["nodePort"] >= 1024
    ),
    "!has(self.labels) || self.labels.all(k, !k.startsWith('hat.dev/') && !k.startsWith('app.kubernetes.io/'))": (
        lambda self: (
            not any(key.startswith(("hat.dev/", "app.kubernetes.io/")) for key in self.get("labels", {}))
        )
    ),
    "self.l4t == '' || self.arch == 'arm64'": lambda self: self["l4t"] == "" or self["arch"] == "arm64",
    "self == 'none'": lambda self: bool(self == "none"),
    "self == 'fixed'": lambda self: bool(self == "fixed"),
    "self == 'off'": lambda self: bool(self == "off"),
}
