"""Which kernels compute-sanitizer last found clean: tests/sanitized.json, which scripts/sanitize.sh writes at its end.

python -m tests.sanitized TOOL ...: record the sources as they are, after these tools found nothing in them."""

import hashlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests" / "sanitized.json"
TOOLS = ("memcheck", "racecheck")
# kernels that the watched programs run, and what lays out the memory that those of the exchange share
PATTERNS = ("src/csrc/kernels/*", "src/smartmoe/dispatch/*_kernels.py", "src/smartmoe/dispatch/symmetric*.py")


def code_of(text: str, suffix: str) -> str:
    """What a compiler makes of a source: without comments, docstrings and blanks."""
    comments = r'"""[\s\S]*?"""|#[^\n]*' if suffix == ".py" else r"/\*[\s\S]*?\*/|//[^\n]*"
    return "".join(re.sub(comments, "", text).split())


def digests(root: Path = ROOT) -> dict[str, str]:
    """{path under root: digest of its code}."""
    paths = sorted(path for pattern in PATTERNS for path in root.glob(pattern))
    codes = {str(path.relative_to(root)): code_of(path.read_text(), path.suffix) for path in paths}
    return {path: hashlib.sha256(code.encode()).hexdigest()[:16] for path, code in codes.items()}


def changed(record: dict, root: Path = ROOT) -> list[str]:
    """Sources that are not, or no more, as the record has them."""
    now, then = digests(root), record["sources"]
    return sorted(path for path in now | then if now.get(path) != then.get(path))


def main(tools: list[str]) -> None:
    """Write the record, if all of TOOLS ran."""
    lacking = [tool for tool in TOOLS if tool not in tools]
    if lacking:
        print(f"not recorded: {', '.join(lacking)} did not run")
        return
    RECORD.write_text(json.dumps({"tools": sorted(tools), "sources": digests()}, indent=1) + "\n")
    print(f"recorded: {len(digests())} sources in {RECORD.relative_to(ROOT)}")


if __name__ == "__main__":
    main(sys.argv[1:])
