"""The CRD's CEL rules in Python, for checks without an API server.

Keys are the rules' texts in the CRD; messages are there and only there. Rules with oldSelf are about changes and have
no entry. A test holds both sides together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from hat_operator.prometheus_ref import URL

_LABEL_KEY = re.compile(
    "([a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
)
_LABEL_KEYS = f"self.all(k, k.indexOf('/') <= 253 && k.matches('^{_LABEL_KEY.pattern}$'))"
_RESOURCES = ("cpu", "memory", "ephemeral-storage")
_PROMETHEUS_URL = f"self == '' || self.matches('^{URL.pattern.replace(chr(92), chr(92) * 2)}$')"
_SAMPLERS = {"hat": ("coupled", "rejection"), "picospec": ("coupled", "thinning", "topk")}


def _other_cluster_can_dial(spec: Mapping[str, Any]) -> bool:
    expose = spec["cloud"]["expose"]
    return "clusterRef" not in spec.get("edge", {}) or expose["type"] != "ClusterIP" or expose["host"] != ""


def _has_draft_model(spec: Mapping[str, Any]) -> bool:
    return (
        spec["mode"] == "hat"
        or "edge" not in spec
        or "draftModel" in spec["speculation"]
        or spec["model"]["source"].get("hub") == "default"
    )


def _drafts_under_way(spec: Mapping[str, Any]) -> int:
    found: int = spec["speculation"].get("maxDraft", 4) * spec["speculation"].get("window", 2)
    return found


def _only_resources(field: str) -> Callable[[Any], bool]:
    return lambda self: all(key in _RESOURCES for key in self.get(field, {}))


def _bursts_have_rates(kind: str) -> Callable[[Any], bool]:
    def holds(quotas: Mapping[str, Any]) -> bool:
        inherited = "tokensPerSecond" in quotas.get(f"{kind}Default", {})
        return all(
            "tokensPerSecond" in one or (inherited and "tokensPerSecond" not in one.get("unlimited", ()))
            for one in quotas.get(f"{kind}s", ())
            if "burstTokens" in one
        )

    return holds


def _burst_has_rate_rule(kind: str) -> str:
    default = f"self.{kind}Default"
    return (
        f"!has(self.{kind}s) || self.{kind}s.all(one, !has(one.burstTokens) || has(one.tokensPerSecond) "
        f"|| (has({default}) && has({default}.tokensPerSecond) "
        "&& !(has(one.unlimited) && 'tokensPerSecond' in one.unlimited)))"
    )


RULES: dict[str, Callable[[Any], bool]] = {
    "size(self.metadata.name) <= 40": lambda self: len(self.get("metadata", {}).get("name", "")) <= 40,
    "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')": lambda self: bool(
        re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", self.get("metadata", {}).get("name", ""))
    ),
    "self.mode == 'picospec' || has(self.split)": lambda self: self["mode"] == "picospec" or "split" in self,
    "self.mode == 'hat' || !has(self.split)": lambda self: self["mode"] == "hat" or "split" not in self,
    "self.mode == 'picospec' || !has(self.speculation.draftModel)": lambda self: (
        self["mode"] == "picospec" or "draftModel" not in self["speculation"]
    ),
    (
        "self.mode == 'hat' || !has(self.edge) || has(self.speculation.draftModel) "
        "|| (has(self.model.source.hub) && self.model.source.hub == 'default')"
    ): _has_draft_model,
    "self.mode == 'hat' || !has(self.edge) || !has(self.edge.weights)": lambda self: (
        self["mode"] == "hat" or "weights" not in self.get("edge", {})
    ),
    "self.mode == 'picospec' || !has(self.edge) || self.edge.offline == 'refuse'": lambda self: (
        self["mode"] == "picospec" or self.get("edge", {}).get("offline", "refuse") == "refuse"
    ),
    "self.mode == 'hat' || self.speculation.drafter == 'auto'": lambda self: (
        self["mode"] == "hat" or self["speculation"]["drafter"] == "auto"
    ),
    "self.mode == 'hat' || !has(self.speculation.stopThreshold)": lambda self: (
        self["mode"] == "hat" or "stopThreshold" not in self["speculation"]
    ),
    "self.mode == 'hat' || self.speculation.branches == 1": lambda self: (
        self["mode"] == "hat" or self["speculation"]["branches"] == 1
    ),
    "self.mode == 'hat' || !has(self.speculation.alternatives)": lambda self: (
        self["mode"] == "hat" or "alternatives" not in self["speculation"]
    ),
    (
        "self.speculation.sampler in "
        "(self.mode == 'hat' ? ['coupled', 'rejection'] : ['coupled', 'thinning', 'topk'])"
    ): lambda self: self["speculation"]["sampler"] in _SAMPLERS[self["mode"]],
    "self.mode == 'picospec' || !has(self.speculation.maxDraft) || self.speculation.maxDraft >= 1": lambda self: (
        self["mode"] == "picospec" or self["speculation"].get("maxDraft", 6) >= 1
    ),
    (
        "self.mode == 'hat' || (has(self.speculation.maxDraft) ? self.speculation.maxDraft : 4) "
        "* (has(self.speculation.window) ? self.speculation.window : 2) <= 64"
    ): lambda self: self["mode"] == "hat" or _drafts_under_way(self) <= 64,
    "self.mode == 'hat' || !has(self.chunking.tokens) || self.chunking.tokens == 128": lambda self: (
        self["mode"] == "hat" or self["chunking"].get("tokens", 128) == 128
    ),
    "!has(self.minTokens) || !has(self.maxTokens) || self.minTokens <= self.maxTokens": lambda self: (
        not {"minTokens", "maxTokens"} <= self.keys() or self["minTokens"] <= self["maxTokens"]
    ),
    "!has(self.tokens) || (has(self.mode) && self.mode == 'fixed')": lambda self: (
        "tokens" not in self or self.get("mode") == "fixed"
    ),
    "self.mode == 'hat' || (self.wire.uplink == 'none' && self.wire.uplinkDecode == 'none')": lambda self: (
        self["mode"] == "hat" or self["wire"]["uplink"] == self["wire"]["uplinkDecode"] == "none"
    ),
    "self.mode == 'hat' || !self.wire.padFrames": lambda self: (
        self["mode"] == "hat" or not self["wire"]["padFrames"]
    ),
    (
        "!has(self.edge) || !has(self.edge.clusterRef) || self.cloud.expose.type != 'ClusterIP' "
        "|| self.cloud.expose.host != ''"
    ): _other_cluster_can_dial,
    (
        "self.mode == 'picospec' || !has(self.edge) || !has(self.model.source.claim) || has(self.edge.weights)"
    ): lambda self: (
        self["mode"] == "picospec"
        or "edge" not in self
        or "claim" not in self["model"]["source"]
        or "weights" in self["edge"]
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
    _burst_has_rate_rule("tenant"): _bursts_have_rates("tenant"),
    _burst_has_rate_rule("device"): _bursts_have_rates("device"),
    "self >= 0.01": lambda self: bool(self >= 0.01),
    "self >= 0.000001": lambda self: bool(self >= 0.000001),
    "!has(self.burstTokens) || has(self.tokensPerSecond)": lambda self: (
        "burstTokens" not in self or "tokensPerSecond" in self
    ),
    (
        "!has(self.unlimited) || !((has(self.sessions) && 'sessions' in self.unlimited) "
        "|| (has(self.tokensPerSecond) && 'tokensPerSecond' in self.unlimited) "
        "|| (has(self.kvShare) && 'kvShare' in self.unlimited))"
    ): lambda self: not self.keys() & set(self.get("unlimited", ())),
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
    _LABEL_KEYS: lambda self: all(key.find("/") <= 253 and _LABEL_KEY.fullmatch(key) for key in self),
    "self.l4t == '' || self.arch == 'arm64'": lambda self: self["l4t"] == "" or self["arch"] == "arm64",
    _PROMETHEUS_URL: lambda self: self == "" or URL.fullmatch(self) is not None,
    "!has(self.prometheusTokenSecretRef) || self.prometheusUrl.startsWith('https://')": lambda self: (
        "prometheusTokenSecretRef" not in self or self.get("prometheusUrl", "").startswith("https://")
    ),
    "!has(self.prometheusCaRef) || self.prometheusUrl.startsWith('https://')": lambda self: (
        "prometheusCaRef" not in self or self.get("prometheusUrl", "").startswith("https://")
    ),
    "self == 'none'": lambda self: bool(self == "none"),
    (
        "!has(self.deniedDevices) || size(self.deniedDevices) == 0 || !has(self.tls) || self.tls != 'off'"
    ): lambda self: not self.get("deniedDevices") or self.get("tls") != "off",
}
