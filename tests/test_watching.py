"""What people see: the progress line, trackers, the film, tables of runs, advice."""

import csv
import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, call, log_of, refused
from PIL import Image

import evaluate


def optional(name):
    """Skip without this package, except where the checks of record run."""
    if os.environ.get("CI") == "true":
        return __import__(name)
    return pytest.importorskip(name)


def test_progress_line(shapes, tmp_path):
    """On a terminal one line that rewrites itself; into a file plain lines, with the time left."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen([sys.executable, ROOT / "train.py", "--data", shapes, "--out", tmp_path / "a", *TINY,
                                "--epochs", "2"], stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    out, shown = process.communicate()[0], b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:
            break
    assert process.returncode == 0 and "step 4/" not in out
    line = shown.decode().replace("\n", "\r").rstrip("\r").split("\r")[-1].strip()
    last = log_of(tmp_path / "a")[-1]
    assert re.match(r"epoch 2\.0: +100% [\d.]+ images/s, 00:00 left, G [\d.-]+ D [\d.]+ right [\d.]+/[\d.]+$", line), line
    assert all(f"{last[k]:.3f}"[:4] in line for k in ("loss_g", "loss_d", "acc_real", "acc_fake"))
    assert len(line) < 80 and shown.count(b"\n") == 1
    done = call("train.py", "--data", shapes, "--out", tmp_path / "b", *TINY, "--epochs", "2")
    assert re.search(r"step 28/32  epoch 1\.75  loss_g .* images/s  00:0\d left\n", done.stdout) and "\r" not in done.stderr


@pytest.fixture(scope="module")
def tracked(shapes, tmp_path_factory):
    """A run with both trackers, interrupted after 12 steps (its log reaches further than its checkpoint), resumed."""
    optional("tensorboard"), optional("wandb")
    run = tmp_path_factory.mktemp("tracked") / "run"
    options = ("train.py", "--data", shapes, "--out", run, *TINY, "--tracker", "tensorboard", "--tracker", "wandb")
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    call(*options, "--max-steps", "12", **settings)
    (run / "checkpoint.pt").unlink()  # what is left is that of step 8
    call(*options, "--max-steps", "16", **settings)
    code = "import evaluate as e, json, sys; from pathlib import Path; run = Path(sys.argv[1]); " \
           "e.track(run, e.read_json(run / 'config.json'), {'fid': {'value': 12.5}, 'warnings': [], 'samples': {'step': 12}})"
    call(sys.executable, "-c", code, run, cwd=ROOT, **settings)
    return run


@pytest.mark.parametrize("error, said", [
    (ConnectionError("gone"), "note: not sent to --tracker wandb: ConnectionError: gone"), (SystemExit(2), "")])
def test_figures_that_a_tracker_does_not_take(error, said, tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise error
    monkeypatch.setattr(evaluate, "Trackers", refuse)
    monkeypatch.setattr(evaluate, "read_status", lambda run: {"step": 1})
    evaluate.track(tmp_path, {"options": {"tracker": ["wandb"]}}, {"fid": {"value": 1.0}})
    assert capsys.readouterr().err.strip() == said


def test_tensorboard(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tracked / "tensorboard"))
    events.Reload()
    expected = [(line["step"], pytest.approx(line["loss_d"])) for line in log_of(tracked)]
    assert [(e.step, e.value) for e in events.Scalars("loss_d")] == expected and len(expected) == 4
    assert [e.step for e in events.Images("grid")] == [0, 8, 16]
    assert [(e.step, e.value) for e in events.Scalars("evaluate/fid")] == [(12, 12.5)], "of the generator"
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"batch_size": 16' in config


def records_of(data):
    """What a .wandb file holds: LevelDB's log, blocks of 32 KiB after a header of 7 bytes that counts as part of them."""
    place, record = 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4:place + 7])
        record += data[place + 7:place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb(tracked):
    from wandb.proto import wandb_internal_pb2 as proto
    runs, history, summary, configs = set(), [], {}, []
    for path in sorted(tracked.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime):
        for data in records_of(path.read_bytes()):
            record = proto.Record.FromString(data)
            if record.HasField("run"):
                runs.add(record.run.run_id)
                configs += [{item.key: item.value_json for item in record.run.config.update}]
            history += [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                        ] if record.HasField("history") else []
            summary |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.summary.update}
    assert runs == {json.loads((tracked / "config.json").read_text())["run_id"]}, "resumed, it is the same run"
    assert json.loads(configs[0]["options"])["batch_size"] == 16
    losses = {row["step"]: row["loss_d"] for row in history if "loss_d" in row}
    assert losses == {line["step"]: pytest.approx(line["loss_d"]) for line in log_of(tracked)}
    assert any("grid" in row for row in history)
    assert summary["evaluate/fid"] == 12.5


def test_missing_tracker_is_one_line(shapes, tmp_path):
    code = "import importlib.util, train; importlib.util.find_spec = lambda name: None; train.main()"
    done = call(sys.executable, "-c", code, "--data", shapes, "--out", tmp_path / "r", "--tracker", "wandb", status=2, cwd=ROOT)
    assert "pip install wandb" in done.stderr and len(done.stderr.splitlines()) == 1 and not (tmp_path / "r").exists()


def test_tracker_that_fails_leaves_the_run(trained, shapes, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "tensorboard").touch()
    kept = [path for path in run.rglob("*") if path.is_file() and path.name != "lock"]
    before = [path.read_bytes() for path in kept]
    refused("train.py", "--data", shapes, "--out", run, *TINY, "--resume", "never", "--tracker", "tensorboard", naming="--tracker")
    assert [path.read_bytes() for path in kept] == before


def test_film(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.copy(run / "grids" / "latest.png", run / "grids" / "step_0000002 (1).png")
    assert "7 grids" in call("sample.py", "--film", run).stdout
    film = Image.open(run / "film.webp")
    assert film.size == (512, 526)
    durations = []
    for i in range(film.n_frames):
        film.seek(i)
        film.load()
        durations.append(film.info["duration"])
    assert 4 <= film.n_frames <= 7 and durations[-1] == 2000
    grid = np.asarray(Image.open(run / "grids" / "latest.png").convert("RGB"), int)
    assert np.abs(np.asarray(film.convert("RGB"), int)[:512:4, ::4] - grid).mean() < 12, "the last frame is the last grid"
    refused("sample.py", "--film", tmp_path, naming=["--film", "0 grids"])
    refused("sample.py", naming="--run")


def test_comparison(trained, tmp_path):
    runs = tmp_path / "runs"
    for name, more in (("one", {}), ("two", {"lr_g": 0.01}), ("a|b<i>", {})):
        run = shutil.copytree(trained, runs / name)
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | {"options": config["options"] | {"out": name} | more}))
    metrics = {"fid": {"value": 12.345, "n_generated": 40, "n_real": 60}, "warnings": []}
    for name, n in (("one", 40), ("two", 50), ("a|b<i>", 40)):
        other = {"fid": metrics["fid"] | {"n_real": n}, "warnings": []}
        (runs / name / "metrics.json").write_text(json.dumps(other))
    log = log_of(trained)
    (runs / "two" / "fid.jsonl").write_text("".join(json.dumps({"step": line["step"], "fid": 50.0}) + "\n" for line in log))
    minutes = np.cumsum([line["ms_per_step"] * (line["step"] - before) for line, before in zip(
        log, [0] + [line["step"] for line in log])]) / 60_000
    assert np.allclose(evaluate.fid_by_minute(runs / "two"), [(minute, 50) for minute in minutes])
    for name, text in (("foreign", "{}"), ("damaged", "{")):
        (runs / name).mkdir()
        (runs / name / "config.json").write_text(text)
    assert "3 runs; what differs: --lr-g" in call("evaluate.py", "--compare", runs).stdout
    rows = list(csv.DictReader((runs / "comparison.csv").open()))
    assert [Path(row["run"]).name for row in rows] == ["a|b<i>", "one", "two"]
    assert [row["differs from most"] for row in rows] == ["", "", "--lr-g 0.01"]
    assert [rows[1][k] for k in ("FID", "generated", "real")] == ["12.35", "40", "40"]
    assert [row["not comparable"] for row in rows] == ["", "", "other n"]
    last = log_of(trained)[-1]
    assert (rows[0]["loss G"], rows[0]["epochs"]) == (f"{last['loss_g']:.3f}", "3.0")
    table = (runs / "comparison.md").read_text().splitlines()
    assert len(table) == 5 and len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    page = (runs / "comparison.html").read_text()
    assert page.count("data:image/png;base64") == 4 and "<i>" not in page  # a grid each, and one's FID by minute
    said = call("evaluate.py", "--compare", runs / "one", runs / "two", runs / "too", runs / "comparison.md", "--out",
                tmp_path / "pair").stderr
    assert said.splitlines() == [f"note: {runs / 'too'} is left out, no run of train.py"]
    rows = list(csv.DictReader((tmp_path / "pair.csv").open()))
    assert [row["differs from most"] for row in rows] == ["--lr-g 0.0002", "--lr-g 0.01"]
    refused("evaluate.py", "--compare", tmp_path, naming=["--compare", "config.json"])
    # the same run against other real images: a row of its own, said to be of another reference
    (runs / "one" / "metrics-faces.json").write_text(json.dumps(json.loads((runs / "one" / "metrics.json").read_text())
                                                               | {"reference": "data/faces"}))
    call("evaluate.py", "--compare", runs, "--out", tmp_path / "more")
    rows = list(csv.DictReader((tmp_path / "more.csv").open()))
    own = json.loads((runs / "one" / "config.json").read_text())["data"]
    assert [row["against"] for row in rows] == [f"shapes {own['fingerprint'][:8]}"] * 2 + ["data/faces"] + [rows[0]["against"]]
    assert [row["not comparable"] for row in rows] == ["", "", "other reference", "other n"]
    # an option that older runs lack, and images that were drawn in another way
    (runs / "one" / "metrics-faces.json").unlink()
    for name, change, samples in (("one", None, {"truncation": None}), ("two", 10.0, {"truncation": 0.5}), ("a|b<i>", 0.0, {})):
        config, metrics = (json.loads((runs / name / f"{file}.json").read_text()) for file in ("config", "metrics"))
        del config["options"]["detail"]
        config["options"] |= {"lr_g": 0.1} | ({"detail": change} if change is not None else {})
        metrics["fid"]["n_real"] = 60
        (runs / name / "config.json").write_text(json.dumps(config))
        (runs / name / "metrics.json").write_text(json.dumps(metrics | {"samples": samples}))
    assert "what differs: --detail" in call("evaluate.py", "--compare", runs).stdout
    rows = list(csv.DictReader((runs / "comparison.csv").open()))
    assert [row["differs from most"] for row in rows] == ["", "", "--detail 10.0"]
    assert [row["not comparable"] for row in rows] == ["", "", "other truncation"]


SORTED = """<script>
const column = name => [...document.querySelectorAll("th")].findIndex(head => head.textContent == name);
const seen = name => [...document.querySelectorAll("tr")].slice(1).filter(row => !row.hidden).map(
    row => row.cells[column(name)].textContent);
const result = [];
for (let i = 0; i < 2; i++) {
    document.querySelectorAll("th")[column("FID")].querySelector("button").click();
    result.push(seen("FID"));
}
const search = document.querySelector("input[type=search]");
search.value = "RUNS/1 finished";
search.dispatchEvent(new Event("input"));
document.title = JSON.stringify([...result, seen("lr G")]);
</script>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs the program chromium")
def test_comparison_sorts_and_filters_in_a_browser(trained, tmp_path):
    for i, fid in enumerate([100, 20.5, None, 3]):
        run = shutil.copytree(trained, tmp_path / "runs" / str(i))
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | {"options": config["options"] | {"lr_g": i / 100}}))
        if fid:
            (run / "metrics.json").write_text(json.dumps({"fid": {"value": fid, "n_generated": 9, "n_real": 9}}))
    call("evaluate.py", "--compare", tmp_path / "runs")
    page = tmp_path / "runs" / "comparison.html"
    page.write_text(page.read_text().replace("</html>", SORTED + "</html>"))
    done = call("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page)
    up, down, found = json.loads(re.search("<title>(.*)</title>", done.stdout)[1])
    assert up == ["3.00", "20.50", "100.00", ""] and down == ["100.00", "20.50", "3.00", ""] and found == ["0.01"]


@pytest.mark.parametrize("script, typed, meant", [
    ("prepare_data.py", ("shapes", "--out", "x", "--sise", "3"), "--size"),
    ("train.py", ("--data", "x", "--out", "y", "--bach-size", "3"), "--batch-size"),
    ("sample.py", ("--run", "x", "--temprature", "3"), "--temperature"),
    ("train.py", ("--data", "x", "--output", "3"), "--out"), ("evaluate.py", ("--run", "x", "--flor"), "--floor")])
def test_mistyped_option(script, typed, meant):
    refused(script, *typed, naming=[typed[-2] if typed[-1] == "3" else typed[-1], f"did you mean {meant}?"])
    assert len(re.findall(rf"^    python {script} ", call(script, "--help").stdout, re.M)) >= 2, "two examples"


def test_a_stranger_is_likened_to_no_option():
    said = call("sample.py", "--run", "x", "--caption", "a", status=2).stderr
    assert "--caption is no option" in said and "did you mean" not in said


@pytest.mark.parametrize("script", ["prepare_data.py", "train.py", "sample.py", "evaluate.py"])
def test_missing_packages_are_named_in_a_line(script):
    done = call(sys.executable, "-S", ROOT / script, status=2)  # without site-packages
    assert re.fullmatch(rf"{script}: .*tqdm.* not installed: pip install -r requirements.txt\n", done.stderr), done.stderr


def test_out_of_memory_says_what_to_try(shapes, tmp_path):
    code = ("import torch, train\ndef full(*args): raise torch.OutOfMemoryError('CUDA out of memory')\n"
            "train.train_step = full\ntrain.main()")
    done = call(sys.executable, "-c", code, "--data", shapes, "--out", tmp_path, *TINY, "--amp", "off", status=1, cwd=ROOT)
    assert len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in ("out of memory", "--batch-size 8", "--grad-accum 2", "--amp bf16"))
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


def test_changed_options_and_unfinished_runs_in_the_report(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    assert config["changed"]["width"] == 8 and config["changed"]["condition"] == "label"
    assert "lr_g" not in config["changed"] and "depth" not in config["changed"]
    evaluate.write_report(run, run / "report.html", {"warnings": []}, config, [("Pictures", [(np.zeros((8, 16, 3), np.uint8), "<sample>")])])
    page = (run / "report.html").read_text()
    changed = page[page.index("Options that differ"):page.index("The others")]
    assert "--width" in changed and "--lr-g" not in changed and "&lt;sample&gt;" in page
    assert "48 of 48 steps" in page and config["hardware"]["platform"] in page
