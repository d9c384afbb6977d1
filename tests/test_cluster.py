"""torchrun, and a real SLURM of three nodes on this host: what is lost when a queue, a signal or a kill ends a run.

Minutes each, so they run where they are asked for: CLUSTER_TESTS=1 for torchrun's; SLURM_TESTS=1 for SLURM's, as root, with
Debian's packages slurm-wlm and munge (see slurm-up.sh).
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, call, log_of

HERE = os.path.dirname(os.path.abspath(__file__))
torchruns = pytest.mark.skipif("CLUSTER_TESTS" not in os.environ, reason="minutes: CLUSTER_TESTS=1 runs them")
slurms = pytest.mark.skipif("SLURM_TESTS" not in os.environ, reason="minutes, root, slurm-wlm: SLURM_TESTS=1 runs them")
OPTIONS = ("--width", "8", "--width-d", "8", "--batch-size", "32", "--log-every", "10", "--save-every", "100000", "--grid-every",
           "100000", "--device", "cpu", "--amp", "off")


def running(word):
    """(pid, command) of the processes in whose command this word is."""
    lines = subprocess.run(["ps", "-ww", "-eo", "pid=,args="], capture_output=True, text=True).stdout.splitlines()
    return [(int(line.split()[0]), line) for line in lines if word in line]


def workers(run):
    return [pid for pid, line in running(f"--out {run} ") if "nproc-per-node" not in line and "run_all.sh" not in line
            and "train.py" in line and "srun" not in line]


def launchers(run):
    return [pid for pid, line in running(f"--out {run} ") if "nproc-per-node" in line and "srun" not in line]


def wait_until(what, seconds=120):
    deadline = time.time() + seconds
    while not (value := what()):
        assert time.time() < deadline, "waited in vain"
        time.sleep(0.1)
    return value


def step_of(run):
    try:
        return json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError):
        return 0


def status(run):
    return json.loads((run / "status.json").read_text())


def saved_step(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)["step"]


def same_weights(one, other):
    a, b = (torch.load(run / "generator.pt", weights_only=True)["generator"] for run in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- torchrun under run_all.sh ---------------------------------------------------------------------------

@pytest.fixture
def begin(shapes, tmp_path):
    """Start run_all.sh as on a node of two GPUs, DATA being made already; `patch` is Python run in each process first."""
    begun = []

    def start(*options, patch=""):
        (tmp_path / "sitecustomize.py").write_text(patch)
        (tmp_path / "asked").write_text("1 2 2 2 32 1\n")
        stub = tmp_path / "python"
        stub.write_text(f'#!/bin/sh\ncase "$1$2" in\n    -c*make_run*) {sys.executable} "$@" >/dev/null && cat {tmp_path}/asked;;\n'
                        f'    *prepare_data.py*) ;;\n    *) exec {sys.executable} "$@";;\nesac\n')
        stub.chmod(0o755)
        settings = {"PYTHON": str(stub), "DATA": str(shapes), "RUN": str(tmp_path / "run"),
                    "PYTHONPATH": str(tmp_path)}
        begun.append(subprocess.Popen(["bash", str(ROOT / "run_all.sh"), "shapes", *OPTIONS, *options],
                                      env=os.environ | settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                      start_new_session=True))
        return begun[-1], tmp_path / "run"
    yield start
    for process in begun:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for pid in workers(tmp_path / "run"):  # whom a failed test leaves behind
            os.kill(pid, signal.SIGKILL)
        process.communicate()


LONG = ("--epochs", "1000")


@torchruns
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_saves_and_ends_with_75(number, begin):
    before = 0
    for times in (1, 3):  # torchrun would go at the third and leave its processes behind
        process, run = begin(*LONG)
        wait_until(lambda: step_of(run) >= before + 20)
        for _ in range(times):
            process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 75 and err.count("saved at step") == 1 and "Traceback" not in err, err
        assert status(run)["state"] == "interrupted" and saved_step(run) == status(run)["step"] >= before + 20
        assert not workers(run)
        before = status(run)["step"]


@torchruns
@pytest.mark.parametrize("times", range(5))
def test_torchrun_killed_leaves_no_worker_and_no_step_is_lost(times, begin):
    process, run = begin(*LONG)
    wait_until(lambda: step_of(run) >= 20)
    mine = workers(run)
    assert len(mine) == 2 and len(launchers(run)) == 1
    os.kill(launchers(run)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    wait_until(lambda: not workers(run), 10)
    assert status(run)["state"] == "interrupted" and saved_step(run) == status(run)["step"] >= 20


@torchruns
@pytest.mark.parametrize("which", [0, 1])
def test_a_worker_killed_is_said_and_ends_with_1(which, begin):
    process, run = begin(*LONG)
    wait_until(lambda: step_of(run) >= 20)
    os.kill(sorted(workers(run))[which], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "was ended by signal 9" in err and "Traceback" not in err, err
    assert not workers(run) and status(run)["state"] == "failed"


RANK_1 = """
import os, sys
if os.environ.get("RANK") == "1":
    import torch
    first, calls = torch.randn, []
    def randn(*args, **more):
        calls.append(1)
        if len(calls) == 20:
            raise {error}
        return first(*args, **more)
    torch.randn = randn
"""


@torchruns
@pytest.mark.parametrize("error, said", [("torch.OutOfMemoryError('CUDA out of memory')", "train.py: out of memory at step"),
                                         ("ArithmeticError('seven')", "ArithmeticError: seven")])
def test_a_failure_of_the_second_process_is_said_and_ends_with_1(error, said, begin):
    process, run = begin(*LONG, patch=RANK_1.format(error=error))
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1 and said in err, err
    assert "ChildFailedError" not in err and not workers(run) and status(run)["state"] == "failed"


@torchruns
def test_mistakes_are_said_once(begin):
    def ends(code, *options):
        process, run = begin(*options)
        _, err = process.communicate(timeout=90)
        lines = [line for line in err.splitlines() if "all_reduce" not in line]
        assert process.returncode == code and len(lines) == 1, err
        return lines[0]

    assert "--batch-size 999" in ends(2, "--batch-size", "999")
    process, run = begin(*LONG)
    wait_until(lambda: step_of(run) >= 20)
    assert "is in use by run_all.sh" in ends(75, *LONG)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    step = status(run)["step"]
    # what only the first process finds: another option than the checkpoint's, and a run that is held
    assert "there, 0.5 asked" in ends(2, *LONG, "--lr-g", "0.5")
    held = subprocess.Popen([sys.executable, "-c", "import prepare_data, sys, time; x = prepare_data.lock(sys.argv[1]); "
                             "print(flush=True); time.sleep(100)", str(run)], cwd=ROOT, stdout=subprocess.PIPE)
    held.stdout.readline()
    assert f"is in use by process {held.pid}" in ends(75, *LONG)
    held.kill()
    held.communicate()
    assert status(run)["state"] == "interrupted" and saved_step(run) == step


@torchruns
def test_as_many_processes_as_divide_the_batch(shapes, tmp_path):
    """Three nodes, a fake srun that says how it was called: of a batch of 64 two can take equal shares, of 63 three."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", f'echo "$@" >{tmp_path}/srun'), ("scontrol", "echo node9"), ("prepare", "exit 0"),
                       ("python", f'case "$1" in *prepare_data.py | *sample.py | *evaluate.py) ;; *) exec {sys.executable} "$@";; esac')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    settings = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHON": f"{tmp_path}/bin/python", "DATA": str(shapes),
                "RUN": str(tmp_path / "run"), "SLURM_NNODES": "3", "SLURM_JOB_ID": "31234"}
    for batch, parts, nodes, *more in ((64, 1, 2), (63, 1, 3), (126, 2, 3), (63, 9, 1), (65, 1, 1),
                                       (3, 1, 1, "--condition", "label", "--mismatch-weight", "0.5")):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        (tmp_path / "srun").unlink(missing_ok=True)
        said = call("bash", ROOT / "run_all.sh", "shapes", *OPTIONS, "--max-steps", "1", "--batch-size", str(batch), "--grad-accum",
                    str(parts), *more, **settings).stdout
        assert (f"{nodes} processes of 3 possible" in said) == (nodes < 3)
        if nodes > 1:
            called = (tmp_path / "srun").read_text()
            assert f"--nodes={nodes} --ntasks={nodes} " in called and f"--nnodes={nodes} " in called
            assert "--nproc-per-node=1 " in called and "--rdzv-endpoint=node9:21234 " in called
        else:
            assert not (tmp_path / "srun").exists() and "steps 0 to 1" in said


# ---- SLURM -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    for above in (path for path in folder.parents if "pytest-of-" in str(path)):
        above.chmod(0o755)  # munge is another user
    try:
        subprocess.run(["bash", f"{HERE}/slurm-up.sh", str(folder)], check=True)
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        yield folder
        subprocess.run(["scancel", "--user=root"])
        time.sleep(2)
    finally:
        subprocess.run(["bash", f"{HERE}/slurm-up.sh", str(folder), "down"], check=True)


@pytest.fixture
def job(slurm, shapes, tmp_path):
    """Submit run_all.sh; its stages after training are left out. (job's number, RUN, its log)"""
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\ncase "$1" in\n    */prepare_data.py | */sample.py | */evaluate.py) ;;\n'
                    f'    *) exec nice -n 10 {sys.executable} "$@";;\nesac\n')
    stub.chmod(0o755)

    def submit(*options, queue=()):
        settings = {"PYTHON": str(stub), "DATA": str(shapes), "RUN": str(tmp_path / "run")}
        number = subprocess.run(["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2",
                                 f"--output={tmp_path}/slurm-%j.log", *queue, "run_all.sh", "shapes", *OPTIONS, *options],
                                cwd=ROOT, check=True,
                                env=os.environ | settings, capture_output=True, text=True).stdout.strip()
        return number, tmp_path / "run", tmp_path / f"slurm-{number}.log"
    return submit


def state(number):
    said = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True).stdout
    return dict(re.findall(r"(\w+)=(\S*)", said))


def begins_again(number):
    """Wait for its second start, without the two minutes that SLURM lets pass before."""
    wait_until(lambda: state(number)["Restarts"] == "1" and state(number)["JobState"] == "PENDING", 300)
    subprocess.run(["scontrol", "update", f"jobid={number}", "starttime=now"], check=True)
    wait_until(lambda: state(number)["JobState"] == "RUNNING", 300)


def whole(shapes, run, *options):
    """The same two processes, never interrupted."""
    call(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py", "--data", shapes,
         "--out", run, *RECIPE, *OPTIONS, *options)
    return run


# what run_all.sh's recipe gives to train.py
SCRIPT = (ROOT / "run_all.sh").read_text()
RECIPE = shlex.split(re.search(r"^small=\((.*?)\)", SCRIPT, re.S | re.M)[1]
                     + re.search(r'    shapes\) .*?"\$\{small\[@\]\}"(.*?)\)', SCRIPT, re.S)[1])


def steps(count):
    return ("--epochs", "100000", "--max-steps", str(count))


@slurms
def test_two_nodes_survive_the_time_limit(job, shapes, tmp_path):
    """The warning saves in the middle of an epoch and requeues; the second start goes on and finishes, in the same weights."""
    number, run, log = job(*steps(4000), queue=("--time=2", "--signal=B:USR1@60"))
    wait_until(lambda: state(number)["Restarts"] == "1", 300)
    assert status(run)["state"] == "interrupted" and status(run)["signal"] == "SIGUSR1"
    middle = status(run)["step"]
    assert saved_step(run) == middle and 0 < middle < 4000 and not workers(run)
    begins_again(number)
    subprocess.run(["scontrol", "update", f"jobid={number}", "timelimit=30"], check=True)
    wait_until(lambda: state(number)["JobState"] not in ("RUNNING", "COMPLETING"), 600)
    text = log.read_text()
    assert state(number)["JobState"] == "COMPLETED" and status(run)["state"] == "finished", text
    assert text.count("saved at step") == 1 and f"steps {middle} to 4000" in text and "cpu × 2" in text
    assert len(log_of(run)) == 400
    assert same_weights(run, whole(shapes, tmp_path / "whole", *steps(4000)))
    print(f"requeued at step {middle}")


@slurms
def test_scancel_saves_and_does_not_requeue(job):
    number, run, log = job(*steps(100000))
    wait_until(lambda: step_of(run) >= 20)
    subprocess.run(["scancel", number], check=True)
    wait_until(lambda: state(number)["JobState"] == "CANCELLED" and not workers(run), 60)
    time.sleep(2)
    assert status(run)["state"] == "interrupted" and saved_step(run) == status(run)["step"] >= 20, log.read_text()
    assert state(number)["Restarts"] == "0" and state(number)["JobState"] == "CANCELLED"


@slurms
@pytest.mark.parametrize("victim", ["worker", "torchrun"])
def test_a_killed_process_ends_the_job_with_1_and_the_next_goes_on(victim, job, shapes, tmp_path):
    number, run, log = job(*steps(400), "--save-every", "25")
    wait_until(lambda: step_of(run) >= 60)
    os.kill((workers if victim == "worker" else launchers)(run)[-1], signal.SIGKILL)
    wait_until(lambda: state(number)["JobState"] == "FAILED", 120)
    assert state(number)["ExitCode"] == "1:0" and state(number)["Restarts"] == "0" and not workers(run), log.read_text()
    assert "rm: " not in log.read_text() and saved_step(run) >= 50
    number, run, log = job(*steps(400), "--save-every", "25")
    wait_until(lambda: state(number)["JobState"] == "COMPLETED", 300)
    assert "going on from" in log.read_text() and len(log_of(run)) == 40
    assert same_weights(run, whole(shapes, tmp_path / "whole", *steps(400)))


@slurms
def test_a_drained_node_costs_no_step(job, shapes, tmp_path):
    """The run goes on on a node that drains; requeued, it takes another, and ends in the same weights."""
    number, run, log = job(*steps(1200))
    wait_until(lambda: step_of(run) >= 20)
    subprocess.run(["scontrol", "update", "nodename=gan2", "state=drain", "reason=test"], check=True)
    try:
        assert state(number)["NodeList"] == "gan[1-2]"
        at = step_of(run)
        wait_until(lambda: step_of(run) >= at + 20)
        subprocess.run(["scancel", "--batch", "--signal=USR1", number], check=True)  # as before a time limit
        begins_again(number)
        assert state(number)["NodeList"] == "gan[1,3]"
        wait_until(lambda: state(number)["JobState"] == "COMPLETED", 300)
    finally:
        subprocess.run(["scontrol", "update", "nodename=gan2", "state=resume"])
    assert log.read_text().count("saved at step") == 1 and len(log_of(run)) == 120
    assert same_weights(run, whole(shapes, tmp_path / "whole", *steps(1200)))


@slurms
def test_statuses_under_srun(job):
    number, run, log = job(*steps(40))
    wait_until(lambda: state(number)["JobState"] == "COMPLETED", 120)
    number, _, log = job(*steps(40), "--lr-g", "0.5")
    wait_until(lambda: state(number)["JobState"] == "FAILED", 120)
    assert state(number)["ExitCode"] == "2:0" and log.read_text().count("there, 0.5 asked") == 1
    assert "Traceback" not in log.read_text()


@slurms
def test_two_jobs_on_the_same_nodes_at_once(job, slurm, shapes, tmp_path):
    """Each has a port of its own."""
    one = job(*steps(60), queue=("--cpus-per-task=1", "--oversubscribe"))
    shutil.copytree(shapes, tmp_path / "data")
    settings = {"PYTHON": str(tmp_path / "python"), "DATA": str(tmp_path / "data"), "RUN": str(tmp_path / "other")}
    two = subprocess.run(["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--oversubscribe",
                          f"--output={tmp_path}/other.log", "run_all.sh", "shapes", *OPTIONS, *steps(60)], cwd=ROOT, check=True,
                         env=os.environ | settings, capture_output=True, text=True).stdout.strip()
    both = (one[0], two)
    wait_until(lambda: all(state(n)["JobState"] == "COMPLETED" for n in both), 200)
    starts, ends = ([state(n)[key] for n in both] for key in ("StartTime", "EndTime"))
    assert max(starts) < min(ends), "at once"
    assert status(tmp_path / "other")["state"] == status(tmp_path / "run")["state"] == "finished"
