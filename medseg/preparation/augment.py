"""Augmentation of whole batches on the training device: parameters are drawn first, then applied without chance.

What is drawn is known before anything is read, so a patch's region is as large as its transform needs
(`Changes.margins`), and turning it brings no black corners.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medseg.planning.plan import Augmentation, Triple
from medseg.preparation.intensity import AUGMENTATIONS
from medseg.preparation.space import Space, chance, draw_space
from medseg.preparation.warp import Region, apply_space


@dataclass(frozen=True)
class Changes:
    """Everything that was drawn for a batch.

    Attributes
    ----------
    size : (I, J, K) of the patches.
    intensities : name in AUGMENTATIONS -> number of each patch, and whether it is changed.
    """

    size: Triple
    space: Space
    intensities: dict[str, tuple[Tensor, Tensor]]

    def rows(self, which: slice) -> Changes:
        """Return what was drawn for some patches of the batch."""
        intensities = {name: (numbers[which], use[which]) for name, (numbers, use) in self.intensities.items()}
        return Changes(self.size, self.space.rows(which), intensities)

    def margins(self) -> list[Triple]:
        """Return how many voxels beyond its own size, on each side of an axis, each patch reads."""
        return self.space.margins(self.size)


def draw_changes(plan: Augmentation, size: Triple, *, seed: int, batch: int, dimensions: int) -> Changes:
    """Draw all changes of `batch` patches of `size`: a pure function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    space = draw_space(generator, batch, plan, size=size, dimensions=dimensions)
    intensities = {}
    for name, row in AUGMENTATIONS.items():
        numbers = row.draw(generator, batch)
        intensities[name] = numbers, chance(generator, batch, getattr(plan, name, 0.0))
    return Changes(size, space, intensities)


def augment(regions: Sequence[Region], changes: Changes) -> tuple[Tensor, Tensor]:
    """Turn regions, one per patch and all on one device, into augmented patches.

    Returns
    -------
    images (B, C, *size) float32, masks (B, 1, *size), on the device of the regions.
    """
    images, masks = apply_space(regions, changes.space, changes.size)
    for name, (numbers, use) in changes.intensities.items():
        chosen = [number for number, used in enumerate(use.tolist()) if used]
        if not chosen:
            continue
        if chosen[-1] - chosen[0] + 1 == len(chosen):  # neighbours: nothing has to be gathered
            part = images[chosen[0] : chosen[-1] + 1]
            part.copy_(AUGMENTATIONS[name].apply(part, numbers[use]))
        else:
            rows = torch.tensor(chosen, device=images.device)
            images[rows] = AUGMENTATIONS[name].apply(images[rows], numbers[use])
    return images, masks
