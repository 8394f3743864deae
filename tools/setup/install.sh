#!/bin/sh
# Make the virtual environment of mmdist; run again, go on or do nothing.
# usage: install.sh VENV STACK [PYTHON]
set -eu
case $1 in /*) venv=$1 ;; *) venv=$PWD/$1 ;; esac
stack=$2 name=${venv##*/}
cd "$(dirname "$0")/../.."
fail() { echo "$*" >&2 && exit 1; }

case $stack in
openmmlab | onedl)
    lists="torch $stack" modules='mmcv.ops mmengine mmdet mmseg' ;;
cls) # no operators to build
    lists='torch-cls cls mmpretrain timm' modules='mmcv mmengine mmpretrain' ;;
*) fail "MMDIST_STACK=$stack is not one of openmmlab, onedl, cls." ;;
esac
python=$(sh tools/setup/find_python.sh "$venv" "$stack" "${3:-}")
py=$venv/bin/python log=.cache/setup-$stack.log
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }
mmcv=$(grep '^\(onedl-\)*mmcv=' "requirements/$stack.txt" || true)

# a title, and a command whose output goes to the log
run() {
    printf '%s' "  $1 ..."
    shift
    start=$(date +%s) before=$(wc -l <"$log")
    "$@" >>"$log" 2>&1 || {
        echo ' failed'
        tail -n "+$((before + 1))" "$log" | tail -n 15 | cut -c 1-200
        fail "The whole log is in $log. Once the cause is removed, the same \
command goes on from here."
    }
    echo " $(($(date +%s) - start)) s"
}

pip() { "$py" -m pip --disable-pip-version-check --no-input "$@"; }

# what the environment was made from; if nothing changes, nothing is done
state() {
    { echo "$stack $(version "$python") $PWD" "$(sh tools/setup/cuda.sh \
        "$venv" 2>/dev/null)" && cat requirements/*.txt setup.py *.toml \
        tools/setup/*; } | cksum
}

# a wheel that was built here before, or one that pip is pointed to, in a
# folder for all that a wheel has to suit
find_wheel() {
    wheels=.cache/wheels/cp$(version "$py" | tr -d .)-$(
        grep '^torch==' requirements/torch.txt | tr -d =)-$(
        sh tools/setup/cuda.sh "$venv" 2>/dev/null)
    set -- "$wheels/$(echo "${mmcv%%=*}" | tr - _)-${mmcv##*=}"
    ls "$1"-*.whl >/dev/null 2>&1 || pip download -q --no-deps \
        --only-binary=:all: -d "$wheels" "$mmcv" >>"$log" 2>&1 || true
    wheel=$(ls "$1"-*.whl 2>/dev/null)
}

# end with a sentence if there is no compiler that can build mmcv
check_compiler() {
    cxx=${CXX:-c++} need="$mmcv has no ready wheel here and building it needs"
    command -v "${cxx%% *}" >/dev/null || fail "$need a C++ compiler, but \
there is no $cxx: install one (for instance: apt-get install g++) or set CXX."
    include=$("$py" -c 'import sysconfig as s; print(s.get_path("include"))')
    says=$(printf '#include <Python.h>\n#include <optional>\n' |
        $cxx -std=c++17 -I"$include" -fsyntax-only -x c++ - 2>&1) && return
    case $says in *Python.h*) need="$need the headers of Python (python3-dev)" ;;
    *) need="$need a compiler of C++17" ;; esac
    fail "$need, and $cxx says: $(echo "$says" | head -n 1)"
}

# one process a core, as far as memory (1.5 GB each) and a container allow
jobs() {
    {
        OMP_NUM_THREADS='' nproc
        awk '/^MemTotal/ {print int($2 / 1.5e6)}' /proc/meminfo
        awk '/^[0-9]/ {print int($1 / 1.5e9)}' /sys/fs/cgroup/memory.max
        awk '/^[0-9]/ {print int(($1 + $2 - 1) / $2)}' /sys/fs/cgroup/cpu.max
    } 2>/dev/null | sort -n | sed 's/^0$/1/; q'
}

build_mmcv() (
    parts=$(mktemp -d "$PWD/$wheels/XXXXXX")
    trap 'rm -rf "$parts"' EXIT INT TERM
    export MMDIST_HEADERS="$parts" MMDIST_CXX="${CXX:-c++}"
    export PATH="$venv/bin:$PWD/tools/setup:$PATH" CXX=precompiling-c++
    # half the time of the default flags
    export MMCV_WITH_OPS=1 CFLAGS='-g0 -O1' CXXFLAGS='-g0 -O1'
    # else mmcv's setup.py decides by whether torch sees a GPU
    export FORCE_CUDA=1
    case $wheels in *-cpu) export FORCE_CUDA=0 CUDA_VISIBLE_DEVICES= ;; esac
    pip wheel -v --no-deps --no-build-isolation "--no-binary=${mmcv%%=*}" \
        -w "$parts" "$mmcv" && mv "$parts"/*.whl "$wheels"
)

install_wheel() {
    find_wheel && pip install --no-deps --force-reinstall "$wheel" &&
        "$py" -c 'import sys, sysconfig, torch
sys.path.insert(0, sysconfig.get_path("platlib") + "/mmcv")
import _ext  # mmcv itself needs packages that come later
cuda = _ext.get_compiling_cuda_version() != "not available"
assert cuda or sys.argv[1].endswith("-cpu")' "$wheels"
}

install_mmcv() {
    sh tools/setup/cuda.sh "$venv" >/dev/null # why there is no CUDA
    if find_wheel; then
        install_wheel >>"$log" 2>&1 &&
            { echo "  mmcv from ${wheel##*/}" && return; }
        echo "  ${wheel##*/} is damaged or does not suit torch"
        rm "$wheel"
    fi
    check_compiler
    export MAX_JOBS="${MAX_JOBS:-$(jobs)}"
    run "building $mmcv, for which there is no ready wheel, on $MAX_JOBS \
core(s): about $((1 + 3 / MAX_JOBS)) min, longer with CUDA, once" build_mmcv
    run mmcv install_wheel
}

mkdir -p .cache
exec 9>.cache/lock # which pip keeps if this is killed
command -v flock >/dev/null || flock() { :; }
flock -n 9 || { echo 'Another make is setting up here; waiting for it.' && flock 9; }
remove="remove it (rm -rf '$name') to change."
[ ! -x "$py" ] || [ "$(version "$py")" = "$(version "$python")" ] ||
    fail "$name was made with Python $(version "$py"), not \
$(version "$python"): $remove"
other=$(cat "$venv/stack.txt" 2>/dev/null) || other=$stack
[ "$other" = "$stack" ] ||
    fail "$name holds the $other stack, not the $stack one: $remove"
[ "$(cat "$venv/state.txt" 2>/dev/null)" != "$(state)" ] || exit 0

echo "Setting up $name with Python $(version "$python") and the $stack stack:
a few minutes (log: $log; interrupted, the same command goes on)"
: >"$log"
# the Python that it was made from may be gone
broken=$([ ! -L "$py" ] || [ -e "$py" ] || echo --clear)
run environment "$python" -m venv $broken "$venv"
echo "$stack" >"$venv/stack.txt"
# now, before gigabytes of torch are fetched in vain
[ -z "$mmcv" ] || find_wheel || check_compiler
run 'build tools' pip install -r requirements/build.txt
run 'torch, several GB unless pip is pointed to a CPU build (docs/en/install.md)' \
    pip install -r "requirements/${lists%% *}.txt"
[ -z "$mmcv" ] || install_mmcv
set -- -c requirements/constraints.txt
for list in $lists runtime demo analysis onnx dev; do
    set -- "$@" -r "requirements/$list.txt"; done
run packages pip install "$@"
# the metadata asks for opencv-python, which needs a system's libGL
"$py" -c 'import cv2' >>"$log" 2>&1 || run 'OpenCV headless, without libGL' \
    pip install --force-reinstall --no-deps "$("$py" -c '
import importlib.metadata as m
print("opencv-python-headless==" + m.version("opencv-python"))')"
# `pip install -e` puts the metadata where mim finds neither configs nor tools
run mmdist "$py" setup.py -q develop --no-deps
# MMEngine takes the GPU if there is one, with or without mmcv's operators for
# it: the Makefile reads gpu.env
run check "$py" -c 'import importlib, pathlib, sys
ops, *_ = [importlib.import_module(name) for name in sys.argv[1:]]
cuda = getattr(ops, "get_compiling_cuda_version", str)() != "not available"
pathlib.Path(sys.prefix, "gpu.env").write_text(
    "" if cuda else "export CUDA_VISIBLE_DEVICES=\n")' $modules
state >"$venv/state.txt"
