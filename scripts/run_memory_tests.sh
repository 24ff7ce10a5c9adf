#!/usr/bin/env bash
# The standard memory tests: checks the environment, runs the matrix of conf/experiment/memory_tests.yaml, and says
# where the report is. Arguments are overrides of the sweep:
#
#   bash scripts/run_memory_tests.sh model=t2v-1.3B sample_steps=3
#
# Results go to outputs/ in the folder of the call. $PYTHON names another Python than that of .venv. The exit code is 2
# if a check refuses, else that of the sweep.
set -euo pipefail

source "$(dirname -- "${BASH_SOURCE[0]}")/python.sh"

output_root=outputs
for argument in "$@"; do
  [[ "$argument" != output_root=* ]] || output_root="${argument#*=}"
done

"$python" -m wan_sweep.checks "$@"

# A name known beforehand, so that the report is found without reading along, which would take the terminal away.
started="$(date +%Y-%m-%d_%H-%M-%S)-$$"
code=0
"$python" -m wan_sweep +experiment=memory_tests "hydra.run.dir=\${output_root}/\${name}/$started" "$@" || code=$?

for report in "$output_root"/*/"$started"/report.{md,html}; do
  if [[ -f "$report" ]]; then
    echo "Report: $report"
  fi
done
exit "$code"
