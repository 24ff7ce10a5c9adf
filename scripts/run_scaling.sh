#!/usr/bin/env bash
# What every further GPU brings: all splits that this machine can do, one after the other, and one table of them.
#
#   bash scripts/run_scaling.sh                                # some 10 minutes on two H100
#   WITHIN=540 PACK=scaling.tar.gz bash scripts/run_scaling.sh # stops in time, and packs records and table into one file
#   bash scripts/run_scaling.sh trace=true                     # with the share of collectives; another run for each job
#
# First T2V-14B at 1280*720 and T2V-1.3B at 832*480, each on one GPU and in every split (conf/experiment/scaling.yaml);
# then T2V-14B with weights streamed from the hosts, of which each process keeps its share; then T2V-1.3B once more, to
# see whether two runs are equal to the bit; then T2V-14B with all that saves memory. What is done already in this
# output_root is taken over, so the same command goes on where it was stopped. After each sweep the table is made from
# what is there; scripts/scaling_table.py makes it later, too. Arguments are overrides of all sweeps, such as
# parallel=single,ulysses2. Models to run stand in MODELS, such as MODELS=t2v-1.3B. $PYTHON names another Python than
# that of .venv. The exit code is that of the first sweep that was not well.
set -euo pipefail

source "$(dirname -- "${BASH_SOURCE[0]}")/python.sh"

output_root=outputs
streamed=(parallel=single,ulysses2,ulysses4,ulysses8)
for argument in "$@"; do
  case "$argument" in
    output_root=*) output_root="${argument#*=}" ;;
    parallel=*) streamed=() ;;
  esac
done

started="$(date +%Y-%m-%d_%H-%M-%S)-$$"
code=0
number=0
folders=()
sweep() {
  local folder="$output_root/scaling/$started-$((++number))" limit=()
  if [[ "${WITHIN:-}" ]]; then
    ((SECONDS < WITHIN)) || return 0
    limit=(timeout --kill-after=20 "$((WITHIN - SECONDS))")
  fi
  "${limit[@]}" "$python" -m wan_sweep +experiment=scaling "hydra.run.dir=$folder" "$@" || code=$((code ? code : $?))
  if [[ -d "$folder" ]]; then  # not where the arguments were refused
    folders+=("$folder")
    "$python" "$root/scripts/scaling_table.py" "${folders[@]}" --output "$output_root/scaling/$started.md" \
      ${PACK:+--pack "$PACK"}
  fi
}

models=(${MODELS:-t2v-14B t2v-1.3B})
for model in "${models[@]}"; do
  sweep "model=$model" "$@"
done
sweep "model=${models[0]}" load_strategy=full,part "${streamed[@]}" "$@"
sweep "model=${models[-1]}" repeats=2 "$@"
sweep "model=${models[0]}" optimization=none,lowest_memory "${streamed[@]}" "$@"
exit "$code"
