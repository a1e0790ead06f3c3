from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest

from hat_runtime.cli.main import build_parser
from hat_runtime.cli.options import parse_uplink_codec
from hat_runtime.wire.codec_choice import CodecChoice
from tests.unit.operator.restricted import violations
from tests.unit.operator.samples import (
    REMOTE,
    SCHEMA,
    desired,
    fetching,
    hat,
    main,
    of_kind,
    one,
    option,
    pod,
)
from tests.unit.operator.test_cloud import ports


def daemonset(edge: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    return one(desired(hat(edge=edge, **spec)).edge, "DaemonSet")


def test_command_line_is_one_that_hat_understands() -> None:
    keys = {"modelName": "gpt", "keySecretRef": {"name": "keys", "key": "k.txt"}}
    thing = daemonset(
        {"api": keys}, chunking={"mode": "fixed", "tokens": 64}, cloud={"expose": {"host": "h", "port": 9}}
    )
    args = build_parser().parse_args(main(thing)["args"])
    assert (str(args.model), args.cloud, args.listen) == ("/model/part", "h:9", "0.0.0.0:8000")
    assert (args.chunk_tokens, args.dtype, args.device) == ("64", "bfloat16", "cpu")
    assert (args.model_name, str(args.api_key_file)) == ("gpt", "/keys/k.txt")
    (volume,) = [volume for volume in pod(thing)["volumes"] if "secret" in volume]
    assert volume["secret"]["secretName"] == "keys"
    assert volume["name"] in [mount["name"] for mount in main(thing)["volumeMounts"]]


def served_with(**spec: Any) -> argparse.Namespace:
    """What `hat device serve` makes of a device's arguments."""
    found: argparse.Namespace = build_parser().parse_args(main(daemonset(**spec))["args"])
    return found


def drafting(args: argparse.Namespace) -> Any:
    """The device's settings. Imported late: they bring torch."""
    from hat_runtime.cli.drafting_options import drafting_config

    return drafting_config(args)


def defaults() -> argparse.Namespace:
    """What `hat device serve` does where it is told nothing."""
    found: argparse.Namespace = build_parser().parse_args(
        ["device", "serve", "--model", "m", "--cloud", "h:1"]
    )
    return found


def test_drafting_where_nothing_is_written() -> None:
    args = served_with()
    assert args.drafter == defaults().drafter == "auto"
    assert drafting(args) == drafting(defaults())
    assert args.stop_threshold == args.window == args.alternatives == "auto"
    given = parse_uplink_codec(args.uplink_codec)
    assert given == parse_uplink_codec(defaults().uplink_codec)
    # In full, so that the CRD's defaults hold with an image that has others.
    assert {"--drafter", "--max-draft", "--branches", "--sampler", "--uplink-codec"} <= {
        *main(daemonset())["args"]
    }


@pytest.mark.parametrize(
    ("field", "value", "changed"),
    [
        ("maxDraft", 3, {"max_draft": 3}),
        ("stopThreshold", 0.25, {"stop_threshold": 0.25}),
        ("stopThreshold", 0, {"stop_threshold": 0.0}),
        ("stopThreshold", 1, {"stop_threshold": 1.0}),
        ("window", 2, {"window": 2}),
        ("branches", 8, {"branches": 8}),
        ("alternatives", 0, {"alternatives": 0}),
        ("sampler", "rejection", {"sampler": "rejection"}),
    ],
)
def test_drafting_as_written(field: str, value: Any, changed: dict[str, Any]) -> None:
    wanted = dataclasses.replace(drafting(defaults()), **changed)
    assert drafting(served_with(speculation={field: value})) == wanted


@pytest.mark.parametrize(
    ("chunking", "wanted"),
    [
        ({}, (None, "predictive", 64, 512)),
        ({"mode": "auto"}, (None, "predictive", 64, 512)),
        ({"mode": "balance", "minTokens": 16, "maxTokens": 99}, (None, "balance", 16, 99)),
        ({"mode": "fixed"}, (128, "predictive", 64, 512)),
        ({"mode": "fixed", "tokens": 0}, (0, "predictive", 64, 512)),
    ],
)
def test_chunks_as_written(chunking: dict[str, Any], wanted: tuple[int | None, str, int, int]) -> None:
    from hat_runtime.cli.chunking_options import chunking_config

    found = chunking_config(served_with(chunking=chunking))
    assert (found.tokens, found.policy, found.bounds.least, found.bounds.most) == wanted


def names_of(field: str) -> set[str]:
    """The values of a field of spec.speculation, in whichever mode."""
    return set(SCHEMA["properties"]["spec"]["properties"]["speculation"]["properties"][field]["enum"])


@pytest.mark.parametrize("field", ["drafter", "sampler"])
def test_the_runtime_knows_every_name_that_the_field_takes(field: str) -> None:
    for name in names_of(field) - {"thinning", "topk"}:  # these two are mode picospec's
        args = served_with(speculation={field: name})
        drafting(args)
        assert getattr(args, field) == name


@pytest.mark.parametrize(
    ("wire", "prompt", "decode"),
    [
        ({}, "raw", "raw"),
        ({"uplink": "int4"}, "int4", "raw"),
        ({"uplink": "int8", "uplinkDecode": "bf16"}, "int8", "bf16"),
        ({"uplinkDecode": "int8"}, "raw", "int8"),
    ],
    ids=str,
)
def test_codecs(wire: dict[str, str], prompt: str, decode: str) -> None:
    assert parse_uplink_codec(served_with(wire=wire).uplink_codec) == CodecChoice(prompt, decode)


@pytest.mark.parametrize("pad", [False, True])
def test_pad_frames(pad: bool) -> None:
    assert served_with(wire={"padFrames": pad}).pad_frames is pad


def test_names_where_nothing_is_written() -> None:
    thing = daemonset()
    assert thing["metadata"]["name"] == "chat-edge-cpu"
    assert option(main(thing), "--model-name") == "chat"
    assert "--api-key-file" not in main(thing)["args"]
    assert main(thing)["image"] == "hat-edge:1.2.3"
    assert pod(thing)["nodeSelector"] == {"hat.dev/device": "true"}


def test_each_device_fetches_its_part() -> None:
    (init,) = fetching(daemonset())
    args = build_parser().parse_args(init["args"])
    assert (args.source, args.part, args.input_layers) == ("org/model", "device", 3)


def test_weights_from_a_claim() -> None:
    thing = daemonset({"weights": {"claim": {"name": "w", "path": "m"}}})
    assert fetching(thing) == []
    assert option(main(thing), "--model") == "/model/m"


def test_one_daemonset_for_each_image() -> None:
    images = [
        {"name": "orin", "l4t": "r36.4"},
        {"name": "nano", "l4t": "r32.7", "image": "mine:1"},
        {"name": "pi"},
        {"name": "nuc", "arch": "amd64"},
    ]
    found = of_kind(desired(hat(edge={"images": images})).edge, "DaemonSet")
    by_name = {thing["metadata"]["name"]: thing for thing in found}
    assert sorted(by_name) == ["chat-edge-nano", "chat-edge-nuc", "chat-edge-orin", "chat-edge-pi"]
    assert pod(by_name["chat-edge-orin"])["nodeSelector"] == {
        "hat.dev/device": "true",
        "kubernetes.io/arch": "arm64",
        "hat.dev/l4t": "r36.4",
    }
    assert main(by_name["chat-edge-orin"])["image"] == "hat-edge:1.2.3-l4t-r36.4"
    assert main(by_name["chat-edge-nano"])["image"] == "mine:1"
    assert main(by_name["chat-edge-pi"])["image"] == "hat-edge:1.2.3"
    assert pod(by_name["chat-edge-nuc"])["nodeSelector"]["kubernetes.io/arch"] == "amd64"
    selectors = [tuple(sorted(thing["spec"]["selector"]["matchLabels"].items())) for thing in found]
    assert len(set(selectors)) == 4
    for thing in found:
        labels = thing["spec"]["template"]["metadata"]["labels"]
        assert thing["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_no_jetson_gets_two_pods() -> None:
    images = [{"name": "orin", "l4t": "r36.4"}, {"name": "pi"}, {"name": "nuc", "arch": "amd64"}]
    orin, pi, nuc = of_kind(desired(hat(edge={"images": images})).edge, "DaemonSet")
    required = pod(pi)["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = required["nodeSelectorTerms"]
    assert term["matchExpressions"] == [{"key": "hat.dev/l4t", "operator": "DoesNotExist"}]
    assert "affinity" not in pod(orin)
    assert "affinity" not in pod(nuc)


def test_pods_wait_for_a_device_that_is_away() -> None:
    thing = daemonset({"template": {"tolerations": [{"key": "x", "operator": "Exists"}]}})
    assert pod(thing)["tolerations"] == [
        {"operator": "Exists", "effect": "NoExecute"},
        {"key": "x", "operator": "Exists"},
    ]
    assert thing["spec"]["updateStrategy"]["rollingUpdate"] == {"maxUnavailable": "10%"}
    with_one_off = one(desired(hat(), unavailable={"chat-edge-cpu": 2}).edge, "DaemonSet")
    assert with_one_off["spec"]["updateStrategy"]["rollingUpdate"] == {"maxUnavailable": 2}
    assert with_one_off["spec"]["template"] == daemonset()["spec"]["template"]


@pytest.mark.parametrize(
    ("kind", "device", "plugin", "visible"),
    [("none", "cpu", False, False), ("cuda", "cuda", False, True), ("nvidia.com/gpu", "cuda", True, False)],
)
def test_accelerator(kind: str, device: str, plugin: bool, visible: bool) -> None:
    images = [{"name": "orin", "l4t": "r36.4"}]
    thing = daemonset({"accelerator": {"type": kind}, "runtimeClassName": "nvidia", "images": images})
    assert option(main(thing), "--device") == device
    assert ("nvidia.com/gpu" in main(thing)["resources"]["limits"]) == plugin
    assert ("NVIDIA_VISIBLE_DEVICES" in [item["name"] for item in main(thing)["env"]]) == visible
    assert ("supplementalGroups" in pod(thing)["securityContext"]) == visible
    assert pod(thing)["runtimeClassName"] == "nvidia"


def test_the_cloud_lists_a_device_by_the_name_of_its_row() -> None:
    name = {"fieldRef": {"apiVersion": "v1", "fieldPath": "spec.nodeName"}}
    assert {"name": "HAT_DEVICE_NAME", "valueFrom": name} in main(daemonset({}))["env"]


def test_template_and_resources() -> None:
    template = {"nodeSelector": {"a": "b"}, "labels": {"t": "1"}, "annotations": {"n": "2"}}
    wanted = {"template": {**template, "priorityClassName": "p"}, "resources": {"limits": {"memory": "1Gi"}}}
    thing = daemonset(wanted)
    assert pod(thing)["nodeSelector"] == {"a": "b", "hat.dev/device": "true"}
    assert pod(thing)["priorityClassName"] == "p"
    assert main(thing)["resources"]["requests"]["memory"] == "1Gi"
    marks = thing["spec"]["template"]["metadata"]
    assert (marks["labels"]["t"], marks["annotations"]) == ("1", {"n": "2"})


def test_host_port_is_opt_in_and_breaks_the_standard() -> None:
    thing = daemonset({"api": {"hostPort": 8000}})
    assert main(thing)["ports"][0]["hostPort"] == 8000
    assert violations(pod(thing)) == ["device: hostPort"]


def test_service_leads_to_the_callers_own_node() -> None:
    found = desired(hat(edge={"api": {"port": 80}})).edge
    service, thing = one(found, "Service"), one(found, "DaemonSet")
    assert service["spec"]["internalTrafficPolicy"] == "Local"
    assert service["spec"]["ports"][0]["port"] == 80
    assert main(thing)["ports"] == [{"name": "http", "containerPort": 8000, "protocol": "TCP"}]
    assert service["spec"]["selector"].items() <= thing["spec"]["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize(
    ("edge", "cloud", "out"),
    [
        ({}, {}, {53, 443, 6443, 7070}),
        ({}, {"expose": {"port": 9000}}, {53, 443, 6443, 7070, 9000}),
        ({"weights": {"claim": {"name": "w"}}}, {}, {53, 443, 6443, 7070}),
        ({"clusterRef": REMOTE}, {"expose": {"host": "h", "port": 9000}}, {53, 443, 6443, 9000}),
    ],
    ids=str,
)
def test_network_policy(edge: dict[str, Any], cloud: dict[str, Any], out: set[int]) -> None:
    policy = one(desired(hat(edge=edge, cloud=cloud)).edge, "NetworkPolicy")["spec"]
    assert ports(policy["ingress"]) == {8000}
    assert ports(policy["egress"]) == out


def test_another_cluster_gets_its_namespace_and_no_owner() -> None:
    far = hat(edge={"clusterRef": REMOTE}, cloud={"expose": {"host": "h"}})
    found = desired(far)
    assert {thing["metadata"]["namespace"] for thing in found.edge} == {"far"}
    assert not [thing for thing in found.edge if "ownerReferences" in thing["metadata"]]
    near = desired(hat())
    assert {thing["metadata"]["namespace"] for thing in near.edge} == {"team"}
    for thing in [*near.cloud, *near.edge, *found.cloud]:
        (owner,) = thing["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["name"], owner["uid"]) == ("HatDeployment", "chat", "u-1")
