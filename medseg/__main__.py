"""The program ``medseg``, and ``python -m medseg``, so that ``torchrun -m medseg train ...`` works."""

from medseg.cli import main
from medseg.startup import quick_start


def program() -> None:
    """Run the command line in a process that does nothing else."""
    quick_start()
    main()


if __name__ == "__main__":
    program()
