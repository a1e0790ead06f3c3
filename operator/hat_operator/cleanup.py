"""Deletes the HatDeployments of an operator's namespaces and waits for them: what `helm uninstall` runs first.

Usage: python -m hat_operator.cleanup [--timeout SECONDS]

The namespaces are those of HAT_OPERATOR_NAMESPACES. The operator must still run, because it removes the finalizers.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Sequence

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from hat_operator import names
from hat_operator.kubeconfig import own_client
from hat_operator.settings import Settings
from hat_runtime.errors import UsageError

_RESOURCE = (names.GROUP, names.VERSION)
POLL_S = 2.0
REQUEST_TIMEOUT_S = 10.0

Name = tuple[str, str]
"""Namespace and name of a HatDeployment."""


class HatDeployments:
    """The HatDeployments of some namespaces, or of all when none is given."""

    def __init__(self, api: client.CustomObjectsApi, namespaces: Sequence[str]) -> None:
        self._api = api
        self._namespaces = namespaces

    def names(self) -> set[Name]:
        """All that exist, those being deleted included; none where the API is not installed. Raises ApiException."""
        try:
            lists = (
                [self._list_namespace(namespace) for namespace in self._namespaces]
                if self._namespaces
                else [
                    self._api.list_cluster_custom_object(
                        *_RESOURCE, names.PLURAL, _request_timeout=REQUEST_TIMEOUT_S
                    )
                ]
            )
        except ApiException as error:
            if error.status == 404:
                return set()
            raise
        return {
            (item["metadata"]["namespace"], item["metadata"]["name"])
            for found in lists
            for item in found["items"]
        }

    def _list_namespace(self, namespace: str) -> dict[str, list[dict[str, dict[str, str]]]]:
        found: dict[str, list[dict[str, dict[str, str]]]] = self._api.list_namespaced_custom_object(
            *_RESOURCE, namespace, names.PLURAL, _request_timeout=REQUEST_TIMEOUT_S
        )
        return found

    def delete(self, name: Name) -> None:
        """Asks for the deletion of one; it need not exist. Raises ApiException."""
        try:
            self._api.delete_namespaced_custom_object(
                *_RESOURCE, name[0], names.PLURAL, name[1], _request_timeout=REQUEST_TIMEOUT_S
            )
        except ApiException as error:
            if error.status != 404:
                raise


def listed(found: Iterable[Name]) -> str:
    """The names for people, as NAMESPACE/NAME."""
    return ", ".join("/".join(name) for name in sorted(found))


def clean_up(hats: HatDeployments, timeout_s: float, poll_s: float = POLL_S) -> set[Name]:
    """Deletes every HatDeployment and waits until there is none, at most `timeout_s` seconds. Returns what is left.

    An API server that does not answer for a moment is asked again. Raises ApiException where it refuses (401, 403).
    """
    deadline = time.monotonic() + timeout_s
    asked: set[Name] = set()
    while True:
        left: set[Name] | None = None
        try:
            left = hats.names()
            # Also those that were created meanwhile.
            for name in sorted(left - asked):
                print(f"deleting {'/'.join(name)}", flush=True)
                hats.delete(name)
                asked.add(name)
        except (ApiException, HTTPError, OSError) as error:
            if isinstance(error, ApiException) and error.status in (401, 403):
                raise
            print(f"API server: {error}", file=sys.stderr, flush=True)
        if left is not None and not left:
            return left
        if time.monotonic() >= deadline:
            if left is None:
                raise TimeoutError(f"the API server did not answer within {timeout_s:g} s")
            return left
        time.sleep(min(poll_s, max(0.0, deadline - time.monotonic())))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when nothing is left, 1 when the time is over or the API server refuses, 2 for a wrong setting."""
    parser = argparse.ArgumentParser(
        prog="python -m hat_operator.cleanup", description="Delete HatDeployments."
    )
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="default 120")
    options = parser.parse_args(arguments)
    if not options.timeout > 0:
        parser.error(f"--timeout: {options.timeout:g} is not a number of seconds above 0")
    try:
        settings = Settings.from_environment(os.environ)
        hats = HatDeployments(client.CustomObjectsApi(own_client()), settings.namespaces)
        left = clean_up(hats, options.timeout)
    except (UsageError, config.ConfigException) as error:
        print(error, file=sys.stderr)
        return 2
    except (ApiException, TimeoutError) as error:
        print(f"API server: {error}", file=sys.stderr)
        return 1
    if left:
        print(
            f"still there after {options.timeout:g} s: {listed(left)}. An edge cluster that does not answer is waited "
            "for until spec.edge.deletionTimeoutSeconds; docs/kubernetes.md says how to force a deletion.",
            file=sys.stderr,
        )
        return 1
    print("no HatDeployment is left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
