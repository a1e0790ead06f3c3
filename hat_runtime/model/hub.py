"""Fetching a model, or only the shards of a part of it, from the Hugging Face hub.

huggingface_hub does the transfer: HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean what they always mean.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hat_runtime.errors import HatError, ModelError
from hat_runtime.model.cache import cache_dir
from hat_runtime.model.manifest import MANIFEST_FILE, Progress, read_config
from hat_runtime.model.sources import SIDE_FILES, Opened, open_folder
from hat_runtime.model.weights import HEAD, INDEX_FILE, SINGLE_FILE, Part, TensorIndex, part_names


@dataclass(frozen=True)
class Listing:
    """A repository at one commit: every file's name with its size and content hash."""

    commit: str
    files: dict[str, str]


def open_hub(
    source: str, part: Part, input_layers: int, dtype: str | None, progress: Progress | None = None
) -> Opened:
    """Fetch configuration, index and the shards of a part into the hub's cache, and open them.

    Args:
        source: ORGANISATION/NAME, or ORGANISATION/NAME@REVISION.

    Raises:
        ModelError: not found, gated, offline, unreachable, or without safetensors; the text says what to do.
    """
    repo, _, revision = source.partition("@")
    with _explained(source):
        listing = _list_files(repo, revision or "main")
        folder = _fetch(repo, listing, "config.json").parent
        if INDEX_FILE in listing.files:
            _fetch(repo, listing, INDEX_FILE)
        elif SINGLE_FILE in listing.files:
            _fetch(repo, listing, SINGLE_FILE)
        else:
            pickles = sorted(name for name in listing.files if name.endswith(".bin"))
            raise ModelError(
                f"{source} on the hub holds neither {INDEX_FILE} nor {SINGLE_FILE}"
                + (
                    f", only pickle weights ({pickles[0]}), which run code when they are read"
                    if pickles
                    else ""
                )
            )
        index = TensorIndex(folder)
        tied = bool(read_config(folder).get("tie_word_embeddings", HEAD not in index.names))
        shards = index.shards_of(part_names(index.names, part, input_layers, tied))
        for number, shard in enumerate(shards):
            if progress:
                progress(f"fetching {source}, files", number, len(shards))
            _fetch(repo, listing, shard)
        if progress:
            progress(f"fetching {source}, files", len(shards), len(shards))
        wanted = [MANIFEST_FILE] if part == "cloud" else [MANIFEST_FILE, *SIDE_FILES]
        for name in wanted:
            if name in listing.files:
                _fetch(repo, listing, name)
    opened = open_folder(folder, dtype, label=f"{repo}@{listing.commit}")
    return replace(opened, hub_files_id=_files_id(listing, index.shards, dtype))


def _files_id(listing: Listing, shards: list[str], dtype: str | None) -> str:
    """The same for every part: it names all of the model's shards, fetched or not, and the conversion."""
    lines = [f"{shard} {listing.files.get(shard, 'absent')}\n" for shard in shards]
    return hashlib.sha256("".join([*lines, f"dtype {dtype or 'as stored'}\n"]).encode()).hexdigest()


def _list_files(repo: str, revision: str) -> Listing:
    """The repository's files from the hub; offline, what the hub said last time."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    kept = cache_dir() / "hub" / f"{repo.replace('/', '--')}@{revision.replace('/', '--')}.json"
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except OfflineModeIsEnabled:
        if not kept.is_file():
            raise
        return Listing(**json.loads(kept.read_text(encoding="utf-8")))
    files = {
        file.rfilename: f"{file.size} {file.lfs.sha256 if file.lfs else file.blob_id}"
        for file in info.siblings or []
    }
    listing = Listing(info.sha or revision, files)
    with suppress(OSError):  # only offline use needs it
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(asdict(listing)), encoding="utf-8")
    return listing


def _fetch(repo: str, listing: Listing, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, name, revision=listing.commit))


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Say what went wrong on the hub, and what to do, in our words."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{source} is gated: accept its terms on its page on the hub, then set HF_TOKEN to a token of that account"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{source}: the hub knows the model, but not this revision") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{source} was not found at {constants.ENDPOINT}; check the spelling, and set HF_TOKEN if it is private"
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        if constants.HF_HUB_OFFLINE:
            raise ModelError(
                f"{source} is not in the local cache and HF_HUB_OFFLINE is set; unset it once, or name a folder"
            ) from error
        raise _unreachable(source, constants.ENDPOINT, error) from error
    except errors.EntryNotFoundError as error:
        raise ModelError(
            f"{source} on the hub lacks a file that its index names: {_first_line(error)}"
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise ModelError(
                f"{source}: the hub refuses access ({status}); set HF_TOKEN to a token that may read it"
            ) from error
        raise ModelError(f"{source}: the hub answers {_first_line(error)}") from error
    except errors.HTTPError as error:
        raise _unreachable(source, constants.ENDPOINT, error) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            home = os.environ.get("HF_HOME") or constants.HF_HOME
            raise HatError(f"no space to fetch {source} into {home}; free some, or set HF_HOME") from error
        raise ModelError(f"cannot fetch {source}: {error}") from error


def _unreachable(source: str, endpoint: str, error: BaseException) -> ModelError:
    return ModelError(
        f"cannot fetch {source}: {endpoint} cannot be reached ({_first_line(error)}); "
        "HF_ENDPOINT names another hub, HF_HUB_OFFLINE=1 uses what was fetched before"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
