"""evaluate.py: figures that equal pytorch-fid's, and what stands around them."""

import json
import os
import re
import shutil
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import call, refused
from PIL import Image

import evaluate
from prepare_data import Data

rng = np.random.default_rng(0)


def features(n, d, shift=0.0):
    return (rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + shift).astype(np.float32)


def test_frechet_distance_against_scipy():
    from scipy import linalg
    for n, d in ((300, 40), (20, 40)):  # the second has singular covariances
        one, other = (evaluate.statistics(features(n, d, shift)) for shift in (0, 0.3))
        (mu1, sigma1), (mu2, sigma2) = one.values(), other.values()
        root = linalg.sqrtm(sigma1 @ sigma2 if n > d else sigma1 @ sigma2 + 0j).real
        expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
        assert evaluate.frechet_distance(one, other) == pytest.approx(expected, rel=1e-6 if n > d else 1e-3)
    assert evaluate.frechet_distance(one, one) == pytest.approx(0, abs=1e-6 * np.trace(sigma1))
    # worked out by hand: means 3 apart, standard deviations 1 and 2 in each of 2 dimensions
    one, other = {"mu": [0, 0], "sigma": np.eye(2)}, {"mu": [3, 0], "sigma": 4 * np.eye(2)}
    assert evaluate.frechet_distance(one, other) == pytest.approx(9 + 2 * (2 - 1) ** 2)


def test_kernel_distance_against_the_definition():
    x, y = features(30, 5), features(30, 5, 0.5)
    def k(a, b):
        return (float(a @ b) / 5 + 1) ** 3
    within = sum(k(v[i], v[j]) for v in (x.astype(float), y.astype(float)) for i in range(30) for j in range(30) if i != j)
    across = sum(k(a, b) for a in x.astype(float) for b in y.astype(float))
    expected = within / (30 * 29) - 2 * across / 900
    assert evaluate.kernel_distance(x, y, subsets=2, size=30)[0] == pytest.approx(expected, rel=1e-6)
    one = features(4000, 5)
    mean, std = evaluate.kernel_distance(one[:2000], one[2000:], subsets=20)
    assert abs(mean) < 3 * std, "unbiased: around zero for the same distribution"


def folder_of(path, count, shift, size=32):
    path.mkdir()
    noise = np.random.default_rng(shift).integers(0, 200, (count, size, size, 3))
    for i, image in enumerate(np.minimum(noise + shift, 255).astype(np.uint8)):
        Image.fromarray(image).save(path / f"{i:05d}.png")
    return path


def test_statistics_in_parts_are_those_of_the_whole(monkeypatch):
    monkeypatch.setattr(evaluate, "PART", 7)
    x = features(30, 5, 100)
    mean, sigma = evaluate.statistics(x).values()
    assert np.allclose(mean, x.astype(float).mean(0), rtol=1e-12) and np.allclose(sigma, np.cov(x.astype(float), rowvar=False), rtol=1e-9)


def measured(real, fake, k=3):
    """neighbour_measures of arrays."""
    return evaluate.neighbour_measures(torch.from_numpy(real), torch.from_numpy(fake), k)


@pytest.mark.parametrize("distances", [2**25, 150])  # at a time: all, or two rows
def test_neighbour_measures_against_loops(distances, monkeypatch):
    monkeypatch.setattr(evaluate, "DISTANCES", distances)
    real, fake, k = features(60, 4), features(50, 4, 0.4), 3
    far = [[float(np.linalg.norm(a.astype(float) - b)) for b in y] for x, y in ((real, real), (fake, fake)) for a in x]
    real_radius, fake_radius = ([sorted(row)[k] for row in rows] for rows in (far[:60], far[60:]))
    d = [[float(np.linalg.norm(a.astype(float) - b)) for b in fake] for a in real]
    inside = [[d[i][j] <= real_radius[i] for j in range(50)] for i in range(60)]
    nearest = [min(range(60), key=lambda i, j=j: d[i][j]) for j in range(50)]
    expected = {"precision": np.mean([any(inside[i][j] for i in range(60)) for j in range(50)]),
                "recall": np.mean([any(d[i][j] <= fake_radius[j] for j in range(50)) for i in range(60)]),
                "density": np.mean([sum(inside[i][j] for i in range(60)) for j in range(50)]) / k,
                "coverage": np.mean([any(row) for row in inside]),
                "authenticity": np.mean([d[i][j] >= sorted(far[i])[1] for j, i in enumerate(nearest)])}
    found, near, rows = measured(real, fake)
    assert found == pytest.approx(expected, abs=1e-6)
    assert rows.tolist() == [sorted(range(60), key=lambda i, j=j: d[i][j])[:3] for j in range(50)]
    assert np.allclose(near.sqrt(), [sorted(d[i][j] for i in range(60))[:3] for j in range(50)])
    assert measured(real, real[:50] + np.float32(1e-4))[0]["authenticity"] == 0
    assert measured(real, fake + 1000)[0]["precision"] == 0


def test_distances_that_fp32_cannot_tell_are_exact():
    """Points a thousandth apart at a distance of 3,000, and copies of some: to products in fp32 all are alike."""
    near = rng.standard_normal((40, 8)).astype(np.float32) / 1000
    real = np.float32(1000) + np.concatenate([near, near[:5]])
    fake = real[40:].copy()
    found, _, _ = measured(real, fake, k=1)
    exact = np.linalg.norm(real[:, None].astype(float) - real, axis=2)
    inside = exact[:, 40:] <= np.sort(exact)[:, 1:2]
    assert found["precision"] == 1 and found["density"] == inside.sum(0).mean() and found["coverage"] == inside.any(1).mean()
    centred = torch.from_numpy(real).double() - 1000
    apart = evaluate.radii(centred, 9, "")
    assert np.allclose(apart.clamp(0).sqrt(), np.sort(exact)[:, 1:10], rtol=1e-9, atol=1e-9)
    copies = np.repeat(rng.random((1, 2048), np.float32), 20, 0)  # which is nearest is not decided by rounding
    found = measured(np.concatenate([copies, copies + 1]), copies[:5])[0]
    assert found["precision"] == 1 and found["recall"] == 0.5 and found["authenticity"] == 1


class Network:
    """In Inception's place: the mean of an image in each feature; fails after so many passes."""
    name = "stand-in"

    def __init__(self, passes):
        self.passes = passes

    def __call__(self, x):
        self.passes -= 1
        if self.passes < 0:
            raise KeyboardInterrupt
        return [x.mean((1, 2, 3))[:, None, None, None].expand(-1, 2048, 1, 1)]


def test_features_are_kept_in_parts_and_a_killed_call_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "PART", 40)
    images, order = rng.integers(0, 255, (100, 4, 4, 3), np.uint8), rng.permutation(100)
    expected = images[order].mean((1, 2, 3)) / 255
    folder = tmp_path / "features"
    with pytest.raises(KeyboardInterrupt):
        evaluate.inception_features(Network(3), images, "cpu", order, folder)  # two passes a part
    assert len(list(folder.iterdir())) == 1
    found = evaluate.inception_features(Network(3), images, "cpu", order, folder)
    assert np.allclose(found[:, 7], expected, atol=1e-6) and len(list(folder.iterdir())) == 3
    assert np.array_equal(evaluate.inception_features(Network(0), images, "cpu", order, folder), found)
    first = evaluate.inception_features(Network(0), images, "cpu", order[:80], folder)
    assert np.array_equal(first, found[:80]), "a smaller n has the same parts"
    network = Network(9)  # of which a pass takes ten seconds
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: -10 * network.passes)
    evaluate.inception_features(network, images, "cpu", order, kind="real")
    assert capsys.readouterr().out.splitlines() == [
        "100 real images", "40 of 100 real images, 00:30 left", "80 of 100 real images, 00:10 left"]
    network = Network(9)
    evaluate.inception_features(network, images, "cpu", np.append(order[:80], order[:20]), folder, "real")
    assert capsys.readouterr().out == "100 real images\n", "the last part alone was computed"
    damaged = sorted(folder.iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:500])
    assert np.array_equal(evaluate.inception_features(Network(2), images, "cpu", order, folder), found)
    images[order[0]] += 1
    with pytest.raises(KeyboardInterrupt):
        evaluate.inception_features(Network(1), images, "cpu", order, folder)
    (tmp_path / "file").write_text("")
    evaluate.inception_features(Network(9), images, "cpu", order, tmp_path / "file" / "features")
    assert capsys.readouterr().err.count("not kept") == 1


def test_inception_score_worked_out():
    classes = torch.eye(4, 8) * 100  # each image is surely of one of four classes, each as often: e^log 4
    sure = np.tile(np.eye(4, 8, dtype=np.float32), (25, 1))
    assert evaluate.inception_score(sure, classes, splits=1)[0] == pytest.approx(4, rel=1e-4)
    for n in (2, 11, 20):
        assert evaluate.inception_score(np.zeros((n, 8), np.float32), classes)[0] == pytest.approx(1)
    assert evaluate.inception_score(sure[:64], classes)[1] < 0.8, "no part of one image, whose score is 1"


def test_matching_against_worked_out_cases():
    own = np.eye(150, 200, dtype=np.float32)  # 150 real images, each in a direction of its own
    real = {"mu": np.zeros(200), "features": own[::-1], "rows": np.arange(150)[::-1].copy()}
    notes = [{"row": i} for i in range(150)]
    found, _ = evaluate.matching(notes, own * 3, real, None, None, None, "")
    assert found["cosine"]["value"] == pytest.approx(1) and found["r_precision"]["value"] == 1
    wrong = own.copy()
    wrong[7] = own[8]
    assert evaluate.matching(notes, wrong, real, None, None, None, "")[1][0] == (7, pytest.approx(0)), "the worst comes first"
    found, _ = evaluate.matching(notes, np.roll(own, 1, 0), real, None, None, None, "")
    assert found["cosine"]["value"] == pytest.approx(0) and found["r_precision"]["value"] == 0
    # half of each image is its own, half its neighbour's: the neighbour is among 99 of 149 others in 2 cases of 3
    found, _ = evaluate.matching(notes, own + 1.01 * np.roll(own, 1, 0), real, None, None, None, "")
    assert found["cosine"]["value"] == pytest.approx(0.5**0.5, abs=0.01)
    assert found["r_precision"]["value"] == pytest.approx(1 - 99 / 149)


def test_images_of_one_caption_are_not_each_others_rivals():
    own = np.eye(120, 200, dtype=np.float32)
    real = {"mu": np.zeros(200), "features": own, "rows": np.arange(120)}
    found, _ = evaluate.matching([{"row": i % 120} for i in range(480)], np.tile(own, (4, 1)), real, None, None, None, "")
    assert found["r_precision"]["value"] == 1 and found["cosine"]["n_generated"] == 120


@pytest.fixture
def fitted_once(monkeypatch):
    """A network of the same images and truth is trained once."""
    kept, fit = {}, evaluate.fit_classifier

    def fit_once(x, truth, *more):
        key = x.numpy().tobytes(), truth.numpy().tobytes(), str(more)
        if key not in kept:
            kept[key] = fit(x, truth, *more)
        return kept[key]
    monkeypatch.setattr(evaluate, "fit_classifier", fit_once)


def test_attributes_are_seen(tmp_path, fitted_once):
    call("prepare_data.py", "shapes", "--out", tmp_path / "data", "--size", "32", "--num", "3000")
    images = np.load(tmp_path / "data" / "images.npy")
    notes = [{"row": i} for i in range(400)]
    captions = Data(tmp_path / "data").captions()
    rates = evaluate.attribute_rates(notes, images[:400], images, captions, "")
    assert [rates[f"{name} right"]["value"] > 0.98 for name in ("colour", "background", "size")] == [True] * 3
    assert rates["all right"]["value"] > 0.7 and rates["all right"]["n_real"] == 600 and "%" in rates["all right"]["protocol"]
    gray = np.repeat(images[:400].mean(3, keepdims=True), 3, 3).astype(np.uint8)
    blind = evaluate.attribute_rates(notes, gray, images, captions, "")
    assert blind["colour right"]["value"] < 0.5 < blind["size right"]["value"]


def blobs(classes, count, seed, channels=3):
    """uint8 (count, 8, 8, channels) of noise with one bright pixel of 3 × 3 places, which is the class; labels (count,)."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % classes)
    images = rng.integers(0, 60, (count, 8, 8, channels), np.uint8)
    for image, label in zip(images, labels):
        image[1 + label // 3 * 2: 3 + label // 3 * 2, 1 + label % 3 * 2: 3 + label % 3 * 2] = 250
    return images, labels


def data_of(folder, images, labels, classes, **more):
    """DATA of these arrays."""
    folder.mkdir()
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    meta = {"name": "blobs", "count": len(images), "size": 8, "channels": images.shape[3], "vocabulary": None,
            "classes": [str(i) for i in range(classes)], "fingerprint": "blobs"}
    (folder / "meta.json").write_text(json.dumps(meta | more))
    return Data(folder)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(evaluate, "CLASS_STEPS", 200)


def test_classes_covered_and_their_divergence(tmp_path, quick):
    """A perfect generator covers all; of half of the classes KL is log 2; of uneven ones what their shares say."""
    data = data_of(tmp_path / "data", *blobs(4, 2000, 0), 4)
    images, labels = blobs(4, 800, 1)
    found, warned = evaluate.class_figures(data, images)
    assert found["modes"]["value"] == 4 and found["kl"]["value"] == pytest.approx(0, abs=1e-6) and not warned
    assert found["classes_right"]["value"] == 1 and found["classes_right"]["n_real"] == 400
    assert found["modes"]["n_generated"] == 800 and "of 4" in found["modes"]["protocol"] and "2000 real" in found["kl"]["protocol"]
    assert "digits_right" not in found
    half = evaluate.class_figures(data, images[labels < 2])[0]
    assert half["modes"]["value"] == 2 and half["kl"]["value"] == pytest.approx(np.log(2), abs=1e-6)
    uneven = np.concatenate([images[labels == 3][:25], images[labels == 0][:75]])
    expected = 0.25 * np.log(0.25 / 0.25) + 0.75 * np.log(0.75 / 0.25)
    assert evaluate.class_figures(data, uneven)[0]["kl"]["value"] == pytest.approx(expected, abs=1e-6)
    folder = tmp_path / "files"
    folder.mkdir()
    for i, image in enumerate(images[:40]):
        Image.fromarray(image).save(folder / f"{i:03}.png")
    found = evaluate.class_figures(data, evaluate.open_images("--images", folder))[0]
    assert found["modes"]["value"] == len(set(labels[:40].tolist()))


def test_digits_that_are_stacked(tmp_path, quick):
    """27 classes of three values a channel; each channel is judged by one network, and the real share is 1/27 each."""
    grays, values = blobs(3, 9000, 0, channels=1)

    def stack(start, stop):
        images, digits = grays[start:stop, ..., 0].reshape(-1, 3, 8, 8), values[start:stop].reshape(-1, 3)
        return images.transpose(0, 2, 3, 1).copy(), digits @ [9, 3, 1]
    data = data_of(tmp_path / "data", *stack(0, 3000), 27, stacked=3)
    images, labels = stack(3000, 9000)
    found, warned = evaluate.class_figures(data, images)
    p = np.bincount(labels, minlength=27) / 2000
    assert found["modes"]["value"] == 27 and found["kl"]["value"] == pytest.approx((p * np.log(p * 27)).sum(), abs=1e-6)
    assert found["digits_right"]["value"] == found["classes_right"]["value"] == 1
    assert (found["digits_right"]["n_real"], found["classes_right"]["n_real"]) == (600, 200)
    assert "1/27" in found["kl"]["protocol"] and warned == [
        "modes and KL of classes from 2000 images: published figures are from 25600; of fewer, modes are fewer and KL is higher"]
    one = evaluate.class_figures(data, np.repeat(images[:1], 50, 0))[0]  # the whole share on one class of 27
    assert one["modes"]["value"] == 1 and one["kl"]["value"] == pytest.approx(np.log(27))


def test_classes_that_cannot_be_seen(tmp_path, quick):
    images, labels = blobs(4, 200, 0)
    rng = np.random.default_rng(2)

    def why(name, images, labels, classes, generated):
        found, warned = evaluate.class_figures(data_of(tmp_path / name, images, labels, classes), generated)
        return found, warned[0]
    assert why("one", images, labels * 0, 1, images) == ({}, "no modes, KL of classes: fewer than two classes")
    assert why("few", images, labels, 4, images[:3])[1] == "no modes, KL of classes: 3 images cannot cover 4 classes"
    assert "too few to learn 4" in why("small", images[:40], labels[:40], 4, images)[1]
    assert "too few to learn 4" in why("alike", images * 0, labels, 4, images)[1], "none but those it is tested on"
    found, warned = why("noise", images, rng.permutation(labels), 4, images)
    assert "not to be trusted" in warned and found["classes_right"]["value"] < 0.6
    meta = json.loads((tmp_path / "noise" / "meta.json").read_text())
    (tmp_path / "noise" / "meta.json").write_text(json.dumps(meta | {"classes": None}))
    assert evaluate.class_figures(Data(tmp_path / "noise"), images) == ({}, ["no modes, KL of classes: the data has no classes"])


def test_captions_held_out_of_training(tmp_path, fitted_once):
    """The real images and attributes of held-out conditions are the held-out ones, and the protocol says so."""
    call("prepare_data.py", "shapes", "--out", tmp_path / "data", "--size", "32", "--num", "3000", "--holdout", "0.1")
    data = Data(tmp_path / "data")
    images = data.array("held_out_images")
    notes = [{"row": i, "caption": line["captions"][0]} for i, line in enumerate(data.captions(held_out=True))]

    def features(pixels):  # an Inception's stand-in: (n, 2048) of images (n, 3, H, W)
        return [pixels.flatten(1)[:, :2048, None, None]]
    features.name = "features"
    own = evaluate.inception_features(features, images, "cpu", np.arange(300))
    real = {"mu": own.mean(0), "features": np.roll(own, 1, 0), "rows": np.arange(300)}  # rows of other images
    found, _ = evaluate.score_captions(notes, images, {"features": own}, real, features, data, "cpu", True)
    assert found["r_precision"]["value"] == 1 and found["cosine"]["value"] == pytest.approx(1)
    assert all("captions held out of training" in found[key]["protocol"] for key in ("cosine", "r_precision", "all right"))
    assert found["colour right"]["value"] > 0.95 and found["colour right"]["n_generated"] == 300
    found, _ = evaluate.score_captions(notes, images, {"features": own}, real, features, data, "cpu", False)
    assert found["colour right"]["value"] < 0.5, "rows of the training data are other images"
    assert "captions of the real images" in found["cosine"]["protocol"]


class Brightness:
    """An Inception's stand-in: features (n, 2048) of which all but 48 are 0, and which it counts."""

    def __init__(self, name):
        self.name, self.seen = name, 0

    def __call__(self, x):
        self.seen += len(x)
        flat = x.flatten(1)[:, ::4] + len(self.name)
        return [torch.nn.functional.pad(flat, (0, 2048 - flat.shape[1]))[:, :, None, None]]


def test_real_images_against_others(tmp_path, monkeypatch):
    """The floor of all of DATA is of its halves, and no image passes through the network twice; another network's are apart."""
    call("prepare_data.py", "shapes", "--out", tmp_path / "data", "--size", "8", "--num", "41")
    data, network = Data(tmp_path / "data"), Brightness("a")
    whole = evaluate.frechet_distance  # of 2,000 dimensions of zeros it takes its time
    monkeypatch.setattr(evaluate, "frechet_distance", lambda *both: whole(
        *({"mu": x["mu"][:48], "sigma": x["sigma"][:48, :48]} for x in both)))
    real = evaluate.real_statistics(network, data, None, True, "cpu")
    assert (real["n"], real["floor_n"], network.seen) == (41, 20, 41)
    order = np.random.default_rng(0).permutation(41)
    halves = [evaluate.measure_images(network, data.array("images")[order[i:i + 20]], "cpu") for i in (0, 20)]
    assert real["floor"] == pytest.approx(evaluate.frechet_distance(*halves)) and real["floor"] > 0
    seen = network.seen
    assert evaluate.real_statistics(network, data, None, True, "cpu")["floor"] == real["floor"] and network.seen == seen
    (data.folder / "fid_41.npz").write_bytes(b"")
    assert evaluate.real_statistics(network, data, None, True, "cpu")["floor"] == real["floor"] and network.seen == seen
    assert np.load(data.folder / "fid_41.npz")["mu"][0] == real["mu"][0], "what was damaged is made anew"
    assert evaluate.real_statistics(Brightness("another"), data, None, False, "cpu")["mu"][0] > real["mu"][0] + 5


def test_equals_pytorch_fid(weights, tmp_path):
    """The same two folders, the same weights in pytorch-fid's own cache; and its statistics are read, and ours by it."""
    a, b = folder_of(tmp_path / "a", 12, 0), folder_of(tmp_path / "b", 10, 40)
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    shutil.copy(weights, cache / os.path.basename(evaluate.fid_inception.FID_WEIGHTS_URL))

    def theirs(*arguments):
        return call(sys.executable, "-m", "pytorch_fid", *arguments, TORCH_HOME=str(tmp_path / "torch")).stdout

    def ours(*paths):
        call("evaluate.py", "--images", paths[0], "--reference", paths[1], "--weights", weights, "--out", tmp_path / "m.json")
        return json.loads((tmp_path / "m.json").read_text())

    (tmp_path / "a.json").write_text('{"annotations": [], "score": NaN}')  # beside them, and not sample.py's
    theirs("--save-stats", b, tmp_path / "b.npz")
    expected = float(re.search(r"FID:\s*(\S+)", theirs(a, tmp_path / "b.npz")).group(1))
    metrics = ours(a, b)
    assert metrics["fid"]["value"] == pytest.approx(expected, rel=1e-3)
    assert (metrics["fid"]["n_generated"], metrics["fid"]["n_real"]) == (12, 10)
    assert "2048" in metrics["warnings"][0] and metrics["kid"]["n_real"] == 10 and "samples" not in metrics
    metrics = ours(a, tmp_path / "b.npz")
    assert metrics["fid"]["value"] == pytest.approx(expected, rel=1e-3) and "kid" not in metrics


def test_a_run_is_scored_and_reported(weights, trained, shapes, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    call("sample.py", "--run", run, "--num", "10", "--interpolate", "2", "--device", "cpu")
    said = call("evaluate.py", "--run", run, "--num-real", "16", "--floor", "--device", "cpu").stdout
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["fid"]["n_generated"] == 10 and metrics["fid"]["n_real"] == 16
    assert f"{metrics['fid']['value']:.2f}" in said and "generated 10, real 16" in said and "report.html" in said
    assert 0 < metrics["floor"]["value"] < metrics["fid"]["value"] and metrics["floor"]["n_real"] == 16
    assert "real against real is of 16 images each, the FID of 10 against 16" in said
    assert metrics["samples"]["seed"] == 0 and weights.name in metrics["fid"]["protocol"]
    assert not (run / "images.features").exists() and (shapes / "features").is_dir()
    kept = np.load(shapes / "fid_16.npz")
    assert kept["mu"].shape == (2048,) and kept["sigma"].shape == (2048, 2048)
    own = [(run / name).read_bytes() for name in ("metrics.json", "report.html")]
    other = folder_of(tmp_path / "other set", 6, 40, 1)
    (tmp_path / "other set.jsonl").write_text('{"caption": "a star", "row": 0}\n')
    real = tmp_path / "real"  # the same colours, of another size
    real.mkdir()
    for file in other.iterdir():
        Image.open(file).resize((48, 48)).save(real / file.name)
    told = call("evaluate.py", "--run", run, "--images", other, "--reference", real, "--device", "cpu").stdout
    assert "other set.jsonl tells of 1 image, and here are 6" in told
    assert "generated images of 1×1 pixels, real ones of 48×48" in told
    assert own == [(run / name).read_bytes() for name in ("metrics.json", "report.html")], "those of its own images and data"
    apart = json.loads((run / "metrics-real-other_set.json").read_text())
    assert (apart["images"], apart["reference"]) == (str(other), str(real)) and (run / "report-real-other_set.html").exists()
    assert (apart["fid"]["n_generated"], apart["fid"]["n_real"]) == (6, 6) and abs(apart["fid"]["value"]) < 0.01
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64") == 3 + evaluate.GALLERY  # two grids, the curves, samples and neighbours
    assert "come closest to real images" in page and "data:image/webp" in page and "--width" in page
    assert "http" not in page.replace("http-equiv", ""), "nothing is loaded from elsewhere"
    assert sorted(p.name for p in (run / "images").iterdir())[-1] == "000009.png"
    # kept statistics are used again, and not for other images
    assert "16 real images" in said
    assert "16 real images" not in call("evaluate.py", "--run", run, "--num-real", "16", "--device", "cpu").stdout
    meta = json.loads((shapes / "meta.json").read_text())
    other = shutil.copytree(shapes, tmp_path / "other")
    shutil.rmtree(other / "features")
    (other / "meta.json").write_text(json.dumps(meta | {"fingerprint": "another"}))
    (run / "images.jsonl").write_text("".join(json.dumps({"caption": "a star", "row": i}) + "\n" for i in range(10)))
    said = call("evaluate.py", "--run", run, "--data", other, "--num-real", "16", "--device", "cpu").stdout
    assert "16 real images" in said and "match their captions is not measured" in said and "cosine" not in said


def test_figures_of_other_images_or_data_are_kept_apart(trained, shapes, tmp_path):
    own = [tmp_path / "images"]
    for named, trained_on, apart in (({}, True, {}), ({"images": own[0]}, True, {}), ({"data": "d"}, True, {}),
                                     ({"images": tmp_path / "x"}, True, {"images": tmp_path / "x"}),
                                     ({"reference": tmp_path / "y"}, False, {"reference": tmp_path / "y"}),
                                     ({"data": "d"}, False, {"reference": "d"})):
        args = Namespace(**{"images": None, "data": None, "reference": None} | named)
        assert evaluate.others_of(args, trained_on, own) == apart
    run, data = shutil.copytree(trained, tmp_path / "run"), shutil.copytree(shapes, tmp_path / "data")
    folder_of(run / "images", 2, 0)
    for folder, change in ((data, {"fingerprint": "of what was made anew there"}), (run, {"options": {"data": str(data)}})):
        path = folder / ("meta.json" if folder == data else "config.json")
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {k: v if k == "fingerprint" else content[k] | v for k, v in change.items()}))
    refused("evaluate.py", "--run", run, naming=[f"--data {data}", "not what", "was trained on"])


def test_report_escapes(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "<b>run")
    evil = "<script>alert(1)</script>"
    config = {"options": {"data": evil}, "data": {"name": evil}, "hardware": {"device": evil, "platform": evil}}
    evaluate.write_report(run, run / "report.html", {"warnings": [evil]}, config)
    page = (run / "report.html").read_text()
    assert "<script" not in page and "<b>" not in page and "&lt;script&gt;" in page


def test_precision_of_convolutions_is_put_back():
    before = torch.backends.cudnn.allow_tf32

    def network(x):
        assert not torch.backends.cudnn.allow_tf32, "TF32 would show in the FID"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        evaluate.inception_features(network, np.zeros((2, 8, 8, 3), np.uint8), "cpu", np.arange(2))
    assert torch.backends.cudnn.allow_tf32 == before


def test_no_weights_is_one_line_and_no_other_network(trained, tmp_path):
    """Offline with an empty cache: neither pytorch-fid's file nor the package can be had."""
    blocked = {"TORCH_HOME": str(tmp_path), "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9",
               "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1"}
    images = folder_of(tmp_path / "a", 2, 0)
    refused("evaluate.py", "--images", images, "--reference", images, naming=["weights", "--weights", "pt_inception"], **blocked)
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    refused("evaluate.py", "--images", images, "--reference", images, "--weights", tmp_path / "bad.pth", naming="bad.pth")


def test_samples_of_a_generator_that_is_no_more():
    status = {"step": 10, "state": "finished"}
    assert evaluate.training_warnings(status, 10, 10, replaced=False) == []
    for drawn, replaced in ((5, False), (10, True), (20, True)):
        warning, = evaluate.training_warnings(status, 10, drawn, replaced)
        assert f"of step {drawn}; training is at step 10" in warning


def test_refusals(trained, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.parse_args([])
    assert "name what to score: --run RUN" in capsys.readouterr().err
    reference = ("--images", "a", "--reference", "b")
    for options, naming in (((*reference, "--floor"), "--floor does not go with --reference"),
                            ((*reference, "--num-real", "9"), "--num-real does not go with --reference"),
                            ((*reference, "--data", "c"), "--data does not go with --reference"),
                            (("--compare", "a", "--floor"), "--floor does not go with --compare"),
                            (("--images", "", "--data", "b"), "--images is empty"),
                            (("--images", "a", "--reference="), "--reference is empty"),
                            (("--images", "a", "--data", "b", "--num-real", "1"), "--num-real: 1 must be at least 2")):
        with pytest.raises(SystemExit, match="2"):
            evaluate.parse_args(options)
        error = capsys.readouterr().err
        assert naming in error and error.count("\n") == 1
    refused("evaluate.py", "--run", tmp_path, naming=["--run", "config.json"])
    refused("evaluate.py", "--run", trained, naming="sample.py")
    (tmp_path / "empty").mkdir()
    refused("evaluate.py", "--images", tmp_path / "empty", "--reference", tmp_path, naming=["--images", "empty"])
    refused("evaluate.py", "--run", trained, "--out", tmp_path, naming="--out")
    refused("evaluate.py", "--images", "a", "--reference", "b", "--out", "/proc/figures.json", naming="--out /proc: ")
    for name in ("1.png", "2.png"):
        (tmp_path / "empty" / name).write_bytes(b"no picture")
    with pytest.raises(SystemExit, match="2"):
        evaluate.pixels_at(evaluate.open_images("--images", tmp_path / "empty"), [1])
    assert "2.png: cannot be read as an image (cannot identify image file)" in capsys.readouterr().err
    np.savez(tmp_path / "float.npz", images=np.zeros((2, 8, 8, 3)))
    refused("evaluate.py", "--images", tmp_path / "float.npz", "--reference", tmp_path, naming=["float.npz", "float64"])
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "images").mkdir()
    os.utime(run / "images", (0, 0))
    shutil.copy(tmp_path / "float.npz", run / "images.npz")
    refused("evaluate.py", "--run", run, naming=["images.npz", "float64"])  # the newer of the two
    with open(tmp_path / "one.npz", "wb") as file:
        np.save(file, np.zeros((2, 8, 8, 3), np.uint8))
    np.savez_compressed(tmp_path / "whole.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    damaged = bytearray((tmp_path / "whole.npz").read_bytes())
    damaged[60:75] = bytes(15)
    (tmp_path / "damaged.npz").write_bytes(damaged)
    np.savez(tmp_path / "words.npz", mu=np.zeros(2048), sigma=np.array("x"))
    assert len(evaluate.open_images("--images", tmp_path / "one.npz")) == 2
    for name in ("damaged", "words"):
        with pytest.raises(SystemExit, match="2"):
            evaluate.open_images("--images", tmp_path / f"{name}.npz")
        assert f"{name}.npz: cannot be read" in capsys.readouterr().err


def test_statistics_and_counts_that_cannot_be_are_refused(shapes, tmp_path):
    images = folder_of(tmp_path / "images", 4, 0)
    for name, mu, sigma in (("narrow", np.zeros(768), np.eye(768)), ("nan", np.full(2048, np.nan), np.eye(2048)),
                            ("endless", np.zeros(2048), np.full((2048, 2048), np.inf))):
        np.savez(tmp_path / f"{name}.npz", mu=mu, sigma=sigma)
        refused("evaluate.py", "--images", images, "--reference", tmp_path / f"{name}.npz", naming=[f"{name}.npz", "2048"])
    for count, options, naming in ((1, (), "only 1 image"), (3, ("--floor",), "--floor"), (3, ("--num-real", "4"), "--num-real 4")):
        data = tmp_path / f"{count}{len(options)}"
        call("prepare_data.py", "shapes", "--num", count, "--size", "8", "--out", data)
        refused("evaluate.py", "--images", images, "--data", data, *options, naming=naming)


def test_clip_score(tmp_path):
    """Each image with its own caption: 100 where they are one, 0 where they are at right angles."""
    class Model:
        def encode(self, inputs, normalize_embeddings):
            return np.eye(3)[[i.getpixel((0, 0))[0] if isinstance(i, Image.Image) else int(i) for i in inputs]]
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    notes = [{"caption": str(i)} for i in range(3)]
    found = evaluate.clip_score(Model(), "a model", notes, images)["clip"]
    assert found["value"] == 100 and found["n_generated"] == 3 and "a model" in found["protocol"]
    assert evaluate.clip_score(Model(), "", [*notes[1:], notes[0]], images)["clip"]["value"] == 0
    refused("evaluate.py", "--images", folder_of(tmp_path / "a", 4, 0), "--reference", folder_of(tmp_path / "b", 4, 0),
            "--clip", "x", naming="has no captions beside it")


def test_other_size_is_said(tmp_path, capsys):
    small, large = np.zeros((2, 8, 8, 1), np.uint8), np.zeros((2, 16, 12, 3), np.uint8)
    for name in "ab":
        Image.fromarray(large[0]).save(tmp_path / f"{name}.png")
    files = evaluate.open_images("--images", tmp_path)
    assert evaluate.other_size(large, files) == evaluate.other_size(small, {"mu": 0}) == []
    [said] = evaluate.other_size(files, small)
    assert "12×16" in said and "8×8" in said
    Image.fromarray(large[0, :12]).save(tmp_path / "c.png")
    with pytest.raises(SystemExit, match="2"):
        evaluate.open_images("--images", tmp_path)
    assert f"--images {tmp_path}: images of different sizes" in capsys.readouterr().err


def test_folders_are_read_as_data_is(tmp_path):
    """Upright, on white, 16 bits and profiles as they look; what is plain is what pytorch-fid sees."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x112] = 3
    image.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "turned.png", exif=exif)
    image.putalpha(Image.fromarray(np.repeat([[0], [255]], 4, 0).repeat(12, 1).astype(np.uint8)))
    image.save(tmp_path / "clear.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(pixels).save(tmp_path / "plain.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "gray.png")

    def seen(name):
        return evaluate.pixels_at([tmp_path / f"{name}.png"], [0])[0]
    gray = pixels[..., :1].repeat(3, 2)
    assert np.array_equal(seen("plain"), pixels) and np.array_equal(seen("turned"), pixels)
    assert np.array_equal(seen("gray"), gray) and np.array_equal(seen("deep"), gray)
    assert np.array_equal(seen("clear"), np.concatenate([np.full((4, 12, 3), 255), pixels[4:]]))
    plain = {name: evaluate.is_plain(tmp_path / f"{name}.png") for name in ("plain", "gray", "turned", "clear", "deep")}
    assert plain == {"plain": True, "gray": True, "turned": False, "clear": False, "deep": False}
    Image.fromarray(pixels).save(tmp_path / "noted.png", exif=b"JUNKJUNK")
    assert evaluate.is_plain(tmp_path / "noted.png") and np.array_equal(seen("noted"), pixels)
    for mode in ("P", "1", "CMYK"):
        Image.fromarray(pixels).convert(mode).save(tmp_path / f"{mode}.tif")
        assert evaluate.is_plain(tmp_path / f"{mode}.tif")
        as_pillow = np.asarray(Image.open(tmp_path / f"{mode}.tif").convert("RGB"))
        assert np.array_equal(evaluate.pixels_at([tmp_path / f"{mode}.tif"], [0])[0], as_pillow)


def test_a_foreign_list_of_captions_is_no_traceback(tmp_path):
    (tmp_path / "photos.jsonl").write_text("{'file': 'a'}\n")
    found, [said] = evaluate.captions_drawn(tmp_path / "photos", 2)
    assert not found and "photos.jsonl is not of sample.py" in said


def test_colours_beside_gray_are_seen_as_gray():
    """Blue is a dark gray, as Pillow has it, not black."""
    blue = np.zeros((2, 8, 8, 3), np.uint8) + np.uint8([0, 0, 255])
    gray = np.asarray(Image.fromarray(blue[0]).convert("L"))[None, :, :, None]
    assert torch.allclose(evaluate.shrink(blue, range(2), 8, 1), evaluate.shrink(gray, [0, 0], 8, 1), atol=0.01)
    assert torch.equal(evaluate.shrink(blue, range(2), 8, 3)[0, :, 0, 0], torch.tensor([-1.0, -1, 1]))
