"""Streamed text is the decoded text, whatever the ids, and stop strings cut it exactly."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hat_runtime.device.chat import PromptEncoder
from hat_runtime.device.text import REPLACEMENT, Detokenizer, StreamingText
from hat_runtime.errors import ModelError, UsageError
from tests.tiny_chat import byte_fallback_tokenizer, byte_level_tokenizer, wrap

FALLBACK, LEVEL = wrap(byte_fallback_tokenizer()), wrap(byte_level_tokenizer())
KINDS = {"byte fallback": (FALLBACK, Detokenizer(FALLBACK)), "byte level": (LEVEL, Detokenizer(LEVEL))}
HARD = ["🙂", "👩‍👩‍👧", "é", "漢字", " ", "  x", "naïve", "\n", "�", "a"]


def run(text: StreamingText, ids: Sequence[int]) -> list[str]:
    return [text.feed(token) for token in ids] + [text.finish()]


@st.composite
def answers(draw: st.DrawFn, kind: str) -> list[int]:
    """Ids of real text, arbitrary ids (also beyond the vocabulary) and single bytes, in any mix."""
    tokenizer, _ = KINDS[kind]
    anything = st.lists(st.integers(0, len(tokenizer) + 2), max_size=4)
    real = st.sampled_from(HARD).map(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    return [token for part in draw(st.lists(st.one_of(real, real, anything), max_size=8)) for token in part]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_pieces_join_to_the_decoded_text(kind: str, data: st.DataObject) -> None:
    tokenizer, detokenizer = KINDS[kind]
    ids = data.draw(answers(kind))
    streamed = "".join(run(detokenizer.stream(), ids))
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    if whole.endswith(REPLACEMENT):
        # An unfinished tail is left out: replacement characters only, or the last bytes of a run.
        text_ids = [token for token in ids if token in detokenizer.text_ids]
        shorter = [tokenizer.decode(text_ids[: len(text_ids) - cut]) for cut in (1, 2, 3)]
        assert streamed in shorter or streamed.rstrip(REPLACEMENT) == whole.rstrip(REPLACEMENT)
    else:
        assert streamed == whole


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_never_end_within_a_character(kind: str) -> None:
    tokenizer, detokenizer = KINDS[kind]
    original = "Hi 🙂🙂 naïve 漢字 👩‍👩‍👧!"
    ids = tokenizer(original, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(original)  # characters are split over tokens
    for end in range(len(ids) + 1):  # also an answer that is cut off anywhere
        pieces = run(detokenizer.stream(), ids[:end])
        assert REPLACEMENT not in "".join(pieces)
        assert original.startswith("".join(pieces))
    assert "".join(run(detokenizer.stream(), ids)) == original


def test_text_comes_as_soon_as_it_is_certain() -> None:
    tokenizer, detokenizer = KINDS["byte level"]
    ids = tokenizer("one two three", add_special_tokens=False)["input_ids"]
    text = detokenizer.stream()
    assert [text.feed(token) for token in ids] == [tokenizer.decode([token]) for token in ids]


def test_special_tokens_and_numbers_without_a_token_are_no_text() -> None:
    for tokenizer, detokenizer in KINDS.values():
        a, b = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("fox", "dog"))
        ids = [1, *a, 2, len(tokenizer) + 1, *b, 3]
        assert "".join(run(detokenizer.stream(), ids)) == tokenizer.decode(a + b)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_stop_strings_cut_at_the_first_one_that_is_complete(kind: str, data: st.DataObject) -> None:
    _, detokenizer = KINDS[kind]
    ids = data.draw(answers(kind))
    whole = "".join(run(detokenizer.stream(), ids))
    parts = [whole[i : i + n] for i in range(len(whole)) for n in (1, 2, 3, 5) if whole[i : i + n]]
    choices = (
        st.one_of(st.sampled_from(parts), st.text(min_size=1, max_size=3)) if parts else st.text(min_size=1)
    )
    stops = data.draw(st.lists(choices, min_size=1, max_size=4))
    text = detokenizer.stream(stops)
    streamed = "".join(run(text, ids))
    # Character by character, as a reader would do it.
    for end in range(len(whole) + 1):
        if any(whole[:end].endswith(stop) for stop in stops):
            longest = max(len(stop) for stop in stops if whole[:end].endswith(stop))
            assert (streamed, text.stopped) == (whole[: end - longest], True)
            return
    assert (streamed, text.stopped) == (whole, False)


def test_a_stop_string_across_tokens_is_held_back_and_its_false_start_released() -> None:
    tokenizer, detokenizer = KINDS["byte level"]
    ids = tokenizer("a\n\nb\n\n\nc", add_special_tokens=False)["input_ids"]
    text = detokenizer.stream(["\n\n\n"])
    pieces = [text.feed(token) for token in ids]
    assert "".join(pieces) == "a\n\nb"
    assert text.stopped
    assert text.finish() == ""


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_every_token_is_told_once_with_its_part_of_the_text(kind: str, data: st.DataObject) -> None:
    _, detokenizer = KINDS[kind]
    ids = data.draw(answers(kind))
    ends = data.draw(st.booleans())
    whole = "".join(run(detokenizer.stream(), ids))
    parts = [whole[a:b] for a in range(len(whole)) for b in range(a + 1, a + 4)] or ["x"]
    stops = data.draw(st.lists(st.sampled_from(parts), max_size=2))
    plain, text = detokenizer.stream(stops), detokenizer.marked_stream(stops)
    told, seen = [], ""
    for number, token in enumerate(ids):
        pieces = text.feed(token, str(number))
        assert not pieces or pieces[-1].text  # never a piece without text before the end
        told += pieces
        seen += plain.feed(token)
        assert seen.startswith("".join(piece.text for piece in told))
    if ends:
        text.skip(str(len(ids)))
    told += text.finish()
    assert "".join(piece.text for piece in told) == seen + plain.finish()
    assert [piece.kind for piece in told] == [str(number) for number in range(len(ids) + ends)]
    assert text.stopped == plain.stopped


def test_a_token_that_completes_a_character_has_it_and_one_that_is_cut_has_its_beginning() -> None:
    tokenizer, detokenizer = KINDS["byte fallback"]
    text = detokenizer.marked_stream(["ox"])
    ids = tokenizer("é fox!", add_special_tokens=False)["input_ids"]
    told = [part for token in ids for part in text.feed(token, "k")] + text.finish()
    assert text.stopped
    assert len(told) == len(ids)
    assert "".join(part.text for part in told) == "é f"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty stop string"):
        KINDS["byte level"][1].stream([""])


def test_prompts_are_encoded_as_transformers_does() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 🙂 <|end|>"}]
    for tokenizer, _ in KINDS.values():
        encoder = PromptEncoder(tokenizer)
        chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert encoder.encode_chat(messages) == chat
        assert encoder.encode_text("The quick 🙂") == tokenizer("The quick 🙂")["input_ids"]


def test_truncation_of_the_tokenizer_file_is_not_applied_to_prompts() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(4)
    encoder = PromptEncoder(wrap(tokenizer))
    assert len(encoder.encode_text("one two three four five six seven")) > 4


def test_messages_without_template_or_refused_by_it_say_so() -> None:
    with pytest.raises(UsageError, match="An assistant cannot begin"):
        PromptEncoder(FALLBACK).encode_chat([{"role": "assistant", "content": "x"}])
    plain = wrap(byte_level_tokenizer())
    plain.chat_template = None
    with pytest.raises(UsageError, match="no chat template"):
        PromptEncoder(plain).encode_chat([{"role": "user", "content": "x"}])


def test_a_tokenizer_without_a_fast_form_is_refused() -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Detokenizer(object())
