"""gankern: fused operations for GANs, the models built from them, and one trainer.

Submodules load when they are first used: `import gankern` alone imports nothing but itself.
"""

import importlib
from types import ModuleType

__version__ = "0.1.0"

_SUBMODULES = ("cli", "data", "metrics", "models", "nn", "ops", "training")


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUBMODULES])
