"""Datasets in the layouts of others, read as they are: Medical Segmentation Decathlon and nnU-Net v2 raw.

Sources: medicaldecathlon.com (dataset.json of each task); nnU-Net v2 documentation/reference/dataset-format.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from medseg.cases import find_cases, make_case
from medseg.errors import SpecError
from medseg.readers.nifti import stem
from medseg.spec import BACKGROUND, Case, Channel, Dataset, Label, Region, Spec


def load_msd_or_nnunet(folder: Path) -> Dataset:
    """Read a folder with a dataset.json of either layout; raise SpecError that names what is accepted."""
    file = folder / "dataset.json"
    if not file.exists():
        raise SpecError(
            f"{folder}: not a dataset: it holds neither dataset.yaml (a medseg spec) nor dataset.json (MSD or "
            "nnU-Net v2); write a spec like those in data_specs/"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if "channel_names" in content:
            return _nnunet(folder, content)
        if "training" in content and "modality" in content:
            return _msd(folder, content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{file}: not valid JSON: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, ValidationError) as error:
        raise SpecError(f"{file}: does not follow the layout it resembles: {error}") from error
    raise SpecError(f"{file}: has neither `channel_names` (nnU-Net v2) nor `training` and `modality` (MSD)")


def _name(folder: Path, content: dict[str, Any]) -> str:
    words = str(content.get("name") or folder.resolve().name)
    return "".join(c if c.isalnum() or c in "_.-" else "_" for c in words).lstrip("_.-") or "dataset"


def nnunet_channels(names: dict[str, str]) -> dict[str, Channel]:
    """Return channels in the order of their numbers; nnU-Net's and MSD's name "CT" means Hounsfield units."""
    ordered = sorted(names.items(), key=lambda item: int(item[0]))
    counts = list(names.values())
    rows = {}
    for number, name in ordered:
        key = name if counts.count(name) == 1 else f"{name}_{number}"
        plain = name.lower() in ("nonorm", "none")
        rows[key] = Channel(modality=name, file=f"{int(number):04d}", normalisation="none" if plain else "auto")
    return rows


def _msd(folder: Path, content: dict[str, Any]) -> Dataset:
    labels = {str(name): Label(value=int(value)) for value, name in content["labels"].items()}
    labels = {BACKGROUND if label.value == 0 else name: label for name, label in labels.items()}
    spec = Spec(
        name=_name(folder, content),
        description=str(content.get("description", "")),
        licence=str(content.get("licence", "")),
        channels=nnunet_channels(content["modality"]),
        labels=labels,
    )
    cases: list[Case] = []
    for row in content["training"]:
        image, mask = folder / row["image"], folder / row["label"]
        cases.append(make_case(spec, stem(image), (image,), mask))
    return Dataset(spec, tuple(sorted(cases, key=lambda case: case.images[0])))


def _nnunet(folder: Path, content: dict[str, Any]) -> Dataset:
    ending = str(content.get("file_ending", ".nii.gz"))
    if ending not in (".nii.gz", ".nii"):
        raise SpecError(f"{folder.name}: file_ending {ending!r} is not read; allowed: .nii.gz, .nii")
    labels, regions, ignore = nnunet_labels(content)

    def spec_for(images: str, masks: str) -> Spec:
        return Spec(
            name=_name(folder, content),
            description=str(content.get("description", "")),
            licence=str(content.get("licence", "")),
            channels=nnunet_channels(content["channel_names"]),
            labels=labels,
            regions=regions,
            ignore=ignore,
            images=f"{images}/{{case}}_{{channel}}{ending}",
            masks=f"{masks}/{{case}}{ending}",
        )

    spec = spec_for("imagesTr", "labelsTr")
    cases = list(find_cases(spec, folder))
    if (folder / "labelsTs").is_dir():
        tested = find_cases(spec_for("imagesTs", "labelsTs"), folder)
        cases += [Case(c.id, c.images, c.mask, c.patient, "test") for c in tested if c.mask is not None]
    return Dataset(spec, tuple(cases))


def nnunet_labels(content: dict[str, Any]) -> tuple[dict[str, Label], dict[str, Region], int | None]:
    """Split nnU-Net's one table into labels, regions (their order of painting given by regions_class_order)."""
    table = dict(content["labels"])
    ignore = table.pop("ignore", None)
    if not any(isinstance(value, list) for value in table.values()):
        labels = {BACKGROUND if v == 0 else str(name): Label(value=int(v)) for name, v in table.items()}
        return labels, {}, ignore
    order = [int(value) for value in content["regions_class_order"]]
    groups = {n: ([int(x) for x in v] if isinstance(v, list) else [int(v)]) for n, v in table.items() if v != 0}
    values = sorted({value for group in groups.values() for value in group})
    names = {value: next((n for n, g in groups.items() if g == [value]), f"label_{value}") for value in values}
    regions = {
        name: Region(labels=tuple(names[v] for v in group), paint=names[paint])
        for (name, group), paint in zip(groups.items(), order, strict=True)
    }
    return {names[value]: Label(value=value) for value in values}, regions, ignore
