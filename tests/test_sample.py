"""sample.py: images that depend on (seed, number) alone, from generator.pt alone."""

import base64
import html
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, call, refused
from PIL import Image

import sample


@pytest.fixture(scope="module")
def generator(trained, tmp_path_factory):
    """A folder with generator.pt and nothing else."""
    folder = tmp_path_factory.mktemp("only")
    shutil.copy(trained / "generator.pt", folder)
    return folder


def pixels(folder):
    return {p.name: np.asarray(Image.open(p)) for p in folder.iterdir()}


def test_image_depends_on_seed_and_number_alone(generator, tmp_path):
    call("sample.py", "--run", generator, "--num", "70", "--device", "cpu")
    images = pixels(generator / "images")
    assert sorted(images) == [f"{i:06d}.png" for i in range(70)]
    assert images["000000.png"].shape == (16, 16, 3)
    call("sample.py", "--run", generator / "generator.pt", "--num", "5", "--out", tmp_path / "few", "--device", "cpu")
    assert all(np.array_equal(image, images[name]) for name, image in pixels(tmp_path / "few").items())
    call("sample.py", "--run", generator, "--num", "70", "--out", tmp_path / "all.npz", "--device", "cpu")
    packed = np.load(tmp_path / "all.npz")["images"]
    assert packed.dtype == np.uint8 and all(np.array_equal(packed[i], images[f"{i:06d}.png"]) for i in range(70))
    call("sample.py", "--run", generator, "--num", "5", "--out", tmp_path / "few", "--seed", "1", "--device", "cpu")
    assert not np.array_equal(pixels(tmp_path / "few")["000003.png"], images["000003.png"])
    assert "already" in call("sample.py", "--run", generator, "--num", "70", "--device", "cpu").stdout
    assert "3 images of step 48, instead of 70 others" in call("sample.py", "--run", generator, "--num", "3", "--device", "cpu").stdout

    refused("sample.py", "--run", generator, "--num", "0", naming="--num 0")
    refused("sample.py", "--run", generator, "--export", "", naming="--export is empty")
    assert "1 image of step 48" in call("sample.py", "--run", generator, "--at", "0.5,0.5", "--device", "cpu").stdout


def test_pictures(generator, tmp_path):
    said = call("sample.py", "--run", generator, "--num", "0", "--grid", "9", "--interpolate", "3", "--labels", "red circle",
                "--device", "cpu").stdout
    assert said.endswith("interpolation.webp: 3 latents and between, of 'red circle'\n")
    assert Image.open(generator / "grid.png").size == (48, 48)
    animation = Image.open(generator / "interpolation.webp")
    frames, shown = [], 0
    for i in range(animation.n_frames):  # the encoder joins frames that are alike
        animation.seek(i)
        frames.append(np.asarray(animation.convert("RGB"), int))
        shown += animation.info["duration"]
    assert animation.size == (256, 256) and shown == 3 * sample.FRAMES * (1000 // sample.FRAMES)
    moves = [np.abs(a - b).mean() for a, b in zip(frames, frames[1:] + frames[:1])]
    assert 0 < max(moves) < 40, "small steps, and back to the start"


@pytest.fixture(scope="module")
def captioned(shapes, tmp_path_factory):
    """RUN of a generator of captions."""
    run = tmp_path_factory.mktemp("captioned") / "run"
    call("train.py", "--data", shapes, "--out", run, "--condition", "text", "--arch", "resnet", "--loss", "relativistic",
         "--mismatch-weight", "0.3", "--attention", "--cond-augment", "0.1", "--max-steps", "60", *TINY)
    return run


def test_data_of_another_text_encoder_is_refused(captioned, shapes, tmp_path):
    data = shutil.copytree(shapes, tmp_path / "data")
    meta = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps(meta | {"text_encoder": "another"}))
    refused("sample.py", "--run", captioned, "--data", data, naming=["--data", "--text-encoder"])


def test_text(captioned, tmp_path):
    told = ["a large red circle on a black background", "a small blue star on a white background"]
    (tmp_path / "lines.txt").write_text(f"{told[1]}\n\n")
    done = call("sample.py", "--run", captioned, "--num", "4", "--text", told[0], "--text-file", tmp_path / "lines.txt",
                "--out", tmp_path / "a.npz")
    assert not done.stderr
    assert [json.loads(line)["caption"] for line in open(tmp_path / "a.npz.jsonl")] == told * 2
    call("sample.py", "--run", captioned, "--num", "4", "--text", told[1], "--out", tmp_path / "b.npz")
    a, b = (np.load(tmp_path / name)["images"] for name in ("a.npz", "b.npz"))
    assert np.array_equal(a[1::2], b[1::2]) and not np.array_equal(a[0], b[0])
    call("sample.py", "--run", captioned, "--text", told[0], "--text", told[1], "--out", tmp_path / "all.npz")
    assert len(np.load(tmp_path / "all.npz")["images"]) == 2, "each caption once"
    (tmp_path / "lines.txt").write_text(f"{told[0]}\n")
    again = ("sample.py", "--run", captioned, "--num", "4", "--text", told[0], "--text-file", tmp_path / "lines.txt", "--out",
             tmp_path / "a.npz")
    assert "already" not in call(*again).stdout, "another file's lines are other captions"
    assert "already" in call(*again).stdout
    (tmp_path / "a.npz.jsonl").unlink()
    assert "already" not in call(*again).stdout and (tmp_path / "a.npz.jsonl").exists()
    warned = call("sample.py", "--run", captioned, "--num", "1", "--text", told[0], "--text", told[1], "--out", tmp_path / "c.npz")
    assert warned.stderr.strip() == "sample.py: --num 1 leaves out 1 of 2 captions"
    (tmp_path / "lines.txt").write_text(f"{told[1]}\n\nzyx\n")
    refused("sample.py", "--run", captioned, "--text-file", tmp_path / "lines.txt", naming=["lines.txt, line 3", "zyx"])
    (tmp_path / "lines.txt").write_bytes(b"a red circle\ncaf\xe9\n")
    refused("sample.py", "--run", captioned, "--text-file", tmp_path / "lines.txt", naming=["lines.txt", "line 2 is not UTF-8"])
    warned = call("sample.py", "--run", captioned, "--num", "1", "--text", "a Purple cow", "--out", tmp_path / "c.npz")
    assert warned.stderr.strip() == "sample.py: not in the training captions: cow"
    refused("sample.py", "--run", captioned, "--text-file", tmp_path / "none.txt", naming="--text-file")


def test_captions_of_the_data(captioned, shapes, tmp_path):
    call("sample.py", "--run", captioned, "--num", "300", "--grid", "9", "--out", tmp_path / "a.npz")
    notes = [json.loads(line) for line in open(tmp_path / "a.npz.jsonl")]
    captions = [json.loads(line)["captions"] for line in open(shapes / "captions.jsonl")]
    assert sorted(note["row"] for note in notes[:256]) == list(range(256)), "each image's caption before any other of its"
    assert all(note["caption"] == captions[note["row"]][i // 256] for i, note in enumerate(notes))
    assert Image.open(tmp_path / "a-captions.png").size == (864, 450) and not (captioned / "captions.png").exists()
    call("sample.py", "--run", captioned, "--num", "5", "--out", tmp_path / "b.npz", "--data", shapes)
    assert np.array_equal(np.load(tmp_path / "b.npz")["images"], np.load(tmp_path / "a.npz")["images"][:5])
    (tmp_path / "only").mkdir()
    shutil.copy(captioned / "generator.pt", tmp_path / "only")
    refused("sample.py", "--run", tmp_path / "only", naming=["--data", "--text"])


def test_held_out_captions(generator, captioned, shapes, tmp_path):
    refused("sample.py", "--run", captioned, "--held-out", "--out", tmp_path / "a.npz", naming=["--held-out", "--holdout"])
    refused("sample.py", "--run", generator, "--held-out", naming="--held-out: this generator was trained without captions")
    refused("sample.py", "--run", captioned, "--held-out", "--data", shapes, "--text", "a star", naming="--held-out")
    data, run = tmp_path / "data", tmp_path / "run"
    call("prepare_data.py", "shapes", "--size", "16", "--num", "100", "--holdout", "0.2", "--out", data)
    call("train.py", "--data", data, "--out", run, "--condition", "text", "--max-steps", "2", *TINY)
    call("sample.py", "--run", run, "--num", "30", "--held-out", "--grid", "4")
    notes = [json.loads(line) for line in open(run / "images.jsonl")]
    captions = [json.loads(line)["captions"] for line in open(data / "held_out_captions.jsonl")]
    assert sorted(note["row"] for note in notes[:20]) == list(range(20))
    assert all(note["caption"] == captions[note["row"]][i // 20] for i, note in enumerate(notes))
    assert json.loads((run / "images.json").read_text())["held_out"] is True
    before = (run / "images" / "000000.png").read_bytes()
    call("sample.py", "--run", run, "--num", "30")
    assert json.loads((run / "images.json").read_text())["held_out"] is False
    assert (run / "images" / "000000.png").read_bytes() != before
    call("train.py", "--data", data, "--out", run, "--condition", "text", "--max-steps", "3", *TINY)
    assert "30 images of step 3" in call("sample.py", "--run", run, "--num", "30").stdout, "another generator's are drawn anew"


def test_labels(generator, tmp_path):
    saved = torch.load(generator / "generator.pt", weights_only=True)
    first, second = saved["classes"][:2]
    call("sample.py", "--run", generator, "--num", "4", "--labels", f"{first},1", "--out", tmp_path / "a", "--device", "cpu")
    call("sample.py", "--run", generator, "--num", "4", "--labels", f"0,{second},", "--out", tmp_path / "b", "--device", "cpu")
    call("sample.py", "--run", generator, "--num", "4", "--labels", "0", "--out", tmp_path / "c", "--device", "cpu")
    a, b, c = (pixels(tmp_path / name) for name in "abc")
    assert all(np.array_equal(a[n], b[n]) for n in a)
    assert np.array_equal(a["000002.png"], c["000002.png"]) and not np.array_equal(a["000001.png"], c["000001.png"])
    refused("sample.py", "--run", generator, "--labels", "dragon", naming=["--labels", "dragon", "red circle"])
    refused("sample.py", "--run", generator, "--num", "1000001", naming=["--num 1000001", ".npz"])


def test_classes_are_drawn_as_often_as_they_are_there():
    saved = {"classes": ["a", "b", "c"], "class_counts": [300, 0, 100]}
    conditions, note = sample.label_conditions(SimpleNamespace(seed=0, labels=None, num=2000), saved)
    labels = conditions(range(2000))
    assert np.bincount(labels, minlength=3) / 2000 == pytest.approx([0.75, 0, 0.25], abs=0.03)
    assert note(0)["label"] == saved["classes"][labels[0]]


def test_numbers_that_are_names():
    assert sample.parse_labels("10, 0", ["0", "1", "10"]) == [2, 0] and sample.parse_labels("1", ["a", "b"]) == [1]
    assert sample.parse_labels("2,3", ["1", "2,3"]) == [1]
    with pytest.raises(SystemExit):  # the third class, or one that is not there
        sample.parse_labels("2", ["0", "1", "10"])


def test_truncation_and_walk():
    z = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    cut = sample.truncated(z, 0.7)
    assert cut.abs().max() <= 0.7 and torch.equal(cut.argsort(), z.argsort())
    inside = torch.distributions.Normal(0, 1).sample((400_000,))
    inside = inside[inside.abs() < 0.7]
    assert cut.std() == pytest.approx(inside.std().item(), rel=0.02)
    a, b = torch.randn(100), torch.randn(100)
    a, b = a / a.norm(), b / b.norm()
    middle = sample.slerp(a, b, 0.5)
    assert middle.norm().item() == pytest.approx(1, abs=1e-5) and torch.allclose(middle @ a, middle @ b, atol=1e-5)
    assert torch.allclose(sample.slerp(a, b, 0.0), a) and torch.allclose(sample.slerp(a, b, 1.0), b, atol=1e-6)


def test_refusals(generator, tmp_path, capsys):
    refused("sample.py", "--run", tmp_path / "none", naming=["--run", "none"])
    (tmp_path / "generator.pt").write_bytes(b"nonsense")
    refused("sample.py", "--run", tmp_path, naming=["--run", "generator.pt"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    refused("sample.py", "--run", generator, "--out", tmp_path / "mine", naming="--out")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    for out in (".", "..", "/", "", "x.png", "x.npy"):
        refused("sample.py", "--run", generator, "--num", "2", "--out", out, naming="--out", cwd=tmp_path)
    refused("sample.py", "--run", generator, "--num", "2", "--data", tmp_path, naming="--data")
    refused("sample.py", "--run", generator, "--num", "-1", naming="--num")
    refused("sample.py", "--run", generator, "--truncation", "0", naming="--truncation")
    with pytest.raises(SystemExit, match="2"):
        sample.parse_args(["--film", str(tmp_path), "--num", "5"])
    assert "--num needs --run" in capsys.readouterr().err
    refused("sample.py", "--run", generator, "--temperature", "2", naming=["--temperature", "images"])
    refused("sample.py", "--run", generator / "best.pt", naming=["best.pt", "--fid-every"])


def test_nothing_is_replaced_but_what_it_wrote(generator, captioned, tmp_path):
    mine = tmp_path / "pictures"
    mine.mkdir()
    for i in range(3):
        Image.new("RGB", (4, 4), "red").save(mine / f"{i:06d}.png")
    before = {p.name: p.read_bytes() for p in mine.iterdir()}
    refused("sample.py", "--run", generator, "--num", "2", "--out", mine, naming=["000000.png", "--out"])
    (tmp_path / "new-grid.png").write_bytes(b"mine")
    refused("sample.py", "--run", generator, "--num", "2", "--grid", "--out", tmp_path / "new", naming="grid.png")
    for run, name, *asked in ((generator, "walk-interpolation.webp", "--interpolate", "2"),
                              (captioned, "walk-captions.png", "--grid")):
        (tmp_path / name).write_bytes(b"mine")
        refused("sample.py", "--run", run, "--num", "2", "--out", tmp_path / "walk", *asked, naming=name)
        assert (tmp_path / name).read_bytes() == b"mine" and not (tmp_path / "walk").exists()
        (tmp_path / name).unlink()
    for name in ("notes.json", "notes.jsonl"):
        (tmp_path / name).write_bytes(b"mine")
        refused("sample.py", "--run", generator, "--num", "2", "--out", tmp_path / "notes", naming=name)
        (tmp_path / name).unlink()
    (tmp_path / "mine.npz").write_bytes(b"mine")
    refused("sample.py", "--run", generator, "--num", "2", "--out", tmp_path / "mine.npz", naming="mine.npz")
    assert {p.name: p.read_bytes() for p in mine.iterdir()} == before and not (tmp_path / "new").exists()
    assert (tmp_path / "new-grid.png").read_bytes() == (tmp_path / "mine.npz").read_bytes() == b"mine"


def test_what_it_wrote_is_replaced_and_what_was_changed_is_not(generator, tmp_path):
    real = tmp_path / "disk"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    call("sample.py", "--run", generator, "--num", "3", "--out", tmp_path / "link", "--grid")
    assert len(list(real.iterdir())) == 3 and (tmp_path / "link").is_symlink()
    call("sample.py", "--run", generator, "--num", "2", "--seed", "1", "--out", tmp_path / "link", "--grid")
    call("sha256sum", "-c", "--quiet", "sample.sha256", cwd=tmp_path)
    assert sorted(p.name for p in real.iterdir()) == ["000000.png", "000001.png"] and (tmp_path / "link").is_symlink()
    (real / "000001.png").unlink()
    said = call("sample.py", "--run", generator, "--num", "2", "--seed", "1", "--out", tmp_path / "link").stdout
    assert "already" not in said and (real / "000001.png").exists(), "it holds them all only when it does"
    call("sample.py", "--run", generator, "--num", "2", "--out", tmp_path / "cut-0.5", "--truncation", "0.5", "--grid")
    assert (tmp_path / "cut-0.5-grid.png").exists()
    one, other = sample.Written(tmp_path), sample.Written(tmp_path)
    for written, name in ((one, "one"), (other, "other")):
        written.write(tmp_path / name, name)
    assert all(sample.Written(tmp_path).holds(tmp_path / name) for name in ("one", "other")), "of two calls at once"
    with open(tmp_path / "sample.sha256", "a") as file:  # as an editor leaves it
        file.write("\n")
    for _ in range(2):  # where the locale knows no such letter
        call(sys.executable, ROOT / "sample.py", "--run", generator, "--num", "2", "--out", tmp_path / "\u00fc",
             PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="C")
    (real / "000001.png").write_bytes(b"painted over")
    refused("sample.py", "--run", generator, "--num", "2", "--out", tmp_path / "link", naming="000001.png")


def test_texts_without_a_known_word_are_not_drawn(captioned, tmp_path):
    for text in ("🐱", "!!!", "zyx", ""):
        refused("sample.py", "--run", captioned, "--num", "1", "--text", text, "--out", tmp_path / "a.npz", naming="--text")
    (tmp_path / "t16.txt").write_bytes("a red circle".encode("utf-16-le"))
    refused("sample.py", "--run", captioned, "--num", "1", "--text-file", tmp_path / "t16.txt", "--out", tmp_path / "a.npz",
            naming="--text-file")
    assert not (tmp_path / "a.npz").exists()


LOADED = """
import json, sys, torch
files = {"about.json": ""}
program = torch.export.load(sys.argv[1], extra_files=files)
z, labels, known = torch.load(sys.argv[2])
assert json.loads(files["about.json"])["classes"] == known
torch.save(program.module()(z=z, condition=labels), sys.argv[2])
"""


def test_exported_generator_draws_the_same_images_by_torch_alone(generator, tmp_path):
    call("sample.py", "--run", generator, "--num", "3", "--out", tmp_path / "own.npz", "--labels", "2,0,1", "--device", "cpu")
    own, out = np.load(tmp_path / "own.npz")["images"], tmp_path / "generator.pt2"
    assert "(z, condition) ->" in call("sample.py", "--run", generator, "--export", out).stdout
    _, saved = sample.load_generator(generator / "generator.pt")
    z, labels = sample.latents(0, range(3), saved["model"]["latent_dim"]), torch.tensor([2, 0, 1])
    torch.save((z, labels, saved["classes"]), tmp_path / "io.pt")
    subprocess.run([sys.executable, "-c", LOADED, out, tmp_path / "io.pt"], cwd=tmp_path, check=True)
    drawn = torch.load(tmp_path / "io.pt").numpy()
    assert drawn.shape == own.shape and np.abs(drawn * 255 - own).max() <= 0.5 + 255e-4
    out.write_bytes(b"mine")
    refused("sample.py", "--run", generator, "--export", out, naming="not as sample.py wrote it")


def test_exported_onnx_takes_captions_of_any_length(captioned, tmp_path):
    out = tmp_path / "generator.onnx"
    call("sample.py", "--run", captioned, "--export", out)
    session = pytest.importorskip("onnxruntime").InferenceSession(out)
    generator, saved = sample.load_generator(captioned / "generator.pt")
    about = json.loads(session.get_modelmeta().custom_metadata_map["about"])
    assert about["vocabulary"] == saved["vocabulary"] and about["noise_dim"] == generator.noise_dim
    for n, length in (1, 1), (4, 12):
        z, ids = torch.randn(n, generator.noise_dim), torch.randint(len(saved["vocabulary"]), (n, length))
        want = sample.Drawing(generator, saved["dial"])(z, ids)
        drawn, = session.run(None, {"z": z.numpy(), "condition": ids.numpy()})
        assert np.allclose(drawn, want, atol=1e-4)


def test_an_export_that_draws_other_images_is_not_written(generator, tmp_path, monkeypatch, capsys):
    export = sample.export_pt2

    def another(program, about):
        data, draw = export(program, about)
        return data, lambda inputs: draw(inputs) + 0.01
    monkeypatch.setattr(sample, "export_pt2", another)
    with pytest.raises(SystemExit, match="1"):
        sample.export(tmp_path / "g.pt2", *sample.load_generator(generator / "generator.pt"))
    assert "not written, its images differ from the generator's by 0.01" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["generator.pth", "missing/generator.pt2", "generator.zip"])
def test_export_refuses_other_names(generator, tmp_path, name):
    refused("sample.py", "--run", generator, "--export", tmp_path / name, naming="ends in .pt2 or .onnx")
    assert not list(tmp_path.rglob("*"))


def test_explore_page_shows_what_its_command_draws(generator, tmp_path):
    call("sample.py", "--run", generator, "--explore", "--labels", "2,0", "--seed", "3", "--device", "cpu")
    text = (generator / "explore.html").read_text()
    assert "http" not in text, "it needs no network"
    page = json.loads(re.search("const page = (.*);", text)[1])
    classes = sample.load_generator(generator / "generator.pt")[1]["classes"]
    assert [row["name"] for row in page["rows"]] == [classes[2], classes[0]]
    x, y, level, row = 5, 2, 2, page["rows"][1]
    command = [*shlex.split(row["command"])[1:], "--at", f"{x / 8},{y / 8}", "--truncation", page["levels"][level], "--device", "cpu"]
    call(*command)
    drawn, = pixels(generator / "point").values()
    sheet = Image.open(io.BytesIO(base64.b64decode(row["sheets"][level].split(",")[1])))
    shown = np.asarray(sheet.convert("RGB"))[16 * y:16 * y + 16, 16 * x:16 * x + 16]
    assert np.array_equal(drawn, shown)
    corner = call("sample.py", "--run", generator, "--num", "1", "--seed", "3", "--labels", "2", "--out", tmp_path / "own.npz")
    sheet = Image.open(io.BytesIO(base64.b64decode(page["rows"][0]["sheets"][0].split(",")[1])))
    assert np.array_equal(np.asarray(sheet.convert("RGB"))[:16, :16], np.load(tmp_path / "own.npz")["images"][0]), corner.stdout


def test_explore_page_of_captions_and_its_refusals(captioned, generator):
    call("sample.py", "--run", captioned, "--explore", "--text", "a </script> small 'red' circle", "--device", "cpu")
    text = (captioned / "explore.html").read_text()
    page = json.loads(re.search("const page = (.*);", text)[1])
    assert text.count("</script>") == 1 and [row["name"] for row in page["rows"]] == ["a </script> small 'red' circle"]
    call(*shlex.split(page["rows"][0]["command"])[1:], "--at", "0,1", "--device", "cpu")
    call("sample.py", "--run", captioned, "--explore", "--seed", "2", "--device", "cpu")
    page = json.loads(re.search("const page = (.*);", (captioned / "explore.html").read_text())[1])
    assert len(page["rows"]) == sample.ROWS
    for row in page["rows"][:3]:  # captions of the data: as drawn for --text
        call(*shlex.split(row["command"])[1:], "--at", "0,1", "--device", "cpu")
        sheet = Image.open(io.BytesIO(base64.b64decode(row["sheets"][0].split(",")[1])))
        assert np.array_equal(np.asarray(sheet.convert("RGB"))[128:, :16], *pixels(captioned / "point").values())
    refused("sample.py", "--run", generator, "--explore", "--num", "3", naming="--explore does not go with --num")
    refused("sample.py", "--run", generator, "--at", "0.5", naming="--at")
    refused("sample.py", "--run", generator, "--at", "0.5,2", naming=["--at", "between 0 and 1"])
    refused("sample.py", "--run", generator, "--explore", "--text", "a star", naming="--text")


PLAYED = """<script>
const key = name => $("plane").dispatchEvent(new KeyboardEvent("keydown", {key: name, cancelable: true}));
const before = $("large").style.backgroundPosition;
key("ArrowLeft"), key("ArrowUp");
const keyed = $("large").style.backgroundPosition;
const box = $("plane").getBoundingClientRect();
const pointer = (kind, more) => $("plane").dispatchEvent(new PointerEvent(kind, more));
pointer("pointermove", {clientX: box.left + 1, clientY: box.bottom - 1});
const pointed = $("large").style.backgroundPosition;
pointer("pointerleave", {});
const left = $("large").style.backgroundPosition;
pointer("pointerdown", {clientX: box.right - 1, clientY: box.top + 1, buttons: 1});
pointer("pointermove", {clientX: box.left + 1, clientY: box.bottom - 1});
pointer("pointerleave", {});
const sheet = $("large").style.backgroundImage;
document.querySelectorAll("input[type=radio]")[1].click();
$("level").value = 3;
$("level").dispatchEvent(new Event("input"));
document.title = JSON.stringify([before, keyed, pointed, left, sheet != $("large").style.backgroundImage, $("command").textContent,
                                 document.documentElement.scrollWidth <= innerWidth]);
</script>"""


def test_explore_page_without_conditions(shapes, tmp_path):
    call("train.py", "--data", shapes, "--out", tmp_path / "run", "--max-steps", "2", *TINY)
    call("sample.py", "--run", tmp_path / "run" / "generator.pt", "--explore")
    page = json.loads(re.search("const page = (.*);", (tmp_path / "run" / "explore.html").read_text())[1])
    assert [(row["name"], len(row["sheets"])) for row in page["rows"]] == [("", len(sample.LEVELS))]
    (tmp_path / "run" / "explore.html").write_text("mine")
    refused("sample.py", "--run", tmp_path / "run", "--explore", naming="explore.html")


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs the program chromium")
@pytest.mark.parametrize("width", [360, 1200])
def test_explore_page_in_a_browser(generator, tmp_path, width):
    call("sample.py", "--run", generator, "--explore", "--labels", "2,0", "--device", "cpu")
    played = (generator / "explore.html").read_text().replace("</html>", PLAYED + "</html>")
    (tmp_path / "played.html").write_text(played)
    done = call("chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},800", "--dump-dom",
                tmp_path / "played.html")
    before, keyed, pointed, left, changed, command, fits = json.loads(html.unescape(re.search("<title>(.*)</title>", done.stdout)[1]))
    assert before == "50% 50%" and keyed == left == "37.5% 37.5%" and pointed == "0% 100%" and changed and fits
    assert command.endswith("--num 1 --at 1,0 --truncation 1")
