"""HatDeployments as the API server hands them out: with the CRD's defaults."""

from __future__ import annotations

from typing import Any

from hat_operator.schema import apply_defaults, load_schema


def body(name: str, **spec: Any) -> dict[str, Any]:
    """A stored HatDeployment with the defaults of the CRD."""
    obj = {
        "apiVersion": "hat.dev/v1alpha1",
        "kind": "HatDeployment",
        "metadata": {"name": name, "namespace": "team", "uid": "uid-1", "generation": 1},
        "spec": {
            "model": {"source": {"hub": "default"}},
            "split": {"inputLayers": 3},
            "runtime": {"version": "1"},
            **spec,
        },
    }
    defaulted: dict[str, Any] = apply_defaults(load_schema(), obj)
    return defaulted
