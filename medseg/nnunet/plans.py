"""plans.json and dataset.json of an nnU-Net v2 model as a Plan and a Spec of ours."""

from __future__ import annotations

from typing import Any

from medseg.errors import BundleError
from medseg.foreign_specs import nnunet_channels, nnunet_labels
from medseg.nnunet.architecture import network_plan
from medseg.planning.fingerprint import ChannelStatistics, Fingerprint
from medseg.planning.plan import Augmentation, Interpolation, NnUNet, Normalise, Plan
from medseg.spec import Spec

AXES = {
    # Arrays there are Z, Y, X.
    "SimpleITKIO": "KJI",
    "NibabelIO": "KJI",
    "SimpleITKIOWithReorient": "SAR",
    "NibabelIOWithReorient": "SAR",
}
"""image_reader_writer -> where its axes point, before transpose_forward."""
SCHEMES = {
    "CTNormalization": "ct",
    "ZScoreNormalization": "zscore",
    "NoNormalization": "none",
    "RescaleTo01Normalization": "range",
    "RGBTo01Normalization": "bytes",
}
RESAMPLING = "resample_data_or_seg_to_shape"
Json = dict[str, Any]


def resolved(plans: Json, name: str) -> Json:
    """Return one configuration with what it inherits; raise BundleError where it (or a parent) does not exist."""
    chain: list[str] = []
    found: Json = {}
    while name:
        if name not in plans["configurations"] or name in chain:
            known = ", ".join(plans["configurations"])
            raise BundleError(f"plans.json: configuration {name!r} is missing or inherits itself; it has {known}")
        chain.append(name)
        found = {**plans["configurations"][name], **found}
        name = str(plans["configurations"][name].get("inherits_from", ""))
    return found


def make_spec(plans: Json, dataset: Json) -> Spec:
    """Return channels, labels and regions; labels in the order of their values, which is that of the network."""
    labels, regions, ignore = nnunet_labels(dataset)
    ordered = dict(sorted(labels.items(), key=lambda item: item[1].value))
    return Spec(
        name=str(plans["dataset_name"]),
        description=str(dataset.get("description", "")),
        licence=str(dataset.get("licence", "")),
        channels=nnunet_channels(dataset["channel_names"]),
        labels=ordered,
        regions=regions,
        ignore=ignore,
    )


def make_plan(plans: Json, dataset: Json, configuration: Json, spec: Spec, mirror_axes: tuple[int, ...]) -> Plan:
    """Return the plan that prepares and predicts as this configuration does; what is for training is a filler.

    Raises
    ------
    BundleError : a reader, preprocessor, normalisation, resampling or label manager that is not nnU-Net's own.
    """
    _refuse_others(plans, configuration)
    dims = len(configuration["patch_size"])
    codes = _axes(plans, dataset)
    fingerprint = _fingerprint(plans, dataset, spec)
    spacing = [float(s) for s in configuration["spacing"]]
    patch = [int(n) for n in configuration["patch_size"]]
    if dims == 2:
        # The network's slices lie along its first axis, ours along the last.
        codes = codes[1:] + codes[:1]
        spacing = [*spacing[-2:], float(plans["original_median_spacing_after_transp"][0])]
        patch = [*patch, 1]
    return Plan(
        dataset=spec.name,
        dimensions=dims,  # type: ignore[arg-type]  # pydantic refuses others
        orientation=codes,
        spacing=tuple(spacing),  # type: ignore[arg-type]
        normalisation=_normalisation(plans, configuration, spec),
        patch_size=tuple(patch),  # type: ignore[arg-type]
        batch_size=int(configuration["batch_size"]),
        network=network_plan(configuration),
        loss="dice_ce",
        foreground_share=0.33,
        augmentation=Augmentation(mirror_axes=mirror_axes),
        learning_rate=0.01,
        weight_decay=3e-5,
        warmup=0.0,
        averaging=0.0,
        precision="fp32",
        steps=250_000,
        validations=1,
        overlap=0.5,
        test_mirroring=bool(mirror_axes),
        seed=0,
        fingerprint=fingerprint,
        nnunet=_resampling(configuration),
    )


def _refuse_others(plans: Json, configuration: Json) -> None:
    found = {
        "preprocessor_name": (configuration["preprocessor_name"], "DefaultPreprocessor"),
        "label_manager": (plans.get("label_manager", "LabelManager"), "LabelManager"),
        "resampling_fn_data": (configuration["resampling_fn_data"], RESAMPLING),
        "resampling_fn_seg": (configuration["resampling_fn_seg"], RESAMPLING),
        "resampling_fn_probabilities": (configuration["resampling_fn_probabilities"], RESAMPLING),
    }
    for name, (value, allowed) in found.items():
        if value != allowed:
            raise BundleError(f"plans.json: {name} {value}: not read; allowed: {allowed}")


def _axes(plans: Json, dataset: Json) -> str:
    reader = str(dataset.get("overwrite_image_reader_writer") or plans["image_reader_writer"])
    if reader not in AXES:
        raise BundleError(f"plans.json: image_reader_writer {reader}: not read; allowed: {', '.join(AXES)}")
    return "".join(AXES[reader][int(axis)] for axis in plans["transpose_forward"])


def _normalisation(plans: Json, configuration: Json, spec: Spec) -> dict[str, Normalise]:
    statistics = _intensities(plans)
    rows = {}
    names, masked = configuration["normalization_schemes"], configuration["use_mask_for_norm"]
    for number, (channel, name, mask) in enumerate(zip(spec.channels, names, masked, strict=True)):
        if name not in SCHEMES:
            raise BundleError(f"plans.json: normalisation {name}: not read; allowed: {', '.join(SCHEMES)}")
        scheme: Any = SCHEMES[name]
        if scheme == "ct":
            row = statistics[str(number)]
            low, high = row["percentile_00_5"], row["percentile_99_5"]
            rows[channel] = Normalise(scheme="ct", low=low, high=high, mean=row["mean"], deviation=row["std"])
        else:
            rows[channel] = Normalise(scheme="zscore_content" if scheme == "zscore" and mask else scheme)
    return rows


def _intensities(plans: Json) -> Json:
    new, old = "foreground_intensity_properties_per_channel", "foreground_intensity_properties_by_modality"
    return dict(plans.get(new) or plans.get(old) or {})


def _resampling(configuration: Json) -> NnUNet:
    rules = {name: _interpolation(configuration[f"resampling_fn_{name}_kwargs"]) for name in _KINDS}
    if rules["probabilities"].order != 1 or rules["probabilities"].order_z > 1:
        raise BundleError("plans.json: probabilities resampled by another order than 1 (and 0 or 1 along z): not read")
    cascade = "previous_stage" in configuration
    if cascade and (rules["seg"].order > 1 or rules["seg"].order_z != 0):
        raise BundleError("plans.json: labels resampled by another order than 0 or 1 (and 0 along z): not read")
    return NnUNet(image=rules["data"], logits=rules["probabilities"], previous=rules["seg"] if cascade else None)


_KINDS = ("data", "seg", "probabilities")


def _interpolation(options: Json) -> Interpolation:
    known = {"is_seg", "order", "order_z", "force_separate_z"}
    if set(options) - known:
        raise BundleError(f"plans.json: resampling with {', '.join(sorted(set(options) - known))}: not read")
    order_z, separate = options.get("order_z", 0), options.get("force_separate_z", False)
    return Interpolation(order=options.get("order", 3), order_z=order_z, separate=separate)


def _fingerprint(plans: Json, dataset: Json, spec: Spec) -> Fingerprint:
    """Return what the plans tell of the data; sizes along the axes of the network."""
    shape = tuple(round(n) for n in plans["original_median_shape_after_transp"])
    spacing = tuple(float(s) for s in plans["original_median_spacing_after_transp"])
    cases = int(dataset.get("numTraining", 0))
    rows = _intensities(plans)
    channels = {
        name: ChannelStatistics(
            low=rows[str(n)]["percentile_00_5"],
            median=rows[str(n)]["median"],
            high=rows[str(n)]["percentile_99_5"],
            mean=rows[str(n)]["mean"],
            deviation=rows[str(n)]["std"],
        )
        for n, name in enumerate(spec.channels)
        if str(n) in rows
    }
    return Fingerprint(
        cases=cases,
        patients=cases,
        shapes=(shape,) * 5,
        spacings=(spacing,) * 5,  # type: ignore[arg-type]
        voxels=cases * shape[0] * shape[1] * shape[2],
        channels=channels,
        label_ml={},
        label_cases={},
    )
