"""Text that every machine has: the source of Python's standard library, as ids of characters."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ALPHABET = "\t\n" + "".join(map(chr, range(32, 127)))
MAX_BYTES = 4_000_000  # of source, so that the work does not depend on how much a distribution installs
VALIDATION_EVERY = 10  # one file in ten
# installed later, or tests, or tables that hold no code
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}


class Corpus(NamedTuple):
    """Ids of characters, file after file; no file is in both.

    Args:
        train, validation: (characters,), uint8, indices into ALPHABET.
        digest: Of both: other text, other digest.
    """

    train: Tensor
    validation: Tensor
    digest: str


def files(root: Path) -> Iterator[Path]:
    """The sources under ``root``, in an order that depends on their relative paths alone and mixes packages."""
    found = {PurePosixPath(path.relative_to(root).as_posix()): path for path in root.rglob("*.py")}
    kept = [
        name
        for name in found
        # build settings and the machine's own start-up files differ between installations of one version
        if not LEFT_OUT & set(name.parts)
        and not name.name.startswith(("_sysconfigdata", "sitecustomize", "usercustomize"))
        and not name.parts[0].startswith("config-")
    ]
    for name in sorted(kept, key=lambda name: hashlib.sha256(str(name).encode()).hexdigest()):
        yield found[name]


def encode(source: bytes) -> np.ndarray:
    """Ids of the characters of ALPHABET; all others (of lines that end with CR LF the CR too) are dropped."""
    ids = np.full(256, 255, dtype=np.uint8)
    ids[np.frombuffer(ALPHABET.encode(), dtype=np.uint8)] = np.arange(len(ALPHABET), dtype=np.uint8)
    found = ids[np.frombuffer(source, dtype=np.uint8)]
    return found[found < len(ALPHABET)]


def corpus_of(root: Path, max_bytes: int = MAX_BYTES) -> Corpus:
    """The files of ``root`` up to ``max_bytes`` in all, every VALIDATION_EVERY-th for validation."""
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    size = 0
    for number, path in enumerate(files(root)):
        ids = encode(path.read_bytes())
        size += len(ids)
        if size > max_bytes:
            break
        parts[number % VALIDATION_EVERY == 0].append(ids)
    if not all(parts):
        raise FileNotFoundError(f"{root} holds too few .py files to train on: use a Python with its standard library")
    train, validation = (np.concatenate(part) for part in parts)
    digest = hashlib.sha256(train.tobytes() + b"\xff" + validation.tobytes()).hexdigest()[:16]
    return Corpus(torch.from_numpy(train), torch.from_numpy(validation), digest)


@cache
def standard_library() -> Corpus:
    """That of the running Python."""
    return corpus_of(Path(sysconfig.get_paths()["stdlib"]))
