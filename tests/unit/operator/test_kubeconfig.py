"""What a kubeconfig from a user's Secret may hold."""

from __future__ import annotations

import base64
import copy
from typing import Any

import pytest
import yaml

from hat_operator.kubeconfig import KubeconfigError, checked_kubeconfig, client_from_kubeconfig

GOOD: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Config",
    "current-context": "site",
    "clusters": [
        {"name": "k3s", "cluster": {"server": "https://192.0.2.1:6443", "insecure-skip-tls-verify": True}},
        {"name": "other", "cluster": {"server": "https://192.0.2.2:6443"}},
    ],
    "users": [{"name": "hat", "user": {"token": "secret-token"}}],
    "contexts": [
        {"name": "site", "context": {"cluster": "k3s", "user": "hat"}},
        {"name": "second", "context": {"cluster": "other", "user": "hat"}},
        {"name": "broken", "context": {"cluster": "none", "user": "hat"}},
    ],
}


def text(**change: Any) -> str:
    return yaml.safe_dump({**copy.deepcopy(GOOD), **change})


def test_uses_the_current_or_the_given_context() -> None:
    assert client_from_kubeconfig(text()).configuration.host == "https://192.0.2.1:6443"
    assert client_from_kubeconfig(text(), "second").configuration.host == "https://192.0.2.2:6443"


@pytest.mark.parametrize("key", ["exec", "auth-provider", "tokenFile", "client-certificate", "client-key"])
def test_refuses_plugins_and_paths_of_users_even_of_contexts_not_chosen(key: str) -> None:
    users = [*GOOD["users"], {"name": "b", "user": {key: "/var/run/secrets/token"}}]
    with pytest.raises(KubeconfigError, match=rf"users\[b\]\.{key}"):
        client_from_kubeconfig(text(users=users))


def test_refuses_a_path_of_a_certificate_authority() -> None:
    clusters = [{"name": "k3s", "cluster": {"server": "https://x", "certificate-authority": "/etc/passwd"}}]
    with pytest.raises(KubeconfigError, match=r"clusters\[k3s\]\.certificate-authority"):
        client_from_kubeconfig(text(clusters=clusters))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"current-context": "nowhere"}, "there is no 'nowhere'"),
        ({"current-context": "broken"}, "there is no cluster 'none'"),
        ({"users": []}, "there is no user 'hat'"),
        ({"users": "hat"}, "users: is not a list"),
        ({"users": [*GOOD["users"], *GOOD["users"]]}, "'hat' occurs twice"),
        ({"clusters": [{"name": "k3s"}]}, r"clusters\[0\]: has no name or no cluster"),
        ({"clusters": [{"name": "k3s", "cluster": {"server": "http://x"}}]}, "not an https address"),
    ],
)
def test_says_what_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(KubeconfigError, match=message):
        checked_kubeconfig(text(**change), "")


@pytest.mark.parametrize("content", ["", "a: [", "- 1", "&a [*a]"])
def test_refuses_what_is_no_kubeconfig(content: str) -> None:
    with pytest.raises(KubeconfigError):
        checked_kubeconfig(content, "")


def test_messages_hold_no_credentials() -> None:
    data = base64.b64encode(b"secret-token").decode()
    users = [{"name": "hat", "user": {"token": "secret-token", "client-key-data": data, "exec": {}}}]
    with pytest.raises(KubeconfigError) as caught:
        client_from_kubeconfig(text(users=users))
    assert "secret-token" not in str(caught.value)
    assert data not in str(caught.value)
