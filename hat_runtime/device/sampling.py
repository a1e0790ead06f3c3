"""Choosing the next token: see hat_runtime.model.sampling, which the cloud of the token mode uses as well."""

from __future__ import annotations

from hat_runtime.model.sampling import (
    ACCEPT,
    DRAFT,
    RESIDUAL,
    SamplingParams,
    gumbel_noise,
    kept_scores,
    nucleus,
    sample,
    softmax,
    uniform_noise,
)

__all__ = [
    "ACCEPT",
    "DRAFT",
    "RESIDUAL",
    "SamplingParams",
    "gumbel_noise",
    "kept_scores",
    "nucleus",
    "sample",
    "softmax",
    "uniform_noise",
]
