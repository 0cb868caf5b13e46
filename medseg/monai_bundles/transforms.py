"""The transforms of a bundle's inference config as parts of a plan; what is not known is refused by its name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from medseg.errors import BundleError
from medseg.monai_bundles.config import Json
from medseg.planning.plan import Normalise

NOTHING = ("LoadImaged", "EnsureChannelFirstd", "EnsureTyped", "CastToTyped", "ToTensord", "DeleteItemsd", "ToDeviced")
"""They change no value and no place here: medseg reads the image."""
PRECISE = ("float32", "float64", "float", "double")
FAR = 3.0e38
"""Beyond every value: nothing is clipped."""
AS_IT_IS = Normalise(scheme="none")
PAIRS = {frozenset("RL"), frozenset("AP"), frozenset("SI")}


@dataclass(frozen=True)
class Preparation:
    """What is done before the network: axis codes and spacing (None: as stored), and each channel's intensities."""

    orientation: str | None = None
    spacing: tuple[float, float, float] | None = None
    rows: Normalise = AS_IT_IS


def read_preparation(transforms: list[Json], *, channels: int) -> Preparation:
    """Return what the transforms of `preprocessing` do to the image; raise BundleError naming one that is not read."""
    found = Preparation()
    for row in transforms:
        name, options = named(row)
        require_fractions(name, options.get("dtype"))
        if name in NOTHING:
            continue
        if name not in _READ:
            raise BundleError(f"preprocessing: {name} is not read; read are {', '.join((*NOTHING, *_READ))}")
        found = _READ[name](found, _Options(name, options), channels)
    return found


def require_fractions(name: str, dtype: Any) -> None:
    """Raise BundleError where a transform rounds: to integers, or to few digits."""
    for each in dtype if isinstance(dtype, list) else [dtype]:
        module, _, kind = str(each).removeprefix("$").rpartition(".")
        if each is not None and not (kind in PRECISE and module in ("", "torch", "np", "numpy")):
            raise BundleError(f"{name}: dtype={each!r} is not read; {', '.join(PRECISE)} are")


def named(row: Any) -> tuple[str, Json]:
    """Return the name of a transform (its dictionary form, ...d) and its arguments."""
    if not isinstance(row, dict) or not isinstance(row.get("_target_"), str):
        raise BundleError("transforms: each one is an object with a _target_")
    if row.get("_disabled_", False) is not False:
        raise BundleError(f"transforms: {row['_target_']} has _disabled_, which is not read; take it out instead")
    module, _, name = row["_target_"].rpartition(".")
    if module and module.partition(".")[0] != "monai":  # a class of somebody's with the name of one of MONAI's
        raise BundleError(f"transforms: {row['_target_']} is not read; classes of MONAI are")
    for ending in ("Dict", "D"):
        if name.endswith(ending):
            name = f"{name.removesuffix(ending)}d"
    return name, {key: value for key, value in row.items() if not key.startswith("_")}


class _Options:
    """Arguments of one transform; what is not taken must have a value that changes nothing."""

    def __init__(self, name: str, values: Json) -> None:
        self.name, self.values = name, values

    def take(self, key: str, default: Any, *kinds: type) -> Any:
        value = self.values.pop(key, default)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise BundleError(f"{self.name}: {key}={value!r} is not read; plain values are")
        return value

    def done(self, **harmless: tuple[Any, ...]) -> None:
        free = {"keys", "allow_missing_keys", "dtype", "lazy"}
        for key, value in self.values.items():
            if key not in free and value not in harmless.get(key, ()):
                raise BundleError(f"{self.name}: {key}={value!r} is not read")


def _orientation(found: Preparation, options: _Options, channels: int) -> Preparation:
    if found.spacing is not None or found.orientation is not None:
        raise BundleError("Orientationd after Spacingd, or twice, is not read")
    codes = options.take("axcodes", "", str)
    options.done(as_closest_canonical=(False,))
    if len(codes) != 3 or {pair for pair in PAIRS if pair & set(codes)} != PAIRS:
        raise BundleError(f"Orientationd: axcodes={codes!r} is not read; one letter of each pair R/L, A/P, S/I is")
    return replace(found, orientation=codes)


def _spacing(found: Preparation, options: _Options, channels: int) -> Preparation:
    if found.rows.scheme != "none" or found.spacing is not None:
        raise BundleError("Spacingd after intensities were changed, or twice, is not read")
    pixdim = options.take("pixdim", [], list, int, float)
    numbers = pixdim if isinstance(pixdim, list) else [pixdim] * 3
    if len(numbers) != 3 or not all(type(n) in (int, float) and n > 0 for n in numbers):
        raise BundleError(f"Spacingd: pixdim={pixdim!r} is not read; three positive numbers are")
    options.done(
        mode=("bilinear", ["bilinear"]),
        padding_mode=("border", ["border"]),
        align_corners=(False, True, None),
        scale_extent=(False,),
        diagonal=(False,),
        recompute_affine=(False, True),
    )
    return replace(found, spacing=(float(numbers[0]), float(numbers[1]), float(numbers[2])))


def _linear(before: Normalise, low: float, high: float, mean: float, deviation: float) -> Normalise:
    """Return "clip to [low, high], then (x - mean) / deviation" after what was done before, if one row can say it."""
    if before.scheme == "none":
        return Normalise(scheme="ct", low=low, high=high, mean=mean, deviation=deviation)
    if before.scheme != "ct" or (low, high) != (-FAR, FAR):
        raise BundleError("intensity transforms one after the other: only a linear one after a range is read")
    whole = before.mean + before.deviation * mean
    return before.model_copy(update={"mean": whole, "deviation": before.deviation * deviation})


def _range(found: Preparation, options: _Options, channels: int) -> Preparation:
    a, b = (float(options.take(key, None, int, float)) for key in ("a_min", "a_max"))
    low, high = (float(options.take(key, None, int, float)) for key in ("b_min", "b_max"))
    clip = options.take("clip", False, bool)
    options.done()
    if not (a < b and low < high):
        raise BundleError(f"ScaleIntensityRanged from {a}..{b} to {low}..{high} is not read; ranges grow")
    deviation = (b - a) / (high - low)
    ends = (a, b) if clip else (-FAR, FAR)
    return replace(found, rows=_linear(found.rows, *ends, a - low * deviation, deviation))


def _normalise(found: Preparation, options: _Options, channels: int) -> Preparation:
    nonzero = options.take("nonzero", False, bool)
    single = options.take("channel_wise", False, bool) or channels == 1
    mean = options.take("subtrahend", None, int, float, type(None))
    deviation = options.take("divisor", None, int, float, type(None))
    options.done()
    if mean is not None and deviation is not None and not nonzero:
        return replace(found, rows=_linear(found.rows, -FAR, FAR, float(mean), float(deviation)))
    if mean is not None or deviation is not None or not single or found.rows.scheme != "none":
        raise BundleError(
            "NormalizeIntensityd is read with subtrahend and divisor as numbers and nonzero false, or as the first "
            "intensity transform with channel_wise true"
        )
    return replace(found, rows=Normalise(scheme="zscore_nonzero" if nonzero else "zscore"))


_READ = {
    "Orientationd": _orientation,
    "Spacingd": _spacing,
    "ScaleIntensityRanged": _range,
    "NormalizeIntensityd": _normalise,
}
