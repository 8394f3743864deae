#!/bin/sh
# Print a suitable Python, or end with one sentence.
# usage: find_python.sh VENV STACK [PYTHON]
set -eu
python=${3:-} wrong= versions='3.10 3.11 3.12'
[ "$2" != onedl ] || versions="$versions 3.13" # mmcv 2.1.0 does not build
# an environment that is there already decides
[ -z "$python" ] && set -- "$1/bin/python" python3.11 python3.12 python3.10 \
    python3.13 python3 python || set -- "$python"
for candidate; do
    [ -n "$python" ] || command -v "$candidate" >/dev/null || continue
    problem=$("$candidate" -c 'import sys
version = "%d.%d" % sys.version_info[:2]
if version not in sys.argv:
    print("is Python " + version)
else:
    try:
        import ensurepip, venv
    except ImportError:
        print("lacks its venv module: apt-get install python%s-venv" % version)
' $versions 2>/dev/null) || problem='is no working Python'
    [ -n "$problem" ] || { echo "$candidate" && exit; }
    case $problem in lacks*) lacks=${lacks:-$candidate $problem} ;; esac
    wrong="${wrong:+$wrong, }$candidate $problem"
done
[ -z "$python" ] || lacks="PYTHON=$wrong"
echo "mmdist needs Python 3.10, 3.11 or 3.12 (or 3.13 with MMDIST_STACK=onedl)\
 with its venv module, and ${lacks:-none was found${wrong:+ ($wrong)}: install\
 one, or name it: make test PYTHON=/path/to/python}" >&2
exit 1
