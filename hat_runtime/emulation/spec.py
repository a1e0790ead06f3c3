"""What `--link RATE,RTT[,JITTER]` means."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hat_runtime.errors import UsageError

_RATE_UNITS = {
    "bit": 1 / 8,
    "kbit": 1e3 / 8,
    "mbit": 1e6 / 8,
    "gbit": 1e9 / 8,
    "B": 1.0,
    "kB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
}
_TIME_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_NUMBER_AND_UNIT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]+)(?:/s)?")

MIN_RATE_BYTES_PER_S = 1e3 / 8
MAX_RATE_BYTES_PER_S = 100e9 / 8
MAX_TIME_S = 60.0


@dataclass(frozen=True)
class LinkSpec:
    """A link between device and cloud, alike in both directions."""

    rate_bytes_per_s: float
    """Payload bytes a second, each way."""
    rtt_s: float
    """Round-trip time of an empty message, seconds; half of it each way."""
    jitter_s: float = 0.0
    """Up to this much is added to the delay of each direction, evenly at random; order is kept."""

    @classmethod
    def parse(cls, text: str, option: str = "--link") -> LinkSpec:
        """ "RATE,RTT[,JITTER]" -> LinkSpec.

        Args:
            text: RATE with kbit, mbit or gbit (bits a second) or kB, MB, GB (bytes a second), with or without "/s";
                RTT and JITTER with us, ms or s. "60mbit,20ms" or "7.5MB/s,0.02s,5ms".
            option: what the error text calls this value.

        Raises:
            UsageError: echoes the part that is wrong.
        """
        fields = text.split(",")
        if len(fields) not in (2, 3):
            raise UsageError(
                f"{option}: {text!r} is not RATE,RTT or RATE,RTT,JITTER (for example 60mbit,20ms or 60mbit,20ms,5ms)"
            )
        rate = _quantity(fields[0], _RATE_UNITS, f"{option} {text!r}: rate", "60mbit or 7.5MB/s")
        if not MIN_RATE_BYTES_PER_S <= rate <= MAX_RATE_BYTES_PER_S:
            raise UsageError(
                f"{option} {text!r}: rate {fields[0].strip()!r} is not between 1kbit and 100gbit"
            )
        times = []
        for field, name in zip(fields[1:], ("round-trip time", "jitter"), strict=False):
            seconds = _quantity(field, _TIME_UNITS, f"{option} {text!r}: {name}", "20ms")
            if seconds > MAX_TIME_S:
                raise UsageError(
                    f"{option} {text!r}: {name} {field.strip()!r} is more than {MAX_TIME_S:.0f} s"
                )
            times.append(seconds)
        return cls(rate, *times)

    def __str__(self) -> str:
        """The form that `parse` reads, with nothing lost."""
        text = f"{self.rate_bytes_per_s * 8 / 1e6:.12g}mbit,{self.rtt_s * 1e3:.12g}ms"
        return f"{text},{self.jitter_s * 1e3:.12g}ms" if self.jitter_s else text

    def describe(self) -> str:
        """For people: "60 Mbit/s, 20 ms round trip"."""
        jitter = f", up to {self.jitter_s * 1e3:g} ms jitter each way" if self.jitter_s else ""
        return f"{self.rate_bytes_per_s * 8 / 1e6:.4g} Mbit/s, {self.rtt_s * 1e3:.4g} ms round trip{jitter}"


def _quantity(text: str, units: dict[str, float], what: str, example: str) -> float:
    """A number with its unit. The unit is never guessed: "Mb" could be bits or bytes and is refused."""
    match = _NUMBER_AND_UNIT.fullmatch(text.strip())
    if match is not None:
        unit = match[2] if match[2].endswith("B") else match[2].lower()
        factor = (
            units.get(unit)
            or units.get(unit[:1].upper() + unit[1:])
            or units.get(unit[:1].lower() + unit[1:])
        )
        if factor is not None and not unit.endswith("b"):
            return float(match[1]) * factor
    raise UsageError(
        f"{what} {text.strip()!r} is not a number with a unit ({', '.join(units)}), such as {example}"
    )
