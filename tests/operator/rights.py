"""Rights that Roles give, and those that the apiserver's audit log shows in use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tests.harness.audit import by_user


class Right(NamedTuple):
    """One verb on one resource; a subresource is written RESOURCE/SUBRESOURCE."""

    group: str
    resource: str
    verb: str


def granted(objects: Iterable[Mapping[str, Any]]) -> set[Right]:
    """All rights of the Roles and ClusterRoles among `objects`."""
    return {
        Right(group, resource, verb)
        for role in objects
        if role["kind"] in ("Role", "ClusterRole")
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def used(events: Iterable[Mapping[str, Any]], user: str) -> set[Right]:
    """Rights that requests of `user` have needed and had."""
    found = set()
    for event, right in _requests(events, user):
        if _forbidden(event):
            continue
        found.add(right)
        # Server-side apply of what is not there: the apiserver asks for both rights and logs one request.
        if right.verb == "patch" and event["responseStatus"].get("code") == 201:
            found.add(right._replace(verb="create"))
    return found


def refused(events: Iterable[Mapping[str, Any]], user: str) -> set[Right]:
    """Rights that requests of `user` have lacked."""
    return {right for event, right in _requests(events, user) if _forbidden(event)}


def _requests(events: Iterable[Mapping[str, Any]], user: str) -> Iterable[tuple[Mapping[str, Any], Right]]:
    for event in by_user(events, user):
        about = event.get("objectRef", {})
        if "resource" not in about or "responseStatus" not in event:
            continue
        parts = [about["resource"], about.get("subresource")]
        yield event, Right(about.get("apiGroup", ""), "/".join(filter(None, parts)), event["verb"])


def _forbidden(event: Mapping[str, Any]) -> bool:
    """Whether a right was missing; what is in a namespace that another test has just deleted is refused as well."""
    status = event["responseStatus"]
    return bool(status.get("code") == 403) and "is being terminated" not in status.get("message", "")
