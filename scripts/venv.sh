# shellcheck shell=bash
# source scripts/venv.sh plot|train|test: exports PY, a Python >= 3.11 with what that set needs; train adds torch (kept when
# >= 2.11), tokenizers and this project to plot, test adds the tools. Uses the active virtual environment, else makes .venv.
venv_check='
import sys
from importlib.metadata import PackageNotFoundError, version
if sys.version_info < (3, 11): sys.exit("venv.sh: Python >= 3.11 is needed, this is " + sys.version.split()[0])
least = {"numpy": (1, 26), "matplotlib": (3, 8), "torch": (2, 11), "setuptools": (70, 1)}
spec = {name: f"{name}>={a}.{b}" for name, (a, b) in least.items()} | {"torch": "torch==2.13.0"}
def lacks(name):
    try: return tuple(map(int, version(name).split(".")[:2])) < least.get(name, (0, 0))
    except PackageNotFoundError: return True
print(*(spec.get(name, name) for name in sys.argv[1:] if lacks(name)))'
venv_prepare() {
  local root dir stamp candidate lacking base="" site="" wanted="numpy matplotlib"
  if [ "$1" != plot ]; then wanted+=" torch tokenizers setuptools"; fi
  if [ "$1" = test ]; then wanted+=" pytest pytest-xdist ruff scipy hypothesis"; fi
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || return 1
  if [ -x "${VIRTUAL_ENV:-}/bin/python" ]; then dir="$VIRTUAL_ENV"; else dir="$root/.venv"; fi
  export PY="$dir/bin/python"; stamp="$dir/.smartmoe-$1"
  if [ -x "$PY" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$root $wanted" ]; then return 0; fi
  if ! [ -x "$PY" ]; then # a Python that has torch >= 2.11 comes first, and its packages stay in use
    for candidate in python3.11 python3.12 python3.13 python3.14 python3; do
      lacking="$("$candidate" -c "$venv_check" torch 2>/dev/null)" || continue
      if [ -z "$lacking" ]; then base="$candidate" site=--system-site-packages; break; fi
      base="${base:-$candidate}"
    done
    if [ -z "$base" ]; then echo "venv.sh: no Python >= 3.11 (python3.11 .. python3.14, python3) on PATH; install one" >&2; return 1; fi
    "$base" -m venv ${site:+"$site"} "$dir" >&2 || { echo "venv.sh: cannot make $dir: is python3-venv installed?" >&2; return 1; }
  fi
  local -a wanted_words lacking_words; read -ra wanted_words <<<"$wanted"
  lacking="$("$PY" -c "$venv_check" "${wanted_words[@]}")" || return 1; read -ra lacking_words <<<"$lacking"
  if [ -n "$lacking" ]; then echo "venv.sh: installing $lacking" >&2; "$PY" -m pip install -q "${lacking_words[@]}" >&2 || return 1; fi
  if [ "$1" != plot ]; then "$PY" -m pip install -q --no-deps --no-build-isolation -e "$root" >&2 || return 1; fi
  echo "$root $wanted" 2>/dev/null >"$stamp" || true # an environment that cannot be written is looked at again next time
}
case "${1:-}" in plot | train | test) venv_prepare "$1" ;; *) echo "venv.sh: expected plot, train or test, not '${1:-}'" >&2; (exit 2) ;; esac
