#!/usr/bin/env bash
# Every check and measurement that needs a GPU, for a machine without network that has python3 with torch already.
#
#   benchmarks/gpu.sh --wheels FOLDER [full]     where a package index is: fetch what the GPU machine lacks
#   WHEELS=FOLDER OUT=results benchmarks/gpu.sh [PART...]    there; parts: info tests share train nnunet (all unless told)
#   benchmarks/gpu.sh --dry-run [PART...]        without a GPU: every part in its smallest form, to try this script
#
# Wheels are for TAG (cp312) on Linux; the versions are those of constraints.txt, torch and numpy the machine's own. The
# small set (73 MB; 31 MB with SKIP="scipy pillow", for a machine that has these) is what training, prediction and
# evaluation of NIfTI need with --no-track; `full` is all that medseg[test] needs. They are installed into SITE beside the
# machine's packages, which stay as they are: a venv made by the python of a venv would not see that one's torch.
#
#   DATA     folder with imagesTr and labelsTr of hippocampus (default ../shared/data/hippocampus)
#   OUT      where results go (default gpu-results); small files only
#   WORK     where runs go (default a temporary folder)
#   BUDGET   of the 5-fold training (default 8m);  FOLDS (default 5);  SEED (default 0)
#   STEPS    of the measurement of the share of data (default 200)
#   PYTHON   (default python3)
#   PEERS    site-packages with nnunetv2, if it is not in PYTHON's own; where it cannot be imported, the part says so
#
# Nothing here was run on a GPU yet: the parts were tried with --dry-run on a processor.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
TAG=${TAG:-312}
SKIP=${SKIP:-none}
SMALL=(
  annotated-doc annotated-types click contourpy cycler einops execnet filelock fonttools hypothesis iniconfig jinja2
  kiwisolver markdown-it-py markupsafe matplotlib mdurl monai nibabel packaging pillow pluggy psutil pydantic
  pydantic-core pydicom pygments pyparsing pytest python-dateutil pyyaml rich safetensors scipy shellingham six
  sortedcontainers typer typing-extensions typing-inspection
)

say() { printf '\n== %s\n' "$*"; }

# Fetch wheels named in constraints.txt, each alone: what they need stands in the list, and torch must not be among them.
fetch() {
  local folder=$1 kind=${2:-small} platforms=() lines=() pattern='.*'
  mkdir -p "$folder"
  for version in manylinux1 manylinux2010 manylinux2014 manylinux_2_{12,17,24,26,27,28,31,34,35,39}; do
    platforms+=(--platform "${version}_x86_64")
  done
  [ "$kind" != small ] || pattern=$(IFS='|' && echo "(${SMALL[*]})")
  mapfile -t lines < <(grep -Ev '^(#|torch=|triton=|numpy=|nvidia-)' "$root/constraints.txt" |
    grep -E "^$pattern==" | grep -Ev "^(${SKIP// /|})==")
  "$PYTHON" -m pip download --disable-pip-version-check -q --no-deps --only-binary=:all: --python-version "$TAG" \
    --implementation cp --abi "cp$TAG" --abi abi3 --abi none "${platforms[@]}" -d "$folder" "${lines[@]}"
  local built=yes
  [ -e "$root/build" ] || built=''
  "$PYTHON" -m pip wheel --disable-pip-version-check -q --no-deps --no-build-isolation -w "$folder" "$root"
  [ -n "$built" ] || rm -rf "$root/build"
  du -sh "$folder"
}

# Put the wheels beside the machine's packages; the code itself is that of this working tree.
install() {
  export PYTHONPATH="$root"
  if [ -n "${WHEELS:-}" ]; then
    SITE=${SITE:-$WORK/site}
    [ -d "$SITE" ] || "$PYTHON" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile \
      --no-cache-dir --target "$SITE" "$WHEELS"/*.whl
    export PYTHONPATH="$root:$SITE"
  fi
  [ -z "${PEERS:-}" ] || export PYTHONPATH="$PYTHONPATH:$PEERS"
}

medseg() { "$PYTHON" -m medseg "$@"; }

# Sample the GPU every second while a command runs: FILE gets "utilisation %, memory MiB, power W" a line.
sampled() {
  local file=$1 sampler=''
  shift
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=utilization.gpu,memory.used,power.draw --format=csv,noheader,nounits -l 1 >"$file" &
    sampler=$!
  fi
  local code=0
  "$@" || code=$?
  [ -z "$sampler" ] || { kill "$sampler"; wait "$sampler" 2>/dev/null || true; }
  return $code
}

utilisation() {
  [ -s "$1" ] || { echo '{"utilisation": null}'; return; }
  sort -t, -k1 -n "$1" | awk -F', *' '{ u[NR] = $1; s += $1; if ($2 > m) m = $2; p += $3 }
    END { printf "{\"samples\": %d, \"utilisation_mean\": %.1f, \"utilisation_median\": %d, \"memory_mib_max\": %d, \"power_w_mean\": %.0f}\n", NR, s / NR, u[int((NR + 1) / 2)], m, p / NR }'
}

part_info() {
  command -v nvidia-smi >/dev/null && nvidia-smi | tee "$OUT/nvidia-smi.txt"
  medseg info | tee "$OUT/info.txt"
  "$PYTHON" -m compileall -q "$root/medseg" && echo "all files compile under $("$PYTHON" --version)"
}

part_tests() {
  local strict=(--no-skips)
  [ -z "$DRY" ] || strict=()
  # The limit is read once by cuBLAS, so it must be there before torch first uses it.
  (cd "$root" && CUBLAS_WORKSPACE_CONFIG=:4096:8 "$PYTHON" -m pytest -q -m gpu tests/gpu "${strict[@]}") |
    tee "$OUT/tests.txt"
}

part_share() {
  local more=()
  [ -z "$DRY" ] || more=(--quick)
  "$PYTHON" "$root/benchmarks/data_share.py" --data "$DATA" --steps "$STEPS" "${more[@]}" | tee "$OUT/data_share.txt"
}

part_train() {
  local length=(--budget "$BUDGET") run="$WORK/run"
  [ -z "$DRY" ] || length=(--steps 2 --set batch_size=2 --set validations=1 --set test_mirroring=false
    --set "network.options.features=[4,8,8,8]")
  local began=$SECONDS
  sampled "$OUT/gpu_samples.csv" medseg train "$DATA" --out "$run" --folds "$FOLDS" --seed "$SEED" --no-track \
    "${length[@]}" 2>&1 | tee "$OUT/train.txt"
  echo "{\"folds\": $FOLDS, \"minutes\": $(((SECONDS - began) / 60)), \"seconds\": $((SECONDS - began))}" |
    tee "$OUT/train.json"
  utilisation "$OUT/gpu_samples.csv" | tee "$OUT/utilisation.json"
  cp "$run/7_report/summary.csv" "$run/3_plan.yaml" "$run/manifest.json" "$OUT/"
  cat "$OUT/summary.csv"
}

# Samples a second of nnU-Net's own benchmark trainer (five epochs of 250 steps) on the same card.
part_nnunet() {
  if ! "$PYTHON" -c 'import nnunetv2' 2>/dev/null; then
    echo 'nnunetv2 cannot be imported here: no comparison (bring its wheels and set PEERS)' | tee "$OUT/nnunet.txt"
    return 0
  fi
  export nnUNet_raw=$WORK/raw nnUNet_preprocessed=$WORK/preprocessed nnUNet_results=$WORK/results
  local name=Dataset004_Hippocampus
  mkdir -p "$nnUNet_raw/$name/imagesTr"
  "$PYTHON" - "$DATA" "$nnUNet_raw/$name" <<'PYTHON'
import json, shutil, sys
from pathlib import Path

source, target = map(Path, sys.argv[1:])
images = sorted(p for p in (source / "imagesTr").glob("*.nii.gz") if not p.name.startswith("."))
for file in images:
    shutil.copy(file, target / "imagesTr" / file.name.replace(".nii.gz", "_0000.nii.gz"))
shutil.copytree(source / "labelsTr", target / "labelsTr", dirs_exist_ok=True)
labels = {"background": 0, "Anterior": 1, "Posterior": 2}
facts = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": len(images), "file_ending": ".nii.gz"}
(target / "dataset.json").write_text(json.dumps(facts))
PYTHON
  local entry='from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import plan_and_preprocess_entry as f; f()'
  "$PYTHON" -c "$entry" -d 4 -c 3d_fullres -np 8 >"$OUT/nnunet.txt" 2>&1
  [ -z "$DRY" ] || { echo 'dry run: nnU-Net was prepared and is not trained'; return 0; }
  entry='from nnunetv2.run.run_training import run_training_entry as f; f()'
  sampled "$OUT/nnunet_samples.csv" "$PYTHON" -c "$entry" 4 3d_fullres 0 -tr nnUNetTrainerBenchmark_5epochs \
    >>"$OUT/nnunet.txt" 2>&1
  "$PYTHON" - "$nnUNet_results/$name" "$nnUNet_preprocessed/$name/nnUNetPlans.json" <<'PYTHON' | tee "$OUT/nnunet.json"
import json, sys
from pathlib import Path

found = json.loads(next(Path(sys.argv[1]).rglob("benchmark_result.json")).read_text())
batch = json.loads(Path(sys.argv[2]).read_text())["configurations"]["3d_fullres"]
row = next(iter(found.values()))
seconds = row["fastest_epoch"]
told = {"epoch_s": seconds, "batch_size": batch["batch_size"], "patch_size": batch["patch_size"]}
rate = round(250 * batch["batch_size"] / seconds, 2)
print(json.dumps({**told, "samples_per_second": rate, "note": "an epoch: 250 steps that learn, 50 that validate"}))
PYTHON
  utilisation "$OUT/nnunet_samples.csv" | tee "$OUT/nnunet_utilisation.json"
}

DRY=''
case "${1:-}" in
  --wheels)
    fetch "${2:?usage: $0 --wheels FOLDER [full]}" "${3:-small}"
    exit
    ;;
  --dry-run)
    DRY=yes
    shift
    ;;
  -*)
    sed -n '2,/^set -/p' "$0" | sed '$d; s/^# \{0,1\}//'
    exit 2
    ;;
esac
DATA=${DATA:-$root/../shared/data/hippocampus} OUT=${OUT:-gpu-results} BUDGET=${BUDGET:-8m} SEED=${SEED:-0}
STEPS=${STEPS:-200} FOLDS=${FOLDS:-5}
[ -z "$DRY" ] || FOLDS=2
[ -d "$DATA/imagesTr" ] || { echo "$DATA: no imagesTr in it; set DATA" >&2; exit 2; }
mkdir -p "$OUT"
DATA=$(cd "$DATA" && pwd) OUT=$(cd "$OUT" && pwd)
if [ -z "${WORK:-}" ]; then
  WORK=$(mktemp -d)
  trap 'rm -rf "$WORK"' EXIT
fi
install
if [ -z "$DRY" ]; then
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "$PYTHON sees no GPU; --dry-run tries this script without one" >&2
    exit 2
  }
fi
failed=()
for part in "${@:-info tests share train nnunet}"; do
  for name in $part; do # the default is one word of several
    declare -F "part_$name" >/dev/null || { echo "no part $name; there are: info tests share train nnunet" >&2; exit 2; }
    say "$name"
    # Not "if part": a failure inside must end the part, and the others still run.
    set +e
    (set -e; "part_$name")
    code=$?
    set -e
    [ "$code" -eq 0 ] || { failed+=("$name"); echo "$name FAILED ($code)"; }
  done
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
say "results in $OUT"
