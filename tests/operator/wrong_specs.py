"""Mistakes in a HatDeployment and what the apiserver has to say about each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.operator.manifests import REMOVED, changed, hat_deployment, token_mode, two_clusters


@dataclass(frozen=True)
class Wrong:
    """Changes that spoil a valid HatDeployment, and parts of the message that a user needs to mend it."""

    changes: Mapping[str, Any]
    says: tuple[str, ...]
    base: Mapping[str, Any] = field(default_factory=hat_deployment)

    @property
    def body(self) -> dict[str, Any]:
        """The wrong HatDeployment."""
        return changed(self.base, self.changes)


CLAIM = {"spec.model.source": {"claim": {"name": "weights"}}}
SELECTOR = {"spec.edge": {"deviceSelector": {"matchLabels": {"site": "berlin"}}}}
REMOTE = two_clusters()
TOKENS = token_mode()

WRONG = {
    # Names
    "name-long": Wrong({"metadata.name": "a" * 41}, ("metadata.name: at most 40 characters",)),
    "name-digit": Wrong(
        {"metadata.name": "1chat"}, ("metadata.name: lower-case letters", "beginning with a letter")
    ),
    "name-dot": Wrong({"metadata.name": "chat.v2"}, ("metadata.name: lower-case letters",)),
    # What must be there
    "no-spec": Wrong({"spec": REMOVED}, ("spec: Required value",)),
    "no-model": Wrong({"spec.model": REMOVED}, ("spec.model: Required value",)),
    "no-source": Wrong({"spec.model": {}}, ("spec.model.source: Required value",)),
    "no-split": Wrong({"spec.split": REMOVED}, ("split: required in mode hat", "split.inputLayers")),
    "no-layers": Wrong({"spec.split": {}}, ("spec.split.inputLayers: Required value",)),
    "no-selector": Wrong({"spec.edge": {}}, ("spec.edge.deviceSelector: Required value",)),
    "no-labels": Wrong(
        {"spec.edge": {"deviceSelector": {"matchLabels": {}}}},
        ("spec.edge.deviceSelector.matchLabels", "should have at least 1 properties"),
    ),
    **{
        f"label-key-{what}": Wrong(
            {"spec.edge": {"deviceSelector": {"matchLabels": {key: "true"}}}},
            ("edge.deviceSelector.matchLabels: a label's key is a name",),
        )
        for what, key in {
            "space": "hat dev/device",
            "name-long": "hat.dev/" + "a" * 64,
            "prefix-long": "a" * 254 + "/b",
            "two-slashes": "a/b/c",
            "upper-prefix": "Hat.dev/device",
            "empty-name": "hat.dev/",
        }.items()
    },
    "no-secret": Wrong(
        {"spec.edge.clusterRef.kubeconfigSecretRef": {}},
        ("spec.edge.clusterRef.kubeconfigSecretRef.name: Required value",),
        REMOTE,
    ),
    # Unknown fields and types
    "unknown-field": Wrong({"spec.cloud.replica": 2}, ('unknown field "spec.cloud.replica"',)),
    "unknown-top": Wrong({"spec.models": {}}, ('unknown field "spec.models"',)),
    "type-replicas": Wrong(
        {"spec.cloud.replicas": "two"}, ("spec.cloud.replicas", "must be of type integer")
    ),
    "type-suspend": Wrong({"spec.suspend": "yes"}, ("spec.suspend", "must be of type boolean")),
    # Choices
    "mode-unknown": Wrong({"spec.mode": "fast"}, ("spec.mode", '"fast"', '"hat"')),
    "dtype": Wrong({"spec.model.dtype": "float16"}, ("spec.model.dtype", '"bfloat16", "float32"')),
    "drafter": Wrong(
        {"spec.speculation.drafter": "model"},
        ("spec.speculation.drafter", '"model"', '"auto", "none", "ngram"'),
    ),
    "sampler": Wrong(
        {"spec.speculation.sampler": "greedy"},
        ("spec.speculation.sampler", '"greedy"', '"coupled", "rejection", "thinning", "topk"'),
    ),
    "chunk-bounds": Wrong(
        {"spec.chunking.minTokens": 600}, ("chunking.minTokens: may be at most chunking.maxTokens",)
    ),
    "chunk-tokens-of-auto": Wrong(
        {"spec.chunking.tokens": 64},
        ("chunking.tokens: goes with mode: fixed; write that, or remove tokens",),
    ),
    "uplink": Wrong(
        {"spec.wire.uplink": "raw"}, ("spec.wire.uplink", '"raw"', '"none", "bf16", "int8", "int4"')
    ),
    "uplink-decode": Wrong(
        {"spec.wire.uplinkDecode": "int2"}, ("spec.wire.uplinkDecode", '"int2"', '"none", "bf16"')
    ),
    "downlink": Wrong({"spec.wire.downlink": "int4"}, ("wire: compressed hidden states are not available",)),
    "tls": Wrong({"spec.security.tls": "on"}, ("spec.security.tls", '"on"', '"off", "mutual"')),
    "certificate-hours": Wrong(
        {"spec.security.certificateHours": 25}, ("spec.security.certificateHours", "less than or equal to 24")
    ),
    "denied-without-tls": Wrong(
        {"spec.security": {"tls": "off", "deniedDevices": ["jetson-1"]}},
        ("security.deniedDevices: without certificates nobody can tell devices apart",),
    ),
    "denied-name": Wrong(
        {"spec.security.deniedDevices": ["Jetson 1"]}, ("spec.security.deniedDevices[0]", '"Jetson 1"')
    ),
    "log-level": Wrong({"spec.observability.logLevel": "trace"}, ("spec.observability.logLevel", '"debug"')),
    "pod-monitor": Wrong(
        {"spec.observability.podMonitor": "yes"}, ("spec.observability.podMonitor", '"auto"')
    ),
    **{
        f"prometheus-{what}": Wrong(
            {"spec.observability.prometheusUrl": url}, ("observability.prometheusUrl: write http://HOST",)
        )
        for what, url in {
            "scheme": "ftp://prometheus:9090",
            "no-scheme": "prometheus:9090",
            "password": "https://reader:secret@prometheus",
            "query": "https://prometheus/?token=secret",
            "fragment": "https://prometheus/#graph",
            "port": "http://prometheus:http",
            "space": "http://prometheus /",
            "no-host": "http:///api",
        }.items()
    },
    "prometheus-token-in-clear": Wrong(
        {
            "spec.observability.prometheusUrl": "http://prometheus:9090",
            "spec.observability.prometheusTokenSecretRef": {"name": "reader"},
        },
        ("observability.prometheusTokenSecretRef: a token is sent to an https:// address only",),
    ),
    "prometheus-token-for-nobody": Wrong(
        {"spec.observability.prometheusTokenSecretRef": {"name": "reader"}},
        ("observability.prometheusTokenSecretRef:",),
    ),
    "prometheus-ca-in-clear": Wrong(
        {
            "spec.observability.prometheusUrl": "http://prometheus:9090",
            "spec.observability.prometheusCaRef": {"name": "ca"},
        },
        ("observability.prometheusCaRef: goes with an https:// address",),
    ),
    "prometheus-ca-kind": Wrong(
        {
            "spec.observability.prometheusUrl": "https://prometheus",
            "spec.observability.prometheusCaRef": {"name": "ca", "kind": "Pod"},
        },
        ("spec.observability.prometheusCaRef.kind", '"ConfigMap", "Secret"'),
    ),
    "tensor-parallel": Wrong(
        {"spec.cloud.tensorParallel": 2}, ("cloud.tensorParallel:", "raise cloud.replicas")
    ),
    # Bounds
    "layers-zero": Wrong(
        {"spec.split.inputLayers": 0}, ("spec.split.inputLayers", "greater than or equal to 1")
    ),
    "layers-many": Wrong(
        {"spec.split.inputLayers": 257}, ("spec.split.inputLayers", "less than or equal to 256")
    ),
    "replicas-negative": Wrong(
        {"spec.cloud.replicas": -1}, ("spec.cloud.replicas", "greater than or equal to 0")
    ),
    "sessions-zero": Wrong(
        {"spec.cloud.maxSessions": 0}, ("spec.cloud.maxSessions", "greater than or equal to 1")
    ),
    "chunk-tokens": Wrong(
        {"spec.chunking": {"mode": "fixed", "tokens": 4097}},
        ("spec.chunking.tokens", "less than or equal to 4096"),
    ),
    "draft-negative": Wrong(
        {"spec.speculation.maxDraft": -1}, ("spec.speculation.maxDraft", "-1", "greater than or equal to 0")
    ),
    "draft-long": Wrong(
        {"spec.speculation.maxDraft": 33}, ("spec.speculation.maxDraft", "33", "less than or equal to 32")
    ),
    "threshold-high": Wrong(
        {"spec.speculation.stopThreshold": 1.5},
        ("spec.speculation.stopThreshold", "1.5", "less than or equal to 1"),
    ),
    "threshold-negative": Wrong(
        {"spec.speculation.stopThreshold": -0.1},
        ("spec.speculation.stopThreshold", "-0.1", "greater than or equal to 0"),
    ),
    "threshold-text": Wrong(
        {"spec.speculation.stopThreshold": "auto"},
        ("spec.speculation.stopThreshold", "must be of type number"),
    ),
    "window-zero": Wrong(
        {"spec.speculation.window": 0}, ("spec.speculation.window", "0", "greater than or equal to 1")
    ),
    "window-wide": Wrong(
        {"spec.speculation.window": 17}, ("spec.speculation.window", "17", "less than or equal to 16")
    ),
    "branches": Wrong(
        {"spec.speculation.branches": 9}, ("spec.speculation.branches", "9", "less than or equal to 8")
    ),
    "alternatives": Wrong(
        {"spec.speculation.alternatives": 9},
        ("spec.speculation.alternatives", "9", "less than or equal to 8"),
    ),
    # Quotas
    "quota-sessions": Wrong(
        {"spec.cloud.quotas.deviceDefault.sessions": -1},
        ("spec.cloud.quotas.deviceDefault.sessions", "greater than or equal to 0"),
    ),
    "quota-sessions-many": Wrong(
        {"spec.cloud.quotas.tenantDefault.sessions": 1048577},
        ("spec.cloud.quotas.tenantDefault.sessions", "less than or equal to 1048576"),
    ),
    "quota-rate": Wrong(
        {"spec.cloud.quotas.deviceDefault.tokensPerSecond": 0},
        ("spec.cloud.quotas.deviceDefault.tokensPerSecond", "must be at least 0.01"),
    ),
    "quota-rate-low": Wrong(
        {"spec.cloud.quotas.deviceDefault.tokensPerSecond": 0.009},
        ("spec.cloud.quotas.deviceDefault.tokensPerSecond", "greater than or equal to 0.01"),
    ),
    "quota-share-none": Wrong(
        {"spec.cloud.quotas.devices": [{"name": "jetson-1", "kvShare": 0}]},
        ("spec.cloud.quotas.devices[0].kvShare", "must be at least 0.000001"),
    ),
    "quota-weight-none": Wrong(
        {"spec.cloud.quotas.tenantDefault.weight": 0},
        ("spec.cloud.quotas.tenantDefault.weight", "must be at least 0.01"),
    ),
    "quota-share": Wrong(
        {"spec.cloud.quotas.devices": [{"name": "jetson-1", "kvShare": 1.5}]},
        ("spec.cloud.quotas.devices[0].kvShare", "less than or equal to 1"),
    ),
    "quota-share-text": Wrong(
        {"spec.cloud.quotas.deviceDefault.kvShare": "half"},
        ("spec.cloud.quotas.deviceDefault.kvShare", "must be of type number"),
    ),
    "quota-weight": Wrong(
        {"spec.cloud.quotas.tenants": [{"name": "acme", "weight": 101}]},
        ("spec.cloud.quotas.tenants[0].weight", "less than or equal to 100"),
    ),
    "quota-weight-of-device": Wrong(
        {"spec.cloud.quotas.devices": [{"name": "jetson-1", "weight": 2}]},
        ('unknown field "spec.cloud.quotas.devices[0].weight"',),
    ),
    "quota-field": Wrong(
        {"spec.cloud.quotas.deviceDefault.session": 2},
        ('unknown field "spec.cloud.quotas.deviceDefault.session"',),
    ),
    "quota-burst": Wrong(
        {"spec.cloud.quotas.tenantDefault.burstTokens": 9},
        ("cloud.quotas: burstTokens goes with tokensPerSecond", "remove burstTokens"),
    ),
    "quota-burst-of-device": Wrong(
        {"spec.cloud.quotas": {"devices": [{"name": "a"}, {"name": "b", "burstTokens": 9}]}},
        ("cloud.quotas.devices: burstTokens goes with tokensPerSecond", "deviceDefault"),
    ),
    "quota-burst-of-tenant-without-limit": Wrong(
        {
            "spec.cloud.quotas": {
                "tenantDefault": {"tokensPerSecond": 5},
                "tenants": [{"name": "acme", "burstTokens": 9, "unlimited": ["tokensPerSecond"]}],
            }
        },
        ("cloud.quotas.tenants: burstTokens goes with tokensPerSecond", "tenantDefault"),
    ),
    "quota-limit-and-none": Wrong(
        {"spec.cloud.quotas.devices": [{"name": "a", "sessions": 2, "unlimited": ["sessions"]}]},
        ("cloud.quotas: a limit has a value and is in unlimited",),
    ),
    "quota-unlimited": Wrong(
        {"spec.cloud.quotas.devices": [{"name": "a", "unlimited": ["weight"]}]},
        ("spec.cloud.quotas.devices[0].unlimited[0]", '"sessions", "tokensPerSecond", "kvShare"'),
    ),
    "quota-name": Wrong(
        {"spec.cloud.quotas.tenants": [{"name": "acme corp"}]},
        ("spec.cloud.quotas.tenants[0].name", "should match"),
    ),
    "quota-no-name": Wrong(
        {"spec.cloud.quotas.tenants": [{"sessions": 1}]},
        ("spec.cloud.quotas.tenants[0].name: Required value",),
    ),
    "quota-twice": Wrong(
        {"spec.cloud.quotas.devices": [{"name": "a"}, {"name": "a"}]},
        ("spec.cloud.quotas.devices[1]: Duplicate value",),
    ),
    "port": Wrong(
        {"spec.cloud.expose.port": 65536}, ("spec.cloud.expose.port", "less than or equal to 65535")
    ),
    "deletion": Wrong(
        {"spec.edge.deletionTimeoutSeconds": 86401},
        ("spec.edge.deletionTimeoutSeconds", "less than or equal to 86400"),
        REMOTE,
    ),
    # Fields of the other mode
    "hat-draft-zero": Wrong(
        {"spec.speculation.maxDraft": 0}, ("speculation.maxDraft: at least 1 in mode hat", "drafter: none")
    ),
    "hat-draft-model": Wrong(
        {"spec.speculation.draftModel": {"hub": "default"}},
        ("speculation.draftModel: goes with mode: picospec only; remove it",),
    ),
    "hat-thinning": Wrong(
        {"spec.speculation.sampler": "thinning"},
        ("speculation.sampler: write coupled or rejection in mode hat",),
    ),
    "hat-offline": Wrong(
        {"spec.edge.offline": "draft-only"},
        ("edge.offline: draft-only needs a whole small model", "mode picospec", "write refuse"),
        REMOTE,
    ),
    "offline-unknown": Wrong(
        {"spec.edge.offline": "always"}, ("spec.edge.offline", '"refuse", "draft-only"'), REMOTE
    ),
    "tokens-split": Wrong(
        {"spec.split": {"inputLayers": 3}}, ("split: mode picospec cuts no model", "remove split"), TOKENS
    ),
    "tokens-of-mode-hat": Wrong({"spec.mode": "picospec"}, ("split: mode picospec cuts no model",)),
    "tokens-weights": Wrong(
        {"spec.edge.weights": {"claim": {"name": "part"}}},
        ("edge.weights: in mode picospec devices hold the draft model only", "speculation.draftModel.claim"),
        TOKENS,
    ),
    "tokens-drafter": Wrong(
        {"spec.speculation.drafter": "none"},
        ("speculation.drafter: in mode picospec the draft model drafts; remove drafter",),
        TOKENS,
    ),
    "tokens-threshold": Wrong(
        {"spec.speculation.stopThreshold": 0.5},
        ("speculation.stopThreshold: goes with mode: hat only; remove it",),
        TOKENS,
    ),
    "tokens-branches": Wrong(
        {"spec.speculation.branches": 2}, ("speculation.branches: goes with mode: hat only",), TOKENS
    ),
    "tokens-alternatives": Wrong(
        {"spec.speculation.alternatives": 0}, ("speculation.alternatives: goes with mode: hat only",), TOKENS
    ),
    "tokens-rejection": Wrong(
        {"spec.speculation.sampler": "rejection"},
        ("speculation.sampler:", "coupled, thinning or topk in mode picospec"),
        TOKENS,
    ),
    "tokens-many-drafts": Wrong(
        {"spec.speculation": {"maxDraft": 17, "window": 4}},
        ("speculation.maxDraft: maxDraft (4) times window (2) may be 64 at most",),
        TOKENS,
    ),
    "tokens-wide-window": Wrong(
        {"spec.speculation": {"maxDraft": 5, "window": 16}}, ("speculation.maxDraft:", "64"), TOKENS
    ),
    "tokens-chunks": Wrong(
        {"spec.chunking": {"mode": "fixed", "tokens": 64}},
        ("chunking.tokens: mode picospec sends token ids", "remove it"),
        TOKENS,
    ),
    "tokens-uplink": Wrong(
        {"spec.wire.uplink": "int8"}, ("wire.uplink and wire.uplinkDecode: mode picospec",), TOKENS
    ),
    "tokens-uplink-decode": Wrong(
        {"spec.wire.uplinkDecode": "int8"}, ("wire.uplink and wire.uplinkDecode: mode picospec",), TOKENS
    ),
    "tokens-pad-frames": Wrong(
        {"spec.wire.padFrames": True}, ("wire.padFrames: mode picospec sends token ids",), TOKENS
    ),
    "tokens-no-draft-model": Wrong(
        {"spec.model.source.hub": "org/model"},
        ("speculation.draftModel: HAT brings a draft model for model.source.hub: default only",),
        TOKENS,
    ),
    "tokens-no-draft-model-of-claim": Wrong(
        CLAIM, ("speculation.draftModel: HAT brings a draft model for",), TOKENS
    ),
    "draft-model-none": Wrong(
        {"spec.speculation.draftModel": {}}, ("speculation.draftModel: write exactly one of",), TOKENS
    ),
    "draft-model-both": Wrong(
        {"spec.speculation.draftModel": {"hub": "default", "claim": {"name": "drafts"}}},
        ("speculation.draftModel: write exactly one of hub and claim",),
        TOKENS,
    ),
    "draft-model-url": Wrong(
        {"spec.speculation.draftModel": {"hub": "https://hub/a/b"}},
        ("spec.speculation.draftModel.hub", "should match"),
        TOKENS,
    ),
    "draft-model-path": Wrong(
        {"spec.speculation.draftModel": {"claim": {"name": "drafts", "path": "/small"}}},
        ("path: a folder inside the volume",),
        TOKENS,
    ),
    # The model's source
    "source-none": Wrong({"spec.model.source": {}}, ("model.source: write exactly one of hub and claim",)),
    "source-both": Wrong(
        {"spec.model.source.claim": {"name": "weights"}},
        ("model.source: write exactly one of hub and claim",),
    ),
    "hub-url": Wrong({"spec.model.source.hub": "https://hub/a/b"}, ("spec.model.source.hub", "should match")),
    "claim-name": Wrong(
        {"spec.model.source": {"claim": {"name": "My_Claim"}}},
        ("spec.model.source.claim.name", "should match"),
    ),
    "claim-absolute": Wrong(
        {"spec.model.source": {"claim": {"name": "weights", "path": "/models"}}},
        ("path: a folder inside the volume, without a leading /",),
    ),
    "claim-parent": Wrong(
        {"spec.model.source": {"claim": {"name": "weights", "path": "a/../../b"}}},
        ("path: a folder inside the volume", "without .."),
    ),
    "token-of-claim": Wrong(
        {**CLAIM, "spec.model.tokenSecretRef": {"name": "hub"}},
        ("model.tokenSecretRef: only a model from a hub",),
    ),
    "revision-of-claim": Wrong(
        {**CLAIM, "spec.model.revision": "v1"}, ("model.revision: only a model from a hub",)
    ),
    "claim-without-edge-weights": Wrong(
        {**CLAIM, **SELECTOR}, ("edge.weights: model.source.claim exists only in the cloud's namespace",)
    ),
    # The cloud
    "gpus-of-none": Wrong(
        {"spec.cloud.accelerator.count": 1}, ("cloud.accelerator: count is 0 for type none",)
    ),
    "no-gpus": Wrong(
        {"spec.cloud.accelerator.type": "nvidia.com/gpu"},
        ("cloud.accelerator:", "at least 1 for nvidia.com/gpu"),
    ),
    "gpu-in-limits": Wrong(
        {"spec.cloud.resources.limits": {"nvidia.com/gpu": 1}},
        ("resources.limits: cpu, memory and ephemeral-storage only", "accelerator"),
    ),
    "gpu-in-requests": Wrong(
        {"spec.cloud.resources.requests": {"nvidia.com/gpu": 1}}, ("resources.requests: cpu, memory",)
    ),
    "version": Wrong({"spec.runtime.version": "v1 beta"}, ("spec.runtime.version", "should match")),
    "image": Wrong({"spec.cloud.image": "a b"}, ("spec.cloud.image", "should match")),
    "node-port-host": Wrong({"spec.cloud.expose.type": "NodePort"}, ("cloud.expose.host:", "write host")),
    "node-port-type": Wrong({"spec.cloud.expose.nodePort": 30070}, ("goes with type: NodePort only",)),
    "node-port-low": Wrong(
        {"spec.cloud.expose": {"type": "NodePort", "host": "10.0.0.1", "nodePort": 80}},
        ("cloud.expose.nodePort: 0 for one of Kubernetes' choice",),
    ),
    "own-labels": Wrong(
        {"spec.cloud.template.labels": {"hat.dev/deployment": "other"}},
        ("template.labels: hat.dev/ and app.kubernetes.io/ belong to the operator",),
    ),
    "toleration": Wrong(
        {"spec.cloud.template.tolerations": [{"key": "gpu", "operator": "In"}]},
        ("spec.cloud.template.tolerations[0].operator", '"Exists"'),
    ),
    # The devices
    "unreachable-cloud": Wrong(
        {"spec.cloud.expose": {}},
        ("cloud.expose: devices in another cluster cannot reach a ClusterIP",),
        REMOTE,
    ),
    "jetson-arch": Wrong(
        {"spec.edge.images.0.arch": "amd64"},
        ("edge.images: a Jetson (l4t) is arm64; write arch: arm64",),
        REMOTE,
    ),
    "image-twice": Wrong(
        {"spec.edge.images.1.name": "orin"}, ("spec.edge.images[1]: Duplicate value",), REMOTE
    ),
    "image-name-long": Wrong(
        {"spec.edge.images.0.name": "a" * 13}, ("spec.edge.images[0].name", "Too long", "12"), REMOTE
    ),
    "edge-namespace": Wrong(
        {"spec.edge.clusterRef.namespace": "Devices"},
        ("spec.edge.clusterRef.namespace", "should match"),
        REMOTE,
    ),
    "edge-gpu": Wrong(
        {"spec.edge.accelerator.type": "gpu"}, ("spec.edge.accelerator.type", '"cuda"'), REMOTE
    ),
    "edge-own-labels": Wrong(
        {"spec.edge.template.labels": {"app.kubernetes.io/name": "mine"}}, ("template.labels:",), REMOTE
    ),
    "pull-secret-twice": Wrong(
        {"spec.imagePullSecrets": [{"name": "a"}, {"name": "a"}]},
        ("spec.imagePullSecrets[1]: Duplicate value",),
    ),
}
