#!/usr/bin/env bash
# Prepare, train, sample and score, each where it is not done yet. Called again it goes on where it stopped.
#
#     bash run_all.sh                                 # the embedded data set, a few minutes on a laptop
#     ROOT=faces.zip bash run_all.sh folder           # your images: a folder, .zip or .tar(.gz)
#     bash run_all.sh mnist --epochs 10               # what follows the recipe goes to train.py
#     bash run_all.sh tests                           # set up and run the tests
#
# Environment: PYTHON (an interpreter that has the packages), ROOT (where the source's files are), DATA and RUN (where
# the arrays and the run go). Exit status: 0 finished, 2 a mistake in the call, 75 interrupted or in use: call again.
set -euo pipefail
here=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}

recipe=${1:-shapes}
shift || true
prepare=() train=() count=2048 real=()
case $recipe in
    shapes)     prepare=(shapes --size 32 --num 10000)
                train=(--width 64 --width-d 32 --extra-convs 1 --norm-d none --loss relativistic --r1 0.05 --r2 0.05
                       --lr-g 5e-4 --lr-d 5e-4 --beta1 0 --beta2 0.99 --schedule cosine --lr-final 0.1 --epochs 24)
                real=(--num-real 2048) ;;
    mnist)      prepare=(mnist --size 28)
                train=(--batch-size 64 --epochs 25)
                real=(--num-real 2048) ;;
    mnist-128)  prepare=(mnist --size 28)
                train=(--batch-size 128 --epochs 25)
                real=(--num-real 2048) ;;
    anime64)    prepare=(folder --size 64)
                train=(--arch upsample --batch-size 800 --epochs 100 --real-label 0.9 --fake-label 0.1
                       --lr-g 2e-4 --lr-d 2e-4 --schedule cosine --lr-final 0.05 --flip)
                count=10000 ;;
    celeba64)   prepare=(celeba --size 64 --crop 178)
                train=(--batch-size 128 --epochs 200 --flip)
                count=50000 ;;
    folder)     prepare=(folder --size 64)
                train=(--batch-size 64 --epochs 200 --flip --save-every 500)
                real=(--num-real 2048) ;;
    tests)      ;;
    *)          echo "run_all.sh: $recipe is not a recipe: shapes, mnist, mnist-128, anime64, celeba64, folder (or tests)" >&2
                exit 2 ;;
esac
data=${DATA:-data/${recipe%-*}} run=${RUN:-runs/$recipe}
case ${prepare[0]-} in
    folder)     [ -n "${ROOT-}" ] || { echo "run_all.sh: ROOT is missing: ROOT=faces.zip bash run_all.sh $recipe" >&2; exit 2; } ;;
esac
[ -z "${ROOT-}" ] || prepare+=(--root "$ROOT")
call="$recipe ${prepare[*]-} $*"

if [ -f "$run/done" ] && [ "$(cat "$run/done")" = "$call" ] && [ "$run/done" -nt "$run/generator.pt" ]; then
    echo "$run is finished: report $run/report.html, pictures $run/images; nothing to do"
    exit 0
fi

# The packages: in PYTHON, in the python3 at hand, or in .venv, which is made here.
has='import importlib.util as u, sys
sys.exit(any(u.find_spec(p) is None for p in "torch torchvision numpy PIL pytorch_fid tqdm matplotlib pytest".split()))'
if [ -n "${PYTHON-}" ]; then
    python=$PYTHON
    "$python" -c "$has" || { echo "run_all.sh: PYTHON=$PYTHON lacks packages: $PYTHON -m pip install -r requirements.txt" >&2; exit 2; }
elif [ -f "$here/.venv/complete" ]; then
    python=$here/.venv/bin/python
elif python3 -c "$has" 2>/dev/null; then
    python=python3
else
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "run_all.sh: needs Python 3.11 or later as python3, or one named by PYTHON=" >&2; exit 2; }
    echo "installing the packages of requirements.txt into .venv (once)"
    python3 -m venv "$here/.venv"
    "$here/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
    touch "$here/.venv/complete"
    python=$here/.venv/bin/python
fi
if [ "$recipe" = tests ]; then
    cd "$here"
    exec "$python" -m pytest tests "$@"
fi

mkdir -p "$run"
exec 9>>"$run/run_all.lock"
"$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null || {
    echo "run_all.sh: $run is in use by $(tail -n 1 "$run/run_all.lock")" >&2
    exit 75
}
echo "run_all.sh, process $$ on $(uname -n) since $(date '+%Y-%m-%d %H:%M:%S')" >"$run/run_all.lock"

# Signals go to the stage that runs: train.py saves and leaves, the others drop what is half done.
child='' stopped=''
trap 'stopped=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' INT TERM USR1
stage() {
    local status=0
    [ -z "$stopped" ] || exit 75
    "$@" & child=$!
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do status=0; wait "$child" || status=$?; done
    child=''
    [ -z "$stopped" ] || { echo "run_all.sh: interrupted; the same command goes on" >&2; exit 75; }
    return "$status"
}

stage "$python" "$here/prepare_data.py" "${prepare[@]}" --out "$data"
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
launch=("$python")
[ "$gpus" -lt 2 ] || launch=("$python" -m torch.distributed.run --standalone --nproc_per_node="$gpus")
stage "${launch[@]}" "$here/train.py" --data "$data" --out "$run" "${train[@]}" "$@"
stage "$python" "$here/sample.py" --run "$run" --num "$count" --grid --interpolate 8
stage "$python" "$here/evaluate.py" --run "$run" ${real[@]+"${real[@]}"}
echo "$call" >"$run/done"
