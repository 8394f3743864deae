#!/bin/sh
# Find a suitable Python and run install.py with it.
# usage: install.sh VENV STACK [PYTHON]
set -eu
venv=$1 stack=$2 python=${3:-} found= lacks=
here=$(dirname "$0")
needs='Python 3.10, 3.11 or 3.12 with its venv module'

# prints what is wrong with a Python, nothing if it suits
problem() {
    "$1" -c 'import sys
version = "%d.%d" % sys.version_info[:2]
if version not in ("3.10", "3.11", "3.12"):
    print("is Python " + version)
else:
    try:
        import ensurepip, venv
    except ImportError:
        print("lacks its venv module: apt-get install python%s-venv" % version)
' 2>/dev/null || echo 'is no working Python'
}

if [ -n "$python" ]; then
    wrong=$(problem "$python")
    [ -z "$wrong" ] || {
        echo "mmdist needs $needs, and PYTHON=$python $wrong." >&2
        exit 1
    }
else
    # an environment that is there already decides
    for candidate in "$venv/bin/python" \
        python3.11 python3.12 python3.10 python3 python; do
        command -v "$candidate" >/dev/null || continue
        wrong=$(problem "$candidate")
        case $wrong in
        '') python=$candidate && break ;;
        lacks*) lacks=${lacks:-$candidate $wrong} ;;
        *) found="${found:+$found, }$candidate $wrong" ;;
        esac
    done
    [ -n "$python" ] || {
        [ -n "$lacks" ] || lacks="none was found${found:+ ($found)}:\
 install one, or name it: make test PYTHON=/path/to/python"
        echo "mmdist needs $needs, and $lacks" >&2
        exit 1
    }
fi
exec "$python" "$here/install.py" "$venv" "$stack"
