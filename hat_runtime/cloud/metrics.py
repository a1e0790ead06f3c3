"""What the cloud exports to Prometheus. No label grows with the number of devices or sessions."""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from hat_runtime.control.pass_cost import PassCost

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
RATES = (1e4, 1e5, 5e5, 1e6, 2e6, 5e6, 1e7, 2e7, 5e7, 1e8)

REASONS = ("sessions", "tenant_sessions", "device_sessions", "tbt_target", "deadline", "line")
"""What a session is refused for: the cloud's, a tenant's or a device's limit of sessions, the time of Steps; after it
waited for one of them for too long, or gave up its place in the line."""


class CloudMetrics:
    """All metrics of one cloud process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Register everything in `registry`; one registry per cloud, so that several can live in one process."""
        self.registry = registry
        self._shown: set[str] = set()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"hat_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"hat_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"hat_{name}", text, buckets=buckets, registry=registry)

        self.model = Info("hat_model", "The model that this cloud serves", registry=registry)
        self.sessions_open = gauge("num_sessions_open", "Sessions with an open stream")
        self.sessions_lost = gauge("num_sessions_lost", "Sessions that are kept after their stream was lost")
        self.sessions_running = gauge("num_sessions_running", "Sessions with rows in the latest pass")
        self.sessions_waiting = gauge(
            "num_sessions_waiting", "Sessions with queued Steps outside the latest pass"
        )
        self.sessions_queued = gauge("num_sessions_queued", "Devices that wait for a place")
        self.refused = counter(
            "sessions_refused", "Sessions that were refused a place, by what was short", "reason"
        )
        for reason in REASONS:
            self.refused.labels(reason)
        self.tenant_label: Callable[[str], str | None] = lambda _: None
        """Under which name a tenant is counted; None: no tenant is (QuotaStore.label)."""
        self.tenant_rows = counter(
            "tenant_tokens_computed", "Rows computed, by tenant of the quotas", "tenant"
        )
        self.tenant_sessions = gauge("tenant_sessions_open", "Sessions, by tenant of the quotas", "tenant")
        self.kv_usage = gauge("kv_cache_usage_ratio", "Share of the KV pages that sessions own, 0 to 1")
        self.step_seconds = histogram("cloud_step_seconds", "Duration of an engine pass", SECONDS)
        self.predicted_seconds = counter(
            "cloud_step_predicted_seconds", "What passes were to take by the cost model as it was before each"
        )
        self.cost = gauge("cloud_cost_seconds", "The cost model's terms, in seconds for one of each", "term")
        self.queue_seconds = histogram(
            "cloud_queue_seconds", "From a Step's arrival to its first pass", SECONDS
        )
        self.step_wait = gauge(
            "step_wait_seconds", "What a Step waits for its pass, as of the latest twenty or so"
        )
        self.step_company = gauge(
            "step_company_tokens", "Rows of others in a Step's pass, as of the same ones"
        )
        self.prompt_rows = gauge("pass_prompt_tokens", "Most rows of prompts in one pass")
        self.batch_tokens = histogram("batch_tokens", "Rows in an engine pass", TOKENS)
        self.forward_seconds = counter("forward_seconds", "Time inside the model's layers")
        self.engine_seconds = counter(
            "engine_seconds", "Time of passes, from planning to the answers' hand-over"
        )
        self.verify_passes = counter(
            "verify_passes", "Steps that were answered with deep states (want LAST or ALL)"
        )
        self.tokens = counter("tokens_computed", "Rows computed", "kind")
        self.stale = counter("stale_steps", "Steps answered STALE, without compute")
        self.truncated = counter(
            "rollback_tokens", "Cached tokens dropped because a Step started before the end"
        )
        self.evictions = counter("evictions", "Sessions whose KV cache was taken for others")
        self.ended = counter("streams_ended", "Streams that ended, by gRPC status", "code")
        self.uplink_bytes = counter("uplink_bytes", "Bytes of the messages received from devices")
        self.downlink_bytes = counter("downlink_bytes", "Bytes of the messages sent to devices")
        self.device_uplink = histogram(
            "device_uplink_bytes_per_second", "Uplink rate that devices report", RATES
        )
        self.device_rtt = histogram("link_rtt_seconds", "Round-trip time that devices report", SECONDS)
        self.device_ttft = histogram("time_to_first_token_seconds", "TTFT that devices report", SECONDS)

    def show_load(self, load: Callable[[], Mapping[str, float]], prompt_rows: Callable[[], int]) -> None:
        """Ask these two at each scrape.

        Args:
            load: `wait_s` and `company_tokens`, as Load.figures.
            prompt_rows: most rows of prompts in one pass, as things stand.
        """
        self.step_wait.set_function(lambda: load()["wait_s"])
        self.step_company.set_function(lambda: load()["company_tokens"])
        self.prompt_rows.set_function(prompt_rows)

    def saw_rows(self, tenant: str, rows: int) -> None:
        """Count rows computed for a tenant."""
        if (name := self.tenant_label(tenant)) is not None:
            self.tenant_rows.labels(name).inc(rows)

    def show_tenants(self, tenants: Iterable[str]) -> None:
        """Show how many sessions each tenant has: one name for each session."""
        held = Count(name for tenant in tenants if (name := self.tenant_label(tenant)) is not None)
        for name in {*held, *self._shown}:
            self.tenant_sessions.labels(name).set(held[name])
        self._shown = set(held)

    def saw_cost(self, predicted_s: float | None, cost: PassCost | None) -> None:
        """Show what the cost model expected of a pass, in seconds, and the model; None where there is none yet."""
        self.predicted_seconds.inc(predicted_s or 0.0)
        if cost is not None:
            self.cost.labels("fixed").set(cost.fixed_s)
            self.cost.labels("per_token").set(cost.per_token_s)
            self.cost.labels("per_pair").set(cost.per_pair_s)
            self.cost.labels("per_cached").set(cost.per_cached_s)
