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
  "$scratch/bin/pip" list --format=freeze | grep -vE '^(pip|dfa2-jax)==' | sed 's/+cpu//'
} > "$here/$out"
