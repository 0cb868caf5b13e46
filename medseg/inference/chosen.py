"""How a bundle is used: with other rules for its channels, without its post-processing; no weight is read for that.

Light, like medseg.bundle: a command whose workers predict never needs torch itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from medseg.bundle import Bundle, BundleInfo, open_bundle
from medseg.channels import with_rules
from medseg.inference.postprocess import require_steps


def usable(model: Path | Bundle) -> Bundle:
    """Open a bundle (unless it is open) and check that all it asks for is known here.

    Raises
    ------
    BundleError : there is no model, it is damaged, or its post-processing is of a kind that is not known here.
    """
    bundle = model if isinstance(model, Bundle) else open_bundle(model)
    require_steps(bundle.info.postprocess, bundle.info.spec)
    return bundle


def ruled(bundle: Bundle, file: Path) -> Bundle:
    """Return a bundle that finds its channels in DICOM studies by the rules of a YAML file; it has another digest.

    Raises
    ------
    SpecError : as `medseg.channels.with_rules`.
    """
    info = bundle.info.model_copy(update={"spec": with_rules(bundle.info.spec, file)})
    return replace(bundle, info=info)


def unprocessed(bundle: Bundle) -> Bundle:
    """Return a bundle that leaves its masks as the network made them; it has another digest if that differs.

    Its quality estimate is of post-processed masks, so that it goes with the steps.
    """
    if not bundle.info.postprocess:
        return bundle
    return replace(bundle, info=bundle.info.model_copy(update={"postprocess": (), "quality": None}))


def speaking(bundle: Bundle, say: Callable[[str], None]) -> Bundle:
    """Return the bundle as it is; where it has an estimate of quality that is not used, say why."""
    quality = bundle.info.quality
    if quality is not None and quality.outdated:
        say(
            "the model's quality estimate was fitted by an earlier medseg, on signs that are not noted any more: masks "
            "are the same, but no Dice is expected of them and none is flagged; train the model again for an estimate"
        )
    return bundle


def judged(info: BundleInfo, mirror: bool | None) -> bool:
    """Tell whether the quality of masks that are made with or without mirroring (None: as planned) is estimated."""
    quality = info.quality
    if quality is None or quality.outdated or info.members:
        return False
    return quality.mirror == (info.plan.test_mirroring if mirror is None else mirror)
