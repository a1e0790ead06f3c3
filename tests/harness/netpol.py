"""What NetworkPolicies let through, by the rules of networking.k8s.io/v1: for one flow at a time, without a cluster."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Policy = Mapping[str, Any]


@dataclass(frozen=True)
class Party:
    """A pod, or without a namespace something outside the cluster."""

    name: str
    address: str
    namespace: str = ""
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    namespace_labels: Mapping[str, str] = field(default_factory=dict, hash=False)


def allowed(
    policies: Iterable[Policy], source: Party, target: Party, port: int, protocol: str = "TCP"
) -> bool:
    """Whether `source` may open a connection to `port` of `target`: both ends must let it through."""
    known = list(policies)
    return _passes(known, "Egress", source, target, port, protocol) and _passes(
        known, "Ingress", target, source, port, protocol
    )


def guards(policies: Iterable[Policy], direction: str, party: Party) -> list[Policy]:
    """The policies that select a pod in one direction: without any, everything passes; with one, what a rule names."""
    return [
        policy
        for policy in policies
        if party.namespace
        and policy["metadata"]["namespace"] == party.namespace
        and direction in _types(policy["spec"])
        and _selects(policy["spec"]["podSelector"], party.labels)
    ]


def _types(spec: Mapping[str, Any]) -> list[str]:
    found: list[str] = spec.get("policyTypes") or ["Ingress", *(["Egress"] if "egress" in spec else [])]
    return found


def _passes(
    policies: list[Policy], direction: str, guarded: Party, peer: Party, port: int, protocol: str
) -> bool:
    chosen = guards(policies, direction, guarded)
    side, who = ("ingress", "from") if direction == "Ingress" else ("egress", "to")
    return not chosen or any(
        _peers(rule.get(who), policy["metadata"]["namespace"], peer)
        and _ports(rule.get("ports"), port, protocol)
        for policy in chosen
        for rule in policy["spec"].get(side) or ()
    )


def _ports(ports: list[Mapping[str, Any]] | None, port: int, protocol: str) -> bool:
    if not ports:
        return True
    for one in ports:
        first = one.get("port", 0)
        if isinstance(first, str):
            raise ValueError(f"port: {first!r}: named ports are not resolved here")
        last = one.get("endPort", first) if first else 65535
        if one.get("protocol", "TCP") == protocol and first <= port <= last:
            return True
    return False


def _peers(peers: list[Mapping[str, Any]] | None, namespace: str, party: Party) -> bool:
    return not peers or any(_peer(peer, namespace, party) for peer in peers)


def _peer(peer: Mapping[str, Any], namespace: str, party: Party) -> bool:
    if "ipBlock" in peer:
        # Whether a block means pods too is left to the network plugin. Here it does: what must be refused is refused
        # with every plugin, and what must pass is outside the cluster.
        address, block = ipaddress.ip_address(party.address), peer["ipBlock"]
        inside = address in ipaddress.ip_network(block["cidr"])
        return inside and not any(address in ipaddress.ip_network(one) for one in block.get("except", ()))
    if not party.namespace:
        return False
    if "namespaceSelector" in peer:
        if not _selects(peer["namespaceSelector"], party.namespace_labels):
            return False
    elif party.namespace != namespace:
        return False
    return _selects(peer.get("podSelector", {}), party.labels)


def _selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for term in selector.get("matchExpressions", ()):
        value, values = labels.get(term["key"]), term.get("values", ())
        holds = {
            "In": value in values,
            "NotIn": value not in values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }[term["operator"]]
        if not holds:
            return False
    return True
