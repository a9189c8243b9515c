"""The model that the group ``models`` runs: of Qwen3-MoE's architecture, written on the spot, larger than its memory.

Its weights are random, but not its routing: random gates use all experts alike, which no trained model does. An
embedding is the sum of three parts, and a gate's logit so of three terms:

- a part that all tokens have: some experts are more popular than others whatever the token (log-normal odds);
- a part that the tokens of a run of `RUN` have in common, as those of a text on one topic: experts are used again soon;
- a part of the token's own.

`SHARES` says how much of a logit's variance each is. They were set so that the cache hits about as often as on recorded
routing of a trained model: with 8 layers of 128 experts, top-8, and slots for 10, 25 and 50 % of them, ``shmroute
replay`` of 630 tokens gives .421, .816 and .933 for LRU; of Qwen3-30B-A3B the README's table of eviction policies has
.490, .787 and .913.

What the head makes of a token is its successor in the vocabulary, so that greedy decoding walks from wherever its
prompt ends through topic after topic, in whatever order floating-point numbers are summed; a head of random weights
would soon repeat one token for ever.

Experts are fused, ``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I] as Transformers keeps them in memory, and
begin at a page. That is what favours Transformers: such a tensor it maps and uses as it lies in the file, while experts
each by itself, as most published checkpoints have them, are copied into memory of the process.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shmroute.bench.checkpoints import check_room
from shmroute.shared.layout import PAGE
from shmroute.sources.base import DTYPES
from shmroute.sources.synthetic import SyntheticSource

RUN = 48
"""Tokens of one topic."""

LOGIT_SPREAD = 1.5
"""Standard deviation of a gate's logit, over experts and tokens."""

SHARES = (0.35, 0.35, 0.30)
"""Of its variance: what is the same for all tokens, for a topic's, and what is the token's own."""

EMBEDDING_SCALE = 4.0
"""Standard deviation of an element of an embedding: large beside what the layers add, so that the token is not lost."""

ATTENTION_SCALE = 0.02
"""Standard deviation of an element of attention's projections."""

HEAD_DIM = 64

PREFIX = "shmroute-bench-model-"
"""Of a folder's name; the pid of its maker follows."""

BFLOAT16 = DTYPES["bfloat16"]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model.

    Attributes
    ----------
    layers, experts, top_k : int
        Each layer has so many experts, and a token uses `top_k` of them.
    hidden, inner : int
        An expert has three matrices of `hidden` × `inner` elements of 2 bytes.
    heads, key_value_heads : int
        Of attention, each of `HEAD_DIM`.
    vocabulary : int
    """

    layers: int
    experts: int
    top_k: int
    hidden: int
    inner: int
    heads: int
    key_value_heads: int
    vocabulary: int

    @property
    def expert_bytes(self) -> int:
        """Of one expert."""
        return 3 * self.hidden * self.inner * BFLOAT16.itemsize

    @property
    def experts_bytes(self) -> int:
        """Of all experts."""
        return self.layers * self.experts * self.expert_bytes

    @property
    def settings(self) -> dict[str, Any]:
        """What ``config.json`` says."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "bfloat16",
            "num_hidden_layers": self.layers, "num_experts": self.experts, "num_experts_per_tok": self.top_k,
            "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
            "hidden_size": self.hidden, "moe_intermediate_size": self.inner, "intermediate_size": self.inner,
            "num_attention_heads": self.heads, "num_key_value_heads": self.key_value_heads, "head_dim": HEAD_DIM,
            "vocab_size": self.vocabulary, "max_position_embeddings": 4096, "tie_word_embeddings": False,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        }  # fmt: skip


@contextmanager
def model_checkpoint(folder: Path, shape: ModelShape) -> Iterator[Path]:
    """Write a model into a new folder within `folder`, and remove it afterwards; first those that the dead left there.

    Raises
    ------
    ShmrouteError
        If the disk has no room for it.
    """
    for left in folder.glob(f"{PREFIX}*-*"):
        maker = left.name.removeprefix(PREFIX).split("-")[0]
        if maker.isdigit() and not Path(f"/proc/{maker}").exists():
            shutil.rmtree(left)
    check_room(folder, shape.experts_bytes, f"a model with {shape.experts_bytes / 1e9:.2f} GB of experts")
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-", dir=folder) as name:
        write_model(Path(name), shape)
        yield Path(name)


def weights_of(folder: Path) -> Path:
    """The only file of weights of such a model."""
    return folder / "model.safetensors"


def write_model(folder: Path, shape: ModelShape, seed: int = 1) -> None:
    """Write ``config.json`` and the weights, one expert in memory at a time."""
    (folder / "config.json").write_text(json.dumps(shape.settings), encoding="utf-8")
    dense = dict(_dense_tensors(shape, np.random.default_rng(seed)))
    layout: dict[str, tuple[int, ...]] = {}
    for layer in range(shape.layers):
        layout[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = (shape.experts, 2 * shape.inner, shape.hidden)
        layout[f"model.layers.{layer}.mlp.experts.down_proj"] = (shape.experts, shape.hidden, shape.inner)
    layout |= {name: tensor.shape for name, tensor in dense.items()}
    header, at = {}, {}
    end = 0
    for name, sizes in layout.items():
        at[name], end = end, end + math.prod(sizes) * BFLOAT16.itemsize
        header[name] = {"dtype": "BF16", "shape": list(sizes), "data_offsets": [at[name], end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-(8 + len(raw)) % PAGE)  # experts come first, and so begin at a page
    source = SyntheticSource(
        shape.layers, shape.experts, shape.hidden, shape.inner, top_k=shape.top_k, dtype="bfloat16", seed=seed
    )
    buffer = bytearray(shape.expert_bytes)
    pair_bytes = shape.expert_bytes * 2 // 3
    with weights_of(folder).open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        begin = file.tell()
        for name, tensor in dense.items():
            file.seek(begin + at[name])
            file.write(tensor.tobytes())
        for layer in range(shape.layers):
            for expert in range(shape.experts):
                source.read_into(layer, expert, memoryview(buffer))
                for name, piece in (("gate_up_proj", buffer[:pair_bytes]), ("down_proj", buffer[pair_bytes:])):
                    file.seek(begin + at[f"model.layers.{layer}.mlp.experts.{name}"] + expert * len(piece))
                    file.write(piece)
        file.flush()
        os.fsync(file.fileno())  # pages that are not on the disk yet cannot be dropped


def _dense_tensors(shape: ModelShape, random: np.random.Generator) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """All tensors but the experts', by name, in bfloat16."""
    hidden, queries, keys = shape.hidden, shape.heads * HEAD_DIM, shape.key_value_heads * HEAD_DIM
    common = random.standard_normal(hidden)
    common *= math.sqrt(hidden) / np.linalg.norm(common)
    topics = random.standard_normal((-(-shape.vocabulary // RUN), hidden)).repeat(RUN, axis=0)[: shape.vocabulary]
    own = random.standard_normal((shape.vocabulary, hidden))
    everywhere, of_topic, of_token = (math.sqrt(share) for share in SHARES)
    embeddings = everywhere * common + of_topic * topics + of_token * own
    yield "model.embed_tokens.weight", (EMBEDDING_SCALE * embeddings).astype(BFLOAT16)
    yield "lm_head.weight", (np.roll(own, 1, axis=0) / math.sqrt(hidden)).astype(BFLOAT16)
    yield "model.norm.weight", np.ones(hidden, BFLOAT16)
    for layer in range(shape.layers):
        stem = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{stem}.{norm}.weight", np.ones(hidden, BFLOAT16)
        for norm in ("q_norm", "k_norm"):
            yield f"{stem}.self_attn.{norm}.weight", np.ones(HEAD_DIM, BFLOAT16)
        for name, sizes in (("q", (queries, hidden)), ("k", (keys, hidden)), ("v", (keys, hidden)),
                            ("o", (hidden, queries))):  # fmt: skip
            values = ATTENTION_SCALE * random.standard_normal(sizes, np.float32)
            yield f"{stem}.self_attn.{name}_proj.weight", values.astype(BFLOAT16)
        # A row's product with an embedding of unit variance has the spread that is wanted: on the common part, which is
        # one direction, in proportion to how popular the expert is; on the others, which are random, in any case.
        gate = random.standard_normal((shape.experts, hidden))
        gate -= np.outer(gate @ common, common) / hidden
        gate += np.outer(random.standard_normal(shape.experts), common) / math.sqrt(hidden)
        yield f"{stem}.mlp.gate.weight", (LOGIT_SPREAD / math.sqrt(hidden) * gate).astype(BFLOAT16)
