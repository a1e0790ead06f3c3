"""Clients of clusters: the operator's own, and one described by a kubeconfig that a user wrote into a Secret.

Such a kubeconfig is not trusted: an exec plugin would run a program in the operator's pod, and a file path would send
the operator's own files (its service account token, for one) to a server of the writer's choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import yaml
from kubernetes import client, config
from urllib3.util import Retry

from hat_operator import names
from hat_operator.settings import package_version

_USER_REFUSED = ("exec", "auth-provider", "tokenFile", "client-certificate", "client-key")
_CLUSTER_REFUSED = ("certificate-authority",)


class KubeconfigError(ValueError):
    """The kubeconfig cannot be used; the text says which entry of it, never what a credential is."""


def client_from_kubeconfig(text: str, context: str = "") -> client.ApiClient:
    """A client for `context` of a kubeconfig, for its current context if "".

    Raises:
        KubeconfigError: it is not a kubeconfig, lacks the context, or holds exec or auth-provider plugins, paths of
            files, or a server without https.
    """
    content = checked_kubeconfig(text, context)
    configuration = _configuration()
    try:
        config.load_kube_config_from_dict(
            content, context=context or None, client_configuration=configuration, persist_config=False
        )
    except (config.ConfigException, ValueError, TypeError, KeyError) as error:
        raise KubeconfigError(f"kubeconfig: cannot be used ({type(error).__name__})") from None
    return _client(configuration)


def own_client() -> client.ApiClient:
    """A client for the cluster that the operator runs in, or else for KUBECONFIG's current context.

    Raises:
        kubernetes.config.ConfigException: there is neither.
    """
    configuration = _configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)
    except config.ConfigException:
        config.load_kube_config(client_configuration=configuration, persist_config=False)
    return _client(configuration)


def checked_kubeconfig(text: str, context: str) -> dict[str, Any]:
    """The content of a kubeconfig after the checks that client_from_kubeconfig describes.

    Raises:
        KubeconfigError: see client_from_kubeconfig.
    """
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        raise KubeconfigError("kubeconfig: is not YAML") from None
    if not isinstance(content, dict):
        raise KubeconfigError("kubeconfig: is not a mapping with clusters, users and contexts")
    users = _entries(content, "users", "user")
    clusters = _entries(content, "clusters", "cluster")
    contexts = _entries(content, "contexts", "context")
    for kind, entries, refused in (
        ("users", users, _USER_REFUSED),
        ("clusters", clusters, _CLUSTER_REFUSED),
    ):
        for name, entry in entries.items():
            for key in refused:
                if key in entry:
                    reason = "only credentials written in the kubeconfig itself are accepted"
                    raise KubeconfigError(f"{kind}[{name}].{key}: {reason}")
    chosen = context or content.get("current-context") or ""
    if chosen not in contexts:
        raise KubeconfigError(f"contexts: there is no {chosen!r}; there are {sorted(contexts)}")
    cluster = contexts[chosen].get("cluster")
    if cluster not in clusters:
        raise KubeconfigError(f"contexts[{chosen}].cluster: there is no cluster {cluster!r}")
    user = contexts[chosen].get("user")
    if user not in users:
        raise KubeconfigError(f"contexts[{chosen}].user: there is no user {user!r}")
    server = clusters[cluster].get("server")
    if not isinstance(server, str) or urlsplit(server).scheme != "https":
        raise KubeconfigError(f"clusters[{cluster}].server: {server!r} is not an https address")
    return content


def _entries(content: Mapping[str, Any], plural: str, singular: str) -> dict[str, dict[str, Any]]:
    entries = content.get(plural)
    if not isinstance(entries, list):
        raise KubeconfigError(f"{plural}: is not a list")
    found: dict[str, dict[str, Any]] = {}
    for index, entry in enumerate(entries):
        value = entry.get(singular) if isinstance(entry, dict) else None
        if not isinstance(value, dict) or not isinstance(entry.get("name"), str):
            raise KubeconfigError(f"{plural}[{index}]: has no name or no {singular}")
        if entry["name"] in found:
            # Readers disagree on which of two equal names counts: the one that was checked must be the one used.
            raise KubeconfigError(f"{plural}[{index}].name: {entry['name']!r} occurs twice")
        found[entry["name"]] = value
    return found


def _client(configuration: client.Configuration) -> client.ApiClient:
    made = client.ApiClient(configuration)
    # What audit logs show beside each request.
    made.user_agent = f"{names.FIELD_MANAGER}/{package_version()}"
    return made


def _configuration() -> client.Configuration:
    # type.__call__ passes by the default that a library may have set for the whole process.
    configuration = type.__call__(client.Configuration)
    # At least as many as a Cluster has threads.
    configuration.connection_pool_maxsize = 32
    # An address that does not answer must cost one timeout. Cluster tries again where a kept connection broke.
    configuration.retries = Retry(total=0, connect=0, read=0, redirect=0, status=0, other=0)
    return configuration
