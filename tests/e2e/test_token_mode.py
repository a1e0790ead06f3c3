"""mode: picospec in running pods: the whole model in the cloud, a draft model on the device."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.product import SITE_NAMESPACE, TEAM, Product, fetching, make_claim
from tests.e2e.test_product import local_answer
from tests.harness.cluster import Cluster
from tests.operator.manifests import REMOVED

pytestmark = [pytest.mark.timeout(900), pytest.mark.default_model, pytest.mark.long]
NAME = "tokens"
READY_S = 400.0
PROMPT = "Name three rivers of Europe."
TOKENS = 32


@pytest.fixture(scope="module")
def answers(product: Product, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What the whole model says to PROMPT, by transformers; a HatDeployment with mode: picospec is Ready."""
    product.apply(product.example(metadata__name=NAME, spec__mode="picospec", spec__split=REMOVED))
    product.wait_ready(NAME, READY_S)
    yield {PROMPT: local_answer(tmp_path_factory.mktemp("local"), PROMPT, TOKENS)}
    product.delete(NAME)


def one_pod(product: Product, cluster: Cluster, namespace: str) -> dict[str, Any]:
    """The pod of one side."""
    (pod,) = product.objects(cluster, namespace, "pods", f"hat.dev/deployment={NAME}")
    return pod


def options(product: Product, cluster: Cluster, namespace: str) -> dict[str, str]:
    """Options of one side's process and their values, as its node knows them."""
    name = one_pod(product, cluster, namespace)["metadata"]["name"]
    words = cluster.kubectl("-n", namespace, "exec", name, "--", "cat", "/proc/1/cmdline").stdout.split("\0")
    return {word: value for word, value in pairwise(words) if word.startswith("--")}


def ask(product: Product) -> tuple[str, dict[str, Any]]:
    """The greedy answer to PROMPT, and what it says of itself: usage.hat."""
    messages = [{"role": "user", "content": PROMPT}]
    body = {"model": NAME, "messages": messages, "max_tokens": TOKENS, "temperature": 0}
    answer = product.ask(NAME, "/v1/chat/completions", body, timeout_s=200)
    return str(answer["choices"][0]["message"]["content"]), answer["usage"]["hat"]


def test_the_answer_is_the_whole_models_and_was_drafted(product: Product, answers: dict[str, str]) -> None:
    text, told = ask(product)
    assert text == answers[PROMPT]
    assert told["draft_tokens"] > 0  # how many are in time for a cloud that decodes on, is a race
    assert told["accepted_tokens"] <= told["draft_tokens"]
    assert told["uplink_bytes"] < 10_000, "hidden states of the prompt alone would be more"


def test_each_side_runs_what_its_field_says(product: Product, answers: dict[str, str]) -> None:
    cloud, device = options(product, product.cloud, TEAM), options(product, product.edge, SITE_NAMESPACE)
    assert cloud["--mode"] == device["--mode"] == "picospec"
    assert (device["--max-draft"], device["--sampler"]) == ("4", "coupled")
    assert device["--model"] == device["--draft-model"]
    metrics = product.call(
        product.cloud, f"http://{one_pod(product, product.cloud, TEAM)['status']['podIP']}:7071/metrics"
    )
    (model,) = [line for line in str(metrics).splitlines() if line.startswith("hat_model_info{")]
    assert 'layers="0:30"' in model


def test_a_draft_model_from_a_claim_leaves_the_cloud_alone(
    product: Product, answers: dict[str, str], tmp_path: Path
) -> None:
    """As at a site without internet."""
    from hat_runtime.model.draft_model import prepare_draft_model

    prepare_draft_model("default", tmp_path / "small")
    make_claim(product.edge, SITE_NAMESPACE, "drafts", tmp_path)
    replica = one_pod(product, product.cloud, TEAM)["metadata"]["uid"]
    claim = {"claim": {"name": "drafts", "path": "small"}}
    product.patch(NAME, {"speculation": {"draftModel": claim, "maxDraft": 6, "window": 1}})
    product.wait_ready(NAME, READY_S)
    told = options(product, product.edge, SITE_NAMESPACE)
    assert (told["--draft-model"], told["--max-draft"], told["--window"]) == ("/model/small", "6", "1")
    assert fetching(one_pod(product, product.edge, SITE_NAMESPACE)) == []
    text, seen = ask(product)
    assert text == answers[PROMPT]
    assert 0 < seen["accepted_tokens"] <= seen["draft_tokens"]
    assert one_pod(product, product.cloud, TEAM)["metadata"]["uid"] == replica


def test_a_change_of_the_mode_rolls_the_cloud(product: Product, answers: dict[str, str]) -> None:
    before = product.hat(NAME)["status"]["cloud"]["revision"]
    product.patch(NAME, {"mode": "hat", "split": {"inputLayers": 3}, "speculation": None})
    product.wait_ready(NAME, READY_S)
    assert product.hat(NAME)["status"]["cloud"]["revision"] != before
    deployments = product.objects(product.cloud, TEAM, "deployments", f"hat.dev/deployment={NAME}")
    assert len(deployments) == 1, "the old revision is gone"
    text, told = ask(product)
    assert text == answers[PROMPT]
    assert told["uplink_bytes"] > 10_000
