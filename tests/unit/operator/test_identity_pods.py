"""How certificates come into the pods of both sides, and what is different without them."""

from __future__ import annotations

from typing import Any

import pytest

from hat_operator import names
from hat_operator.settings import Settings
from hat_operator.spec import HatDeployment
from hat_runtime.cli.main import build_parser
from hat_runtime.errors import UsageError
from hat_runtime.security.spiffe import SpiffeId
from tests.unit.operator.samples import REMOTE, SETTINGS, desired, hat, main, of_kind, one, pod

TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"
KEYS = {"api": {"keySecretRef": {"name": "keys"}}}


def both(wanted: HatDeployment) -> list[dict[str, Any]]:
    found = desired(wanted, cloud_endpoint="lb:7070")
    return [one(found.cloud, "Deployment"), one(found.edge, "DaemonSet")]


def sidecar(thing: dict[str, Any]) -> dict[str, Any]:
    (found,) = [item for item in pod(thing)["initContainers"] if item["name"] == "identity"]
    assert isinstance(found, dict)
    return found


def environment(container: dict[str, Any]) -> dict[str, Any]:
    return {item["name"]: item.get("value", item.get("valueFrom")) for item in container["env"]}


@pytest.mark.parametrize("index", [0, 1], ids=["cloud", "device"])
def test_the_sidecar_asks_first_and_the_others_wait_for_it(index: int) -> None:
    thing = both(hat())[index]
    assert pod(thing)["initContainers"][0]["name"] == "identity"
    found = sidecar(thing)
    assert found["restartPolicy"] == "Always"
    assert found["startupProbe"]["exec"]["command"] == ["test", "-f", "/tls/tls.crt"]
    assert found["image"] == main(thing)["image"]
    args = build_parser().parse_args([item.replace("$(HAT_NODE_NAME)", "node-1") for item in found["args"]])
    identity = SpiffeId.parse(args.id)
    kind, name = [("cloud", "chat"), ("device", "node-1")][index]
    assert (identity.trust_domain, identity.tenant, identity.kind, identity.name) == (
        "hat.internal",
        "team",
        kind,
        name,
    )
    labels = dict(label.split("=") for label in args.label)
    assert labels.items() >= {"hat.dev/namespace": "team", "hat.dev/deployment": "chat"}.items()
    assert environment(found)["HAT_NODE_NAME"]["fieldRef"]["fieldPath"] == "spec.nodeName"


def test_the_tenant_of_a_site_is_the_hatdeployments_namespace() -> None:
    far = hat(edge={"clusterRef": REMOTE}, cloud={"expose": {"host": "h"}})
    assert "spiffe://hat.internal/tenant/team/device/$(HAT_NODE_NAME)" in sidecar(both(far)[1])["args"]


@pytest.mark.parametrize("index", [0, 1], ids=["cloud", "device"])
def test_the_key_stays_in_memory_and_the_token_with_the_sidecar(index: int) -> None:
    thing = both(hat())[index]
    volumes = {volume["name"]: volume for volume in pod(thing)["volumes"]}
    assert volumes["tls"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Mi"}
    containers = [*pod(thing)["initContainers"], *pod(thing)["containers"]]
    with_token = [
        item["name"]
        for item in containers
        if any(mount["mountPath"] == TOKEN for mount in item["volumeMounts"])
    ]
    assert with_token == ["identity"]
    assert pod(thing)["automountServiceAccountToken"] is False
    (mount,) = [mount for mount in main(thing)["volumeMounts"] if mount["name"] == "tls"]
    assert mount == {"name": "tls", "mountPath": "/tls", "readOnly": True}
    assert build_parser().parse_args(main(thing)["args"]).tls.as_posix() == "/tls"


def test_the_cloud_has_its_admin_port_and_its_deny_list() -> None:
    thing = both(hat())[0]
    args = build_parser().parse_args(main(thing)["args"])
    assert (args.admin_listen, args.denied_file.as_posix()) == ("0.0.0.0:7072", "/denied/denied.json")
    assert {port["name"]: port["containerPort"] for port in main(thing)["ports"]} == {
        "grpc": 7070,
        "http": 7071,
        "admin": 7072,
    }
    (volume,) = [volume for volume in pod(thing)["volumes"] if volume["name"] == "denied"]
    assert volume["configMap"]["name"] == "chat-cloud-denied"
    assert "optional" not in volume["configMap"]  # without the list everybody would be let in
    data = {"denied.json": "{}", "fleet.json": "{}"}
    before, after = desired(hat()), desired(hat(), denied=data)
    made = [
        item for item in of_kind(after.cloud, "ConfigMap") if item["metadata"]["name"] == "chat-cloud-denied"
    ]
    assert [item["data"] for item in made] == [data]
    kinds = [item["kind"] for item in after.cloud]
    assert kinds.index("ConfigMap") < kinds.index("Deployment")
    assert one(before.cloud, "Deployment") == one(after.cloud, "Deployment")


def test_without_certificates_pods_are_as_before_but_for_a_variable_that_older_images_ignore() -> None:
    for thing in both(hat(security={"tls": "off"})):
        assert [item["name"] for item in pod(thing)["initContainers"]] == ["prepare"]
        args = main(thing)["args"]
        assert not {"--tls", "--insecure", "--admin-listen", "--denied-file"} & set(args)
        assert environment(main(thing))["HAT_INSECURE"] == "1"
        assert {volume["name"] for volume in pod(thing)["volumes"]} <= {"model", "policy", "tmp"}


@pytest.mark.parametrize(
    ("tls", "edge", "open_"),
    [
        ("mutual", {}, (False, True)),
        ("mutual", KEYS, (False, False)),
        ("off", KEYS, (True, True)),
    ],
)
def test_who_may_listen_to_everybody(tls: str, edge: dict[str, Any], open_: tuple[bool, bool]) -> None:
    """A device's API without keys, and whatever has no certificates."""
    found = both(hat(edge=edge, security={"tls": tls}))
    assert tuple("HAT_INSECURE" in environment(main(thing)) for thing in found) == open_


def test_a_change_of_tls_is_blue_green_and_one_of_the_rest_is_none() -> None:
    plain = names.revision(hat(security={"tls": "off"}), SETTINGS)
    mutual = names.revision(hat(security={"tls": "mutual"}), SETTINGS)
    assert plain != mutual
    others = {"tls": "mutual", "certificateHours": 2, "deniedDevices": ["a"]}
    assert names.revision(hat(security=others), SETTINGS) == mutual
    assert both(hat(security=others)) == both(hat(security={"tls": "mutual"}))
    assert names.revision(hat(), Settings(version="1.2.3", trust_domain="other.example")) != mutual


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("IDENTITIES", "yes", "'yes' is neither true nor false"),
        ("TRUST_DOMAIN", "Example.com", "'Example.com'"),
        ("CERTIFICATE_SECONDS", "86401", "'86401' is not a whole number from 30 to 86400"),
        ("CERTIFICATE_SECONDS", "1.5", "'1.5' is not a whole number"),
        ("API_PORTS", "443,x", "'x' is not a port"),
        ("API_CIDRS", "10.0.0.0/8,home", "'home' is no range of addresses"),
    ],
)
def test_wrong_settings_are_named(name: str, value: str, words: str) -> None:
    with pytest.raises(UsageError, match=f"HAT_OPERATOR_{name}: .*{words}"):
        Settings.from_environment({f"HAT_OPERATOR_{name}": value})


def test_settings_are_read() -> None:
    found = Settings.from_environment(
        {
            "HAT_OPERATOR_IDENTITIES": "false",
            "HAT_OPERATOR_TRUST_DOMAIN": "a.example",
            "HAT_OPERATOR_CERTIFICATE_SECONDS": "60",
            "HAT_OPERATOR_API_PORTS": "443, 16443",
            "HAT_OPERATOR_API_CIDRS": "10.0.0.0/8,192.0.2.10/24, 2001:db8::1/64",
        }
    )
    assert (found.identities, found.trust_domain, found.certificate_s) == (False, "a.example", 60)
    assert found.api_ports == (443, 16443)
    assert found.api_cidrs == ("10.0.0.0/8", "192.0.2.0/24", "2001:db8::/64")
