from __future__ import annotations

from typing import Any

import pytest

from hat_operator.fields import SpecError
from hat_operator.spec import HatDeployment
from hat_runtime.cli.main import build_parser
from tests.unit.operator.samples import HUB, by_name, desired, fetching, hat, main, of_kind, one, option, pod


def deployment(wanted: HatDeployment) -> dict[str, Any]:
    return one(desired(wanted).cloud, "Deployment")


def test_command_line_is_one_that_hat_understands() -> None:
    wanted = hat(
        model={"source": HUB, "dtype": "float32"},
        split={"inputLayers": 5},
        cloud={"maxSessions": 7, "resumeTtlSeconds": 5},
        observability={"logLevel": "debug"},
    )
    container = main(deployment(wanted))
    assert container["command"] == ["hat"]
    args = build_parser().parse_args(container["args"])
    assert (args.model, args.input_layers, args.dtype, args.max_sessions) == ("/model/part", 5, "float32", 7)
    assert args.resume_ttl == 5
    assert (
        "--resume-ttl" not in main(deployment(hat()))["args"]
    )  # no pod restarts for a field that nobody set
    assert (args.listen, args.http_listen, args.device) == ("0.0.0.0:7070", "0.0.0.0:7071", "cpu")
    assert (args.log_format, args.log_level) == ("json", "debug")


def test_a_policy_of_chunk_sizes_to_start_with_may_be_missing() -> None:
    thing = deployment(hat())
    args = build_parser().parse_args(main(thing)["args"])
    (volume,) = [volume for volume in pod(thing)["volumes"] if volume["name"] == "policy"]
    assert volume["configMap"] == {"name": "chat-cloud-policy", "optional": True}
    (mount,) = [mount for mount in main(thing)["volumeMounts"] if mount["name"] == volume["name"]]
    assert args.policy_file == f"{mount['mountPath']}/policy.json"
    assert mount["readOnly"]
    made = one(desired(hat(), policy="{}").cloud, "ConfigMap")
    assert (made["metadata"]["name"], made["data"]) == ("chat-cloud-policy", {"policy.json": "{}"})
    # What it holds is no part of the pods: another policy restarts none.
    assert one(desired(hat(), policy='{"version":1}').cloud, "Deployment") == thing


@pytest.mark.parametrize("spec", [{"chunking": {"mode": "fixed"}}, {"mode": "picospec", "split": None}])
def test_without_a_choice_of_chunk_sizes_there_is_no_policy(spec: dict[str, Any]) -> None:
    wanted = hat(**spec, model={"source": {"hub": "default"}})
    assert "--policy-file" not in main(deployment(wanted))["args"]
    assert [volume for volume in pod(deployment(wanted))["volumes"] if volume["name"] == "policy"] == []


@pytest.mark.parametrize(
    ("source", "revision", "asked"),
    [("org/model", "", "org/model"), ("org/model", "v2", "org/model@v2"), ("default", "", "default")],
)
def test_a_model_of_a_hub_is_prepared_by_an_init_container(source: str, revision: str, asked: str) -> None:
    wanted = hat(model={"source": {"hub": source}, "revision": revision}, split={"inputLayers": 5})
    thing = deployment(wanted)
    (init,) = fetching(thing)
    args = build_parser().parse_args(init["args"])
    assert (args.source, args.part, args.input_layers, str(args.out)) == (asked, "cloud", 5, "/model/part")
    assert init["image"] == main(thing)["image"]
    assert {"name": "model", "emptyDir": {}} in pod(thing)["volumes"]


def test_default_model_takes_no_revision() -> None:
    wanted = hat(model={"source": {"hub": "default"}, "revision": "v2"})
    (init,) = fetching(deployment(wanted))
    assert build_parser().parse_args(init["args"]).source == "default"


def test_token_reaches_only_the_init_container() -> None:
    wanted = hat(model={"source": HUB, "tokenSecretRef": {"name": "hub", "key": "my.token"}})
    thing = deployment(wanted)
    (init,) = fetching(thing)
    (volume,) = [volume for volume in pod(thing)["volumes"] if "secret" in volume]
    (mount,) = [mount for mount in init["volumeMounts"] if mount["name"] == volume["name"]]
    assert volume["secret"]["secretName"] == "hub"
    assert volume["secret"]["items"] == [{"key": "my.token", "path": "token"}]
    assert {"name": "HF_TOKEN_PATH", "value": f"{mount['mountPath']}/token"} in init["env"]
    assert volume["name"] not in [mount["name"] for mount in main(thing)["volumeMounts"]]


@pytest.mark.parametrize(("path", "folder"), [(".", "/model"), ("a/b/", "/model/a/b")])
def test_a_claim_is_mounted_read_only_and_nothing_is_fetched(path: str, folder: str) -> None:
    claim = {"claim": {"name": "weights", "path": path}}
    thing = deployment(hat(edge={"weights": {"claim": {"name": "w"}}}, model={"source": claim}))
    assert fetching(thing) == []
    assert option(main(thing), "--model") == folder
    (volume,) = [volume for volume in pod(thing)["volumes"] if "persistentVolumeClaim" in volume]
    assert volume["persistentVolumeClaim"] == {"claimName": "weights", "readOnly": True}
    assert {"name": volume["name"], "mountPath": "/model", "readOnly": True} in main(thing)["volumeMounts"]


def test_a_confidential_runtime_class_is_the_cloud_pods_alone() -> None:
    kata = "kata-qemu-nvidia-gpu-snp"
    assert pod(deployment(hat(cloud={"runtimeClassName": kata})))["runtimeClassName"] == kata
    assert "runtimeClassName" not in pod(deployment(hat(edge={"runtimeClassName": "nvidia"})))


def test_gpu() -> None:
    thing = deployment(hat(cloud={"accelerator": {"type": "nvidia.com/gpu", "count": 1}}))
    assert option(main(thing), "--device") == "cuda"
    for kind in ("requests", "limits"):
        assert main(thing)["resources"][kind]["nvidia.com/gpu"] == "1"
        assert "nvidia.com/gpu" not in fetching(thing)[0]["resources"][kind]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod(thing)[
        "tolerations"
    ]


@pytest.mark.parametrize(
    ("written", "requests", "limits"),
    [
        ({}, {"cpu": "500m", "memory": "3Gi"}, {"memory": "3Gi"}),
        (
            {"requests": {"memory": "2048Mi", "cpu": 2}},
            {"cpu": "2", "memory": "2Gi"},
            {"memory": "2Gi"},
        ),
        (
            {"limits": {"cpu": "0.25", "memory": "1Gi"}},
            {"cpu": "250m", "memory": "1Gi"},
            {"cpu": "250m", "memory": "1Gi"},
        ),
        (
            {"requests": {"memory": "1Gi", "ephemeral-storage": "1Gi"}, "limits": {"memory": "4Gi"}},
            {"cpu": "500m", "memory": "1Gi", "ephemeral-storage": "1Gi"},
            {"memory": "4Gi"},
        ),
    ],
)
def test_resources(written: dict[str, Any], requests: dict[str, str], limits: dict[str, str]) -> None:
    found = main(deployment(hat(cloud={"resources": written})))["resources"]
    assert found == {"requests": requests, "limits": limits}


def test_what_is_no_quantity_is_named() -> None:
    with pytest.raises(SpecError, match=r"spec\.cloud\.resources\.limits\.memory: '99999999Ei'"):
        desired(hat(cloud={"resources": {"limits": {"memory": "99999999Ei"}}}))


def test_image_by_version_registry_or_in_full() -> None:
    assert main(deployment(hat()))["image"] == "hat-cloud:1.2.3"
    assert main(deployment(hat(runtime={"version": "2"})))["image"] == "hat-cloud:2"
    assert main(deployment(hat(cloud={"image": "mine@sha256:1"})))["image"] == "mine@sha256:1"


def test_template_replicas_and_pull_secrets() -> None:
    template = {
        "nodeSelector": {"pool": "gpu"},
        "tolerations": [{"key": "x", "operator": "Exists"}],
        "labels": {"team": "a"},
        "annotations": {"note": "b"},
        "priorityClassName": "high",
    }
    thing = deployment(
        hat(cloud={"template": template, "replicas": 4}, imagePullSecrets=[{"name": "registry"}])
    )
    assert thing["spec"]["replicas"] == 4
    assert pod(thing)["nodeSelector"] == {"pool": "gpu"}
    assert pod(thing)["tolerations"] == [{"key": "x", "operator": "Exists"}]
    assert pod(thing)["priorityClassName"] == "high"
    assert pod(thing)["imagePullSecrets"] == [{"name": "registry"}]
    marks = thing["spec"]["template"]["metadata"]
    assert marks["labels"]["team"] == "a"
    assert marks["annotations"] == {"note": "b"}


def test_service_selects_one_revision_and_its_pods_have_that_label() -> None:
    objects = desired(hat(cloud={"expose": {"type": "LoadBalancer", "port": 443}})).cloud
    shared, own = of_kind(objects, "Service")
    thing = one(objects, "Deployment")
    labels = thing["spec"]["template"]["metadata"]["labels"]
    assert (shared["spec"]["type"], own["spec"]["type"]) == ("LoadBalancer", "ClusterIP")
    for service in (shared, own):
        (port,) = service["spec"]["ports"]
        assert (port["port"], "nodePort" in port) == (443, False)
        (named,) = [p for p in main(thing)["ports"] if p["name"] == port["targetPort"]]
        assert named["containerPort"] == 7070
        assert service["spec"]["selector"].items() <= labels.items()
        assert "hat.dev/revision" in service["spec"]["selector"]
    assert thing["spec"]["selector"]["matchLabels"].items() <= labels.items()
    budget = one(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"]
    assert budget.items() <= labels.items()
    assert "hat.dev/revision" not in budget


def test_node_port() -> None:
    expose = {"type": "NodePort", "host": "10.0.0.5", "nodePort": 30070}
    (port,) = one(desired(hat(cloud={"expose": expose})).cloud, "Service")["spec"]["ports"]
    assert (port["port"], port["nodePort"]) == (7070, 30070)


def test_probes_ask_the_admin_port() -> None:
    container = main(deployment(hat()))
    (http,) = [port for port in container["ports"] if port["name"] == "http"]
    assert http["containerPort"] == 7071
    for probe, path in (("startup", "/readyz"), ("readiness", "/readyz"), ("liveness", "/healthz")):
        assert container[f"{probe}Probe"]["httpGet"] == {"path": path, "port": "http"}


def ports(rules: list[dict[str, Any]], inside_only: bool = False) -> set[int]:
    return {port["port"] for rule in rules if ("from" in rule) == inside_only for port in rule["ports"]}


def test_network_policy_lets_through_what_is_needed() -> None:
    policy = one(desired(hat()).cloud, "NetworkPolicy")["spec"]
    assert ports(policy["ingress"]) == {7070}
    assert ports(policy["ingress"], inside_only=True) == {7071, 7072}
    assert ports(policy["egress"]) == {53, 443, 6443}
    claimed = hat(edge={"weights": {"claim": {"name": "w"}}}, model={"source": {"claim": {"name": "c"}}})
    assert ports(one(desired(claimed).cloud, "NetworkPolicy")["spec"]["egress"]) == {53, 443, 6443}


def test_no_network_policies_on_request() -> None:
    found = desired(hat(security={"networkPolicies": False}))
    assert not [name for name in by_name(found.cloud + found.edge) if name[0] == "NetworkPolicy"]
