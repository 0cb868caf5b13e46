"""Write a cohort of phantoms as a dataset: DICOM series, masks, and the spec that names them."""

from __future__ import annotations

from pathlib import Path

from medseg.errors import ConfigError
from medseg.exporters.nifti import write_nifti
from medseg.files import write_text
from medseg.phantom.anatomy import make_patient
from medseg.phantom.dicom import write_series

SPEC = """\
# Synthetic patients of medseg: `medseg demo` makes them. Nobody's data; free to use.
name: phantom
description: Upper abdomen of synthetic patients, T1-weighted MR, three scanners, five ways to slice
licence: Apache-2.0
root: {root}
images: dicom/{{case}} # a folder that holds one DICOM series
masks: masks/{{case}}.nii.gz
case_ids: name # DICOM is hashed unless told; these names are made up
channels:
  T1: {{modality: MR}}
labels:
  liver:
    value: 1
    color: "#b5523b"
    snomed: {{value: "10200004", meaning: Liver}}
  spleen:
    value: 2
    color: "#8e5ea8"
    snomed: {{value: "78961009", meaning: Spleen}}
  kidney_right:
    value: 3
    color: "#2f8f83"
    snomed: {{value: "9846003", meaning: Right kidney}}
  kidney_left:
    value: 4
    color: "#3c78c3"
    snomed: {{value: "18639004", meaning: Left kidney}}
  lesion: # in the liver, no part of the label liver
    value: 5
    color: "#f2c12e"
    snomed: {{value: "52988006", meaning: Lesion}}
splits:
  test: [{test}]
"""


def case_names(patients: int) -> list[str]:
    """Return the names of the cases, in order of their number."""
    return [f"phantom-{index:03d}" for index in range(patients)]


def spec_text(*, patients: int = 20, test: int = 5, root: str = ".") -> str:
    """Return the dataset spec as YAML; the last `test` patients are held out."""
    return SPEC.format(root=root, test=", ".join(case_names(patients)[patients - test :]))


def write_dataset(folder: Path, *, patients: int = 20, seed: int = 0, test: int = 5) -> Path:
    """Write a cohort; the same numbers give the same bytes, and a longer cohort begins like a shorter one.

    Writes ``dicom/<name>/*.dcm``, ``masks/<name>.nii.gz`` and, last, ``dataset.yaml`` below `folder`, which is made
    when absent; files of an earlier cohort under the same names are replaced.

    Parameters
    ----------
    patients : how many.
    test : how many of them, the last ones, are held out. 5 show every protocol once.

    Returns
    -------
    Path
        The spec, folder / "dataset.yaml".

    Raises
    ------
    ConfigError : not 0 <= test < patients.
    ExportError : a file cannot be written.
    """
    if not 0 <= test < patients:
        raise ConfigError(f"{test} of {patients} patients cannot be held out: at least one must be left to learn from")
    for index, name in enumerate(case_names(patients)):
        patient = make_patient(seed, index=index)
        write_series(
            patient.image,
            folder / "dicom" / name,
            modality=patient.modality,
            patient_id=name,
            description="T1 phantom",
            manufacturer=patient.manufacturer,
            seed=seed,
        )
        write_nifti(folder / "masks" / f"{name}.nii.gz", patient.mask)
    spec = folder / "dataset.yaml"
    write_text(spec, spec_text(patients=patients, test=test))
    return spec
