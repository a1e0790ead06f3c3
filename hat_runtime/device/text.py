"""From token ids to text while an answer is being generated.

tokenizers' own DecodeStream is not used: it has no flush at the end of an answer, holds back the good characters in
front of a broken one, and raises "Invalid prefix" when a run of byte-fallback tokens turns out not to be UTF-8.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hat_runtime.errors import ModelError

REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are not UTF-8."""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MAX_INCOMPLETE_BYTES = 3


class Detokenizer:
    """What has to be known of a tokenizer to turn its ids into text one by one.

    Args:
        tokenizer: a transformers tokenizer that is backed by the `tokenizers` package.

    Raises:
        ModelError: the tokenizer is written in Python only.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or not hasattr(backend, "get_added_tokens_decoder"):
            raise ModelError(
                f"the tokenizer {type(tokenizer).__name__} has no fast form (tokenizer.json), "
                "which the device needs to stream text"
            )
        self._backend = backend
        special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        # Without special tokens and the numbers that no token has: embeddings are often padded beyond the vocabulary.
        self.text_ids = frozenset(backend.get_vocab().values()) - special
        # Only such a decoder turns a whole run of byte tokens into replacement characters when one byte is wrong.
        self.byte_ids = (
            frozenset(i for token, i in backend.get_vocab().items() if _BYTE_TOKEN.fullmatch(token))
            if "ByteFallback" in str(backend.decoder)
            else frozenset()
        )

    def decode(self, ids: Sequence[int]) -> str:
        """All ids at once, special tokens left out."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def stream(self, stop: Iterable[str] = ()) -> StreamingText:
        """A new answer, which ends before the first of the `stop` strings."""
        return StreamingText(self, stop)

    def marked_stream(self, stop: Iterable[str] = ()) -> MarkedText:
        """The same, with the kind of every token."""
        return MarkedText(self, stop)


class StreamingText:
    """The text of one answer, piece by piece.

    The pieces joined are `Detokenizer.decode(all ids)`, cut before the first stop string; a tail of bytes that are
    not (yet) a character is left out. A piece never ends within a character.
    """

    def __init__(self, detokenizer: Detokenizer, stop: Iterable[str] = ()) -> None:
        self._characters = _CharacterStream(detokenizer)
        self._stop = _StopStrings(tuple(stop))

    @property
    def stopped(self) -> bool:
        """A stop string was found: no more text will come."""
        return self._stop.found

    def feed(self, token_id: int) -> str:
        """The text that is certain after this token: "" while a character or a stop string may be incomplete."""
        return self._stop.feed(self._characters.feed(token_id))

    def finish(self) -> str:
        """The text that was held back, at the end of the answer."""
        return self._stop.feed(self._characters.finish()) + self._stop.finish()


@dataclass
class TokenText:
    """A token's part of the text: the characters that it completed, "" where it completed none or they were cut."""

    text: str
    kind: str


class MarkedText:
    """The text of StreamingText, token by token: every token comes out once, in order.

    A token comes out when all its characters are certain, one without characters together with the next that has some.
    """

    def __init__(self, detokenizer: Detokenizer, stop: Iterable[str] = ()) -> None:
        self._characters = _CharacterStream(detokenizer)
        self._stop = _StopStrings(tuple(stop))
        self._waiting: deque[TokenText] = deque()
        self._newest = TokenText("", "")
        self._certain = 0  # leading characters of those that wait

    @property
    def stopped(self) -> bool:
        """A stop string was found: no more text will come."""
        return self._stop.found

    def feed(self, token_id: int, kind: str) -> list[TokenText]:
        """The tokens whose text is certain after this one."""
        self._newest = TokenText(self._characters.feed(token_id), kind)
        self._waiting.append(self._newest)
        self._certain += len(self._stop.feed(self._newest.text))
        return self._take_certain()

    def skip(self, kind: str) -> None:
        """A token that is no text, as the one that ends an answer."""
        self._waiting.append(TokenText("", kind))

    def finish(self) -> list[TokenText]:
        """The tokens that were held back, at the end of the answer."""
        held = self._characters.finish()
        self._newest.text += held  # bytes are held back until the token after them, so this one still waits
        self._certain += len(self._stop.feed(held) + self._stop.finish())
        out = list(self._waiting)
        self._waiting.clear()
        for token in out:
            token.text = token.text[: self._certain]
            self._certain -= len(token.text)
        return out

    def _take_certain(self) -> list[TokenText]:
        out: list[TokenText] = []
        for count, token in enumerate(list(self._waiting), start=1):
            if len(token.text) > self._certain:
                break
            if token.text:
                self._certain -= len(token.text)
                out += [self._waiting.popleft() for _ in range(count - len(out))]
        return out


class _CharacterStream:
    """Ids to whole characters.

    `_window` holds the ids of the last text that came out, as context (decoders treat the first token of a text
    differently), and the ids since then; `_sent` characters of its text are out.
    """

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self._window: list[int] = []
        self._context = 0
        self._sent = 0

    def feed(self, token_id: int) -> str:
        if token_id not in self._detokenizer.text_ids:
            return ""
        self._window.append(token_id)
        if token_id in self._detokenizer.byte_ids:
            return ""  # the bytes after it decide whether it is text: wait for the end of the run
        text = self._detokenizer.decode(self._window)
        if text.endswith(REPLACEMENT):
            return self._emit(text[:-1])
        piece = self._emit(text)
        self._window = self._window[self._context :]
        self._context = len(self._window)
        self._sent = len(self._detokenizer.decode(self._window))
        return piece

    def finish(self) -> str:
        """The longest text without a broken end, dropping at most the bytes of one character."""
        candidates = [self._window[: len(self._window) - cut] for cut in range(_MAX_INCOMPLETE_BYTES + 1)]
        texts = [self._detokenizer.decode(ids).rstrip(REPLACEMENT) for ids in candidates]
        return self._emit(max(texts, key=len))

    def _emit(self, text: str) -> str:
        piece = text[self._sent :]
        self._sent = max(self._sent, len(text))
        return piece


class _StopStrings:
    """Passes text on until one of the stop strings is complete, and holds back what may be the start of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        if "" in stops:
            raise ValueError(f"an empty stop string would stop every answer: {stops!r}")
        self._stops = stops
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        if self.found:
            return ""
        self._held += text
        # The stop string that is complete first, as if the text came character by character.
        hits = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if hits:
            self.found = True
            _, start = min(hits)
            return self._release(start)
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        return self._release(len(self._held) - keep)

    def finish(self) -> str:
        return "" if self.found else self._release(len(self._held))

    def _release(self, count: int) -> str:
        piece, self._held = self._held[:count], self._held[count:]
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
