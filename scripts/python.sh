# What the scripts beside it share; to be sourced. Sets `root`, and `python` to $PYTHON, or that of .venv, or python3.
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  python="$root/.venv/bin/python"
  [[ -x "$python" ]] || python=python3
fi
# A checkout need not be installed.
export PYTHONPATH="$root:$root/Wan2.1${PYTHONPATH:+:$PYTHONPATH}"
