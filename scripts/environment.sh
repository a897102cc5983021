# Sourced by the other scripts: makes .venv in the repository, once, and installs Albireo into it.
# Usage: . scripts/environment.sh EXTRA   (EXTRA: "", or a name such as "test"; left out, it would be the caller's $1)

extra="$1"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

find_python() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    echo "Albireo needs Python 3.11 or newer with its venv module (on Debian and Ubuntu: apt-get install python3-venv)." >&2
    return 1
}

if [ ! -x "$root/.venv/bin/python" ]; then
    python="$(find_python)" || exit 2
    "$python" -m venv "$root/.venv" || exit 2
fi
# What is installed is known by what it was made from: the same sources need no second look.
wanted="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)"
# One file an extra: to install another takes none away.
installed="$root/.venv/albireo-installed${extra:+-$extra}"
if [ "$(cat "$installed" 2>/dev/null)" != "$wanted" ]; then
    echo "installing Albireo and what it needs into $root/.venv (once)" >&2
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$root/constraints.txt" --editable "$root${extra:+[$extra]}" || exit 2
    echo "$wanted" >"$installed"
fi
export PATH="$root/.venv/bin:$PATH"
