"""Text for the small model: gather it, split its documents, turn it into token ids.

Nothing here is written into the repository. Text is fetched with ``apt-get download`` into a work folder (no root is
needed), or read from a folder of your own with one subfolder per domain. Documents, not tokens, are split into training
and held-out, so that no recorded prompt was trained on.

Shapes: N training token, Q held-out prompt, S position in a prompt.
"""

from __future__ import annotations

import gzip
import random
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = ["END_OF_TEXT_ID", "VOCAB_SIZE", "Corpus", "load_corpus"]

VOCAB_SIZE = 4096
END_OF_TEXT_ID = 0
PROMPT_TOKENS = 512
PROMPTS_PER_DOCUMENT = 4
HELD_OUT_SHARE = 0.12
DOMAIN_BYTES = 2_600_000
DOCUMENT_BYTES = 48_000
SHORTEST_DOCUMENT = 1_500
CORPUS_SEED = 20


@dataclass(frozen=True, slots=True)
class Source:
    """Files of one Debian package: its name, a glob below its root, and how a file becomes plain text."""

    package: str
    glob: str
    read: Callable[[Path], str]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token ids: the training stream (N,), held-out prompts (Q, S) and the index of each prompt's domain (Q,)."""

    domains: tuple[str, ...]
    train_N: NDArray[np.uint16]
    prompt_QS: NDArray[np.uint16]
    domain_Q: NDArray[np.uint8]


class _Prose(HTMLParser):
    """Collects the visible words of an HTML page."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words.append(data)


def _raw(path: Path) -> str:
    """Return a file's text, unzipped where it is compressed."""
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    return data.decode("utf-8", errors="replace")


def _html_prose(path: Path) -> str:
    """Return the words of an HTML page without its markup."""
    page = _Prose()
    page.feed(_raw(path))
    return re.sub(r"\s*\n\s*", "\n", "".join(page.words))


def _man_prose(path: Path) -> str:
    """Return the running text of a manual page without requests and font changes."""
    lines = [line for line in _raw(path).splitlines() if not line.startswith((".", "'"))]
    return re.sub(r"\\f[A-Z]|\\&", "", "\n".join(lines))


def _language(handbook: str, guide: str, man: str, *man_packages: str) -> list[Source]:
    """Return the sources of one human language: a handbook, the installation guide and translated manual pages."""
    books = [
        Source("debian-handbook", f"usr/share/doc/debian-handbook/html/{handbook}/*.html", _html_prose),
        Source("installation-guide-amd64", f"usr/share/doc/installation-guide-amd64/{guide}/*.html", _html_prose),
    ]
    return books + [Source(package, f"usr/share/man/{man}/man*/*.gz", _man_prose) for package in man_packages]


# Python's domain is missing here on purpose: its text is the standard library of the interpreter that runs this.
SOURCES: dict[str, list[Source]] = {
    "en": [
        *_language("en-US", "en", "-"),
        Source("debian-reference-en", "usr/share/debian-reference/*.en.html", _html_prose),
        Source("python3.11-doc", "usr/share/doc/python3.11/html/whatsnew/*.html", _html_prose),
        Source("python3.11-doc", "usr/share/doc/python3.11/html/howto/*.html", _html_prose),
    ],
    "de": _language("de-DE", "de", "de", "manpages-de"),
    "fr": _language("fr-FR", "fr", "fr", "manpages-fr"),
    "ru": _language("ru-RU", "ru", "ru", "manpages-ru", "manpages-ru-dev"),
    "ja": _language("ja-JP", "ja", "ja", "manpages-ja"),
    "zh": _language("zh-CN", "zh_CN", "zh_CN", "manpages-zh"),
    "c": [
        Source("linux-libc-dev", "usr/include/**/*.h", _raw),
        Source("libc6-dev", "usr/include/**/*.h", _raw),
    ],
    "html": [Source("python3.11-doc", "usr/share/doc/python3.11/html/library/*.html", _raw)],
    "man": [
        Source("manpages", "usr/share/man/man*/*.gz", _raw),
        Source("manpages-dev", "usr/share/man/man*/*.gz", _raw),
    ],
    "dictionary": [Source("dict-gcide", "usr/share/dictd/*.dict.dz", _raw)],
}
NON_LATIN = frozenset({"ru", "ja", "zh"})


def _unpack(package: str, work: Path) -> Path:
    """Return the folder with a Debian package's files, downloading it on first use."""
    root = work / "packages" / package
    if root.is_dir():
        return root
    download = work / "downloads"
    download.mkdir(parents=True, exist_ok=True)
    print(f"fetching {package}", file=sys.stderr)
    subprocess.run(["apt-get", "download", "-qq", package], cwd=download, check=True)
    archive = next(download.glob(f"{package}_*.deb"))
    partial = download / package
    subprocess.run(["dpkg-deb", "-x", str(archive), str(partial)], check=True)
    root.parent.mkdir(exist_ok=True)
    partial.rename(root)
    archive.unlink()
    return root


def _debian_texts(work: Path) -> Iterator[tuple[str, str]]:
    """Yield (domain, text) for every file of SOURCES, then the standard library's source."""
    for domain, sources in SOURCES.items():
        for source in sources:
            for path in sorted(_unpack(source.package, work).glob(source.glob)):
                if path.is_file() and not path.is_symlink():
                    yield domain, source.read(path)
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not {"site-packages", "test", "tests"} & set(path.parts):
            yield "python", _raw(path)


def _folder_texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (domain, text) for every file below folder; a domain is the name of a direct subfolder."""
    for path in sorted(folder.glob("*/**/*")):
        if path.is_file():
            yield path.relative_to(folder).parts[0], _raw(path)


def _documents(texts: Iterator[tuple[str, str]]) -> dict[str, list[str]]:
    """Return each domain's distinct documents in a seeded random order, at most DOMAIN_BYTES of them."""
    pieces: dict[str, dict[str, None]] = {}
    for domain, text in texts:
        for start in range(0, len(text), DOCUMENT_BYTES):
            piece = text[start : start + DOCUMENT_BYTES].strip()
            foreign = sum(letter > "\u0370" for letter in piece) / (len(piece) or 1)
            readable = "\ufffd" not in piece and (domain not in NON_LATIN or foreign > 0.15)
            if readable and len(piece.encode()) >= SHORTEST_DOCUMENT:
                pieces.setdefault(domain, {})[piece] = None
    chosen: dict[str, list[str]] = {}
    for domain, distinct in sorted(pieces.items()):
        order = list(distinct)
        random.Random(f"{CORPUS_SEED} {domain}").shuffle(order)
        sizes = np.cumsum([len(piece.encode()) for piece in order])
        chosen[domain] = order[: int(np.searchsorted(sizes, DOMAIN_BYTES)) + 1]
    return chosen


def _train_tokenizer(texts: Iterator[str], path: Path) -> Tokenizer:
    """Return a byte-level BPE tokenizer of VOCAB_SIZE, trained on texts and saved at path."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))
    return tokenizer


def _tokenize(documents: dict[str, list[str]], tokenizer: Tokenizer) -> Corpus:
    """Return the corpus: the first HELD_OUT_SHARE of each domain's documents become prompts, the rest the stream."""
    stream: list[NDArray[np.uint16]] = []
    prompts: list[NDArray[np.uint16]] = []
    prompt_domains: list[int] = []
    for index, texts in enumerate(documents.values()):
        held_out = max(1, round(HELD_OUT_SHARE * len(texts)))
        encoded = [np.array(item.ids, dtype=np.uint16) for item in tokenizer.encode_batch(texts)]
        for ids in encoded[:held_out]:
            count = min(len(ids) // PROMPT_TOKENS, PROMPTS_PER_DOCUMENT)
            prompts.extend(ids[: count * PROMPT_TOKENS].reshape(count, PROMPT_TOKENS))
            prompt_domains.extend([index] * count)
        for ids in encoded[held_out:]:
            stream.extend((ids, np.array([END_OF_TEXT_ID], dtype=np.uint16)))
    if not prompts:
        raise ValueError(f"no held-out document has {PROMPT_TOKENS} tokens: give more or longer texts")
    return Corpus(tuple(documents), np.concatenate(stream), np.stack(prompts), np.array(prompt_domains, dtype=np.uint8))


def load_corpus(work: Path, text: Path | None = None) -> Corpus:
    """Return the corpus kept in work, gathering and tokenizing it on first use.

    Parameters
    ----------
    work: folder outside the repository for packages, tokenizer and token ids.
    text: folder with one subfolder of UTF-8 files per domain, instead of Debian's documentation.
    """
    saved = work / "tokens.npz"
    if not saved.exists():
        work.mkdir(parents=True, exist_ok=True)
        documents = _documents(_folder_texts(text) if text else _debian_texts(work))
        for domain, texts in documents.items():
            size = sum(len(piece.encode()) for piece in texts)
            print(f"{domain:10s} {len(texts):5d} documents {size / 1e6:5.2f} MB", file=sys.stderr)
        every_text = (piece for texts in documents.values() for piece in texts)
        corpus = _tokenize(documents, _train_tokenizer(every_text, work / "tokenizer.json"))
        np.savez(
            saved,
            domains=np.array(corpus.domains),
            train_N=corpus.train_N,
            prompt_QS=corpus.prompt_QS,
            domain_Q=corpus.domain_Q,
        )
    with np.load(saved, allow_pickle=False) as kept:
        domains = tuple(str(name) for name in kept["domains"])
        return Corpus(domains, kept["train_N"], kept["prompt_QS"], kept["domain_Q"])
