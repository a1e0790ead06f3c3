"""Do two folders turn text into the same token ids?"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from hat_runtime.errors import ModelError


def tokenizer_id(folder: Path) -> str:
    """sha256 over the vocabulary of folder/tokenizer.json, in hexadecimal; "" where there is no such file.

    Only what gives a token its number counts: templates, normalizers and post-processors may differ.

    Raises:
        ModelError: the file is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return ""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = data["model"]["vocab"]
        if isinstance(vocabulary, dict):
            tokens = sorted((int(number), token) for token, number in vocabulary.items())
        else:  # Unigram: [token, score] in the order of their ids
            tokens = [(number, entry[0]) for number, entry in enumerate(vocabulary)]
        added = sorted((int(entry["id"]), entry["content"]) for entry in data.get("added_tokens", ()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    return hashlib.sha256(json.dumps([tokens, added]).encode()).hexdigest()
