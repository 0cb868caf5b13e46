"""``python -m medseg``, so that ``torchrun -m medseg train ...`` works."""

from medseg.cli import main

main()
