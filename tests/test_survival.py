"""A run that is stopped, killed, starved of disk or fed bad numbers loses nothing and ends in the same weights."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, call, log_of, refused

import train

KILLS = int(os.environ.get("KILLS", 4))  # the torture test's; 100 in its longer form
TIMES = ("ms_per_step", "ms_min", "ms_max", "images_per_second")
# all that draws random numbers or depends on the step: dropout, augmentation, noise, captions, accumulation, growing,
# and whatever may be START:END
OPTIONS = ("--condition", "text", "--arch", "upsample", "--flip", "--diffaug", "0.2:0.9", "--jitter", "0.1", "--grad-accum", "2",
           "--width", "8", "--batch-size", "16", "--log-every", "5", "--save-every", "20", "--grid-every", "50", "--device",
           "cpu", "--epochs", "7", "--loss", "relativistic", "--r1", "0.1:0.01", "--cond-augment", "0.1", "--mismatch-weight",
           "0.3", "--attention", "--grow", "8,16", "--d-steps", "2", "--schedule", "cosine-restarts", "--warmup", "9",
           "--r2", "0:0.1", "--lr-g", "2e-4:5e-5", "--lr-d", "2e-4:1e-4", "--beta2", "0.9:0.99", "--ema-images", "0:512",
           "--burn-in", "1400")


def start(shapes, run, *options, launch=(sys.executable,)):
    return subprocess.Popen([*map(str, launch), str(ROOT / "train.py"), "--data", str(shapes), "--out", str(run),
                             *options], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_step(run, step, process=None):
    deadline = time.time() + 90
    while time.time() < deadline and (process is None or process.poll() is None):
        try:
            if json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"] >= step:
                return
        except (OSError, ValueError, IndexError):
            pass
        time.sleep(0.01)


def status(run):
    return json.loads((run / "status.json").read_text())


def weights(run):
    return torch.load(run / "generator.pt", weights_only=True)["generator"]


def same_run(one, other):
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    lines = [[{k: v for k, v in line.items() if k not in TIMES} for line in log_of(run)] for run in (one, other)]
    assert lines[0] == lines[1], "each interval once, with the same values"


@pytest.fixture(scope="module", params=["off", "bf16"])
def straight(request, shapes, tmp_path_factory):
    """The run that nothing disturbs, and its precision."""
    run = tmp_path_factory.mktemp("straight") / request.param
    call("train.py", "--data", shapes, "--out", run, *OPTIONS, "--amp", request.param)
    return run, request.param


def test_interrupted_by_every_signal_it_ends_in_the_same_weights(straight, shapes, tmp_path):
    whole, amp = straight
    run, rng = tmp_path / "run", random.Random(amp)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGKILL):
        process = start(shapes, run, *OPTIONS, "--amp", amp)
        before = status(run)["step"] if (run / "status.json").exists() else 0
        wait_for_step(run, before + rng.randrange(5, 20), process)
        sent = time.time()
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        if number == signal.SIGKILL:
            assert process.returncode == -9
        else:
            assert process.returncode == 75, error
            assert status(run)["state"] == "interrupted" and status(run)["signal"] == number.name
            assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == status(run)["step"]
            assert time.time() - sent < 5
    call("train.py", "--data", shapes, "--out", run, *OPTIONS, "--amp", amp)
    same_run(whole, run)


def test_torture(shapes, tmp_path):
    """kill -9 at random moments of a run that saves at every step: it always resumes, and ends in the same weights."""
    options = ("--width", "24", "--batch-size", "32", "--log-every", "10", "--save-every", "1", "--grid-every", "100",
               "--device", "cpu", "--amp", "off", "--epochs", "1000", "--max-steps", str(40 * KILLS))
    run, rng, kills = tmp_path / "run", random.Random(0), 0
    while kills < KILLS:
        process = start(shapes, run, *options)
        first = process.stdout.readline()  # printed when the loop begins
        assert "steps" in first, process.communicate()[1]
        time.sleep(rng.uniform(0, 1.2))
        process.kill()
        process.communicate()
        kills += process.returncode == -9
        if process.returncode == 0:
            break
        states = [train.load_file(p) for p in (run / "checkpoint.pt", run / "checkpoint.prev.pt") if p.exists()]
        assert states or kills == 1
    call("train.py", "--data", shapes, "--out", run, *options)
    call("train.py", "--data", shapes, "--out", tmp_path / "whole", *options[:9], "100000", *options[10:])
    same_run(tmp_path / "whole", run)
    assert not list(run.rglob("*.tmp"))
    print(f"{kills} kills survived")


def test_second_interrupt_ends_at_once(shapes, tmp_path):
    process = start(shapes, tmp_path, *OPTIONS, "--epochs", "1000", launch=(
        sys.executable, "-c", "import sys, time, train; sys.argv = sys.argv[1:]; step = train.train_step\n"
        "def slow(run, state, *batch):\n    step(run, state, *batch)\n    time.sleep(20 if state.step == 40 else 0)\n"
        "train.train_step = slow; train.main()"))
    wait_for_step(tmp_path, 40, process)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == -signal.SIGINT
    assert train.load_file(tmp_path / "checkpoint.pt")["step"] == 40


@pytest.mark.parametrize("damage", ["cut", "flipped bit", "missing"])
def test_damaged_checkpoint_falls_back(damage, trained, shapes, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    path = run / "checkpoint.pt"
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[:len(data) // 2])
    elif damage == "flipped bit":
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    else:
        path.unlink()
    options = ("--data", shapes, "--out", run, "--condition", "label", "--epochs", "4", *TINY)
    done = call("train.py", *options)
    assert "going on from" in done.stdout and "checkpoint.prev.pt" in done.stdout
    if damage != "missing":
        assert "checkpoint.pt: damaged" in done.stderr
    call("train.py", "--data", shapes, "--out", tmp_path / "whole", "--condition", "label", "--epochs", "4", *TINY)
    assert all(torch.equal(a, b) for a, b in zip(weights(run).values(), weights(tmp_path / "whole").values()))
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        (run / name).write_bytes(b"PK rubbish")
    refused("train.py", *options, naming=["checkpoint.pt", "checkpoint.prev.pt", "--resume never"])


def test_damage_without_a_word_is_damage(trained, monkeypatch):
    """Some of torch's errors say nothing; a line is made of each all the same."""
    for error, said in ((EOFError(), "EOFError)"), (RuntimeError("a\nb"), "RuntimeError: a)")):
        monkeypatch.setattr(torch, "load", lambda *args, **more: (_ for _ in ()).throw(error))
        with pytest.raises(ValueError) as caught:
            train.load_file(trained / "generator.pt")
        assert str(caught.value).endswith(f"damaged ({said}")


def test_fuzzed_checkpoints_are_whole_or_refused(trained, tmp_path):
    """Bits flipped and pieces cut out anywhere in the file: an error, or the very same contents."""
    rng, data, path = random.Random(0), (trained / "generator.pt").read_bytes(), tmp_path / "generator.pt"
    whole, refused_ones, count = train.load_file(trained / "generator.pt"), 0, int(os.environ.get("FUZZ", 300))
    for _ in range(count):
        damaged, place = bytearray(data), rng.randrange(len(data))
        if rng.random() < 0.7:
            damaged[place] ^= 1 << rng.randrange(8)
        else:
            del damaged[place:place + rng.choice((1, 64, len(data)))]
        path.write_bytes(damaged)
        try:
            value = train.load_file(path)
        except ValueError:
            refused_ones += 1
        else:
            assert {k: v for k, v in value.items() if k != "generator"} == {
                k: v for k, v in whole.items() if k != "generator"}
            assert all(torch.equal(v, value["generator"][k]) for k, v in whole["generator"].items())
    assert refused_ones > 0.8 * count
    print(f"{count} checkpoints fuzzed, {refused_ones} refused, the others whole")


def test_full_disk(shapes, trained, tmp_path):
    """A limit on the size of files stands for a full disk: the error is the system's, and the last checkpoint whole."""
    run = shutil.copytree(trained, tmp_path / "run")
    before = (run / "checkpoint.pt").read_bytes()
    limit = len(before) // 1024 // 2
    done = call("bash", "-c", f'ulimit -f {limit}; exec "$@"', "-", sys.executable, ROOT / "train.py", "--data", shapes,
                "--out", run, "--condition", "label", "--epochs", "4", *TINY, status=1)
    assert "File too large" in done.stderr and "Traceback" not in done.stderr
    assert (run / "checkpoint.pt").read_bytes() == before and not list(run.rglob("*.tmp"))
    assert status(run)["state"] == "failed"
    call("train.py", "--data", shapes, "--out", run, "--condition", "label", "--epochs", "4", *TINY)


INJECT = """
import sys, torch, train
sys.argv = ["train.py", *sys.argv[1:]]
step, (d_loss, g_loss, _) = train.train_step, train.LOSSES["bce"]
def patched(run, state, *batch):
    if state.step >= {start}: {what}
    step(run, state, *batch)
train.train_step = patched
train.main()
"""


def test_exception_leaves_a_post_mortem(shapes, tmp_path):
    options = ("--data", shapes, "--out", tmp_path / "run", "--epochs", "2", *TINY)
    done = call(sys.executable, "-c", INJECT.format(start=13, what="raise ArithmeticError('seven')"), *options,
                cwd=ROOT, status=1)
    assert "Traceback" in done.stderr and "ArithmeticError: seven" in done.stderr
    run = tmp_path / "run"
    assert status(run)["state"] == "failed" and "seven" in status(run)["error"] and status(run)["step"] == 13
    assert train.load_file(run / "error.pt")["step"] == 13 and train.load_file(run / "checkpoint.pt")["step"] == 8
    shutil.copytree(run, tmp_path / "copy")
    assert "going on from" in (said := call("train.py", *options).stdout) and "checkpoint.pt" in said
    assert "steps 13 to" in call("train.py", "--data", shapes, "--out", tmp_path / "copy", "--epochs", "2", *TINY,
                                 "--resume", tmp_path / "copy" / "error.pt").stdout


def test_numbers_that_stay_bad_stop_the_run_with_advice(shapes, tmp_path):
    poison = "train.LOSSES['bce'] = (lambda r, f, a: d_loss(r, f, a) * float('nan'), g_loss, {})"
    done = call(sys.executable, "-c", INJECT.format(start=12, what=poison), "--data", shapes, "--out", tmp_path,
                "--epochs", "100", "--max-skips", "6", *TINY, cwd=ROOT, status=2)
    assert "--lr-d" in done.stderr and "--clip-grad" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    last = log_of(tmp_path)[-1]
    assert last["step"] == 20 and last["skipped_d"] == 8 and last["skipped_g"] == 0 and last["loss_d"] is None
    assert status(tmp_path)["state"] == "failed" and train.load_file(tmp_path / "checkpoint.pt")["step"] == 16


def children(pid):
    return [int(p) for p in subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True,
                                           text=True).stdout.split()]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_processes_leave_together_and_their_number_may_change(shapes, tmp_path):
    """1 process, 2 of one torchrun, 2 nodes on loopback, 1 again: each stopped by a signal, none loses a step."""
    torchrun = (sys.executable, "-m", "torch.distributed.run")
    one_node = (*torchrun, "--standalone", "--nproc_per_node=2")
    two_nodes = (*torchrun, "--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", "--rdzv-id=7",
                 f"--rdzv-endpoint=127.0.0.1:{free_port()}")
    options = ("--condition", "label", "--width", "8", "--batch-size", "32", "--log-every", "5", "--save-every", "1000",
               "--grid-every", "1000", "--amp", "off", "--device", "cpu", "--epochs", "60", "--log-every", "5")
    last_child = (lambda launched: children(launched.pid)[-1])  # not the process that writes
    itself = (lambda launched: launched.pid)
    for launch, nodes, number, target in (((sys.executable,), 1, signal.SIGUSR1, itself),
                                          (one_node, 1, signal.SIGUSR1, last_child),
                                          (one_node, 1, signal.SIGTERM, itself),
                                          (two_nodes, 2, signal.SIGTERM, itself)):
        step = status(tmp_path)["step"] if (tmp_path / "status.json").exists() else 0
        started = [start(shapes, tmp_path, *options, launch=launch) for _ in range(nodes)]
        wait_for_step(tmp_path, step + 10, started[0])
        os.kill(target(started[-1]), number)
        errors = [process.communicate(timeout=60)[1] for process in started]
        assert status(tmp_path)["state"] == "interrupted" and status(tmp_path)["signal"] == number.name, errors
        assert train.load_file(tmp_path / "checkpoint.pt")["step"] == status(tmp_path)["step"] >= step + 10
        # torchrun's own traceback is its word for any status but 0
        assert not any('train.py", line' in error for error in errors), errors
        assert json.loads((tmp_path / "config.json").read_text())["processes"] == (1 if launch[1:] == () else 2)
    process = start(shapes, tmp_path, *options)
    step = status(tmp_path)["step"]
    assert f"steps {step} to 480" in process.communicate(timeout=120)[0]
    assert [line["step"] for line in log_of(tmp_path)] == list(range(5, 481, 5))


def test_bad_numbers_of_one_process_are_skipped_by_all(shapes, tmp_path):
    patched = tmp_path / "patched.py"
    patched.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + INJECT.format(
        start=0, what="train.LOSSES['bce'] = (lambda r, f, a: d_loss(r, f, a) + (float('inf') if run.rank == 1 and "
        "state.step in (5, 6) else 0), g_loss, {})"))
    call(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", patched, "--data", shapes,
         "--out", tmp_path / "run", "--max-steps", "12", *TINY)
    assert [line["skipped_d"] for line in log_of(tmp_path / "run")] == [0, 2, 2]


def test_one_writer(shapes, tmp_path):
    first = start(shapes, tmp_path, *OPTIONS, "--epochs", "1000")
    wait_for_step(tmp_path, 5, first)
    second = call("train.py", "--data", shapes, "--out", tmp_path, *OPTIONS, status=75)
    assert f"process {first.pid} on {os.uname().nodename} since 2" in second.stderr
    first.kill()
    first.communicate()
    third = start(shapes, tmp_path, *OPTIONS, "--epochs", "1000")  # a dead process's lock is no lock
    assert "steps" in third.stdout.readline()
    third.kill()
    third.communicate()


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_code_in_files_is_refused_and_not_run(shapes, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    evil = {"generator": Payload(tmp_path / "ran"), "step": 1}
    torch.save(evil, run / "generator.pt")
    torch.save(evil, run / "evil.pt")
    refused("sample.py", "--run", run, naming=["generator.pt", "run code"])
    refused("train.py", "--data", shapes, "--out", run, "--condition", "label", "--epochs", "4", *TINY, "--resume",
            run / "evil.pt", naming=["evil.pt", "run code"])
    assert not (tmp_path / "ran").exists()


def test_a_reader_that_leaves_costs_no_step(shapes, tmp_path):
    """`train.py … | head -n 1`, and both streams gone: the run goes to its end; prepare_data.py too."""
    options = f"--data {shapes} --width 4 --batch-size 16 --device cpu --amp off --max-steps 60 --log-every 2"
    train_py = f"{sys.executable} {ROOT / 'train.py'} {options}"
    for name, pipe in (("a", "2>err | head -n 1"), ("b", "2>&1 | true")):
        call("bash", "-c", f"{train_py} --out {name} {pipe}; exit ${{PIPESTATUS[0]}}", cwd=tmp_path)
        assert status(tmp_path / name)["state"] == "finished" and len(log_of(tmp_path / name)) == 30
    assert "Traceback" not in (tmp_path / "err").read_text()
    call("bash", "-c", f"{sys.executable} {ROOT / 'prepare_data.py'} shapes --num 40 --size 8 --out d 2>&1 | true; "
         "exit ${PIPESTATUS[0]}", cwd=tmp_path)
    assert (tmp_path / "d" / "meta.json").exists()


def test_nohup_is_respected(shapes, tmp_path):
    process = start(shapes, tmp_path, *OPTIONS, launch=("nohup", sys.executable))
    wait_for_step(tmp_path, 10, process)
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_killed_as_it_clears_a_run_away(trained, shapes, tmp_path):
    """By --resume never: what the kill left is still known as a run's."""
    run = shutil.copytree(trained, tmp_path / "run")
    command = ("--data", shapes, "--out", run, *TINY, "--resume", "never", "--max-steps", "2")
    call(sys.executable, "-c", """import os, pathlib, train
unlink = pathlib.Path.unlink
pathlib.Path.unlink = lambda self, **more: os._exit(9) if self.name == "checkpoint.pt" else unlink(self, **more)
train.main()""", *command, cwd=ROOT, status=9)
    assert (run / "checkpoint.pt").exists() and not (run / "log.jsonl").exists()
    assert "finished 2 steps" in call("train.py", *command).stdout


def test_a_folder_of_somebody_elses_is_left_alone(shapes, tmp_path):
    for name, more in (("log.jsonl", ()), ("checkpoint.pt", ()), ("best.pt", ("config.json",)), ("lock", ())):
        out = tmp_path / name.replace(".", "-")
        out.mkdir()
        for each in (name, *more):
            (out / each).write_text('{"model_type": "mine"}' if each == "config.json" else "mine")
        refused("train.py", "--data", shapes, "--out", out, *TINY, "--resume", "never",
                naming=["--out", more[0] if more else name])
        assert (out / name).read_text() == "mine"
