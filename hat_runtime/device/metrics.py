"""What a device counts and times, for Prometheus. Names follow vLLM's habit with the prefix hat_."""

from __future__ import annotations

import math
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_TTFT_BUCKETS = (0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0)
_TBT_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

_TV_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


class DeviceMetrics:
    """The metrics of one device, in one registry. No prompt, token or hidden state is in any of them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "hat_requests",
            "Requests by how they ended: stop, length, cancelled or error.",
            ["finish_reason"],
            registry=registry,
        )
        self.prompt_tokens = Counter("hat_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.cached_prompt_tokens = Counter(
            "hat_cached_prompt_tokens",
            "Prompt tokens taken over from an earlier turn, not sent again.",
            registry=registry,
        )
        self.generation_tokens = Counter("hat_generation_tokens", "Tokens generated.", registry=registry)
        self.verify_rounds = Counter(
            "hat_verify_rounds", "Steps for which the cloud sent deep states back.", registry=registry
        )
        self.draft_tokens = Counter("hat_draft_tokens", "Tokens that the device guessed.", registry=registry)
        self.accepted_tokens = Counter(
            "hat_accepted_tokens", "Guessed tokens that the target agreed with.", registry=registry
        )
        self.alternatives = Counter(
            "hat_alternatives",
            "Other candidates for guessed tokens that were checked along with them.",
            registry=registry,
        )
        self.alternatives_accepted = Counter(
            "hat_alternatives_accepted", "Of these, tokens that the target agreed with.", registry=registry
        )
        self.rounds_ahead = Counter(
            "hat_rounds_ahead",
            "Rounds of drafts that left before the one before them was answered.",
            registry=registry,
        )
        self.drafts_ahead = Counter(
            "hat_drafts_ahead",
            "Tokens guessed while a round was checked, behind its last draft (tail) or another candidate (branch).",
            ("place",),
            registry=registry,
        )
        self.drafting = Gauge(
            "hat_drafting",
            "1 while the device drafts; 0 where there is no drafter, or drafts do not pay.",
            registry=registry,
        )
        self.topk_tv_bound = Histogram(
            "hat_topk_tv_bound",
            "Of each correction by sampler topk, 1 - mass(TopK): at most so far from the target's distribution.",
            buckets=_TV_BUCKETS,
            registry=registry,
        )
        self.evictions = Counter(
            "hat_session_evictions", "Times the cloud gave a session's KV cache to others.", registry=registry
        )
        self.session_resumes = Counter(
            "hat_session_resumes",
            "Sessions that went on after the cloud was lost, by cause: connection (the cloud still had the session), "
            "session (it was gone: uploaded again) or drain (the replica went away: uploaded to another one).",
            ["cause"],
            registry=registry,
        )
        for cause in ("connection", "session", "drain"):
            self.session_resumes.labels(cause)
        self.time_to_first_token = Histogram(
            "hat_time_to_first_token_seconds",
            "From the start of a request to its first token.",
            buckets=_TTFT_BUCKETS,
            registry=registry,
        )
        self.inter_token_latency = Histogram(
            "hat_inter_token_latency_seconds",
            "Between two tokens.",
            buckets=_TBT_BUCKETS,
            registry=registry,
        )
        self.offline_answers = Counter(
            "hat_offline_answers",
            "Answers of the small model alone, because the cloud was away (--offline draft-only).",
            registry=registry,
        )
        self.sessions_running = Gauge(
            "hat_num_sessions_running", "Requests being answered.", registry=registry
        )
        self.sessions_idle = Gauge(
            "hat_num_sessions_idle", "Conversations kept for their next turn.", registry=registry
        )
        self.uplink_bytes = Counter(
            "hat_uplink_bytes", "Bytes of messages sent to the cloud.", registry=registry
        )
        self.downlink_bytes = Counter(
            "hat_downlink_bytes", "Bytes of messages received from the cloud.", registry=registry
        )
        self.link_rtt = Gauge(
            "hat_link_rtt_seconds",
            "Round-trip time of a small Step without the cloud's work.",
            registry=registry,
        )
        self.link_uplink = Gauge(
            "hat_link_uplink_bytes_per_second",
            "Uplink rate, as prompt chunks told it; 0 until one did.",
            registry=registry,
        )
        self.contact_age = Gauge(
            "hat_cloud_contact_age_seconds",
            "Since the cloud answered a Step last; NaN before the first.",
            registry=registry,
        )
        self.contact_age.set(math.nan)
        self.acceptance = Gauge(
            "hat_acceptance_ratio",
            "Share of the last hundred or so guessed tokens that the target agreed with; 0 where none was.",
            registry=registry,
        )
        self.shallow = Gauge(
            "hat_shallow_token_seconds",
            "Time of the device's own layers for a token of a prompt, latest pass; 0 until there was one.",
            registry=registry,
        )
        self.row_bytes = Gauge(
            "hat_prompt_row_bytes",
            "Bytes of a prompt's token on their way to the cloud; 0 where token ids travel.",
            registry=registry,
        )
        self.predicted_ttft = Gauge(
            "hat_predicted_time_to_first_token_seconds",
            "What the latest prompt's time to the first token was expected to be; NaN where too little was known.",
            registry=registry,
        )
        self.chunk_size = Gauge("hat_chunk_size_tokens", "Tokens of a prompt chunk.", registry=registry)
        self.cloud_queue = Histogram(
            "hat_cloud_queue_seconds",
            "From a Step's arrival in the cloud to its pass, as replies say.",
            buckets=_STEP_BUCKETS,
            registry=registry,
        )
        self.cloud_step = Histogram(
            "hat_cloud_step_seconds",
            "Duration of the cloud's passes for a Step, as replies say.",
            buckets=_STEP_BUCKETS,
            registry=registry,
        )
        self.kv_usage = Gauge(
            "hat_kv_cache_usage_ratio", "Share of the device's KV pages in use.", registry=registry
        )

    def show_device(
        self,
        *,
        contact_age_s: Callable[[], float],
        acceptance: Callable[[], float],
        shallow_s_per_token: Callable[[], float],
        row_bytes: float,
    ) -> None:
        """What a device tells the cloud by Telemetry, for those who ask a Prometheus server instead.

        Args:
            contact_age_s: asked at each scrape: an age, so that no clock of another machine is needed to read it.
            acceptance: asked at each scrape, 0 to 1.
            shallow_s_per_token: asked at each scrape, in seconds.
            row_bytes: of a prompt's row.
        """
        self.contact_age.set_function(contact_age_s)
        self.acceptance.set_function(acceptance)
        self.shallow.set_function(shallow_s_per_token)
        self.row_bytes.set(row_bytes)
