"""What `helm uninstall` runs first, against a real API server."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import yaml
from kubernetes import client

from hat_operator import cleanup
from tests.harness.controlplane import ControlPlane
from tests.operator.manifests import hat_deployment


@pytest.fixture
def api(control_plane: ControlPlane) -> client.CustomObjectsApi:
    return client.CustomObjectsApi(control_plane.client())


def create(
    api: client.CustomObjectsApi, namespace: str, name: str, finalizers: list[str] | None = None
) -> None:
    body = hat_deployment(name)
    body["metadata"]["finalizers"] = finalizers or []
    api.create_namespaced_custom_object("hat.dev", "v1alpha1", namespace, "hatdeployments", body)


def free(api: client.CustomObjectsApi, namespace: str, name: str) -> None:
    change = {"metadata": {"finalizers": None}}
    api.patch_namespaced_custom_object("hat.dev", "v1alpha1", namespace, "hatdeployments", name, change)


def test_deletes_all_of_its_namespaces(control_plane: ControlPlane, api: client.CustomObjectsApi) -> None:
    with control_plane.namespace() as mine, control_plane.namespace() as other:
        create(api, mine, "one")
        create(api, mine, "two")
        create(api, other, "kept")
        assert cleanup.clean_up(cleanup.HatDeployments(api, [mine]), timeout_s=20, poll_s=0.1) == set()
        assert cleanup.HatDeployments(api, [mine, other]).names() == {(other, "kept")}
        assert (other, "kept") in cleanup.HatDeployments(api, []).names()


def test_waits_for_finalizers(api: client.CustomObjectsApi, namespace: str) -> None:
    create(api, namespace, "held", ["hat.dev/edge-cleanup"])
    hats = cleanup.HatDeployments(api, [namespace])
    assert cleanup.clean_up(hats, timeout_s=0.5, poll_s=0.1) == {(namespace, "held")}
    released = threading.Timer(1.0, free, (api, namespace, "held"))
    released.start()
    assert cleanup.clean_up(hats, timeout_s=20, poll_s=0.1) == set()
    released.join()


def test_command_names_what_is_left(
    control_plane: ControlPlane,
    api: client.CustomObjectsApi,
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(control_plane.kubeconfig)
    )
    monkeypatch.setenv("HAT_OPERATOR_NAMESPACES", namespace)
    create(api, namespace, "held", ["hat.dev/edge-cleanup"])
    assert cleanup.main(["--timeout", "0.5"]) == 1
    assert f"{namespace}/held" in capsys.readouterr().err
    free(api, namespace, "held")
    assert cleanup.main(["--timeout", "20"]) == 0


def test_refusal_is_no_success(
    control_plane: ControlPlane, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = yaml.safe_load(Path(control_plane.kubeconfig).read_text())
    content["users"][0]["user"] = {"token": "wrong"}
    wrong = tmp_path / "kubeconfig"
    wrong.write_text(yaml.safe_dump(content))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(wrong))
    monkeypatch.setenv("HAT_OPERATOR_NAMESPACES", namespace)
    assert cleanup.main(["--timeout", "5"]) == 1


def test_wrong_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HAT_OPERATOR_LOG_FORMAT", "yaml")
    assert cleanup.main([]) == 2
    assert "'yaml'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cleanup.main(["--timeout", "0"])
