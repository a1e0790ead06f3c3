"""Gauges of single HatDeployments come and go with them."""

from __future__ import annotations

from prometheus_client import REGISTRY

from hat_operator import gauges


def samples(name: str) -> dict[tuple[str, ...], float]:
    """Values by labels, of the HatDeployments of this test's namespace."""
    return {
        tuple(value for key, value in sample.labels.items() if key != "namespace"): sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name == name and sample.labels.get("namespace") == "test-gauges"
    }


def test_devices_by_phase() -> None:
    gauges.set_devices("test-gauges", "a", {"Ready": 3, "Lost": 1})
    gauges.set_devices("test-gauges", "b", {})
    # Phases without a device are 0, not absent: an alert must see that the last lost one came back.
    assert samples("hat_operator_devices") == {
        **{("a", phase): 0 for phase in gauges.PHASES},
        **{("b", phase): 0 for phase in gauges.PHASES},
        ("a", "Ready"): 3,
        ("a", "Lost"): 1,
    }
    gauges.forget("test-gauges", "a")
    gauges.forget("test-gauges", "a")
    assert {name for name, _ in samples("hat_operator_devices")} == {"b"}
    gauges.forget("test-gauges", "b")


def test_end_of_the_kubeconfig() -> None:
    name = "hat_operator_edge_certificate_expiry_timestamp_seconds"
    gauges.set_certificate_end("test-gauges", "a", 1.5e9)
    assert samples(name) == {("a",): 1.5e9}
    gauges.set_certificate_end("test-gauges", "a", None)
    assert samples(name) == {}
