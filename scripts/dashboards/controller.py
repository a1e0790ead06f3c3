"""The operator: what it does, what fails, and what it says about devices and chunk sizes."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from scripts.dashboards.panels import OWN, Panel, Query, board, graph, number, quantiles, variable

_NAME = "{{namespace}}/{{name}}"


def controller() -> Dashboard:
    """The dashboard Operator."""
    return board(
        "Operator",
        "Reconciles, requests to clusters, polls of devices and the policy for chunk sizes.",
        [
            variable("namespace", "Namespace", "hat_operator_devices", "namespace"),
            variable("deployment", "HatDeployment", 'hat_operator_devices{namespace=~"$namespace"}', "name"),
        ],
        [("Now", _now()), ("Reconciles", _reconciles()), ("Policy and devices", _policy())],
    )


def _now() -> list[Panel]:
    return [
        number(
            "HatDeployments by Ready",
            "At the last resync, by the condition Ready.",
            "none",
            Query("sum by (ready) (hat_operator_hatdeployments)", "{{ready}}"),
            span=8,
        ),
        number(
            "Leader",
            "Pods of the operator that hold the lease: 1. 0 for minutes: nobody works.",
            "none",
            Query("sum(hat_operator_leader)", "leaders"),
        ),
        number(
            "Since the last resync",
            "Seconds since all HatDeployments were listed. Alert HatOperatorStalled: over 10 min.",
            "s",
            Query("time() - max(hat_operator_last_resync_timestamp_seconds)", "age"),
        ),
        number(
            "Policies frozen",
            "HatDeployments whose chunk sizes stay as they are because no fresh figures come: alert HatPolicyFrozen.",
            "none",
            Query(f"sum(hat_operator_policy_frozen{{{OWN}}})", "frozen"),
        ),
        number(
            "Certificates end in",
            "The first end of a certificate in the kubeconfigs of devices' clusters: alert "
            "HatEdgeCertificateExpiring.",
            "s",
            Query(f"min(hat_operator_edge_certificate_expiry_timestamp_seconds{{{OWN}}}) - time()", "left"),
        ),
    ]


def _reconciles() -> list[Panel]:
    return [
        graph(
            "Reconciles by result",
            "ok; conflict: the object had changed meanwhile, it is done again; error: a cluster refused or did not "
            "answer; bug: see the log. Alert HatReconcileFailing.",
            "cps",
            Query(
                "sum by (result) (rate(hat_operator_reconcile_seconds_count[$__rate_interval]))", "{{result}}"
            ),
            stacked=True,
        ),
        graph(
            "Duration of a reconcile",
            "One pass over one HatDeployment.",
            "s",
            *quantiles("hat_operator_reconcile_seconds", "", shares=(0.5, 0.95, 0.99)),
        ),
        graph(
            "Waiting or at work",
            "HatDeployments that wait for a reconcile or are in one. One that fails stays here until it works.",
            "none",
            Query("sum(hat_operator_queued)", "HatDeployments"),
        ),
        graph(
            "API writes",
            "Writes to clusters, by verb and kind. Nothing while nothing changes.",
            "wps",
            Query(
                "sum by (verb, kind) (rate(hat_operator_writes_total[$__rate_interval]))", "{{verb}} {{kind}}"
            ),
            stacked=True,
        ),
        graph(
            "Failed requests",
            "Requests to clusters that failed, by reason; no line, no failure.",
            "cps",
            Query(
                "sum by (reason) (rate(hat_operator_request_errors_total[$__rate_interval]))", "{{reason}}"
            ),
            stacked=True,
        ),
        graph(
            "Watches of devices' clusters",
            "Open watches, one for each kind of object in each cluster of devices.",
            "none",
            Query("sum(hat_operator_edge_streams)", "streams"),
        ),
    ]


def _policy() -> list[Panel]:
    return [
        graph(
            "Changes of the policy",
            "How often chunk sizes of a HatDeployment were changed, in an hour. A line that never rests: the link or "
            "the load swings faster than the policy is meant to follow.",
            "none",
            Query(
                f"sum by (namespace, name) (increase(hat_operator_policy_changes_total{{{OWN}}}[1h]))", _NAME
            ),
        ),
        graph(
            "Age of the figures",
            "Seconds since fresh figures came from a pod of the cloud. A policy whose figures are old is frozen.",
            "s",
            Query(f"max by (namespace, name) (hat_operator_policy_age_seconds{{{OWN}}})", _NAME),
        ),
        graph(
            "Polls of pods",
            "Questions to pods of the cloud about their devices, and policies sent to them, by result.",
            "cps",
            Query(
                "sum by (result) (rate(hat_operator_device_polls_total[$__rate_interval]))",
                "polls {{result}}",
            ),
            Query(
                "sum by (result) (rate(hat_operator_policy_pushes_total[$__rate_interval]))",
                "policies {{result}}",
            ),
        ),
        graph(
            "Devices of each HatDeployment",
            "By phase. Lost: the node does not answer. Alert HatDeviceSilent.",
            "none",
            Query(
                f"sum by (namespace, name, phase) (hat_operator_devices{{{OWN}}})", f"{_NAME} {{{{phase}}}}"
            ),
            span=24,
        ),
    ]
