"""Reading log files that nobody vouches for: bounded, never outside their directory, every oddity a finding.

Names and contents are data. Nothing is executed, unpickled or followed out of the directory; numbers must be finite.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from plotting.model import Finding

MAX_NUMBER = 1e12  # no time, count or iteration of a real run is larger
MAX_BYTES = 256 * 1024 * 1024
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def clean(text: object, limit: int = 200) -> str:
    """One printable line of at most `limit` characters; control characters and lone surrogates become '?'."""
    out = "".join(c if c.isprintable() and not 0xD800 <= ord(c) <= 0xDFFF else "?" for c in str(text)[: limit + 1])
    return out if len(out) <= limit else out[: limit - 3] + "..."


def file_stem(text: str) -> str:
    """A name that is safe in a file name: letters, digits, '.', '_' and '-' only, never hidden, never empty."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-")[:60] or "run-set"


@dataclass
class LogFile:
    """A text file as read: numbered lines (from 1, without line ends) and the digest of its bytes."""

    where: str
    lines: list[str]
    sha256: str
    ends_in_newline: bool


class Folder:
    """A directory tree that the loader may read; collects findings."""

    def __init__(self, root: Path, findings: list[Finding]):
        self.root = Path(os.path.realpath(root))
        self.label = clean(Path(root).name or str(root), 60)
        self.findings = findings
        self._files: list[Path] | None = None

    def name(self, path: Path) -> str:
        """The path as shown to readers: relative to the root, printable."""
        try:
            return clean(path.relative_to(self.root), 400)
        except ValueError:
            return clean(path.name, 400)

    def report(self, code: str, message: str, *where: str, figures: tuple[str, ...] = ()) -> None:
        self.findings.append(Finding(code, message, list(where), figures))

    def files(self) -> list[Path]:
        """All regular files below the root, sorted; symbolic links that lead outside are refused with a finding."""
        if self._files is None:
            self._files = sorted(self._walk())
        return self._files

    def _walk(self):
        for folder, subfolders, names in os.walk(self.root, onerror=self._walk_error):
            base = Path(folder)
            for name in [n for n in subfolders if (base / n).is_symlink()]:
                self.report("link-refused", "a symbolic link to a directory is not followed", self.name(base / name))
            for name in names:
                path = base / name
                if path.is_symlink() and not self._inside(path):
                    self.report(
                        "link-refused",
                        "a symbolic link that leads outside the log directory is not read",
                        self.name(path),
                    )
                elif self._regular(path):
                    yield path

    def _walk_error(self, error: OSError) -> None:
        self.report("unreadable", f"cannot list this directory: {error.strerror}", self.name(Path(error.filename)))

    def _regular(self, path: Path) -> bool:
        try:
            return path.is_file()  # a pipe or a device would block the reader
        except OSError as error:
            self.report("unreadable", f"cannot look at this file: {error.strerror}", self.name(path))
            return False

    def _inside(self, path: Path) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(self.root)

    def read(self, path: Path, figures: tuple[str, ...] = ()) -> LogFile | None:
        """The file's lines, or None and a finding when it cannot be read, is empty, too large, or not text."""
        where = self.name(path)
        try:
            if not self._regular(path) or not self._inside(path):
                self.report("unreadable", "not a regular file inside the log directory", where, figures=figures)
                return None
            if path.stat().st_size > MAX_BYTES:
                self.report("unreadable", f"larger than {MAX_BYTES >> 20} MiB: not read", where, figures=figures)
                return None
            data = path.read_bytes()
        except OSError as error:
            self.report("unreadable", f"cannot read this file: {error.strerror}", where, figures=figures)
            return None
        if not data.strip():
            self.report("empty", "the file is empty", where, figures=figures)
            return None
        if b"\0" in data[:65536]:
            self.report("binary", "binary content, not a text log", where, figures=figures)
            return None
        text = data.decode("utf-8", errors="replace")
        lines = [line.rstrip("\r") for line in text.split("\n")]
        if ends := lines[-1] == "":
            lines.pop()
        return LogFile(where, lines, hashlib.sha256(data).hexdigest(), ends)

    def read_json(self, path: Path) -> dict | None:
        """A JSON object, or None and a finding that names the file and line."""
        log = self.read(path)
        if log is None:
            return None
        try:
            value = parse_json("\n".join(log.lines))
        except ValueError as error:
            line = getattr(error, "lineno", 1)
            self.report("malformed", f"not well-formed JSON: {clean(error, 120)}", f"{log.where}:{line}")
            return None
        if not isinstance(value, dict):
            self.report("malformed", "expected a JSON object", f"{log.where}:1")
            return None
        return value

    def read_json_lines(self, path: Path) -> list[tuple[int, dict]]:
        """(line number, object) of every well-formed line; the others become findings."""
        log = self.read(path)
        return self.parse_json_lines(log) if log else []

    def parse_json_lines(self, log: LogFile) -> list[tuple[int, dict]]:
        rows = []
        for number, line in enumerate(log.lines, start=1):
            if not line.strip():
                continue
            try:
                value = parse_json(line)
            except ValueError as error:
                cut = number == len(log.lines) and not log.ends_in_newline
                reason = "the last line is cut" if cut else f"not well-formed JSON: {clean(error, 120)}"
                self.report("malformed", f"{reason}; the line is left out", f"{log.where}:{number}")
                continue
            if isinstance(value, dict):
                rows.append((number, value))
            else:
                self.report("malformed", "expected a JSON object; the line is left out", f"{log.where}:{number}")
        return rows


def parse_json(text: str):
    """json.loads whose every failure, deep nesting included, is a ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def number(value: object) -> float | None:
    """A finite float of a sensible size from a JSON value or a text field, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        result = float(value)
    except (ValueError, OverflowError):
        return None
    return result if math.isfinite(result) and abs(result) <= MAX_NUMBER else None


def positive(value: object) -> float | None:
    """A finite float above zero (a time), else None."""
    result = number(value)
    return result if result is not None and result > 1 / MAX_NUMBER else None


def whole(value: object) -> int | None:
    """An integer from a JSON value (2.0 counts, "2" and true do not), else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return int(value) if number(value) is not None and value == int(value) else None
