"""Write down how the Slurm jobs of a run-set ended, where they could not do so themselves:  python scripts/settle.py LOGS"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "scripts")]

import slurm  # noqa: E402

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    slurm.settle_all(path.parent for path in sorted(Path(sys.argv[1]).glob("*/*/*/run.json")))
