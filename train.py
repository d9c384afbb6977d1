"""Train a GAN on DATA/ (made by prepare_data.py) into RUN/.

    python train.py --data data/shapes --out runs/shapes
    torchrun --nproc_per_node=8 train.py --data data/faces --out runs/faces --batch-size 800
    python train.py --data data/shapes --out runs/shapes --epochs 50    # called again: goes on from there

RUN/ then holds config.json, checkpoint.pt, generator.pt (all that sample.py needs), log.jsonl, status.json,
grids/. SIGINT, SIGTERM, SIGUSR1, SIGHUP finish the step, save and exit with 75; the same command goes on.
"""

import contextlib
import copy
import io
import json
import math
import os
import pickle
import platform
import signal
import sys
import time
import traceback
import warnings
import zipfile
from argparse import Namespace
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import prepare_data

prepare_data.need("torch")
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from prepare_data import (LATER, TRY_AGAIN, Data, Parser, Trackers, check_writable, cores, fail, find_device,
                          flag, in_a_line, keep_memory, lock, on_signals, read_lines, read_or_empty,
                          status_of, steady_output, whole_file, within, write_json, write_text)

EMBEDDING = 64  # numbers that a class, a word or a sentence becomes in both networks
GRID = 64  # images in a sample grid, 8 a row
FORMAT = 3  # of checkpoint.pt and generator.pt
STATS = ("loss_g", "loss_d", "acc_real", "acc_fake", "reward", "grad_norm_g", "grad_norm_d", "diversity",
         "clipped_g", "clipped_d")  # what the steps report; log.jsonl has the means of an interval
# options that a resumed run may change: where, how long and how it is watched
FREE = {"data", "out", "resume", "epochs", "max_steps", "log_every", "save_every", "grid_every", "device",
        "compile", "graphs", "tf32", "deterministic", "max_skips", "fid_every", "fid_num", "patience",
        "tracker"}
# options that may be START:END
COURSES = ("lr_g", "lr_d", "r1", "r2", "diffaug", "beta2", "ema", "ema_images", "temperature")
# what a run writes into RUN/, beside grids/ and the trackers' folders
WRITTEN = ("config.json", "status.json", "log.jsonl", "fid.jsonl", "generator.pt", "best.pt", "error.pt",
           "checkpoint.pt", "checkpoint.prev.pt", "checkpoint.damaged.pt", "checkpoint.next.pt")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


# ---- options ---------------------------------------------------------------------------------------------

def course(low, high=math.inf):
    """An argparse type: a number from low to high, or START:END as a string of two that differ."""
    number = within(low, high)

    def ends(text):
        start, end = [number(part) for part in text.split(":")] * (2 if ":" not in text else 1)
        return start if start == end else f"{start}:{end}"
    ends.__name__ = "number or START:END"
    return ends


def between(value, share, through=lambda x: x, back=lambda x: x):
    """A number, or of START:END the number at this share of START; evenly in what `through` makes of them."""
    start, _, end = str(value).partition(":")
    start, end = through(float(start)), through(float(end or start))
    return back(end + (start - end) * share)


def parse_args(argv=None):
    """The options, those that hang on others resolved."""
    images = f"--arch {' or '.join(architectures_of(Images))}"
    count, share, decay, weight = within(1, kind=int), within(0, 1), within(0, 0.999999), within(0)
    parser = Parser(__doc__)
    add = parser.group("data")
    add("--data", required=True, metavar="DATA", help="folder made by prepare_data.py")
    add("--out", required=True, metavar="RUN", help="folder of this run")
    add("--condition", choices=["none", "label", "text"], default="none", needs=images, help="what G and D "
        "are told: nothing, the class, or a caption")

    add = parser.group("networks")
    add("--arch", choices=list(ARCHITECTURES), default="dcgan",
        help="; ".join(f"{name}: {entry[0].__doc__.splitlines()[0].rstrip('.')}"
                       for name, entry in ARCHITECTURES.items()))
    add("--width", type=count, default=64, help="channels at the highest resolution, doubled at each halving")
    add("--width-d", type=count, help="the same of D alone (default: as --width)")
    add = parser.group("networks of images", needs=[images])
    add("--width-max", type=count, help="the most channels of both (default: no bound)")
    add("--blocks", type=count, needs="--arch resnet", help="residual blocks a resolution (default: 2)")
    add("--extra-convs", type=within(0, 100, int), default=0, excludes="--arch resnet", help="more 3×3 "
        "convolutions a resolution of G")
    add("--depth", type=count, help="doublings from the first feature map to the image (default: until "
        "the first is 7 pixels wide or fewer, or an odd number)")
    add("--latent-dim", type=count, default=100, help="numbers in z")
    add("--norm-d", choices=["batch", "none"], excludes="--arch resnet", help="normalisation in D (default: "
        "none with --r1, --r2 or --gp, which take images one by one, else batch)")
    add("--spectral-norm", action="store_true", excludes="--arch resnet", help="of D's weights")
    add("--detail", type=weight, default=0.0, metavar="GAIN", help="D is shown, so many times amplified, how "
        "each pixel differs from the mean around it: for flat colours and sharp edges")
    add("--attention", action="store_true", needs="--condition text", help="words attend to places in G")
    add("--cond-augment", type=weight, default=0.0, metavar="WEIGHT", needs="--condition label or text",
        help="G draws its condition from a normal distribution around it; weight of its divergence")
    add("--grow", metavar="SIZES", excludes="--compile", help="sizes to grow through, the last that of "
        "DATA: 16,32,64")

    add = parser.group("objective")
    add("--loss", choices=list(LOSSES), default="bce", help="bce: non-saturating cross-entropy on logits; "
        "hinge; lsgan; wgan-gp; relativistic: of real against fake in pairs")
    add("--r1", type=course(0), metavar="START:END", help="weight of D's squared gradient at real images "
        "(default: 0.05 with relativistic, else 0)")
    add("--r2", type=course(0), metavar="START:END", help="the same at fakes")
    add("--penalty-interval", type=count, default=1, metavar="STEPS", help="R1 and R2 in one of so many "
        "steps of D, so many times as strong, which is cheaper")
    add("--gp", type=weight, metavar="WEIGHT", help="gradient penalty between real and fake (default: 10 "
        "with wgan-gp, else 0)")
    add("--feature-matching", type=weight, default=0.0, metavar="WEIGHT", help="G matches D's mean "
        "features, of each part of --grad-accum")
    add("--mismatch-weight", type=within(0, 0.99), default=0.0, metavar="SHARE",
        needs="--condition label or text", help="share of D's loss that tells real images with their own "
        "condition from those with another's; 0.5 is GAN-CLS")
    add("--real-label", type=share, default=1.0, needs="--loss bce or lsgan", help="D's target for real ones")
    add("--fake-label", type=share, default=0.0, needs="--loss bce or lsgan", help="D's target for fakes")

    add = parser.group("optimisation")
    add("--batch-size", type=count, default=64, help="images a step, over all processes and parts")
    add("--epochs", type=count, default=25, help="passes over the data")
    add("--max-steps", type=count, help="end after so many steps, if that is earlier")
    add("--lr-g", type=course(0, 1), default=2e-4, metavar="START:END", help="learning rate of G, "
        "as 2e-4, or 2e-4:5e-5 if it is to change")
    add("--lr-d", type=course(0, 1), default=2e-4, metavar="START:END", help="learning rate of D")
    add("--d-steps", type=count, default=1, help="steps of D for each of G")
    add("--schedule", choices=["constant", "linear", "cosine", "cosine-restarts"], help="course of all that "
        "is START:END, here and elsewhere (default: cosine if anything is, else constant)")
    add("--burn-in", type=within(1), metavar="IMAGES", help="after which all that is START:END stays at END "
        "(default: the whole run)")
    add("--restarts", type=count, default=4, needs="--schedule cosine-restarts", help="cycles")
    add("--warmup", type=within(0, kind=int), default=0, metavar="STEPS", help="the first of the "
        "run, in which both learning rates rise from 0")
    add("--optimizer", choices=list(OPTIMIZERS), default="adam", help="adamw decays weights by 0.01")
    add("--beta1", type=decay, default=0.5, needs="--optimizer adam or adamw", help="of the mean gradient")
    add("--beta2", type=course(0, 0.999999), default=0.999, metavar="START:END", help="decay of the mean "
        "square, RMSprop's too; if it changes, there are no CUDA graphs")
    add("--ema", type=course(0, 0.999999), metavar="START:END", help="decay a step of the average of G "
        "(default: 0.999)")
    add("--ema-images", type=course(0), excludes="--ema", metavar="START:END", help="that decay as a "
        "half-life in images; 0: no average")
    add("--clip-grad", type=within(1e-12), help="largest norm of a network's gradient")
    add("--grad-accum", type=count, default=1, help="parts into which a batch is cut to save memory")
    add("--max-skips", type=count, default=100, help="non-finite updates in a row that end the run")
    for kind in dict.fromkeys(entry[2] for entry in ARCHITECTURES.values()):
        kind.add_options(parser)

    add = parser.group("precision and speed")
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="mixed precision; auto: bf16 "
        "where the hardware has it, fp16 on older GPUs, else off")
    add("--tf32", choices=["on", "off"], default="on", help="on: what a GPU multiplies in "
        "fp32 has 10 bits of 23; off: all")
    add("--deterministic", action="store_true", help="the same bits each time on a GPU too, "
        "which is slower; an operation that cannot do it ends the run by its name")
    # Inductor (torch 2.11 to 2.14) expects another layout of the gradient of repeated edges
    add("--compile", action="store_true", excludes="--arch sngan", help="torch.compile both networks")
    add("--graphs", choices=["auto", "off"], default="auto", help="auto: a GPU replays the step as a CUDA "
        "graph where that can be")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")

    add = parser.group("run")
    add("--seed", type=within(0, 2 ** 63, int), default=0, help="decides weights, order of images and noise")
    add("--log-every", type=count, default=50, help="steps between lines of log.jsonl")
    add("--save-every", type=count, default=1000, help="steps between checkpoints")
    add("--grid-every", type=count, default=500, help="steps between sample grids")
    add("--fid-every", type=count, metavar="EPOCHS", needs=images, help="epochs between FIDs of the averaged "
        "generator; best.pt is the lowest's")
    add("--fid-num", type=within(2, kind=int), default=2048, needs="--fid-every", help="images of each side")
    add("--patience", type=count, metavar="N", needs="--fid-every", help="end after N FIDs without a better")
    add("--tracker", action="append", default=[], choices=["tensorboard", "wandb"], help="log there too")
    add("--resume", default="auto", metavar="{auto,never,PATH}", help="auto: from RUN's checkpoint if there "
        "is one; never: start over and replace what RUN holds; or another run's checkpoint.pt, "
        "to begin RUN from")
    args = parser.parse_args(argv)
    kind = ARCHITECTURES[args.arch][2]
    defaults = {"r1": 0.0, "r2": 0.0, "gp": 0.0, "width_d": args.width,
                "ema": 0.999 if args.ema_images is None else None,
                "blocks": 2 if args.arch == "resnet" else None, **LOSSES[args.loss][2], **kind.defaults}
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.penalty_interval > 1 and not (args.r1 or args.r2):
        parser.needless(args, "penalty_interval", "needs --r1 or --r2")
    args.norm_d = args.norm_d or ("none" if args.r1 or args.r2 or args.gp else "batch")
    for name in ("width", "width_d"):
        if args.width_max and getattr(args, name) > args.width_max:
            fail(f"--width-max {args.width_max}: below {flag(name)} {getattr(args, name)}, the width that it "
                 "bounds: raise it or lower that one")
    changing = [name for name in COURSES if isinstance(getattr(args, name, None), str)]
    if changing and args.schedule == "constant":
        name = changing[0]
        fail(f"--schedule constant: {flag(name)} {getattr(args, name)} changes: give it one value")
    for name in ("schedule", "burn_in"):
        if getattr(args, name) not in (None, "constant") and not changing:
            parser.needless(args, name, "needs a value START:END, such as --lr-g 2e-4:5e-5")
    args.schedule = args.schedule or ("cosine" if changing else "constant")
    for name in args.tracker:
        if prepare_data.missing(name):
            fail(f"--tracker {name} needs a package: pip install {name}")
    return args


# ---- data ------------------------------------------------------------------------------------------------

class Images:
    """DATA of images, and what G and D are told of each: nothing, its class, or one of its captions.

    rows (N, H, W, C) uint8; conditions: None, labels (N,), captions (N, K, L) of token ids, or their
    embeddings (N, K, n).
    """
    unit, key = "images", "size"  # key: what the meta.json of this kind alone has
    defaults, lead_in = {}, 0  # of options not named; steps before START:END values begin to change

    @staticmethod
    def add_options(parser):
        add = parser.group("augmentation", needs=[f"--arch {' or '.join(architectures_of(Images))}"])
        add("--flip", action="store_true", help="mirror half of the real images, left to right")
        add("--crop-shift", type=within(0, 0.5), default=0.0, metavar="SHARE", help="move real images by up "
            "to this share of a side")
        add("--jitter", type=within(0, 1), default=0.0, metavar="STRENGTH", help="vary brightness, contrast "
            "and saturation of real images; G learns that too")
        add("--diffaug", type=course(0, 1), nargs="?", const=1.0, default=0.0,
            metavar="START:END", help="DiffAugment real and generated images alike, all (without a number) "
            "or this share of them: for some thousand images")

    def __init__(self, args, data):
        self.meta, kind = data.meta, args.condition
        if kind != "none" and not self.meta["classes" if kind == "label" else "vocabulary"]:
            fail(f"--condition {kind}: {args.data} has no {'classes' if kind == 'label' else 'captions'}")
        if kind == "text" and self.meta.get("text_encoder"):
            kind = "vector"
            if args.attention:
                fail(f"--attention: {args.data} has an embedding of each caption (--text-encoder), no words")
        name = {"none": None, "label": "labels", "text": "tokens", "vector": "embeddings"}[kind]
        self.condition, self.conditions = kind, data.array(name) if name else None
        self.rows = data.array("images")
        # whether every step does the same, and can be recorded
        self.steady = not args.grow and not isinstance(args.beta2, str)
        # what generator.pt says of DATA
        self.about = {k: self.meta.get(k) for k in ("classes", "vocabulary", "text_encoder")}
        if kind == "label":
            counts = np.bincount(self.conditions, minlength=len(self.meta["classes"]))
            self.about["class_counts"] = counts.tolist()

    def model(self, args):
        """What build_networks() takes, from the options and from DATA."""
        meta, size = self.meta, self.meta["size"]
        depth = args.depth or default_depth(size)
        if size % 2 ** depth or not 2 <= size >> depth <= 15:
            fail(f"--data {args.data}: {size} pixels halved {depth} times (--depth) do not end at 2 to 15"
                 + ("" if args.depth else "; those of 28, 32, 64 or 128 do"))
        possible = [str(size >> i) for i in reversed(range(depth))]
        sizes = args.grow.split(",") if args.grow else [str(size)]
        if sizes[-1] != str(size) or sizes != [s for s in possible if s in sizes]:
            fail(f"--grow {args.grow}: sizes separated by commas, of {', '.join(possible)}, up to the last")
        known = self.conditions.shape[2] if self.condition == "vector" else len(
            {"none": (), "label": meta["classes"], "text": meta["vocabulary"]}[self.condition])
        names = ("arch", "width", "width_d", "width_max", "blocks", "extra_convs", "latent_dim", "norm_d",
                 "spectral_norm", "detail", "attention", "cond_augment")
        return {name: getattr(args, name) for name in names} | {
            "depth": depth, "sizes": [int(s) for s in sizes], "channels": meta["channels"],
            "condition": self.condition, "known": known}

    def lr_g(self, run, step):
        return run.args.lr_g

    def dial(self, run, step):
        """Which size is drawn: an equal share of the steps each, of which the first half fades it in."""
        sizes = run.model["sizes"]
        place = step / run.schedule_steps * len(sizes)
        size = min(int(place), len(sizes) - 1)
        return size + min(2 * (place - size), 1) - 1 if size else 0

    def sampling_dial(self, run, step):
        return self.dial(run, max(step - 1, 0))

    def real(self, run, images, dial):
        """What D tells from fakes: (B, C, size, size) in [-1, 1] of uint8 images (B, H, W, C), augmented."""
        args, x = run.args, images.permute(0, 3, 1, 2).float() / 127.5 - 1
        if args.flip:
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
        if args.crop_shift:
            x = shift(x, args.crop_shift, "reflect")
        if args.jitter:
            x = colour(x, args.jitter).clamp(-1, 1)
        sizes = run.model["sizes"]
        size = sizes[math.ceil(dial)]
        if size < x.shape[2]:
            x = F.avg_pool2d(x, x.shape[2] // size)
        if dial % 1:  # real images fade in as the fakes do
            smaller = F.avg_pool2d(x, size // sizes[math.floor(dial)])
            x = torch.lerp(F.interpolate(smaller, size=size), x, dial % 1)
        return x

    def step(self, *state_and_batch):
        train_step(*state_and_batch)

    def samples(self, drawn):
        return to_pixels(drawn)

    def write(self, path, pixels):
        """A grid PATH.png of uint8 images (n, H, W, C); returns it as a Pillow image."""
        picture = make_grid(pixels)
        with whole_file(f"{path}.png") as file:
            picture.save(file, "PNG")
        return picture


def default_depth(size):
    """How often an image's side is halved: until 7 pixels or fewer are left, or an odd number."""
    return next(depth for depth in range(1, size + 1) if size >> depth <= 7 or (size >> depth) % 2)


def batches(run, start):
    """Yield (rows (B, …) of DATA, condition (B, …) or None) on the device for the steps from `start` on.

    B is this process's share of the batch. The order of an epoch, and which of an image's captions is taken,
    come from (seed, epoch) alone; one thread gathers a batch ahead.
    """
    rows, conditions, orders = run.data.rows, run.data.conditions, {}
    resident = run.device.type == "cuda" and rows.nbytes < 0.5 * torch.cuda.mem_get_info(run.device)[0]
    if resident:
        rows = in_slices(rows, run.device)

    def gather(step):
        epoch, place = divmod(step, run.steps_per_epoch)
        if epoch not in orders:
            orders.clear()
            rng = np.random.default_rng([run.args.seed, epoch])
            orders[epoch] = rng.permutation(len(rows)), rng.random(len(rows))
        first, end = place * run.args.batch_size, (place + 1) * run.args.batch_size
        index, draws = (run.own(part[first:end]) for part in orders[epoch])
        batch = rows[to_device(index, run.device)] if resident else to_device(rows[index], run.device)
        return batch, condition_of(conditions, index, draws, run.device)

    # a thread starts on GPU 0, where another process's memory would be taken
    begin = (torch.cuda.set_device, (run.device,)) if run.device.type == "cuda" else (None, ())
    with ThreadPoolExecutor(1, "batches", *begin) as thread:
        ahead = thread.submit(gather, start)
        for step in range(start, run.total):
            batch, ahead = ahead.result(), thread.submit(gather, step + 1)
            yield batch


def condition_of(conditions, index, draws, device):
    """The conditions of the rows with these numbers; a draw in [0, 1) chooses among an image's captions."""
    if conditions is None:
        return None
    chosen = conditions[index]
    if chosen.ndim == 3:
        count = np.maximum((chosen != 0).any(2).sum(1), 1)  # fewer captions than others have are padded
        chosen = chosen[np.arange(len(chosen)), (draws * count).astype(int)]
    return to_device(chosen.astype(np.float32 if chosen.dtype.kind == "f" else np.int64), device)


def in_slices(rows, device):
    """A memory map (N, …) as a tensor on the device, 64 MB at a time: the host never holds a copy of it."""
    many = max(1, 2 ** 26 // rows[0].nbytes)
    whole = torch.from_numpy(np.array(rows[:0])).new_empty(rows.shape, device=device)
    for start in range(0, len(rows), many):
        whole[start:start + many] = torch.from_numpy(np.array(rows[start:start + many]))
    return whole


def to_device(array, device):
    """A numpy array on the device; to a GPU without waiting."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def latents(seed, numbers, dim):
    """z (n, dim) float32 of the images with these numbers: a function of (seed, number) alone."""
    return torch.from_numpy(np.stack([np.random.default_rng([seed, i]).standard_normal(dim, np.float32)
                                      for i in numbers]))


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


# ---- augmentation, on the device: images (B, C, H, W) in [-1, 1] -----------------------------------------

def diffaug(x, share):
    """DiffAugment (Zhao et al. 2020) a share: colour, shift by up to 1/8, a square of half the side."""
    varied = cut_out(shift(colour(x, 0.5), 1 / 8, "constant"))
    return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < share, varied, x)


def colour(x, strength):
    """Brightness ± strength, saturation × (1 ± 2·strength), contrast × (1 ± strength)."""
    brightness, saturation, contrast = strength * (2 * torch.rand(3, len(x), 1, 1, 1, device=x.device) - 1)
    x = x + brightness
    gray = x.mean(1, keepdim=True)
    x = gray + (x - gray) * (1 + 2 * saturation)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (1 + contrast)


def shift(x, share, mode):
    """Moved by up to `share` of the side in both directions, over an edge padded in this mode."""
    side, reach = x.shape[2], round(x.shape[2] * share)
    top, left = torch.randint(0, 2 * reach + 1, (2, len(x), 1), device=x.device)
    rows, columns = (start + torch.arange(side, device=x.device) for start in (top, left))
    padded = F.pad(x, [reach] * 4, mode=mode).permute(0, 2, 3, 1)
    image = torch.arange(len(x), device=x.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cut_out(x):
    side = x.shape[2]
    top, left = torch.randint(0, side + 1, (2, len(x), 1), device=x.device)
    places = torch.arange(side, device=x.device) + 0.5
    rows, columns = ((places - middle).abs() < side / 4 for middle in (top, left))
    return x * ~(rows[:, None, :, None] & columns[:, None, None, :])


# ---- networks of images ----------------------------------------------------------------------------------

class Encoder(nn.Module):
    """A condition -> (vector (B, EMBEDDING), words (B, L, EMBEDDING), mask (B, L) of the words).

    kind: label, class numbers (B,); text, token ids (B, L), 0 = padding; vector, embeddings (B, known) that
    prepare_data.py made. Only text has words.
    """

    def __init__(self, kind, known):
        super().__init__()
        self.kind = kind
        self.embed = nn.Linear(known, EMBEDDING) if kind == "vector" else nn.Embedding(
            known, EMBEDDING, padding_idx=0 if kind == "text" else None)
        self.neighbours = nn.Conv1d(EMBEDDING, EMBEDDING, 3, 1, 1) if kind == "text" else None

    def forward(self, condition):
        vector, words, mask = self.embed(condition), None, None
        if self.kind == "text":
            words, mask = vector + F.leaky_relu(self.neighbours(vector.mT).mT, 0.2), condition > 0
            vector = (words * (mask / mask.sum(1, keepdim=True).clamp(min=1)).unsqueeze(2)).sum(1)
        return F.layer_norm(vector, (EMBEDDING,)), words, mask


class WordAttention(nn.Module):
    """Each place of a feature map (B, C, H, W) takes up the words that fit it (Xu et al. 2018)."""

    def __init__(self, channels):
        super().__init__()
        self.query, self.value = nn.Conv2d(channels, EMBEDDING, 1), nn.Linear(EMBEDDING, channels)

    def forward(self, x, words, mask):
        query = self.query(x).flatten(2).mT
        query, words, value = (part.unsqueeze(1).to(query) for part in (query, words, self.value(words)))
        mask = (mask | ~mask.any(1, keepdim=True))[:, None, None]
        found = F.scaled_dot_product_attention(query, words, value, attn_mask=mask)
        return x + found.squeeze(1).mT.reshape(x.shape)


class AllSum(torch.autograd.Function):
    """The sum over the processes; its gradient is theirs."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return AllSum.apply(grad)


class BatchNorm(nn.BatchNorm2d):
    """Of a whole batch, or part of --grad-accum: its mean and variance are those over all processes.

    Autograd goes through them.
    """

    def forward(self, x):
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        mean, var, square = AllSum.apply(torch.stack([mean, var, mean.square()])) / dist.get_world_size()
        var = var + square - mean.square()
        with torch.no_grad():
            n = x.numel() / x.shape[1] * dist.get_world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        gain, bias = (self.weight, self.bias) if self.affine else (1, 0)
        gain = gain * (var + self.eps).rsqrt()
        return (x * gain[:, None, None] + (bias - mean * gain)[:, None, None]).to(x.dtype)


def replicate(x):
    """Maps (B, C, H, W) with their edges repeated around; autocast on CPUs would make them float32 for it."""
    with torch.autocast(x.device.type, enabled=False):
        return F.pad(x, (1, 1, 1, 1), "replicate")


class ReplicateConv(nn.Conv2d):
    """3×3 convolution over repeated edges: zeros around the map would change a colour there."""

    def forward(self, x):
        return super().forward(replicate(x))


class FromPoint(nn.ConvTranspose2d):
    """A transposed convolution of a point, (B, a, 1, 1) -> (B, b, k, k), as one matrix product."""

    def __init__(self, a, b, side):
        super().__init__(a, b, side, bias=False)

    def forward(self, x):
        weight = self.weight.permute(0, 2, 3, 1)  # as channels_last has it in memory
        return (x.flatten(1) @ weight.flatten(1)).unflatten(1, weight.shape[1:]).permute(0, 3, 1, 2)


class ToPoint(nn.Conv2d):
    """A convolution over the whole map, (B, a, k, k) -> (B, b), as one matrix product."""

    def __init__(self, a, b, side):
        super().__init__(a, b, side, bias=False)

    def forward(self, x):
        rows, weight = (y.permute(0, 2, 3, 1).flatten(1) for y in (x, self.weight))
        return F.linear(rows, weight)


class UpConv(nn.Conv2d):
    """Nearest neighbour to twice the side, then a 3×3 convolution: (B, a, H, W) -> (B, b, 2H, 2W).

    As one transposed 4×4 convolution, which equals the two with 16 products for 36.
    """

    def __init__(self, a, b, **options):
        super().__init__(a, b, 3, 1, 1, **options)

    def forward(self, x):
        padding = 1
        if self.padding_mode == "replicate":
            x, padding = replicate(x), 3
        weight = F.avg_pool2d(self.weight.flip(2, 3), 2, 1, 1, divisor_override=1)  # sums of 2×2
        return F.conv_transpose2d(x, weight.transpose(0, 1), self.bias, 2, padding)


def around(x):
    """The mean (B, C, H, W) of images over each pixel and its neighbours; avg_pool2d is slow on CPUs."""
    def total(x):
        x = F.pad(x, (1, 1, 1, 1))
        x = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
        return x[..., :-2] + x[..., 1:-1] + x[..., 2:]
    return total(x) / total(torch.ones_like(x[:1, :1]))


def widths_of(width, m, outer):
    """Channels from the highest resolution down: doubled at each halving, up to --width-max."""
    return [min(width << i, m.width_max or width << i) for i in range(m.depth + (not outer))]


class Generator(nn.Module):
    """G(z (B, noise_dim), condition, dial) -> images (B, channels, size, size), those of DATA in [-1, 1].

    condition: what the encoder of its kind takes, or None. The first stage makes a small feature map, each
    other doubles it, and so does the head of most. With several sizes (--grow) the dial says which is drawn:
    0.3 is the second at 30 % over the first; None the last.
    """
    init = staticmethod(lambda module: None)  # how parts are initialised where PyTorch's way will not do
    outer = True  # the head doubles the map, D's stem halves it
    squash = staticmethod(torch.tanh)
    condition_scale = 1 / 4  # at z's own, G follows it alone and ignores z

    def __init__(self, m):
        super().__init__()
        self.blocks, self.extra_convs = m.blocks, m.extra_convs  # a resolution: of resnet; of the others
        self.encode = None if m.condition == "none" else Encoder(m.condition, m.known)
        self.augment = nn.Linear(EMBEDDING, 2 * EMBEDDING) if m.cond_augment else None
        self.noise_dim = m.latent_dim + (EMBEDDING if m.cond_augment else 0)
        widths = widths_of(m.width, m, self.outer)[::-1]  # 64×64, width 64: 512, 256, 128, 64
        base, self.inputs = m.sizes[-1] >> m.depth, m.latent_dim + (EMBEDDING if self.encode else 0)
        self.stages = nn.ModuleList([self.first(widths[0], base)])
        self.stages.extend(self.stage(a, b) for a, b in zip(widths, widths[1:]))
        self.ends = [(size // base).bit_length() - 1 - self.outer for size in m.sizes]  # last stage of each
        self.heads = nn.ModuleList(self.head(widths[end], m.channels) for end in self.ends)
        self.attended = m.depth // 2
        for part in (self.stages, self.heads):
            part.apply(self.init)
        self.attend = WordAttention(widths[self.attended]) if m.attention else None

    def distribution(self, vector):
        """Mean and log variance (B, EMBEDDING) of what an encoded condition becomes (Zhang et al. 2017)."""
        return self.augment(vector).float().chunk(2, 1)

    def divergence(self, condition):
        """Of that distribution from N(0, 1), a scalar: the term that --cond-augment weighs."""
        mean, log_variance = self.distribution(self.encode(condition)[0])
        return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()

    def forward(self, z, condition=None, dial=None):
        style = z
        if self.encode is not None:
            vector, words, mask = self.encode(condition)
            if self.augment is not None:
                z, noise = z.split([z.shape[1] - EMBEDDING, EMBEDDING], 1)
                mean, log_variance = self.distribution(vector)
                vector = mean + noise * (log_variance / 2).exp()
            style = torch.cat([z, vector], 1)
            z = torch.cat([z, vector * self.condition_scale], 1)
        level = len(self.heads) - 1 if dial is None else dial
        drawn, x, maps = math.ceil(level), z, []
        for i, stage in enumerate(self.stages[:self.ends[drawn] + 1]):
            x = stage(x, style) if isinstance(stage, Modulated) else stage(x)
            if self.attend is not None and i == self.attended:
                x = self.attend(x, words, mask)
            maps.append(x)
        image = self.heads[drawn](x)
        if level < drawn:  # progressive growing fades the new size in (Karras et al. 2018)
            before = self.heads[drawn - 1](maps[self.ends[drawn - 1]])
            image = torch.lerp(F.interpolate(before, size=image.shape[2:]), image, level - drawn + 1)
        return self.squash(image)


class Discriminator(nn.Module):
    """D(images (B, channels, size, size), told, dial) -> float32 (logits (B,), features (B, C)).

    told: what told() makes of the condition, None without one. It is judged by projection (Miyato & Koyama
    2018) on the sum of the features over the places; what is returned is their mean.
    """
    init, outer = staticmethod(lambda module: None), True

    def __init__(self, m):
        super().__init__()
        widths, self.normalised = widths_of(m.width_d, m, self.outer), m.norm_d == "batch"
        self.blocks, self.detail = m.blocks, m.detail
        self.starts = [(m.sizes[-1] // size).bit_length() - 1 for size in m.sizes]  # first stage of each size
        channels = m.channels * (2 if m.detail else 1)
        self.stems = nn.ModuleList(self.stem(channels, widths[start]) for start in self.starts)
        self.stages = nn.ModuleList(self.stage(a, b) for a, b in zip(widths, widths[1:]))
        base = m.sizes[-1] >> m.depth
        self.head, self.places = self.last(widths[-1], base), base * base
        self.apply(self.init)
        if not self.normalised:  # or the signal would fade on its way
            self.stems.apply(he_init), self.stages.apply(he_init)
        self.encode = None if m.condition == "none" else Encoder(m.condition, m.known)
        if self.encode is not None:
            self.project = nn.Linear(EMBEDDING, widths[-1], bias=False)
            nn.init.normal_(self.project.weight, 0, 0.02)
        if m.spectral_norm:
            for module in [x for x in self.modules() if isinstance(x, (nn.Conv2d, nn.Linear))]:
                nn.utils.parametrizations.spectral_norm(module)

    def told(self, condition):
        """Conditions (B, …) as the features that fit them (B, C): once for all images shown with them."""
        return self.project(self.encode(condition)[0]).float()

    def forward(self, x, told=None, dial=None):
        level = len(self.stems) - 1 if dial is None else dial
        shown = math.ceil(level)
        h = self.first_map(x, shown)
        for i in range(self.starts[shown], len(self.stages) + 1):
            if level < shown and i == self.starts[shown - 1]:
                smaller = F.avg_pool2d(x, 2 ** (self.starts[shown - 1] - self.starts[shown]))
                h = torch.lerp(self.first_map(smaller, shown - 1), h, level - shown + 1)
            if i < len(self.stages):
                h = self.stages[i](h)
        return self.judge(h, told)

    def first_map(self, x, shown):
        """The first feature map of images of one of the sizes."""
        if self.detail:  # a level of gray more or less is lost beside what changes a whole image
            x = torch.cat([x, self.detail * (x - around(x.float()))], 1)
        return self.stems[shown](x)

    def judge(self, h, told):
        """(logits, features) of the last feature map."""
        logits, features = self.head(h).flatten().float(), h.mean((2, 3)).float()
        return logits if self.encode is None else logits + self.match(features, told), features

    def match(self, features, told):
        """How well features (B, C) fit conditions: the part of the logits (B,) that is theirs."""
        return (told * features).sum(1) * self.places


def dcgan_init(module):
    """Radford et al. 2016, as in pytorch/examples: convolutions N(0, 0.02), normalisations N(1, 0.02)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0, 0.02)
    elif isinstance(module, nn.BatchNorm2d) and module.affine:
        nn.init.normal_(module.weight, 1, 0.02)


def he_init(module):
    """He et al. 2015, for convolutions without normalisation."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, 0.2)


class DCGANGenerator(Generator):
    """Radford et al. 2016: transposed 4×4 convolutions, batch normalisation, ReLU."""
    init = staticmethod(dcgan_init)

    def block(self, conv, width):
        convs = [conv] + [nn.Conv2d(width, width, 3, 1, 1, bias=False) for _ in range(self.extra_convs)]
        return [layer for conv in convs for layer in (conv, BatchNorm(width), nn.ReLU(True))]

    def first(self, width, base):
        unflatten = nn.Unflatten(1, (self.inputs, 1, 1))  # keeps the names in files as they are
        return nn.Sequential(unflatten, *self.block(FromPoint(self.inputs, width, base), width))

    def stage(self, a, b):
        return nn.Sequential(*self.block(nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), b))

    def head(self, width, channels):
        return nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False)


class DCGANDiscriminator(Discriminator):
    """Radford et al. 2016: strided 4×4 convolutions, batch normalisation after the first, LeakyReLU 0.2."""
    init = staticmethod(dcgan_init)

    def stem(self, channels, width):
        return nn.Sequential(nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True))

    def stage(self, a, b):
        normal = BatchNorm(b) if self.normalised else nn.Identity()
        return nn.Sequential(nn.Conv2d(a, b, 4, 2, 1, bias=False), normal, nn.LeakyReLU(0.2, True))

    def last(self, width, base):
        return ToPoint(width, 1, base)


class Modulation(nn.Module):
    """Batch normalisation whose gain and bias come from z (Miyato & Koyama 2018, Brock et al. 2019)."""

    def __init__(self, inputs, width):
        super().__init__()
        self.norm, self.gain_bias = BatchNorm(width, affine=False), nn.Linear(inputs, 2 * width)
        nn.init.normal_(self.gain_bias.weight, 0, 0.02)
        nn.init.zeros_(self.gain_bias.bias)

    def forward(self, x, z):
        gain, bias = self.gain_bias(z)[:, :, None, None].chunk(2, 1)
        return torch.addcmul(bias, self.norm(x), 1 + gain)


class Modulated(nn.Sequential):
    """Layers, of which some are told z: colours of a whole image need not pass through the feature maps."""

    def forward(self, x, z):
        for layer in self:
            x = layer(x, z) if isinstance(layer, Modulation) else layer(x)
        return x


class SNGANGenerator(DCGANGenerator):
    """After Miyato et al. 2018: convolutions at every resolution, z and condition at each normalisation."""
    outer = False
    squash = staticmethod(lambda x: x.float().tanh())  # in bf16 black and white move by half a level of gray

    def stage(self, a, b):
        # free transposed convolutions leave their grid on flat colours
        convs = [UpConv(a, b, bias=False, padding_mode="replicate")]
        convs += [ReplicateConv(b, b, 3, bias=False) for _ in range(self.extra_convs)]
        return Modulated(*(x for conv in convs for x in (conv, Modulation(self.inputs, b), nn.ReLU(True))))

    def head(self, width, channels):
        return ReplicateConv(width, channels, 3)


class SNGANDiscriminator(DCGANDiscriminator):
    """Their standard network: a 3×3 convolution at each resolution, a strided 4×4 one between."""
    outer = False

    def layers(self, a, b, *shape):
        normal = BatchNorm(b) if self.normalised else nn.Identity()
        return [nn.Conv2d(a, b, *shape), normal, nn.LeakyReLU(0.2, True)]

    def stem(self, channels, width):
        return nn.Sequential(nn.Conv2d(channels, width, 3, 1, 1), nn.LeakyReLU(0.2, True))

    def stage(self, a, b):
        return nn.Sequential(*self.layers(a, a, 4, 2, 1), *self.layers(a, b, 3, 1, 1))


class UpsampleGenerator(Generator):
    """Linear to the first feature map, then nearest-neighbour upsampling and 3×3 convolutions."""

    def first(self, width, base):
        unflatten = nn.Unflatten(1, (width, base, base))
        return nn.Sequential(nn.Linear(self.inputs, width * base * base), unflatten)

    def stage(self, a, b):
        convs = [UpConv(a, b)] + [nn.Conv2d(b, b, 3, 1, 1) for _ in range(self.extra_convs)]
        return nn.Sequential(*(x for conv in convs
                               for x in (conv, BatchNorm(b, momentum=0.8), nn.LeakyReLU(0.2, True))))

    def head(self, width, channels):
        return UpConv(width, channels)


class UpsampleDiscriminator(Discriminator):
    """Strided 3×3 convolutions, LeakyReLU, dropout of a quarter of the maps, normalisation from block 2."""

    def stem(self, channels, width):
        return nn.Sequential(nn.Conv2d(channels, width, 3, 2, 1), nn.LeakyReLU(0.2, True), nn.Dropout2d(0.25))

    def stage(self, a, b):
        normal = BatchNorm(b, momentum=0.8) if self.normalised else nn.Identity()
        return nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.LeakyReLU(0.2, True), nn.Dropout2d(0.25), normal)

    def last(self, width, base):
        return nn.Sequential(nn.Flatten(), nn.Linear(width * base * base, 1))


class Residual(nn.Module):
    """x + 1×1(act(3×3(act(1×1(x))))) at twice the width, in groups of 16 where that divides it.

    act: a bias, then LeakyReLU 0.2.
    """

    def __init__(self, width):
        super().__init__()
        groups = width // 8 if width % 8 == 0 else 1
        self.wide = nn.Conv2d(width, 2 * width, 1)
        self.mix = nn.Conv2d(2 * width, 2 * width, 3, 1, 1, groups=groups)
        self.last = nn.Conv2d(2 * width, width, 1, bias=False)

    def forward(self, x):
        return x + self.last(F.leaky_relu(self.mix(F.leaky_relu(self.wide(x), 0.2)), 0.2))


class Resample(nn.Module):
    """A feature map at twice its side, or half: bilinear, over borders of 0."""

    def __init__(self, up):
        super().__init__()
        side = torch.tensor([1.0, 3, 3, 1]) / (4 if up else 8)
        self.convolve = F.conv_transpose2d if up else F.conv2d
        self.register_buffer("kernel", side.outer(side).expand(1, 1, 4, 4).clone(), persistent=False)

    def forward(self, x):
        return self.convolve(x, self.kernel.expand(x.shape[1], -1, -1, -1), None, 2, 1, groups=x.shape[1])


class Basis(nn.Module):
    """The first feature map: learnt patterns, weighed by a linear map of what G is told."""

    def __init__(self, inputs, width, base):
        super().__init__()
        self.linear = nn.Linear(inputs, width, bias=False)
        self.patterns = nn.Parameter(torch.randn(width, base, base))

    def forward(self, x):
        return self.patterns * self.linear(x)[:, :, None, None]


class OneHot(nn.Embedding):
    """In an Encoder's place: a linear map of a class's one-hot vector, of weights N(0, gain²/known)."""

    def __init__(self, known, width, gain=1.0):
        super().__init__(known, width)
        nn.init.normal_(self.weight, 0, gain * known ** -0.5)

    def forward(self, condition):
        return super().forward(condition), None, None


@torch.no_grad()
def fix_up(*parts):
    """Weights N(0, 1/fan-in); in residual blocks less, by their number, and 0 at the end of each."""
    modules = [module for part in parts for module in part.modules()]
    blocks = [module for module in modules if isinstance(module, Residual)]
    for module in modules:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.weight, 0, module.weight[0].numel() ** -0.5)
    for block in blocks:
        for conv in (block.wide, block.mix):
            conv.weight.mul_(nn.init.calculate_gain("leaky_relu", 0.2) * len(blocks) ** -0.25)
            conv.bias.zero_()
        block.last.weight.zero_()


class ResnetGenerator(Generator):
    """Huang et al. 2024, R3GAN: residual blocks in groups of channels, no normalisation."""
    outer, squash = False, staticmethod(lambda image: image)

    def __init__(self, m):
        super().__init__(m)
        fix_up(self.stages, self.heads)
        if m.condition == "label":
            self.encode, self.condition_scale = OneHot(m.known, EMBEDDING), 1

    def first(self, width, base):
        return nn.Sequential(Basis(self.inputs, width, base), *[Residual(width) for _ in range(self.blocks)])

    def stage(self, a, b):
        narrow = [nn.Conv2d(a, b, 1, bias=False)] if a != b else []
        return nn.Sequential(*narrow, Resample(up=True), *[Residual(b) for _ in range(self.blocks)])

    def head(self, width, channels):
        return nn.Conv2d(width, channels, 1, bias=False)


class ResnetDiscriminator(Discriminator):
    """The generator's mirror image, down to features whose linear map is the logit or meets the condition."""
    outer = False

    def __init__(self, m):
        super().__init__(m)
        width = widths_of(m.width_d, m, self.outer)[-1]
        self.linear = nn.Linear(width, 1 if self.encode is None else width, bias=False)
        fix_up(self.stems, self.stages, self.head, self.linear)
        if m.condition == "label":
            self.encode, self.project = OneHot(m.known, width, width ** -0.5), nn.Identity()
        elif self.encode is not None:
            nn.init.normal_(self.project.weight, 0, (width * EMBEDDING) ** -0.5)

    def stem(self, channels, width):
        return nn.Conv2d(channels, width, 1, bias=False)

    def stage(self, a, b):
        widen = [nn.Conv2d(a, b, 1, bias=False)] if a != b else []
        return nn.Sequential(*[Residual(a) for _ in range(self.blocks)], Resample(up=False), *widen)

    def last(self, width, base):
        return nn.Sequential(*[Residual(width) for _ in range(self.blocks)],
                             nn.Conv2d(width, width, base, groups=width, bias=False), nn.Flatten())

    def judge(self, h, told):
        features = self.head(h).float()
        if self.encode is None:
            return self.linear(features).flatten().float(), features
        return self.match(features, told), features

    def match(self, features, told):
        return (self.linear(features).float() * told).sum(1)


# ---- texts -----------------------------------------------------------------------------------------------

class Texts:
    """DATA of texts, used as Images is: rows (N, L) of token ids, 0 = padding. The dial is a temperature."""
    unit, key = "texts", "length"
    conditions, steady, defaults = None, False, {"temperature": "2.0:0.5"}

    @staticmethod
    def add_options(parser):
        add = parser.group("texts", needs=["--arch seq"])
        add("--pretrain-epochs", type=within(0, kind=int), default=0, help="the first of the epochs, in "
            "which G learns by likelihood alone")
        add("--pretrain-lr", type=within(0, 1), default=5e-3, needs="--pretrain-epochs", help="learning rate")
        add("--temperature", type=course(1e-6, 1e6), metavar="START:END", help="of the "
            "Gumbel-softmax against D (sample.py has its own), changing by factors (default: 2:0.5); "
            "RelGAN's: 1:0.01 with --schedule linear")
        add("--likelihood-weight", type=within(0), default=0.0, metavar="WEIGHT", help="of the likelihood's "
            "loss, added to G's against D: keeps variety; loss_g in log.jsonl is without it")

    def __init__(self, args, data):
        self.meta, self.rows = data.meta, data.array("tokens")
        self.about = {"vocabulary": self.meta["vocabulary"], "text_level": self.meta["level"]}
        self.lead_in = args.pretrain_epochs * (len(self.rows) // args.batch_size)

    def model(self, args):
        return {"arch": args.arch, "width": args.width, "width_d": args.width_d,
                "sizes": [self.meta["length"]], "channels": len(self.meta["vocabulary"])}

    def lr_g(self, run, step):
        return run.args.pretrain_lr if step < self.lead_in else run.args.lr_g

    def dial(self, run, step):
        """The temperature of the Gumbel-softmax."""
        return between(run.args.temperature, run.share_of_start(step), math.log, math.exp)

    def sampling_dial(self, run, step):
        return 1.0

    def real(self, run, tokens, dial):
        return F.one_hot(tokens.long(), run.model["channels"]).float()

    def step(self, run, state, turn, z, tokens, condition):
        alone = state.step < self.lead_in  # G learns by likelihood, D does not yet
        weight = 1 if alone else run.args.likelihood_weight * turn.train_g
        if weight:
            many = run.sum(counted(tokens).sum()) / (run.world * run.args.grad_accum)  # tokens a part
            for part in tokens.long().chunk(run.args.grad_accum):
                with run.autocast():
                    loss, counts = state.G.net.likelihood(part)
                loss = weight * (loss * counts).sum() / many
                state.G.backward(loss, run.args.grad_accum)
                if alone:
                    state.meter.note(loss_g=loss)
        if not alone:  # the likelihood's gradient stays, and the game's is added to it
            return train_step(run, state, turn, z, tokens, condition)
        state.meter.note(**state.G.update(run))
        state.ema.update(state.G)
        state.meter.close()

    def samples(self, drawn):
        return drawn.argmax(2).cpu()

    def write(self, path, tokens):
        """PATH.txt of token ids (n, L), a line each."""
        write_text(f"{path}.txt", "".join(line + "\n" for line in to_texts(tokens, self.meta)))


def to_texts(tokens, meta):
    """Token ids (n, L) as strings, up to the first 0; meta: vocabulary, and level, which is word or char."""
    rows = [row[:row.index(0)] if 0 in row else row for row in tokens.tolist()]
    return [(" " if meta["level"] == "word" else "").join(meta["vocabulary"][i] for i in row) for row in rows]


def counted(tokens):
    """Which of the tokens (B, L) belong to their text: those up to the first 0."""
    return F.pad(tokens[:, :-1] > 0, (1, 0), value=True)


class SequenceGenerator(nn.Module):
    """An LSTM that writes tokens by Gumbel-softmax: G(noise (B, L), None, temperature) -> texts (B, L, V).

    A token is a row of a unit matrix. In training it is drawn by Gumbel noise of its own, and its gradient is
    that of the softmax at this temperature (Jang et al. 2017, straight through). In eval mode the noise picks
    it, as a quantile, from logits divided by the temperature. After a 0, the padding, come only zeros.
    """

    def __init__(self, m):
        super().__init__()
        self.noise_dim = m.sizes[-1]
        self.embed, self.lstm = nn.Linear(m.channels, m.width, bias=False), nn.LSTMCell(m.width, m.width)
        self.start, self.logits = nn.Parameter(torch.zeros(m.width)), nn.Linear(m.width, m.channels)
        nn.init.normal_(self.embed.weight, 0, m.width ** -0.5)

    def forward(self, z, condition=None, dial=1.0):
        x, state, texts = self.start.expand(len(z), -1), None, []
        for noise in z.unbind(1):
            state = self.lstm(x, state)
            logits = self.logits(state[0]).float()
            if self.training:
                token = F.gumbel_softmax(logits, dial, hard=True)
            else:
                below = (logits / dial).softmax(1).cumsum(1) < torch.special.ndtr(noise).unsqueeze(1)
                token = F.one_hot(below.sum(1).clamp(max=logits.shape[1] - 1), logits.shape[1]).float()
            if texts:
                ended = texts[-1][:, :1].detach()
                token = token * (1 - ended) + texts[-1].detach() * ended
            texts.append(token)
            x = self.embed(token)
        return torch.stack(texts, 1)

    def likelihood(self, tokens, dial=1.0):
        """Negative logarithm (B, L) of tokens' probability at the temperature dial, and counted() of them."""
        inputs, state, outputs = F.embedding(tokens[:, :-1], self.embed.weight.T), None, []
        for x in (self.start.expand(len(tokens), -1), *inputs.unbind(1)):
            state = self.lstm(x, state)
            outputs.append(state[0])
        logits = self.logits(torch.stack(outputs, 1)).float() / dial
        return F.cross_entropy(logits.mT, tokens, reduction="none"), counted(tokens)


class SequenceDiscriminator(nn.Module):
    """D(texts (B, L, V)) -> (logits (B,), features (B, C)): maxima of convolutions over 2 to 5 (Kim 2014)."""

    def __init__(self, m):
        super().__init__()
        reach = range(2, min(m.sizes[-1], 5) + 1)
        self.embed = nn.Linear(m.channels, EMBEDDING, bias=False)
        self.convs = nn.ModuleList(nn.Conv1d(EMBEDDING, m.width_d, k) for k in reach)
        self.head = nn.Linear(m.width_d * len(reach), 1)
        nn.init.normal_(self.embed.weight, 0, EMBEDDING ** -0.5)

    def forward(self, x, told=None, dial=None):
        h = self.embed(x).transpose(1, 2)
        features = torch.cat([F.leaky_relu(conv(h), 0.2).amax(2) for conv in self.convs], 1)
        return self.head(features).flatten().float(), features.float()


# ---- what can be trained ---------------------------------------------------------------------------------

ARCHITECTURES = {  # name: (generator, discriminator, kind of data)
    "dcgan": (DCGANGenerator, DCGANDiscriminator, Images),
    "sngan": (SNGANGenerator, SNGANDiscriminator, Images),
    "upsample": (UpsampleGenerator, UpsampleDiscriminator, Images),
    "resnet": (ResnetGenerator, ResnetDiscriminator, Images),
    "seq": (SequenceGenerator, SequenceDiscriminator, Texts),
}


def architectures_of(kind):
    """Names of the architectures for this kind of data."""
    return [name for name, entry in ARCHITECTURES.items() if entry[2] is kind]


def build_networks(model):
    """(G, D) from what the kind of data's model() gave, as it is stored in checkpoints."""
    generator, discriminator, _ = ARCHITECTURES[model["arch"]]
    G, D = generator(Namespace(**model)), discriminator(Namespace(**model))
    for module in (*G.modules(), *D.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = None  # nobody reads it, and each costs a launch a pass
    return G, D


def load_generator(path, device="cpu"):
    """The generator in a generator.pt, in eval mode, and the file's other entries as a dict."""
    saved = load_file(path)
    if saved.get("format") != FORMAT:
        raise ValueError(f"{path}: of another version of train.py; draw with that one, or train again")
    try:
        generator, _ = build_networks(LATER | saved["model"])
        generator.load_state_dict(saved.pop("generator"))
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path}: no generator.pt or best.pt of train.py ({in_a_line(error)})") from None
    return generator.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), saved


# ---- objectives: logits of D -> scalar -------------------------------------------------------------------

# name: (loss of D from (real, fake, args), loss of G from (fake, real), options that go with it unless named)
LOSSES = {
    # Goodfellow et al. 2014, G non-saturating; smoothed targets: Salimans et al. 2016
    "bce": (lambda real, fake, args:
            F.binary_cross_entropy_with_logits(real, torch.full_like(real, args.real_label))
            + F.binary_cross_entropy_with_logits(fake, torch.full_like(fake, args.fake_label)),
            lambda fake, real: F.softplus(-fake).mean(), {}),
    # Lim & Ye 2017
    "hinge": (lambda real, fake, args: F.relu(1 - real).mean() + F.relu(1 + fake).mean(),
              lambda fake, real: -fake.mean(), {}),
    # Mao et al. 2017
    "lsgan": (lambda real, fake, args:
              0.5 * ((real - args.real_label).square().mean() + (fake - args.fake_label).square().mean()),
              lambda fake, real: 0.5 * (fake - 1).square().mean(), {}),
    # Gulrajani et al. 2017
    "wgan-gp": (lambda real, fake, args: fake.mean() - real.mean(),
                lambda fake, real: -fake.mean(), {"gp": 10.0}),
    # pairs of real and fake: Jolicoeur-Martineau 2019; with R1 and R2: Huang et al. 2024
    "relativistic": (lambda real, fake, args: F.softplus(fake - real).mean(),
                     lambda fake, real: F.softplus(real - fake).mean(), {"r1": 0.05, "r2": 0.05}),
}
PAIRED = {"relativistic"}  # losses of G that need the logits of real images
CENTRED = {"bce", "hinge"}  # whose logits are 0 where D cannot tell


def squared_gradient(logits, images):
    """Squared norm (B,) of D's gradient by its input (B, …), itself differentiable."""
    gradient, = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.float().square().flatten(1).sum(1)


def another(condition):
    """For each image of a batch a condition (B, …) that is not its own, drawn evenly from the others'.

    Returns them (B, …), and (B,) whether there was one to draw.
    """
    flat = condition.reshape(len(condition), -1).float()
    differs = torch.cdist(flat, flat, p=0) > 0  # in how many numbers
    draws = (1 - torch.rand(differs.shape, device=flat.device)) * differs
    return condition[draws.argmax(1)], differs.any(1)


def seen(x, amounts):
    """Images (B, …) as D is shown them."""
    return diffaug(x, amounts["diffaug"]) if "diffaug" in amounts else x


def loss_of_d(run, D, amounts, x, c, fake, dial=None, wrong=None, differs=None):
    """D on real x and on fakes (B, …), both with condition c: (loss, what the log says of it).

    amounts: see Player; wrong (B, …), differs (B,): of --mismatch-weight, see another().
    """
    args, objective = run.args, LOSSES[run.args.loss][0]
    x, fake = (y.detach().requires_grad_(name in amounts) for y, name in ((x, "r1"), (fake, "r2")))
    with run.autocast():
        told = None if c is None else D.told(c)
        real_logits, features = D(seen(x, amounts), told, dial)
        fake_logits, _ = D(seen(fake, amounts), told, dial)
    loss = objective(real_logits, fake_logits, args)
    if args.mismatch_weight:  # real images with a wrong condition (Reed et al. 2016)
        with run.autocast():
            wrong_logits = real_logits + D.match(features, D.told(wrong)) - D.match(features, told)
        wrong_logits = torch.where(differs, wrong_logits, fake_logits)  # as if there were no such term
        loss = torch.lerp(loss, objective(real_logits, wrong_logits, args), args.mismatch_weight)
    if "r1" in amounts:  # Mescheder et al. 2018
        loss = loss + amounts["r1"] / 2 * squared_gradient(real_logits, x).mean()
    if "r2" in amounts:
        loss = loss + amounts["r2"] / 2 * squared_gradient(fake_logits, fake).mean()
    if args.gp:  # Gulrajani et al. 2017
        share = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device)
        halfway = torch.lerp(fake.float(), x, share).detach().requires_grad_()
        with run.autocast():
            logits, _ = D(seen(halfway, amounts), told, dial)
        loss = loss + args.gp * (squared_gradient(logits, halfway).add(1e-12).sqrt() - 1).square().mean()
    real, fake = real_logits.detach(), fake_logits.detach()
    middle = 0 if args.loss in CENTRED else (real.mean() + fake.mean()) / 2
    return loss, {"loss_d": loss, "acc_real": real > middle, "acc_fake": fake < middle}


def loss_of_g(run, G, D, amounts, x, c, fake, dial=None):
    """G on its fakes (B, …), beside real x where the objective compares: (loss, what the log says of it)."""
    args = run.args
    with run.autocast():
        told = None if c is None else D.told(c)
        fake_logits, features = D(seen(fake, amounts), told, dial)
        real_logits = real_features = None
        if args.loss in PAIRED or args.feature_matching:
            with torch.no_grad():
                real_logits, real_features = D(seen(x, amounts), told, dial)
    loss = LOSSES[args.loss][1](fake_logits, real_logits)
    if args.feature_matching:  # Salimans et al. 2016, of the means over all processes
        apart = run.sum((features.float() - real_features).mean(0)) / run.world
        loss = loss + args.feature_matching * apart.square().mean()
    if args.cond_augment:
        with run.autocast():
            loss = loss + args.cond_augment * G.divergence(c)
    return loss, {"loss_g": loss, "reward": fake_logits.sigmoid()}


# ---- the state, and what moves it ------------------------------------------------------------------------

class Saved:
    """The attributes named in `saved` as a tree of tensors, numbers and strings, and back."""

    def state_dict(self):
        values = {name: getattr(self, name) for name in self.saved}
        return {name: v.state_dict() if hasattr(v, "state_dict") else v for name, v in values.items()}

    def load_state_dict(self, tree):
        for name in self.saved:
            mine, value = getattr(self, name), tree[name]
            if isinstance(mine, torch.Tensor):
                mine.copy_(value)
            elif not hasattr(mine, "load_state_dict"):
                setattr(self, name, value)
            elif value:  # a loss scale that is switched off is an empty dict
                mine.load_state_dict(value)


class Player(Saved):
    """G or D with its optimiser. Weights move in update() and nowhere else."""
    saved = "net", "optimizer", "scaler", "skips"

    def __init__(self, run, name, net):
        self.name, self.net, self.params = name, net, list(net.parameters())
        self.weights, self.statistics = flatten(net)
        self.skip = torch.zeros((), device=run.device)  # 1 where the last update was left out
        self.clipped = torch.zeros_like(self.skip)  # 1 where its gradient was cut to --clip-grad
        self.skips = torch.zeros(3, device=run.device)  # in all, in a row, the longest row of an interval
        kind, args = run.device.type, run.args
        self.lr = torch.zeros((), dtype=torch.float64 if kind == "cpu" else torch.float32, device=run.device)
        # weights of R1 and R2 and the share of images augmented, as far as in use; G's lie idle
        self.amounts = {k: self.skip.clone() for k in ("r1", "r2", "diffaug") if getattr(args, k)}
        self.optimizer = OPTIMIZERS[args.optimizer](
            self.params, self.lr, (args.beta1, run.at(0).beta2), fused=True,
            capturable=kind == "cuda" and args.graphs == "auto" and run.data.steady)
        self.optimizer.found_inf = self.skip  # 1: it leaves weights, moments and its count alone
        self.lr = self.optimizer.param_groups[0]["lr"]  # some keep theirs on the host
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp == "fp16")
        self.losses = []  # of the step under way

    def load_state_dict(self, tree):
        # how the optimiser computes, and so where it counts, is this device's matter
        groups = self.optimizer.state_dict()["param_groups"]
        super().load_state_dict(tree | {"optimizer": tree["optimizer"] | {"param_groups": groups}})
        self.optimizer.param_groups[0]["lr"] = self.lr

    def backward(self, loss, parts):
        """Add the gradient of a loss, of one of so many parts of the batch."""
        self.losses.append(loss.detach())
        self.scaler.scale(loss / parts if parts > 1 else loss).backward(inputs=self.params)

    def update(self, run):
        """Step, unless a gradient or loss of any process is not finite: on the device, so nobody waits."""
        params = [p for p in self.params if p.grad is not None]  # a size that is not drawn yet has none
        grads = [p.grad for p in params]
        loss = run.average_(grads, sum(self.losses[1:], self.losses[0]))
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm(grads)
        if run.args.clip_grad:
            nn.utils.clip_grads_with_norm_(params, run.args.clip_grad, norm)
            torch.gt(norm, run.args.clip_grad, out=self.clipped)
        either = torch.lerp(norm, loss, 0.0)  # NaN if one is infinite or NaN, since 0 times these is
        torch.ne(either, either, out=self.skip)
        self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad()
        self.losses.clear()
        total, row, longest = self.skips
        total += self.skip
        torch.addcmul(self.skip, row, self.skip, out=row)
        torch.maximum(longest, row, out=longest)
        return {f"grad_norm_{self.name}": norm, f"clipped_{self.name}": self.clipped}


class Average(Saved):
    """The running average of G's weights and statistics, which is what is sampled (Yazıcı et al. 2019)."""
    saved = ("net",)

    def __init__(self, G):
        self.net = copy.deepcopy(G.net).eval().requires_grad_(False)
        self.weights, self.statistics = flatten(self.net)
        self.share = torch.zeros_like(G.skip)  # of G in it, at the step under way

    def update(self, G):
        self.weights.lerp_(G.weights, self.share)
        self.statistics.lerp_(G.statistics, self.share)


class Meter(Saved):
    """Means over an interval of what the steps report, on the device; what is not finite does not count."""
    saved = ("sums",)

    def __init__(self, device):
        self.sums = torch.zeros(2, len(STATS), device=device)  # of the values; how many
        self.nothing = torch.full((), math.nan, device=device)
        self.noted = {}  # name: values of the step under way, a part each

    def note(self, **values):
        """Values of a part of a batch, for all of it or image by image."""
        for name, value in values.items():
            value = value.detach().float()
            self.noted.setdefault(name, []).append(value.mean() if value.ndim else value)

    def close(self):
        """Add what a step noted to the sums."""
        parts = [self.noted.get(name, [self.nothing]) for name in STATS]
        values = torch.stack([torch.stack(part).mean() if len(part) > 1 else part[0] for part in parts])
        self.sums += torch.stack([values.nan_to_num(0, 0, 0), values * 0 == 0])
        self.noted.clear()

    def read(self, run):
        """{name: mean over the interval and all processes, or None}; begins anew. Waits for the device."""
        sums, counts = run.sum(self.sums).tolist()
        self.sums.zero_()
        return {name: s / n if n and math.isfinite(s) else None for name, s, n in zip(STATS, sums, counts)}


@dataclass
class State(Saved):
    """What training changes: a checkpoint holds these fields and no others, so that none can be forgotten."""
    G: Player
    D: Player
    ema: Average
    meter: Meter
    step: int = 0
    best: dict | None = None  # the lowest FID and its step, how many came since, the step last scored
    notes: dict = field(default_factory=dict)  # what diagnose() has said
    saved = property(lambda self: [f.name for f in fields(self)])


def flatten(net):
    """Move a network's weights into one tensor, its batch statistics into another, which are returned.

    The network's own become views of these, their layouts as they were: what is done to all takes one launch.
    """
    flats = []
    for tensors in ([*net.parameters()], [x for x in net.buffers() if x.is_floating_point()]):
        sizes = [x.numel() for x in tensors]
        flats.append(next(net.parameters()).new_empty(sum(sizes)))
        for x, part in zip(tensors, flats[-1].split(sizes)):
            x.data = part.as_strided(x.shape, x.stride(), part.storage_offset()).copy_(x.data)
    return flats


class RMSprop(torch.optim.RMSprop):
    """Honours found_inf as the fused optimisers do: then neither weights nor moments move."""

    def __init__(self, params, lr, betas, fused, capturable):
        lr = lr if capturable else lr.cpu()  # read as a number: from the host that costs no wait
        super().__init__(params, lr, betas[1], capturable=capturable)

    def step(self):
        params = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        moments = [self.state[p]["square_avg"] for p in params if p in self.state]
        before = [x.clone() for x in moments]
        for p in params:
            p.grad = torch.where(self.found_inf > 0, 0, p.grad)
        super().step()
        for x, old in zip(moments, before):
            torch.where(self.found_inf > 0, old, x, out=x)


OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "rmsprop": RMSprop}


class Turn(NamedTuple):
    """What decides which operations a step is made of."""
    train_g: bool
    penalise: bool  # D, by R1 and R2
    dial: float  # what the kind of data makes of it: of images, the size drawn


@dataclass(frozen=True)
class Run:
    """What was asked for and where it runs: nothing of it changes while it trains."""
    args: Namespace  # the options as resolved
    data: object  # a kind of data, such as Images
    model: dict  # what build_networks() takes
    device: torch.device
    amp: str  # off, bf16 or fp16
    steps_per_epoch: int
    schedule_steps: int  # which --epochs asks for
    total: int  # which are made
    out: Path
    rank: int
    world: int  # processes
    group: object = None  # all of them, on the host

    def at(self, step):
        """What holds at a step, from its number alone: so nothing of it is saved."""
        args, start = self.args, self.share_of_start(step)
        lr_g, lr_d, beta2, r1, r2, diffaug = (between(value, start) for value in (
            self.data.lr_g(self, step), args.lr_d, args.beta2, args.r1, args.r2, args.diffaug))
        if args.ema is None:
            half_life = between(args.ema_images, start)
            decay = 0.5 ** (args.batch_size / half_life) if half_life else 0.0
        else:
            decay = between(args.ema, start)
        decay = min(decay, (1 + step) / (10 + step))  # short at first, to forget the first weights
        warm = min((step + 1) / args.warmup, 1) if args.warmup else 1
        turn = Turn((step + 1) % args.d_steps == 0, step % args.penalty_interval == 0,
                    self.data.dial(self, step))
        # lazy regularisation: Karras et al. 2020
        amounts = {"r1": r1 * args.penalty_interval, "r2": r2 * args.penalty_interval, "diffaug": diffaug}
        return Namespace(lr_g=lr_g * warm, lr_d=lr_d * warm, beta2=beta2, amounts=amounts, turn=turn,
                         share=1 - decay)  # of G in its average

    def share_of_start(self, step):
        """How much of START is in the values START:END: 1 at first, 0 after the burn-in."""
        args, first = self.args, self.data.lead_in
        stretch = args.burn_in / args.batch_size if args.burn_in else self.schedule_steps - first
        done = max(step - first, 0) / max(stretch, 1)
        if done >= 1:
            return 0.0
        if args.schedule == "cosine-restarts":  # Loshchilov & Hutter 2017
            done = done * args.restarts % 1
        return 1 - done if args.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    def autocast(self):
        dtype = torch.float16 if self.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.amp != "off")

    def own(self, batch):
        """This process's rows of a batch: of each part of --grad-accum its share, so that the parts of all
        processes together hold the same rows on any number of them."""
        parts = batch.reshape(self.args.grad_accum, self.world, -1, *batch.shape[1:])
        return parts[:, self.rank].reshape(-1, *batch.shape[1:])

    def average_(self, grads, loss):
        """Put the mean over the processes into gradients, and return that of a loss, in one message."""
        if self.world > 1:
            flat = torch.cat([x.flatten() for x in grads] + [loss.reshape(1)]) / self.world
            dist.all_reduce(flat)
            *parts, loss = flat.split([x.numel() for x in grads] + [1])
            torch._foreach_copy_(grads, [part.view_as(x) for x, part in zip(grads, parts)])
        return loss.squeeze()

    def sum(self, tensor):
        """The sum of a tensor over the processes, on each of them."""
        return AllSum.apply(tensor) if self.world > 1 else tensor

    def on_first(self, function, *args):
        """What a call by the first process alone returns, on all of them; they also raise its SystemExit."""
        try:
            result = function(*args) if self.rank == 0 else None
        except SystemExit as end:
            result = end
        if self.world > 1:
            file = io.BytesIO()
            torch.save(result, file)  # pickle alone writes a network's one tensor anew for each weight
            packed = [file.getvalue()]
            dist.broadcast_object_list(packed, 0, self.group)
            result = torch.load(io.BytesIO(packed[0]), weights_only=False)  # what the first has just written
        if isinstance(result, SystemExit):
            raise result
        return result

    def disband(self, error=None):
        """End the connections of all processes at the same moment: who loses one before may crash.

        error: what ends them all. Its frames hold CUDA graphs, and NCCL would wait for these to be gone.
        """
        if error:
            traceback.clear_frames(error.__traceback__)
        if self.world > 1:
            dist.barrier(self.group)  # the one that writes is not left behind
            dist.destroy_process_group()


# ---- the step --------------------------------------------------------------------------------------------

def prepare_step(run, state):
    """Put what Python decides where the step finds it: random numbers, and what holds at this step."""
    now = run.at(state.step)
    own = {"cuda": torch.cuda, "mps": torch.mps}.get(run.device.type, torch.default_generator)
    own.manual_seed(seed_of(run.args.seed, state.step))  # torch's seeds all there are, in 150 µs
    z = run.own(torch.randn(run.args.batch_size, state.G.net.noise_dim, device=run.device))
    if run.world > 1:  # z is that of one process; augmentations and dropout are each process's own
        own.manual_seed(seed_of(run.args.seed, state.step, run.rank + 1))
    state.G.lr.fill_(now.lr_g)
    state.D.lr.fill_(now.lr_d)
    state.ema.share.fill_(now.share)
    for name, amount in state.D.amounts.items():
        amount.fill_(now.amounts[name])
    if isinstance(run.args.beta2, str):
        for group in (*state.G.optimizer.param_groups, *state.D.optimizer.param_groups):
            group.update({"alpha": now.beta2} if "alpha" in group else {"betas": (run.args.beta1, now.beta2)})
    return now.turn, z


def train_step(run, state, turn, z, batch, condition):
    """D learns to tell x from G(z), then G learns to make D take G(z) for real (Goodfellow et al. 2014).

    z: latents (B, noise_dim); batch: rows (B, …) of DATA; condition (B, …) or None. Nothing here waits for
    the device; what changes from step to step comes in the tensors that prepare_step() fills, or in the turn.
    """
    G, D, amounts, meter = state.G.net, state.D.net, state.D.amounts, state.meter
    if not turn.penalise:
        amounts = {name: amount for name, amount in amounts.items() if name == "diffaug"}
    x = run.data.real(run, batch, turn.dial)
    wrong = another(condition) if run.args.mismatch_weight else (None, None)
    n = run.args.grad_accum
    parts = list(zip(*([None] * n if y is None else y.chunk(n) for y in (x, condition, z, *wrong))))
    reuse = turn.train_g and n == 1  # one pass of G serves both; of parts it would fill the memory
    statistics = state.G.statistics.clone()

    for x, c, z, *wrong in parts:
        with run.autocast(), torch.set_grad_enabled(reuse):
            fake = G(z, c, turn.dial)
        loss, report = loss_of_d(run, D, amounts, x, c, fake, turn.dial, *wrong)
        state.D.backward(loss, n)
        meter.note(**report, diversity=spread(fake) / spread(x))
    meter.note(**state.D.update(run))

    D.requires_grad_(False)  # or --compile works out D's gradients in G's pass
    for x, c, z, *_ in parts if turn.train_g else ():
        if not reuse:
            with run.autocast():
                fake = G(z, c, turn.dial)
        loss, report = loss_of_g(run, G, D, amounts, x, c, fake, turn.dial)
        state.G.backward(loss, n)
        meter.note(**report)
    D.requires_grad_(True)
    if turn.train_g:
        meter.note(**state.G.update(run))

    # of a batch that was skipped nothing is to stay in G
    skip = (state.G if turn.train_g else state.D).skip
    torch.where(skip > 0, statistics, state.G.statistics, out=state.G.statistics)
    state.ema.update(state.G)
    meter.close()


def spread(x):
    """How much a batch (B, …) varies: the mean standard deviation; of images one pixel in 16 tells enough."""
    return (x.detach()[..., ::4, ::4] if x.ndim == 4 else x.detach()).float().std(0, correction=0).mean()


def seed_of(*parts):
    """One 64-bit seed from several integers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


# ---- the step as a CUDA graph ----------------------------------------------------------------------------

def capture(function):
    """The launches of a call as a CUDA graph: a function that does them again, on the same memory."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a thread gathers the next batch
        function()
    return graph.replay


def aside(function):
    """Call on a stream of its own, as a capture does."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*capturable=True")  # optimisers miss the capture that is to come
        function()
    torch.cuda.current_stream().wait_stream(stream)


def graphed(step, aside=aside, capture=capture, warm_up=3):
    """`step`, captured once for each turn, replayed from then on: Python then launches one graph a step."""
    calls, inputs, replays = Counter(), {}, {}

    def call(run, state, turn, *batch):
        calls[turn] += 1
        if calls[turn] <= warm_up:  # libraries choose their kernels, optimisers make their moments
            return aside(lambda: step(run, state, turn, *batch))
        if turn not in replays:
            inputs[turn] = [None if x is None else x.clone() for x in batch]
            try:
                replays[turn] = capture(lambda: step(run, state, turn, *inputs[turn]))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuntimeError("the step cannot be recorded as a CUDA graph: call again with --graphs "
                                   "off, which runs it as it is written") from error
        for x, new in zip(inputs[turn], batch):
            if x is not None:
                x.copy_(new)
        replays[turn]()
    return call


# ---- checkpoints and signals -----------------------------------------------------------------------------

def write_torch(path, value):
    buffer = io.BytesIO()  # torch's own writer turns a full disk into an error without its number
    torch.save(value, buffer)
    with whole_file(path) as file:
        file.write(buffer.getbuffer())


def load_file(path):
    """A dict of tensors, numbers and strings from a .pt file; ValueError if damaged or if code would run."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself does not compare checksums
            if torn := archive.testzip():
                raise ValueError(f"checksum of {torn} does not fit")
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (FileNotFoundError, PermissionError):
        raise
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: holds more than tensors and numbers, which could run code") from None
    except Exception as error:  # damage shows in many ways
        raise ValueError(f"{path}: damaged ({in_a_line(error)})") from None


def checkpoint(run, state):
    """All that resuming needs. Random numbers are a function of (seed, step, rank): they have no state.

    Of the meter it holds this process's sums alone; save() puts in those of all.
    """
    return state.state_dict() | {"format": FORMAT, "options": vars(run.args), "model": run.model,
                                 "fingerprint": run.data.meta["fingerprint"]}


def save(run, state):
    """Write generator.pt, checkpoint.pt (the last becomes checkpoint.prev.pt), status.json. All call it."""
    sums = run.sum(state.meter.sums)
    if run.rank != 0:
        return
    save_generator(run, state, "generator.pt")  # first: a run that has finished has its generator
    write_torch(run.out / "checkpoint.next.pt", checkpoint(run, state) | {"meter": {"sums": sums}})
    if (run.out / "checkpoint.pt").exists():
        os.replace(run.out / "checkpoint.pt", run.out / "checkpoint.prev.pt")
    os.replace(run.out / "checkpoint.next.pt", run.out / "checkpoint.pt")
    write_status(run, state, "running")


def save_generator(run, state, name):
    write_torch(run.out / name, {
        "format": FORMAT, "generator": state.ema.net.state_dict(), "model": run.model, "step": state.step,
        "dial": run.data.sampling_dial(run, state.step), "seed": run.args.seed,
        "name": str(run.data.meta["name"]), **run.data.about})


def lies_in(run, path):
    """Whether a checkpoint is RUN's own, by whatever name."""
    return path.parent.resolve() == run.out.resolve()


def find_checkpoint(run):
    """The checkpoint to go on from as (dict, path), or (None, None) for a fresh start."""
    asked, errors = run.args.resume, []
    own = [run.out / name for name in ("checkpoint.pt", "checkpoint.prev.pt") if (run.out / name).exists()]
    paths = {"never": [], "auto": own}.get(asked, [Path(asked)])
    elsewhere = bool(paths) and not lies_in(run, paths[0])
    if elsewhere and own:
        if read_or_empty(run.out / "config.json").get("options", {}).get("resume") != asked:
            fail(f"--resume {asked}: {run.out} has a checkpoint of its own: go on from that with --resume "
                 "auto, or name another --out")
        asked, paths, elsewhere = "auto", own, False  # the same command, called again
    if asked != "auto" and paths and not paths[0].is_file():
        fail(f"--resume {asked}: not a file: auto, never or a checkpoint, such as RUN/checkpoint.pt")
    for path in paths:
        try:
            saved = load_file(path)
        except (OSError, ValueError) as error:
            errors.append(str(error))
            continue
        check_same(run, saved, path)
        if elsewhere and saved["step"] >= run.total:
            fail(f"--resume {path} has made {saved['step']} steps, and {run.total} are asked for: raise "
                 "--epochs or --max-steps")
        if errors:
            print(f"train.py: {errors[0]}; going on from {path} instead", file=sys.stderr, flush=True)
            own[0].replace(run.out / "checkpoint.damaged.pt")  # or a save would take it for a good one
        return saved, path
    if errors:
        fail(f"--resume {asked}: {'; '.join(errors)}; start over with --resume never")
    return None, None


def check_same(run, saved, path):
    """Refuse a checkpoint of other networks, options or data, and name what differs."""
    if saved.get("format") != FORMAT or "options" not in saved:  # a generator has none
        fail(f"{path}: no checkpoint, or of another version of train.py: go on with that, or start over with "
             "--resume never")
    options, asked, model = saved["options"], vars(run.args), saved["model"]
    free = FREE - ({"epochs"} if asked["grow"] else set())  # whose sizes hang on their number
    there, here = LATER | options | model, {k: v for k, v in asked.items() if k not in free} | run.model
    if saved["best"] and asked["fid_every"]:  # of how many the lowest was
        there["fid_num"], here["fid_num"] = saved["best"].get("num", options["fid_num"]), asked["fid_num"]
    changed = [f"{flag(k) if k in asked else k} {there.get(k)} there, {v} asked" for k, v in here.items()
               if there.get(k) != v]
    if saved["fingerprint"] != run.data.meta["fingerprint"]:
        changed.insert(0, f"the {run.data.unit} in {run.args.data} are not those it was trained on")
    if changed:
        fail(f"{path} does not fit: {'; '.join(changed)}. Give the options that it has, take another --out, "
             "or start over: --resume never")
    courses = [f"{flag(k)} {asked[k]}" for k in COURSES if isinstance(asked.get(k), str)]
    if courses and not asked["burn_in"] and asked["epochs"] != options["epochs"]:
        print(f"note: {path} was to end after {options['epochs']} epochs: {', '.join(courses)} goes on from "
              f"where a run of {asked['epochs']} epochs has it at this step, not from END", file=sys.stderr)


class Signals:
    """Notes that one of SIGNALS came; agreed() tells all processes alike which one ends the run, or 0."""

    def __init__(self, group):
        self.received, self.group, self.pending = 0, group, None
        on_signals(self.note, SIGNALS)

    def note(self, number, frame):
        self.received = self.received or number
        if number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends at once; torchrun sends two

    def agreed(self):
        if self.group is None:
            return self.received
        # what was asked a step ago is read, and asked again: nobody waits, all leave at the same step
        number = 0
        if self.pending:
            self.pending[0].wait()
            number = int(self.pending[1])
        asked = torch.tensor(self.received)
        self.pending = dist.all_reduce(asked, dist.ReduceOp.MAX, self.group, async_op=True), asked
        return number


# ---- what people see -------------------------------------------------------------------------------------

class Mute:
    """In the place of Watch on all processes but the first: whatever is asked of it, nothing happens."""

    def __getattr__(self, name):
        return lambda *args, **more: None


class Watch:
    """RUN/ and the terminal: log, grids, status, trackers, notes. Of the state it changes the notes alone."""

    def __init__(self, run):
        self.run = run
        self.bar = tqdm(disable=True)
        self.began = self.logged = time.perf_counter()
        self.first_step, self.times = 0, []  # of this call; when the interval's steps began and ended
        self.recent = []  # lines of the last epoch

    def open(self):
        """Take RUN/ for this process and find where to go on from, or one line why not, before any work."""
        run = self.run
        if run.args.fid_every:
            import evaluate  # here alone: who does not track FID needs none of it
            evaluate.find_weights()
        places = [run.out / "lock", run.out / "grids", run.out, *run.out.parents]
        made = [place for place in places if not place.exists()]
        try:
            run.out.mkdir(parents=True, exist_ok=True)
            self.lock = lock(run.out)  # for as long as this file is open
            (run.out / "grids").mkdir(exist_ok=True)
            check_writable("--out", run.out)
        except OSError as error:
            why = "a file: name a folder for the run" if run.out.is_file() else error.strerror
            fail(f"--out {run.out}: {why}", status_of(error))
        try:
            saved, path = find_checkpoint(run)
            if saved and saved["best"] and not self.holds(saved["best"]):
                saved["best"] = None
            ours = "run_id" in read_or_empty(run.out / "config.json") or path and lies_in(run, path)
            if not ours and (there := [name for name in WRITTEN if (run.out / name).exists()]):
                fail(f"--out {run.out} holds {there[0]}, which is of no run of train.py: choose another "
                     "folder")
            return saved, path
        except SystemExit:  # of a call that is refused nothing is left
            for place in made:
                place.rmdir() if place.is_dir() else place.unlink()
            raise

    def holds(self, best):
        """Whether RUN/best.pt is the generator that a checkpoint counts as the best."""
        try:
            return load_file(self.run.out / "best.pt").get("step") == best["step"]
        except (OSError, ValueError):
            return False

    def begin(self, state, path):
        """Make RUN/ fit the step to start from, and say what is about to run."""
        run, out = self.run, self.run.out
        own = path and lies_in(run, path)
        earlier = read_or_empty(out / "config.json") if own else {}
        run_id = earlier.get("run_id") or os.urandom(16).hex()
        first = earlier.get("first_step", 0) if earlier else state.step
        config = describe(run, state, run_id) | {"first_step": first}
        self.trackers = Trackers(run.args.tracker, out, run_id, state.step, config)  # or one line why not
        if not own:  # a fresh start, or one from another run, leaves nothing of an earlier run
            keep = ["config.json"]  # by which the rest is known as a run's, should this be killed
            keep += [] if run.args.resume == "never" else ["generator.pt", "error.pt"]
            for old in [*(out / name for name in WRITTEN if name not in keep), *out.glob("grids/step_*")]:
                old.unlink(missing_ok=True)
        for name in (*WRITTEN, "grids/*"):  # what a kill left half written
            for left in out.glob(f"{name}.[0-9]*.tmp"):
                left.unlink()
        scored = state.best["last"] if state.best else state.step - 1  # without a best it is scored again
        for log, last in ((out / "log.jsonl", state.step), (out / "fid.jsonl", scored)):
            if log.exists():  # what came after this step is about to be trained again
                lines = [line for line in read_lines(log) if line["step"] <= last]
                write_text(log, "".join(json.dumps(line) + "\n" for line in lines))
        write_json(out / "config.json", config)
        write_status(run, state, "running")
        if cores() < (local := int(os.environ.get("LOCAL_WORLD_SIZE", 1))):
            tqdm.write(f"note: {local} processes share {cores()} CPUs: each needs one or more, as by sbatch "
                       f"--cpus-per-task={2 * local}", file=sys.stderr)
        data, batch = run.data, run.args.batch_size
        classes = data.conditions is not None and data.conditions.ndim == 1
        order = np.argsort(data.conditions, kind="stable") if classes else np.arange(len(data.rows))
        shown = min(GRID, len(order))
        self.grid_rows = order[np.arange(shown) * len(order) // shown]  # spread over DATA, classes in turn
        data.write(out / "grids" / "real", data.rows[self.grid_rows])
        self.first_step, self.logged = state.step, time.perf_counter()
        print(f"{out}: {run.args.arch} {'×'.join(str(n) for n in data.rows.shape[1:])}, "
              f"G {len(state.G.weights) / 1e6:.2f} M and D {len(state.D.weights) / 1e6:.2f} M parameters; "
              f"{len(data.rows)} {data.unit}; steps {state.step} to {run.total}, batch {batch}; "
              f"{run.device} × {run.world}, {precision(run)}"
              + (f"; going on from {path}" if path else ""), flush=True)
        self.bar = tqdm(total=self.goal(state.step) * batch, initial=state.step * batch, unit=f" {data.unit}",
                        bar_format="{desc} {percentage:3.0f}% {rate_noinv_fmt}, {remaining} left{postfix}",
                        mininterval=1, disable=None)

    def goal(self, step):
        """The last step that is as long as this one: time left is told up to there."""
        lead_in = self.run.data.lead_in
        return min(lead_in, self.run.total) if step < lead_in else self.run.total

    def stamp(self, images=0):
        """Note when a step begins or has ended, by the clock or an event in a GPU's queue: nobody waits."""
        if self.run.device.type == "cuda":
            self.times.append(torch.cuda.Event(enable_timing=True))
            self.times[-1].record()
        else:
            self.times.append(time.perf_counter())
        self.bar.update(images)

    def log(self, state, means):
        """A line in log.jsonl, for the trackers and for people; see whether it shows what should be said."""
        run, batch, epoch = self.run, self.run.args.batch_size, state.step / self.run.steps_per_epoch
        ms = [1000 * (end - begin) if isinstance(end, float) else begin.elapsed_time(end)
              for begin, end in zip(self.times[::2], self.times[1::2])]
        now, ended = run.at(state.step - 1), time.perf_counter()
        rate, goal = batch * len(ms) / (ended - self.logged), self.goal(state.step)
        line = {"step": state.step, "epoch": round(epoch, 4), "images": state.step * batch,
                **means, "lr_g": now.lr_g, "lr_d": now.lr_d,
                "temperature": now.turn.dial if run.data.unit == "texts" else None,
                "ms_per_step": sum(ms) / len(ms), "ms_min": min(ms), "ms_max": max(ms),
                "images_per_second": rate}
        self.times, self.logged = [], ended
        append_line(run.out / "log.jsonl", line)
        self.diagnose(state, line)
        self.trackers.log(line, state.step)
        shown = [f"{means[k]:.3f}" if means[k] is not None else "none" for k in STATS[:4]]
        self.bar.total = goal * batch
        self.bar.set_description("lead-in, " * (goal < run.total) + f"epoch {epoch:.1f}", refresh=False)
        self.bar.set_postfix_str("G {} D {} right {}/{}".format(*shown), refresh=False)
        if self.bar.disable:
            print(f"step {state.step}/{run.total}  epoch {epoch:.2f}  "
                  + "  ".join(f"{k} {v}" for k, v in zip(STATS, shown)) + f"  {rate:.0f} {run.data.unit}/s  "
                  f"{tqdm.format_interval((goal - state.step) * batch / rate)} left"
                  + " of the lead-in" * (goal < run.total), flush=True)

    def diagnose(self, state, line):
        """Say in words, once each, what the last epoch's lines show; status.json keeps it."""
        args, epoch, lines = self.run.args, self.run.steps_per_epoch, self.recent + [line]
        self.recent = [x for x in lines if x["step"] > state.step - epoch or x in lines[-3:]]
        first = max(self.first_step, self.run.data.lead_in)
        if state.step - first < max(epoch, 200):  # the first steps of any run look bad
            return

        def mean(*names):
            values = [line[name] for line in self.recent for name in names if line[name] is not None]
            return sum(values) / len(values) if values else math.nan

        accuracy, diversity = mean("acc_real", "acc_fake"), mean("diversity")
        moved = [x["loss_g"] for x in self.recent if x["loss_g"] is not None]
        tells = f"D tells real from fake in {accuracy:.0%} of cases, over an epoch: "
        paired = args.loss in PAIRED  # whose D is at its best when it can hardly tell
        found = {
            "D loses": (accuracy < 0.6 and not paired,
                        tells + "too weak to teach G; raise --lr-d or --width-d, or lower --lr-g"),
            "D wins": (accuracy > 0.95, tells + "G learns little from it; lower --lr-d or --width-d, or try "
                       + ("larger --r1 and --r2" if paired else "--r1, --diffaug, --loss relativistic")),
            "no motion": (len(moved) > 2 and max(moved) - min(moved) < 1e-4 * abs(max(moved)),
                          "the loss of G has not moved for an epoch: look at the images, and raise --lr-g"),
            "collapse": (diversity < 0.3, f"generated images vary {diversity:.2f} times as real ones do: G "
                         "draws few pictures; try lower learning rates, --r1 or another --loss"),
            "clipped": (max(mean("clipped_g"), mean("clipped_d")) > 0.95, "nearly every gradient of an epoch "
                        "was clipped: raise --clip-grad or lower the learning rates")}
        for name, (seen, text) in found.items():
            if seen and name not in state.notes:
                state.notes[name] = f"step {state.step}: {text} (in another --out)"
                tqdm.write(f"note: {state.notes[name]}", file=sys.stderr)

    def grid(self, state):
        """grids/step_*.png of the same latents and conditions all along, from the averaged generator."""
        samples = draw(self.run, state, np.resize(self.grid_rows, GRID))
        for name in (f"step_{state.step:07d}", "latest"):
            picture = self.run.data.write(self.run.out / "grids" / name, samples)
        if picture:
            self.trackers.log({}, state.step, picture)

    def score(self, state):
        """FID of the averaged generator, into fid.jsonl; best.pt where it is the lowest so far."""
        import evaluate
        run, start, n = self.run, time.perf_counter(), min(self.run.args.fid_num, len(self.run.data.rows))
        rows = np.random.default_rng(run.args.seed).permutation(len(run.data.rows))[:n]  # lend conditions
        pixels = draw(run, state, rows)
        fid = None
        with contextlib.suppress(torch.OutOfMemoryError):
            fid = evaluate.fid_against_data(pixels, run.args.data, n, run.device)
        if fid is None:  # no room beside what training holds
            torch.cuda.empty_cache()
            tqdm.write(f"note: training leaves too little of {run.device} for Inception: FID on the CPU",
                       file=sys.stderr)
            fid = evaluate.fid_against_data(pixels, run.args.data, n, torch.device("cpu"))
        seconds, better = time.perf_counter() - start, not state.best or fid < state.best["fid"]
        append_line(run.out / "fid.jsonl", {
            "step": state.step, "epoch": round(state.step / run.steps_per_epoch, 4), "fid": fid,
            "n_generated": n, "n_real": n, "seconds": round(seconds, 1)})
        tqdm.write(f"step {state.step}  FID {fid:.2f} ({n} generated, {n} real; {seconds:.1f} s)"
                   + ("  the best so far" if better else ""))
        self.trackers.log({"fid": fid}, state.step)
        self.logged += seconds  # images/s are those of training
        if better:
            save_generator(run, state, "best.pt")
        return fid

    def close(self):
        self.bar.close()

    def finished(self, state):
        """Say so in status.json where what came after the last save left another word."""
        named = read_or_empty(self.run.out / "status.json").get("state")
        if named != "finished" and state.step <= self.run.total:  # or the call asked for less
            with contextlib.suppress(OSError):  # all else is done
                write_status(self.run, state, "finished")

    def end(self, state, name, **more):
        """The last word of a run that finished or was interrupted."""
        out, seconds = self.run.out, time.perf_counter() - self.began
        write_status(self.run, state, name, **more, seconds=round(seconds, 1))
        self.trackers.close()
        lines = [line for line in read_lines(out / "log.jsonl") if line["step"] > self.first_step]
        if name == "finished" and lines:
            mean = sum(line["ms_per_step"] for line in lines) / len(lines)
            fastest, slowest = min(line["ms_min"] for line in lines), max(line["ms_max"] for line in lines)
            last = lines[-1]
            print(f"finished {state.step} steps ({last['epoch']:.1f} epochs), {state.step - self.first_step} "
                  f"of them in {seconds / 60:.1f} min\n"
                  f"step     {mean:.1f} ms mean, {fastest:.1f} to {slowest:.1f}\n"
                  f"skipped  {last['skipped_g']} updates of G, {last['skipped_d']} of D (not finite)\n"
                  f"files    {out}/generator.pt, {out}/log.jsonl, {out}/grids/\n"
                  f"draw     python sample.py --run {out} --num 2048", flush=True)

    say = staticmethod(tqdm.write)


def precision(run):
    """How numbers are kept, in a word or two."""
    tf32 = run.device.type == "cuda" and run.args.tf32 == "on" and torch.cuda.is_tf32_supported()
    return run.amp if run.amp != "off" else "fp32 with TF32 (--tf32)" if tf32 else "fp32"


def describe(run, state, run_id):
    """What config.json holds: options as resolved, versions, hardware, the data's fingerprint."""
    kind, name = run.device.type, platform.processor() or "cpu"
    if kind == "cuda":
        name = torch.cuda.get_device_name(run.device)
    elif kind == "cpu" and os.path.exists("/proc/cpuinfo"):  # Linux keeps the processor's name here alone
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    usual = vars(parse_args([f"--data={run.args.data}", f"--out={run.args.out}"]))
    changed = {k: v for k, v in vars(run.args).items() if v != usual[k] or k in ("data", "out")}
    data = {k: v for k, v in run.data.meta.items() if not isinstance(v, (list, dict))}
    return {"run_id": run_id, "job": os.environ.get("SLURM_JOB_ID"), "options": vars(run.args),
            "changed": changed, "amp": run.amp, "model": run.model, "data": data,
            "steps": run.total, "steps_per_epoch": run.steps_per_epoch,
            "parameters": {"G": len(state.G.weights), "D": len(state.D.weights)}, "processes": run.world,
            "hardware": {"device": kind, "name": name, "cores": cores(),
                         "threads": torch.get_num_threads(), "platform": platform.platform()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "numpy": np.__version__}}


def write_status(run, state, name, **more):
    write_json(run.out / "status.json", {
        "state": name, "step": state.step, "steps": run.total, **more, "warnings": [*state.notes.values()],
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "pid": os.getpid(), "host": platform.node()})


def append_line(path, value):
    with open(path, "a") as file:
        file.write(json.dumps(value, allow_nan=False) + "\n")


def draw(run, state, rows):
    """Samples of the averaged generator as they are written, with the conditions of these rows of DATA."""
    G, dial, samples = state.ema.net, run.data.sampling_dial(run, state.step), []
    for i in range(0, len(rows), GRID):
        part = rows[i:i + GRID]
        z = latents(run.args.seed, range(i, i + len(part)), G.noise_dim).to(run.device)
        condition = condition_of(run.data.conditions, part, np.zeros(len(part)), run.device)
        with torch.inference_mode():
            samples.append(run.data.samples(G(z, condition, dial)))
    return np.concatenate(samples)


# ---- the loop --------------------------------------------------------------------------------------------

def train(run, state, watch, signals):
    """Step until the end or a signal. Returns the number of the signal that ended it, or 0."""
    args, number, queue = run.args, 0, deque()
    step, data = run.data.step, batches(run, state.step)
    if state.G.optimizer.defaults.get("capturable"):
        step = graphed(step)
    if not state.step:
        watch.grid(state)
    track_fid(run, state, watch)  # of a run that was killed while it was scored
    while not (number or over(run, state)):
        watch.stamp()
        step(run, state, *prepare_step(run, state), *next(data))
        state.step += 1
        watch.stamp(args.batch_size)
        if run.device.type == "cuda":
            follow(queue)
        last = state.step == run.total or fid_due(run, state)  # which may be the last, by --patience
        if state.step % args.log_every == 0 or last:
            log_interval(run, state, watch)
        if state.step % args.grid_every == 0 or last:
            watch.grid(state)
        scored = track_fid(run, state, watch)
        number = signals.agreed()
        if not scored and (state.step % args.save_every == 0 or last or number):
            save(run, state)
    return 0 if over(run, state) else number


def follow(queue):
    """Wait until the GPU is at most two steps behind, of whose ends queue has the events.

    So a signal is answered within these, and no more batches wait in memory.
    """
    queue.append(torch.cuda.Event(blocking=True))
    queue[-1].record()
    if len(queue) > 2:
        queue.popleft().synchronize()


def log_interval(run, state, watch):
    """Read from the device, once an interval, what the steps noted; end a run whose numbers stay bad."""
    means = state.meter.read(run)
    skips = {player.name: player.skips.tolist() for player in (state.G, state.D)}
    state.G.skips[2] = state.D.skips[2] = 0
    watch.log(state, means | {f"skipped_{name}": int(count) for name, (count, _, _) in skips.items()})
    row, name = max((longest, name) for name, (_, _, longest) in skips.items())
    if row >= run.args.max_skips:
        amp = {"off": "", "bf16": " or --amp off", "fp16": " or --amp bf16 or off"}[run.amp]
        raise FloatingPointError(
            f"{int(row)} updates of {name.upper()} in a row were not finite at step {state.step}: try a "
            f"smaller --lr-{name} or --clip-grad 1{amp}, in another --out or --resume never")


def over(run, state):
    best = state.best
    return state.step >= run.total or bool(best and run.args.patience and best["since"] >= run.args.patience)


def fid_due(run, state):
    """Whether G is to be scored: at the end of an epoch, once, and drawing at its full size."""
    step, every, best = state.step, run.args.fid_every, state.best
    if not every or not step or best and best["last"] == step:
        return False
    full = run.data.sampling_dial(run, step) == len(run.model["sizes"]) - 1
    return full and (step % (every * run.steps_per_epoch) == 0 or step == run.total)


def track_fid(run, state, watch):
    """Where it is due, score the averaged generator on the first process; keep on all what the best was.

    Returns whether it was due: then the state is saved, too.
    """
    best, step = state.best, state.step
    if not fid_due(run, state):
        return False
    save(run, state)  # scoring takes longer than torchrun waits after a signal
    fid = run.on_first(watch.score, state)
    if best is None or fid < best["fid"]:
        best = {"fid": fid, "step": step, "num": run.args.fid_num, "since": -1}
    state.best = best | {"since": best["since"] + 1, "last": step}
    save(run, state)
    if over(run, state) and step < run.total:
        watch.say(f"--patience {run.args.patience}: the best FID is still that of step {best['step']}")
    return True


# ---- main ------------------------------------------------------------------------------------------------

def settle(args, device):
    """What holds for the whole process: its GPU, and how exactly that computes."""
    if args.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS then adds up in one order
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = not args.deterministic  # it chooses among kernels by the clock
        torch.backends.cudnn.allow_tf32 = args.tf32 == "on"
        torch.set_float32_matmul_precision("high" if args.tf32 == "on" else "highest")


def find_precision(name, device):
    """--amp resolved to off, bf16 or fp16."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    capable = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bf16" if capable.get("avx512_bf16") or capable.get("amx_bf16") else "off"


def make_run(args):
    """Run of these options, on this DATA and this machine, or one line that says why not."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = find_device(args.device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if device.type == "mps" and (world > 1 or torch.__version__ < (2, 14)):
        fail("--device mps: for one process, and from torch 2.14 on, since before BatchNorm's gradients are "
             "wrong and bad updates are not skipped there (pytorch#188371, #186360); else --device cpu")
    data, kind, batch, parts = Data(args.data), ARCHITECTURES[args.arch][2], args.batch_size, args.grad_accum
    if os.path.realpath(args.out) == os.path.realpath(args.data):
        fail(f"--out {args.out}: name a folder for the run, another than --data")
    if not data.meta.get(kind.key):
        fitting = [name for name, entry in ARCHITECTURES.items() if data.meta.get(entry[2].key)]
        fail(f"--arch {args.arch}: {args.data} holds no {kind.unit}; it is for --arch {' or '.join(fitting)}")
    data = kind(args, data)
    if batch > len(data.rows):
        fail(f"--batch-size {batch}: {args.data} has only {len(data.rows)} {data.unit}")
    if batch % (world * parts):
        fail(f"--batch-size {batch}: not divisible by {world} processes × {parts} (--grad-accum)")
    if args.mismatch_weight and batch == world:
        fail(f"--batch-size {batch}: --mismatch-weight needs {2 * world}, two images for each process")
    if args.fid_every and len(data.rows) < 2:
        fail(f"--fid-every: {args.data} has only one image, which has no covariance")
    model, amp = data.model(args), find_precision(args.amp, device)
    if amp == "fp16" and (args.r1 or args.r2 or args.gp):  # squared gradients leave its range
        if args.amp != "auto":
            fail("--amp fp16 does not go with --r1, --r2 or --gp: use bf16 or off")
        amp = "off"
    steps = len(data.rows) // batch
    left = max(args.epochs * steps - data.lead_in, 0) * batch
    if args.warmup >= args.epochs * steps:
        fail(f"--warmup {args.warmup}: --epochs {args.epochs} have only {args.epochs * steps} steps; lower "
             "it or raise --epochs")
    if (args.burn_in or 0) > left:
        fail(f"--burn-in {args.burn_in:g}: --epochs {args.epochs} have only {left} {data.unit} for it; lower "
             "it, raise --epochs, or leave it out")
    total = min(args.epochs * steps, args.max_steps or math.inf)
    return Run(args, data, model, device, amp, steps, args.epochs * steps, total, Path(args.out), rank, world)


def make_state(run):
    """State of a run that has not begun."""
    torch.manual_seed(run.args.seed)
    G, D = (net.to(run.device, memory_format=torch.channels_last) for net in build_networks(run.model))
    G, D = Player(run, "g", G), Player(run, "d", D)
    return State(G, D, Average(G), Meter(run.device))


@contextlib.contextmanager
def post_mortem(run, state):
    """An error leaves its story in status.json and error.pt; those of the machine end in a line of advice."""
    try:
        yield
    except SystemExit as end:  # of on_first()
        run.disband(end)
        raise
    except Exception as error:
        alike = isinstance(error, FloatingPointError)  # of all processes
        orphaned = "gloo" in str(error) and "peer" in str(error)
        with contextlib.suppress(Exception):  # a dead GPU or disk is not to hide the error itself
            untold = read_or_empty(run.out / "status.json").get("state") != "failed"  # the first knows why
            if untold and not (alike and run.rank):
                write_status(run, state, "failed", error=f"{type(error).__name__}: {error}",
                             traceback="".join(traceback.format_exception(error)))
                if not orphaned:
                    write_torch(run.out / "error.pt", checkpoint(run, state))
        if orphaned:
            try:
                fail(f"another process ended at step {state.step}; the last checkpoint is whole", 1)
            finally:
                sys.stdout.flush()
                os._exit(1)  # what the GPU waits for will not come, and so the usual end might not
        if alike:
            run.disband(error)
            fail(str(error))
        if isinstance(error, OSError) and status_of(error) == 1:
            fail(f"{error.strerror}: {error.filename or run.out}; the last checkpoint is whole", 1)
        if out_of_memory(error):
            more = ", --amp bf16" if run.amp == "off" else ""
            fail(f"out of memory at step {state.step}: try --grad-accum {2 * run.args.grad_accum} (the same "
                 f"batch in parts), --batch-size {max(run.args.batch_size // 2, 1)}, a smaller --width"
                 f"{more}, in another --out or with --resume never", 1)
        raise


def out_of_memory(error):
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def main():
    steady_output()
    keep_memory()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # where torchrun is killed, Linux tells its processes
        torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGTERM)
    run = make_run(parse_args())
    args = run.args
    settle(args, run.device)
    if run.world > 1:
        dist.init_process_group("nccl" if run.device.type == "cuda" else "gloo")
        # where the others wait while the first scores: a FID of many images outlasts the usual half hour
        run = replace(run, group=dist.new_group(backend="gloo", timeout=timedelta(hours=4)))
        run = replace(run, amp=run.on_first(lambda: run.amp))  # the nodes' hardware may differ
    try:
        state = make_state(run)
    except (RuntimeError, MemoryError, OverflowError) as error:
        if not out_of_memory(error) and "overflow" not in str(error):
            raise
        fail("the networks do not fit into memory: take a smaller --width, --width-d or --latent-dim")
    if run.world > 1:  # nodes of other processors draw other last bits
        for part in (state.G, state.D, state.ema):
            dist.broadcast(part.weights, 0)
    watch = Watch(run) if run.rank == 0 else Mute()
    try:
        saved, path = run.on_first(watch.open)  # RUN need not be visible on every node
    except SystemExit:
        run.disband()
        raise
    if saved is not None:
        state.load_state_dict(saved)
        state.meter.sums /= run.world
        del saved
    if args.compile:
        from torch._inductor import config
        config.fallback_random = True  # the same dropout and noise as without it
        config.compile_threads = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        state.G.net.compile()
        if not (args.r1 or args.r2 or args.gp):  # torch.compile has no double backward
            state.D.net.compile()
    number = 0
    if over(run, state) and not fid_due(run, state):
        watch.finished(state)
        watch.say(f"{run.out} is already trained: {state.step} steps of {run.total}"
                  + (f"; ended by --patience, the best is that of step {state.best['step']}"
                     if state.step < run.total else ""))
    else:
        signals = Signals(run.group)
        with post_mortem(run, state), contextlib.closing(watch):
            run.on_first(watch.begin, state, path)
            number = train(run, state, watch, signals)
        if number:
            watch.end(state, "interrupted", signal=signal.Signals(number).name)
        else:
            watch.end(state, "finished")
    run.disband()
    if number:
        how = " with --resume auto" if args.resume != "auto" else ""
        fail(f"{signal.Signals(number).name}: saved at step {state.step} of {run.total}; the same command "
             f"goes on{how}", TRY_AGAIN)


if __name__ == "__main__":
    main()
