"""Builders of small specs, plans, bundles and multi-frame files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    generate_uid,
)
from pydicom.valuerep import format_number_as_ds

from medseg.planning.fingerprint import ChannelStatistics, Fingerprint
from medseg.planning.plan import Plan
from medseg.spec import Spec
from medseg.volume import Volume

STATISTICS = ChannelStatistics(low=-100, median=40, high=300, mean=50, deviation=80)


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., Spec]:
    """``make_spec(labels={...}, channels=[...], **rest)``."""

    def make(labels: dict[str, int] | None = None, channels: tuple[str, ...] = ("t1",), **rest: Any) -> Spec:
        rows = {name: {"modality": "MR"} for name in channels}
        return Spec.model_validate({"name": "toy", "channels": rows, "labels": labels or {"organ": 1}, **rest})

    return make


@pytest.fixture(scope="session")
def make_fingerprint() -> Callable[..., Fingerprint]:
    """``make_fingerprint(shape=..., spacing=..., cases=..., channels=..., labels=...)``: all cases alike."""

    def make(
        shape: tuple[int, int, int] = (40, 40, 40),
        spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
        cases: int = 10,
        channels: tuple[str, ...] = ("t1",),
        labels: tuple[str, ...] = ("organ",),
    ) -> Fingerprint:
        return Fingerprint(
            cases=cases,
            patients=cases,
            shapes=(shape,) * 5,
            spacings=(spacing,) * 5,
            voxels=cases * shape[0] * shape[1] * shape[2],
            channels=dict.fromkeys(channels, STATISTICS),
            label_ml=dict.fromkeys(labels, 1.0),
            label_cases=dict.fromkeys(labels, cases),
        )

    return make


@pytest.fixture(scope="session")
def make_plan(make_fingerprint: Callable[..., Fingerprint]) -> Callable[..., Plan]:
    """``make_plan(spec, **changes)``: a plan with a tiny network, RAS, 1 mm, patches of 16³."""

    def make(spec: Spec, **changes: Any) -> Plan:
        dims = changes.get("dimensions", 3)
        options = {"features": [4, 8], "strides": [[2] * dims], "kernels": [[3] * dims] * 2, "convolutions": 1}
        values: dict[str, Any] = {
            "dataset": spec.name,
            "dimensions": dims,
            "orientation": "RAS",
            "spacing": (1.0, 1.0, 1.0),
            "normalisation": {name: {"scheme": "zscore"} for name in spec.channels},
            "patch_size": (16, 16, 16 if dims == 3 else 1),
            "batch_size": 2,
            "network": {"name": "unet", "options": options},
            "loss": "dice_ce",
            "foreground_share": 0.5,
            "augmentation": {"mirror_axes": list(range(dims))},
            "learning_rate": 2e-3,
            "weight_decay": 1e-2,
            "warmup": 0.05,
            "averaging": 0.9,
            "precision": "fp32",
            "steps": 10,
            "validations": 2,
            "overlap": 0.5,
            "test_mirroring": False,
            "seed": 0,
            "fingerprint": make_fingerprint(channels=tuple(spec.channels), labels=tuple(spec.foreground)),
        }
        return Plan.model_validate({**values, **changes})

    return make


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., Any]:
    """``make_bundle(folder, spec, plan, folds=1)``: freshly initialised networks, saved."""

    def make(folder: Path, spec: Spec, plan: Plan, folds: int = 1) -> Any:
        import torch

        from medseg.bundle import BUNDLE_FORMAT, BundleInfo, make_network, save_bundle, versions

        weights = {}
        for fold in range(folds):
            torch.manual_seed(fold)
            weights[f"fold_{fold}.safetensors"] = make_network(spec, plan).state_dict()
        info = BundleInfo(
            format=BUNDLE_FORMAT,
            name=spec.name,
            plan=plan,
            spec=spec,
            weights={},
            dataset_digest="0" * 64,
            training={"dice": {}, "steps": 1},
            versions=versions(),
        )
        return save_bundle(folder, info, weights)

    return make


LPS = np.array([-1.0, -1.0, 1.0])


def _item(**values: Any) -> Dataset:
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return item


def _groups(volume: Volume, k: int, tags: dict[str, Any]) -> Dataset:
    """The functional groups of slice `k`: where it lies, how its values are scaled, what tells it apart."""
    across, down = volume.affine[:3, 0] / volume.spacing[0] * LPS, volume.affine[:3, 1] / volume.spacing[1] * LPS
    position = (volume.affine[:3, 2] * k + volume.affine[:3, 3]) * LPS
    slope, intercept = tags.get("rescale", lambda k: (1.0, 0.0))(k)
    content = _item(StackID=tags.get("stack", "1"), InStackPositionNumber=k + 1)
    if "time" in tags:
        content.TemporalPositionIndex = tags["time"]
    content.DimensionIndexValues = [1, k + 1, *([tags["dimension"]] if "dimension" in tags else [])]
    groups = _item(
        FrameContentSequence=[content],
        PlanePositionSequence=[_item(ImagePositionPatient=[_ds(x) for x in position])],
        PlaneOrientationSequence=[_item(ImageOrientationPatient=[_ds(x) for x in (*across, *down)])],
        PixelMeasuresSequence=[
            _item(PixelSpacing=[_ds(volume.spacing[1]), _ds(volume.spacing[0])], SliceThickness=_ds(volume.spacing[2]))
        ],
        PixelValueTransformationSequence=[
            _item(RescaleIntercept=_ds(intercept), RescaleSlope=_ds(slope), RescaleType="US")
        ],
        MRImageFrameTypeSequence=[
            _item(FrameType=["ORIGINAL", "PRIMARY", tags.get("type", "M"), "NONE"], ComplexImageComponent="MAGNITUDE")
        ],
    )
    if "echo" in tags:
        groups.MREchoSequence = [_item(EffectiveEchoTime=tags["echo"])]
    if "b" in tags:
        groups.MRDiffusionSequence = [_item(DiffusionBValue=tags["b"])]
    return groups


def _ds(value: float) -> str:
    return str(format_number_as_ds(float(value) + 0.0))


def save_enhanced(
    path: Path,
    *volumes: Volume,
    tags: Sequence[dict[str, Any]] = (),
    seed: int | None = 0,
    shared: Sequence[str] = (),
    sop_class: str = EnhancedMRImageStorage,
    syntax: str = ExplicitVRLittleEndian,
    change: Callable[[Dataset], object] = lambda dataset: None,
    **root: Any,
) -> Path:
    """Write volumes of whole numbers as the frames of one enhanced file, in an order of no meaning.

    tags : of each volume: stack, time, echo, b, type, dimension; rescale: k -> (slope, intercept).
    seed : of the order of the frames; None keeps it.
    shared : names of the groups that stand once for all frames.
    change : is given the data set before it is written.
    """
    frames = []
    for number, volume in enumerate(volumes):
        own = tags[number] if tags else {}
        for k in range(volume.shape[2]):
            slope, intercept = own.get("rescale", lambda k: (1.0, 0.0))(k)
            stored = np.rint((volume.array[0, :, :, k].T - intercept) / slope).astype("<i2")
            frames.append((stored, _groups(volume, k, own)))
    if seed is not None:
        frames = [frames[n] for n in np.random.default_rng(seed).permutation(len(frames))]
    common = _item(**{word: frames[0][1][word].value for word in shared})
    for _, groups in frames:
        for word in shared:
            delattr(groups, word)
    uids = {word: generate_uid(entropy_srcs=[word, path.name]) for word in ("SOP", "Series")}
    dataset = _item(
        SOPClassUID=sop_class,
        SOPInstanceUID=uids["SOP"],
        SeriesInstanceUID=uids["Series"],
        StudyInstanceUID=generate_uid(entropy_srcs=["study"]),
        FrameOfReferenceUID=generate_uid(entropy_srcs=["frame"]),
        Modality="MR",
        InstanceNumber=1,
        ImageType=["ORIGINAL", "PRIMARY", "M", "NONE"],
        Rows=volumes[0].shape[1],
        Columns=volumes[0].shape[0],
        NumberOfFrames=len(frames),
        SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2",
        BitsAllocated=16,
        BitsStored=16,
        HighBit=15,
        PixelRepresentation=1,
        SharedFunctionalGroupsSequence=[common],
        PerFrameFunctionalGroupsSequence=[groups for _, groups in frames],
        DimensionOrganizationSequence=[_item(DimensionOrganizationUID="1.2.3")],
        DimensionIndexSequence=[
            _item(DimensionIndexPointer=pointer, FunctionalGroupPointer=0x00209111, DimensionOrganizationUID="1.2.3")
            for pointer in (0x00209056, 0x00209057, 0x2005106E)[: 3 if tags and "dimension" in tags[0] else 2]
        ],
        PixelData=b"".join(stored.tobytes() for stored, _ in frames),
        **root,
    )
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = sop_class
    dataset.file_meta.MediaStorageSOPInstanceUID = uids["SOP"]
    if syntax in (RLELossless, JPEG2000Lossless):
        dataset.compress(syntax, generate_instance_uid=False)
    else:
        dataset.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<i2").astype(">i2").tobytes()
    change(dataset)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture(scope="session")
def write_enhanced() -> Callable[..., Path]:
    return save_enhanced
