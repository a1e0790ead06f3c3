"""The documents name what there is: metrics, commands, files, links."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry

from hat_operator import gauges
from hat_operator import metrics as operator_metrics
from hat_runtime.cli.main import build_parser
from hat_runtime.cloud.metrics import CloudMetrics
from hat_runtime.device.metrics import DeviceMetrics

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


CLAIM = re.compile(
    r"\b(private|privately|privacy|secure|securely|anonymous|end-to-end encrypt\w+"
    r"|(?:data|text|prompts?) (?:stays?|remains?|never leaves?)|(?:cannot|can't) (?:see|read) (?:the|your))\b",
    re.IGNORECASE,
)
DENIAL = re.compile(r"\b(no|not|never|nothing|nobody|neither|nor|without|cannot|misleads)\b", re.IGNORECASE)
OTHER_SENSES = re.compile(
    r"\bprivate (?:keys?|registry|registries|reporting|repository|repositories|network|to torch)\b",
    re.IGNORECASE,
)


def claims(text: str) -> list[str]:
    """Sentences that claim that the text is kept from the cloud; a sentence that denies it is none."""
    prose = re.sub(r"`[^`]*`|\]\([^)]*\)", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = []
    for paragraph in re.split(r"\n\s*\n|\n(?=[-*|#] ?)", prose):
        for sentence in re.split(r"(?<=[.!?:;])\s+", " ".join(paragraph.split())):
            rest = OTHER_SENSES.sub("", sentence)
            if CLAIM.search(rest) and not DENIAL.search(CLAIM.sub("", rest)):
                found.append(sentence)
    return found


def documented_metrics() -> set[str]:
    """The `hat_...` names of docs/operations.md; `_x` after one stands for its own first words and x."""
    names: set[str] = set()
    for line in (ROOT / "docs/operations.md").read_text().splitlines():
        first = ""
        for name in re.findall(r"`(hat_\w+|_\w+)(?:\{[^`]*\})?`", line):
            if name.startswith("hat_"):
                first = name
                names.add(name)
            else:
                names.update(first[: cut.start()] + name for cut in re.finditer("_", first))
    return names


@pytest.mark.parametrize("metrics", [CloudMetrics, DeviceMetrics])
def test_every_metric_is_documented(metrics: type[CloudMetrics] | type[DeviceMetrics]) -> None:
    registry = CollectorRegistry()
    metrics(registry)
    exported = {
        family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        for family in registry.collect()
    }
    assert exported - documented_metrics() == set()


def test_every_metric_of_the_operator_is_documented() -> None:
    assert gauges.DEVICES
    assert operator_metrics.WRITES
    exported = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in REGISTRY.collect()
        if family.name.startswith("hat_operator_")
    }
    assert len(exported) > 8
    assert exported - documented_metrics() == set()


def commands(parser: argparse.ArgumentParser, prefix: str = "hat") -> Iterator[str]:
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in below:
        for name, sub in action.choices.items():
            yield from commands(sub, f"{prefix} {name}")
    if not below:
        yield prefix


def test_every_command_has_an_example() -> None:
    usage = (ROOT / "docs/usage.md").read_text()
    assert [command for command in commands(build_parser()) if f"\n    {command}" not in usage] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_files_exist(document: Path) -> None:
    text = document.read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (document.parent / link).exists()] == []
    files = re.findall(r"`((?:hat_runtime|benchmarks|tests|scripts|docs)/[\w./-]+\.\w+)`", text)
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_modules_of_the_architecture_exist() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    modules = re.findall(
        r"`((?:cli|cloud|control|device|emulation|model|proto|security|wire)/[\w./]*)`", text
    )
    assert [module for module in modules if not (ROOT / "hat_runtime" / module).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_document_claims_privacy(document: Path) -> None:
    """What may be said is that text and token ids are not transmitted: hidden states reveal them (SECURITY.md)."""
    assert claims(document.read_text()) == []


@pytest.mark.parametrize(
    "claim",
    [
        "HAT keeps your prompts private.",
        "It offers enhanced privacy. It is not slow.",
        "Inference that is secure against the cloud.",
        "Your data stays on the device.",
        "The text never leaves the device.",
        "The cloud cannot read your prompt.",
        "| privacy | full |",
    ],
)
def test_a_claim_of_privacy_is_found(claim: str) -> None:
    assert claims(f"Some words before.\n\n{claim}") != []


@pytest.mark.parametrize(
    "text",
    [
        "**Not private.** Hidden states reveal it.",
        "It makes no claim of privacy: the cloud reads it.",
        "A private key.",
    ],
)
def test_a_denial_is_no_claim(text: str) -> None:
    assert claims(text) == []


def test_hidden_states_are_said_to_reveal_the_text() -> None:
    for name in ("README.md", "SECURITY.md", "docs/architecture.md"):
        words = " ".join((ROOT / name).read_text().split())
        assert re.search(r"[Tt]ext and token ids are not transmitted", words), name
        assert re.search(
            r"hidden states (reveal|reconstruct)|recover the text|reconstructs the prompt", words
        ), name
