#!/usr/bin/env bash
# lock.sh PYTHON OUT REQUIREMENT...: resolve in a fresh environment and write what came, by exact version.
set -euo pipefail
python=$1 out=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" -m venv "$scratch"
(cd "$here/.." && "$scratch/bin/pip" install -q "$@" setuptools wheel)
{
  echo "# Made by \`make lock\` for $("$python" --version), from: $*. Installed with --no-deps."
  if [[ $* == *torch==* ]]; then
    echo "# torch runs on the CPU here: where pip would fetch a CUDA build of it, install a CPU build of this version first."
  fi
  # A local label such as +cpu names the build that this machine had: any build of the version will do.
  "$scratch/bin/pip" list --format=freeze | grep -vE '^(pip|dfa2-jax)==' | sed 's/+.*//'
} > "$scratch/lock.txt"
mv "$scratch/lock.txt" "$here/$out"
