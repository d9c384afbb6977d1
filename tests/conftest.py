"""The scripts as a user calls them: real processes on small inputs."""

import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes import the same modules
os.environ["PYTHONPYCACHEPREFIX"] = str(ROOT / ".pytest_cache" / "pycache")
os.environ["OMP_NUM_THREADS"] = "1"  # two tests run at once; read where torch is imported
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup: the tests go on, and the scripts take it
    signal.signal(signal.SIGHUP, lambda number, frame: None)


def run_script(command, environment, cwd, output):
    """In a fresh process: be `python script …`."""
    import torch
    os.environ.clear()
    os.environ.update(environment)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(output, name), os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(cwd or os.getcwd())
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


# its processes are forked from one that has imported the slow packages and computed nothing
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "torch._dynamo", "torchvision", "pytorch_fid.inception"])


def call(*command, status=0, cwd=None, **environment):
    """Run a script (`train.py …`) or a program; returns the finished process after checking its exit status."""
    command = [str(c) for c in command]
    environment = os.environ | environment
    if command[0].endswith(".py"):
        command[0] = str(ROOT / command[0])
        with tempfile.TemporaryDirectory() as output:
            process = FORKS.Process(target=run_script, args=(command, environment, cwd, output))
            process.start()
            process.join()
            out, err = (Path(output, name).read_text() for name in ("out", "err"))
        done = subprocess.CompletedProcess(command, process.exitcode, out, err)
    else:
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, stdin=subprocess.DEVNULL,
                              env=environment)
    assert done.returncode == status, f"{command}\nstatus {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done


def refused(*command, naming, cwd=None, **environment):
    """The call ends with status 2 and one line that names these words."""
    error = call(*command, status=2, cwd=cwd, **environment).stderr.strip()
    assert len(error.splitlines()) == 1, error
    for word in [naming] if isinstance(naming, str) else naming:
        assert word in error, error


def need(path):
    """Skip without this input, except where the checks of record run."""
    if not path.exists():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{path} is required here")
        pytest.skip(f"{path} is not there")
    return path


def log_of(run):
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


TINY = ("--width", "8", "--batch-size", "16", "--log-every", "4", "--save-every", "8", "--grid-every", "8",
        "--device", "cpu")


@pytest.fixture(scope="session")
def weights():
    """Inception's weights as evaluate.py finds or fetches them."""
    import evaluate
    try:
        return evaluate.find_weights()
    except SystemExit:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip("Inception's weights cannot be had here")


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """DATA of 256 drawn shapes, 16×16, with labels."""
    out = tmp_path_factory.mktemp("data") / "shapes"
    call("prepare_data.py", "shapes", "--out", out, "--size", "16", "--num", "256")
    return out


@pytest.fixture(scope="session")
def trained(shapes, tmp_path_factory):
    """RUN of 48 steps, with labels; in bf16 or fp32 as the machine has it."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    done = call("train.py", "--data", shapes, "--out", out, "--condition", "label", "--epochs", "3", *TINY)
    (out / "stdout.txt").write_text(done.stdout)
    return out
