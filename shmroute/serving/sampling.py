"""The choice of the next token. In workers only."""

from __future__ import annotations

import hashlib

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from shmroute.serving.messages import Job


class Sampler:
    """Greedy at temperature 0, else a draw from Transformers' own warped distribution.

    Each position has a random generator of its own, made from the job's seed: so another worker that continues after
    some tokens draws what this one would have drawn.
    """

    def __init__(self, job: Job) -> None:
        self._greedy = job.temperature == 0
        self._seed = job.seed
        self._warpers = LogitsProcessorList()
        if not self._greedy:
            self._warpers.append(TemperatureLogitsWarper(float(job.temperature)))
            if job.top_k:
                self._warpers.append(TopKLogitsWarper(job.top_k))
            if job.top_p < 1:
                self._warpers.append(TopPLogitsWarper(float(job.top_p)))

    def choose(self, logits: torch.Tensor, position: int) -> int:
        """The token after `position` tokens of the answer, from logits float32 [V]."""
        if self._greedy:
            return int(logits.argmax())
        scores = self._warpers(torch.empty(1, 0, dtype=torch.long), logits[None])
        digest = hashlib.blake2b(f"{self._seed} {position}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
        return int(torch.multinomial(scores[0].softmax(-1), 1, generator=generator))
