"""What differs between the model families: the names of two classes, and the dtypes that the router computes in.

All else that a family has of its own (scoring, groups, biases, activation, shared experts) is either in the runtime's
settings, which come from the same ``config.json``, or stays in the model's own code.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """How a family's modelling code names and computes its router.

    Attributes
    ----------
    router : str
        The class of the router module, which holds the gate's ``weight`` [E, H], perhaps its ``bias`` [E], and has its
        own ``forward``.
    experts : str
        The class of the experts module, which goes through Transformers' `ExpertsInterface`.
    float32_logits : bool
        Whether the gate's product is computed in float32, whatever the model's dtype.
    float32_weights : bool
        Whether the experts' weights stay float32; else they are rounded to the dtype of the logits.
    """

    router: str
    experts: str
    float32_logits: bool = False
    float32_weights: bool = False


SUPPORTED_FAMILIES: dict[str, Family] = {
    "mixtral": Family("MixtralTopKRouter", "MixtralExperts", float32_weights=True),
    "minimax": Family("MiniMaxTopKRouter", "MiniMaxExperts", float32_weights=True),
    "qwen2_moe": Family("Qwen2MoeTopKRouter", "Qwen2MoeExperts"),
    "qwen3_moe": Family("Qwen3MoeTopKRouter", "Qwen3MoeExperts"),
    "qwen3_next": Family("Qwen3NextTopKRouter", "Qwen3NextExperts"),
    "olmoe": Family("OlmoeTopKRouter", "OlmoeExperts"),
    "flex_olmo": Family("FlexOlmoTopKRouter", "FlexOlmoExperts"),
    "deepseek_v2": Family("DeepseekV2TopkRouter", "DeepseekV2Experts", float32_logits=True, float32_weights=True),
    "deepseek_v3": Family("DeepseekV3TopkRouter", "DeepseekV3Experts", float32_logits=True, float32_weights=True),
    "glm4_moe": Family("Glm4MoeTopkRouter", "Glm4MoeExperts", float32_logits=True, float32_weights=True),
    "dots1": Family("Dots1TopkRouter", "Dots1Experts", float32_logits=True, float32_weights=True),
    "solar_open": Family("SolarOpenTopkRouter", "SolarOpenExperts", float32_logits=True, float32_weights=True),
    "gpt_oss": Family("GptOssTopKRouter", "GptOssExperts"),
}
"""By ``model_type`` of ``config.json``."""
