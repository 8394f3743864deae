#!/bin/sh
# Print a suitable Python, or end with one sentence.
# usage: find_python.sh VENV [PYTHON]
set -eu
python=${2:-} wrong=
needs='mmdist needs Python 3.10, 3.11 or 3.12 with its venv module, and'

# an environment that is there already decides
[ -z "$python" ] && set -- "$1/bin/python" python3.11 python3.12 python3.10 \
    python3 python || set -- "$python"
for candidate; do
    [ -n "$python" ] || command -v "$candidate" >/dev/null || continue
    problem=$("$candidate" -c 'import sys
version = "%d.%d" % sys.version_info[:2]
if version not in ("3.10", "3.11", "3.12"):
    print("is Python " + version)
else:
    try:
        import ensurepip, venv
    except ImportError:
        print("lacks its venv module: apt-get install python%s-venv" % version)
' 2>/dev/null) || problem='is no working Python'
    [ -n "$problem" ] || { echo "$candidate" && exit; }
    case $problem in lacks*) lacks=${lacks:-$candidate $problem} ;; esac
    wrong="${wrong:+$wrong, }$candidate $problem"
done
[ -z "$python" ] || lacks="PYTHON=$wrong"
echo "$needs ${lacks:-none was found${wrong:+ ($wrong)}: install one, or name\
 it: make test PYTHON=/path/to/python}" >&2
exit 1
