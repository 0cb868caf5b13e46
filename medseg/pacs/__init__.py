"""Studies from an archive (DICOMweb, C-STORE) and results back to it; needs ``pip install medseg[pacs]``.

address, credentials -> web (one HTTP request) -> archive (find, retrieve, store, confirm) -> delivery -> predict
settings -> inbox -> receiver (C-STORE) -> node (a study that is quiet is segmented, its results are sent)
"""

from __future__ import annotations

from types import ModuleType

from medseg.errors import ConfigError


def need(module: str) -> ModuleType:
    """Import a library of the extra `pacs`; raise ConfigError with the command that installs it."""
    from importlib import import_module

    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{module} is not installed, which is needed to talk to an archive: pip install 'medseg[pacs]'"
        ) from error
