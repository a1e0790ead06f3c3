"""The device's page in a real browser, over a device and a cloud that are processes of their own."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from hat_runtime.cli.processes import Child, Children, free_address, hat_command
from hat_runtime.emulation.link import EmulatedLink
from hat_runtime.emulation.spec import LinkSpec
from tests.runtime.browser import Watched, browser, watched
from tests.runtime.picospec_pair import perturbed
from tests.tiny_chat import make_tiny_chat_model

KINDS = ("accepted", "alternative", "corrected", "plain")
FIGURES = ("ttft", "tbt", "chunk", "uplink", "rtt", "acceptance")
WAIT_MS = 60_000.0
KEY = "a-key-for-the-page"


class World:
    """A cloud that can be killed and started again, a slow link, and a device."""

    def __init__(
        self, children: Children, model: Path, draft: Path, folder: Path, link: EmulatedLink, cloud: str
    ) -> None:
        self._children, self._cloud, self._http = children, cloud, free_address()
        self._common = ["--model", str(model), "--dtype", "float32"]
        keys = folder / "keys"
        keys.write_text(f"{KEY}\n")
        api = free_address()
        self.url = f"http://{api}/"
        self.cloud = self._start_cloud()
        command = hat_command("device", "serve", *self._common, "--listen", api, "--cloud", link.address)
        command += [
            "--drafter",
            f"model:{draft}",
            "--api-key-file",
            str(keys),
            "--chunk-tokens",
            "128",
            "--grace",
            "0",
        ]
        self.device = children.start("device", command)
        self.cloud.wait_ready(f"http://{self._http}/readyz", tick=self.device.check)
        self.device.wait_ready(f"{self.url}readyz", tick=self.cloud.check)

    def _start_cloud(self) -> Child:
        command = hat_command("cloud", "serve", *self._common, "--input-layers", "2", "--kv-memory", "0.1")
        return self._children.start("cloud", [*command, "--listen", self._cloud, "--http-listen", self._http])

    def kill_cloud(self) -> None:
        os.kill(self.cloud.pid, signal.SIGKILL)
        self.cloud.wait(10)

    def start_cloud_again(self) -> None:
        self.cloud = self._start_cloud()
        self.cloud.wait_ready(f"http://{self._http}/readyz")

    def stats(self) -> dict[str, Any]:
        reply = httpx.get(f"{self.url}v1/hat/stats", headers={"Authorization": f"Bearer {KEY}"})
        found: dict[str, Any] = reply.raise_for_status().json()
        return found


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def world(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("page")
    model = make_tiny_chat_model(folder / "tiny")
    draft = perturbed(model, folder / "draft", 0.01)
    cloud = free_address()
    with Children() as children, EmulatedLink(cloud, LinkSpec.parse("100mbit,10ms")) as link:
        yield World(children, model, draft, folder, link, cloud)


def opened(
    chromium: Browser, world: World, width: int = 1280, height: int = 800, longest: int = 12
) -> Watched:
    """The page, with the key given to it as a person does."""
    found = watched(chromium, world.url, width, height)
    page = found.page
    page.set_default_timeout(WAIT_MS)
    page.fill("#key", KEY)
    page.click("#key-form button")
    page.wait_for_selector("#cloud[data-state=ok]")
    expect(page.locator("#key-form")).to_be_hidden()
    page.click("summary")
    page.fill("#max-tokens", str(longest))
    page.click("summary")
    assert all(
        "401" in text for text in found.complaints
    )  # what the browser says of a reply that asks for the key
    found.complaints.clear()
    return found


def ask(page: Page, question: str, answers: int) -> None:
    """Ask, and wait until so many answers are complete."""
    page.fill("#question", question)
    page.press("#question", "Enter")
    expect(page.locator(".counts")).to_have_count(answers, timeout=WAIT_MS)


def points(page: Page) -> dict[str, int]:
    return {
        name: int(page.locator(f"[data-figure={name}] svg").get_attribute("data-points") or 0)
        for name in FIGURES
    }


def test_an_answer_streams_and_its_marks_match_the_counters(chromium: Browser, world: World) -> None:
    found = opened(chromium, world, longest=40)
    page = found.page
    lengths = page.evaluate(
        """() => { window.lengths = [];
            new MutationObserver(() => window.lengths.push(document.querySelectorAll('.answer .token').length))
              .observe(document.getElementById('log'), {childList: true, subtree: true}); return window.lengths; }"""
    )
    assert lengths == []
    ask(page, "The quick brown fox jumps over the lazy dog. " * 4, 1)
    grown = page.evaluate("window.lengths")
    assert len({length for length in grown if length}) > 5  # it came in pieces
    (answer,) = world.stats()["recent"]
    shown = {kind: page.locator(f".answer .token.{kind}").count() for kind in KINDS}
    assert sum(shown.values()) == answer["completion_tokens"]
    assert shown["accepted"] == answer["accepted_tokens"] > 0
    assert shown["alternative"] == answer["alternatives_accepted"]
    assert shown["alternative"] + shown["corrected"] == answer["refusals"] > 0
    for kind in KINDS:
        told = page.locator(f".counts [data-{kind}]")
        assert int(told.get_attribute(f"data-{kind}") or 0 if told.count() else 0) == shown[kind]
    styles = {
        page.locator(f"#legend .token.{kind}").evaluate(
            "e => { const s = getComputedStyle(e); return s.textDecorationLine + s.textDecorationStyle; }"
        )
        for kind in KINDS
    }
    assert len(styles) == len(KINDS)
    assert found.complaints == []
    page.context.close()


def test_the_next_question_sends_the_conversation_and_a_new_chat_forgets_it(
    chromium: Browser, world: World
) -> None:
    found = opened(chromium, world)
    page = found.page
    sent: list[list[dict[str, str]]] = []
    page.on(
        "request",
        lambda request: sent.append(request.post_data_json["messages"]) if request.post_data else None,
    )
    ask(page, "one two", 1)
    text = page.locator(".answer").inner_text()
    ask(page, "three", 2)
    page.click("#new")
    ask(page, "four", 1)
    assert [[message["role"] for message in messages] for messages in sent] == [
        ["user"],
        ["user", "assistant", "user"],
        ["user"],
    ]
    assert sent[1][1]["content"].split() == text.split()
    assert found.complaints == []
    page.context.close()


def test_plots_move_and_nothing_is_asked_of_others(chromium: Browser, world: World) -> None:
    found = opened(chromium, world)
    page = found.page
    ask(page, "one two three four five six seven eight " * 20, 1)
    page.wait_for_function(
        "names => names.every(n => +document.querySelector(`[data-figure=${n}] svg`).dataset.points > 0)",
        arg=list(FIGURES),
    )
    before = points(page)
    ask(page, "nine", 2)
    page.wait_for_function(
        "before => Object.entries(before).every(([n, count]) => "
        "+document.querySelector(`[data-figure=${n}] svg`).dataset.points > count)",
        arg=before,
    )
    drawn = page.locator("[data-figure=rtt] .measured").get_attribute("points") or ""
    assert len(drawn.split()) > before["rtt"]
    assert page.locator("[data-figure=chunk] .value").inner_text() == "128 tokens"
    assert found.hosts == {world.url.split("/")[2]}
    assert found.complaints == []
    page.context.close()


def test_a_phone_needs_no_sideways_scrolling(chromium: Browser, world: World) -> None:
    found = opened(chromium, world, 390, 844)
    page = found.page
    ask(page, "x" * 300, 1)
    for selector in ("html", "body", "#log"):
        wide = page.locator(selector).evaluate("e => e.scrollWidth - e.clientWidth")
        assert wide <= 0, selector
    for selector in ("#question", "#send", "#log", "[data-figure=acceptance]"):
        box = page.locator(selector).bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
        assert box["y"] + box["height"] <= 844
    assert found.complaints == []
    page.context.close()


def test_it_survives_the_cloud_going_away_and_back(chromium: Browser, world: World) -> None:
    found = opened(chromium, world)
    page = found.page
    ask(page, "one two", 1)
    world.kill_cloud()
    expect(page.locator("#trouble")).to_contain_text("The cloud does not answer", timeout=WAIT_MS)
    page.fill("#question", "three four")
    page.press("#question", "Enter")
    error = page.locator(".message.error")
    expect(error).to_be_visible(timeout=WAIT_MS)
    assert "cloud" in error.inner_text()
    expect(page.locator("#question")).to_have_value("three four")  # to be sent again
    assert page.locator("#send").is_enabled()
    assert all("503" in text for text in found.complaints)
    found.complaints.clear()
    world.start_cloud_again()
    page.wait_for_selector("#cloud[data-state=ok]")
    expect(page.locator("#trouble")).to_be_hidden()
    page.press("#question", "Enter")
    expect(page.locator(".counts")).to_have_count(2, timeout=WAIT_MS)
    assert found.complaints == []
    page.context.close()
