"""Lightning under either of its names: ``pytorch_lightning`` and ``lightning.pytorch``.

The two are the same code and yet different classes, and a trainer of one asks ``isinstance`` with its own. So where
both are installed, what is defined here inherits from both.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["Callback", "LightningModule", "MisconfigurationException", "Trainer", "rank_zero_info"]

NAMES = ("pytorch_lightning", "lightning.pytorch")


def installed() -> list[ModuleType]:
    """The Lightning packages that there are, imported.

    Raises:
        ImportError: if there is none.
    """
    found = [importlib.import_module(name) for name in NAMES if _exists(name)]
    if not found:
        raise ImportError(
            "the callbacks need Lightning, which is not installed: pip install 'bnp-optim[lightning]' (or lightning)"
        )
    return found


def _exists(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):  # its parent is missing, or is no package
        return False


def _both(packages: list[ModuleType], module: str, name: str) -> Any:
    """The class ``name`` of all packages in one."""
    found = [getattr(importlib.import_module(f"{package.__name__}.{module}"), name) for package in packages]
    classes = tuple(dict.fromkeys(found))
    return classes[0] if len(classes) == 1 else type(name, classes, {"__module__": __name__})


if TYPE_CHECKING:
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from lightning_utilities.core.rank_zero import rank_zero_info
    from pytorch_lightning import Callback, LightningModule, Trainer
else:
    _PACKAGES = installed()
    Callback = _both(_PACKAGES, "callbacks", "Callback")
    MisconfigurationException = _both(_PACKAGES, "utilities.exceptions", "MisconfigurationException")
    LightningModule, Trainer = _PACKAGES[0].LightningModule, _PACKAGES[0].Trainer  # for annotations only
    rank_zero_info = importlib.import_module(f"{_PACKAGES[0].__name__}.utilities.rank_zero").rank_zero_info
