"""The names of the predictors, as `PagerConfig` takes them and `stat` shows them."""

from __future__ import annotations

from typing import Final

from shmroute.shared.metrics import Predictor

PREDICTORS: Final[dict[str, Predictor]] = {
    "affinity": Predictor.AFFINITY,
    "previous-token": Predictor.PREVIOUS_TOKEN,
    "transitions": Predictor.TRANSITIONS,
    "gate": Predictor.GATE,
}
"""Those that a setting names; hints are the user's own, and always taken."""

BY_PAGER: Final = (Predictor.TRANSITIONS, Predictor.PREVIOUS_TOKEN, Predictor.AFFINITY)
"""Those that the pager asks itself, in the order in which it does."""

DEFAULT_PREDICTORS: Final = ("transitions", "gate")
