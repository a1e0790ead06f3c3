"""spec.cloud.quotas: the file that replicas follow says the same, and replicas take what the API takes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hat_operator.fields import Fields, SpecError
from hat_operator.quotas import quota_file
from hat_operator.schema import problems
from hat_operator.spec import HatDeployment
from hat_runtime.cli.main import build_parser
from hat_runtime.cloud.quotas import read
from hat_runtime.control.quotas import Limits, Quotas
from tests.operator.manifests import QUOTAS
from tests.unit.operator.samples import SCHEMA, desired, hat, main, of_kind, one, pod

FIELD = "spec.cloud.quotas"
QUOTAS_SCHEMA = SCHEMA["properties"]["spec"]["properties"]["cloud"]["properties"]["quotas"]


def limits(quotas: dict[str, Any]) -> Quotas:
    """What a replica makes of the file."""
    return read(Path("FILE"), quota_file(Fields(quotas, FIELD)).encode())


def test_every_field_arrives() -> None:
    found = limits(QUOTAS)
    assert found.device_default == Limits(4, 200.5, 1000, 0.25)
    assert found.devices == {"jetson-1": Limits(), "jetson-2.site_a": Limits(4, 200.5, 1, 1e-6)}
    assert found.tenant_default == Limits(0, 1e9, weight=0.01)
    assert found.tenants == {"acme": Limits(1 << 20, 1e9, 1, weight=100)}


def test_empty_quotas_limit_nobody() -> None:
    assert limits({}) == limits({"tenantDefault": {}, "devices": []}) == Quotas()


numbers = {
    "sessions": [-1, 0, 1, 1 << 20, (1 << 20) + 1],
    "tokensPerSecond": [0.0099, 0.01, 7, 1e9, 1e9 + 1],
    "burstTokens": [0.99, 1, 2.5, 1e9, 1e9 + 1],
    "kvShare": [9.9e-7, 1e-6, 0.00005, 1, 1.01],
    "weight": [0.0099, 0.01, 2, 100, 100.1],
}
own = {name: st.sampled_from(values[1:4]) | st.sampled_from(values) for name, values in numbers.items()}
unlimited = st.lists(st.sampled_from(["sessions", "tokensPerSecond", "kvShare"]), unique=True)
names = st.sampled_from(["a", "b", "Node-1.site_a", "x" * 253]) | st.sampled_from(["", "x" * 254])


def of(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    """The two fields of tenants, or of devices; nearly right."""
    mine = {name: values for name, values in own.items() if kind == "tenant" or name != "weight"}
    default = st.fixed_dictionaries({}, optional=mine)
    named = st.fixed_dictionaries({"name": names}, optional={**mine, "unlimited": unlimited})
    both = {f"{kind}Default": default, f"{kind}s": st.lists(named, max_size=3)}
    return st.fixed_dictionaries({}, optional=both)


@given(of("tenant"), of("device"))
def test_a_replica_takes_what_the_api_takes_and_nothing_else(
    tenants: dict[str, Any], devices: dict[str, Any]
) -> None:
    quotas = tenants | devices
    if problems(QUOTAS_SCHEMA, quotas):
        with pytest.raises(SpecError) as error:
            limits(quotas)
        assert error.value.path.startswith(FIELD)
    else:
        limits(quotas)


def test_the_most_that_the_api_takes_fits_into_a_config_map() -> None:
    most = {"sessions": 1 << 20, "tokensPerSecond": 999999999.1234567, "burstTokens": 999999999.1234567}
    item = {**most, "kvShare": 1.2345678901234567e-06}
    devices = [{**item, "name": f"{index:0253}"} for index in range(1000)]
    tenants = [{**device, "weight": 12.345678901234567} for device in devices]
    quotas = {"tenants": tenants, "devices": devices}
    assert problems(QUOTAS_SCHEMA, quotas) == []
    assert len(limits(quotas).devices) == 1000
    assert len(quota_file(Fields(quotas, FIELD)).encode()) < 1 << 20
    for kind in ("tenants", "devices"):
        assert problems(QUOTAS_SCHEMA, {**quotas, kind: [*quotas[kind], {"name": "more"}]})


@pytest.mark.parametrize(
    ("quotas", "says"),
    [
        ([], r"spec.cloud.quotas: \[\]: must be an object"),
        ({"devices": {"a": {}}}, r"spec.cloud.quotas.devices: \{'a': \{\}\}: must be a list"),
        ({"deviceDefault": {"sessions": 1.5}}, "quotas.deviceDefault.sessions: 1.5: must be an integer"),
        ({"deviceDefault": {"kvShare": "half"}}, "quotas.deviceDefault.kvShare: 'half': must be a number"),
        ({"deviceDefault": {"kvShare": 2}}, "quotas.deviceDefault.kvShare: 2.0: must be a number from 1e-06"),
        ({"devices": [{"name": "a", "tokensPerSecond": 0}]}, "devices.a.tokensPerSecond: 0.0: must be"),
        ({"devices": [{"name": "a"}, {"name": "a"}]}, r"devices\[1\].name: 'a': another of devices"),
        ({"devices": [{"name": "a\n"}]}, r"quotas.devices: 'a\\n': must be a name of 1 to 253 printable"),
        (
            {"tenants": [{"name": "a", "unlimited": ["all"]}]},
            r"tenants\[0\].unlimited: 'all': must be one of",
        ),
        (
            {"tenants": [{"name": "a", "sessions": 3, "unlimited": ["sessions"]}]},
            r"tenants\[0\].sessions: 3: is in unlimited too",
        ),
        ({"tenantDefault": {"burstTokens": 3}}, "tenantDefault.burstTokens: 3.0: goes with tokensPerSecond"),
    ],
)
def test_what_is_wrong_is_named(quotas: Any, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        limits(quotas)


def made(wanted: HatDeployment) -> list[dict[str, Any]]:
    """The ConfigMap with the quotas, if there is one."""
    maps = of_kind(desired(wanted).cloud, "ConfigMap")
    return [item for item in maps if item["metadata"]["name"] == "chat-cloud-quotas"]


@pytest.mark.parametrize("mode", ["hat", "picospec"])
def test_replicas_follow_a_file_that_they_wait_for(mode: str) -> None:
    token_mode = {"mode": "picospec", "split": None, "model": {"source": {"hub": "default"}}}
    wanted = hat(cloud={"quotas": QUOTAS}, **(token_mode if mode == "picospec" else {}))
    thing = one(desired(wanted).cloud, "Deployment")
    (volume,) = [volume for volume in pod(thing)["volumes"] if volume["name"] == "quotas"]
    assert volume["configMap"] == {"name": "chat-cloud-quotas"}  # not optional: nobody would be limited
    (mount,) = [mount for mount in main(thing)["volumeMounts"] if mount["name"] == "quotas"]
    assert mount["readOnly"]
    assert "subPath" not in mount  # that would never change
    file = Path(build_parser().parse_args(main(thing)["args"]).quotas)
    assert file.parent == Path(mount["mountPath"])
    (config,) = made(wanted)
    assert read(file, config["data"][file.name].encode()) == limits(QUOTAS)
    kinds = [item["kind"] for item in desired(wanted).cloud]
    assert kinds.index("ConfigMap") < kinds.index("Deployment")


def test_other_limits_are_another_file_and_the_same_pods() -> None:
    before, after = hat(cloud={"quotas": {}}), hat(cloud={"quotas": QUOTAS})
    assert one(desired(before).cloud, "Deployment") == one(desired(after).cloud, "Deployment")
    assert made(before) != made(after)


def test_without_the_field_pods_are_as_before() -> None:
    wanted = hat()
    assert made(wanted) == []
    thing = one(desired(wanted).cloud, "Deployment")
    assert "quotas" not in json.dumps(thing)
    with_quotas = copy.deepcopy(one(desired(hat(cloud={"quotas": {}})).cloud, "Deployment"))
    container = main(with_quotas)
    at = container["args"].index("--quotas")
    del container["args"][at : at + 2]
    container["volumeMounts"] = [item for item in container["volumeMounts"] if item["name"] != "quotas"]
    pod(with_quotas)["volumes"] = [item for item in pod(with_quotas)["volumes"] if item["name"] != "quotas"]
    assert with_quotas == thing  # its revision too: quotas are no matter of device and cloud
