"""Between texts and token ids, by the checkpoint's own tokenizer."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from placer.core.errors import InputFileError, UsageError
from placer.execute.hf.architectures import require_transformers

__all__ = ["decode", "encode", "has_tokenizer"]

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def has_tokenizer(model_path: Path) -> bool:
    """Whether the folder has files of a tokenizer."""
    return any((model_path / name).is_file() for name in FILES)


def encode(model_path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text. Raises InputFileError where the folder has no tokenizer that can be read."""
    tokenizer = _tokenizer(model_path)
    ids = [list(map(int, tokenizer(text)["input_ids"])) for text in texts]
    for index, (text, tokens) in enumerate(zip(texts, ids, strict=True)):
        if not tokens:
            raise UsageError(f"prompt {index} ({text[:40]!r}) has no token; give a text that is not empty")
    return ids


def decode(model_path: Path, tokens: Sequence[Sequence[int]]) -> list[str]:
    """The text of each list of token ids, without special tokens."""
    tokenizer = _tokenizer(model_path)
    return [str(tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in tokens]


def _tokenizer(model_path: Path) -> Any:
    require_transformers()
    if not has_tokenizer(model_path):
        raise InputFileError(
            f"{model_path}: has no tokenizer (none of {', '.join(FILES)}), which texts need; add one or give token ids"
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(model_path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        first = str(error).strip().partition("\n")[0]
        raise InputFileError(f"{model_path}: its tokenizer cannot be read ({first}); give token ids") from error
