"""python lacking.py NAME ..: print what pip must install for this Python to have these packages, nothing when it has them."""

import sys
from importlib.metadata import PackageNotFoundError, version

LEAST = {"numpy": (1, 26), "matplotlib": (3, 8), "torch": (2, 11), "setuptools": (70, 1)}
PINNED = {"torch": "torch==2.13.0"}  # unpinned it would come with gigabytes of CUDA


def requirement(name: str) -> str:
    """What pip installs for `name`; empty when it is there, new enough."""
    least = LEAST.get(name, (0, 0))
    try:
        if tuple(map(int, version(name).split(".")[:2])) >= least:
            return ""
    except PackageNotFoundError:
        pass
    return PINNED.get(name) or (f"{name}>={least[0]}.{least[1]}" if name in LEAST else name)


if sys.version_info < (3, 11):  # noqa: UP036 -- it runs before anything says which Python this is
    sys.exit("venv.sh: Python >= 3.11 is needed, this is " + sys.version.split()[0])
print(*filter(None, map(requirement, sys.argv[1:])))
