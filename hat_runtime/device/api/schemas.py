"""What the API takes, and how it says no.

Every parameter of OpenAI's API is either supported, refused by name unless it has its harmless default, or (ids and
labels of the client's own) ignored. Others are refused as unknown: a parameter is never dropped in silence.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from hat_runtime.device.api.errors import ApiError, echo
from hat_runtime.device.sampling import SamplingParams

MAX_STOPS = 4
MAX_PROMPTS = 128
MAX_COUNT = 2**31 - 1
"""Of tokens: far beyond any context, and still a number for everyone who reads it."""

_NEVER = object()
"""Equal to no value that a client can send."""

_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
_UNSUPPORTED_CHAT: dict[str, tuple[object, ...]] = _UNSUPPORTED | {
    "audio": (_NEVER,),
    "function_call": ("none",),
    "functions": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (_NEVER,),
    "prediction": (_NEVER,),
    "reasoning_effort": (_NEVER,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (_NEVER,),
    "web_search_options": (_NEVER,),
}
_UNSUPPORTED_TEXT: dict[str, tuple[object, ...]] = _UNSUPPORTED | {
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (_NEVER,),
    "suffix": ("",),
}
"""Parameters of OpenAI's API that this server does not support, with the values that ask for nothing."""

_IGNORED = {
    "metadata",
    "parallel_tool_calls",  # without tools it has no effect
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "user",
}
"""Labels of the client's own, and switches without effect here."""

Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]


@dataclass(frozen=True)
class AnswerOptions:
    """How to answer, whatever the form of the prompt."""

    max_tokens: int | None
    """None: up to the context's end."""
    sampling: SamplingParams
    stop: tuple[str, ...]
    chunk_tokens: int | None
    """None: the device's default; 0: the whole prompt at once."""
    stream: bool
    include_usage: bool


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: int | None = Field(None, ge=1, le=MAX_COUNT)
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    seed: Seed | None = None
    stop: list[str] = []
    stream: bool = False
    stream_options: _StreamOptions | None = None
    hat_chunk_tokens: int | None = Field(None, ge=0, le=MAX_COUNT)
    hat_token_kinds: bool = False

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
            raise _invalid("must be a string or a list of strings, none of them empty")
        if len(stops) > MAX_STOPS:
            raise _invalid(f"has {len(stops)} strings, but at most {MAX_STOPS} are allowed")
        return stops

    @model_validator(mode="after")
    def _consistent(self) -> _Request:
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400, "stream_options needs stream=true", param="stream_options", code="invalid_value"
            )
        return self

    def options(self) -> AnswerOptions:
        """The part that is the same for chat and text. Without a seed, every call gives another one."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return AnswerOptions(
            max_tokens=self.max_tokens,
            sampling=SamplingParams(float(self.temperature), float(self.top_p), seed),
            stop=tuple(self.stop),
            chunk_tokens=self.hat_chunk_tokens,
            stream=self.stream,
            include_usage=self.stream_options is not None and self.stream_options.include_usage,
        )


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, value: object) -> object:
        # Clients send their answers back with tool_calls=None, annotations=[] and the like.
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if key in cls.model_fields or item not in (None, [])}

    @field_validator("content", mode="before")
    @classmethod
    def _text_parts(cls, value: object) -> object:
        if not isinstance(value, list):
            return value
        texts = []
        for i, part in enumerate(value):
            kind = part.get("type") if isinstance(part, dict) else part
            if kind != "text":
                raise _invalid(f"part {i} is of type {echo(kind)}, but only text parts are supported")
            if not isinstance(part.get("text"), str):
                raise _invalid(f"part {i} has no text: {echo(part)}")
            texts.append(part["text"])
        return "\n".join(texts)


class ChatRequest(_Request):
    """Body of POST /v1/chat/completions."""

    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_COUNT)

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ApiError(
                    400,
                    f"max_tokens={self.max_tokens} and max_completion_tokens={self.max_completion_tokens} differ; "
                    "send one of them",
                    param="max_tokens",
                    code="invalid_value",
                )
            self.max_tokens = self.max_completion_tokens
        return self

    def conversation(self) -> list[dict[str, str]]:
        """The messages as chat templates take them. "developer" is OpenAI's newer word for "system"."""
        return [
            message.model_dump(exclude_none=True)
            | {"role": "system" if message.role == "developer" else message.role}
            for message in self.messages
        ]


class CompletionRequest(_Request):
    """Body of POST /v1/completions; `prompt` becomes a list with a text or token ids for each answer."""

    prompt: list[str | list[int]]

    @field_validator("prompt", mode="before")
    @classmethod
    def _list_of_prompts(cls, value: object) -> object:
        if isinstance(value, str) or (isinstance(value, list) and value and all(map(_is_int, value))):
            return [value]
        if not isinstance(value, list) or not value or not all(map(_is_prompt, value)):
            raise _invalid("must be a string, a list of strings, a list of token ids or a list of such lists")
        if len(value) > MAX_PROMPTS:
            raise _invalid(f"has {len(value)} prompts, but at most {MAX_PROMPTS} are allowed")
        return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_prompt(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(map(_is_int, value)))


R = TypeVar("R", bound=_Request)


def parse(kind: type[R], body: object) -> R:
    """Check a decoded JSON body.

    Raises:
        ApiError: 400, naming the parameters that are unsupported, unknown, missing or wrong.
    """
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, but is {echo(body)}", code="invalid_json")
    given = {name: value for name, value in body.items() if value is not None and name not in _IGNORED}
    unsupported = _UNSUPPORTED_CHAT if kind is ChatRequest else _UNSUPPORTED_TEXT
    refused = [name for name in given if name in unsupported and not _one_of(given[name], unsupported[name])]
    if refused:
        names = ", ".join(f"{name}={echo(given[name])}" for name in refused)
        raise ApiError(
            400, f"not supported by this server: {names}", param=refused[0], code="unsupported_parameter"
        )
    unknown = [name for name in given if name not in unsupported and name not in kind.model_fields]
    if unknown:
        raise ApiError(
            400, f"unknown parameters: {', '.join(unknown)}", param=unknown[0], code="unknown_parameter"
        )
    try:
        return kind.model_validate({name: given[name] for name in given if name not in unsupported})
    except ValidationError as error:
        raise _first_problem(error) from error


def _one_of(value: object, allowed: tuple[object, ...]) -> bool:
    return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in allowed)


def _first_problem(error: ValidationError) -> ApiError:
    problem = error.errors(include_url=False)[0]
    path = _path(problem["loc"])
    if problem["type"] == "missing":
        return ApiError(400, f"{path} is missing", param=path, code="missing_required_parameter")
    if problem["type"] == "extra_forbidden":
        text = f"{path} is not supported by this server"
        return ApiError(400, text, param=path, code="unsupported_parameter")
    reason = problem["msg"].replace("Input should", "should")
    return ApiError(400, f"{path}: {reason}, got {echo(problem['input'])}", param=path, code="invalid_value")


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path


def _invalid(reason: str) -> PydanticCustomError:
    # The reason is no template: it may hold braces.
    return PydanticCustomError("invalid_value", "{reason}", {"reason": reason})
