"""What each routing rule chooses, by definition: plain NumPy in float64, one token at a time, nothing clever."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shmroute.config import RouterConfig

Row = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reference:
    """A layer's router.

    Attributes
    ----------
    config : RouterConfig
        Its `cache_bonus` is the strength.
    top_k : int
    bias : ndarray
        [E]
    spread : float
        The running mean that the rule ``cache-prior`` goes by.
    """

    config: RouterConfig
    top_k: int
    bias: Row
    spread: float = 0.0

    def probabilities(self, row: Row) -> Wide:
        """float64 [E], of sum 1."""
        finite = np.isfinite(row)
        wide = np.where(finite, row, 0).astype(np.float64)
        if self.config.scoring == "softmax":
            shares = np.where(finite, np.exp(wide - wide[finite].max()), 0)
        else:
            shares = np.where(finite, 1 / (1 + np.exp(-wide)), 0)
        total: Wide = shares / shares.sum()
        return total

    def choosing_scores(self, row: Row) -> Wide:
        """float64 [E], -inf for whoever cannot be chosen."""
        finite = np.isfinite(row)
        wide = np.where(finite, row, 0).astype(np.float64)
        scores = wide if self.config.scoring == "softmax" else 1 / (1 + np.exp(-wide)) + self.bias
        scores = np.where(finite, scores, -np.inf)
        groups = scores.reshape(self.config.n_group, -1)
        best = np.sort(groups, axis=1)[:, ::-1]
        worth = best[:, 0] if self.config.group_score == "max" or groups.shape[1] < 2 else best[:, 0] + best[:, 1]
        admitted = [group for group in ordered(worth) if worth[group] > -np.inf][: self.config.topk_group]
        if self.config.topk_group < self.config.n_group:
            for group in set(range(self.config.n_group)) - set(admitted):
                groups[group] = -np.inf
        return scores

    def own(self, row: Row) -> list[int]:
        """What the model would choose, best first."""
        scores = self.choosing_scores(row)
        return [expert for expert in ordered(scores) if scores[expert] > -np.inf][: self.top_k]

    def choice(self, row: Row, resident: set[int], device: set[int] | None = None) -> list[int]:
        """What is chosen, best first; with a GPU, `device` is what is there, and `resident` what is in host memory."""
        own, strength = self.own(row), self.config.cache_bonus
        nearest = resident if device is None else device
        resident = resident | nearest
        if strength == 0 or (device is None and len(resident) in (0, len(row))) or set(own) <= nearest:
            return own
        scores = self.choosing_scores(row)
        experts, share = np.arange(len(row)), self.config.host_share
        here = np.where(np.isin(experts, list(nearest)), 1, np.where(np.isin(experts, list(resident)), share, 0))
        rule, j = self.config.rule, self.config.top_j
        if rule == "absolute" or (rule == "probability" and self.config.scoring == "sigmoid"):
            return ordered(scores + strength * here)[: self.top_k]
        if rule == "cache-prior":
            here[own[:j]] = 1
            return ordered(scores + strength * self.spread * here)[: self.top_k]
        if rule == "probability":
            shares = np.where(scores > -np.inf, self.probabilities(row), -np.inf)
            return ordered(shares + strength * here)[: self.top_k]
        by_rank = ordered(scores)
        near, far = self.candidates(row, strength), self.candidates(row, strength * share)
        preferred = own[:j] + [
            expert
            for rank, expert in enumerate(by_rank)
            if expert in resident
            and expert not in own[:j]
            and (expert in own or rank < (near if expert in nearest else far))
        ]
        everybody = preferred + [e for e in by_rank if e not in preferred]
        return sorted(everybody[: self.top_k], key=by_rank.index)

    def candidates(self, row: Row, strength: float) -> int:
        """How many of the best a strength reaches: they may be preferred if they are resident."""
        scores = self.choosing_scores(row)
        choosable = int((scores > -np.inf).sum())
        if self.config.rule == "max-rank":
            reach = self.top_k + int(min(strength, 1.0) * (self.config.max_rank - self.top_k) + 0.5)
            return min(reach, choosable)
        before = np.concatenate([[0], np.cumsum(self.probabilities(row)[ordered(scores)])])[:choosable]
        return int((before < strength).sum())

    def weights(self, row: Row, chosen: list[int]) -> Wide:
        """float64 [k]"""
        shares = self.probabilities(row)
        if self.config.scoring == "sigmoid":
            shares = 1 / (1 + np.exp(-row.astype(np.float64)))
        weights = shares[chosen]
        if self.config.renormalize:
            weights = weights / weights.sum()
        scaled: Wide = weights * self.config.routed_scaling_factor
        return scaled

    def lost(self, row: Row, chosen: list[int]) -> float:
        """The probability that a choice lost; never less than 0."""
        shares = self.probabilities(row)
        return max(float(shares[self.own(row)].sum() - shares[chosen].sum()), 0.0)


def ordered(scores: npt.NDArray[np.floating]) -> list[int]:
    """All indices, best first, ties to the lower one."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))


def apart(values: npt.NDArray[np.floating], by: float) -> bool:
    """Whether any two of some numbers differ by so much that rounding changes no order."""
    return bool((np.diff(np.sort(values[np.isfinite(values)])) > by).all())
