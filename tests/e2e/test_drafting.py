"""spec.speculation and spec.wire in running pods: what the devices' answers count, not only what they are told."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest

from tests.e2e.product import SITE_NAMESPACE, TEAM, Product

pytestmark = [pytest.mark.timeout(900), pytest.mark.default_model, pytest.mark.long]
NAME = "drafts"
READY_S = 400.0
WIDTH = 576
"""Of the default model's hidden states, which `Product.example` computes in float32."""
REPEATED = " la" * 24
"""Greedy decoding goes on with it, so that words that were there before follow."""
SPECULATION = {
    "drafter": "ngram",
    "maxDraft": 3,
    "stopThreshold": 0,
    "window": 1,
    "branches": 2,
    "sampler": "rejection",
}
LONG_PROMPT = "".join(f" {number * 7919 % 1000}" for number in range(150))


@pytest.fixture(scope="module")
def drafting(product: Product) -> Iterator[Product]:
    """A HatDeployment whose device drafts, with raw states; Ready."""
    product.apply(product.example(metadata__name=NAME, spec__speculation=SPECULATION))
    product.wait_ready(NAME, READY_S)
    yield product
    product.delete(NAME)


def change(product: Product, **spec: Any) -> None:
    """Changes fields, and waits until the device runs with them."""
    product.patch(NAME, spec)
    product.wait_ready(NAME, READY_S)


def device(product: Product) -> dict[str, Any]:
    """The pod of the device."""
    (pod,) = product.objects(product.edge, SITE_NAMESPACE, "pods", f"hat.dev/deployment={NAME}")
    return pod


def options(product: Product) -> dict[str, str]:
    """Options of the device's process and their values, as its node knows them."""
    meta = device(product)["metadata"]
    read = ("exec", meta["name"], "--", "cat", "/proc/1/cmdline")
    words = product.edge.kubectl("-n", SITE_NAMESPACE, *read).stdout.split("\0")
    return {word: value for word, value in pairwise(words) if word.startswith("--")}


def usage(product: Product, prompt: str, max_tokens: int) -> dict[str, Any]:
    """What an answer says of itself: usage.hat, and completion_tokens beside it."""
    body = {"model": NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    found = product.ask(NAME, "/v1/completions", body, timeout_s=200)["usage"]
    assert found["prompt_tokens_details"]["cached_tokens"] == 0 or prompt == REPEATED
    return {**found["hat"], "tokens": found["completion_tokens"], "prompt": found["prompt_tokens"]}


def metric(product: Product, name: str) -> float:
    """A metric of the device, NAME or NAME{label="value"}; 0 where nothing was counted with this label."""
    address = device(product)["status"]["podIP"]
    text = str(product.call(product.edge, f"http://{address}:8000/metrics"))
    lines = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    assert lines or "{" in name, name
    return float(lines[0].split()[1]) if lines else 0.0


def sampled(product: Product) -> str:
    """A text drawn with a seed at temperature 1."""
    body = {"model": NAME, "prompt": LONG_PROMPT, "max_tokens": 32, "temperature": 1, "seed": 7}
    return str(product.ask(NAME, "/v1/completions", body, timeout_s=200)["choices"][0]["text"])


def test_every_field_reaches_the_process(drafting: Product) -> None:
    told = options(drafting)
    assert (told["--drafter"], told["--max-draft"], told["--branches"]) == ("ngram", "3", "2")
    assert (told["--window"], told["--sampler"]) == ("1", "rejection")
    assert float(told["--stop-threshold"]) == 0
    assert told["--uplink-codec"] == "raw,raw"


def test_drafts_are_made_and_accepted(drafting: Product) -> None:
    """In the answer's usage, in the device's metrics, and by what the cloud says of the device in the status."""
    seen = usage(drafting, REPEATED, 64)
    assert 0 < seen["accepted_tokens"] <= seen["draft_tokens"]
    assert seen["rounds"] < seen["tokens"]
    assert metric(drafting, "hat_draft_tokens_total") >= seen["draft_tokens"]
    assert metric(drafting, "hat_accepted_tokens_total") >= seen["accepted_tokens"]

    def acceptance() -> float | None:
        usage(drafting, REPEATED, 16)
        (row,) = drafting.hat(NAME)["status"]["devices"]
        return row.get("acceptance")

    share = drafting.wait("status.devices shows the acceptance", acceptance, 150)
    assert 0 < share <= 1


def test_raw_states_are_as_large_as_they_are(drafting: Product) -> None:
    """The measure for the test of the codecs."""
    seen = usage(drafting, LONG_PROMPT, 1)
    assert seen["prompt"] > 100
    assert seen["uplink_bytes"] >= seen["prompt"] * WIDTH * 4


def test_longer_drafts_take_fewer_rounds_and_a_threshold_ends_them(drafting: Product) -> None:
    three = usage(drafting, REPEATED, 96)
    change(drafting, speculation={"maxDraft": 12})
    twelve = usage(drafting, REPEATED, 96)
    assert three["tokens"] == twelve["tokens"] == 96
    assert twelve["rounds"] < three["rounds"]
    change(
        drafting, speculation={"stopThreshold": 1}
    )  # every n-gram is less sure than that: one draft a round
    assert options(drafting)["--stop-threshold"] == "1.0"
    assert usage(drafting, REPEATED, 96)["rounds"] > twelve["rounds"]
    change(drafting, speculation={"stopThreshold": None, "window": None})
    assert {"--stop-threshold", "--window"} & set(options(drafting)) == set()


def test_the_window_lets_rounds_leave_before_the_answer(drafting: Product) -> None:
    change(drafting, speculation={"maxDraft": 4, "window": 1, "branches": 1})
    usage(drafting, REPEATED, 96)
    assert metric(drafting, "hat_rounds_ahead_total") == 0
    change(drafting, speculation={"window": 4})
    usage(drafting, REPEATED, 96)
    assert metric(drafting, "hat_rounds_ahead_total") > 0


def test_branches_are_drafted_while_a_round_is_checked(drafting: Product) -> None:
    """By the trained drafter, which names other candidates."""
    tail, branch = (f'hat_drafts_ahead_total{{place="{place}"}}' for place in ("tail", "branch"))
    seen = {}
    for branches in (1, 4):
        change(drafting, speculation={"drafter": "feature", "window": 1, "branches": branches, "maxDraft": 2})
        usage(drafting, LONG_PROMPT, 48)
        seen[branches] = metric(drafting, tail) > 0, metric(drafting, branch) > 0
    assert seen == {1: (True, False), 4: (True, True)}


def test_the_sampler_says_how_drafts_are_judged(drafting: Product) -> None:
    """Coupled texts are those without drafts; rejection's are others from the same distribution."""
    change(drafting, speculation={"drafter": "feature", "sampler": "coupled"})
    coupled = sampled(drafting)
    change(drafting, speculation={"sampler": "rejection"})
    assert sampled(drafting) != coupled
    change(drafting, speculation={"drafter": "none", "sampler": "coupled"})
    assert sampled(drafting) == coupled


def test_alternatives_are_checked_as_many_as_are_wanted(drafting: Product) -> None:
    """The trained drafter names them; n-grams have none."""
    speculation = {"drafter": "feature", "sampler": "coupled", "alternatives": 2, "maxDraft": 3}
    change(drafting, speculation=speculation)
    assert options(drafting)["--alternatives"] == "2"
    seen = usage(drafting, LONG_PROMPT, 32)
    assert seen["draft_tokens"] > 0
    assert 0 <= seen["alternatives_accepted"] <= seen["refusals"] <= seen["alternatives"]
    assert metric(drafting, "hat_alternatives_total") >= seen["alternatives"] > 0
    change(drafting, speculation={"alternatives": 0})
    assert usage(drafting, LONG_PROMPT, 32)["alternatives"] == 0


def test_no_drafter_and_codecs(drafting: Product) -> None:
    """Without drafts every token takes a round; int8 takes a row of a prompt in a quarter of float32, and a bit."""
    change(drafting, speculation={"drafter": "none"}, wire={"uplink": "int8", "uplinkDecode": "bf16"})
    told = options(drafting)
    assert (told["--drafter"], told["--uplink-codec"]) == ("none", "int8,bf16")
    plain = usage(drafting, REPEATED, 64)
    assert plain["draft_tokens"] == plain["accepted_tokens"] == 0
    assert plain["rounds"] == plain["tokens"] == 64
    assert metric(drafting, "hat_draft_tokens_total") == metric(drafting, "hat_drafting") == 0
    # int8: WIDTH bytes, the scale and the largest values apart (docs/usage.md); bf16: 2 bytes a value.
    prompt = usage(drafting, LONG_PROMPT, 1)
    assert WIDTH * prompt["prompt"] < prompt["uplink_bytes"] < WIDTH * 1.5 * prompt["prompt"]
    decoding = plain["uplink_bytes"] - plain["prompt"] * 628
    assert WIDTH * 2 * 63 < decoding < WIDTH * 3 * 63


def test_the_cloud_is_not_replaced_for_any_of_it(drafting: Product) -> None:
    """Devices' own business: the same replicas served throughout."""
    of_cloud = partial(drafting.objects, drafting.cloud, TEAM)
    (replica,) = of_cloud("pods", f"hat.dev/deployment={NAME}")
    (owner,) = of_cloud("deployments", f"hat.dev/deployment={NAME}")
    assert owner["metadata"]["generation"] == 1
    assert replica["status"]["containerStatuses"][0]["restartCount"] == 0
