#!/usr/bin/env bash
# On the GPU machine, in the root of the project's tree:
#   bash .gpu/gpu_check.sh [SECONDS=505] [--only env,sd ...]
# The wheels of fetch_wheels.sh lie in whl/ beside this file; results go to $OUT, else to
# ./gpu-check-out.
set -u
budget=${1:-505}
here=$(cd "$(dirname "$0")" && pwd)
out=${OUT:-$PWD/gpu-check-out}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
began=$(date +%s)
query() { nvidia-smi --query-gpu="$1" --format="$2" 2>/dev/null; }
query name,memory.total,driver_version,clocks.sm,temperature.gpu csv
if compgen -G "$here/whl/*.whl" >/dev/null; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$site" "$here"/whl/*.whl 2>&1 | tail -3
fi
export PYTHONPATH=$site
spent=$(($(date +%s) - began))
echo "wheels in place after $spent s"
# the tree: where this is called, else around this file, else a copy of src, tests and
# pyproject.toml beside it
root=$PWD
for place in "$PWD" "$here/.." "$here/../.." "$here/limner"; do
  [ -d "$place/src/limner" ] && root=$place && break
done
if [ ! -d "$root/src/limner" ]; then
  echo "no src/limner in $PWD, nor around $here; call this in the project's root" >&2
  exit 2
fi
more=("${@:2}")
[ -f "$here/whl/train_text_to_image.py" ] && more+=(--script "$here/whl/train_text_to_image.py")
python3 "$here/gpu_check.py" --root "$root" --out "$out" --budget $((budget - spent)) \
  ${more[@]+"${more[@]}"}
code=$?
query clocks.sm,temperature.gpu,memory.used csv,noheader
exit $code
