"""Held-out text as windows of tokens, dealt to the streams of pools.

A file is an .npz whose arrays are texts as token ids, or plain UTF-8 text, which the checkpoint's ``tokenizer.json``
turns into ids; that needs the `tokenizers` package.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shmroute.errors import CheckpointError, ConfigError, TextError

Tokens = npt.NDArray[np.int64]


def read_texts(path: Path, checkpoint: Path, vocab_size: int) -> dict[str, Tokens]:
    """The texts of a file by name, each int64 [tokens].

    Raises
    ------
    TextError
        If it cannot be read, holds something else, or a token that the model does not have.
    ConfigError
        If it is plain text and the `tokenizers` package is not installed.
    CheckpointError
        If it is plain text and the checkpoint has no tokenizer that can be read.
    """
    texts = _read_ids(path) if path.suffix == ".npz" else {path.stem: _tokenized(path, checkpoint)}
    for name, ids in texts.items():
        outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if len(outside):
            raise TextError(
                str(path),
                f"token {outside[0]} of {name!r} is {ids[outside[0]]}, but the model's vocabulary has {vocab_size}: "
                f"it was made with another tokenizer",
            )
    return texts


def _read_ids(path: Path) -> dict[str, Tokens]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise TextError(str(path), f"cannot be read: {error}") from error
    if not arrays:
        raise TextError(str(path), "has no arrays; token ids are expected, an array for each text")
    for name, array in arrays.items():
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise TextError(
                str(path), f"{name!r} is {array.dtype} {list(array.shape)}; token ids, integers [tokens], are expected"
            )
    return {name: array.astype(np.int64) for name, array in arrays.items()}


def _tokenized(path: Path, checkpoint: Path) -> Tokens:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(str(path), f"cannot be read as text: {error}") from error
    try:
        from tokenizers import Tokenizer  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"{path} is plain text, which needs the tokenizers package: pip install 'shmroute[text]', or give an .npz "
            f"of token ids"
        ) from error
    file = checkpoint / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing more specific
        raise CheckpointError(str(file), f"is no tokenizer that can be read: {error}") from error
    return np.array(tokenizer.encode(text).ids, np.int64)


def deal(texts: dict[str, Tokens], path: Path, window: int, streams: int, pools: int | None) -> Tokens:
    """Windows for the streams of pools, int64 [pools, streams, window].

    The texts are cut into windows, as many of each, and dealt in turns, so that a pool's streams are of different
    texts if there are several.

    Parameters
    ----------
    texts : dict
        As `read_texts` returns them.
    path : Path
        Named in errors.
    window : int
        Tokens of each; one more than are predicted.
    streams : int
        Of a pool.
    pools : int or None
        At most so many, spread evenly over the texts; None for all.

    Raises
    ------
    TextError
        If the texts are too short for one pool.
    """
    each = min(len(ids) // window for ids in texts.values())
    cut = [ids[: each * window].reshape(each, window) for ids in texts.values()]
    windows = np.stack(cut, axis=1).reshape(-1, window)
    count = len(windows) // streams
    if count == 0:
        shortest = min(texts, key=lambda name: len(texts[name]))
        raise TextError(
            str(path),
            f"is too short: {streams} streams of {window} tokens are wanted, and {shortest!r} has "
            f"{len(texts[shortest])} tokens; give more text, a smaller --window or fewer --streams",
        )
    dealt = windows[: count * streams].reshape(count, streams, window)
    if pools is not None and pools < count:
        dealt = dealt[np.arange(pools) * count // pools]
    return dealt
