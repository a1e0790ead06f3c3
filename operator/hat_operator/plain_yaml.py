"""YAML as people read and compare it."""

from __future__ import annotations

import yaml


class PlainDumper(yaml.SafeDumper):
    """Without anchors: the same dictionary at two places is written twice."""

    def ignore_aliases(self, data: object) -> bool:
        """Never an alias."""
        return True
