#!/bin/sh
# Find a suitable Python and run install.py with it.
# usage: install.sh VENV STACK [PYTHON]
set -eu
venv=$1 stack=$2 python=${3:-} found=
here=$(dirname "$0")
needs='Python 3.10, 3.11 or 3.12 with its venv module'

suitable() {
    "$1" -c 'import sys, ensurepip, venv
sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

if [ -n "$python" ]; then
    suitable "$python" || {
        found=$("$python" --version 2>/dev/null || echo 'no working Python')
        echo "mmdist needs $needs, and PYTHON=$python is $found." >&2
        exit 1
    }
else
    # an environment that is there already decides
    for candidate in "$venv/bin/python" \
        python3.11 python3.12 python3.10 python3 python; do
        if suitable "$candidate"; then
            python=$candidate
            break
        fi
        if version=$("$candidate" --version 2>/dev/null); then
            found="${found:+$found, }$candidate is $version"
        fi
    done
    [ -n "$python" ] || {
        echo "mmdist needs $needs, and none was found${found:+ ($found)}:" \
            "install one, or name it: make test PYTHON=/path/to/python" >&2
        exit 1
    }
fi
exec "$python" "$here/install.py" "$venv" "$stack"
