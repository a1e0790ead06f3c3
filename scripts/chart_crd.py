"""Writes the chart's copy of the HatDeployment CRD from its one source.

Usage: scripts/chart_crd.py   (writes charts/hat-operator/templates/crd.yaml)
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from hat_operator.plain_yaml import PlainDumper

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "crds" / "hat.dev_hatdeployments.yaml"
TARGET = ROOT / "charts" / "hat-operator" / "templates" / "crd.yaml"

HEAD = f"""\
{{{{- /* Made by scripts/chart_crd.py from {SOURCE.relative_to(ROOT)}; do not edit. */}}}}
{{{{- if .Values.crds.enabled }}}}
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata:
  name: %s
  labels:
    {{{{- include "hat-operator.labels" . | nindent 4 }}}}
  annotations:
    helm.sh/resource-policy: keep
"""
TAIL = "{{- end }}\n"


def template(source: str) -> str:
    """The chart's template for the CRD in `source`.

    Raises:
        ValueError: the CRD holds more metadata than a name, or text that Helm would take for a template.
    """
    crd = yaml.safe_load(source)
    if extra := set(crd["metadata"]) - {"name"}:
        raise ValueError(f"metadata: {sorted(extra)} would be lost in the chart")
    body: str = yaml.dump(
        {"spec": crd["spec"]}, Dumper=PlainDumper, sort_keys=False, allow_unicode=True, width=100_000
    )
    if "{{" in body:
        raise ValueError("spec: holds '{{', which Helm takes for a template")
    head = HEAD % crd["metadata"]["name"]
    return f"{head}{body}{TAIL}"


def main() -> int:
    """Writes the template."""
    TARGET.write_text(template(SOURCE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
