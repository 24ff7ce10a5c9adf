#!/usr/bin/env bash
# The record: what the presets take, and how fast they are, beside the goals and the limits of the hardware.
#
#   bash scripts/run_record.sh                      # the three workloads, some 30 minutes on an H100
#   bash scripts/run_record.sh model=t2v-1.3B       # one workload; arguments are overrides of the sweep
#   bash scripts/run_record.sh model=t2v-14B 'size=1280*720' vae_precision=bf16 optimization=none,lowest_memory
#   PYTORCH_ALLOC_CONF=expandable_segments:True bash scripts/run_record.sh model=t2v-1.3B
#
# On a machine with several GPUs, and little time: scripts/record_on_gpus.py.
# Each workload is a sweep of conf/experiment/record.yaml. Then scripts/record_table.py makes one table of all of them,
# prints it and leaves it beside the sweeps; it can be called with any sweeps' folders later. Results go to outputs/ in
# the folder of the call. $PYTHON names another Python than that of .venv. The exit code is that of the first sweep
# that was not well.
set -euo pipefail

source "$(dirname -- "${BASH_SOURCE[0]}")/python.sh"

output_root=outputs
has_model=
for argument in "$@"; do
  case "$argument" in
    output_root=*) output_root="${argument#*=}" ;;
    model=*) has_model=1 ;;
  esac
done

started="$(date +%Y-%m-%d_%H-%M-%S)-$$"
code=0
number=0
folders=()
sweep() {
  local folder="$output_root/record/$started-$((++number))"
  "$python" -m wan_sweep +experiment=record "hydra.run.dir=$folder" "$@" || code=$((code ? code : $?))
  if [[ -f "$folder/results.csv" ]]; then  # not where the arguments were refused
    folders+=("$folder")
  fi
}

if [[ "$has_model" ]]; then
  sweep "$@"
else
  sweep model=t2v-1.3B 'size=832*480' "$@"
  sweep model=t2v-14B 'size=832*480' "$@"
  sweep model=t2v-14B 'size=1280*720' "$@"
fi

if ((${#folders[@]})); then
  "$python" "$root/scripts/record_table.py" "${folders[@]}" --output "$output_root/record/$started.md"
fi
exit "$code"
