"""Models of nnU-Net v2 as they are: a training folder read into a plan, a spec and weights of ours.

nnU-Net itself is not needed, and no code in a checkpoint is run.
"""

from medseg.nnunet.folder import Foreign, is_nnunet, read_nnunet

__all__ = ["Foreign", "is_nnunet", "read_nnunet"]
