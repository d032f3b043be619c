# shellcheck shell=bash
# source scripts/venv.sh plot|train|test: exports PY, a Python >= 3.11 with what that set needs; train adds torch (kept when
# >= 2.11), tokenizers and this project to plot, test adds the tools. Uses the active virtual environment, else makes .venv.
# A Python that the caller names (PY=python3), or without any environment a python3 that lacks nothing, is used as it is:
# nothing is made or installed, no network is needed.
venv_as_it_is() { # ROOT PYTHON WORD ..: take PYTHON if it lacks none of the words
  local lacking command
  command="$(command -v "$2")" || { echo "venv.sh: PY=$2: there is no such command" >&2; return 2; }
  lacking="$("$command" "$1/scripts/lacking.py" "${@:3}")" || return 1
  if [ -n "$lacking" ]; then echo "venv.sh: PY=$2 lacks $lacking: install that for it, or unset PY" >&2; return 2; fi
  export PY="$command" PYTHONPATH="$1/src${PYTHONPATH:+:$PYTHONPATH}"
}
venv_prepare() {
  local root dir stamp candidate lacking base="" site="" wanted="numpy matplotlib"
  local -a wanted_words lacking_words
  if [ "$1" != plot ]; then wanted+=" torch tokenizers setuptools"; fi
  if [ "$1" = test ]; then wanted+=" pytest pytest-xdist ruff scipy hypothesis"; fi
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || return 1
  if [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then dir="$VIRTUAL_ENV"; else dir="$root/.venv"; fi
  read -ra wanted_words <<<"${wanted/ setuptools/}" # which only an installation needs
  if [ "${PY:-$dir/bin/python}" != "$dir/bin/python" ]; then venv_as_it_is "$root" "$PY" "${wanted_words[@]}"; return; fi
  if ! [ -x "$dir/bin/python" ] && venv_as_it_is "$root" python3 "${wanted_words[@]}" 2>/dev/null; then return 0; fi
  export PY="$dir/bin/python"; stamp="$dir/.smartmoe-$1"
  if [ -x "$PY" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$root $wanted" ]; then return 0; fi
  if ! [ -x "$PY" ]; then # a Python that has torch >= 2.11 comes first, and its packages stay in use
    for candidate in python3.11 python3.12 python3.13 python3.14 python3; do
      lacking="$("$candidate" "$root/scripts/lacking.py" torch 2>/dev/null)" || continue
      if [ -z "$lacking" ]; then base="$candidate" site=--system-site-packages; break; fi
      base="${base:-$candidate}"
    done
    if [ -z "$base" ]; then echo "venv.sh: no Python >= 3.11 (python3.11 .. python3.14, python3) on PATH; install one" >&2; return 2; fi
    "$base" -m venv ${site:+"$site"} "$dir" >&2 || { echo "venv.sh: cannot make $dir: is python3-venv installed?" >&2; return 1; }
  fi
  read -ra wanted_words <<<"$wanted"
  lacking="$("$PY" "$root/scripts/lacking.py" "${wanted_words[@]}")" || return 1; read -ra lacking_words <<<"$lacking"
  if [ -n "$lacking" ]; then echo "venv.sh: installing $lacking" >&2; "$PY" -m pip install -q "${lacking_words[@]}" >&2 || return 1; fi
  if [ "$1" != plot ]; then "$PY" -m pip install -q --no-deps --no-build-isolation -e "$root" >&2 || return 1; fi
  echo "$root $wanted" 2>/dev/null >"$stamp" || true # an environment that cannot be written is looked at again next time
}
case "${1:-}" in plot | train | test) venv_prepare "$1" ;; *) echo "venv.sh: expected plot, train or test, not '${1:-}'" >&2; (exit 2) ;; esac
