"""Configuration of a cluster on which studies are done: what its queue is, and how workers are asked for."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from medseg.config import Config


class ClusterConfig(Config):
    """Content of the YAML file of ``--cluster``.

    Attributes
    ----------
    kind : slurm, pbs, sge, lsf or htcondor: jobs of that queue, by dask-jobqueue; local: processes of this machine, by
        Dask, which is good for trying a configuration.
    workers : how many.
    options : what the class of dask-jobqueue (SLURMCluster, ...) is given besides, such as queue, memory, walltime,
        job_extra_directives.
    """

    kind: Literal["slurm", "pbs", "sge", "lsf", "htcondor", "local"]
    workers: int = Field(ge=1)
    options: dict[str, Any] = Field(default_factory=dict)
