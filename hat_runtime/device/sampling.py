"""Choosing the next token: see hat_runtime.model.sampling, which the cloud of the token mode uses as well."""

from __future__ import annotations

from hat_runtime.model.sampling import SamplingParams, gumbel_noise, nucleus, sample

__all__ = ["SamplingParams", "gumbel_noise", "nucleus", "sample"]
