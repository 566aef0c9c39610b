"""MeanFlow: one-step image generation, trained with Hugging Face Accelerate.

The public names below are imported when they are first used, so that `import meanflow` and `--help` stay quick.
"""

import importlib

__version__ = "0.1.0"

_MODULES = {
    "MeanFlowConfig": "config",
    "ObjectiveConfig": "config",
    "TrainConfig": "config",
    "sample": "sampler",
    "Batch": "objectives.base",
    "Objective": "objectives.base",
    "Output": "objectives.base",
    "MeanFlow": "objectives.meanflow",
    "average_velocity": "sampler",
    "jvp": "objectives.jvp",
    "make_draws": "objectives.draws",
    "mean_velocity_target": "objectives.meanflow",
    "order_slots": "objectives.draws",
    "Data": "data.base",
    "InMemory": "data.base",
    "export": "publishing.export",
    "load_pipeline": "publishing.loading",
    "run": "main",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'meanflow' has no attribute {name!r}")
    return getattr(importlib.import_module(f"meanflow.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
