#!/usr/bin/env bash
# The first 14 minutes on a GPU: what is right, then what is fast, then what a run takes. Each part
# has a time limit, so that one that hangs does not stop the others, and writes its output to a file
# in the folder given (default: kernels/results/first). A part that reaches its limit is interrupted
# as by Ctrl-C: pytest still prints the failures so far, and train.py saves.
#
#     bash kernels/first_run.sh results
set -u
cd "$(dirname "$0")/.."
out=${1:-kernels/results/first}
mkdir -p "$out"
out=$(cd "$out" && pwd)

part() {        # part NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  timeout --signal=INT --kill-after=20 "$limit" "$@" > "$out/$name.txt" 2>&1
  echo "$name: exit code $?, $((SECONDS - start)) of $limit s: $*" | tee -a "$out/summary.txt"
}

versions="import torch, triton; print(torch.__version__, triton.__version__)"
{ nvidia-smi; python -c "$versions"; } > "$out/machine.txt" 2>&1
part self-check 60 python -c "import kernels; print(kernels.load('triton'))"
# without the short runs, which compile 34 graphs
part tests 120 python -m pytest -m gpu -q -k "not short_run"
part bench 180 python -m kernels.bench --model sd3-medium --batch 2 --rounds 10 \
  --out "$out/bench.csv"
part sd3-medium 120 python train.py --preset sd3-medium --bench-steps 5
part tiny 150 python train.py --preset tiny --name "first-$$" --n 512
part sample 40 python sample.py --run "runs/first-$$" --prompt "large red circle left on black" \
  --steps 4 --out "$out/one.png"
part short-runs 100 python -m pytest -m gpu -q -k short_run
# last, because opt-in: a kernel that hangs or leaves the GPU unusable stops only this part
part gluon 60 python -m kernels.bench --kernel attention --model sd3-medium --batch 2 --rounds 10 \
  --gluon --out "$out/gluon.csv"
cat "$out/summary.txt"
