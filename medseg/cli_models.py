"""``medseg models``: choose among models, and the model registry, on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.cli_options import Dataset, Json, Splits, Store, as_json, say
from medseg.cli_output import display

models = typer.Typer(help="Choose among models; the model registry.", no_args_is_help=True, rich_markup_mode=None)


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


@models.command("import")
def import_model(
    folder: Annotated[Path, typer.Argument(help="TRAINER__PLANS__CONFIGURATION of nnU-Net v2, or MONAI bundle.")],
    out: Annotated[Path, typer.Option(help="Folder for the bundle; it must not hold one yet.")],
    fold: Annotated[list[str] | None, typer.Option(help="Only this fold: 0, 1, ... or all; repeat for more.")] = None,
    precision: Annotated[str, typer.Option(help="Arithmetic of the network: fp32 or bf16.")] = "fp32",
) -> None:
    """Make a bundle of a model of nnU-Net v2, or of a MONAI bundle (docs/how-to/exchange-models.md).

    Example: medseg models import nnUNet_results/Dataset005_Body/nnUNetTrainer__nnUNetPlans__3d_fullres --out body
    """
    from medseg import api

    info = api.import_model(folder, out=out, folds=fold or (), precision=precision)
    say(f"{out}: {info.name}, {len(info.spec.channels)} channel(s), {len(info.spec.foreground)} label(s)")
    say(f"{len(info.weights)} fold(s), trained by {info.training['trainer']} ({info.training['configuration']})")


@models.command("export")
def export_model(
    model: Annotated[Path, typer.Argument(help="Run folder, bundle, model of nnU-Net v2, or MONAI bundle.")],
    to: Annotated[str, typer.Option(help="torch (a program of torch.export), onnx or monai (a bundle).")],
    out: Annotated[Path, typer.Option(help="File .pt2 or .onnx, or a folder; it must not exist yet.")],
    check: Annotated[
        list[Path] | None,
        typer.Option(help="Image on which both are compared; its files in the order of the channels."),
    ] = None,
) -> None:
    """Write a model as something that runs without medseg (docs/how-to/exchange-models.md).

    Example: medseg models export run --to onnx --out model.onnx --check image.nii.gz
    """
    from medseg.exchange.export import export_model as export

    found = export(model, to=to, out=out, check=tuple(check or ()))
    window = found.window
    free = f", or other multiples of {window.steps}" if window.dynamic and to != "monai" else ""
    folds = "each in a bundle of its own" if to == "monai" else "the mean of their logits"
    say(f"{out}: {found.networks} network(s){f', {folds}' if found.networks > 1 else ''}; windows: {window.size}{free}")
    agreement = found.agreement
    on = "a patch of the image" if found.real else "noise (give --check IMAGE)"
    apart = f"logits differ by up to {agreement.difference:.2g} (allowed {agreement.allowed:.2g})"
    say(f"compared on {on}: {apart}; {agreement.same:.4%} of voxels have the same label")
    for row in found.differences:
        say(f"note: {row}")


@models.command("select")
def select_models(
    dataset: Dataset,
    runs: Annotated[list[Path], typer.Argument(help="2 to 5 finished runs of the same data, --folds and --seed.")],
    out: Annotated[Path, typer.Option(help="Folder for the chosen model and the tables.")],
    also: Annotated[
        list[Path] | None, typer.Option(help="Further datasets, where the runs learnt from several.")
    ] = None,
    splits: Splits = None,
    json: Json = False,
) -> None:
    """Choose the best of several runs, or of their ensembles, by out-of-fold Dice (docs/how-to/choose-models.md).

    Example: medseg models select data runs/flat runs/deep --out runs/best
    """
    from medseg.training.select import select_model

    found = select_model([dataset, *(also or ())], runs, out=out, splits=splits, display=display(json))
    if json:
        typer.echo((out / "7_report" / "selection.json").read_text(encoding="utf-8"), nl=False)
        return
    say(f"model: {found.model}")


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
