"""HatDeployments that are nearly right: fields drawn by the CRD's own schema, at its bounds and beyond them."""

from __future__ import annotations

import copy
import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tests.fuzz.http import ODD

WORDS = [
    "",
    "a",
    "default",
    "org/model",
    "a" * 12,
    "a" * 63,
    "b" * 200,
    "c" * 600,
    "0.1.0",
    "r36.4",
    "site-2",
    "Exists",
    "4Gi",
    "500m",
    "0.5",
    "1e3",
    "1e18",
    "9" * 30,
    "99999999Ei",
    "+.5k",
    "10.0.0.1",
    "2001:db8::1",
    "cloud.example.com",
    "registry.example.com:5000/hat/cloud@sha256:" + "0" * 64,
    "-",
    "--help",
    "$(HOME)",
    "$$(X)",
    "a b",
    "a\nb",
    "a'; id; '",
    "`id`",
    "../x",
    "x/../y",
    "/etc",
    "sub/folder",
    "\x00",
    "é\u202e",
    "\U0001f642",
    "{ip}",
    "%s",
    "null",
    "true",
    "10",
]
KEYS = [
    "cpu",
    "memory",
    "ephemeral-storage",
    "nvidia.com/gpu",
    "hat.dev/device",
    "hat.dev/x",
    "zone",
    "a b",
    "",
    "k" * 400,
]

Schema = Mapping[str, Any]


class Deployments:
    """Mutations of HatDeployments.

    Args:
        seed: of everything that is drawn.
        schema: of a HatDeployment.
        right: such that are valid.
    """

    def __init__(self, seed: int, schema: Schema, right: Sequence[Mapping[str, Any]]) -> None:
        self.rng = random.Random(seed)
        self.schema = schema
        self.right = right

    def next(self) -> dict[str, Any]:
        """One object; about half of them are still valid."""
        body = copy.deepcopy(dict(self.rng.choice(self.right)))
        for _ in range(self.rng.choice([1, 1, 2, 3, 6])):
            self.change(self.schema["properties"]["spec"], body["spec"])
        if self.rng.random() < 0.03:
            body["metadata"]["name"] = self.rng.choice(WORDS)
        return body

    def change(self, schema: Schema, place: Any) -> None:
        """Draw one field anywhere below `place` anew."""
        rng = self.rng
        while isinstance(place, dict) and schema.get("properties"):
            name = rng.choice(list(schema["properties"]))
            below = schema["properties"][name]
            if below.get("properties") and isinstance(place.get(name, {}), dict) and rng.random() < 0.85:
                place, schema = place.setdefault(name, {}), below
                continue
            if rng.random() < 0.08 and name in place:
                del place[name]
            elif rng.random() < 0.04:
                place[name] = copy.deepcopy(rng.choice(ODD))
            else:
                place[name] = self.drawn(below)
            return

    def drawn(self, schema: Schema) -> Any:
        """A value, mostly one that the schema allows by itself."""
        rng = self.rng
        if schema.get("x-kubernetes-int-or-string"):
            return rng.choice([rng.choice([0, 1, 64, 2**31, 2**63 - 1, -1]), self.word(schema)])
        if "enum" in schema:
            return rng.choice([*schema["enum"], *schema["enum"], "other"])
        match schema["type"]:
            case "boolean":
                return rng.random() < 0.5
            case "string":
                return self.word(schema)
            case "integer" | "number":
                return self.number(schema)
            case "array":
                count = rng.choice([0, 1, 2, 3, schema["maxItems"], schema["maxItems"] + 1])
                return [self.drawn(schema["items"]) for _ in range(count)]
        if "additionalProperties" in schema:
            count = rng.choice([0, 1, 2, 2, 40])
            return {rng.choice(KEYS): self.drawn(schema["additionalProperties"]) for _ in range(count)}
        required = schema.get("required", ())
        return {
            name: self.drawn(below)
            for name, below in schema.get("properties", {}).items()
            if rng.random() < (0.97 if name in required else 0.4)
        }

    def word(self, schema: Schema) -> str:
        """A string, in nine of ten cases one that fits."""
        fits = [
            word
            for word in WORDS
            if re.search(schema.get("pattern", ""), word)
            and schema.get("minLength", 0) <= len(word) <= schema.get("maxLength", 600)
        ]
        return self.rng.choice(fits if fits and self.rng.random() < 0.9 else WORDS)

    def number(self, schema: Schema) -> float:
        """A number within the bounds, at them or just outside."""
        rng = self.rng
        least, most = schema["minimum"], schema.get("maximum", 2**31 - 1)
        inside = rng.randint(math.ceil(least), most)
        return rng.choice([inside, inside, least, most, least - 1, most + 1, inside + 0.5])
