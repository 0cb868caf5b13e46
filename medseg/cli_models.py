"""``medseg models``: the model registry on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.cli_options import Json, Store, as_json, say

models = typer.Typer(help="The model registry.", no_args_is_help=True, rich_markup_mode=None)


@models.command("list")
def list_models(
    name: Annotated[str | None, typer.Argument(help="Only this model.")] = None,
    track: Store = Path(),
    json: Json = False,
) -> None:
    """List registered models with their aliases.

    Example: medseg models list
    """
    from dataclasses import asdict

    from medseg.tracking import list_versions

    rows = list_versions(track, name)
    if json:
        typer.echo(as_json([asdict(row) for row in rows]))
        return
    for row in rows:
        say(f"{row.name} {row.version}  {', '.join(row.aliases) or '-'}")
    if not rows:
        say("No model is registered here.")


@models.command()
def promote(
    name: Annotated[str, typer.Argument(help="Registered model.")],
    version: Annotated[int, typer.Argument(help="Version that becomes the champion.")],
    track: Store = Path(),
) -> None:
    """Make a version the champion; the former one becomes `previous`.

    Example: medseg models promote hippocampus 2
    """
    from medseg.retraining import promote_version

    say(promote_version(track, name, version))


@models.command()
def rollback(name: Annotated[str, typer.Argument(help="Registered model.")], track: Store = Path()) -> None:
    """Give the alias champion back to the version that had it before.

    Example: medseg models rollback hippocampus
    """
    from medseg.retraining import roll_back

    say(roll_back(track, name))
