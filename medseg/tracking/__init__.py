"""The only door to MLflow: runs, datasets, tables, artifacts and the model registry.

    start ──► Tracker ──► operations ──► MLflow        (door: which store, is it alive)
                 │             ▲
                 └─► spool ────┘ sync                   (store dead: calls wait on disk, sent later)

    models: list_versions, version_by_alias, fetch, set_alias, delete_alias

The store is ``<folder>/mlflow.db`` with artifacts in ``<folder>/mlartifacts``, or what ``MLFLOW_TRACKING_URI`` names.
No user name, host name, script path or git state is recorded, and MLflow's telemetry is off.
Importing this package does not import mlflow; the first call that needs it does (about one second).
"""

from medseg.tracking.models import ModelVersion, delete_alias, fetch, list_versions, set_alias, version_by_alias
from medseg.tracking.run import Tracker, start
from medseg.tracking.spool import Synced, sync

__all__ = [
    "ModelVersion",
    "Synced",
    "Tracker",
    "delete_alias",
    "fetch",
    "list_versions",
    "set_alias",
    "start",
    "sync",
    "version_by_alias",
]
