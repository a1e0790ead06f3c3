"""The operator's own Prometheus metrics."""

from __future__ import annotations

from contextlib import suppress

from prometheus_client import Counter, Gauge, Histogram

RECONCILE_SECONDS = Histogram(
    "hat_operator_reconcile_seconds",
    "Duration of one reconcile of one HatDeployment.",
    ["result"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
for _result in ("ok", "conflict", "error", "bug"):
    # From 0 on, so that the first one is an increase.
    RECONCILE_SECONDS.labels(_result)
WRITES = Counter(
    "hat_operator_writes_total",
    "Writes to a cluster, by verb and kind; still in a steady state.",
    ["verb", "kind"],
)
REQUEST_ERRORS = Counter(
    "hat_operator_request_errors_total", "Requests to a cluster that failed, by reason.", ["reason"]
)
DEVICE_POLLS = Counter(
    "hat_operator_device_polls_total",
    "Questions to pods of the cloud about their devices, by result.",
    ["result"],
)
PROMETHEUS_QUERIES = Counter(
    "hat_operator_prometheus_queries_total",
    "Questions to the Prometheus servers that HatDeployments name, by result.",
    ["result"],
)
POLICY_PUSHES = Counter(
    "hat_operator_policy_pushes_total", "Chunk policies sent to pods of the cloud, by result.", ["result"]
)
for _result in ("ok", "failed"):
    DEVICE_POLLS.labels(_result)
    PROMETHEUS_QUERIES.labels(_result)
    POLICY_PUSHES.labels(_result)
POLICY_CHANGES = Counter(
    "hat_operator_policy_changes_total", "New chunk policies of a HatDeployment.", ["namespace", "name"]
)
POLICY_FROZEN = Gauge(
    "hat_operator_policy_frozen",
    "1 while nothing fresh is known of a HatDeployment's cloud, so that its chunk policy stays as it is.",
    ["namespace", "name"],
)
POLICY_AGE = Gauge(
    "hat_operator_policy_age_seconds",
    "Since fresh figures for a HatDeployment's chunk policy came; 0 while it has no ready pods.",
    ["namespace", "name"],
)
CERTIFICATES_SIGNED = Counter(
    "hat_operator_certificates_signed_total", "Certificates signed for pods, by whose they are.", ["kind"]
)
CERTIFICATES_REFUSED = Counter(
    "hat_operator_certificates_refused_total", "Requests for a certificate that were denied.", ["kind"]
)
for _kind in ("device", "cloud"):
    CERTIFICATES_SIGNED.labels(_kind)
    CERTIFICATES_REFUSED.labels(_kind)
DENIED_PUSHES = Counter(
    "hat_operator_denied_pushes_total", "Deny-lists sent to pods of the cloud, by result.", ["result"]
)
for _result in ("ok", "failed"):
    DENIED_PUSHES.labels(_result)
QUEUED = Gauge("hat_operator_queued", "HatDeployments that wait for a reconcile or are in one.")
EDGE_STREAMS = Gauge("hat_operator_edge_streams", "Open watches of devices' clusters, one for each kind.")
LEADER = Gauge("hat_operator_leader", "1 while this process holds the lease.")
LAST_RESYNC = Gauge("hat_operator_last_resync_timestamp_seconds", "When all HatDeployments were listed last.")
HATDEPLOYMENTS = Gauge(
    "hat_operator_hatdeployments", "HatDeployments at the last resync, by Ready.", ["ready"]
)


def forget_policy(namespace: str, name: str) -> None:
    """A HatDeployment is gone, or nobody chooses its chunk sizes."""
    for metric in (POLICY_CHANGES, POLICY_FROZEN, POLICY_AGE):
        with suppress(KeyError):
            metric.remove(namespace, name)
