"""Write constraints.txt: the exact versions, in this environment, of all that medseg[test,docs] needs.

    .venv/bin/python scripts/freeze_constraints.py > constraints.txt

Only the closure of medseg's own requirements is listed, so what else a developer has installed does not leak in.
Local version parts are dropped (``2.13.0+cpu`` becomes ``2.13.0``): pip takes the build that the machine offers.
"""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

HEADER = """\
# Versions that medseg was tested with (Python 3.11): pip install -c constraints.txt -e .[test]
# Made by scripts/freeze_constraints.py; change pyproject.toml and run it again rather than edit this file.
"""


def closure(root: Requirement) -> dict[str, str]:
    """Return name and version of everything that `root` needs here, itself left out."""
    found: dict[tuple[str, frozenset[str]], Distribution] = {}
    waiting = [root]
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in found:
            continue
        found[key] = distribution(requirement.name)
        extras = requirement.extras or {""}
        for line in found[key].requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    own = canonicalize_name(root.name)
    return {name: Version(found.version).public for (name, _), found in sorted(found.items()) if name != own}


if __name__ == "__main__":
    versions = closure(Requirement("medseg[test,docs]"))
    sys.stdout.write(HEADER + "".join(f"{name}=={version}\n" for name, version in versions.items()))
