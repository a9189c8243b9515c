"""shmroute: many inference worker processes share one cache of Mixture-of-Experts weights.

See `create` and `attach`; the README has a running example.
"""

from shmroute.config import AffinityConfig, PagerConfig, RouterConfig, RuntimeConfig, TraceConfig
from shmroute.lifecycle import attach, create, destroy
from shmroute.metrics import RuntimeMetrics
from shmroute.routing import AdaptiveCacheBonus, MemoryAwareRouter, RoutingDecision
from shmroute.runtime import Runtime
from shmroute.shared.affinity import ExpertAffinity
from shmroute.shared.requests import PagingDirection, PagingPriority, PagingRequest

__version__ = "0.1.0"

__all__ = [
    "AdaptiveCacheBonus",
    "AffinityConfig",
    "ExpertAffinity",
    "MemoryAwareRouter",
    "PagerConfig",
    "PagingDirection",
    "PagingPriority",
    "PagingRequest",
    "RouterConfig",
    "RoutingDecision",
    "Runtime",
    "RuntimeConfig",
    "RuntimeMetrics",
    "TraceConfig",
    "__version__",
    "attach",
    "create",
    "destroy",
]
