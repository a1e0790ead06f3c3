"""One cluster's API: reads, server-side apply, delete. Each call takes at most about REQUEST_TIMEOUT_S."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import urllib3
from kubernetes import client
from kubernetes.client.exceptions import ApiException
from kubernetes.dynamic import DynamicClient

from hat_operator import metrics, names
from hat_operator.diff import managed_by, needs_apply
from hat_operator.kinds import Kind, kind_of

REQUEST_TIMEOUT_S = 10.0
PAGE = 500
API_CACHE_S = 300.0
_MERGE = "application/merge-patch+json"
_APPLY = "application/apply-patch+yaml"
_REASONS = {401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 409: "Conflict", 422: "Invalid"}
for _reason in (*_REASONS.values(), "Unreachable", "RequestFailed"):
    # From 0 on, so that the first one is an increase.
    metrics.REQUEST_ERRORS.labels(_reason)

Object = dict[str, Any]


class ClusterError(Exception):
    """A request failed.

    reason: Unauthorized, Forbidden, NotFound, Conflict, Invalid, Unreachable, NameConflict or RequestFailed.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def cluster_away(self) -> bool:
        """The whole cluster does not answer or knows us no more; no other request would fare better."""
        return self.reason in ("Unreachable", "Unauthorized")


@dataclass(frozen=True)
class Applied:
    """An object as it is after apply, and whether it had to be written."""

    live: Object
    written: bool


class Cluster:
    """A client with threads of its own, so that a cluster that does not answer holds up no other."""

    def __init__(self, api_client: client.ApiClient, threads: int = 4, identity: str = "") -> None:
        """Nothing is sent yet; `identity` tells clients of different kubeconfigs apart."""
        self._api_client = api_client
        self.identity = identity
        # No discovery: kinds.py knows the addresses.
        self._client = DynamicClient(api_client, discoverer=lambda *_: None)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="kubernetes")
        self._apis: dict[str, tuple[float, bool]] = {}

    @property
    def user_agent(self) -> str:
        """As audit logs show it."""
        return str(self._api_client.user_agent)

    @property
    def configuration(self) -> client.Configuration:
        """Address and credentials."""
        return self._api_client.configuration

    async def get(self, kind: Kind, name: str, namespace: str | None = None) -> Object | None:
        """The object, None if there is none.

        Raises:
            ClusterError: see there.
        """
        try:
            return await self._request("get", kind.path(namespace, name))
        except ClusterError as error:
            if error.reason == "NotFound":
                return None
            raise

    async def list(
        self, kind: Kind, namespace: str | None = None, selector: str = "", *, fields: str = ""
    ) -> list[Object]:
        """All objects with these labels and fields, in a namespace or in all.

        Raises:
            ClusterError: see there.
        """
        found: list[Object] = []
        following: str | None = None
        while True:
            page = await self._request(
                "get",
                kind.path(namespace),
                label_selector=selector or None,
                field_selector=fields or None,
                limit=PAGE,
                _continue=following,
            )
            # Items of a list come without apiVersion and kind.
            found += [{"apiVersion": kind.api_version, "kind": kind.name, **item} for item in page["items"]]
            following = page["metadata"].get("continue")
            if not following:
                return found

    async def apply(self, desired: Mapping[str, Any], live: Object | None = None) -> Applied:
        """Make an object as desired by server-side apply; write only if something differs.

        Args:
            desired: the object, with its namespace.
            live: what is there, if the caller has just read it.

        Raises:
            ClusterError: NameConflict if an object of this name is someone else's, or of another HatDeployment (of the
                same name in another namespace, with devices in the same place); else see there.
        """
        kind = kind_of(desired)
        meta = desired["metadata"]
        where = kind.path(meta.get("namespace"), meta["name"])
        if live is None:
            live = await self.get(kind, meta["name"], meta.get("namespace"))
        if live is not None:
            if not managed_by(live, names.FIELD_MANAGER):
                text = f"{kind.name} {meta['name']} exists and is not {names.FIELD_MANAGER}'s; rename or delete it"
                raise ClusterError("NameConflict", text)
            owner = names.owner(live)
            if owner not in (None, names.owner(desired)) and not _same_owner(desired, live):
                text = f"{kind.name} {meta['name']} is of the HatDeployment {owner}; use another name or namespace"
                raise ClusterError("NameConflict", text)
            if not needs_apply(desired, live, names.FIELD_MANAGER):
                return Applied(live, False)
        result = await self._request(
            "patch",
            where,
            body=dict(desired),
            content_type=_APPLY,
            field_manager=names.FIELD_MANAGER,
            force_conflicts=True,
        )
        metrics.WRITES.labels("apply", kind.name).inc()
        return Applied(result, True)

    async def create(self, obj: Mapping[str, Any]) -> Object:
        """Create an object.

        Raises:
            ClusterError: Conflict if it exists; else see there.
        """
        kind = kind_of(obj)
        result = await self._request("post", kind.path(obj["metadata"].get("namespace")), body=dict(obj))
        metrics.WRITES.labels("create", kind.name).inc()
        return result

    async def replace(self, obj: Mapping[str, Any]) -> Object:
        """Replace an object of the same resourceVersion.

        Raises:
            ClusterError: Conflict if it has changed; else see there.
        """
        kind, meta = kind_of(obj), obj["metadata"]
        result = await self._request("put", kind.path(meta.get("namespace"), meta["name"]), body=dict(obj))
        metrics.WRITES.labels("replace", kind.name).inc()
        return result

    async def patch(self, obj: Mapping[str, Any], change: Mapping[str, Any], subresource: str = "") -> Object:
        """Merge-patch an object; a resourceVersion in `change` makes it fail if the object has changed.

        Raises:
            ClusterError: see there.
        """
        kind, meta = kind_of(obj), obj["metadata"]
        result = await self._request(
            "patch",
            kind.path(meta.get("namespace"), meta["name"], subresource),
            body=dict(change),
            content_type=_MERGE,
            field_manager=names.FIELD_MANAGER,
        )
        metrics.WRITES.labels(subresource or "patch", kind.name).inc()
        return result

    async def delete(self, obj: Mapping[str, Any]) -> None:
        """Delete exactly this object and, in the background, what it owns; nothing if it is gone.

        Raises:
            ClusterError: see there.
        """
        kind, meta = kind_of(obj), obj["metadata"]
        options = {"propagationPolicy": "Background", "preconditions": {"uid": meta["uid"]}}
        try:
            await self._request("delete", kind.path(meta.get("namespace"), meta["name"]), body=options)
        except ClusterError as error:
            # Conflict: another object of this name has taken its place.
            if error.reason not in ("NotFound", "Conflict"):
                raise
            return
        metrics.WRITES.labels("delete", kind.name).inc()

    async def has(self, kind: Kind) -> bool:
        """Whether the cluster serves an optional API; the answer is kept for API_CACHE_S.

        Raises:
            ClusterError: see there.
        """
        known = self._apis.get(kind.api_version)
        if known is not None and time.monotonic() - known[0] < API_CACHE_S:
            return known[1]
        try:
            found = await self._request("get", kind.group_path)
            served = any(item["name"] == kind.plural for item in found.get("resources", ()))
        except ClusterError as error:
            if error.reason not in ("NotFound", "Forbidden"):
                raise
            served = False
        self._apis[kind.api_version] = (time.monotonic(), served)
        return served

    def close(self) -> None:
        """Let the threads end; requests under way finish on their own."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _request(self, method: str, path: str, **options: Any) -> Object:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, _guarded(self._send, method, path, options))

    def _send(self, method: str, path: str, options: Mapping[str, Any]) -> Object:
        send = partial(
            self._client.request, method, path, serialize=False, _request_timeout=REQUEST_TIMEOUT_S, **options
        )
        try:
            response = send()
        except urllib3.exceptions.HTTPError as error:
            # A kept connection that the server had closed; a timeout is not worth another one.
            cause = getattr(error, "reason", None) or error
            if method != "get" or not isinstance(cause, urllib3.exceptions.ProtocolError):
                raise
            response = send()
        result: Object = json.loads(response.data)
        return result


def _same_owner(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    uids = [{ref["uid"] for ref in obj["metadata"].get("ownerReferences", ())} for obj in (one, other)]
    return bool(uids[0] & uids[1])


def _guarded(
    send: Callable[[str, str, Mapping[str, Any]], Object], method: str, path: str, options: Mapping[str, Any]
) -> Callable[[], Object]:
    def call() -> Object:
        try:
            return send(method, path, options)
        except ApiException as error:
            reason = _REASONS.get(error.status, "RequestFailed")
            failure = ClusterError(reason, f"{method.upper()} {path}: {error.status} {_message(error)}")
        except (urllib3.exceptions.HTTPError, OSError, ssl.SSLError) as error:
            failure = ClusterError("Unreachable", f"{method.upper()} {path}: {_short(error)}")
        except ValueError as error:
            failure = ClusterError("RequestFailed", f"{method.upper()} {path}: {_short(error)}")
        metrics.REQUEST_ERRORS.labels(failure.reason).inc()
        raise failure

    return call


def _message(error: ApiException) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.reason)


def _short(error: BaseException) -> str:
    """The innermost cause without addresses of Python objects, which would make each message a new one."""
    cause = getattr(error, "reason", None) or error
    return f"{type(cause).__name__}: {str(cause).rpartition('>: ')[2] or cause}"
