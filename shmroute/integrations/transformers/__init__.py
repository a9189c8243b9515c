"""Hugging Face Transformers' models on the shared cache (extra ``transformers``).

`load` makes an ordinary model whose dense parts are its own and whose experts are the runtime's: it registers the
experts implementation ``"shmroute"`` with Transformers' own `ExpertsInterface`, which computes with zero-copy views of
leased experts, and puts the runtime's router in the place of the model's, since that interface receives experts already
chosen. One piece of code serves every family in `SUPPORTED_FAMILIES`.
"""

from __future__ import annotations

try:
    import torch  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"shmroute.integrations.transformers needs torch and transformers ({error}): "
        f"pip install 'shmroute[transformers]'"
    ) from error

from shmroute.integrations.transformers.families import SUPPORTED_FAMILIES
from shmroute.integrations.transformers.loading import load

__all__ = ["SUPPORTED_FAMILIES", "load"]
