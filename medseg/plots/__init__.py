"""Every picture that medseg draws: the one door to matplotlib.

Pictures come back as bytes (PNG) or text (SVG), the same bytes for the same input and library versions: no dates, no
random ids, no global figure state. Planes are shown as a radiologist reads them: the patient's right on the left.
"""

from __future__ import annotations

from medseg.plots.curves import curves_png
from medseg.plots.distributions import Series, agreement_svg, bland_altman_svg, differences_svg, strip_svg
from medseg.plots.overlay_page import Structure, overlay_page
from medseg.plots.slices import overlay_png, slice_rgb, three_planes_png
from medseg.plots.style import Colours, colours_for

__all__ = [
    "Colours",
    "Series",
    "Structure",
    "agreement_svg",
    "bland_altman_svg",
    "colours_for",
    "curves_png",
    "differences_svg",
    "overlay_page",
    "overlay_png",
    "slice_rgb",
    "strip_svg",
    "three_planes_png",
]
