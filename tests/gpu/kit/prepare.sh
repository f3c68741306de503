#!/usr/bin/env bash
# Make .gpu/: what a GPU machine without network lacks (wheels, prepared data), and the command that runs there.
#
#   make environment && bash tests/gpu/kit/prepare.sh [FOLDER]      about a minute; needs a package registry
#
# FOLDER: prepared tokens for the comparisons of experiments/gpu, which are carried packed.
#
# VENV (.venv) is the environment whose versions are carried.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
carried=.gpu
python=${VENV:-.venv}/bin/python
[ -x "$python" ] || { echo "prepare.sh: there is no $python. Run make environment first." >&2; exit 1; }
wheels=$carried/wheels
mkdir -p "$wheels" "$carried/data"

platforms=()
for tag in manylinux_2_{17,24,27,28,31,34,35,39}_x86_64 manylinux2014_x86_64 manylinux1_x86_64; do platforms+=(--platform "$tag"); done

# fetch NAME==VERSION: its wheel for the GPU machine's Python 3.12, unless it is there already.
fetch() {
    local name=${1%%==*} version=${1##*==}
    local stem=${name//-/_}
    if compgen -G "$wheels/$stem-$version-*.whl" >/dev/null; then return; fi
    rm -f "$wheels/$stem"-*.whl # of another version: two stop pip
    if [ "$name" = deepspeed ]; then # published as source only; without compiled operators its wheel is pure Python
        DS_BUILD_OPS=0 CUDA_VISIBLE_DEVICES='' "$python" -m pip wheel -q --no-deps -w "$wheels" "$1"
    else
        "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
            -d "$wheels" "$1"
    fi
}

missing=$("$python" -m tests.gpu.kit.carried missing)
for package in $missing; do fetch "$package"; done

[ -e "$carried/data/docs/manifest.json" ] || "$python" tools/prepare_data.py --embedded --output "$carried/data/docs" >/dev/null

if [ $# -gt 0 ]; then
    rm -rf "$carried/data/small"
    mkdir -p "$carried/data/small"
    find "$1" -maxdepth 1 -type f ! -name train.bin -exec cp {} "$carried/data/small/" \;
    bzip2 -9 -c "$1/train.bin" >"$carried/data/small/train.bin.bz2"
fi

cat >"$carried/on_device.sh" <<'STUB'
#!/usr/bin/env bash
# The command on the GPU machine; the script itself is the repository's.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../tests/gpu/kit/on_device.sh" "$@"
STUB

"$python" -m tests.gpu.kit.carried check "$carried"
