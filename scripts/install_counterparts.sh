#!/usr/bin/env bash
# Install, where missing, the real programs that `make test-system` tests against.
#   scripts/install_counterparts.sh PYTHON
# Debian and Ubuntu: apt installs the servers and validators (as root or through sudo), pip the rest into PYTHON's
# environment. On other systems install the commands in the table by hand; this script then finds them.
set -euo pipefail

python=${1:?usage: $0 PYTHON}

# command (or file) that shows it is there | apt package
counterparts='
Orthanc|orthanc
/usr/share/orthanc/plugins/libOrthancDicomWeb.so|orthanc-dicomweb
dcmdump|dcmtk
dciodvfy|dicom3tools
plastimatch|plastimatch
chromium|chromium
pg_ctlcluster|postgresql
munged|munge
slurmctld|slurmctld
slurmd|slurmd
sbatch|slurm-client
'

missing=()
while IFS='|' read -r sign package; do
  [ -z "$sign" ] && continue
  # Servers stand in sbin, which a user's PATH may lack.
  if [ ! -e "$sign" ] && ! PATH="$PATH:/usr/sbin:/sbin" command -v "$sign" >/dev/null; then
    missing+=("$package")
  fi
done <<<"$counterparts"

if [ ${#missing[@]} -gt 0 ]; then
  if ! command -v apt-get >/dev/null; then
    echo "missing: ${missing[*]} (Debian package names); no apt-get here, install them by hand" >&2
    exit 1
  fi
  as_root=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || { echo "run as root: apt-get install ${missing[*]}" >&2; exit 1; }
    as_root=(sudo)
  fi
  echo "installing with apt: ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
fi

"$python" -m pip --disable-pip-version-check install -qq dcmqi dcm2niix psycopg2-binary
