#!/usr/bin/env bash
# Make the environment of the programs that `benchmarks/` compares medseg with: nnU-Net, TorchIO, MONAI.
#   scripts/install_peers.sh PREFIX [PYTHON]      (PYTHON 3.11, default python3.11)
# torch comes first and every later step is held to it: the peers then meet the same torch as medseg, and none of them
# replaces a CPU build by gigabytes of CUDA. Set PIP_FIND_LINKS or PIP_INDEX_URL to where the torch build is. On a
# machine without a package index, fill a folder elsewhere (`pip download -d WHEELS ...` of the same lines) and set
# PIP_NO_INDEX=1 PIP_FIND_LINKS=WHEELS. PREFIX/READY is written last, and only when every import worked.
set -euo pipefail

prefix=${1:?usage: $0 PREFIX [PYTHON]}
python=${2:-python3.11}
torch=2.13.0

peers='
nnunetv2==2.8.1
batchgeneratorsv2==0.3.6
torchio==1.2.1
monai==1.6.1
'

rm -f "$prefix/READY"
[ -x "$prefix/bin/python" ] || "$python" -m venv "$prefix"
pip() { "$prefix/bin/python" -m pip --disable-pip-version-check "$@"; }

pip install -q numpy "torch==$torch"
# With the local part of the version (2.13.0+cpu): otherwise another build of 2.13.0 would do.
build=$("$prefix/bin/python" -c 'from importlib.metadata import version; print(version("torch"))')
held=$(mktemp)
trap 'rm -f "$held"' EXIT
echo "torch==$build" >"$held"
# shellcheck disable=SC2086  # one word each
pip install -q --constraint "$held" $peers

"$prefix/bin/python" - "$build" <<'PYTHON'
import sys
from importlib.metadata import version

import batchgeneratorsv2.transforms.spatial.spatial
import monai.transforms
import nnunetv2.experiment_planning.plan_and_preprocess_entrypoints
import nnunetv2.training.nnUNetTrainer.nnUNetTrainer
import torch
import torchio

if torch.__version__ != sys.argv[1]:
    sys.exit(f"torch is {torch.__version__}, not {sys.argv[1]}: something replaced it")
names = ("torch", "nnunetv2", "batchgeneratorsv2", "torchio", "monai", "torchvision", "numpy", "scipy")
print(*(f"{name} {version(name)}" for name in names), sep="\n")
PYTHON
touch "$prefix/READY"
