"""`load`: an ordinary Transformers model whose experts are a runtime's.

The model is built without memory (on torch's meta device), its experts' parameters are taken away, and Transformers'
own loader fills what is left: weights of experts in the files have no place to go to and are never read. Then each MoE
layer's router and experts are tied to the runtime's layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from shmroute.config import describe
from shmroute.device_tier import device_slots
from shmroute.errors import CheckpointError, ConfigError
from shmroute.integrations.transformers.cuda import CudaDevice
from shmroute.integrations.transformers.device_cache import DeviceCache
from shmroute.integrations.transformers.expert_views import DTYPES, ExpertViews, Lender
from shmroute.integrations.transformers.experts import IMPLEMENTATION, SharedExperts
from shmroute.integrations.transformers.families import SUPPORTED_FAMILIES, Family
from shmroute.integrations.transformers.routing import SharedRouting
from shmroute.runtime import DEFAULT_TIMEOUT, Runtime

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def load(
    checkpoint: str | Path,
    runtime: Runtime,
    *,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    speculate: bool = False,
    device: str | torch.device | None = None,
    device_budget: str | int | None = None,
) -> transformers.PreTrainedModel:
    """Load a causal language model whose experts are the runtime's.

    Parameters
    ----------
    checkpoint : str or Path
        The Hugging Face folder from which the runtime was made, or an equal one.
    runtime : Runtime
        Attached to, or created; the model works until it is closed. Claims this process's worker lane.
    dtype : torch.dtype, optional
        Of the dense parts. Experts are used as they are stored, so it can only be theirs, which is the default.
    attn_implementation : str, optional
        As in Transformers.
    timeout : float
        Seconds that a forward pass may wait for an expert.
    speculate : bool
        Ask ahead for what the next layer's gate says of each layer's hidden states (`Runtime.expect`). That takes time
        of the worker and of the pager: it pays where loads are slow and cores idle. Where it does not, the pager turns
        it down, and all that is left of the cost is to look whether it still is.
    device : str or torch.device, optional
        A GPU such as ``"cuda:0"``, to compute there: dense parts in its memory, experts in a cache there that is filled
        from the shared slots. A process has one such cache for a runtime, until that is closed.
    device_budget : str or int, optional
        With a device: memory of that cache, as the runtime's budget: ``"2GiB"``, ``"25%"`` of all experts, or bytes.

    Returns
    -------
    PreTrainedModel
        In evaluation mode, on the CPU or the device, without gradients. With a bonus of 0 it computes what the model as
        Transformers loads it does; with one, the runtime's routers prefer resident experts.

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be served, its family's router is not supported, or it is not the runtime's.
    ConfigError
        If the runtime has no checkpoint, or `dtype` is not the experts'; or if there is no such device, its budget is
        missing, too small or too large for it, this process has another cache in a GPU, or the runtime records logits.
    DeviceError
        If the device cannot read the shared slots.
    NoWorkerLane
        If all lanes are taken by live processes.
    """
    folder = str(checkpoint)
    family = _checked_family(folder)
    _check_is_runtimes(folder, runtime)
    stored = DTYPES[runtime.config.tensors[0].dtype]
    if dtype is not None and dtype != stored:
        raise ConfigError(
            f"dtype is {dtype}, but the experts of {folder!r} are stored as {stored} and used as they are; leave it "
            f"out, or convert the checkpoint"
        )
    views = ExpertViews(runtime.config)
    cache = _opened_cache(runtime, device, device_budget, views)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    original = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, report = _without_experts(original, family).from_pretrained(
        folder,
        config=config,
        dtype=stored,
        attn_implementation=attn_implementation,
        experts_implementation=IMPLEMENTATION,
        local_files_only=True,
        output_loading_info=True,
    )
    if report["missing_keys"]:
        raise CheckpointError(folder, "tensors of the model are missing", ", ".join(sorted(report["missing_keys"])[:5]))
    model.__class__ = original
    if cache is not None:
        _move(model, cache)
    lend = views.lender(runtime) if cache is None else cache.lender(runtime)
    _tie(model, runtime, family, stored, lend, timeout, speculate)
    result: transformers.PreTrainedModel = model.eval().requires_grad_(False)
    return result


def _checked_family(folder: str) -> Family:
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(folder, "there is no config.json in it; a local Hugging Face folder is expected")
    name = transformers.PretrainedConfig.get_config_dict(folder, local_files_only=True)[0].get("model_type")
    if name not in SUPPORTED_FAMILIES:
        raise CheckpointError(
            str(path),
            f"the router of model_type {name!r} is not supported: its choice cannot be handed to the runtime. "
            f"Supported are {', '.join(SUPPORTED_FAMILIES)}",
        )
    return SUPPORTED_FAMILIES[name]


def _check_is_runtimes(folder: str, runtime: Runtime) -> None:
    if runtime.config.source is None:
        raise ConfigError(
            f"the runtime {runtime.name!r} was made without a checkpoint: it has no experts to compute with"
        )
    geometry, _ = describe(folder)
    if geometry.fingerprint != runtime.config.source_fingerprint:
        theirs = runtime.config.source.arguments.get("path", runtime.config.source.factory)
        raise CheckpointError(
            folder,
            f"is not the checkpoint of the runtime {runtime.name!r}, which was made from {theirs} (fingerprint "
            f"{runtime.config.source_fingerprint}, here {geometry.fingerprint}): attach to the runtime of this one",
        )


def _opened_cache(
    runtime: Runtime, device: str | torch.device | None, budget: str | int | None, views: ExpertViews
) -> DeviceCache | None:
    """The process's cache in a GPU, if it shall have one."""
    if device is None or budget is None:
        if device is None and budget is None:
            return None
        raise ConfigError(
            f"device is {device!r} and device_budget {budget!r}: give both, such as device='cuda:0' and "
            f"device_budget='2GiB', or neither to compute on the CPU"
        )
    recording = runtime.config.recording
    if recording is not None and recording.logits:
        raise ConfigError(
            f"the runtime {runtime.name!r} records logits, so that choices can be verified, and one that a GPU's cache "
            f"had a say in cannot: compute on the CPU, or record without logits"
        )
    slots = device_slots(runtime.config, budget)
    cache = runtime.one(DeviceCache)
    cache.open(CudaDevice(device), slots, views)
    return cache


def _move(model: nn.Module, cache: DeviceCache) -> None:
    """Put the dense parts where the cache is."""
    try:
        model.to(cache.torch_device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the model's dense parts do not fit into {cache.torch_device} beside the cache of experts: give a smaller "
            f"device budget ({error})"
        ) from error


def _without_experts(original: type[Any], family: Family) -> Any:
    """The model's class, but its experts have no parameters."""

    class WithoutExperts(original):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            self._keys_to_ignore_on_load_unexpected |= {r"\.experts\."}
            for _, module in _modules(self, family.experts):
                for name in list(module._parameters):
                    module.register_parameter(name, None)
                module._is_hf_initialized = True

    WithoutExperts.__name__ = WithoutExperts.__qualname__ = original.__name__
    return WithoutExperts


def _modules(model: nn.Module, class_name: str) -> Iterator[tuple[int, nn.Module]]:
    """The modules of a class with the number of the layer that each is in."""
    for name, module in model.named_modules():
        if type(module).__name__ == class_name:
            number = _LAYER.search(name)
            assert number is not None, f"{name} is in no layer"
            yield int(number[1]), module


def _tie(
    model: nn.Module,
    runtime: Runtime,
    family: Family,
    dtype: torch.dtype,
    lend: Lender,
    timeout: float,
    speculate: bool,
) -> None:
    """Have every MoE layer use the runtime's layer."""
    experts, routers = dict(_modules(model, family.experts)), dict(_modules(model, family.router))
    following: SharedRouting | None = None
    for layer, number in reversed(list(enumerate(runtime.config.layer_numbers))):
        if number not in experts or number not in routers:
            raise CheckpointError(
                f"{type(model).__name__} of transformers {transformers.__version__}",
                f"layer {number} has no {family.router} with {family.experts}, which this version of shmroute ties to "
                f"its own; install another version of transformers (5.23 is known to do)",
            )
        experts.pop(number).shared_experts_of_runtime = SharedExperts(lend, layer, timeout)
        router = routers.pop(number)
        routing = SharedRouting(runtime, layer, router, family, dtype, following)
        router.forward = routing
        following = routing if speculate else None
    if experts or routers:
        raise CheckpointError(
            f"{type(model).__name__} of transformers {transformers.__version__}",
            f"layers {sorted({*experts, *routers})} have experts that config.json, as read here, says nothing of",
        )
