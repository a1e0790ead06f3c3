from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hat_operator.rules import RULES
from hat_operator.schema import apply_defaults, load_crd, load_schema, problems
from tests.unit.operator.samples import SCHEMA, body

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = sorted(
    path for path in (ROOT / "examples").glob("*.yaml") if "\nkind: HatDeployment\n" in path.read_text()
)


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for key, below in schema.get("properties", {}).items():
        yield from nodes(below, f"{path}.{key}")
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield from nodes(schema[key], f"{path}[{key}]")


def test_every_field_is_described() -> None:
    undescribed = {path for path, node in nodes(SCHEMA) if len(node.get("description", "")) < 5}
    assert undescribed <= {".metadata"}  # Kubernetes' own
    assert len(list(nodes(SCHEMA))) > 100


def unbounded(node: dict[str, Any]) -> list[str]:
    """What keeps a field from being bounded."""
    if node.get("x-kubernetes-int-or-string"):
        return [word for word in ("minimum", "maxLength", "pattern") if word not in node]
    match node["type"]:
        case "string":
            return (
                []
                if {"maxLength", "enum"} & node.keys() or node.get("format") == "date-time"
                else ["maxLength"]
            )
        case "array":
            return [] if "maxItems" in node else ["maxItems"]
        case "integer":
            return [word for word in ("minimum", "maximum") if word not in node]
        case "number":
            return [] if "minimum" in node else ["minimum"]
        case "object":
            free = "properties" not in node and "maxProperties" not in node
            return ["maxProperties"] if free else []
        case kind:
            return [] if kind == "boolean" else [kind]


def test_every_field_is_bounded() -> None:
    """So that no HatDeployment asks for a billion of anything, or fills etcd."""
    found = {path: missing for path, node in nodes(SCHEMA) if (missing := unbounded(node))}
    assert found.keys() <= {".apiVersion", ".kind", ".metadata"}  # Kubernetes' own


def test_what_goes_into_commands_can_neither_be_an_option_nor_be_expanded() -> None:
    """Strings of the spec become arguments, and Kubernetes replaces $(NAME) in those."""
    for path in ("edge.api.modelName", "model.revision", "model.source.hub", "cloud.expose.host"):
        for value in ("$(HOME)", "--listen=0.0.0.0:1", "a $(HOME)", "a\nb"):
            wrong = body(edge={"deviceSelector": {"matchLabels": {"a": "b"}}})
            change(wrong["spec"], path, value)
            assert [line for line in problems(SCHEMA, wrong) if line.startswith(f"spec.{path}: ")], (
                path,
                value,
            )


def test_every_rule_that_needs_no_older_object_is_checked_without_an_api_server() -> None:
    rules = {rule["rule"] for _, node in nodes(SCHEMA) for rule in node.get("x-kubernetes-validations", ())}
    assert {rule for rule in rules if "oldSelf" not in rule} == set(RULES)


def test_crd_names_its_api() -> None:
    crd = load_crd()
    assert crd["metadata"]["name"] == f"{crd['spec']['names']['plural']}.{crd['spec']['group']}"
    assert load_schema()["type"] == "object"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_valid(example: Path) -> None:
    assert problems(SCHEMA, apply_defaults(SCHEMA, yaml.safe_load(example.read_text()))) == []


def test_defaults_reach_through_absent_objects_and_lists() -> None:
    spec = body(edge={"images": [{"name": "orin"}]})["spec"]
    assert spec["cloud"]["expose"] == {"type": "ClusterIP", "host": "", "port": 7070, "nodePort": 0}
    assert spec["edge"]["images"] == [{"name": "orin", "l4t": "", "arch": "arm64", "image": ""}]
    assert "clusterRef" not in spec["edge"]


def test_defaults_leave_the_written_object_alone_and_do_not_share() -> None:
    written = {"spec": {"model": {"source": {"hub": "a/b"}}, "split": {"inputLayers": 1}, "cloud": None}}
    before = copy.deepcopy(written)
    first, second = apply_defaults(SCHEMA, written), apply_defaults(SCHEMA, written)
    first["spec"]["cloud"]["replicas"] = 9
    assert written == before
    assert second["spec"]["cloud"]["replicas"] == 1
    assert apply_defaults(SCHEMA, second) == second


def change(found: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        found = found.setdefault(key, {})
    found[last] = value


CLUSTER = {"kubeconfigSecretRef": {"name": "k"}}
PICOSPEC: dict[str, Any] = {"mode": "picospec", "split": None, "model": {"source": {"hub": "default"}}}


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("split.inputLayers", 0, "spec.split.inputLayers: 0: must be at least 1"),
        ("split.inputLayers", "3", 'spec.split.inputLayers: "3": must be of type integer'),
        ("split.inputLayers", True, "spec.split.inputLayers: true: must be of type integer"),
        ("split.inputLayers", None, "spec.split.inputLayers: null: is required"),
        ("cloud.replicas", 1001, "spec.cloud.replicas: 1001: must be at most 1000"),
        ("cloud.replica", 2, "spec.cloud.replica: 2: unknown field"),
        ("model.dtype", "fp8", 'spec.model.dtype: "fp8": must be one of bfloat16, float32'),
        ("model.source.hub", "no slash", 'spec.model.source.hub: "no slash": must match'),
        ("security.tls", False, "spec.security.tls: false: must be of type string; quote it"),
        ("security.tls", "on", 'spec.security.tls: "on"'),
        ("security.certificateHours", 25, "must be at most 24"),
        ("split", None, "split: required in mode hat; write split.inputLayers"),
        ("cloud.tensorParallel", 2, "spec.cloud.tensorParallel: 2: cloud.tensorParallel: more than one GPU"),
        ("cloud.accelerator.count", 1, "count is 0 for type none"),
        ("cloud.accelerator.type", "nvidia.com/gpu", "at least 1 for nvidia.com/gpu"),
        ("cloud.resources", {"requests": {"nvidia.com/gpu": 1}}, "GPUs are written in accelerator"),
        (
            "cloud.resources",
            {"limits": {"cpu": [1]}},
            "spec.cloud.resources.limits.cpu: [1]: must be an integer",
        ),
        (
            "cloud.resources",
            {"limits": {"cpu": -1}},
            "spec.cloud.resources.limits.cpu: -1: must be at least 0",
        ),
        (
            "cloud.resources",
            {"limits": {"cpu": "lots"}},
            'spec.cloud.resources.limits.cpu: "lots": must match',
        ),
        ("edge.api", {"modelName": "$(HAT_DEVICE_NAME)"}, "spec.edge.api.modelName"),
        ("edge.weights", {"claim": {"name": "w", "path": "a/$(HOME)"}}, "spec.edge.weights.claim.path"),
        ("cloud.expose.type", "NodePort", "a NodePort needs the address"),
        ("cloud.expose.nodePort", 30000, "goes with type: NodePort only"),
        ("cloud.template.labels", {"hat.dev/x": "1"}, "belong to the operator"),
        ("edge.clusterRef", CLUSTER, "devices in another cluster cannot reach a ClusterIP"),
        ("edge.deviceSelector.matchLabels", {}, "must be at least 1 fields"),
        ("edge.images", [{"name": "a"}, {"name": "a"}], "name must be unique"),
        ("edge.images", [{"name": "a", "arch": "amd64", "l4t": "r36"}], "a Jetson (l4t) is arm64"),
        ("edge.weights", {"claim": {"name": "w", "path": "../x"}}, "without .."),
        ("model.source.claim", {"name": "w"}, "write exactly one of hub and claim"),
        ("model.source", {"claim": {"name": "w"}}, "name the claim that holds the model on the edge side"),
        (
            "speculation.drafter",
            "model",
            'spec.speculation.drafter: "model": must be one of auto, none, ngram',
        ),
        ("speculation.maxDraft", 33, "spec.speculation.maxDraft: 33: must be at most 32"),
        ("speculation.maxDraft", -1, "spec.speculation.maxDraft: -1: must be at least 0"),
        ("speculation.maxDraft", 0, "speculation.maxDraft: at least 1 in mode hat; write drafter: none"),
        ("speculation.sampler", "topk", "speculation.sampler: write coupled or rejection in mode hat"),
        (
            "speculation.draftModel",
            {"hub": "default"},
            "speculation.draftModel: goes with mode: picospec only",
        ),
        ("speculation.stopThreshold", 1.5, "spec.speculation.stopThreshold: 1.5: must be at most 1"),
        ("speculation.stopThreshold", "auto", 'stopThreshold: "auto": must be of type number'),
        ("speculation.window", 0, "spec.speculation.window: 0: must be at least 1"),
        ("speculation.window", "auto", 'spec.speculation.window: "auto": must be of type integer'),
        ("speculation.branches", 9, "spec.speculation.branches: 9: must be at most 8"),
        ("speculation.sampler", "greedy", 'sampler: "greedy": must be one of coupled, rejection, thinning'),
        ("chunking.mode", "best", 'spec.chunking.mode: "best": must be one of'),
        ("chunking.tokens", 64, "chunking.tokens: goes with mode: fixed"),
        ("chunking.minTokens", 513, "chunking.minTokens: may be at most chunking.maxTokens"),
        ("wire.uplink", "raw", 'spec.wire.uplink: "raw": must be one of none, bf16, int8, int4'),
        ("wire.uplinkDecode", "int2", 'uplinkDecode: "int2": must be one of none, bf16, int8, int4'),
        ("wire.downlink", "int8", "compressed hidden states are not available"),
        (
            "imagePullSecrets",
            [{"name": "my secret"}],
            'spec.imagePullSecrets[0].name: "my secret": must match',
        ),
    ],
)
def test_wrong_fields_are_named_with_their_value(path: str, value: Any, words: str) -> None:
    assert words in only_problem(body(), path, value)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("split", {"inputLayers": 3}, "split: mode picospec cuts no model"),
        ("model.source", {"hub": "org/model"}, "speculation.draftModel: HAT brings a draft model for"),
        ("model.source", {"claim": {"name": "w"}}, "speculation.draftModel: HAT brings a draft model for"),
        (
            "edge.weights",
            {"claim": {"name": "w"}},
            "edge.weights: in mode picospec devices hold the draft model",
        ),
        ("speculation.draftModel", {}, "speculation.draftModel: write exactly one of hub and claim"),
        (
            "speculation.draftModel",
            {"hub": "default", "claim": {"name": "c"}},
            "speculation.draftModel: write exactly one of hub and claim",
        ),
        ("speculation.draftModel", {"hub": "a@b"}, 'spec.speculation.draftModel.hub: "a@b": must match'),
        ("speculation.draftModel", {"claim": {"name": "c", "path": "/m"}}, "without a leading /"),
        ("speculation.drafter", "ngram", "speculation.drafter: in mode picospec the draft model drafts"),
        ("speculation.stopThreshold", 0.5, "speculation.stopThreshold: goes with mode: hat only"),
        ("speculation.branches", 2, "speculation.branches: goes with mode: hat only"),
        ("speculation.alternatives", 2, "speculation.alternatives: goes with mode: hat only"),
        ("speculation.sampler", "rejection", "coupled, thinning or topk in mode picospec"),
        ("speculation.maxDraft", 33, "spec.speculation.maxDraft: 33: must be at most 32"),
        ("speculation", {"maxDraft": 5, "window": 13}, "maxDraft (4) times window (2) may be 64 at most"),
        ("chunking", {"mode": "fixed", "tokens": 64}, "chunking.tokens: mode picospec sends token ids"),
        ("wire.uplink", "int8", "wire.uplink and wire.uplinkDecode: mode picospec sends token ids"),
        ("wire.uplinkDecode", "bf16", "wire.uplink and wire.uplinkDecode: mode picospec sends token ids"),
        ("wire.padFrames", True, "wire.padFrames: mode picospec sends token ids"),
    ],
    ids=str,
)
def test_what_has_no_meaning_in_mode_picospec_is_refused(path: str, value: Any, words: str) -> None:
    assert words in only_problem(body(**PICOSPEC), path, value)


def only_problem(found: dict[str, Any], path: str, value: Any) -> str:
    """What is wrong with an object once a field has a value; None removes it."""
    change(found["spec"], path, value)
    if value is None and path == "split":
        del found["spec"]["split"]
    (wrong,) = problems(SCHEMA, apply_defaults(SCHEMA, found))
    return wrong


@pytest.mark.parametrize(
    "speculation",
    [
        {},
        {"maxDraft": 0},
        {"maxDraft": 32, "window": 2},
        {"maxDraft": 4, "window": 16},
        {"window": 16},
        {"sampler": "topk"},
        {"sampler": "thinning"},
        {"draftModel": {"hub": "org/small"}},
    ],
    ids=str,
)
def test_what_mode_picospec_takes(speculation: dict[str, Any]) -> None:
    assert problems(SCHEMA, body(**PICOSPEC, speculation=speculation)) == []


def test_any_model_goes_with_a_draft_model_and_without_devices() -> None:
    source = {"source": {"claim": {"name": "w"}}}
    named = body(**{**PICOSPEC, "model": source}, speculation={"draftModel": {"claim": {"name": "c"}}})
    assert problems(SCHEMA, named) == []
    alone = body(**{**PICOSPEC, "model": source})
    del alone["spec"]["edge"]
    assert problems(SCHEMA, alone) == []


def test_the_longest_key_of_a_label() -> None:
    longest = f"{'a' * 249}.dev/{'b' * 63}"
    for key, wrong in ((longest, False), (f"a{longest}", True), (f"{longest}b", True)):
        found = body(edge={"deviceSelector": {"matchLabels": {key: "true"}}})
        assert bool(problems(SCHEMA, found)) == wrong


@pytest.mark.parametrize("name", ["a" * 41, "Chat", "1st", "ends-"])
def test_names_that_services_cannot_have(name: str) -> None:
    found = body()
    found["metadata"]["name"] = name
    assert any("metadata.name" in line for line in problems(SCHEMA, found))


def test_all_problems_are_told_at_once() -> None:
    found = body(cloud={"replicas": -1, "maxSessions": 0})
    del found["spec"]["split"]["inputLayers"]
    assert len(problems(SCHEMA, found)) == 3
