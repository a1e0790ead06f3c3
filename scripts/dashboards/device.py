"""Single devices: link, chunk size, drafting."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from scripts.dashboards.panels import (
    DEVICE,
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

_BY = "hat_device"
_NAME = "{{hat_device}}"


def device() -> Dashboard:
    """The dashboard Device."""
    edge = 'hat_component="edge"'
    within = f'{edge},hat_namespace=~"$namespace",hat_deployment=~"$deployment"'
    return board(
        "Device",
        "Devices' own figures. Devices sit behind NAT: choose the Prometheus of their cluster, or one that it writes "
        "to.",
        [
            *chosen(edge),
            variable("device", "Device", f"hat_kv_cache_usage_ratio{{{within}}}", "hat_device"),
        ],
        [
            ("Link and prompts", _prompts()),
            ("Drafting", _drafting()),
            ("Answers", _answers()),
            ("Cloud", _cloud()),
        ],
    )


def _sum(metric: str) -> str:
    return f"sum by ({_BY}) ({rate(metric, DEVICE)})"


def _prompts() -> list[Panel]:
    return [
        graph(
            "Chunk size and time to the first token",
            "Tokens in a chunk of a prompt (right; 0: whole prompts), over the time to the first token: its mean, "
            "and what the latest prompt's was expected to be when its first chunk left (dashed; absent while the "
            "device knows too little). Chunks follow the link and the cloud's load; a prediction that stays off "
            "points to something that the device cannot measure.",
            "s",
            Query(mean("hat_time_to_first_token_seconds", DEVICE, _BY), f"{_NAME} measured"),
            Query(
                f"max by ({_BY}) (hat_predicted_time_to_first_token_seconds{{{DEVICE}}})",
                f"{_NAME} predicted",
                dashed=True,
            ),
            Query(f"max by ({_BY}) (hat_chunk_size_tokens{{{DEVICE}}})", f"{_NAME} chunk", right=True),
            span=12,
            right_unit="suffix: tokens",
        ),
        graph(
            "Uplink rate",
            "The rate that the device's prompt chunks got; 0 until one was long enough to tell.",
            "Bps",
            Query(f"max by ({_BY}) (hat_link_uplink_bytes_per_second{{{DEVICE}}})", _NAME),
            span=6,
        ),
        graph(
            "Round-trip time",
            "Of a small message, without the cloud's work.",
            "s",
            Query(f"max by ({_BY}) (hat_link_rtt_seconds{{{DEVICE}}})", _NAME),
            span=6,
        ),
        graph(
            "Bytes up and down",
            "Messages to the cloud and from it.",
            "Bps",
            Query(_sum("hat_uplink_bytes_total"), f"{_NAME} up"),
            Query(_sum("hat_downlink_bytes_total"), f"{_NAME} down"),
            span=12,
        ),
        graph(
            "Prompt tokens",
            "Tokens of prompts, and those of them that were taken over from an earlier turn and not sent again.",
            "suffix: tokens/s",
            Query(_sum("hat_prompt_tokens_total"), f"{_NAME} all"),
            Query(_sum("hat_cached_prompt_tokens_total"), f"{_NAME} taken over"),
            span=12,
        ),
    ]


def _drafting() -> list[Panel]:
    accepted, drafted = _sum("hat_accepted_tokens_total"), _sum("hat_draft_tokens_total")
    right, checked = _sum("hat_alternatives_accepted_total"), _sum("hat_alternatives_total")
    return [
        graph(
            "Acceptance",
            "Share of the tokens that the device guessed which the target agreed with.",
            "percentunit",
            Query(f"{accepted} / {drafted}", _NAME),
            top=1,
        ),
        graph(
            "Tokens per round",
            "Generated tokens for each round with the cloud: what drafting gains. 1: nothing.",
            "suffix: tokens",
            Query(f"{_sum('hat_generation_tokens_total')} / {_sum('hat_verify_rounds_total')}", _NAME),
        ),
        graph(
            "Alternatives",
            "Other candidates for guessed tokens that the cloud checked along with them, and those that were right. "
            "All zero: alternatives are off.",
            "cps",
            Query(checked, f"{_NAME} checked"),
            Query(right, f"{_NAME} right"),
        ),
        number(
            "Drafting",
            "Off: there is no drafter, or the device has found that drafts do not pay at present.",
            "none",
            Query(f"max by ({_BY}) (hat_drafting{{{DEVICE}}})", _NAME),
            span=24,
            words="off|on",
        ),
    ]


def _answers() -> list[Panel]:
    return [
        graph(
            "Time to the first token, by share",
            "From the start of a request to its first token.",
            "s",
            *quantiles("hat_time_to_first_token_seconds", DEVICE, _BY),
        ),
        graph(
            "Time between tokens",
            "Between two tokens of an answer.",
            "s",
            *quantiles("hat_inter_token_latency_seconds", DEVICE, _BY),
        ),
        graph(
            "Generated tokens per second",
            "Of all answers of a device together.",
            "suffix: tokens/s",
            Query(_sum("hat_generation_tokens_total"), _NAME),
        ),
        graph(
            "Answers by how they ended",
            "stop, length, cancelled (the client went away) or error.",
            "reqps",
            Query(
                f"sum by ({_BY}, finish_reason) ({rate('hat_requests_total', DEVICE)})",
                f"{_NAME} {{{{finish_reason}}}}",
            ),
            stacked=True,
        ),
        graph(
            "HTTP requests by status",
            "Requests to the device's API. 429: it has no room, or the cloud has none; 499: the client went away; "
            "503: the cloud is away.",
            "reqps",
            Query(
                f"sum by ({_BY}, status) ({rate('hat_http_requests_total', DEVICE)})",
                f"{_NAME} {{{{status}}}}",
            ),
            stacked=True,
        ),
        graph(
            "Requests and conversations",
            "Requests that are being answered, and conversations kept for their next turn.",
            "none",
            Query(f"sum by ({_BY}) (hat_num_sessions_running{{{DEVICE}}})", f"{_NAME} running"),
            Query(f"sum by ({_BY}) (hat_num_sessions_idle{{{DEVICE}}})", f"{_NAME} kept"),
        ),
    ]


def _cloud() -> list[Panel]:
    return [
        graph(
            "Wait in the cloud",
            "From a message's arrival in the cloud to its pass, as replies say.",
            "s",
            *quantiles("hat_cloud_queue_seconds", DEVICE, _BY),
        ),
        graph(
            "Compute in the cloud",
            "Duration of the cloud's passes for a message, as replies say.",
            "s",
            *quantiles("hat_cloud_step_seconds", DEVICE, _BY),
        ),
        graph(
            "Evictions and KV cache",
            "Times that the cloud gave a session's KV cache to others: the device then sends its text again (right). "
            "Times that a session went on after the cloud was lost (right). "
            "Share of the device's own KV pages in use (left).",
            "percentunit",
            Query(f"max by ({_BY}) (hat_kv_cache_usage_ratio{{{DEVICE}}})", f"{_NAME} KV"),
            Query(_sum("hat_session_evictions_total"), f"{_NAME} evictions", right=True),
            Query(_sum("hat_session_resumes_total"), f"{_NAME} resumes", right=True),
            right_unit="cps",
        ),
    ]
