from __future__ import annotations

import pytest

from hat_operator import names
from hat_operator.quantity import canonical
from hat_operator.settings import Settings, package_version
from hat_operator.spec import HatDeployment, SpecError
from hat_runtime.errors import UsageError
from tests.unit.operator.samples import REMOTE, SETTINGS, body, hat


def test_parse_reads_metadata() -> None:
    found = body()
    found["metadata"] |= {"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": [names.FINALIZER]}
    parsed = HatDeployment.parse(found)
    assert (parsed.name, parsed.namespace, parsed.uid, parsed.generation) == ("chat", "team", "u-1", 4)
    assert parsed.deleting
    assert parsed.finalizers == ("hat.dev/edge-cleanup",)
    assert not hat().deleting


def test_errors_name_the_field_and_echo_the_value() -> None:
    found = body()
    found["spec"]["cloud"]["replicas"] = "two"
    with pytest.raises(SpecError, match=r"spec\.cloud\.replicas: 'two': must be an integer") as error:
        HatDeployment.parse(found)
    assert (error.value.path, error.value.value) == ("spec.cloud.replicas", "two")


@pytest.mark.parametrize("value", ["0.5", True, float("nan"), float("inf")])
def test_a_threshold_that_is_no_number_is_echoed(value: object) -> None:
    found = body()
    found["spec"]["speculation"]["stopThreshold"] = value
    with pytest.raises(SpecError, match=rf"spec\.speculation\.stopThreshold: {value!r}: must be a number"):
        HatDeployment.parse(found)


def test_two_images_for_the_same_devices_are_refused() -> None:
    with pytest.raises(SpecError, match=r"spec\.edge\.images\[1\]: 'b'"):
        hat(edge={"images": [{"name": "a"}, {"name": "b"}]})


@pytest.mark.parametrize(
    "other",
    [
        {"model": {"source": {"hub": "org/other"}}},
        {"model": {"source": {"hub": "org/model"}, "revision": "v2"}},
        {"model": {"source": {"hub": "org/model"}, "dtype": "float32"}},
        {"split": {"inputLayers": 4}},
        {"runtime": {"version": "1.2.4"}},
        {"cloud": {"image": "mine:1"}},
    ],
    ids=str,
)
def test_revision_changes_with_what_both_sides_agree_on(other: dict[str, object]) -> None:
    assert names.revision(hat(**other), SETTINGS) != names.revision(hat(), SETTINGS)


@pytest.mark.parametrize(
    "other",
    [
        {"cloud": {"replicas": 5, "maxSessions": 3, "resources": {"requests": {"cpu": 2}}}},
        {"observability": {"logLevel": "debug"}},
        {"suspend": True},
        {"chunking": {"mode": "fixed", "tokens": 0}},
        {"speculation": {"drafter": "none"}},
        {"wire": {"uplink": "int8", "uplinkDecode": "int8"}},  # a cloud takes every codec
        {"edge": {"runtimeClassName": "nvidia"}},
        {"cloud": {"runtimeClassName": "kata-qemu-nvidia-gpu-snp"}},
        {"wire": {"padFrames": True}},
        {"runtime": {"version": "1.2.3"}},  # what the operator writes there by itself
    ],
    ids=str,
)
def test_revision_stays_when_pods_may_be_updated_in_place(other: dict[str, object]) -> None:
    assert names.revision(hat(**other), SETTINGS) == names.revision(hat(), SETTINGS)


@pytest.mark.parametrize(
    ("expose", "edge", "endpoint"),
    [
        ({}, {}, "chat-cloud-0123.team.svc:7070"),
        ({"port": 443}, {}, "chat-cloud-0123.team.svc:443"),
        ({"type": "LoadBalancer"}, {}, "chat-cloud-0123.team.svc:7070"),
        ({"type": "LoadBalancer"}, {"clusterRef": REMOTE}, None),
        ({"type": "LoadBalancer", "host": "hat.example.org"}, {"clusterRef": REMOTE}, "hat.example.org:7070"),
        ({"host": "2001:db8::1"}, {}, "[2001:db8::1]:7070"),
        ({"type": "NodePort", "host": "10.0.0.5", "nodePort": 30070}, {}, "10.0.0.5:30070"),
        ({"type": "NodePort", "host": "10.0.0.5"}, {}, None),
    ],
    ids=str,
)
def test_endpoint_as_far_as_the_spec_says_it(
    expose: dict[str, object], edge: dict[str, object], endpoint: str | None
) -> None:
    assert names.fixed_endpoint(hat(edge=edge, cloud={"expose": expose}), "0123") == endpoint


def test_without_devices_the_address_is_that_of_whichever_revision_serves() -> None:
    found = body()
    del found["spec"]["edge"]
    assert names.fixed_endpoint(HatDeployment.parse(found), "0123") == "chat-cloud.team.svc:7070"


@pytest.mark.parametrize(
    ("written", "stored"),
    [
        ("4", "4"),
        (4, "4"),
        ("0.5", "500m"),
        ("1000m", "1"),
        ("1500m", "1500m"),
        ("2048Mi", "2Gi"),
        ("1.5Gi", "1536Mi"),
        ("1000Ki", "1000Ki"),
        ("1000M", "1G"),
        ("1e3", "1e3"),
        ("12e6", "12e6"),
        ("0", "0"),
        ("100", "100"),
        ("1000", "1k"),
    ],
)
def test_quantities_as_the_api_server_stores_them(written: str | int, stored: str) -> None:
    assert canonical(written) == stored
    assert canonical(stored) == stored


@pytest.mark.parametrize(
    "written",
    ["", "4 Gi", "much", "-1", "1GB", "9" * 40, "9" * 20 + "Ei", "1" + "0" * 5000, "99999999999999999999Ki"],
)
def test_what_is_no_quantity(written: str) -> None:
    with pytest.raises(ValueError, match="quantity"):
        canonical(written)


def test_settings_from_the_environment() -> None:
    assert Settings.from_environment({}) == Settings(version=package_version())
    found = Settings.from_environment(
        {
            "HAT_OPERATOR_REGISTRY": "registry.example.org/hat/",
            "HAT_OPERATOR_VERSION": "9",
            "HAT_OPERATOR_NAMESPACES": "a, b,",
            "HAT_OPERATOR_RESYNC_SECONDS": "5",
            "HAT_OPERATOR_METRICS_PORT": "1",
            "HAT_OPERATOR_HEALTH_PORT": "2",
            "HAT_OPERATOR_LOG_FORMAT": "json",
        }
    )
    assert found == Settings("registry.example.org/hat", "9", ("a", "b"), 5.0, 1, 2, "json")
    assert found.image("hat-cloud", "9") == "registry.example.org/hat/hat-cloud:9"
    assert SETTINGS.image("hat-cloud", "9") == "hat-cloud:9"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RESYNC_SECONDS", "often"),
        ("RESYNC_SECONDS", "nan"),
        ("METRICS_PORT", "70000"),
        ("LOG_FORMAT", "xml"),
    ],
)
def test_wrong_settings_are_named(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"HAT_OPERATOR_{name}: '{value}'"):
        Settings.from_environment({f"HAT_OPERATOR_{name}": value})
