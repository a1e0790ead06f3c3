"""Real transformers layers, a range of them: the one module that depends on transformers' internals.

No model code of our own (but for packed_layer.py, in bfloat16 on CPUs): the architecture's own classes are built for
the wanted layers only, and their attention is routed to the paged KV cache through transformers' AttentionInterface.
The checkpoint goes through `from_pretrained`, so conversions that transformers applies while loading (fused experts,
quantisation) happen here as well.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AttentionInterface, AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from hat_runtime.errors import ModelError
from hat_runtime.model.attention import AttentionBatch
from hat_runtime.model.packed import can_pack, pack_linears, packed_linear
from hat_runtime.model.packed_layer import pack_layers
from hat_runtime.model.split import LayerRange
from hat_runtime.model.weights import EMBED, HEAD, NORM, TensorIndex, layer_of

OLDEST, TOO_NEW = Version("5.20"), Version("5.30")
"""transformers versions that this module was checked with: OLDEST <= version < TOO_NEW."""

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text")
"""`model_type`s for which a test holds the split model equal to the whole one."""

_ATTENTION = "hat_paged"
_MAY_BE_MISSING = {"embed_tokens.weight", "norm.weight"}  # of a slice; the device's ends hold them


def _paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    hat: AttentionBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **ignored: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature over the paged cache; query, key and value are [1, heads, T, head_dim]."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    hat.store(layer, key[0], value[0])
    if hat.cache_only and layer == len(hat.cache.layers) - 1:
        raise _CacheFilled
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return hat.backend.attend(layer, query[0], hat, scale=scale, window=sliding_window)[None], None


class _CacheFilled(Exception):
    """Leaves the last layer once its keys and values are stored, where nobody wants its output."""


AttentionInterface.register(_ATTENTION, _paged_attention)


class DecoderSlice:
    """Decoder layers lo <= i < hi of a model, without embedding, norm and head."""

    def __init__(self, model: torch.nn.Module, layers: LayerRange, config: Any) -> None:
        self._model = model
        self.config = config
        self.layers = layers
        self.hidden_size: int = config.hidden_size
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        parameter = next(model.layers.parameters())  # type: ignore[union-attr]
        self.dtype: torch.dtype = parameter.dtype
        self.device: torch.device = parameter.device
        self.parameter_names = self._parameter_names()
        """Names of the layers' parameters as the whole model calls them."""
        if can_pack(self.dtype, self.device):
            pack_layers(model, _paged_attention)
            pack_linears(model)

    def _parameter_names(self) -> set[str]:
        names = set()
        for name, _ in self._model.named_parameters():
            if (local := layer_of(f"model.{name}")) is not None:
                rest = name.split(".", 2)[2]
                names.add(f"model.layers.{local + self.layers.lo}.{rest}")
        return names

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """Packed hidden states [T, hidden_size] at positions int64 [T] -> the last layer's output [T, hidden_size].

        Writes the new keys and values into the batch's cache. With `batch.cache_only` that is all: the output is
        [0, hidden_size].
        """
        try:
            out = self._model(
                inputs_embeds=hidden[None].to(self.dtype),
                position_ids=positions[None],
                use_cache=False,
                hat=batch,
            )
        except _CacheFilled:
            return hidden.new_empty(0, self.hidden_size, dtype=self.dtype)
        deep: torch.Tensor = out.last_hidden_state[0]
        return deep


class DeviceEnds:
    """The embedding before the first layer, and the final norm and LM head after the last. Tied weights exist once."""

    def __init__(self, embedding: torch.nn.Module, norm: torch.nn.Module, head: torch.Tensor) -> None:
        self._embedding = embedding
        self._norm = norm
        self._head = head
        # Checked rows of a round share a pass of the head: plain, two rows would cost what thirty do.
        self._logits = packed_linear(head)
        self.device: torch.device = head.device
        self.vocab_size: int = head.shape[0]

    @torch.inference_mode()
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids int64 [T] -> embeddings [T, hidden_size] in the compute dtype."""
        embedded: torch.Tensor = self._embedding(ids.to(self.device)[None])[0]
        return embedded

    @torch.inference_mode()
    def head(self, deep: torch.Tensor) -> torch.Tensor:
        """Deep states [T, hidden_size] (before the final norm) -> logits float32 [T, vocab_size]."""
        return self.logits(self.final_norm(deep))

    @torch.inference_mode()
    def final_norm(self, deep: torch.Tensor) -> torch.Tensor:
        """Deep states [T, hidden_size] -> what the head reads: the same after the final norm."""
        normed: torch.Tensor = self._norm(deep.to(self.device))
        return normed

    @torch.inference_mode()
    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """Deep states [T, hidden_size] after the final norm -> logits float32 [T, vocab_size]."""
        logits: torch.Tensor = self._logits(normed)
        return logits.float()

    def head_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The head's rows of token ids int64 [k]: [k, hidden_size], a copy."""
        return self._head[ids]


def load_config(folder: Path) -> Any:
    """The text model's configuration of a folder.

    Raises:
        ModelError: no configuration, or an architecture that HAT was not checked with.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: prepare a model with `hat model prepare`")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be read: {error}") from error
    check_supported(config)
    return config


def check_supported(config: Any) -> None:
    """Refuse what would not be computed exactly.

    Raises:
        ModelError: names what is not supported.
    """
    running = Version(transformers.__version__)
    if not OLDEST <= Version(running.base_version) < TOO_NEW:
        raise ModelError(f"transformers {running} is installed; HAT works with >= {OLDEST}, < {TOO_NEW}")
    if config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"model_type {config.model_type!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    for field in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if getattr(config, field, None):
            raise ModelError(f"config.json: {field}={getattr(config, field)!r} is not supported")


def load_decoder_slice(
    folder: Path, layers: LayerRange, dtype: torch.dtype, device: torch.device | None = None
) -> DecoderSlice:
    """Load decoder layers lo <= i < hi, reading only the shards that hold them.

    Args:
        folder: a prepared model, whole or the part that holds these layers.
        layers: at least one layer.
        dtype: compute dtype; stored weights are converted.
        device: where the layers run; the CPU by default.

    Raises:
        ModelError: unsupported architecture, or the folder does not hold exactly these layers' tensors.
    """
    config = load_config(folder)
    if not 0 <= layers.lo < layers.hi <= config.num_hidden_layers:
        raise ModelError(f"layers {layers} are not within the {config.num_hidden_layers} layers of {folder}")
    tensors = {
        f"model.layers.{int(name.split('.')[2]) - layers.lo}.{name.split('.', 3)[3]}": lazy
        for name, lazy in TensorIndex(folder).select(lambda name: _in_range(name, layers)).items()
    }
    sub = _sub_config(config, layers)
    sub.vocab_size, sub.pad_token_id = 1, None
    model = _build(sub, tensors, dtype, device, may_miss=_MAY_BE_MISSING, what=f"layers {layers} of {folder}")
    model.norm = torch.nn.Identity()
    del model.embed_tokens
    return DecoderSlice(model, layers, sub)


def load_device_ends(folder: Path, dtype: torch.dtype, device: torch.device | None = None) -> DeviceEnds:
    """Load embedding, final norm and LM head, reading only the shards that hold them.

    Raises:
        ModelError: unsupported architecture, or a tensor is missing.
    """
    config = load_config(folder)
    index = TensorIndex(folder)
    ends = index.select(lambda name: name in (EMBED, NORM))
    sub = _sub_config(config, LayerRange(0, 0))
    model = _build(sub, ends, dtype, device, may_miss=set(), what=f"embedding and norm of {folder}")
    if config.tie_word_embeddings:
        head = model.embed_tokens.weight
    else:
        found = index.select(lambda name: name == HEAD)
        if HEAD not in found:
            raise ModelError(f"{folder} has no {HEAD}, and its config does not tie it to the embedding")
        head = found[HEAD][:].to(dtype=dtype, device=device)
    return DeviceEnds(model.embed_tokens, model.norm, head.detach())


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. Raises ModelError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise ModelError(f"{folder} has no usable tokenizer: {error}") from error


def eos_token_ids(folder: Path) -> frozenset[int]:
    """The ids that end an answer: the generation config's, else the model config's."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file() and (eos := json.loads(path.read_text()).get("eos_token_id")) is not None:
            return frozenset(eos if isinstance(eos, list) else [eos])
    return frozenset()


def context_length(folder: Path) -> int:
    """Most tokens that the model can attend to."""
    return int(load_config(folder).max_position_embeddings)


def num_layers(folder: Path) -> int:
    """Decoder layers of the whole model."""
    return int(load_config(folder).num_hidden_layers)


def _sub_config(config: Any, layers: LayerRange) -> Any:
    """A copy of `config` for layers lo:hi, renumbered from 0."""
    sub = copy.deepcopy(config)
    sub.num_hidden_layers = len(layers)
    if getattr(sub, "layer_types", None):
        sub.layer_types = list(config.layer_types[layers.lo : layers.hi])
    if hasattr(
        sub, "decoder_sparse_step"
    ):  # which layers are dense depends on the layer's number in the whole model
        step = config.decoder_sparse_step
        dense = {i for i in range(layers.lo, layers.hi) if i in config.mlp_only_layers or (i + 1) % step}
        sub.mlp_only_layers, sub.decoder_sparse_step = sorted(i - layers.lo for i in dense), 1
    return sub


def _build(
    config: Any,
    tensors: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device | None,
    *,
    may_miss: set[str],
    what: str,
) -> Any:
    model_class = MODEL_MAPPING[type(config)]
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    with _quiet():
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            attn_implementation=_ATTENTION,
            output_loading_info=True,
        )
    missing = set(report["missing_keys"]) - may_miss
    wrong = missing | set(report["unexpected_keys"]) | {str(key) for key in report["mismatched_keys"]}
    if wrong:
        raise ModelError(
            f"{what}: {len(missing)} tensors are missing and {len(wrong) - len(missing)} do not fit the config, "
            f"for example {sorted(wrong)[0]}"
        )
    return model.eval().requires_grad_(False).to(device or torch.device("cpu"))


def _in_range(name: str, layers: LayerRange) -> bool:
    layer = layer_of(name)
    return layer is not None and layer in layers


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no table of missing tensors: a slice lacks tensors on purpose, and `_build` checks them."""
    logging, before = transformers.utils.logging, transformers.utils.logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()
