"""run_all.sh: one command that goes on where it stopped, and does nothing when it is done."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, call, log_of
from PIL import Image

TINY = ("--width", "8", "--epochs", "1", "--max-steps", "30", "--log-every", "10", "--device", "cpu")


def environment(tmp_path):
    return {"PYTHON": sys.executable, "DATA": str(tmp_path / "data"), "RUN": str(tmp_path / "run")}


def stub_of_python(tmp_path, asked="32 auto 1", count=5000):
    """PYTHON that says what the options ask for and how many images there are, and notes each script's call in RUN/calls."""
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\ncase "$1$2" in -c*make_run*) echo 1 1 1 1 64 1;; -c*parse_args*) echo {asked};; '
                    f'-c*) echo {count};; '
                    '*) echo "$@" >>"$RUN/calls";; esac\n')
    stub.chmod(0o755)
    return str(stub)


@pytest.mark.skipif("RUN_SLOW" not in os.environ, reason="minutes of Inception: RUN_SLOW=1 runs it")
def test_whole_chain_then_nothing_to_do(weights, tmp_path):
    said = call("bash", ROOT / "run_all.sh", "shapes", *TINY, **environment(tmp_path)).stdout
    assert "FID" in said and "generated 2048, real 2048" in said and "report.html" in said
    start = time.time()
    again = call("bash", ROOT / "run_all.sh", "shapes", *TINY, **environment(tmp_path)).stdout
    assert "nothing to do" in again and len(again.splitlines()) == 1 and time.time() - start < 5
    # a call with other options is not the finished one, and train.py says what differs
    other = call("bash", ROOT / "run_all.sh", "shapes", *TINY, "--lr-g", "1", status=2, **environment(tmp_path)).stderr
    assert "--lr-g 0.0002 there, 1.0 asked" in other


def test_interrupted_it_goes_on(tmp_path):
    """SIGTERM in training saves and exits 75; the next call starts at that step, and a second one is told who runs."""
    command = ["bash", str(ROOT / "run_all.sh"), "shapes", "--width", "8", "--log-every", "10", "--device", "cpu"]
    settings = os.environ | environment(tmp_path)
    first = subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.time() + 90
    while not (log.exists() and log.read_text()) and time.time() < deadline:
        time.sleep(0.2)
    second = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert second.returncode == 75 and f"process {first.pid}" in second.stderr
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 75, err
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "interrupted" and status["step"] >= 10
    third = subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in third.stdout:
        if "going on from" in line:
            assert f"steps {status['step']} to" in line
            break
    third.send_signal(signal.SIGTERM)
    third.communicate(timeout=60)
    assert third.returncode == 75
    # a mistake after an interruption is a mistake, not one more interruption
    assert subprocess.run([*command, "--lr-g", "1"], env=settings, capture_output=True).returncode == 2


@pytest.mark.parametrize("options, how", [((), ""), (("shapes", "--resume", "auto"), ""),
                                          (("shapes", "--resume", "never"), " with --resume auto"),
                                          (("shapes", "--resume=runs/shapes/error.pt"), " with --resume auto")])
def test_ctrl_c_before_the_first_stage(options, how, tmp_path):
    """While the options are checked, too: one line and 75."""
    stub, begun = tmp_path / "python", tmp_path / "begun"
    stub.write_text(f'#!/bin/sh\ncase "$*" in *parse_args*) touch "{begun}"; exec sleep 60;; esac\n')
    stub.chmod(0o755)
    process = subprocess.Popen(["bash", str(ROOT / "run_all.sh"), *options], stderr=subprocess.PIPE, text=True, start_new_session=True,
                               env=os.environ | environment(tmp_path) | {"PYTHON": str(stub)})
    while not begun.exists():
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30)[1].splitlines() == [
        f"run_all.sh: interrupted by SIGINT; the same command goes on{how}"]
    assert process.returncode == 75


@pytest.mark.parametrize("resume", ["never", "runs/other/checkpoint.pt"])
def test_a_requeued_job_starts_over_once(resume, tmp_path):
    (tmp_path / "run").mkdir()
    stub, asked = stub_of_python(tmp_path), f"--resume {resume}"
    for begun, ends in ((None, asked), ("7", asked), ("8", f"{asked} --resume auto")):
        if begun:  # by which job
            (tmp_path / "run" / "config.json").write_text(json.dumps({"job": begun}, indent=1))
        call("bash", ROOT / "run_all.sh", "shapes", *asked.split(),
             **environment(tmp_path) | {"SLURM_JOB_ID": "8", "PYTHON": stub})
        [train] = [line for line in (tmp_path / "run" / "calls").read_text().splitlines() if "train.py" in line]
        assert train.endswith(f"-- {ends}")
        for name in ("calls", "done"):
            (tmp_path / "run" / name).unlink()


def test_num_is_drawn_and_scored(tmp_path):
    (tmp_path / "run").mkdir()
    settings = environment(tmp_path) | {"NUM": "64", "PYTHON": stub_of_python(tmp_path, "32 cpu 1"), "ROOT": "/"}
    for recipe, real in (("folder", " --num-real 64"), ("stacked-mnist", " --num-real 64"), ("anime64", "")):
        call("bash", ROOT / "run_all.sh", recipe, **settings)
        calls = (tmp_path / "run" / "calls").read_text().splitlines()
        assert any("sample.py" in line and "--device cpu --num 64 --grid" in line for line in calls)
        assert any("evaluate.py" in line and line.endswith(f"--device cpu{real}") for line in calls)
        for name in ("calls", "done"):
            (tmp_path / "run" / name).unlink()


def test_two_first_calls_install_once(tmp_path):
    for name in ("run_all.sh", "requirements.txt", "train.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    bare = tmp_path / "bin" / "python3"  # a python3 without the packages, whose venv notes what it installs
    bare.parent.mkdir()
    bare.write_text(f"""#!/bin/sh
case "$*" in
    *find_spec*) exit 1 ;;
    "-m venv "*) mkdir -p "$3/bin"; printf '#!/bin/sh\\necho "$@" >>"$0.calls"; sleep 1\\n' >"$3/bin/python"
                 chmod +x "$3/bin/python" ;;
    *) exec {sys.executable} "$@" ;;
esac
""")
    bare.chmod(0o755)
    settings = os.environ | {"PATH": f"{bare.parent}:{os.environ['PATH']}"}
    settings.pop("PYTHON", None)
    both = [subprocess.Popen(["bash", tmp_path / "run_all.sh", "gpu-check"], env=settings) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    calls = (tmp_path / ".venv" / "bin" / "python.calls").read_text().splitlines()
    assert [("pip install" in line, "gpu_check" in line) for line in calls] == [(True, False), (False, True), (False, True)]


def test_mistakes(tmp_path):
    for words, more, naming in ((["dragons"], {}, "dragons is not a recipe"), (["folder"], {}, "ROOT"),
                                ([], {"ROOT": "many"}, "bash run_all.sh folder?"), (["mnist"], {"CAPTIONS": "x"}, "CAPTIONS"),
                                (["shapes", "--lr-g", "-1"], {}, "train.py: argument --lr-g"),
                                (["shapes", "--sise", "8"], {}, "train.py: --sise is no option"),
                                (["shapes", "--out", "x"], {}, "RUN="), (["folder", "--data=x"], {}, "DATA="),
                                (["shapes"], {"NUM": "few"}, "NUM=few"), (["shapes"], {"NUM": "1"}, "NUM=1"),
                                (["shapes"], {"RUN": "/proc/none/x"}, "RUN=/proc/none/x cannot be made")):
        done = call("bash", ROOT / "run_all.sh", *words, status=2, **environment(tmp_path) | more)
        assert naming in done.stderr and len(done.stderr.splitlines()) == 1
    done = call("bash", ROOT / "run_all.sh", "shapes", status=2, **environment(tmp_path) | {"PYTHON": "/bin/false"})
    assert "PYTHON=/bin/false" in done.stderr
    for words in (("shapes", "--epochs", "3", "--help"), ("shapes", "-h"), ("folder", "--help"), ("coco32", "--help"),
                  ("captions", "--help")):
        done = call("bash", ROOT / "run_all.sh", *words, **environment(tmp_path))  # train.py's
        assert "--batch-size" in done.stdout and "prepared" not in done.stdout
    assert not list(tmp_path.iterdir()), "before anything is made"
    Image.new("RGB", (64, 64)).save(tmp_path / "1.png")
    done = call("bash", ROOT / "run_all.sh", "folder", status=2, **environment(tmp_path) | {"ROOT": str(tmp_path)})
    assert "1 image" in done.stderr and len(done.stderr.splitlines()) == 1
    done = call("bash", ROOT / "run_all.sh", "folder", status=2, **environment(tmp_path) | {"ROOT": "/none", "DATA": str(tmp_path / "d")})
    assert "/none" in done.stderr and not list(tmp_path.glob("run*"))


RECIPES = re.findall(r"^    ([a-z0-9-]+)\)", (ROOT / "run_all.sh").read_text(), re.M)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r != "tests"])
def test_recipes_run_for_a_few_steps(recipe, shapes, tmp_path):
    """Each recipe's calls, read off the shell as it would run them, are accepted; its training runs on a small stand-in."""
    import prepare_data
    import train
    count = 20 if recipe in ("folder", "captioned", "anime64", "coco32") else 5000  # under the batch
    settings = environment(tmp_path) | {"PYTHON": stub_of_python(tmp_path, count=count)}
    settings |= {"ROOT": str(tmp_path)} if recipe != "shapes" else {}
    settings |= {"CAPTIONS": "captions.json"} if recipe.startswith("coco") else {}
    call("bash", ROOT / "run_all.sh", recipe, **settings)
    calls = [line.split() for line in (tmp_path / "run" / "calls").read_text().splitlines()]
    assert [os.path.basename(c[0]) for c in calls] == ["prepare_data.py", "train.py", "sample.py", "evaluate.py",
                                                      "evaluate.py"]
    assert calls[4][1:] == ["--compare", str(tmp_path)]
    assert prepare_data.parse_args(calls[0][1:]).out == settings["DATA"]
    args = train.parse_args(calls[1][1:])
    expected = {"mnist": (64, 25), "mnist-128": (128, 25), "anime64": (20, 100), "celeba64": (128, 200),
                "coco32": (20, 100), "coco64": (128, 40), "folder": (20, 80), "captioned": (20, 180)}
    if recipe in expected:
        assert (args.batch_size, args.epochs) == expected[recipe]
    if recipe == "folder":
        assert (args.arch, args.loss, args.r1, args.r2, args.diffaug) == ("sngan", "relativistic", 1, 1, 0.7)
    if recipe == "anime64":
        assert (args.lr_g, args.lr_d, args.schedule) == ("0.0002:1e-05", "0.0002:1e-05", "cosine")
        assert (args.real_label, args.fake_label) == (0.9, 0.1)
    data = shapes
    if recipe == "captions":
        data = tmp_path / "texts"
        call("prepare_data.py", "text", "--root", shapes / "captions.jsonl", "--out", data)
    burn_in = ("--burn-in", "256") if args.burn_in else ()
    call(*calls[1], "--data", data, "--width", "8", "--width-d", "8", "--batch-size", "16", "--max-steps", "4",
         "--log-every", "2", "--device", "cpu", *burn_in)
    assert [line["step"] for line in log_of(tmp_path / "run")] == [2, 4]


@pytest.mark.parametrize("recipe, asked, batch", [("folder", "32 auto 2", "30"), ("captions", "64 auto 1", "31")])
def test_what_is_less_than_a_batch_is_the_batch(recipe, asked, batch, tmp_path):
    settings = environment(tmp_path) | {"PYTHON": stub_of_python(tmp_path, asked, count=31), "ROOT": str(tmp_path)}
    assert f"the batch is {batch}" in call("bash", ROOT / "run_all.sh", recipe, **settings).stdout
    trained = (tmp_path / "run" / "calls").read_text().splitlines()[1].split()
    assert [b for a, b in zip(trained, trained[1:]) if a == "--batch-size"][-1] == batch


def test_options_of_a_recipe_may_be_undone(capsys):
    """What follows -- is the user's: options of the recipe that then have no effect go, those of the user are refused."""
    import train
    recipe = ("--data", "d", "--out", "r", "--real-label", "0.9", "--lr-g", "1:0.1", "--schedule", "linear",
              "--burn-in", "99", "--beta1", "0")
    args = train.parse_args([*recipe, "--", "--loss", "hinge", "--lr-g", "0.5", "--optimizer", "rmsprop"])
    assert (args.real_label, args.beta1, args.loss) == (1, 0.5, "hinge")
    assert (args.lr_g, args.schedule, args.burn_in) == (0.5, "constant", None)
    said = capsys.readouterr().err
    assert said.count("note: ") == 4 and "--real-label of the recipe is left out: it needs --loss bce or lsgan" in said
    with pytest.raises(SystemExit, match="2"):
        train.parse_args([*recipe, "--", "--loss", "hinge", "--real-label", "0.8"])


def test_coco_needs_its_captions(tmp_path):
    done = call("bash", ROOT / "run_all.sh", "coco32", status=2, **environment(tmp_path) | {"ROOT": str(tmp_path)})
    assert "CAPTIONS" in done.stderr and len(done.stderr.splitlines()) == 1
