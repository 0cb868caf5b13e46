"""Retraining: one tick of a scheduled job, and its decisions.

The clock is outside (cron, a systemd timer, Slurm): docs/how-to/retraining.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from medseg import api
from medseg.cli import main
from medseg.cli_options import console
from medseg.display import Display
from medseg.errors import ConfigError
from medseg.files import write_json
from medseg.retraining import read_decisions

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)


@app.command()
def tick(
    config: Annotated[Path, typer.Argument(help="YAML of the job, see pipelines/retraining.example.yaml.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    json_out: Annotated[Path | None, typer.Option(help="Also write the result as JSON.")] = None,
) -> None:
    """Train on new data, compare with the champion, promote if the rule is met.

    Exit 0 promoted, 10 trained but not promoted, 20 no new data, 1 error, 2 wrong configuration.

    Example: python -m pipelines.retraining tick retraining.yaml
    """
    result = api.retrain(config, dry_run=dry_run, display=Display(console))
    if json_out is not None:
        write_json(json_out, result.to_dict())
    typer.echo(result.describe())
    raise typer.Exit(result.exit_code)


@app.command()
def decisions(
    store: Annotated[Path, typer.Argument(help="Folder of the MLflow store, with decisions.jsonl.")],
) -> None:
    """Verify the decision log and print it, one JSON line each; exit 1 if it was tampered with.

    Example: python -m pipelines.retraining decisions store
    """
    if not store.is_dir():
        raise ConfigError(f"{store}: this folder does not exist", code="NOT_FOUND")
    for decision in read_decisions(store):
        typer.echo(json.dumps({"sha256": decision.sha256, **decision.content}, sort_keys=True))


if __name__ == "__main__":
    main(app)
