"""Train a GAN on DATA/ (made by prepare_data.py) into RUN/.

    python train.py --data data/shapes --out runs/shapes
    torchrun --nproc_per_node=8 train.py --data data/faces --out runs/faces --batch-size 800
    python train.py --data data/shapes --out runs/shapes --epochs 50      # called again: goes on where it stopped

RUN/ then holds config.json, checkpoint.pt, generator.pt (all that sample.py needs), log.jsonl, status.json, grids/.
SIGINT, SIGTERM and SIGUSR1 finish the step, save and exit with 75; the same command resumes, on a CPU bit for bit.
"""

import argparse
import contextlib
import copy
import errno
import fcntl
import io
import json
import math
import os
import pickle
import platform
import signal
import socket
import sys
import time
import traceback
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

EMBEDDING = 64  # numbers that a class becomes in G
GRID = 64  # images in a sample grid, 8 a row
STATS = ("loss_g", "loss_d", "acc_real", "acc_fake", "reward", "grad_norm_g", "grad_norm_d")
# options that a resumed run may change: where, how long and how it is watched (a cosine then ends with the new length)
FREE = {"data", "out", "resume", "epochs", "max_steps", "log_every", "save_every", "grid_every", "device", "compile",
        "max_skips"}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h


def fail(message, status=2):
    """End with one line for the user; on a node with several processes the first speaks for all."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"train.py: {message}", file=sys.stderr)
    raise SystemExit(status)


# ---- options ---------------------------------------------------------------------------------------------------------

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults in the help, the docstring as it stands."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (--help lists the options)")
    add = parser.add_argument_group("data").add_argument
    add("--data", required=True, metavar="DATA", help="folder made by prepare_data.py")
    add("--out", required=True, metavar="RUN", help="folder of this run")
    add("--condition", choices=["none", "label"], default="none", help="what G and D are told: nothing, or the class")
    add("--flip", action="store_true", help="mirror half of the real images, left to right")

    add = parser.add_argument_group("networks").add_argument
    add("--arch", choices=list(ARCHITECTURES), default="dcgan", help="dcgan: transposed convolutions; upsample: "
        "nearest neighbour and 3×3 convolutions, dropout in D")
    add("--width", type=int, default=64, help="channels at the highest resolution; they double at each halving")
    add("--width-d", type=int, help="the same of D alone (default: as --width)")
    add("--extra-convs", type=int, default=0, help="3×3 convolutions more at each resolution of G")
    add("--depth", type=int, help="doublings from the first feature map to the image (default: from 4 to 7 pixels on)")
    add("--norm-d", choices=["batch", "none"], default="batch", help="normalisation in D; none goes with --r1")
    add("--latent-dim", type=int, default=100, help="numbers in z")

    add = parser.add_argument_group("objective").add_argument
    add("--loss", choices=list(LOSSES), default="bce", help="bce: non-saturating cross-entropy on logits; "
        "relativistic: of real against fake in pairs, for --norm-d none with --r1 and --r2")
    add("--r1", type=float, default=0.0, metavar="GAMMA", help="weight of D's squared gradient at real images")
    add("--r2", type=float, default=0.0, metavar="GAMMA", help="weight of D's squared gradient at fakes")
    add("--real-label", type=float, default=1.0, help="D's target for real images; 0.9 is one-sided smoothing")
    add("--fake-label", type=float, default=0.0, help="D's target for fakes; 0.1 makes the smoothing two-sided")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=int, default=64, help="images a step, over all processes and accumulation steps")
    add("--epochs", type=int, default=25, help="passes over the data")
    add("--max-steps", type=int, help="end after so many steps, if that is earlier")
    add("--lr-g", type=float, default=2e-4, help="learning rate of G")
    add("--lr-d", type=float, default=2e-4, help="learning rate of D")
    add("--schedule", choices=["constant", "cosine"], default="constant", help="course of both learning rates")
    add("--lr-final", type=float, default=0.0, help="where a schedule ends, as a share of the learning rate")
    add("--beta1", type=float, default=0.5, help="Adam's decay of the mean gradient")
    add("--beta2", type=float, default=0.999, help="Adam's decay of the mean square")
    add("--ema", type=float, default=0.999, help="decay a step of G's running average, which is what is sampled")
    add("--clip-grad", type=float, help="largest norm of a network's gradient")
    add("--grad-accum", type=int, default=1, help="parts into which a batch is cut to save memory")
    add("--max-skips", type=int, default=100, help="non-finite updates in a row that end the run")

    add = parser.add_argument_group("precision and speed").add_argument
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="mixed precision; auto: bf16 where the "
        "hardware has it, fp16 on older GPUs, else off")
    add("--compile", action="store_true", help="torch.compile both networks")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")

    add = parser.add_argument_group("run").add_argument
    add("--seed", type=int, default=0, help="decides weights, order of the images and noise")
    add("--log-every", type=int, default=50, help="steps between lines of log.jsonl")
    add("--save-every", type=int, default=1000, help="steps between checkpoints")
    add("--grid-every", type=int, default=500, help="steps between sample grids")
    add("--resume", default="auto", metavar="{auto,never,PATH}", help="auto: from RUN's checkpoint if there is one; "
        "never: start over and replace what RUN holds; or a checkpoint's path")
    args = parser.parse_args(argv)
    positive = ("width", "width_d", "depth", "latent_dim", "batch_size", "epochs", "max_steps", "grad_accum",
                "max_skips", "log_every", "save_every", "grid_every")
    ranges = {name: (1, 2 ** 31) for name in positive} | {
        "extra_convs": (0, 100), "seed": (0, 2 ** 63), "clip_grad": (1e-12, math.inf), "r1": (0, math.inf),
        "r2": (0, math.inf)} | {
        name: (0, 1) for name in ("lr_g", "lr_d", "lr_final", "real_label", "fake_label")} | {
        name: (0, 0.999999) for name in ("beta1", "beta2", "ema")}
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} {value}: must lie between {low} and {high}")
    return args


# ---- data ------------------------------------------------------------------------------------------------------------

def load_data(folder, condition):
    """DATA/ as (images (N, H, W, C) uint8 memory map, labels (N,) int64 or None, meta); refuses what does not agree."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        images = np.load(folder / "images.npy", mmap_mode="r")
        labels = np.load(folder / "labels.npy") if condition == "label" and meta["classes"] else None
        said = (meta["count"], meta["size"], meta["size"], meta["channels"])
    except FileNotFoundError as error:
        fail(f"--data {folder}: {Path(error.filename).name} is not there; make the folder with prepare_data.py")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        fail(f"--data {folder}: damaged ({type(error).__name__}: {error}); make it again with prepare_data.py")
    if images.shape != said or images.dtype != np.uint8:
        fail(f"--data {folder}: meta.json says uint8 {said}, images.npy is {images.dtype} {images.shape}")
    if condition == "label" and labels is None:
        fail(f"--condition label: {folder} has no classes")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype != np.int64
                               or not 0 <= labels.min() <= labels.max() < len(meta["classes"])):
        fail(f"--data {folder}: labels.npy does not fit the images and classes that meta.json names")
    return images, labels, meta


def batches(t, start, stop):
    """Yield (images (B, C, H, W) uint8, labels (B,) int64 or None) on the device for steps start … stop - 1.

    B is this process's share of the batch. The order of an epoch is a permutation from (seed, epoch) alone; one
    thread gathers a batch ahead.
    """
    share = t.args.batch_size // t.world
    images, labels, orders = t.images, t.labels, {}
    resident = t.device.type == "cuda" and images.nbytes < 0.5 * torch.cuda.mem_get_info(t.device)[0]
    if resident:
        images = torch.from_numpy(np.array(images)).to(t.device)

    def gather(step):
        epoch, place = divmod(step, t.steps_per_epoch)
        if epoch not in orders:
            orders.clear()
            orders[epoch] = np.random.default_rng([t.args.seed, epoch]).permutation(len(images))
        first = place * t.args.batch_size + t.rank * share
        index = orders[epoch][first:first + share]
        rows = images[to_device(index, t.device)] if resident else to_device(images[index], t.device)
        # a channels-last view, no copy
        return rows.permute(0, 3, 1, 2), None if labels is None else to_device(labels[index], t.device)

    # a thread starts on GPU 0, where another process's memory would be taken
    settle = (torch.cuda.set_device, (t.device,)) if t.device.type == "cuda" else (None, ())
    with ThreadPoolExecutor(1, "batches", *settle) as thread:
        ahead = thread.submit(gather, start)
        for step in range(start, stop):
            batch = ahead.result()
            if step + 1 < stop:
                ahead = thread.submit(gather, step + 1)
            yield batch


def to_device(array, device):
    """A numpy array on the device; to a GPU without waiting."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def latents(seed, numbers, dim):
    """z (n, dim) float32 for the images with these numbers: a function of (seed, number), wherever it is drawn."""
    return torch.from_numpy(np.stack([np.random.default_rng([seed, i]).standard_normal(dim, np.float32)
                                      for i in numbers]))


def seed_of(*parts):
    """One 64-bit seed from several integers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


# ---- networks --------------------------------------------------------------------------------------------------------

def default_depth(size):
    """How often an image's side is halved: until 7 pixels or fewer are left, or an odd number."""
    depth = 0
    while size > 7 and size % 2 == 0:
        size, depth = size // 2, depth + 1
    return depth


class Generator(nn.Module):
    """G(z (B, latent_dim), condition) -> images (B, channels, size, size) in [-1, 1].

    condition: class indices (B,) where the network was built with classes, else None.
    """

    def __init__(self, size, channels, width, depth, latent_dim, extra_convs, classes):
        super().__init__()
        self.embed = nn.Embedding(classes, EMBEDDING) if classes else None
        inputs = latent_dim + (EMBEDDING if classes else 0)
        widths = [width << i for i in reversed(range(depth))]  # 64×64, width 64: 512, 256, 128, 64
        self.layers = nn.Sequential(*self.build(inputs, size >> depth, widths, channels, extra_convs), nn.Tanh())

    def forward(self, z, condition=None):
        if self.embed is not None:
            z = torch.cat([z, self.embed(condition)], 1)
        return self.layers(z)


class Discriminator(nn.Module):
    """D(images (B, channels, size, size) in [-1, 1], condition) -> logits (B,) float32.

    Classes are judged by projection (Miyato & Koyama 2018): their embedding times the mean of the last features.
    """

    def __init__(self, size, channels, width, depth, norm, classes):
        super().__init__()
        widths = [channels] + [width << i for i in range(depth)]
        self.features, self.head = self.build(size >> depth, widths, norm == "batch")
        if norm == "none":  # without it the signal would fade at N(0, 0.02): He et al. 2015
            for module in self.features.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, 0.2)
        self.project = nn.Embedding(classes, widths[-1]) if classes else None
        if classes:
            nn.init.normal_(self.project.weight, 0, 0.02)

    def forward(self, x, condition=None):
        features = self.features(x)
        logits = self.head(features).flatten().float()
        if self.project is not None:
            logits = logits + (self.project(condition) * features.mean((2, 3)).float()).sum(1)
        return logits


def dcgan_init(module):
    """Radford et al. 2016, as in pytorch/examples: convolutions N(0, 0.02), normalisations N(1, 0.02)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)


class DCGANGenerator(Generator):
    """Radford et al. 2016: transposed 4×4 convolutions, batch normalisation, ReLU."""

    def build(self, inputs, base, widths, channels, extra):
        def block(a, b, *shape):
            layers = [nn.ConvTranspose2d(a, b, *shape, bias=False), nn.BatchNorm2d(b), nn.ReLU(True)]
            for _ in range(extra):
                layers += [nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(True)]
            return layers
        layers = [nn.Unflatten(1, (inputs, 1, 1)), *block(inputs, widths[0], base, 1, 0)]
        for a, b in zip(widths, widths[1:]):
            layers += block(a, b, 4, 2, 1)
        return [layer.apply(dcgan_init) for layer in
                layers + [nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1, bias=False)]]


class DCGANDiscriminator(Discriminator):
    """Radford et al. 2016: strided 4×4 convolutions, batch normalisation after the first, LeakyReLU 0.2."""

    def build(self, base, widths, norm):
        layers = []
        for a, b in zip(widths, widths[1:]):
            normal = nn.BatchNorm2d(b) if layers and norm else nn.Identity()
            layers += [nn.Conv2d(a, b, 4, 2, 1, bias=False), normal, nn.LeakyReLU(0.2, True)]
        head = nn.Conv2d(widths[-1], 1, base, bias=False)
        return nn.Sequential(*layers).apply(dcgan_init), head.apply(dcgan_init)


class UpsampleGenerator(Generator):
    """Linear to the first feature map, then nearest-neighbour upsampling and 3×3 convolutions."""

    def build(self, inputs, base, widths, channels, extra):
        layers = [nn.Linear(inputs, widths[0] * base * base), nn.Unflatten(1, (widths[0], base, base))]
        for a, b in zip(widths, widths[1:]):
            layers.append(nn.Upsample(scale_factor=2))
            for inputs in [a] + [b] * extra:
                layers += [nn.Conv2d(inputs, b, 3, 1, 1), nn.BatchNorm2d(b, momentum=0.8), nn.LeakyReLU(0.2, True)]
        return layers + [nn.Upsample(scale_factor=2), nn.Conv2d(widths[-1], channels, 3, 1, 1)]


class UpsampleDiscriminator(Discriminator):
    """Strided 3×3 convolutions, LeakyReLU 0.2, dropout of a quarter of the maps, batch normalisation from block 2."""

    def build(self, base, widths, norm):
        layers = []
        for a, b in zip(widths, widths[1:]):
            normal = nn.BatchNorm2d(b, momentum=0.8) if layers and norm else nn.Identity()
            layers += [nn.Conv2d(a, b, 3, 2, 1), nn.LeakyReLU(0.2, True), nn.Dropout2d(0.25), normal]
        return nn.Sequential(*layers), nn.Sequential(nn.Flatten(), nn.Linear(widths[-1] * base * base, 1))


ARCHITECTURES = {"dcgan": (DCGANGenerator, DCGANDiscriminator), "upsample": (UpsampleGenerator, UpsampleDiscriminator)}


def build_networks(model):
    """(G, D) from the model's options, as stored in checkpoints: see set_up()."""
    generator, discriminator = ARCHITECTURES[model["arch"]]
    both = {k: model[k] for k in ("size", "channels", "depth", "classes")}
    return (generator(width=model["width"], latent_dim=model["latent_dim"], extra_convs=model["extra_convs"], **both),
            discriminator(width=model["width_d"], norm=model["norm_d"], **both))


def load_generator(path, device="cpu"):
    """The generator in a generator.pt, ready to sample: (network in eval mode, the file's other entries as a dict)."""
    saved = load_file(path)
    try:
        generator, _ = build_networks(saved["model"])
        generator.load_state_dict(saved.pop("generator"))
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path}: not a generator that train.py wrote ({type(error).__name__}: {error})") from None
    return generator.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), saved


# ---- objectives: logits of D -> scalar ------------------------------------------------------------------------------

def bce_d(real, fake, args):
    """Cross-entropy of D (Goodfellow et al. 2014) with smoothed targets (Salimans et al. 2016)."""
    return (F.binary_cross_entropy_with_logits(real, torch.full_like(real, args.real_label))
            + F.binary_cross_entropy_with_logits(fake, torch.full_like(fake, args.fake_label)))


def bce_g(fake, real, args):
    """Non-saturating loss of G: -log D(G(z)); real is not looked at."""
    return F.softplus(-fake).mean()


def relativistic_d(real, fake, args):
    """D on pairs of real and fake (Jolicoeur-Martineau 2019; with R1 and R2: Huang et al. 2024)."""
    return F.softplus(fake - real).mean()


def relativistic_g(fake, real, args):
    """G's side of the pairs."""
    return F.softplus(real - fake).mean()


def gradient_penalty(logits, images):
    """Mean squared norm of D's gradient by its input (Mescheder et al. 2018): R1 at real images, R2 at fakes."""
    gradient, = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.float().square().sum((1, 2, 3)).mean()


LOSSES = {"bce": (bce_d, bce_g), "relativistic": (relativistic_d, relativistic_g)}


def learning_rate(base, args, step, total):
    """The learning rate at a step: a function of the step, so that nothing of it is saved."""
    if args.schedule == "constant":
        return base
    share = 0.5 * (1 + math.cos(math.pi * min(step / total, 1)))
    return base * (args.lr_final + (1 - args.lr_final) * share)


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


def write_json(path, value):
    with whole_file(path) as file:
        file.write((json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def write_torch(path, value):
    buffer = io.BytesIO()  # torch's own writer turns a full disk into an error without its number
    torch.save(value, buffer)
    with whole_file(path) as file:
        file.write(buffer.getbuffer())


def load_file(path):
    """A dict of tensors, numbers and strings from a .pt file; ValueError where it is damaged or would run code."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself does not compare checksums
            torn = archive.testzip()
        if torn:
            raise ValueError(f"checksum of {torn} does not fit")
        value = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: holds more than tensors, numbers and strings, which could run code; "
                         f"it was not loaded") from None
    except Exception as error:  # damage shows in many ways
        raise ValueError(f"{path}: damaged ({type(error).__name__}: {str(error).splitlines()[0]})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a file that train.py wrote")
    return value


def lock(out):
    """Hold RUN/ for this process alone, or exit 75 and say who does. The kernel drops a dead process's lock."""
    file = open(out / "lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        fail(f"--out {out} is in use by {file.read().strip() or 'another process'}", TRY_AGAIN)
    except OSError as error:
        print(f"train.py: {out} cannot be locked on this file system ({error}): see that nothing else writes to it",
              file=sys.stderr)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    return file


def write_status(t, state, **more):
    if t.rank == 0:
        write_json(t.out / "status.json", {"state": state, "step": t.step, "steps": t.total, **more,
                                           "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "pid": os.getpid(),
                                           "host": socket.gethostname()})


# ---- checkpoint ------------------------------------------------------------------------------------------------------

def checkpoint(t):
    """All that resuming needs. Random numbers are a function of (seed, step, rank): no state of theirs is kept."""
    return {"step": t.step, "model": t.model, "options": vars(t.args), "fingerprint": t.meta["fingerprint"],
            "G": t.g.net.state_dict(), "D": t.d.net.state_dict(), "ema": t.ema.state_dict(),
            "optimizer_g": t.g.optimizer.state_dict(), "optimizer_d": t.d.optimizer.state_dict(),
            "scaler_g": t.g.scaler.state_dict(), "scaler_d": t.d.scaler.state_dict(),
            "sums": t.sums, "counts": t.counts, "skips": t.skips}


def save(t):
    """Write checkpoint.pt (the last one becomes checkpoint.prev.pt) and generator.pt. All processes call it."""
    pool(t)
    if t.rank != 0:
        return
    write_torch(t.out / "generator.pt", {  # first: a run whose checkpoint says "finished" has its generator
        "generator": t.ema.state_dict(), "model": t.model, "step": t.step, "seed": t.args.seed,
        "name": str(t.meta["name"]), "classes": t.meta["classes"] if t.model["classes"] else None,
        "class_counts": None if t.labels is None else np.bincount(t.labels, minlength=t.model["classes"]).tolist()})
    write_torch(t.out / "checkpoint.next.pt", checkpoint(t))
    if (t.out / "checkpoint.pt").exists():
        os.replace(t.out / "checkpoint.pt", t.out / "checkpoint.prev.pt")
    os.replace(t.out / "checkpoint.next.pt", t.out / "checkpoint.pt")


def find_checkpoint(args, out):
    """The checkpoint to go on from as (dict, path), or (None, None) for a fresh start."""
    if args.resume == "never":
        return None, None
    if args.resume != "auto":
        try:
            return load_file(args.resume), args.resume
        except (OSError, ValueError) as error:
            fail(f"--resume {error}")
    errors = []
    for path in (out / "checkpoint.pt", out / "checkpoint.prev.pt"):
        try:
            state = load_file(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            errors.append(str(error))
            continue
        if errors:
            print(f"train.py: {errors[0]}; going on from {path} instead", file=sys.stderr, flush=True)
            (out / "checkpoint.pt").unlink()  # or the next save would put it in the place of the good one
        return state, path
    if errors:
        fail(f"no checkpoint can be read: {'; '.join(errors)}; start over with --resume never")
    return None, None


def check_same(t, state, path):
    """Refuse a checkpoint of other networks, options or data, and name what differs."""
    there, asked = state.get("options", {}), vars(t.args)
    changed = [f"--{k.replace('_', '-')} {there.get(k)} there, {v} asked" for k, v in asked.items()
               if k not in FREE and there.get(k) != v]
    changed += [f"{k} {state.get('model', {}).get(k)} there, {v} asked" for k, v in t.model.items()
                if k not in asked and state.get("model", {}).get(k) != v]
    if state.get("fingerprint") != t.meta["fingerprint"]:
        changed.append(f"the images in {t.args.data} are not those it was trained on")
    if changed:
        fail(f"{path} does not fit: {'; '.join(changed)}. Choose another --out, or --resume never to start over")


def restore(t, state):
    """Put a checkpoint's contents where they came from."""
    t.step = state["step"]
    t.g.net.load_state_dict(state["G"])
    t.d.net.load_state_dict(state["D"])
    t.ema.load_state_dict(state["ema"])
    for side, name in ((t.g, "g"), (t.d, "d")):
        side.optimizer.load_state_dict(state[f"optimizer_{name}"])
        if side.scaler.is_enabled() and state[f"scaler_{name}"]:
            side.scaler.load_state_dict(state[f"scaler_{name}"])
    t.skips.copy_(state["skips"])
    if t.rank == 0:  # the sums of all processes, see pool()
        t.sums.copy_(state["sums"])
        t.counts.copy_(state["counts"])


class Signals:
    """Notes SIGINT, SIGTERM and SIGUSR1; `agreed()` tells, alike on all processes, which one ends the run, or 0."""

    def __init__(self, group):
        self.received, self.group, self.pending = 0, group, None
        for number in SIGNALS:
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.received = self.received or number
        if number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends at once; torchrun sends two by itself

    def agreed(self):
        if self.group is None:
            return self.received
        # the reduction started a step ago is read, and the next started: nobody waits, all leave at the same step
        number = 0
        if self.pending:
            self.pending[0].wait()
            number = int(self.pending[1])
        flag = torch.tensor(self.received)
        self.pending = dist.all_reduce(flag, dist.ReduceOp.MAX, self.group, async_op=True), flag
        return number


# ---- the step --------------------------------------------------------------------------------------------------------

def train_step(t, images, labels):
    """One update of D and one of G on a batch: images (B, C, H, W) uint8, labels (B,) or None.

    Goodfellow et al. 2014, with G's non-saturating loss. Nothing here waits for the device.
    """
    args, G, D = t.args, t.g.net, t.d.net
    d_loss, g_loss = LOSSES[args.loss]
    torch.manual_seed(seed_of(args.seed, t.step, t.rank))  # noise, dropout and flips of this step
    z = torch.randn(len(images), args.latent_dim, device=t.device)
    parts = list(zip(*(x.chunk(args.grad_accum) if x is not None else [None] * args.grad_accum
                       for x in (to_float(images, args.flip), labels, z))))
    keep_graph = len(parts) == 1  # one pass of G serves both updates; the graphs of several parts would fill the memory
    seen = dict.fromkeys(STATS, 0.0)
    statistics = [b.clone() for b in t.g_buffers]

    # D: tell x from G(z)
    for x, c, z in parts:
        with t.autocast():
            with torch.set_grad_enabled(keep_graph):
                fake = G(z, c)
            x.requires_grad_(args.r1 > 0)
            still = fake.detach().requires_grad_(args.r2 > 0)
            real_logits, fake_logits = D(x, c), D(still, c)
        loss = d_loss(real_logits, fake_logits, args)
        if args.r1:
            loss = loss + args.r1 / 2 * gradient_penalty(real_logits, x)
        if args.r2:
            loss = loss + args.r2 / 2 * gradient_penalty(fake_logits, still)
        loss = loss / len(parts)
        t.d.scaler.scale(loss).backward(inputs=t.d.params)
        seen["loss_d"] += loss.detach()
        # a relativistic D has no zero: what counts is the side of the middle
        middle = (real_logits.mean() + fake_logits.mean()) / 2 if args.loss == "relativistic" else 0
        seen["acc_real"] += (real_logits > middle).float().mean() / len(parts)
        seen["acc_fake"] += (fake_logits < middle).float().mean() / len(parts)
    seen["grad_norm_d"], skipped_d = update(t, t.d, seen["loss_d"])

    # G: make D take G(z) for real; D's weights need no gradient for that
    D.requires_grad_(False)
    for x, c, z in parts:
        with t.autocast():
            if not keep_graph:
                fake = G(z, c)
            fake_logits = D(fake, c)
            with torch.no_grad():
                real_logits = D(x, c) if args.loss == "relativistic" else None
        loss = g_loss(fake_logits, real_logits, args) / len(parts)
        t.g.scaler.scale(loss).backward()
        seen["loss_g"] += loss.detach()
        seen["reward"] += fake_logits.detach().sigmoid().mean() / len(parts)
    D.requires_grad_(True)
    seen["grad_norm_g"], skipped_g = update(t, t.g, seen["loss_g"])

    for now, before in zip(t.g_buffers, statistics):  # of a batch that was skipped nothing is to stay
        torch.where(skipped_g > 0, before, now, out=now)
    decay = min(args.ema, (1 + t.step) / (10 + t.step))  # short at first, so that the first weights are forgotten
    torch._foreach_lerp_(t.ema_tensors, t.g_tensors, 1 - decay)
    record(t, torch.stack([seen[name] for name in STATS]), torch.stack([skipped_g, skipped_d]))


def to_float(images, flip):
    """uint8 (B, C, H, W) -> [-1, 1] float32, each mirrored with probability 1/2 where flip is set."""
    x = images.float() / 127.5 - 1
    if flip:
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
    return x


def update(t, side, loss):
    """Step a network's optimiser, except where its gradient or loss is not finite: decided on the device.

    Returns (norm of the gradient before clipping, 1.0 where the update was skipped, else 0.0).
    """
    grads = [p.grad for p in side.params]
    if t.world > 1:  # by hand, as one tensor: penalties and two passes a step are no trouble then
        flat = torch.cat([g.flatten() for g in grads] + [loss.reshape(1)]) / t.world
        dist.all_reduce(flat)
        *parts, loss = flat.split([g.numel() for g in grads] + [1])
        torch._foreach_copy_(grads, [part.view(g.shape) for part, g in zip(parts, grads)])
    side.scaler.unscale_(side.optimizer)
    norm = nn.utils.get_total_norm(grads)
    if t.args.clip_grad:
        nn.utils.clip_grads_with_norm_(side.params, t.args.clip_grad, norm)
    skip = 1 - torch.isfinite(norm + loss.sum()).float()
    side.optimizer.param_groups[0]["lr"] = learning_rate(side.lr, t.args, t.step, t.schedule_steps)
    side.optimizer.found_inf = skip  # a fused optimiser then leaves weights, moments and step count alone
    side.optimizer.step()
    side.scaler.update()
    side.optimizer.zero_grad()
    return norm, skip


def record(t, values, skipped):
    """Add a step's values to the interval's sums, non-finite ones aside, and count skipped updates."""
    finite = torch.isfinite(values)
    t.sums += torch.where(finite, values, 0)
    t.counts += finite
    total, row, longest = t.skips
    total += skipped
    row.add_(1).mul_(skipped)
    torch.maximum(longest, row, out=longest)


def pool(t):
    """Bring the interval's sums of all processes to the first one."""
    if t.world > 1:
        both = torch.stack([t.sums, t.counts])
        dist.all_reduce(both)
        both *= t.rank == 0
        t.sums.copy_(both[0])
        t.counts.copy_(both[1])


# ---- the loop --------------------------------------------------------------------------------------------------------

def train(t, signals):
    """Step until the end or a signal. Returns the signal's number, or 0."""
    args, number, times = t.args, 0, []
    data = batches(t, t.step, t.total)
    while t.step < t.total and not number:
        begin = stamp(t.device)
        images, labels = next(data)
        train_step(t, images, labels)
        t.step += 1
        times.append((begin, stamp(t.device)))
        t.bar.update()
        last = t.step == t.total
        if t.step % args.log_every == 0 or last:
            log_interval(t, times)
            times.clear()
        if t.step % args.grid_every == 0 or last:
            write_grid(t)
        number = signals.agreed()
        if t.step % args.save_every == 0 or last or number:
            save(t)
            write_status(t, "running")
    return number


def stamp(device):
    """A point in time: an event in a GPU's queue, which nobody waits for, or the clock."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    return time.perf_counter()


def log_interval(t, times):
    """Read the interval's sums from the device, once, and append a line to log.jsonl."""
    pool(t)
    sums, counts, skips = t.sums.tolist(), t.counts.tolist(), t.skips.tolist()  # waits for the device
    t.sums.zero_()
    t.counts.zero_()
    t.skips[2].zero_()
    ms = [1000 * (b - a) if isinstance(a, float) else a.elapsed_time(b) for a, b in times]
    t.ms += ms
    mean = {name: s / c if c else None for name, s, c in zip(STATS, sums, counts)}  # None: never finite, see skipped_*
    lr_g, lr_d = (side.optimizer.param_groups[0]["lr"] for side in (t.g, t.d))
    t.last = {"step": t.step, "epoch": round(t.step / t.steps_per_epoch, 4), "images": t.step * t.args.batch_size,
              **mean, "lr_g": lr_g, "lr_d": lr_d, "temperature": None, "skipped_g": int(skips[0][0]),
              "skipped_d": int(skips[0][1]), "ms_per_step": sum(ms) / len(ms), "ms_min": min(ms), "ms_max": max(ms),
              "images_per_second": 1000 * t.args.batch_size * len(ms) / sum(ms)}
    if t.rank == 0:
        with open(t.out / "log.jsonl", "a") as file:
            file.write(json.dumps(t.last, allow_nan=False) + "\n")
        shown = {k: f"{t.last[k]:.3f}" if t.last[k] is not None else "none" for k in STATS[:4]}
        t.bar.set_postfix(shown)
        if t.bar.disable:
            print(f"step {t.step}/{t.total}  epoch {t.last['epoch']:.2f}  "
                  + "  ".join(f"{k} {v}" for k, v in shown.items())
                  + f"  {t.last['images_per_second']:.0f} images/s", flush=True)
    if max(skips[2]) >= t.args.max_skips:
        name, rate = ("G", "--lr-g") if skips[2][0] >= skips[2][1] else ("D", "--lr-d")
        raise Diverged(f"{int(max(skips[2]))} updates of {name} in a row were not finite at step {t.step}: try a "
                       f"smaller {rate}, --clip-grad 1, or --amp {'off' if t.amp == 'bf16' else 'bf16 or off'}, in "
                       f"another --out or with --resume never")


class Diverged(Exception):
    """Too many non-finite updates in a row."""


def write_grid(t):
    """RUN/grids/step_*.png of the same latents and classes all along, from the averaged generator."""
    if t.rank == 0:
        with torch.inference_mode():
            pixels = to_pixels(t.ema(t.grid_z, t.grid_condition))
        with whole_file(t.out / "grids" / f"step_{t.step:07d}.png") as file:
            make_grid(pixels).save(file, "PNG")


def to_pixels(images):
    """[-1, 1] (B, C, H, W) -> uint8 numpy (B, H, W, C)."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def make_grid(pixels, columns=8):
    """uint8 (N, H, W, C) -> one Pillow image, row by row, on white where the last row is not full."""
    n, height, width, channels = pixels.shape
    rows = -(-n // columns)
    full = np.full((rows * columns, height, width, channels), 255, np.uint8)
    full[:n] = pixels
    full = full.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return Image.fromarray(full.reshape(rows * height, columns * width, channels).squeeze())


def trim_log(path, step):
    """Keep the lines of log.jsonl up to a step: what came after it is about to be trained again."""
    if path.exists():
        # a killed write may have left half a line
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        with whole_file(path) as file:
            file.write("".join(line + "\n" for line in kept).encode())


def summary(t, seconds):
    ms, last = np.array(t.ms), t.last
    number = "{:.3f}".format
    losses = "  ".join(f"{k} {number(last[k]) if last[k] is not None else 'none'}" for k in STATS[:4])
    return (f"finished {t.total} steps ({last['epoch']:.1f} epochs, {last['images']} images); {len(ms)} of them in "
            f"{seconds / 60:.1f} min\n"
            f"step     {ms.mean():.1f} ms mean, {ms.min():.1f} min, {ms.max():.1f} max; "
            f"{1000 * t.args.batch_size / ms.mean():.0f} images/s\n"
            f"last     {losses}\n"
            f"skipped  {last['skipped_g']} updates of G, {last['skipped_d']} of D (not finite)\n"
            f"files    {t.out}/generator.pt, {t.out}/log.jsonl, {t.out}/grids/")


# ---- main ------------------------------------------------------------------------------------------------------------

def find_device(name):
    """The device of this process; a GPU each under torchrun."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes > 1 and name.startswith("cuda:"):
        fail(f"--device {name}: {processes} processes would share it; use --device cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and 0 < torch.cuda.device_count() < processes:
        fail(f"{processes} processes (--nproc_per_node) for {torch.cuda.device_count()} GPUs")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name}: not usable here ({str(error).splitlines()[0]})")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    return device


def find_precision(name, device):
    """--amp resolved to off, bf16 or fp16."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    capable = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if device.type == "cpu" and (capable.get("avx512_bf16") or capable.get("amx_bf16")) else "off"


def set_up(args, images, labels, meta, device, rank, world):
    """Everything that training holds, in one namespace: options, data, networks, optimisers, counters."""
    size, classes = meta["size"], len(meta["classes"]) if args.condition == "label" else 0
    args.depth = args.depth or default_depth(size)
    if size % 2 ** args.depth or not 2 <= size >> args.depth <= 15:
        fail(f"--data {args.data}: {size} pixels halved {args.depth} times (--depth) do not end at 2 to 15 pixels; "
             f"sizes like 28, 32, 64 or 128 do")
    if args.batch_size > len(images):
        fail(f"--batch-size {args.batch_size}: {args.data} has only {len(images)} images")
    if args.batch_size % (world * args.grad_accum):
        fail(f"--batch-size {args.batch_size}: not divisible by {world} processes × {args.grad_accum} (--grad-accum)")
    args.width_d = args.width_d or args.width
    model = {k: getattr(args, k) for k in ("arch", "width", "width_d", "depth", "extra_convs", "latent_dim", "norm_d")}
    model |= {"size": size, "channels": meta["channels"], "classes": classes}
    steps_per_epoch = len(images) // args.batch_size
    schedule_steps = args.epochs * steps_per_epoch

    torch.manual_seed(args.seed)
    G, D = (net.to(device, memory_format=torch.channels_last) for net in build_networks(model))
    ema = copy.deepcopy(G).eval().requires_grad_(False)
    amp = find_precision(args.amp, device)
    if amp == "fp16" and (args.r1 or args.r2):  # squared gradients leave its range
        amp = "off" if args.amp == "auto" else fail("--amp fp16 does not go with --r1 or --r2; use --amp bf16 or off")

    def side(net, lr):
        params = list(net.parameters())
        return SimpleNamespace(
            net=net, params=params, lr=lr, scaler=torch.amp.GradScaler(device.type, enabled=amp == "fp16"),
            optimizer=torch.optim.Adam(params, lr, (args.beta1, args.beta2), fused=True))

    def floats(net):
        return [x for x in net.state_dict().values() if x.is_floating_point()]

    def autocast():
        return torch.autocast(device.type, torch.float16 if amp == "fp16" else torch.bfloat16, enabled=amp != "off")

    grid_labels = None if labels is None else torch.arange(GRID, device=device) % classes
    return SimpleNamespace(
        args=args, out=Path(args.out), device=device, rank=rank, world=world, amp=amp, autocast=autocast,
        images=images, labels=labels, meta=meta, model=model, g=side(G, args.lr_g), d=side(D, args.lr_d), ema=ema,
        g_buffers=[b for b in G.buffers() if b.is_floating_point()], g_tensors=floats(G), ema_tensors=floats(ema),
        step=0, steps_per_epoch=steps_per_epoch,
        schedule_steps=schedule_steps, total=min(schedule_steps, args.max_steps or schedule_steps),
        sums=torch.zeros(len(STATS), device=device), counts=torch.zeros(len(STATS), device=device),
        skips=torch.zeros(3, 2, device=device),  # in all, in a row, longest row of the interval; of G, of D
        grid_z=latents(args.seed, range(GRID), args.latent_dim).to(device), grid_condition=grid_labels,
        ms=[], last=None)


def describe(t):
    """What config.json holds: options as resolved, versions, hardware, the data's fingerprint."""
    device = torch.cuda.get_device_name(t.device) if t.device.type == "cuda" else platform.processor() or "cpu"
    return {"options": vars(t.args), "amp": t.amp, "model": t.model, "processes": t.world,
            "parameters": {"G": sum(p.numel() for p in t.g.params), "D": sum(p.numel() for p in t.d.params)},
            "data": {k: t.meta[k] for k in ("name", "count", "size", "channels", "fingerprint")},
            "steps": t.total, "steps_per_epoch": t.steps_per_epoch,
            "hardware": {"device": t.device.type, "name": device, "cores": os.cpu_count(),
                         "threads": torch.get_num_threads(), "platform": platform.platform()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}


def main():
    args = parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    images, labels, meta = load_data(args.data, args.condition)
    device = find_device(args.device)
    t = set_up(args, images, labels, meta, device, rank, world)
    held = group = None
    if rank == 0:
        try:
            (t.out / "grids").mkdir(parents=True, exist_ok=True)
            held = lock(t.out)  # for as long as this file is open
        except OSError as error:
            fail(f"--out {t.out}: {error.strerror}")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        group = dist.new_group(backend="gloo")

    # the first process reads the checkpoint for all: RUN need not be visible on every node
    found = [find_checkpoint(args, t.out) if rank == 0 else None]
    if rank == 0 and found[0][0] is not None:
        check_same(t, *found[0])
    if world > 1:
        dist.broadcast_object_list(found, 0, group)
    state, path = found[0]
    if state is not None:
        restore(t, state)
        del state, found
    if args.compile:
        t.g.net.compile()
        if not (args.r1 or args.r2):  # torch.compile has no double backward
            t.d.net.compile()
    if t.step >= t.total:
        if rank == 0:
            print(f"{t.out} is already trained: {t.step} steps of {t.total}")
    else:
        run(t, Signals(group), path)
    if world > 1:
        dist.barrier(group)
        dist.destroy_process_group()


def begin(t, path):
    """Make RUN/ fit the step to start from, and say what is about to run."""
    for leftover in [*t.out.glob("*.tmp"), *t.out.glob("grids/*.tmp"), *t.out.glob("checkpoint.next.pt")]:
        leftover.unlink()
    if path is None:  # a fresh start leaves nothing of an earlier run
        names = ["log.jsonl"] + ["checkpoint.pt", "checkpoint.prev.pt", "generator.pt", "error.pt"] * (
            t.args.resume == "never")
        for old in [t.out / name for name in names] + list(t.out.glob("grids/step_*.png")):
            old.unlink(missing_ok=True)
    trim_log(t.out / "log.jsonl", t.step)
    write_json(t.out / "config.json", describe(t))
    with whole_file(t.out / "grids" / "real.png") as file:
        first = np.argsort(t.labels, kind="stable") if t.labels is not None else np.arange(len(t.images))
        make_grid(t.images[first[:: max(1, len(first) // GRID)][:GRID]]).save(file, "PNG")
    write_status(t, "running")
    parameters = [sum(p.numel() for p in side.params) / 1e6 for side in (t.g, t.d)]
    print(f"{t.out}: {t.args.arch} {t.meta['size']}×{t.meta['size']}×{t.meta['channels']}, G {parameters[0]:.2f} M "
          f"and D {parameters[1]:.2f} M parameters; {len(t.images)} images; steps {t.step} to {t.total} of "
          f"{t.args.batch_size} images; {t.device} × {t.world}, "
          f"{'fp32' if t.amp == 'off' else t.amp}" + (f"; going on from {path}" if path else ""), flush=True)


def run(t, signals, path):
    """Train, and leave RUN/ in a state that says how it ended."""
    start = time.perf_counter()
    t.bar = tqdm(total=t.total, initial=t.step, unit="step", disable=None if t.rank == 0 else True)
    try:
        if t.rank == 0:
            begin(t, path)
        number = train(t, signals)
    except Diverged as error:
        fail_run(t, error)
        fail(str(error))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            with contextlib.suppress(OSError):
                write_status(t, "failed", error=str(error))
            fail(f"{error.strerror}: {error.filename or t.out}; the last checkpoint is whole", 1)
        fail_run(t, error)
        raise
    finally:
        t.bar.close()
    if number and t.step < t.total:
        write_status(t, "interrupted", signal=signal.Signals(number).name)
        if t.world > 1:
            dist.barrier(signals.group)  # the one that writes is not left behind
        fail(f"{signal.Signals(number).name}: saved at step {t.step} of {t.total}; the same command goes on"
             + ("" if t.args.resume == "auto" else " with --resume auto"), TRY_AGAIN)
    write_status(t, "finished", seconds=round(time.perf_counter() - start, 1))
    if t.rank == 0:
        print(summary(t, time.perf_counter() - start), flush=True)


def fail_run(t, error):
    """Write error.pt and status.json, unless another process has: the first to fail knows the cause."""
    with contextlib.suppress(Exception):  # a dead GPU or disk is not to hide the error itself
        if json.loads((t.out / "status.json").read_text())["state"] != "failed":
            t.rank = 0
            write_status(t, "failed", error=f"{type(error).__name__}: {error}",
                         traceback="".join(traceback.format_exception(error)))
            write_torch(t.out / "error.pt", checkpoint(t))


if __name__ == "__main__":
    main()
