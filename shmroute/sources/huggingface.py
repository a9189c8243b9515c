"""Experts out of a Hugging Face model folder, read from the safetensors files as they are.

Use it for a local folder with ``config.json`` and weights of a family of `SUPPORTED_MODEL_TYPES` in float32, float16
or bfloat16. It downloads, converts and dequantises nothing: an expert's bytes go from the file into the given buffer,
its `expert_parts` back to back, and whatever cannot be served like that is an error that names the file and the tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from shmroute.errors import CheckpointError
from shmroute.sources.base import DTYPES, ExpertGeometry, SourceSpec, TensorLayout
from shmroute.sources.bounded_json import read_json_object, shown
from shmroute.sources.expert_tensors import (
    DTYPE_NAMES,
    StoredTensor,
    expert_parts,
    find_expert_tensors,
    is_moe_tensor,
)
from shmroute.sources.model_config import ModelConfig, read_model_config
from shmroute.sources.safetensors_header import read_header_of
from shmroute.sources.served_file import ServedFile

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 256 * 2**20
MAX_FILES = 2**15 - 1
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class _Run:
    """Bytes of an expert that lie together in a file.

    Attributes
    ----------
    file : ServedFile
    offset, length : int
        Where in the file.
    pieces : tuple of (int, int)
        Where they go in the expert's buffer: from, to, one after the other.
    tensor : str
        The first one's name.
    """

    file: ServedFile
    offset: int
    length: int
    pieces: tuple[tuple[int, int], ...]
    tensor: str


class HuggingFaceSource:
    """A source over a local model folder.

    Parameters
    ----------
    path : str or os.PathLike
        The folder. Weights are ``model.safetensors``, else the shards that ``model.safetensors.index.json``
        lists, else the only ``*.safetensors`` file.

    Raises
    ------
    UnsupportedScoringError, UnsupportedDtypeError
        If the model routes, or is stored, in a way that cannot be served as it is.
    CheckpointError
        If anything is missing, damaged, contradictory or of an unknown family.

    Notes
    -----
    Everything is checked when the source is opened, except the weights' own bytes. Opening reads all headers
    (about 0.5 s for 61 layers of 256 experts) and keeps some 40 bytes per expert, some 600 more for each that was
    read, and one descriptor for each file that holds experts or routers: up to some hundreds, so mind
    ``ulimit -n``.

    The fingerprint covers file names, sizes, all headers, the keys of ``config.json`` that are used, and a
    sample of the weights: a change of weights alone that leaves each layer's first bytes of router and first
    expert as they are goes unnoticed.

    `read_into` may be called by several threads; `close` only when none of them reads any more.
    A file that changes in place while it is served is detected at each read; see `ServedFile` for the limits.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._folder = os.path.abspath(os.fspath(path))
        if not os.path.isdir(self._folder):
            raise CheckpointError(self._folder, "there is no such folder; a local model folder is expected")
        config_path = os.path.join(self._folder, CONFIG_NAME)
        config = read_model_config(config_path)
        with ExitStack() as opened:
            listing, weight_map, names = _list_weights(self._folder)
            self._files: list[ServedFile] = []
            digest = xxhash.xxh3_128()
            _absorb(digest, json.dumps(asdict(config), sort_keys=True).encode())
            stored: dict[str, StoredTensor] = {}
            for name in names:
                file = ServedFile(os.path.join(self._folder, name))
                opened.callback(file.close)
                header = read_header_of(file.fd, file.path)
                _absorb(digest, name.encode(), str(file.size).encode(), header.raw)
                if weight_map is None:
                    wanted = [tensor for tensor in header.tensors if is_moe_tensor(tensor)]
                else:
                    wanted = weight_map[name]
                for tensor in wanted:
                    if tensor not in header.tensors:
                        raise CheckpointError(file.path, f"{INDEX_NAME} says it is here, but it is not", tensor)
                    stored[tensor] = StoredTensor(len(self._files), file.path, header.tensors[tensor])
                if wanted:
                    self._files.append(file)
                else:
                    file.close()
            self._tensors = find_expert_tensors(config, stored, listing, config_path)
            self._layouts = _layouts(config, self._tensors.dtype)
            self._known_runs: dict[tuple[int, int], tuple[_Run, ...]] = {}
            self._sample(digest)
            for file in self._files:
                file.check_unchanged()
            opened.pop_all()
        last = self._layouts[-1]
        self._geometry = ExpertGeometry(
            num_layers=len(config.moe_layers),
            num_experts=config.num_experts,
            top_k=config.top_k,
            scoring=config.scoring,
            layer_numbers=config.moe_layers,
            hidden_size=config.hidden_size,
            expert_bytes=last.offset + last.nbytes,
            tensors=self._layouts,
            fingerprint=digest.hexdigest(),
        )

    @property
    def geometry(self) -> ExpertGeometry:
        return self._geometry

    @property
    def spec(self) -> SourceSpec:
        return SourceSpec("shmroute.sources.huggingface:HuggingFaceSource", {"path": self._folder})

    def read_into(
        self, layer: int, expert: int, buffer: memoryview, filled: Callable[[int, int], object] | None = None
    ) -> None:
        """Read one expert from its file or files straight into `buffer`; see `ExpertSource.read_into`.

        Raises
        ------
        CheckpointChangedError
            If a file changed since it was opened.
        CheckpointError
            If a file ends too early.
        OSError
            As the read gave it.
        IndexError, ValueError
            If there is no such expert, or `buffer` is not writable, of format ``"B"`` and exactly as large as
            one.
        """
        self._check_index(layer, expert)
        size = self._geometry.expert_bytes
        if buffer.readonly or buffer.format != "B" or buffer.ndim != 1 or len(buffer) != size:
            raise ValueError(f"the buffer must be writable, contiguous, of format 'B' and {size} bytes long")
        for run in self._runs(layer, expert):
            run.file.read_into(buffer, run.pieces, run.offset, run.tensor, filled)

    def drop_page_cache(self, layer: int, expert: int) -> None:
        """Let the kernel drop the file pages behind an expert.

        Whole pages inside the expert's ranges go. What stays: the first and last page of a range where it
        shares them with its neighbours (so at most two per range), and pages that some process has mapped or
        locked.
        """
        self._check_index(layer, expert)
        for run in self._runs(layer, expert):
            run.file.drop_page_cache(run.offset, run.length)

    def location(self, layer: int, expert: int) -> str:
        self._check_index(layer, expert)
        file = self._files[self._tensors.file[layer, expert, 0]]
        return f"{file.path}: {self._tensor_name(layer, expert, 0)}"

    def gate(self, layer: int) -> npt.NDArray[np.float32]:
        """The router's weights of one MoE layer; see `ExpertSource.gate`.

        Raises
        ------
        CheckpointError, OSError
            As `read_into`.
        """
        self._check_index(layer, 0)
        return self._router_tensor(*self._tensors.gates[layer])

    def gate_bias(self, layer: int) -> npt.NDArray[np.float32] | None:
        """What the router of one MoE layer adds to its logits, in the families that do; see `ExpertSource`.

        Raises
        ------
        CheckpointError, OSError
            As `read_into`.
        """
        self._check_index(layer, 0)
        return self._router_tensor(*self._tensors.gate_biases[layer]) if self._tensors.gate_biases else None

    def correction_bias(self, layer: int) -> npt.NDArray[np.float32] | None:
        """``e_score_correction_bias`` of one MoE layer, in the families that have it; see `ExpertSource`.

        Raises
        ------
        CheckpointError, OSError
            As `read_into`.
        """
        self._check_index(layer, 0)
        return self._router_tensor(*self._tensors.correction_biases[layer]) if self._tensors.correction_biases else None

    def _router_tensor(self, name: str, tensor: StoredTensor) -> npt.NDArray[np.float32]:
        raw = bytearray(tensor.entry.end - tensor.entry.begin)
        self._files[tensor.file].read_into(memoryview(raw), [(0, len(raw))], tensor.entry.begin, name)
        stored = np.frombuffer(raw, DTYPES[DTYPE_NAMES[tensor.entry.dtype]])
        return stored.reshape(tensor.entry.shape).astype(np.float32)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _check_index(self, layer: int, expert: int) -> None:
        layers, experts, _ = self._tensors.begin.shape
        # Negative numbers would count from the end, and serve another expert than was meant.
        if not (0 <= layer < layers and 0 <= expert < experts):
            raise IndexError(f"no expert {expert} of layer {layer}: there are {layers} layers of {experts} experts")

    def _tensor_name(self, layer: int, expert: int, part: int) -> str:
        return self._tensors.names[layer][part].replace("{}", str(expert))

    def _runs(self, layer: int, expert: int) -> tuple[_Run, ...]:
        """How an expert is read: one run for tensors that are adjacent in one file, in the file's order.

        Files often hold w1, w2, w3, that is gate, down, up: still one read, scattered to the slot's order.
        """
        found = self._known_runs.get((layer, expert))
        if found is None:
            found = self._known_runs[layer, expert] = tuple(self._find_runs(layer, expert))
        return found

    def _find_runs(self, layer: int, expert: int) -> Iterator[_Run]:
        files = self._tensors.file[layer, expert].tolist()
        begins = self._tensors.begin[layer, expert].tolist()
        order = sorted(range(len(begins)), key=lambda part: (files[part], begins[part]))
        while order:
            first = order[0]
            pieces: list[tuple[int, int]] = []
            end = begins[first]
            while order and files[order[0]] == files[first] and begins[order[0]] == end:
                layout = self._layouts[order.pop(0)]
                end += layout.nbytes
                if pieces and pieces[-1][1] == layout.offset:
                    pieces[-1] = pieces[-1][0], layout.offset + layout.nbytes
                else:
                    pieces.append((layout.offset, layout.offset + layout.nbytes))
            yield _Run(
                self._files[files[first]], begins[first], end - begins[first], tuple(pieces),
                self._tensor_name(layer, expert, first),
            )  # fmt: skip

    def _sample(self, digest: xxhash.xxh3_128) -> None:
        """Add each layer's first bytes of router and first expert to the fingerprint.

        A fine-tuned model has the same headers and sizes as its base, but will hardly have the same weights
        here. Hashing all weights instead would mean reading them all at every start.
        """
        router = (self._tensors.gates, self._tensors.gate_biases, self._tensors.correction_biases)
        for layer in range(len(self._tensors.gates)):
            places = [
                (tensor.file, tensor.entry.begin, tensor.entry.end, name)
                for name, tensor in (tensors[layer] for tensors in router if tensors)
            ]
            for part, layout in enumerate(self._layouts):
                file, begin = int(self._tensors.file[layer, 0, part]), int(self._tensors.begin[layer, 0, part])
                places.append((file, begin, begin + layout.nbytes, self._tensor_name(layer, 0, part)))
            for file, begin, end, what in places:
                raw = bytearray(min(end - begin, _SAMPLE_BYTES))
                self._files[file].read_into(memoryview(raw), [(0, len(raw))], begin, what)
                _absorb(digest, bytes(raw))


def _absorb(digest: xxhash.xxh3_128, *parts: bytes) -> None:
    for part in parts:
        # With their lengths, so that no two lists of parts give the same stream.
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


def _layouts(config: ModelConfig, dtype: str) -> tuple[TensorLayout, ...]:
    layouts: list[TensorLayout] = []
    for name, shape in expert_parts(config).items():
        offset = layouts[-1].offset + layouts[-1].nbytes if layouts else 0
        layouts.append(TensorLayout(name, offset, shape, dtype))
    return tuple(layouts)


def _list_weights(folder: str) -> tuple[str, dict[str, list[str]] | None, list[str]]:
    """The weights' files.

    Returns
    -------
    listing : str
        Path of the file that says which tensors there are.
    weight_map : dict or None
        For each file the MoE tensors that it must have; None if there is only one file.
    names : list of str
        All files, sorted.
    """
    single = os.path.join(folder, SINGLE_NAME)
    if os.path.lexists(single):
        return single, None, [SINGLE_NAME]
    index = os.path.join(folder, INDEX_NAME)
    if os.path.lexists(index):
        weight_map = _read_index(index)
        return index, weight_map, sorted(weight_map)
    try:
        found = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    except OSError as error:
        raise CheckpointError(folder, f"the folder cannot be listed ({error})") from error
    if len(found) != 1:
        raise CheckpointError(
            folder,
            f"neither {SINGLE_NAME} nor {INDEX_NAME}, and {len(found)} other *.safetensors files, not one",
        )
    return os.path.join(folder, found[0]), None, found


def _read_index(path: str) -> dict[str, list[str]]:
    """For each shard that the index names, the MoE tensors in it."""
    listed = read_json_object(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(path, "the key 'weight_map' is missing, empty or no JSON object")
    shards: dict[str, list[str]] = {}
    for tensor, shard in listed.items():
        # A name with a separator could lead to any file of this host.
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or "/" in shard or "\0" in shard:
            raise CheckpointError(
                path,
                f"its shard is {shown(shard)}; the plain name of a *.safetensors file is expected",
                tensor,
            )
        wanted = shards.setdefault(shard, [])
        if is_moe_tensor(tensor):
            wanted.append(tensor)
    if len(shards) > MAX_FILES:
        raise CheckpointError(path, f"{len(shards)} shards are listed, but at most {MAX_FILES} are accepted")
    return shards
