#!/usr/bin/env bash
# Set up .venv from the exact locks. Run twice it does nothing twice: a stamp holds the locks' digest.
# Usage: requirements/install.sh cpu|cuda
set -euo pipefail
cd "$(dirname "$0")/.."
platform="${1:-cpu}"
python="${PYTHON:-python3}"
venv=.venv
stamp="$venv/.locks-$platform"
torch_cpu_index=https://download.pytorch.org/whl/cpu

case "$platform" in
  cpu) torch="torch==2.13.0+cpu"; locks=(requirements/cpu.txt requirements/cpu-engine.txt) ;;
  cuda) torch="torch===2.13.0"; locks=(requirements/cuda.txt requirements/cuda-kernels.txt) ;;
  *) echo "install.sh: expected cpu or cuda, found '$platform'" >&2; exit 2 ;;
esac

digest=$(cat "${locks[@]}" pyproject.toml requirements/install.sh | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$digest" ]; then
  exit 0
fi

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case "$version" in
  3.11|3.12) ;;
  *) echo "install.sh: expected Python 3.11 or 3.12, found $version; set PYTHON=python3.11" >&2; exit 2 ;;
esac

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

echo "setting up $venv ($platform); a few minutes the first time"
# === keeps a CPU build (2.13.0+cpu) that lies in the indexes off a CUDA machine.
if [ "$("$venv/bin/python" -c 'from importlib.metadata import version as v; print(v("torch"))' 2>/dev/null)" != "${torch##*=}" ]; then
  if ! refusal=$(pip install -q --no-deps "$torch" 2>&1); then
    if [ "$platform" != cpu ]; then
      printf '%s\ninstall.sh: the configured indexes do not give %s\n' "$refusal" "$torch" >&2
      exit 1
    fi
    echo "the configured indexes lack $torch: adding PyTorch's public CPU wheel index"
    if ! pip install -q --no-deps --extra-index-url "$torch_cpu_index" "$torch"; then
      printf 'without that index pip had said:\n%s\n' "$refusal" >&2
      echo "install.sh: neither the configured indexes nor $torch_cpu_index give $torch" >&2
      exit 1
    fi
  fi
fi
for lock in "${locks[@]}"; do
  case "$lock" in *-kernels.txt) build=--no-build-isolation ;; *) build= ;; esac
  pip install -q --no-deps $build -r "$lock"
done
pip install -q --no-deps --no-build-isolation -e .
"$venv/bin/python" -c "import torch, transformers, vllm, deepspeed, ray, mlflow" > /dev/null 2>&1 \
  || { echo "install.sh: the environment does not import; remove $venv and run again" >&2; exit 1; }
echo "$digest" > "$stamp"
