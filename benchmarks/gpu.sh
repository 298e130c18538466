#!/usr/bin/env bash
# Everything here that wants a GPU, in one command of some ten minutes: bash benchmarks/gpu.sh [FOLDER [PEERS [PART...]]]
# Results go to FOLDER (benchmarks/results/gpu). PEERS holds checkouts of DiT and fast-DiT, see train_step.py; PARTs are
# names below, all by default, in order of worth; their limits add up to less than 600 s. Where apex can be imported the
# step is measured with its FusedAdam, too. A part that fails or runs out of its time is named at the end and costs the
# others nothing.
set -uo pipefail
out=$(realpath -m "${1:-$(dirname "$0")/results/gpu}") peers=${2:+$(realpath "$2")} wanted=" ${*:3} "
cd "$(dirname "$0")/.." || exit
mkdir -p "$out"
python3 -c 'import torch; assert torch.cuda.is_available(), "no GPU: nothing is measured"' || exit 1
failed=() ran=
part() { # seconds, name, command
  local limit=$1 name=$2
  shift 2
  [[ $wanted == "  " || $wanted == *" $name "* ]] || return
  ran=yes
  timeout "$limit" python3 "$@" >"$out/$name.log" 2>&1 || failed+=("$name")
}
part 180 train_step-fp16 benchmarks/train_step.py --rounds 5 ${peers:+--peers "$peers"} --json "$out/train_step-fp16.json"
part 110 tests -m pytest -m gpu tests/training/test_step.py tests/training/test_muon.py tests/models
part 80 overhead benchmarks/overhead.py --blocks 4 --json "$out/overhead.json"
part 60 profile benchmarks/profile_step.py --json "$out/profile_step.json"
part 60 sampling benchmarks/sampling.py --json "$out/sampling.json"
part 50 checkpoint benchmarks/checkpoint.py --json "$out/checkpoint.json"
[[ $ran ]] || { echo "no such part:$wanted"; exit 1; }
if ((${#failed[@]})); then
  echo "failed or out of time: ${failed[*]} (their output is in $out/*.log)"
  exit 1
fi
