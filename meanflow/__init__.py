"""MeanFlow: one-step image generation, trained with Hugging Face Accelerate.

The public names below are imported when they are first used, so that `import meanflow` and `--help` stay quick.
"""

import importlib

__version__ = "0.1.0"

_NAMES = {
    "config": ("ImprovedMeanFlowConfig", "MeanFlowConfig", "ObjectiveConfig", "TrainConfig"),
    "sampler": ("average_velocity", "sample"),
    "objectives.base": ("Batch", "Objective", "Output"),
    "objectives.improved": ("ImprovedMeanFlow",),
    "objectives.meanflow": ("MeanFlow", "mean_velocity_target"),
    "objectives.draws": ("make_draws", "order_slots"),
    "objectives.jvp": ("jvp",),
    "data.base": ("Data", "InMemory"),
    "publishing.checkpoints": ("load_pipeline",),
    "publishing.export": ("export",),
    "main": ("run",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'meanflow' has no attribute {name!r}")
    return getattr(importlib.import_module(f"meanflow.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
