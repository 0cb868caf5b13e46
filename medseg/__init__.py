"""medseg: from a folder of studies to a segmentation model that is validated, deployed and kept up to date.

The public functions are those of medseg.api; they are imported when they are first used, so that ``import medseg``
is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medseg.api import check, evaluate, import_model, listen, plan, predict, report, retrain, train

__all__ = ["check", "evaluate", "import_model", "listen", "plan", "predict", "report", "retrain", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("medseg.api"), name)
    raise AttributeError(f"module 'medseg' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return list(__all__)
