"""All that is noted of one case while it is predicted, and the signs of its quality that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from medseg.planning.plan import Plan
from medseg.quality.closer import zooms
from medseg.quality.image import ImageSigns, image_signs
from medseg.quality.shape import Shapes, label_shapes
from medseg.quality.witness import LabelSigns, Witness
from medseg.spec import Spec
from medseg.volume import Volume


@dataclass(frozen=True)
class Signs:
    """The signs of one predicted case.

    Attributes
    ----------
    image : what the image is like.
    passes : label -> what the networks' passes say; labels that none found are left out.
    between : label -> Dice between the masks of two networks; nothing for one network.
    shapes : label -> what it is like in the final mask; labels that are not there are left out.
    """

    image: ImageSigns
    passes: dict[str, LabelSigns]
    between: dict[str, float]
    shapes: Shapes


@dataclass
class Notes:
    """Filled while one image is predicted (see medseg.inference.predict.predict_logits)."""

    witness: Witness
    image: ImageSigns | None = field(default=None)

    def look(self, prepared: Tensor, spacing: Sequence[float], source: Volume) -> None:
        """Note what the prepared image (C, I, J, K) on the CPU is like."""
        self.image = image_signs(prepared, spacing, source, list(self.witness.spec.channels))

    def signs(self, mask: Volume) -> Signs:
        """Return the signs, with those of the final mask (1, I, J, K)."""
        assert self.image is not None, "nothing was predicted"
        shapes = label_shapes(mask, self.witness.spec)
        return Signs(self.image, self.witness.signs(), self.witness.between_networks(), shapes)


def make_notes(spec: Spec, plan: Plan, *, networks: int, passes: int) -> Notes:
    """Return empty notes; parameters as for Witness."""
    zoom = zooms(plan.spacing, plan.dimensions)
    return Notes(Witness(spec, networks=networks, passes=passes, zoom=zoom))
