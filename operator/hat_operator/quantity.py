"""Kubernetes quantities in the one form in which the API server writes them back.

"0.5" is stored as "500m", and "2048Mi" as "2Gi": anything else would look changed at every look.
"""

from __future__ import annotations

import re
from decimal import Decimal, localcontext

_FORM = re.compile(r"^([+-]?(?:\d+\.?\d*|\.\d+))(|[numkMGTPE]|[KMGTPE]i|[eE][+-]?\d+)$")
_DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5, "Ei": 6}
_LONGEST = 64
"""Characters of a quantity that is read; with room for its exponent it fits Decimal's precision."""
_MOST = 2**63 - 1
"""The API server writes anything larger back as this."""


def canonical(value: str | int) -> str:
    """The API server's form of a quantity.

    Raises:
        ValueError: it is not a quantity, is negative, or is more than Kubernetes can hold.
    """
    text = str(value).strip()
    match = _FORM.match(text) if len(text) <= _LONGEST else None
    if match is None or text.startswith("-"):
        raise ValueError(f"{text[:_LONGEST]!r} is not a quantity (for example 500m or 4Gi)")
    with localcontext(prec=2 * _LONGEST):
        return _canonical(text, Decimal(match[1]), match[2])


def _canonical(value: str, number: Decimal, suffix: str) -> str:
    if suffix in _BINARY:
        amount = _held(value, number * 1024 ** _BINARY[suffix])
        if amount >= 1024 and amount == amount.to_integral_value():
            return (
                _shortest(int(amount) // 1024, 1024, list(_BINARY))
                if amount % 1024 == 0
                else str(int(amount))
            )
        return _decimal(amount)
    if suffix[:1] in ("e", "E") and len(suffix) > 1:
        exponent = int(suffix[1:])
        if abs(exponent) > 18:
            raise ValueError(f"{value!r} is not a quantity that Kubernetes can hold")
        amount = _held(value, number.scaleb(exponent))
        text = _decimal(amount)
        power = _DECIMAL[text.lstrip("0123456789")]
        return text.rstrip("numkMGTPE") + (f"e{power}" if power else "")
    return _decimal(_held(value, number.scaleb(_DECIMAL[suffix])))


def _held(value: str, amount: Decimal) -> Decimal:
    if amount > _MOST:
        raise ValueError(f"{value!r} is not a quantity that Kubernetes can hold, at most {_MOST}")
    return amount


def _decimal(amount: Decimal) -> str:
    """In nanos at the finest, rounded up, with the largest suffix that leaves an integer."""
    nanos = int((amount.scaleb(9)).to_integral_value(rounding="ROUND_CEILING"))
    if nanos == 0:
        return "0"
    return _shortest(nanos, 1000, list(_DECIMAL))


def _shortest(amount: int, base: int, suffixes: list[str]) -> str:
    """`amount` of the first suffix's unit, in the largest unit that leaves an integer."""
    step = 0
    while step + 1 < len(suffixes) and amount % base == 0:
        amount //= base
        step += 1
    return f"{amount}{suffixes[step]}"
