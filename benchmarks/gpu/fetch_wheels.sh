#!/usr/bin/env bash
# What a GPU machine without network lacks, as wheels for its Python 3.12 on x86-64, and diffusers'
# own script. Run where there is a network:
#   HAVE=PAGE bash fetch_wheels.sh [FOLDER=.gpu/whl] [DIFFUSERS_CHECKOUT]
# PAGE is a text file with a line "Packages: a, b, c." of what that machine has. Versions are those
# of constraints.txt where it has them. Ends with an error if a need is unmet or the sum is over
# 60 MiB.
set -euo pipefail
to=${1:-.gpu/whl} checkout=${2:-}
kinds=${HAVE:-packages.md}
mkdir -p "$to"
rm -f "$to"/*.whl
want=(diffusers==0.42.1 importlib_metadata==10.2.0 pyvips-binary==8.18.7 cffi==2.1.1
  pycparser==3.12 simplejpeg==1.9.0 ImageHash==4.3.2 PyWavelets==1.9.0 datasets==5.2.0
  dill==0.4.1 multiprocess==0.70.19 bitsandbytes==0.50.2)
platforms=()
for n in 2_39 2_38 2_35 2_34 2_31 2_28 2_27 2_26 2_24 2_17; do
  platforms+=(--platform "manylinux_${n}_x86_64")
done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
for one in "${want[@]}"; do
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp "${platforms[@]}" -d "$to" "$one" 2>&1 |
    grep -v "^WARNING: Location" >&2 || true
done
# pyvips 3 has no wheel in the registry; built from its source it is pure Python (py3-none-any),
# and works with pyvips-binary
python3 -m pip wheel -q --no-deps -w "$to" pyvips==3.2.0 2>&1 |
  grep -v "^WARNING: Location" >&2 || true
python3 - "$to" "$kinds" <<'P'
import email
import pathlib
import re
import sys
import zipfile

folder, kinds = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
CARRIED = ("libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so")
WANTED = {
    "diffusers", "importlib-metadata", "pyvips", "pyvips-binary", "cffi", "pycparser", "simplejpeg",
    "imagehash", "pywavelets", "datasets", "dill", "multiprocess", "bitsandbytes",
}


def normalize(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def cut(path):
    """bitsandbytes has a library for each CUDA: only the one for CUDA 13.0 goes along."""
    small = path.with_suffix(".part")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            name = item.filename.rsplit("/", 1)[-1]
            if name.startswith("libbitsandbytes_") and name not in CARRIED:
                continue
            text = old.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                kept = [
                    line for line in text.splitlines()
                    if b"libbitsandbytes_" not in line or b"cuda130" in line or b"_cpu.so" in line
                ]
                text = b"\n".join(kept) + b"\n"
            new.writestr(item.filename, text)
    small.replace(path)


def read_metadata(path):
    if not re.search(r"(py3|py2\.py3|cp312|cp3\d-abi3|py312)-", path.name):
        sys.exit(f"{path.name} is not for Python 3.12")
    with zipfile.ZipFile(path) as z:
        name = next(n for n in z.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(z.read(name))


for path in folder.glob("bitsandbytes-*.whl"):
    cut(path)
there = set()
if kinds.exists():
    line = re.search(r"Packages: (.*?)\.\s*$", kinds.read_text(), re.M | re.S)
    there = set(map(normalize, line.group(1).replace("\n", " ").split(", ")))
have, needs, total = {}, [], 0
for path in sorted(folder.glob("*.whl")):
    total += path.stat().st_size
    meta = read_metadata(path)
    have[normalize(meta["Name"])] = meta["Version"]
    for need in meta.get_all("Requires-Dist") or []:
        mark = need.partition(";")[2]
        if "extra" in mark or "win32" in mark or "python_version <" in mark:
            continue
        name = re.match(r"[A-Za-z0-9_.-]+", need).group()
        needs.append((normalize(name), meta["Name"], need))
if missing := WANTED - have.keys():
    sys.exit(f"not downloaded: {', '.join(sorted(missing))}")
known = have.keys() | there
if there and (unmet := [f"{who} needs {text}" for name, who, text in needs if name not in known]):
    sys.exit("unmet: " + "; ".join(unmet))
for name, version in sorted(have.items()):
    print(f"{name:20} {version}")
checked = "every need is carried or already there"
unchecked = f"{kinds} was not found, so that needs were not checked"
print(f"{total / 2**20:.1f} MiB in {len(have)} wheels; {checked if there else unchecked}")
sys.exit(0 if total < 60 * 2**20 else "over 60 MiB")
P
if [ -n "$checkout" ]; then # diffusers' own script, for the comparison; never committed
  git -C "$checkout" show HEAD:examples/text_to_image/train_text_to_image.py \
    >"$to/train_text_to_image.py"
  ls -l "$to/train_text_to_image.py"
fi
