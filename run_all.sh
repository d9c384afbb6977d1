#!/usr/bin/env bash
#SBATCH --job-name=gan
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
# Prepare, train, sample and score, each where it is not done yet. Called again it goes on where it stopped.
#
#     bash run_all.sh                                 # drawn shapes and captions, about 15 minutes on 2 cores
#     ROOT=faces.zip bash run_all.sh folder           # your images: a folder, .zip or .tar(.gz)
#     bash run_all.sh mnist --epochs 10               # what follows the recipe goes to train.py
#     ROOT=faces.zip sbatch --gres=gpu:8 run_all.sh anime64   # a job, one node or more, requeued at its limit
#     */10 * * * * cd ~/gan && bash run_all.sh mnist >>cron.log 2>&1
#     bash run_all.sh tests                           # set up and run the tests
#     bash run_all.sh gpu-check                       # five minutes: does this GPU do as a CPU does, how fast
#
# Environment: NUM (images to draw and score: NUM=64 and --max-steps 100 try all of it out), PYTHON (an
# interpreter that has the packages), ROOT (where the source's files are), CAPTIONS
# (their captions' file), DATA and RUN (where the arrays and the run go). Status: 0 finished, 2 a mistake in
# the call, 75 interrupted or in use: call again, 1 anything else.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mistake() { echo "run_all.sh: $1" >&2; exit 2; }
[ -f "$here/train.py" ] || here=${SLURM_SUBMIT_DIR:-$here}  # SLURM runs a copy of this file
[ -f "$here/train.py" ] || mistake "train.py is not in $here: call sbatch in the folder where both are"
trap '' PIPE  # whoever read the output may leave: the run goes on
say() { echo "$@" 2>/dev/null || true; }

recipes() { sed -n 's/^    \([a-z0-9-]*\)).*/\1/p' "$here/run_all.sh" | xargs; }

recipe=${1:-shapes}
shift || true
for option in "$@"; do
    case $option in --data | --data=* | --out | --out=*)
        mistake "$option: all its steps take these folders from DATA= and RUN= before the command" ;;
    esac
done
prepare=() train=() count=2048 pictures=(--grid --interpolate 8) real=(--num-real 2048)
# what is common to the recipes for CPUs, and to those of Huang et al. 2024
small=(--arch sngan --width 16 --width-d 16 --loss relativistic --r1 0.01 --r2 0.01 --penalty-interval 4
       --lr-g 2e-3:0 --lr-d 1e-3:0 --beta1 0 --beta2 0.99 --ema-images 20000)
r3gan=(--arch resnet --blocks 2 --width-max 768 --latent-dim 64
       --loss relativistic --beta1 0 --beta2 0.9:0.99)
case $recipe in
    shapes)     prepare=(shapes --size 32 --num 10000)
                train=("${small[@]}" --condition text --mismatch-weight 0.5 --detail 10 --batch-size 32
                       --penalty-interval 8 --epochs 30) ;;
    captioned)  prepare=(folder --size 32 --holdout 0.05)
                train=("${small[@]}" --condition text --mismatch-weight 0.5 --batch-size 32 --epochs 180
                       --r1 0.3 --r2 0.3) ;;
    stacked-mnist)
                prepare=(stacked-mnist --size 32)
                train=("${small[@]}" --batch-size 64 --epochs 13)
                count=25600 ;;
    mnist)      prepare=(mnist --size 28)
                train=(--batch-size 64 --epochs 25) ;;
    fashion-mnist)
                prepare=(fashion-mnist --size 32)
                train=("${small[@]}" --batch-size 32 --penalty-interval 8 --epochs 5 --r1 0.1 --r2 0.1) ;;
    mnist-128)  prepare=(mnist --size 28)
                train=(--batch-size 128 --epochs 25) ;;
    anime64)    prepare=(folder --size 64)
                train=(--arch upsample --batch-size 800 --epochs 100 --real-label 0.9 --fake-label 0.1
                       --lr-g 2e-4:1e-5 --lr-d 2e-4:1e-5 --flip)
                count=10000 real=() ;;
    celeba64)   prepare=(celeba --size 64 --crop 178)
                train=(--batch-size 128 --epochs 200 --flip)
                count=50000 real=() ;;
    mnist-deep) prepare=(mnist --size 28)
                train=(--arch upsample --extra-convs 2 --batch-size 64 --epochs 25) ;;
    mnist-rmsprop)
                prepare=(mnist --size 28)
                train=(--optimizer rmsprop --beta2 0.9 --lr-g 1e-4 --lr-d 1e-4 --batch-size 64 --epochs 25) ;;
    celeba64-r3)
                prepare=(celeba --size 64 --crop 178)
                train=("${r3gan[@]}" --width 384 --batch-size 256 --epochs 500 --flip --r1 2:0.2 --r2 2:0.2
                       --lr-g 2e-4:5e-5 --lr-d 2e-4:5e-5 --ema-images 0:500000 --diffaug 0:0.3 --burn-in 20e6)
                count=50000 real=() ;;
    cifar10-r3) prepare=(cifar10 --size 32)
                train=("${r3gan[@]}" --width 768 --batch-size 512 --epochs 5000 --flip
                       --r1 0.05:0.005 --r2 0.05:0.005 --lr-g 2e-4:5e-5 --lr-d 2e-4:5e-5
                       --ema-images 0:5e6 --diffaug 0:0.55 --burn-in 20e6 --condition label)
                count=50000 real=() ;;
    stacked-mnist-r3)
                prepare=(stacked-mnist --size 32)
                train=("${r3gan[@]}" --width 768 --batch-size 512 --epochs 167 --r1 1:0.1 --r2 1:0.1
                       --ema-images 0:500000 --burn-in 2e6)
                count=25600 real=() ;;
    coco32)     prepare=(coco --size 32)
                train=(--condition text --mismatch-weight 0.5 --batch-size 512 --epochs 100 --flip
                       --log-every 50)
                count=10000 real=() ;;
    coco64)     prepare=(coco --size 64)
                train=(--condition text --mismatch-weight 0.5 --attention --cond-augment 1
                       --feature-matching 0.01 --lr-g 2e-4:0 --lr-d 1e-4:0 --clip-grad 1
                       --schedule cosine-restarts --batch-size 128 --epochs 40 --flip)
                count=10000 real=() ;;
    captions)   prepare=(text --level word)
                train=(--arch seq --loss relativistic --width 64 --batch-size 64 --epochs 8
                       --pretrain-epochs 4 --lr-g 1e-4 --lr-d 1e-4 --clip-grad 5
                       --temperature 2:1.7 --schedule linear)
                pictures=() real=() ;;
    folder)     prepare=(folder --size 64)
                train=("${small[@]}" --batch-size 32 --epochs 80 --flip --r1 1 --r2 1 --diffaug 0.7
                       --lr-g 2e-3 --lr-d 1e-3) ;;
    tests | gpu-check) ;;
    -h | --help)
                say "$(sed -n '/^# Prepare/,/^set/s/^# \{0,1\}//p' "$here/run_all.sh")"
                say $'\nRecipes: '"$(recipes)"
                exit ;;
    -*)         mistake "$recipe comes after the recipe: bash run_all.sh shapes $recipe …" ;;
    *)          mistake "$recipe is not a recipe: $(recipes)" ;;
esac
set=$recipe  # variants of a recipe share their data
for variant in 128 deep rmsprop r3; do set=${set%-"$variant"}; done
data=${DATA:-data/$set} run=${RUN:-runs/$recipe}
case " $* " in *" --help "* | *" -h "*) prepare=() ;; esac  # train.py's, whatever ROOT is
case ${prepare[0]-} in folder | coco)
    [ -n "${ROOT-}" ] || mistake "ROOT is missing, the images: ROOT=faces.zip bash run_all.sh $recipe"
    [ -z "${CAPTIONS-}" ] || prepare+=(--captions "$CAPTIONS") ;;
esac
[ "${prepare[0]-}" != coco ] || [ -n "${CAPTIONS-}" ] ||
    mistake "CAPTIONS is missing: CAPTIONS=captions_train2017.json ROOT=train2017 bash run_all.sh $recipe"
[ -z "${ROOT-}" ] || [ "${prepare[0]-}" != shapes ] ||
    mistake "ROOT is set, and $recipe draws its own images: did you mean ROOT=$ROOT bash run_all.sh folder?"
case ${prepare[0]-} in folder | coco | '') ;; *)
    [ -z "${CAPTIONS-}" ] ||
        mistake "CAPTIONS is set, and $recipe takes none: unset it, or take folder or coco32" ;;
esac
[ "$recipe" = captions ] && [ -z "${ROOT-}" ] && shapes=data/shapes || shapes=''
[ -z "$shapes" ] || ROOT=$shapes/captions.jsonl
[ -z "${ROOT-}" ] || prepare+=(--root "$ROOT")
if [ -n "${NUM-}" ]; then
    [[ $NUM =~ ^[1-9][0-9]*$ && $NUM != 1 ]] || mistake "NUM=$NUM: images to draw and score, 2 or more"
    count=$NUM
    [ "${#real[@]}" = 0 ] || real=(--num-real "$NUM")
fi
call="$recipe $data ${prepare[*]-} ${train[*]-} $count ${real[*]-} $*"
again=''
case " $* " in
    *" --resume auto "* | *" --resume=auto "*) ;;
    *" --resume "* | *" --resume="*)
        again=' with --resume auto'
        ! grep -qs "\"job\": \"${SLURM_JOB_ID:-none}\"" "$run/config.json" ||
            set -- "$@" --resume auto ;;  # this job has begun from there already
esac

if [ -f "$run/generator.pt" ] && [ -f "$run/report.html" ] && [ "$run/done" -nt "$run/generator.pt" ] &&
    [ "$(cat "$run/done")" = "$call" ]; then
    say "$run is finished: report $run/report.html, all else in $run; nothing to do"
    exit 0
fi

extra=''
[ "$recipe" != tests ] || extra="pytest xdist"
# The packages: in PYTHON, in the python3 at hand, or in .venv, which is made here.
has='import importlib.metadata as m, importlib.util as u, sys
packages = "torch torchvision numpy PIL pytorch_fid tqdm matplotlib nltk '"$extra"'".split()
sys.exit(any(u.find_spec(p) is None for p in packages)
         or [int(n) for n in m.version("torch").split(".")[:2]] < [2, 10])'
if [ -n "${PYTHON-}" ]; then
    python=$PYTHON
    "$python" -c "$has" 2>/dev/null || {
        install="$PYTHON -m pip install -r $here/${extra:+tests/}requirements.txt"
        mistake "PYTHON=$PYTHON cannot be run or lacks packages: $install"
    }
elif cmp -s "$here/requirements.txt" "$here/.venv/complete"; then
    python=$here/.venv/bin/python
elif python3 -c "$has" 2>/dev/null; then
    python=python3
else
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        mistake "needs Python 3.11 or later as python3, or named by PYTHON="
    python=$here/.venv/bin/python
    mkdir -p "$here/.venv"
    exec 8>>"$here/.venv/lock"
    python3 -c 'import fcntl; fcntl.flock(8, fcntl.LOCK_EX)' || true  # where another call installs, wait
    cmp -s "$here/requirements.txt" "$here/.venv/complete" || {
        say "installing the packages of requirements.txt into .venv (once)"
        python3 -m venv "$here/.venv"
        "$python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
        cp "$here/requirements.txt" "$here/.venv/complete"
    }
    exec 8>&-
fi
[ "$recipe" != gpu-check ] || exec "$python" "$here/tests/gpu_check.py" "$@"
if [ "$recipe" = tests ]; then
    [ "$python" != "$here/.venv/bin/python" ] ||
        "$python" -m pip install --quiet --disable-pip-version-check -r "$here/tests/requirements.txt"
    exec "$python" -m pytest --rootdir "$here" -n 2 --dist loadfile "$here/tests" "$@"
fi

# Signals go to the stage that runs: train.py saves and leaves, the others drop what is half done.
child='' stopped='' notice=TERM
stop() {
    stopped=$1
    [ -z "$child" ] || kill -"$notice" "$child" 2>/dev/null || true
}
leave() {
    say "run_all.sh: interrupted by SIG$stopped; the same command goes on$again" >&2
    # SIGUSR1 is the warning before the time limit, see #SBATCH --signal; after scancel nothing is to go on
    [ "$stopped" != USR1 ] || [ -z "${SLURM_JOB_ID-}" ] || scontrol requeue "$SLURM_JOB_ID" || true
    exit 75
}
for name in INT TERM USR1 HUP; do trap "stop $name" "$name"; done

case " $* " in *" --help "* | *" -h "*) exec "$python" "$here/train.py" --help ;; esac

# What train.py says to these options, in $said; a mistake ends here, in one line.
ask() {
    local status=0
    said=$("$python" -c "import sys
sys.path.insert(0, sys.argv.pop(1))
import torch, train
sys.argv[0] = 'train.py'
$1" "$here" --data "$data" --out "$run" "${train[@]}" -- "${@:2}" 2>&1) || status=$?
    [ -z "$stopped" ] || leave
    said=$(tail -n 1 <<<"$said")
    [ "$status" = 0 ] || {
        echo "$said" >&2
        exit "$status"
    }
}
# before the data are prepared
ask 'args = train.parse_args(); print(args.batch_size, args.device, args.grad_accum)' "$@"
read -r batch device parts <<<"$said"

{ mkdir -p "$run" && [ -w "$run" ]; } 2>/dev/null || mistake "RUN=$run cannot be made or written to"
exec 9>>"$run/run_all.lock"
"$python" -c '
import fcntl, sys
try: fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError: sys.exit(1)
except OSError as error: print("run_all.sh: no lock on this file system:", error, file=sys.stderr)' || {
    echo "run_all.sh: $run is in use by $(tail -n 1 "$run/run_all.lock")" >&2
    exit 75
}
echo "run_all.sh, process $$ on $(uname -n) since $(date '+%Y-%m-%d %H:%M:%S')" >"$run/run_all.lock"
# a mistake leaves no folder
trap '[ "$(ls -A "$run")" != run_all.lock ] || { rm "$run/run_all.lock"; rmdir "$run"; } || true' EXIT

stage() {
    local status=0
    [ -z "$stopped" ] || leave
    "$@" & child=$!
    [ -z "$stopped" ] || kill -"$notice" "$child" 2>/dev/null || true  # it came before there was a child
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do  # a trap ends wait early
        status=0
        wait "$child" || status=$?
    done
    child=''
    [ -z "$stopped" ] || leave
    case $status in 0 | 2 | 75) return "$status" ;; *) return 1 ;; esac
}

[ -z "$shapes" ] || stage "$python" "$here/prepare_data.py" shapes --size 32 --num 10000 --out "$shapes"
stage "$python" "$here/prepare_data.py" "${prepare[@]}" --out "$data"
count_of='import json, sys; print(json.load(open(sys.argv[1]))["count"])'
have=$("$python" -c "$count_of" "$data/meta.json") || {
    [ -z "$stopped" ] || leave
    exit 1
}
[ "$have" != 1 ] || mistake "$data holds 1 image: the generated ones are scored against 2 or more"
[ "$have" -ge "${real[1]-0}" ] || {
    say "run_all.sh: $data has $have images, not ${real[1]}: the generated ones are scored against these"
    real=()
}
[ "$have" -ge "$batch" ] || [[ " $*" == *" --batch-size"* ]] || {
    most=$((have - have % parts))
    say "run_all.sh: $data holds $have: the batch is $most, not $batch"
    train+=(--batch-size "$most")
}
# As many processes as can share the batch evenly: of each node its GPUs, or one on its CPUs.
ask "run, nodes = train.make_run(train.parse_args()), ${SLURM_NNODES:-1}
gpus = torch.cuda.device_count() if run.device.type == 'cuda' and ':' not in run.args.device else 1
part = run.args.batch_size // run.args.grad_accum
n, p = max(((n, p) for n in range(1, nodes + 1) for p in range(1, gpus + 1)
            if part % (n * p) == 0 and (run.args.batch_size > n * p or not run.args.mismatch_weight)),
           key=lambda pair: (pair[0] * pair[1], pair[1]))
print(n, p, n * p, nodes * gpus, run.args.batch_size, run.args.grad_accum)" "$@"
read -r nodes processes all possible batch parts <<<"$said"
[ "$all" = "$possible" ] ||
    say "run_all.sh: $all processes of $possible possible: the most that divide" \
        "--batch-size $batch (--grad-accum $parts)"
launch=("$python")
# torchrun turns every status into 1 and a page: here the first process to fail decides, and has said why
torchrun=("$python" -c '
import logging, sys
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError
from torch.distributed.run import main
logging.disable(logging.ERROR)
try:
    main(sys.argv[1:])
except SignalException:
    sys.exit(75)
except RendezvousConnectionError:
    sys.exit("run_all.sh: no connection to the torchrun of the first node: "
             "ended, or not found (docs/clusters.md)")
except ChildFailedError as error:
    rank, first = error.get_first_failure()
    if first.exitcode < 0:
        print(f"run_all.sh: process {rank} was ended by signal {-first.exitcode}", file=sys.stderr)
    sys.exit(max(first.exitcode, 1))
' --nproc-per-node="$processes")
# by default torchrun dies of SIGUSR1, and kills after 30 s what still saves or scores
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 PET_SHUTDOWN_TIMEOUT=110
if [ "$nodes" -gt 1 ]; then
    notice=USR1  # which srun passes on; at SIGTERM it kills
    launch=(srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpu-bind=none "${torchrun[@]}"
        --nnodes="$nodes" --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID"
        --rdzv-endpoint="$(scontrol show hostnames | head -n 1):$((10000 + SLURM_JOB_ID % 20000))")
elif [ "$processes" -gt 1 ]; then
    launch=("${torchrun[@]}" --standalone)
fi
stage "${launch[@]}" "$here/train.py" --data "$data" --out "$run" "${train[@]}" -- "$@"
notice=TERM
stage "$python" "$here/sample.py" --run "$run" --device "${device:-auto}" --num "$count" \
    ${pictures[@]+"${pictures[@]}"}
stage "$python" "$here/evaluate.py" --run "$run" --device "${device:-auto}" ${real[@]+"${real[@]}"}
echo "$call" >"$run/done"
stage "$python" "$here/evaluate.py" --compare "$(dirname "$run")" || true  # it says what runs are damaged
