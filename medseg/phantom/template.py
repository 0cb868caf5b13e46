"""The template body: one table of what an upper abdomen is made of, in the order in which it is painted.

A part covers what was painted before it, in the picture and in the label map alike, so that the kidney displaces the
liver and the fat around the kidney takes away both. Signals are those of a T1-weighted MR image with fat = 1; many
organs share theirs (liver, pancreas and marrow; spleen, kidney and muscle; lesion, gallbladder and bowel), so that
an intensity alone names none of them. The sizes are a small adult's; the shapes are drawn from anatomy books by eye
and stand for no measured person.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medseg.phantom.shapes import ENDLESS, Blob, Shape

LABELS: dict[str, int] = {"liver": 1, "spleen": 2, "kidney_right": 3, "kidney_left": 4, "lesion": 5}
"""Value of each structure in the masks; the lesion lies in the liver and is no part of the label `liver`."""

Space = Literal["body", "torso", "cavity", "abdomen", "chest"]
"""What bounds a part: the skin, the fat below it, the muscle wall; the cavity below and above the diaphragm."""


@dataclass(frozen=True)
class Part:
    """One structure.

    Attributes
    ----------
    space : what bounds it.
    signal : (mean, spread) of its brightness over patients; fat is 1.
    shape : where it is in the template, mm; None fills the whole space.
    label : its name in LABELS, or None where it is background.
    grow : mm by which the shape is blown up (negative: shrunk).
    margin : mm that it keeps from the border of its space.
    follows : the part whose jitter it shares (a cortex and its medulla move together).
    """

    space: Space
    signal: tuple[float, float]
    shape: Shape | None = None
    label: str | None = None
    grow: float = 0.0
    margin: float = 0.0
    follows: str | None = None


BODY = Shape(
    (
        Blob((0, 4, 0), (122, 84, ENDLESS)),
        Blob((45, -8, 0), (72, 76, ENDLESS)),
        Blob((-45, -8, 0), (72, 76, ENDLESS)),
    ),
    blend=30,
)
"""The skin."""

DIAPHRAGM = Shape(
    (
        Blob((56, -6, -16), (66, 80, 84), endless_below=True),
        Blob((-54, -8, -20), (64, 80, 79), endless_below=True),
    ),
    blend=40,
)
"""Two domes, the right one higher; what is above them in the chest is lung."""

LIVER = Shape(
    (
        Blob((66, -2, 18), (50, 72, 54)),
        Blob((72, -8, -18), (34, 48, 40)),
        Blob((10, 34, 28), (66, 34, 30), (0, -8, 0)),
    ),
    minus=(Blob((40, 14, -44), (34, 40, 26), (0, 25, 0)),),
    blend=20,
)
SPLEEN = Shape((Blob((-82, -34, 22), (30, 44, 42), (20, 10, 0)),), minus=(Blob((-42, -12, 24), (20, 26, 30)),), blend=8)
KIDNEY_RIGHT = Shape(
    (Blob((53, -44, -30), (27, 24, 42), (-8, 10, 20)),), minus=(Blob((24, -36, -32), (12, 14, 11)),), blend=10
)
KIDNEY_LEFT = Shape(
    (Blob((-53, -44, -22), (27, 24, 43), (-8, -10, -20)),), minus=(Blob((-24, -36, -24), (12, 14, 11)),), blend=10
)
PYRAMIDS_RIGHT = Shape((Blob((51, -44, -30), (14, 11, 29), (-8, 10, 20)),))
PYRAMIDS_LEFT = Shape((Blob((-51, -44, -22), (14, 11, 30), (-8, -10, -20)),))
STOMACH = Shape((Blob((-54, 24, 32), (36, 32, 38)), Blob((-24, 40, -4), (36, 22, 20), (0, -25, 0))), blend=20)
COLON = Shape(
    (
        Blob((84, 20, -74), (20, 22, 28)),
        Blob((40, 56, -50), (44, 18, 15), (0, 8, 0)),
        Blob((-34, 58, -46), (48, 18, 15), (0, -8, 0)),
        Blob((-92, 4, -60), (16, 20, 48)),
    ),
    blend=10,
)
SMALL_BOWEL = Shape(
    (
        Blob((-58, 24, -40), (24, 16, 14), (0, 20, 0)),
        Blob((-66, 12, -74), (22, 18, 16), (0, -20, 30)),
        Blob((-26, 30, -64), (26, 20, 14), (0, 15, 0)),
        Blob((10, 34, -76), (24, 18, 15), (0, -20, 20)),
        Blob((44, 24, -74), (22, 20, 15), (0, 20, 0)),
        Blob((-20, 8, -88), (30, 16, 13), (0, -10, 0)),
        Blob((30, 6, -96), (26, 16, 13), (0, 15, 0)),
    ),
    blend=3,
)
PANCREAS = Shape((Blob((14, 4, -14), (18, 13, 17)), Blob((-22, 0, 0), (36, 10, 11), (0, 14, 12))), blend=12)
VERTEBRAE = Shape((Blob((0, -46, 0), (21, 17, ENDLESS)),))
DISCS = Shape(tuple(Blob((0, -46, z), (21, 17, 4)) for z in range(-108, 120, 30)), blend=1)
ARCH = Shape((Blob((0, -69, 0), (16, 13, ENDLESS)), Blob((0, -84, 0), (4, 14, ENDLESS))), blend=6)
CANAL = Shape((Blob((0, -68, 0), (9, 7, ENDLESS)),))
BACK_MUSCLES = Shape((Blob((27, -73, 0), (22, 15, ENDLESS)), Blob((-27, -73, 0), (22, 15, ENDLESS))), blend=4)
PSOAS = Shape((Blob((32, -46, -110), (17, 16, 75)), Blob((-32, -46, -110), (17, 16, 75))), blend=4)
CRURA = Shape((Blob((15, -30, 40), (6, 13, 60)), Blob((-17, -32, 40), (6, 13, 60))), blend=4)
AORTA = Shape((Blob((-9, -24, 0), (8.5, 8.5, ENDLESS)),))
CAVA = Shape((Blob((16, -22, 0), (10, 8, ENDLESS)),))
PORTAL_VEIN = Shape(
    (
        Blob((36, 4, 8), (30, 5.5, 5.5), (0, 20, -10)),
        Blob((66, -6, 22), (26, 4.5, 4.5), (0, 35, 15)),
        Blob((18, 24, 26), (30, 4.5, 4.5), (0, -10, 30)),
    ),
    blend=4,
)
GALLBLADDER = Shape((Blob((46, 34, -26), (13, 24, 14), (-25, 0, 0)),))
HEART = Shape((Blob((-16, 22, 90), (48, 40, 34), (0, 15, 0)),))

PARTS: dict[str, Part] = {
    "fat": Part("body", (0.98, 0.04)),
    "wall": Part("torso", (0.44, 0.03)),
    "visceral_fat": Part("cavity", (0.90, 0.04)),
    "lungs": Part("chest", (0.07, 0.01), margin=3),
    "heart": Part("chest", (0.40, 0.05), HEART, margin=3),
    "psoas": Part("cavity", (0.44, 0.03), PSOAS),
    "crura": Part("abdomen", (0.44, 0.03), CRURA),
    "bowel_wall": Part("abdomen", (0.46, 0.03), SMALL_BOWEL, margin=2),
    "small_bowel": Part("abdomen", (0.56, 0.08), SMALL_BOWEL, grow=-4, margin=6, follows="bowel_wall"),
    "colon": Part("abdomen", (0.36, 0.10), COLON, margin=2),
    "pancreas": Part("abdomen", (0.60, 0.03), PANCREAS),
    "stomach_wall": Part("abdomen", (0.52, 0.03), STOMACH, margin=2),
    "stomach": Part("abdomen", (0.36, 0.10), STOMACH, grow=-4, margin=6, follows="stomach_wall"),
    "liver": Part("abdomen", (0.62, 0.02), LIVER, "liver", margin=2),
    "portal_vein": Part("abdomen", (0.50, 0.03), PORTAL_VEIN, "liver", margin=8, follows="liver"),
    "gallbladder": Part("abdomen", (0.30, 0.06), GALLBLADDER, margin=4),
    "spleen": Part("abdomen", (0.43, 0.02), SPLEEN, "spleen", margin=2),
    "fat_right": Part("abdomen", (0.92, 0.03), KIDNEY_RIGHT, grow=5, follows="kidney_right"),
    "fat_left": Part("abdomen", (0.92, 0.03), KIDNEY_LEFT, grow=5, follows="kidney_left"),
    "kidney_right": Part("abdomen", (0.54, 0.02), KIDNEY_RIGHT, "kidney_right", margin=3),
    "kidney_left": Part("abdomen", (0.54, 0.02), KIDNEY_LEFT, "kidney_left", margin=3),
    "pyramids_right": Part("abdomen", (0.45, 0.02), PYRAMIDS_RIGHT, "kidney_right", margin=9, follows="kidney_right"),
    "pyramids_left": Part("abdomen", (0.45, 0.02), PYRAMIDS_LEFT, "kidney_left", margin=9, follows="kidney_left"),
    "back_muscles": Part("torso", (0.44, 0.03), BACK_MUSCLES, margin=2),
    "arch": Part("torso", (0.35, 0.03), ARCH, margin=4),
    "vertebrae": Part("torso", (0.62, 0.04), VERTEBRAE),
    "discs": Part("torso", (0.34, 0.03), DISCS),
    "canal": Part("torso", (0.26, 0.02), CANAL),
    "aorta": Part("torso", (0.18, 0.04), AORTA),
    "cava": Part("torso", (0.36, 0.05), CAVA),
}
"""In order of painting; the lesion is added last, in the liver that the patient has."""

LESION_SIGNAL = (0.29, 0.02)
LESION_RADIUS_MM = (22.0, 28.0)
