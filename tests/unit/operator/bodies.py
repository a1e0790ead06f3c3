"""HatDeployments as the API server hands them out: with the CRD's defaults."""

from __future__ import annotations

from typing import Any

from hat_operator.schema import apply_defaults, load_crd


def body(name: str, **spec: Any) -> dict[str, Any]:
    """A stored HatDeployment with the defaults of the CRD."""
    schema = load_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
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
    result = apply_defaults(schema, obj)
    return obj if result is None else result
