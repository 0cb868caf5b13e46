"""MONAI bundles as they are: a bundle's inference config read into a plan, a spec and weights of ours.

MONAI's own parser is never used, because it executes what a config says.
"""

from medseg.monai_bundles.folder import is_monai, read_monai

__all__ = ["is_monai", "read_monai"]
