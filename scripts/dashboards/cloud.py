"""Pods of the cloud: what their passes hold, how long they take, what they wait for."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from scripts.dashboards.panels import (
    CLOUD,
    CLOUD_POD,
    Panel,
    Query,
    board,
    chosen,
    graph,
    mean,
    number,
    quantiles,
    rate,
    variable,
)


def cloud() -> Dashboard:
    """The dashboard Cloud."""
    return board(
        "Cloud",
        "Engine passes, queue, sessions and KV cache of the cloud's pods.",
        [
            *chosen('hat_component="cloud"'),
            variable("pod", "Pod", f"hat_kv_cache_usage_ratio{{{CLOUD}}}", "pod"),
        ],
        [("Passes", _passes()), ("Load", _load()), ("Sessions", _sessions())],
    )


def _pods(metric: str) -> str:
    return f"sum by (pod) ({rate(metric, CLOUD_POD)})"


def _passes() -> list[Panel]:
    passes = _pods("hat_cloud_step_seconds_count")
    return [
        graph(
            "Duration of a pass against the cost model",
            "Mean duration of the engine's passes, and what the cost model said of each before it ran (dashed). "
            "Chunk sizes rest on the model: lines that stay apart mean that it does not fit this machine, or that "
            "something else uses it.",
            "s",
            Query(mean("hat_cloud_step_seconds", CLOUD_POD, "pod"), "{{pod}} measured"),
            Query(
                f"{_pods('hat_cloud_step_predicted_seconds_total')} / {passes}",
                "{{pod}} predicted",
                dashed=True,
            ),
            span=12,
        ),
        graph(
            "Duration of a pass",
            "From planning to the hand-over of the answers.",
            "s",
            *quantiles("hat_cloud_step_seconds", CLOUD_POD, shares=(0.5, 0.95, 0.99)),
            span=12,
        ),
        graph(
            "Rows by kind",
            "Rows that passes computed: short (decoding and checks of drafts) and prefill (chunks of prompts).",
            "suffix: rows/s",
            Query(f"sum by (kind) ({rate('hat_tokens_computed_total', CLOUD_POD)})", "{{kind}}"),
            stacked=True,
        ),
        graph(
            "Rows in a pass",
            "How full passes are. Many small passes: little load, or sessions that come one by one.",
            "suffix: rows",
            *quantiles("hat_batch_tokens", CLOUD_POD),
        ),
        graph(
            "Passes and answers",
            "Engine passes, and the Steps that were answered with deep states or a verdict.",
            "cps",
            Query(f"sum({rate('hat_cloud_step_seconds_count', CLOUD_POD)})", "passes"),
            Query(f"sum({rate('hat_verify_passes_total', CLOUD_POD)})", "answers"),
        ),
        number(
            "Cost model",
            "What a pass costs by the latest fit, the mean of the pods: fixed, for each new token, for each token of "
            "its text that is in the cache (per_cached), and for each pair of both (per_pair). Absent until passes "
            "of different sizes were seen.",
            "s",
            Query(f"avg by (term) (hat_cloud_cost_seconds{{{CLOUD_POD}}})", "{{term}}"),
            span=24,
        ),
    ]


def _load() -> list[Panel]:
    return [
        graph(
            "Engine busy",
            "Share of the time that the engine spends in passes, and in the model's layers (dashed). At 1 it cannot "
            "take more work, only larger batches: alert HatCloudSaturated.",
            "percentunit",
            Query(_pods("hat_engine_seconds_total"), "{{pod}} passes"),
            Query(_pods("hat_forward_seconds_total"), "{{pod}} layers", dashed=True),
            top=1,
        ),
        graph(
            "Wait in the queue",
            "From a Step's arrival to its first pass.",
            "s",
            *quantiles("hat_cloud_queue_seconds", CLOUD_POD, shares=(0.5, 0.95, 0.99)),
        ),
        graph(
            "KV cache in use",
            "Share of the KV pages that sessions own, idle conversations included. Near 1 idle ones lose theirs: "
            "alert HatKvCacheNearlyFull.",
            "percentunit",
            Query(f"max by (pod) (hat_kv_cache_usage_ratio{{{CLOUD_POD}}})", "{{pod}}"),
            top=1,
        ),
        graph(
            "Evictions and rollbacks",
            "Sessions whose KV cache was taken for others, and (right) cached tokens dropped because a draft was "
            "refused.",
            "cps",
            Query(f"sum({rate('hat_evictions_total', CLOUD_POD)})", "evictions"),
            Query(f"sum({rate('hat_rollback_tokens_total', CLOUD_POD)})", "rollback", right=True),
            right_unit="suffix: tokens/s",
        ),
        graph(
            "Stale Steps",
            "Steps that were answered without compute, because a draft before them was refused meanwhile.",
            "cps",
            Query(_pods("hat_stale_steps_total"), "{{pod}}"),
        ),
        graph(
            "Bytes from and to devices",
            "Messages of the session protocol.",
            "Bps",
            Query(f"sum({rate('hat_uplink_bytes_total', CLOUD_POD)})", "up"),
            Query(f"sum({rate('hat_downlink_bytes_total', CLOUD_POD)})", "down"),
        ),
    ]


def _sessions() -> list[Panel]:
    return [
        graph(
            "Sessions of a pod",
            "Open: devices hold a stream. Running: with rows in the latest pass. Waiting: with queued work outside "
            "of it.",
            "none",
            *[
                Query(f"sum by (pod) (hat_num_sessions_{state}{{{CLOUD_POD}}})", f"{{{{pod}}}} {state}")
                for state in ("open", "running", "waiting")
            ],
        ),
        graph(
            "Streams by how they ended",
            "gRPC status of sessions that ended. OK and CANCELLED are devices that went; others are explained in "
            "docs/operations.md.",
            "cps",
            Query(f"sum by (code) ({rate('hat_streams_ended_total', CLOUD_POD)})", "{{code}}"),
            stacked=True,
        ),
        graph(
            "Refused sessions",
            "Sessions that were refused a place, by what was short: the pod's sessions, a tenant's or a device's "
            "quota, or the time that Steps may take. Devices come back when the cloud said.",
            "cps",
            Query(f"sum by (reason) ({rate('hat_sessions_refused_total', CLOUD_POD)})", "{{reason}}"),
            stacked=True,
        ),
        number(
            "Model",
            "What each pod serves: layers and the first digits of the weights' identity. Two identities for longer "
            "than a rollout: look at the HatDeployment's status.",
            "none",
            Query(
                f'label_replace(hat_model_info{{{CLOUD_POD}}}, "weights", "$1", "weights_id", "(.{{12}}).*")',
                "{{pod}} {{layers}} {{weights}}",
            ),
            span=8,
            names=True,
            height=8,
        ),
    ]
