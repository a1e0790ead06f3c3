"""Objects of a HatDeployment with mode: picospec."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from hat_operator import names
from hat_operator.fields import SpecError
from hat_operator.spec import HatDeployment
from hat_runtime.cli import picospec_options
from hat_runtime.cli.main import build_parser
from tests.unit.operator.restricted import pods, violations
from tests.unit.operator.samples import SETTINGS, body, desired, fetching, hat, main, one, pod
from tests.unit.operator.test_cloud import ports
from tests.unit.operator.test_edge import names_of

CLAIM = {"claim": {"name": "drafts", "path": "small"}}


def token_mode(**spec: Any) -> HatDeployment:
    """The default model, with the draft model that comes with it."""
    return hat(**{"mode": "picospec", "split": None, "model": {"source": {"hub": "default"}}, **spec})


def parsed(container: dict[str, Any]) -> argparse.Namespace:
    """What `hat` makes of a container's arguments."""
    found: argparse.Namespace = build_parser().parse_args(container["args"])
    return found


def device(**spec: Any) -> dict[str, Any]:
    return one(desired(token_mode(**spec)).edge, "DaemonSet")


def cloud(**spec: Any) -> dict[str, Any]:
    return one(desired(token_mode(**spec)).cloud, "Deployment")


def test_the_cloud_serves_the_whole_model() -> None:
    thing = cloud(model={"source": {"hub": "default"}, "dtype": "float32"})
    args = parsed(main(thing))
    assert (args.mode, args.input_layers, args.model) == ("picospec", None, "/model/part")
    assert args.dtype == "float32"
    (init,) = fetching(thing)
    prepared = parsed(init)
    assert (prepared.source, prepared.part, prepared.input_layers) == ("default", "all", None)
    assert str(prepared.out) == args.model


def test_the_cloud_fetches_the_revision_that_was_asked_for() -> None:
    source = {"source": {"hub": "org/model"}, "revision": "v2"}
    wanted = {"model": source, "speculation": {"draftModel": {"hub": "org/small"}}}
    (init,) = fetching(cloud(**wanted))
    assert parsed(init).source == "org/model@v2"
    (init,) = fetching(device(**wanted))
    assert parsed(init).source == "org/small"


def test_the_clouds_claim_is_mounted() -> None:
    thing = cloud(model={"source": {"claim": {"name": "w", "path": "m"}}}, speculation={"draftModel": CLAIM})
    assert fetching(thing) == []
    assert parsed(main(thing)).model == "/model/m"


def test_a_device_makes_the_draft_model_that_comes_with_hat() -> None:
    thing = device()
    (init,) = fetching(thing)
    prepared = parsed(init)
    assert (prepared.source, prepared.part, prepared.input_layers) == ("default", "draft", None)
    args = parsed(main(thing))
    picospec_options.check(args)
    assert args.mode == "picospec"
    assert args.model == args.draft_model == prepared.out
    assert {"--chunk-tokens", "--uplink-codec", "--drafter", "--branches"}.isdisjoint(main(thing)["args"])


def test_a_device_fetches_the_draft_model_of_a_hub() -> None:
    thing = device(speculation={"draftModel": {"hub": "org/small"}})
    (init,) = fetching(thing)
    prepared = parsed(init)
    assert (prepared.source, prepared.part) == ("org/small", "all")
    args = parsed(main(thing))
    assert args.model == args.draft_model == prepared.out


def test_a_device_mounts_the_draft_models_claim() -> None:
    thing = device(speculation={"draftModel": CLAIM})
    assert fetching(thing) == []
    args = parsed(main(thing))
    assert str(args.model) == str(args.draft_model) == "/model/small"
    (volume,) = [volume for volume in pod(thing)["volumes"] if "persistentVolumeClaim" in volume]
    assert volume["persistentVolumeClaim"] == {"claimName": "drafts", "readOnly": True}


@pytest.mark.parametrize(
    ("speculation", "out"),
    [
        ({}, {53, 443, 6443, 7070}),
        ({"draftModel": {"hub": "org/small"}}, {53, 443, 6443, 7070}),
        ({"draftModel": CLAIM}, {53, 443, 6443, 7070}),
    ],
    ids=str,
)
def test_network_policy(speculation: dict[str, Any], out: set[int]) -> None:
    policy = one(desired(token_mode(speculation=speculation)).edge, "NetworkPolicy")["spec"]
    assert ports(policy["egress"]) == out


def served_with(**speculation: Any) -> Any:
    args = parsed(main(device(speculation=speculation)))
    picospec_options.check(args)
    return picospec_options.speculation(args)


def test_speculation_where_nothing_is_written_is_the_runtimes() -> None:
    told = ["device", "serve", "--mode", "picospec", "--model", "m", "--cloud", "h:1"]
    assert served_with() == picospec_options.speculation(build_parser().parse_args(told))


def test_speculation_as_written() -> None:
    found = served_with(maxDraft=0, window=3)
    assert (found.max_draft, found.window) == (0, 3)
    assert served_with(maxDraft=32, window=2).max_draft == 32
    for name in names_of("sampler") - {"rejection"}:
        assert served_with(sampler=name).sampler == name
    assert set(picospec_options.SAMPLERS) == names_of("sampler") - {"rejection"}


def test_the_bounds_of_the_field_are_the_runtimes() -> None:
    assert picospec_options.MOST_DRAFTS == 64
    assert (picospec_options.MAX_DRAFT, picospec_options.WINDOW) == (4, 2)


def test_every_pod_keeps_to_the_restricted_standard() -> None:
    for wanted in (token_mode(), token_mode(speculation={"draftModel": CLAIM})):
        found = desired(wanted)
        seen = dict(pods(found.cloud + found.edge))
        assert len(seen) == 2
        assert {name: violations(spec) for name, spec in seen.items()} == {name: [] for name in seen}


def test_a_change_of_the_mode_rolls_the_cloud_and_one_of_the_draft_model_does_not() -> None:
    source = {"source": {"hub": "default"}}
    plain = {"tls": "off"}  # of every HatDeployment that is older than certificates
    before = names.revision(hat(model=source, security=plain), SETTINGS)
    assert before == "fdc24903", "an upgraded operator would replace every cloud"
    assert names.revision(token_mode(security=plain), SETTINGS) != before
    after = names.revision(token_mode(), SETTINGS)
    for speculation in ({"draftModel": {"hub": "org/small"}}, {"maxDraft": 2}):
        assert names.revision(token_mode(speculation=speculation), SETTINGS) == after


def test_a_draft_model_that_nobody_has_is_refused_without_an_api_server_too() -> None:
    found = body(mode="picospec", split=None)
    with pytest.raises(SpecError, match=r"spec\.speculation\.draftModel: None: HAT brings a draft model for"):
        HatDeployment.parse(found)
    found["spec"]["speculation"]["draftModel"] = {}
    with pytest.raises(
        SpecError, match=r"spec\.speculation\.draftModel: \{\}: write exactly one of hub and claim"
    ):
        HatDeployment.parse(found)
