"""The codecs of the uplink: fixed sizes, bounded errors, and nothing hidden that is not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hat_runtime.errors import UsageError
from hat_runtime.wire.codec import CODECS, CodecChoice, RowCodec, codec_named, decode, encode, row_bytes
from hat_runtime.wire.dtypes import from_bfloat16, to_bfloat16
from hat_runtime.wire.int4 import Int4
from hat_runtime.wire.outliers import Outliers

SIZES = (1, 7, 32, 64, 65, 576, 4096)
DTYPES = (torch.float32, torch.bfloat16)
LOSSY = ("bf16", "int8", "int4")


def rows(n: int, hidden_size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal values, some channels of each row far larger."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, hidden_size, generator=random)
    for row in hidden:
        large = torch.randint(hidden_size, (max(1, hidden_size // 16),), generator=random)
        row[large[:4]] *= 3000
    return hidden.to(dtype)


def through(codec: RowCodec, hidden: torch.Tensor) -> torch.Tensor:
    payload = codec.encode(hidden)
    n, hidden_size = hidden.shape
    assert len(payload) == n * codec.row_bytes(hidden_size, hidden.dtype)
    decoded = codec.decode(payload, n, hidden_size, hidden.dtype)
    assert (decoded.dtype, decoded.shape) == (hidden.dtype, hidden.shape)
    return decoded


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("raw", {1: 4, 7: 28, 64: 256, 576: 2304, 4096: 16384}),
        ("bf16", {1: 2, 7: 14, 64: 128, 576: 1152, 4096: 8192}),
        ("int8", {1: 5, 7: 11, 32: 60, 64: 116, 576: 628, 4096: 4148}),
        ("int4", {1: 3, 7: 6, 32: 42, 64: 82, 576: 354, 4096: 2224}),
    ],
)
def test_bytes_of_a_row(name: str, sizes: dict[int, int]) -> None:
    """Part of the protocol: another layout needs another name."""
    codec = codec_named(name)
    assert {size: codec.row_bytes(size, torch.float32) for size in sizes} == sizes


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("hidden_size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_stands_for_itself(name: str, hidden_size: int, dtype: torch.dtype) -> None:
    """The bytes of a row are the same alone, in a batch, and from a view of a larger tensor."""
    codec = codec_named(name)
    hidden = rows(5, hidden_size, dtype)
    payload, size = codec.encode(hidden), codec.row_bytes(hidden_size, dtype)
    for i in range(5):
        assert codec.encode(hidden[i : i + 1]) == payload[i * size : (i + 1) * size]
    wide = torch.cat([hidden, hidden], dim=1)
    assert codec.encode(wide[:, :hidden_size]) == payload
    assert through(codec, hidden[:0]).shape == (0, hidden_size)


@pytest.mark.parametrize("hidden_size", SIZES)
def test_raw_and_bf16_of_bfloat16_are_lossless(hidden_size: int) -> None:
    for name, dtype in (("raw", torch.float32), ("raw", torch.bfloat16), ("bf16", torch.bfloat16)):
        hidden = rows(9, hidden_size, dtype)
        assert torch.equal(through(codec_named(name), hidden), hidden)
    assert encode(hidden) == codec_named("raw").encode(hidden)
    assert torch.equal(decode(encode(hidden), 9, hidden_size, torch.bfloat16), hidden)
    assert row_bytes(hidden_size, torch.bfloat16) == 2 * hidden_size


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_bfloat16_is_rounded_as_torch_does(values: list[float]) -> None:
    array = np.array(values, np.float32)
    ours = from_bfloat16(to_bfloat16(array))
    assert np.array_equal(ours, torch.from_numpy(array).bfloat16().float().numpy(), equal_nan=True)


@pytest.mark.parametrize("hidden_size", SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_int8_is_off_by_half_a_scale_at_most(hidden_size: int, seed: int) -> None:
    hidden = rows(20, hidden_size, seed=seed)
    decoded = through(codec_named("int8"), hidden)
    count = min(8, hidden_size // 8)
    magnitudes = hidden.abs().sort(dim=1, descending=True)
    half = magnitudes.values[:, count : count + 1] / 127 / 2
    assert ((decoded - hidden).abs() <= half * 1.001).all()
    apart = magnitudes.indices[:, :count]
    assert torch.equal(decoded.gather(1, apart), hidden.gather(1, apart))


@pytest.mark.parametrize("hidden_size", SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_int4_is_off_by_a_scale_of_its_group_at_most(hidden_size: int, seed: int) -> None:
    hidden = rows(20, hidden_size, seed=seed)
    decoded = through(codec_named("int4"), hidden)
    count = min(8, hidden_size // 8)
    apart = hidden.abs().topk(count, dim=1).indices
    assert torch.equal(decoded.gather(1, apart), hidden.gather(1, apart))
    rest = hidden.scatter(1, apart, 0.0)
    errors = (decoded - hidden).abs()
    for first in range(0, hidden_size, 64):
        # Half a step, a whole one at the end of the range that has one level less; the scale is a bfloat16.
        scale = rest[:, first : first + 64].abs().amax(dim=1, keepdim=True) / 8
        assert (errors[:, first : first + 64] <= scale * 1.04).all()


def test_int8_by_hand() -> None:
    """8 elements: one outlier; scale 2 / 127."""
    hidden = torch.tensor([[0.0, 2.0, -1.0, 1000.0, 0.5, -2.0, 1.0, 0.1]])
    payload = codec_named("int8").encode(hidden)
    assert np.frombuffer(payload[:4], "<f4") == np.float32(2) / np.float32(127)
    assert np.frombuffer(payload[4:6], "<u2") == 3
    assert np.frombuffer(payload[6:10], "<f4") == 1000
    assert list(np.frombuffer(payload[10:], "i1")) == [0, 127, -64, 0, 32, -127, 64, 6]


def test_int4_by_hand() -> None:
    """The largest magnitude, -4, becomes level -8; two elements a byte, the first below; 7 elements, 4 bytes."""
    hidden = torch.tensor([[-4.0, 3.5, 0.5, 0.0, -1.0, 1.4, 4.0]])
    payload = codec_named("int4").encode(hidden)
    assert from_bfloat16(np.frombuffer(payload[:2], "<u2")) == 0.5
    levels = [byte >> shift & 15 for byte in payload[2:] for shift in (0, 4)]
    assert [level - 8 for level in levels] == [-8, 7, 1, 0, -2, 3, 7, 0]


@given(st.data())
def test_any_finite_row_comes_back_near(data: st.DataObject) -> None:
    """Zeros, ties, the smallest and large magnitudes included."""
    name = data.draw(st.sampled_from(LOSSY))
    size = data.draw(st.integers(1, 150))
    value = st.one_of(st.floats(-(2.0**100), 2.0**100, width=32), st.sampled_from([0.0, -0.0, 1e-45, 1.0]))
    hidden = torch.tensor([data.draw(st.lists(value, min_size=size, max_size=size))])
    decoded = through(codec_named(name), hidden)
    step = {"bf16": 2**-8, "int8": 1 / 250, "int4": 1 / 7}[name]
    assert ((decoded - hidden).abs() <= hidden.abs().max() * step + 1e-37).all()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("hidden_size", SIZES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_what_is_not_finite_stays_so(name: str, hidden_size: int, bad: float, share: float) -> None:
    """One value, as many as there is room for among the outliers, and all of them."""
    hidden = rows(4, hidden_size)
    hidden[1, : max(1, round(share * hidden_size))] = bad
    hidden[3, hidden_size - 1] = bad
    finite = through(codec_named(name), hidden).isfinite().all(dim=1)
    assert finite.tolist() == [True, False, True, False]


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_that_is_not_finite_gives_no_finite_values(name: str, dtype: torch.dtype) -> None:
    codec = codec_named(name)
    payload = bytearray(codec.encode(torch.zeros(1, 7, dtype=dtype)))
    bad = b"\x00\x00\xc0\x7f" if name == "int8" else b"\xc0\x7f"
    payload[: len(bad)] = bad
    assert not codec.decode(payload, 1, 7, dtype).isfinite().any()


@pytest.mark.parametrize("name", ["int8", "int4"])
@given(data=st.binary(min_size=628 * 2, max_size=628 * 2))
def test_any_bytes_are_decoded_or_refused(name: str, data: bytes) -> None:
    codec = codec_named(name)
    payload = data[: 2 * codec.row_bytes(576, torch.float32)]
    body = {"int8": 4, "int4": 18}[name]
    indices = np.frombuffer(payload, np.uint8).reshape(2, -1)[:, body : body + 16].copy().view("<u2")
    if (indices < 576).all():
        assert codec.decode(payload, 2, 576, torch.float32).shape == (2, 576)
    else:
        with pytest.raises(ValueError, match="payload has an outlier at element"):
            codec.decode(payload, 2, 576, torch.float32)


@pytest.mark.parametrize("name", CODECS)
def test_a_wrong_size_is_refused(name: str) -> None:
    codec = codec_named(name)
    payload = codec.encode(rows(3, 64))
    for wrong in (payload[:-1], payload + b"\0", b""):
        with pytest.raises(ValueError, match=f"payload has {len(wrong)} bytes, but n=3 rows of 64 x float32"):
            codec.decode(wrong, 3, 64, torch.float32)


def test_a_size_beyond_the_index_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden_size 65537 is more than 65536"):
        codec_named("int8").row_bytes(65537, torch.float32)


def test_other_settings_have_sizes_of_their_own() -> None:
    codec = Int4(group=128, outliers=Outliers(0))
    hidden = rows(6, 576)
    assert codec.row_bytes(576, torch.float32) == 5 * 2 + 288
    assert through(codec, hidden).shape == (6, 576)


def test_the_choice_on_the_command_line() -> None:
    assert CodecChoice.parse("raw", "--x").names == ("raw",)
    assert CodecChoice.parse("int8", "--x") == CodecChoice("int8", "raw")
    assert CodecChoice.parse("int4,bf16", "--x") == CodecChoice("int4", "bf16")
    for text, message in (
        ("zip", "--x 'zip': codec 'zip' is none of raw, bf16, int8, int4"),
        ("int8,", "--x 'int8,': codec '' is none of raw"),
        ("", "--x '': codec '' is none of raw"),
        ("raw,raw,raw", "--x 'raw,raw,raw': write PROMPT or PROMPT,DECODE"),
    ):
        with pytest.raises(UsageError) as raised:
            CodecChoice.parse(text, "--x")
        assert message in str(raised.value)
