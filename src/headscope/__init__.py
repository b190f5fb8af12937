"""Headscope: see what every attention head of a transformer is doing while it trains."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import (
    HeadscopeError,
    HeadscopeWarning,
    Missing,
    NoSuchName,
    NoSuchStep,
    StoreError,
    TrainerGone,
)

if TYPE_CHECKING:
    from .integrations.huggingface import HeadscopeCallback
    from .replay import replay
    from .trial import Trial, open_trial
    from .watch import watch

__version__ = "0.1.0"
__all__ = [
    "HeadscopeCallback",
    "HeadscopeError",
    "HeadscopeWarning",
    "NoSuchName",
    "NoSuchStep",
    "StoreError",
    "TrainerGone",
    "Trial",
    "open_trial",
    "replay",
    "watch",
]

_HOMES = {
    "HeadscopeCallback": ".integrations.huggingface",
    "Trial": ".trial",
    "open_trial": ".trial",
    "replay": ".replay",
    "watch": ".watch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'headscope' has no attribute {name!r}; it has {', '.join(__all__)}")
    try:
        module = import_module(_HOMES[name], __name__)
    except ModuleNotFoundError as problem:
        if problem.name != "torch":
            raise
        raise Missing(
            f"headscope.{name} needs PyTorch, which is not installed: pip install torch "
            f"(see 'Install' in the README for CPU and GPU builds)"
        ) from problem
    return getattr(module, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Package(ModuleType):
    """This package. Importing its module `watch` must not put that in the place of what users call `watch`."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
