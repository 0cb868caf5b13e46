"""Between label values of a spec and channels of a network.

Exclusive labels: channel 0 is background, then the labels in the order of the spec (softmax). Regions: one channel
each (sigmoid), painted over each other in the order of the spec.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from medseg.joined import annotated, annotates_all
from medseg.spec import Case, Spec

NOWHERE = -1e4
"""Logit of a channel that no voxel is asked about: its probability is 0 in single precision."""


def exclusive(spec: Spec) -> bool:
    """Tell whether classes exclude each other (softmax) or are overlapping regions (sigmoid)."""
    return not spec.regions


def channel_names(spec: Spec) -> list[str]:
    """Return what each channel of the logits stands for."""
    return ["background", *spec.foreground] if exclusive(spec) else list(spec.regions)


def known_channels(spec: Spec, case: Case) -> list[bool]:
    """Tell of each channel of the logits whether the mask of a case knows it; the background always is.

    A region is known where all its labels are.
    """
    if exclusive(spec):
        known = annotated(spec, case)
        return [True, *(name in known for name in spec.foreground)]
    return [annotates_all(spec, case, region.labels) for region in spec.regions.values()]


def merge_unknown(logits: Tensor, known: Tensor, alone: bool) -> Tensor:
    """Take channels that a mask does not know out of what is asked: the marginal loss of Shi et al. 2021.

    Of exclusive labels, a voxel that such a mask calls background is background or any unknown label: their
    probabilities are added (arXiv 2007.03868, equation 3). Of regions, an unknown one is not asked about.

    Parameters
    ----------
    logits : (B, K, *S).
    known : (B, K) bool, the first True where `alone` (labels exclude each other).

    Returns
    -------
    Tensor
        (B, K, *S) float32; NOWHERE in unknown channels, through which no gradient flows.
    """
    logits = logits.float()
    here = known.reshape(*known.shape, *[1] * (logits.ndim - 2))
    asked = torch.where(here, logits, NOWHERE)
    if not alone:
        return asked
    hidden = torch.where(here[:, 1:], NOWHERE, logits[:, 1:])
    background = torch.cat([logits[:, :1], hidden], 1).logsumexp(1, keepdim=True)
    return torch.cat([background, asked[:, 1:]], 1)


def encode(spec: Spec, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Map label values (B, 1, *S) to targets (B, K, *S) float32 and valid (B, 1, *S) bool."""
    mask = mask.int()  # torch compares uint8 with 300 as with 44
    valid = torch.ones_like(mask, dtype=torch.bool) if spec.ignore is None else mask != spec.ignore
    values = spec.foreground
    if exclusive(spec):
        channels = [mask == value for value in values.values()]
        background = ~torch.stack(channels).any(0) & valid
        channels = [background, *channels]
    else:
        channels = [
            torch.stack([mask == values[name] for name in region.labels]).any(0) for region in spec.regions.values()
        ]
    return torch.cat(channels, dim=1).float(), valid


def label_type(spec: Spec) -> type[np.uint8] | type[np.int32]:
    """Return the type of a label map: uint8 where the values fit, else int32."""
    return np.uint8 if max(spec.foreground.values()) < 256 else np.int32


def decode(spec: Spec, logits: Tensor) -> Tensor:
    """Map logits (K, *S) to label values (1, *S), uint8 where they fit, else int32."""
    dtype = torch.uint8 if label_type(spec) == np.uint8 else torch.int32
    if exclusive(spec):
        table = torch.tensor([0, *spec.foreground.values()], dtype=dtype, device=logits.device)
        return table[logits.argmax(0, keepdim=True)]
    mask = torch.zeros((1, *logits.shape[1:]), dtype=dtype, device=logits.device)
    for channel, region in zip(logits, spec.regions.values(), strict=True):
        mask[0][channel > 0] = spec.foreground[region.paint]
    return mask


def probabilities(spec: Spec, logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Map logits (K, *S) to probabilities (N, *S) of the N labels (softmax, background left out) or regions.

    Logits are divided by `temperature` first.
    """
    logits = logits if temperature == 1 else logits / temperature
    return logits.softmax(0)[1:] if exclusive(spec) else logits.sigmoid()


def mean_logits(spec: Spec, parts: Iterable[Tensor]) -> Tensor:
    """Average the probabilities of several logits (K, *S), and return the mean as logits (K, *S).

    `decode` and `probabilities` of the result are those of the mean: its logarithm, and of regions its log-odds.
    Probabilities are kept from 0 (1e-20; of regions 1e-7 from 0 and 1). Two arrays are held beside the part at hand.

    Raises
    ------
    ValueError : there is no part.
    """
    total: Tensor | None = None
    count = 0
    for logits in parts:
        soft = logits.softmax(0) if exclusive(spec) else logits.sigmoid()
        total = soft if total is None else total.add_(soft)
        count += 1
    if total is None:
        raise ValueError("there are no logits to average")
    mean = total.div_(count)
    return mean.clamp_(min=1e-20).log_() if exclusive(spec) else torch.logit(mean, eps=1e-7)


def background_logits(spec: Spec) -> Tensor:
    """Return logits (K,) that decode to background, for voxels that no network has seen."""
    count = len(channel_names(spec))
    logits = torch.full((count,), -20.0)
    if exclusive(spec):
        logits[0] = 20.0
    return logits
