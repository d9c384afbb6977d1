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
import difflib
import errno
import fcntl
import importlib.util
import io
import json
import math
import os
import pickle
import platform
import re
import signal
import socket
import sys
import time
import traceback
import uuid
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

EMBEDDING = 64  # numbers that a class, a word or a sentence becomes in both networks
GRID = 64  # images in a sample grid, 8 a row
STATS = ("loss_g", "loss_d", "acc_real", "acc_fake", "reward", "grad_norm_g", "grad_norm_d", "diversity", "clipped_g",
         "clipped_d")
# options that a resumed run may change: where, how long and how it is watched (a cosine then ends with the new length)
FREE = {"data", "out", "resume", "epochs", "max_steps", "log_every", "save_every", "grid_every", "device", "compile",
        "max_skips", "fid_every", "fid_num", "patience", "tracker", "changed"}
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


def advise(parser, message):
    """argparse's message, with the option that a mistyped one may have been meant for."""
    mistyped = re.match(r"unrecognized arguments: (--[\w-]+)", message)
    near = difflib.get_close_matches(mistyped[1], parser._option_string_actions, 1) if mistyped else []
    return f"{message} ({f'did you mean {near[0]}?' if near else '--help lists the options'})"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.error = lambda message: fail(advise(parser, message))
    add = parser.add_argument_group("data").add_argument
    add("--data", required=True, metavar="DATA", help="folder made by prepare_data.py")
    add("--out", required=True, metavar="RUN", help="folder of this run")
    add("--condition", choices=["none", "label", "text"], default="none", help="what G and D are told: nothing, the "
        "class, or a caption")
    add("--flip", action="store_true", help="mirror half of the real images, left to right")
    add("--crop-shift", type=float, default=0.0, metavar="SHARE", help="move real images by up to this share of a side")
    add("--jitter", type=float, default=0.0, metavar="STRENGTH", help="vary brightness, contrast and saturation of "
        "real images; G learns that too")
    add("--diffaug", action="store_true", help="DiffAugment real and generated images alike: for some thousand images")

    add = parser.add_argument_group("networks").add_argument
    add("--arch", choices=list(ARCHITECTURES), default="dcgan", help="dcgan: transposed convolutions; upsample: "
        "nearest neighbour and 3×3 convolutions, dropout in D; resnet: no normalisation, for --loss relativistic; seq: "
        "texts, by an LSTM")
    add("--width", type=int, default=64, help="channels at the highest resolution; they double at each halving")
    add("--width-d", type=int, help="the same of D alone (default: as --width)")
    add("--extra-convs", type=int, default=0, help="3×3 convolutions more at each resolution of G")
    add("--depth", type=int, help="doublings from the first feature map to the image (default: from 4 to 7 pixels on)")
    add("--norm-d", choices=["batch", "none"], help="normalisation in D (default: none with --r1, --r2 or --gp, "
        "which take images one by one, else batch); resnet has none")
    add("--spectral-norm", action="store_true", help="spectral normalisation of D's weights")
    add("--attention", action="store_true", help="words attend to the places of G's middle feature map")
    add("--cond-augment", type=float, default=0.0, metavar="WEIGHT", help="G draws its condition from a normal "
        "distribution around it; weight of that distribution's divergence")
    add("--grow", metavar="SIZES", help="sizes to grow through, ending with the data's: 16,32,64")
    add("--latent-dim", type=int, default=100, help="numbers in z")

    add = parser.add_argument_group("objective").add_argument
    add("--loss", choices=list(LOSSES), default="bce", help="bce: non-saturating cross-entropy on logits; hinge; "
        "lsgan; wgan-gp; relativistic: of real against fake in pairs")
    add("--r1", type=float, metavar="GAMMA", help="weight of D's squared gradient at real images (default: 0.05 with "
        "relativistic, else 0)")
    add("--r2", type=float, metavar="GAMMA", help="the same at fakes")
    add("--gp", type=float, metavar="WEIGHT", help="gradient penalty between real and fake (default: 10 with wgan-gp, "
        "else 0)")
    add("--feature-matching", type=float, default=0.0, metavar="WEIGHT", help="G matches the mean of D's features; "
        "0.01 helps, 0.1 is known to destabilise")
    add("--mismatch-weight", type=float, default=0.0, metavar="SHARE", help="share of D's loss that tells real images "
        "with their own condition from those with another's; 0.5 is GAN-CLS")
    add("--real-label", type=float, default=1.0, help="D's target for real images; 0.9 is one-sided smoothing")
    add("--fake-label", type=float, default=0.0, help="D's target for fakes; 0.1 makes the smoothing two-sided")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=int, default=64, help="images a step, over all processes and accumulation steps")
    add("--epochs", type=int, default=25, help="passes over the data")
    add("--max-steps", type=int, help="end after so many steps, if that is earlier")
    add("--lr-g", type=float, default=2e-4, help="learning rate of G")
    add("--lr-d", type=float, default=2e-4, help="learning rate of D")
    add("--d-steps", type=int, default=1, help="steps of D for each of G")
    add("--d-interval", type=int, default=1, help="D learns in one of so many steps")
    add("--schedule", choices=["constant", "linear", "cosine", "cosine-restarts"], default="constant",
        help="course of both learning rates")
    add("--warmup", type=int, default=0, metavar="STEPS", help="steps over which the learning rates rise from 0")
    add("--restarts", type=int, default=4, help="cycles of cosine-restarts")
    add("--lr-final", type=float, default=0.0, help="where a schedule ends, as a share of the learning rate")
    add("--optimizer", choices=["adam", "adamw", "rmsprop"], default="adam", help="adamw decays weights by 0.01")
    add("--beta1", type=float, default=0.5, help="Adam's decay of the mean gradient")
    add("--beta2", type=float, default=0.999, help="decay of the mean square, RMSprop's too")
    add("--ema", type=float, default=0.999, help="decay a step of G's running average, which is what is sampled")
    add("--clip-grad", type=float, help="largest norm of a network's gradient")
    add("--grad-accum", type=int, default=1, help="parts into which a batch is cut to save memory")
    add("--max-skips", type=int, default=100, help="non-finite updates in a row that end the run")

    add = parser.add_argument_group("texts (--arch seq)").add_argument
    add("--pretrain-epochs", type=int, default=0, help="the first of the epochs, in which G learns by likelihood alone")
    add("--pretrain-lr", type=float, default=5e-3, help="its learning rate")
    add("--temperature-schedule", choices=["epochs", "exponential"], default="epochs", help="of the Gumbel-softmax. "
        "epochs: times --temperature-decay each; exponential: evenly from start to end, RelGAN's with 1 and 0.01")
    add("--temperature-start", type=float, default=2.0, help="the first temperature")
    add("--temperature-end", type=float, default=0.5, help="the lowest")
    add("--temperature-decay", type=float, default=0.95, help="factor an epoch")

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
    add("--fid-every", type=int, metavar="EPOCHS", help="epochs between FIDs of the averaged generator; best.pt is the "
        "lowest's")
    add("--fid-num", type=int, default=2048, help="generated and real images of that FID, each")
    add("--patience", type=int, metavar="N", help="end after N of these FIDs without a better one")
    add("--tracker", action="append", default=[], choices=["tensorboard", "wandb"], help="also log to this; may be "
        "given twice")
    add("--resume", default="auto", metavar="{auto,never,PATH}", help="auto: from RUN's checkpoint if there is one; "
        "never: start over and replace what RUN holds; or a checkpoint's path")
    args = parser.parse_args(argv)
    args.changed = {k: v for k, v in vars(args).items() if v != parser.get_default(k)}  # for the report
    for name, default in LOSSES[args.loss][2].items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.r1, args.r2, args.gp = args.r1 or 0.0, args.r2 or 0.0, args.gp or 0.0
    args.norm_d = args.norm_d or ("none" if args.r1 or args.r2 or args.gp else "batch")
    positive = ("width", "width_d", "depth", "latent_dim", "batch_size", "epochs", "max_steps", "grad_accum",
                "restarts", "max_skips", "log_every", "save_every", "grid_every", "d_steps", "d_interval", "fid_every",
                "patience")
    ranges = {name: (1, 2 ** 31) for name in positive} | {
        "extra_convs": (0, 100), "seed": (0, 2 ** 63), "clip_grad": (1e-12, math.inf), "warmup": (0, 2 ** 31),
        "fid_num": (2, 2 ** 31), "pretrain_epochs": (0, 2 ** 31)} | {
        name: (0, math.inf) for name in ("r1", "r2", "gp", "feature_matching", "cond_augment")} | {
        name: (1e-6, 1e6) for name in ("temperature_start", "temperature_end")} | {
        name: (0, 1) for name in ("lr_g", "lr_d", "lr_final", "real_label", "fake_label", "jitter", "pretrain_lr",
                                  "temperature_decay")} | {
        "mismatch_weight": (0, 0.99)} | {
        name: (0, 0.999999) for name in ("beta1", "beta2", "ema")} | {"crop_shift": (0, 0.5)}
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} {value}: must lie between {low} and {high}")
    if args.condition == "none" and (args.mismatch_weight or args.cond_augment):
        fail(f"--{'mismatch-weight' if args.mismatch_weight else 'cond-augment'}: needs --condition label or text")
    if args.attention and args.condition != "text":
        fail("--attention: words attend, which takes --condition text")
    if args.patience and not args.fid_every:
        fail("--patience counts FIDs: name --fid-every too")
    if args.arch == "resnet" and args.spectral_norm:
        fail("--spectral-norm: resnet's blocks start at 0, which has no norm to divide by; use --r1 or another --arch")
    for name in args.tracker:
        if importlib.util.find_spec(name) is None:
            fail(f"--tracker {name} needs a package: pip install {name}")
    for name in args.changed:
        if args.arch == "seq" and name in ("flip", "crop_shift", "jitter", "diffaug", "extra_convs", "depth", "norm_d",
                                           "spectral_norm", "attention", "grow", "latent_dim", "fid_every"):
            fail(f"--{name.replace('_', '-')} is for images, not for --arch seq")
        if args.arch != "seq" and name.startswith(("pretrain", "temperature")):
            fail(f"--{name.replace('_', '-')} goes with --arch seq: images have no likelihood and no temperature")
    if args.grow and args.compile:
        fail("--grow changes the networks while they train, which --compile cannot follow: leave one of them out")
    return args


# ---- data ------------------------------------------------------------------------------------------------------------

def load_data(folder, condition):
    """DATA/ as (images (N, H, W, C) uint8 memory map, conditions, meta); refuses what does not agree.

    Of a DATA without images, texts (N, L) of token ids in their place.
    conditions: None, labels (N,) int64, captions (N, K, L) of token ids, or their embeddings (N, K, n) float32.
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        length = meta.get("length")
        images = np.load(folder / ("tokens.npy" if length else "images.npy"), mmap_mode="r")
        kind = "embeddings" if meta.get("text_encoder") else "tokens"
        name = {"label": "labels" if meta["classes"] else "", "text": kind if meta["vocabulary"] else ""}.get(condition)
        conditions = np.load(folder / f"{name}.npy", mmap_mode="r") if name else None
        said = (meta["count"], length) if length else (meta["count"], meta["size"], meta["size"], meta["channels"])
    except FileNotFoundError as error:
        fail(f"--data {folder}: {Path(error.filename).name} is not there; make the folder with prepare_data.py")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        fail(f"--data {folder}: damaged ({type(error).__name__}: {error}); make it again with prepare_data.py")
    if length and condition != "none":
        fail(f"--condition {condition}: {folder} holds texts without images, which are told nothing")
    if images.shape != said or images.dtype != (np.int32 if length else np.uint8) or length and not (
            0 <= images.min() <= images.max() < len(meta["vocabulary"])):
        fail(f"--data {folder}: meta.json says {said}, the array is {images.dtype} {images.shape}, or not in the "
             f"vocabulary; make it again with prepare_data.py")
    if name == "":
        fail(f"--condition {condition}: {folder} has no {'classes' if condition == 'label' else 'captions'}")
    if conditions is not None:
        known = len(meta["classes"] if name == "labels" else meta["vocabulary"])
        fits = conditions.shape[:1] == images.shape[:1] and conditions.ndim == (1 if name == "labels" else 3)
        if not fits or name != "embeddings" and not 0 <= conditions.min() <= conditions.max() < known:
            fail(f"--data {folder}: {name}.npy does not fit the images, classes or vocabulary that meta.json names")
    return images, conditions, meta


def batches(t, start, stop):
    """Yield (images (B, C, H, W) uint8 or tokens (B, L), condition (B, …) or None) on the device for these steps.

    B is this process's share of the batch. The order of an epoch, and which of an image's captions is taken, come from
    (seed, epoch) alone; one thread gathers a batch ahead.
    """
    share = t.args.batch_size // t.world
    images, conditions, orders = t.images, t.conditions, {}
    resident = t.device.type == "cuda" and images.nbytes < 0.5 * torch.cuda.mem_get_info(t.device)[0]
    if resident:
        images = torch.from_numpy(np.array(images)).to(t.device)

    def gather(step):
        epoch, place = divmod(step, t.steps_per_epoch)
        if epoch not in orders:
            orders.clear()
            rng = np.random.default_rng([t.args.seed, epoch])
            orders[epoch] = rng.permutation(len(images)), rng.random(len(images))
        first = place * t.args.batch_size + t.rank * share
        index, draws = (part[first:first + share] for part in orders[epoch])
        rows = images[to_device(index, t.device)] if resident else to_device(images[index], t.device)
        if rows.ndim == 4:
            rows = rows.permute(0, 3, 1, 2)  # a channels-last view, no copy
        return rows, condition_of(t, conditions, index, draws)

    # a thread starts on GPU 0, where another process's memory would be taken
    settle = (torch.cuda.set_device, (t.device,)) if t.device.type == "cuda" else (None, ())
    with ThreadPoolExecutor(1, "batches", *settle) as thread:
        ahead = thread.submit(gather, start)
        for step in range(start, stop):
            batch = ahead.result()
            if step + 1 < stop:
                ahead = thread.submit(gather, step + 1)
            yield batch


def condition_of(t, conditions, index, draws):
    """The condition of the images with these numbers, on the device; a draw in [0, 1) chooses among its captions."""
    if conditions is None:
        return None
    rows = conditions[index]
    if rows.ndim == 3:
        count = np.maximum((rows != 0).any(2).sum(1), 1)  # fewer captions than others have are padded
        rows = rows[np.arange(len(rows)), (draws * count).astype(int)]
    return to_device(rows.astype(np.float32 if rows.dtype.kind == "f" else np.int64), t.device)


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


class Encoder(nn.Module):
    """What a network is told -> (vector (B, EMBEDDING), words (B, L, EMBEDDING), mask (B, L) of the words).

    kind: label, class numbers (B,); text, token ids (B, L), 0 = padding; vector, sentence embeddings (B, known) that
    prepare_data.py made. Only text has words.
    """

    def __init__(self, kind, known):
        super().__init__()
        self.kind = kind
        self.embed = nn.Linear(known, EMBEDDING) if kind == "vector" else nn.Embedding(
            known, EMBEDDING, padding_idx=0 if kind == "text" else None)
        self.neighbours = nn.Conv1d(EMBEDDING, EMBEDDING, 3, 1, 1) if kind == "text" else None

    def forward(self, told):
        words = mask = None
        vector = self.embed(told)
        if self.kind == "text":
            words, mask = vector + F.leaky_relu(self.neighbours(vector.mT).mT, 0.2), told > 0
            vector = (words * (mask / mask.sum(1, keepdim=True).clamp(min=1)).unsqueeze(2)).sum(1)
        return F.layer_norm(vector, (EMBEDDING,)), words, mask


class WordAttention(nn.Module):
    """Each place of a feature map (B, C, H, W) takes up the words that fit it (Xu et al. 2018)."""

    def __init__(self, channels):
        super().__init__()
        self.query, self.value = nn.Conv2d(channels, EMBEDDING, 1), nn.Linear(EMBEDDING, channels)

    def forward(self, x, words, mask):
        query = self.query(x).flatten(2).transpose(1, 2)
        found = F.scaled_dot_product_attention(query, words.to(query), self.value(words).to(query),
                                               attn_mask=(mask | ~mask.any(1, keepdim=True)).unsqueeze(1))
        return x + found.transpose(1, 2).reshape(x.shape)


class Generator(nn.Module):
    """G(z (B, noise_dim), condition) -> images (B, channels, size, size) in [-1, 1].

    condition: what the encoder of the model's kind takes, or None. The first stage makes a small feature map, each
    other doubles it, and so does the head. With several sizes (--grow) `level` says which is drawn: 0.3 is the second
    at 30 % over the first.
    """

    def __init__(self, m):
        super().__init__()
        self.encode = None if m.condition == "none" else Encoder(m.condition, m.known)
        self.augment = nn.Linear(EMBEDDING, 2 * EMBEDDING) if m.cond_augment else None
        self.noise_dim = m.latent_dim + (EMBEDDING if m.cond_augment else 0)
        widths = [m.width << i for i in reversed(range(m.depth))]  # 64×64, width 64: 512, 256, 128, 64
        base, inputs = m.sizes[-1] >> m.depth, m.latent_dim + (EMBEDDING if self.encode else 0)
        self.stages = nn.ModuleList([self.first(inputs, widths[0], base, m.extra_convs)])
        self.stages.extend(self.stage(a, b, m.extra_convs) for a, b in zip(widths, widths[1:]))
        self.ends = [(size // base).bit_length() - 2 for size in m.sizes]  # the last stage of each size
        self.heads = nn.ModuleList(self.head(widths[end], m.channels) for end in self.ends)
        self.level, self.attended = len(m.sizes) - 1, m.depth // 2
        for part in (self.stages, self.heads):
            part.apply(self.init)  # from the inside out
        self.attend = WordAttention(widths[self.attended]) if m.attention else None

    def init(self, module):
        """How a part is initialised, where PyTorch's way will not do."""

    def forward(self, z, condition=None, temperature=None):
        if self.encode is not None:
            told, words, mask = self.encode(condition)
            if self.augment is not None:  # conditioning augmentation (Zhang et al. 2017)
                z, noise = z.split([z.shape[1] - EMBEDDING, EMBEDDING], 1)
                mean, log_variance = self.augment(told).float().chunk(2, 1)
                self.kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
                told = mean + noise * (log_variance / 2).exp()
            z = torch.cat([z, told / 4], 1)  # at z's own scale G varies with the condition alone and forgets z
        drawn, x = math.ceil(self.level), z
        for i, stage in enumerate(self.stages[:self.ends[drawn] + 1]):
            x = stage(x)
            if self.attend is not None and i == self.attended:
                x = self.attend(x, words, mask)
            if drawn and i == self.ends[drawn - 1]:
                smaller = x
        image = self.heads[drawn](x)
        if self.level < drawn:  # progressive growing fades the new size in (Karras et al. 2018)
            before = F.interpolate(self.heads[drawn - 1](smaller), size=image.shape[2:])
            image = torch.lerp(before, image, self.level - drawn + 1)
        return image.tanh()


class Discriminator(nn.Module):
    """D(images (B, channels, size, size) in [-1, 1], condition) -> (logits (B,), features (B, C)), both float32.

    The condition is judged by projection (Miyato & Koyama 2018) on the sum of the features over the places; what is
    returned is their mean.
    """

    def __init__(self, m):
        super().__init__()
        widths, self.normalised = [m.width_d << i for i in range(m.depth)], m.norm_d == "batch"
        self.starts = [(m.sizes[-1] // size).bit_length() - 1 for size in m.sizes]  # the first stage of each size
        self.stems = nn.ModuleList(self.stem(m.channels, widths[start]) for start in self.starts)
        self.stages = nn.ModuleList(self.stage(a, b) for a, b in zip(widths, widths[1:]))
        self.head, self.places = self.last(widths[-1], m.sizes[-1] >> m.depth), (m.sizes[-1] >> m.depth) ** 2
        self.apply(self.init)
        if not self.normalised:  # or the signal would fade on its way
            self.stems.apply(he_init), self.stages.apply(he_init)
        self.level = len(m.sizes) - 1
        self.encode = None if m.condition == "none" else Encoder(m.condition, m.known)
        if self.encode is not None:
            self.project = nn.Linear(EMBEDDING, widths[-1], bias=False)
            nn.init.normal_(self.project.weight, 0, 0.02)
        if m.spectral_norm:
            for module in [x for x in self.modules() if isinstance(x, (nn.Conv2d, nn.Linear))]:
                nn.utils.parametrizations.spectral_norm(module)

    def init(self, module):
        """How a part is initialised, where PyTorch's way will not do."""

    def forward(self, x, condition=None):
        seen = math.ceil(self.level)
        h = self.stems[seen](x)
        for i in range(self.starts[seen], len(self.stages) + 1):
            if self.level < seen and i == self.starts[seen - 1]:
                smaller = F.avg_pool2d(x, 2 ** (self.starts[seen - 1] - self.starts[seen]))
                h = torch.lerp(self.stems[seen - 1](smaller), h, self.level - seen + 1)
            if i < len(self.stages):
                h = self.stages[i](h)
        logits, features = self.head(h).flatten().float(), h.mean((2, 3)).float()
        return logits if self.encode is None else logits + self.match(features, condition), features

    def match(self, features, condition):
        """How well features (B, C) fit conditions: the part of the logits (B,) that comes from the condition."""
        return (self.project(self.encode(condition)[0]).float() * features).sum(1) * self.places


def dcgan_init(module):
    """Radford et al. 2016, as in pytorch/examples: convolutions N(0, 0.02), normalisations N(1, 0.02)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)


def he_init(module):
    """He et al. 2015, for convolutions without normalisation; the last of a residual block starts at 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, 0.2)
    if isinstance(module, Residual):
        nn.init.zeros_(module.last.weight)


class DCGANGenerator(Generator):
    """Radford et al. 2016: transposed 4×4 convolutions, batch normalisation, ReLU."""
    init = staticmethod(dcgan_init)

    def block(self, a, b, extra, *shape):
        layers = [nn.ConvTranspose2d(a, b, *shape, bias=False), nn.BatchNorm2d(b), nn.ReLU(True)]
        for _ in range(extra):
            layers += [nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(True)]
        return layers

    def first(self, inputs, width, base, extra):
        return nn.Sequential(nn.Unflatten(1, (inputs, 1, 1)), *self.block(inputs, width, extra, base, 1, 0))

    def stage(self, a, b, extra):
        return nn.Sequential(*self.block(a, b, extra, 4, 2, 1))

    def head(self, width, channels):
        return nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False)


class DCGANDiscriminator(Discriminator):
    """Radford et al. 2016: strided 4×4 convolutions, batch normalisation after the first, LeakyReLU 0.2."""
    init = staticmethod(dcgan_init)

    def stem(self, channels, width):
        return nn.Sequential(nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True))

    def stage(self, a, b):
        normal = nn.BatchNorm2d(b) if self.normalised else nn.Identity()
        return nn.Sequential(nn.Conv2d(a, b, 4, 2, 1, bias=False), normal, nn.LeakyReLU(0.2, True))

    def last(self, width, base):
        return nn.Conv2d(width, 1, base, bias=False)


class UpsampleGenerator(Generator):
    """Linear to the first feature map, then nearest-neighbour upsampling and 3×3 convolutions."""

    def first(self, inputs, width, base, extra):
        return nn.Sequential(nn.Linear(inputs, width * base * base), nn.Unflatten(1, (width, base, base)))

    def stage(self, a, b, extra):
        layers = [nn.Upsample(scale_factor=2)]
        for inputs in [a] + [b] * extra:
            layers += [nn.Conv2d(inputs, b, 3, 1, 1), nn.BatchNorm2d(b, momentum=0.8), nn.LeakyReLU(0.2, True)]
        return nn.Sequential(*layers)

    def head(self, width, channels):
        return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(width, channels, 3, 1, 1))


class UpsampleDiscriminator(Discriminator):
    """Strided 3×3 convolutions, LeakyReLU 0.2, dropout of a quarter of the maps, batch normalisation from block 2."""

    def stem(self, channels, width):
        return nn.Sequential(nn.Conv2d(channels, width, 3, 2, 1), nn.LeakyReLU(0.2, True), nn.Dropout2d(0.25))

    def stage(self, a, b):
        normal = nn.BatchNorm2d(b, momentum=0.8) if self.normalised else nn.Identity()
        return nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.LeakyReLU(0.2, True), nn.Dropout2d(0.25), normal)

    def last(self, width, base):
        return nn.Sequential(nn.Flatten(), nn.Linear(width * base * base, 1))


class Residual(nn.Module):
    """x + 1×1(LeakyReLU(3×3(LeakyReLU(x)))), the last convolution 0 at first."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.last = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 1)

    def forward(self, x):
        return x + self.last(F.leaky_relu(self.conv(F.leaky_relu(x, 0.2)), 0.2))


class ResnetGenerator(Generator):
    """After R3GAN (Huang et al. 2024), small: residual blocks without normalisation, bilinear upsampling."""
    init = staticmethod(he_init)

    def first(self, inputs, width, base, extra):
        return nn.Sequential(nn.Linear(inputs, width * base * base), nn.Unflatten(1, (width, base, base)),
                             *[Residual(width) for _ in range(1 + extra)])

    def stage(self, a, b, extra):
        return nn.Sequential(nn.Conv2d(a, b, 1), nn.Upsample(scale_factor=2, mode="bilinear"),
                             *[Residual(b) for _ in range(1 + extra)])

    def head(self, width, channels):
        return nn.Sequential(nn.LeakyReLU(0.2), nn.ConvTranspose2d(width, channels, 4, 2, 1))


class ResnetDiscriminator(Discriminator):
    """The generator's mirror image."""
    init = staticmethod(he_init)

    def stem(self, channels, width):
        return nn.Conv2d(channels, width, 4, 2, 1)

    def stage(self, a, b):
        return nn.Sequential(Residual(a), nn.AvgPool2d(2), nn.Conv2d(a, b, 1))

    def last(self, width, base):
        return nn.Sequential(Residual(width), nn.LeakyReLU(0.2), nn.Conv2d(width, 1, base))


class SequenceGenerator(nn.Module):
    """G(noise (B, L), None, temperature) -> texts (B, L, V): an LSTM that writes tokens, each a row of a unit matrix.

    In training a token is drawn by Gumbel noise of its own, and its gradient is that of the softmax at this temperature
    (Jang et al. 2017, straight through). In eval mode the noise decides it, as a quantile, after the logits were
    divided by the temperature. After a 0, the padding, come only zeros.
    """

    def __init__(self, m):
        super().__init__()
        self.noise_dim, self.level = m.sizes[-1], 0
        self.embed, self.lstm = nn.Linear(m.channels, m.width, bias=False), nn.LSTMCell(m.width, m.width)
        self.start, self.logits = nn.Parameter(torch.zeros(m.width)), nn.Linear(m.width, m.channels)
        nn.init.normal_(self.embed.weight, 0, m.width ** -0.5)

    def forward(self, z, condition=None, temperature=1.0):
        x, state, texts = self.start.expand(len(z), -1), None, []
        for noise in z.unbind(1):
            state = self.lstm(x, state)
            logits = self.logits(state[0]).float()
            if self.training:
                token = F.gumbel_softmax(logits, temperature, hard=True)
            else:
                below = (logits / temperature).softmax(1).cumsum(1) < torch.special.ndtr(noise).unsqueeze(1)
                token = F.one_hot(below.sum(1).clamp(max=logits.shape[1] - 1), logits.shape[1]).float()
            if texts:
                ended = texts[-1][:, :1].detach()
                token = token * (1 - ended) + texts[-1].detach() * ended
            texts.append(token)
            x = self.embed(token)
        return torch.stack(texts, 1)

    def likelihood(self, tokens):
        """Negative logarithm (B, L) of each token's probability, and which of them count: up to the first 0."""
        inputs, state, outputs = F.embedding(tokens[:, :-1], self.embed.weight.T), None, []
        for x in (self.start.expand(len(tokens), -1), *inputs.unbind(1)):
            state = self.lstm(x, state)
            outputs.append(state[0])
        loss = F.cross_entropy(self.logits(torch.stack(outputs, 1)).float().mT, tokens, reduction="none")
        return loss, F.pad(tokens[:, :-1] > 0, (1, 0), value=True)


class SequenceDiscriminator(nn.Module):
    """D(texts (B, L, V)) -> (logits (B,), features (B, C)): convolutions over 2 to 5 tokens, the largest (Kim 2014)."""

    def __init__(self, m):
        super().__init__()
        self.level, reach = 0, range(2, min(m.sizes[-1], 5) + 1)
        self.embed = nn.Linear(m.channels, EMBEDDING, bias=False)
        self.convs = nn.ModuleList(nn.Conv1d(EMBEDDING, m.width_d, k) for k in reach)
        self.head = nn.Linear(m.width_d * len(reach), 1)
        nn.init.normal_(self.embed.weight, 0, EMBEDDING ** -0.5)

    def forward(self, x, condition=None):
        h = self.embed(x).transpose(1, 2)
        features = torch.cat([F.leaky_relu(conv(h), 0.2).amax(2) for conv in self.convs], 1)
        return self.head(features).flatten().float(), features.float()


ARCHITECTURES = {"dcgan": (DCGANGenerator, DCGANDiscriminator), "upsample": (UpsampleGenerator, UpsampleDiscriminator),
                 "resnet": (ResnetGenerator, ResnetDiscriminator),
                 "seq": (SequenceGenerator, SequenceDiscriminator)}


def build_networks(model):
    """(G, D) from the model's options, as stored in checkpoints: see set_up()."""
    generator, discriminator = ARCHITECTURES[model["arch"]]
    return generator(SimpleNamespace(**model)), discriminator(SimpleNamespace(**model))


def load_generator(path, device="cpu"):
    """The generator in a generator.pt, ready to sample: (network in eval mode, the file's other entries as a dict)."""
    saved = load_file(path)
    try:
        generator, _ = build_networks(saved["model"])
        generator.load_state_dict(saved.pop("generator"))
        generator.level = saved["level"]
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path}: not a generator that train.py wrote ({type(error).__name__}: {error})") from None
    return generator.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), saved


# ---- objectives: logits of D -> scalar ------------------------------------------------------------------------------

def cross_entropy(real, fake, args):
    return (F.binary_cross_entropy_with_logits(real, torch.full_like(real, args.real_label))
            + F.binary_cross_entropy_with_logits(fake, torch.full_like(fake, args.fake_label)))


def least_squares(real, fake, args):
    return 0.5 * ((real - args.real_label).square().mean() + (fake - args.fake_label).square().mean())


# name: (loss of D from (real, fake, args), loss of G from (fake, real), options that go with it where none are named)
LOSSES = {
    # Goodfellow et al. 2014, G non-saturating; smoothed targets: Salimans et al. 2016
    "bce": (cross_entropy, lambda fake, real: F.softplus(-fake).mean(), {}),
    # Lim & Ye 2017
    "hinge": (lambda real, fake, args: F.relu(1 - real).mean() + F.relu(1 + fake).mean(),
              lambda fake, real: -fake.mean(), {}),
    # Mao et al. 2017
    "lsgan": (least_squares, lambda fake, real: 0.5 * (fake - 1).square().mean(), {}),
    # Gulrajani et al. 2017
    "wgan-gp": (lambda real, fake, args: fake.mean() - real.mean(), lambda fake, real: -fake.mean(),
                {"gp": 10.0}),
    # pairs of real and fake: Jolicoeur-Martineau 2019; with R1 and R2: Huang et al. 2024
    "relativistic": (lambda real, fake, args: F.softplus(fake - real).mean(),
                     lambda fake, real: F.softplus(real - fake).mean(), {"r1": 0.05, "r2": 0.05})}


def squared_gradient(logits, images):
    """Squared norm (B,) of D's gradient by its input (B, …), itself differentiable."""
    gradient, = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.float().square().flatten(1).sum(1)


def loss_of_d(t, x, c, fake):
    """D on real x and on fakes, (B, C, H, W) or (B, L, V), with condition c: (loss, logits (B,) of x, of the fakes)."""
    args, D, objective = t.args, t.d.net, LOSSES[t.args.loss][0]
    x, fake = x.detach().requires_grad_(args.r1 > 0), fake.detach().requires_grad_(args.r2 > 0)
    with t.autocast():
        real_logits, features = D(diffaug(x) if args.diffaug else x, c)
        fake_logits, _ = D(diffaug(fake) if args.diffaug else fake, c)
    loss = objective(real_logits, fake_logits, args)
    if args.mismatch_weight:  # the neighbour's condition is a wrong one (Reed et al. 2016)
        with t.autocast():
            wrong_logits = real_logits + D.match(features, c.roll(1, 0)) - D.match(features, c)
        loss = torch.lerp(loss, objective(real_logits, wrong_logits, args), args.mismatch_weight)
    if args.r1:  # Mescheder et al. 2018
        loss = loss + args.r1 / 2 * squared_gradient(real_logits, x).mean()
    if args.r2:
        loss = loss + args.r2 / 2 * squared_gradient(fake_logits, fake).mean()
    if args.gp:  # Gulrajani et al. 2017
        share = torch.rand(len(x), *[1] * (x.ndim - 1), device=t.device)
        between = torch.lerp(fake.float(), x, share).detach().requires_grad_()
        with t.autocast():
            logits, _ = D(between, c)
        loss = loss + args.gp * (squared_gradient(logits, between).add(1e-12).sqrt() - 1).square().mean()
    return loss, real_logits.detach(), fake_logits.detach()


def loss_of_g(t, x, c, fake):
    """G on its fakes, beside real x where the objective compares: (loss, logits (B,) of the fakes)."""
    args, D = t.args, t.d.net
    with t.autocast():
        fake_logits, features = D(diffaug(fake) if args.diffaug else fake, c)
        real_logits = real_features = None
        if args.loss == "relativistic" or args.feature_matching:
            with torch.no_grad():
                real_logits, real_features = D(diffaug(x) if args.diffaug else x, c)
    loss = LOSSES[args.loss][1](fake_logits, real_logits)
    if args.feature_matching:  # Salimans et al. 2016
        loss = loss + args.feature_matching * (features.mean(0) - real_features.mean(0)).square().mean()
    if args.cond_augment:
        loss = loss + args.cond_augment * t.g.net.kl
    return loss, fake_logits.detach()


def learning_rate(base, args, step, total):
    """The learning rate at a step: a function of the step, so that nothing of it is saved."""
    if step < args.warmup:
        return base * (step + 1) / args.warmup
    done = min((step - args.warmup) / max(total - args.warmup, 1), 1)
    if args.schedule == "cosine-restarts":  # Loshchilov & Hutter 2017
        done = done * args.restarts % 1
    share = {"constant": 1, "linear": 1 - done}.get(args.schedule, 0.5 * (1 + math.cos(math.pi * done)))
    return base * (args.lr_final + (1 - args.lr_final) * share)


def temperature_at(t, step):
    """The temperature of a step's Gumbel-softmax, or None for images."""
    args, begin = t.args, t.pretrain_steps
    if args.arch != "seq":
        return None
    if args.temperature_schedule == "exponential":  # Nie et al. 2019
        share = max(step - begin, 0) / max(t.schedule_steps - begin, 1)
        return args.temperature_start * (args.temperature_end / args.temperature_start) ** share
    epoch = max(step - begin, 0) // t.steps_per_epoch
    return max(args.temperature_end, args.temperature_start * args.temperature_decay ** epoch)


def level_at(sizes, step, total):
    """Which size is drawn at a step, see Generator: an equal share of the steps each, its first half to fade in."""
    place = step / max(total, 1) * len(sizes)
    size = min(int(place), len(sizes) - 1)
    return size + min(2 * (place - size), 1) - 1 if size else 0


# ---- augmentation, on the device: images (B, C, H, W) in [-1, 1] ----------------------------------------------------

def real_batch(t, images, level):
    """What the step tells from fakes: uint8 images as augmented floats at the level's size, tokens as unit vectors."""
    if images.ndim == 2:
        return F.one_hot(images.long(), t.model["channels"]).float()
    x = to_float(images, t.args)
    if (size := t.sizes[math.ceil(level)]) < x.shape[2]:
        x = F.avg_pool2d(x, x.shape[2] // size)
    if level % 1:  # real images fade in as the fakes do
        smaller = F.avg_pool2d(x, size // t.sizes[math.floor(level)])
        x = torch.lerp(F.interpolate(smaller, size=size), x, level % 1)
    return x


def to_float(images, args):
    """uint8 -> [-1, 1] float32, with what --flip, --crop-shift and --jitter ask for, drawn for each image."""
    x = images.float() / 127.5 - 1
    if args.flip:
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
    if args.crop_shift:
        x = shift(x, args.crop_shift, "reflect")
    return colour(x, args.jitter).clamp(-1, 1) if args.jitter else x


def diffaug(x):
    """DiffAugment (Zhao et al. 2020), differentiable: colour, shift by up to 1/8, a square of half the side cut out."""
    return cut_out(shift(colour(x, 0.5), 1 / 8, "constant"))


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
    rows, columns = ((torch.arange(side, device=x.device) + 0.5 - middle).abs() < side / 4 for middle in (top, left))
    return x * ~(rows[:, None, :, None] & columns[:, None, None, :])


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
                                           "warnings": [*t.warned.values()],
                                           "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "pid": os.getpid(),
                                           "host": socket.gethostname()})


# ---- checkpoint ------------------------------------------------------------------------------------------------------

def checkpoint(t):
    """All that resuming needs. Random numbers are a function of (seed, step, rank): no state of theirs is kept."""
    return {"step": t.step, "model": t.model, "options": vars(t.args), "fingerprint": t.meta["fingerprint"],
            "G": t.g.net.state_dict(), "D": t.d.net.state_dict(), "ema": t.ema.state_dict(),
            "optimizer_g": t.g.optimizer.state_dict(), "optimizer_d": t.d.optimizer.state_dict(),
            "scaler_g": t.g.scaler.state_dict(), "scaler_d": t.d.scaler.state_dict(),
            "sums": t.sums, "counts": t.counts, "skips": t.skips, "warned": t.warned, "best": t.best}


def save(t):
    """Write checkpoint.pt (the last one becomes checkpoint.prev.pt) and generator.pt. All processes call it."""
    pool(t)
    if t.rank != 0:
        return
    save_generator(t, "generator.pt")  # first: a run whose checkpoint says "finished" has its generator
    write_torch(t.out / "checkpoint.next.pt", checkpoint(t))
    if (t.out / "checkpoint.pt").exists():
        os.replace(t.out / "checkpoint.pt", t.out / "checkpoint.prev.pt")
    os.replace(t.out / "checkpoint.next.pt", t.out / "checkpoint.pt")


def save_generator(t, name):
    write_torch(t.out / name, {
        "generator": t.ema.state_dict(), "model": t.model, "level": t.ema.level, "step": t.step, "seed": t.args.seed,
        "name": str(t.meta["name"]), "classes": t.meta["classes"], "class_counts": t.class_counts,
        "vocabulary": t.meta["vocabulary"], "text_encoder": t.meta.get("text_encoder"),
        "text_level": t.meta.get("level")})


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
               if (k not in FREE or k == "epochs" and t.args.grow) and there.get(k) != v]
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
    t.warned, t.best = state["warned"], state["best"]
    t.ema.level = level_at(t.sizes, t.step, t.schedule_steps)
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

def train_step(t, images, condition):
    """One update of D and one of G on a batch: images (B, C, H, W) uint8 or tokens (B, L), condition (B, …) or None.

    Goodfellow et al. 2014. Nothing here waits for the device.
    """
    args, G, D = t.args, t.g.net, t.d.net
    torch.manual_seed(seed_of(args.seed, t.step, t.rank))  # noise, dropout and augmentation of this step
    G.level = D.level = t.ema.level = level_at(t.sizes, t.step, t.schedule_steps)
    x, temperature = real_batch(t, images, G.level), temperature_at(t, t.step)
    z = torch.randn(len(x), G.noise_dim, device=t.device)
    parts = list(zip(*(a.chunk(args.grad_accum) if a is not None else [None] * args.grad_accum
                       for a in (x, condition, z))))
    train_d, train_g = t.step % args.d_interval == 0, (t.step + 1) % args.d_steps == 0
    keep_graph = train_g and len(parts) == 1  # one pass of G serves both updates; graphs of parts would fill the memory
    seen = {}
    statistics = [b.clone() for b in t.g_buffers]

    # D: tell x from G(z)
    for x, c, z in parts if train_d or keep_graph else ():
        with t.autocast(), torch.set_grad_enabled(keep_graph):
            fake = G(z, c, temperature)
        if train_d:
            loss, real_logits, fake_logits = loss_of_d(t, x, c, fake)
            t.d.scaler.scale(loss / len(parts)).backward(inputs=t.d.params)
            # where logits have no zero, what counts is the side of the middle
            middle = 0 if args.loss in ("bce", "hinge") else (real_logits.mean() + fake_logits.mean()) / 2
            tally(seen, len(parts), loss_d=loss, acc_real=real_logits > middle, acc_fake=fake_logits < middle,
                  diversity=spread(fake) / spread(x))
    if train_d:
        update(t, t.d, "d", seen)

    # G: make D take G(z) for real; D's weights need no gradient for that
    D.requires_grad_(False)
    for x, c, z in parts if train_g else ():
        if not keep_graph:
            with t.autocast():
                fake = G(z, c, temperature)
        loss, fake_logits = loss_of_g(t, x, c, fake)
        t.g.scaler.scale(loss / len(parts)).backward()
        tally(seen, len(parts), loss_g=loss, reward=fake_logits.sigmoid())
    D.requires_grad_(True)
    if train_g:
        update(t, t.g, "g", seen)

    for now, before in zip(t.g_buffers, statistics):  # of a batch that was skipped nothing is to stay
        torch.where(seen.get("skipped_g", seen.get("skipped_d", t.zero)) > 0, before, now, out=now)
    average(t)
    record(t, seen)


def likelihood_step(t, tokens, condition):
    """One update of G alone towards the likelihood of texts (B, L): what --pretrain-epochs are made of."""
    seen, parts = {}, tokens.long().chunk(t.args.grad_accum)
    for part in parts:
        with t.autocast():
            loss, counts = t.g.net.likelihood(part)
        loss = (loss * counts).sum() / counts.sum()
        t.g.scaler.scale(loss / len(parts)).backward()
        tally(seen, len(parts), loss_g=loss)
    update(t, t.g, "g", seen, t.args.pretrain_lr)
    average(t)
    record(t, seen)


def average(t):
    """Move the averaged G towards G."""
    decay = min(t.args.ema, (1 + t.step) / (10 + t.step))  # short at first, so that the first weights are forgotten
    torch._foreach_lerp_(t.ema_tensors, t.g_tensors, 1 - decay)


def spread(x):
    """How much a batch (B, …) varies: the mean standard deviation; of images one pixel in 16 tells enough."""
    return (x.detach()[..., ::4, ::4] if x.ndim == 4 else x.detach()).float().std(0).mean()


def tally(seen, parts, **values):
    """Add the means of a part's values to those of the whole batch."""
    for name, value in values.items():
        seen[name] = seen.get(name, 0) + value.detach().float().mean() / parts


def update(t, side, name, seen, lr=None):
    """Step a network's optimiser, except where its gradient or loss is not finite: decided on the device.

    Adds to `seen` the norm of the gradient before clipping, whether it was clipped, and whether the update was skipped.
    """
    params = [p for p in side.params if p.grad is not None]  # a size that is not yet drawn has none
    grads, loss = [p.grad for p in params], seen[f"loss_{name}"]
    if t.world > 1:  # by hand, as one tensor: penalties and two passes a step are no trouble then
        flat = torch.cat([g.flatten() for g in grads] + [loss.reshape(1)]) / t.world
        dist.all_reduce(flat)
        *parts, loss = flat.split([g.numel() for g in grads] + [1])
        torch._foreach_copy_(grads, [part.view(g.shape) for part, g in zip(parts, grads)])
    side.scaler.unscale_(side.optimizer)
    norm = nn.utils.get_total_norm(grads)
    if t.args.clip_grad:
        nn.utils.clip_grads_with_norm_(params, t.args.clip_grad, norm)
    skip = 1 - torch.isfinite(norm + loss.sum()).float()
    side.optimizer.param_groups[0]["lr"] = learning_rate(
        side.lr if lr is None else lr, t.args, t.step, t.schedule_steps)
    side.optimizer.found_inf = skip  # a fused optimiser then leaves weights, moments and step count alone
    if t.args.optimizer == "rmsprop":  # not fused: no gradient moves no weight, and the moments are put back
        squares = [side.optimizer.state[p]["square_avg"] for p in params if p in side.optimizer.state]
        before = [x.clone() for x in squares]
        torch._foreach_copy_(grads, [torch.where(skip > 0, 0, g) for g in grads])
    side.optimizer.step()
    if t.args.optimizer == "rmsprop":
        for now, old in zip(squares, before):
            torch.where(skip > 0, old, now, out=now)
    side.scaler.update()
    side.optimizer.zero_grad()
    seen |= {f"grad_norm_{name}": norm, f"skipped_{name}": skip}
    seen[f"clipped_{name}"] = (norm > (t.args.clip_grad or math.inf)).float()


def record(t, seen):
    """Add a step's values to the interval's sums, non-finite ones aside, and count skipped updates."""
    nothing = torch.full_like(t.zero, math.nan)
    values = torch.stack([seen.get(name, nothing) for name in STATS])
    finite = torch.isfinite(values)
    t.sums += torch.where(finite, values, 0)
    t.counts += finite
    skipped = torch.stack([seen.get(name, nothing) for name in ("skipped_g", "skipped_d")])
    total, row, longest = t.skips
    total += skipped.nan_to_num()
    row.copy_(torch.where(skipped.isnan(), row, (row + 1) * skipped))  # a network that had no turn keeps its count
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
    t.begun, t.logged = t.step, time.perf_counter()
    if fid_due(t):  # a run that was killed while it was scored
        track_fid(t, signals.group)
    data = batches(t, t.step, t.total)
    while t.step < t.total and not number:
        begin = stamp(t.device)
        (likelihood_step if t.step < t.pretrain_steps else train_step)(t, *next(data))
        t.step += 1
        times.append((begin, stamp(t.device)))
        t.bar.update(args.batch_size)
        if fid_due(t):
            start = time.perf_counter()
            save(t)  # scoring takes longer than torchrun waits after a signal
            track_fid(t, signals.group)
            t.logged += time.perf_counter() - start  # images/s are those of training
            if patience_over(t):
                t.total = t.step
                tqdm.write(f"--patience {args.patience}: the best FID is still that of step {t.best['step']}")
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


def fid_due(t):
    """Whether this step's generator is to be scored: at the end of an epoch, once, and drawing at its full size."""
    every = (t.args.fid_every or 0) * t.steps_per_epoch
    return (every and t.step and (t.step % every == 0 or t.step == t.total) and t.ema.level == len(t.sizes) - 1
            and (t.best is None or t.best["last"] != t.step))


def track_fid(t, group):
    """A line in fid.jsonl with the FID of the averaged generator; best.pt where it is the lowest so far."""
    start, n, fid = time.perf_counter(), min(t.args.fid_num, len(t.images)), [0.0]
    if t.rank == 0:
        import evaluate  # here alone: who does not track FID needs none of it
        z = latents(t.args.seed, range(n), t.ema.noise_dim)
        rows = np.random.default_rng(t.args.seed).permutation(len(t.images))[:n]  # whose conditions are drawn
        told = condition_of(t, t.conditions, rows, np.zeros(n))
        with torch.inference_mode():
            parts = [t.ema(z[i:i + GRID].to(t.device), None if told is None else told[i:i + GRID])
                     for i in range(0, n, GRID)]
        fid = [evaluate.fid_against_data(np.concatenate([to_pixels(part) for part in parts]), t.args.data, n, t.device)]
    if t.world > 1:
        dist.broadcast_object_list(fid, 0, group)
    better = t.best is None or fid[0] < t.best["fid"]
    t.best = {"fid": fid[0], "step": t.step, "since": 0} if better else t.best | {"since": t.best["since"] + 1}
    t.best["last"] = t.step
    if t.rank == 0:
        line = {"step": t.step, "epoch": round(t.step / t.steps_per_epoch, 4), "fid": fid[0], "n_generated": n,
                "n_real": n, "seconds": round(time.perf_counter() - start, 1)}
        with open(t.out / "fid.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        tqdm.write(f"step {t.step}  FID {fid[0]:.2f} ({n} generated, {n} real; {line['seconds']} s)"
                   + ("  the best so far" if better else ""))
        track(t, {"fid": fid[0]})
        if better:
            save_generator(t, "best.pt")


def patience_over(t):
    return bool(t.args.patience and t.best and t.best["since"] >= t.args.patience)


def diagnose(t):
    """Say in words, once each, what the last epoch's lines show; status.json keeps it."""
    lines = t.recent + [t.last]
    t.recent = [x for x in lines if x["step"] > t.step - t.steps_per_epoch or x in lines[-3:]]
    if t.step - t.begun < max(t.steps_per_epoch, 200):  # the first steps of any run look bad
        return

    def mean(*names):
        values = [line[name] for line in t.recent for name in names if line[name] is not None]
        return sum(values) / len(values) if values else math.nan

    accuracy, moved = mean("acc_real", "acc_fake"), [x["loss_g"] for x in t.recent if x["loss_g"] is not None]
    tells = f"D tells real from fake in {accuracy:.0%} of cases, over an epoch: "
    paired = t.args.loss == "relativistic"  # whose D is at its best when it can hardly tell
    found = {
        "D loses": (accuracy < 0.6 and not paired, tells + "too weak to teach G; raise --lr-d or --width-d, or lower "
                                                           "--lr-g"),
        "D wins": (accuracy > 0.95, tells + "G learns little from it; lower --lr-d or --width-d, or try "
                   + ("larger --r1 and --r2" if paired else "--real-label 0.9, --r1, --diffaug, --loss relativistic")),
        "no motion": (len(moved) > 2 and max(moved) - min(moved) < 1e-4 * abs(max(moved)),
                      "the loss of G has not moved for an epoch: raise --lr-g, and look whether the images differ"),
        "collapse": (mean("diversity") < 0.3, f"generated images vary {mean('diversity'):.2f} times as real ones do: "
                     "G draws a few pictures only; see grids/, and try lower learning rates, --r1 or another --loss"),
        "clipped": (max(mean("clipped_g"), mean("clipped_d")) > 0.95, "nearly every gradient of an epoch was clipped: "
                    "raise --clip-grad or lower the learning rates")}
    for name, (seen, text) in found.items():
        if seen and name not in t.warned:
            t.warned[name] = f"step {t.step}: {text}"
            tqdm.write(f"note: {t.warned[name]}", file=sys.stderr)


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
              **mean, "lr_g": lr_g, "lr_d": lr_d, "temperature": temperature_at(t, t.step - 1),
              "skipped_g": int(skips[0][0]), "skipped_d": int(skips[0][1]),
              "ms_per_step": sum(ms) / len(ms), "ms_min": min(ms), "ms_max": max(ms),
              "images_per_second": t.args.batch_size * len(ms) / (time.perf_counter() - t.logged)}
    t.logged = time.perf_counter()
    if t.rank == 0:
        with open(t.out / "log.jsonl", "a") as file:
            file.write(json.dumps(t.last, allow_nan=False) + "\n")
        diagnose(t)
        track(t, t.last)
        shown = [f"{t.last[k]:.3f}" if t.last[k] is not None else "none" for k in STATS[:4]]
        t.bar.set_description(f"epoch {t.last['epoch']:.1f}", refresh=False)
        t.bar.set_postfix_str("G {:.4} D {:.4} right {:.4}/{:.4}".format(*shown), refresh=False)
        if t.bar.disable:
            left = (t.total - t.step) * t.args.batch_size / t.last["images_per_second"]
            print(f"step {t.step}/{t.total}  epoch {t.last['epoch']:.2f}  "
                  + "  ".join(f"{k} {v}" for k, v in zip(STATS, shown))
                  + f"  {t.last['images_per_second']:.0f} {t.unit}/s  "
                  f"{tqdm.format_interval(left)} left", flush=True)
    if max(skips[2]) >= t.args.max_skips:
        name, rate = ("G", "--lr-g") if skips[2][0] >= skips[2][1] else ("D", "--lr-d")
        raise Diverged(f"{int(max(skips[2]))} updates of {name} in a row were not finite at step {t.step}: try a "
                       f"smaller {rate}, --clip-grad 1, or --amp {'off' if t.amp == 'bf16' else 'bf16 or off'}, in "
                       f"another --out or with --resume never")


class Diverged(Exception):
    """Too many non-finite updates in a row."""


def open_trackers(t):
    """The writers of --tracker; a resumed run goes on in the same ones."""
    if "tensorboard" in t.args.tracker:
        from torch.utils.tensorboard import SummaryWriter
        t.tensorboard = SummaryWriter(t.out / "tensorboard", purge_step=t.step + 1)  # what is trained again is replaced
        t.tensorboard.add_text("config", "    " + json.dumps(describe(t), indent=1).replace("\n", "\n    "), t.step)
    if "wandb" in t.args.tracker:
        import wandb
        t.wandb = wandb.init(project="gan", name=t.out.resolve().name, id=t.run_id, resume="allow", dir=t.out,
                             config=describe(t))
        t.wandb.define_metric("*", step_metric="step")


def track(t, values, picture=None):
    """Send numbers, and a Pillow image of samples, to the trackers."""
    numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
    if t.tensorboard:
        for name, value in numbers.items():
            t.tensorboard.add_scalar(name, value, t.step)
        if picture:
            t.tensorboard.add_image("grid", np.asarray(picture.convert("RGB")), t.step, dataformats="HWC")
    if t.wandb:
        import wandb  # its own step would refuse what a resumed run repeats
        t.wandb.log(numbers | {"step": t.step} | ({"grid": wandb.Image(picture)} if picture else {}))


def close_trackers(t):
    try:
        if t.tensorboard:
            t.tensorboard.close()
        if t.wandb:
            t.wandb.finish()
    except Exception as error:  # they only watch
        print(f"note: --tracker: {type(error).__name__}: {error}", file=sys.stderr)


def write_grid(t):
    """RUN/grids/step_*.png of the same latents and conditions all along, from the averaged generator."""
    if t.rank == 0:
        with torch.inference_mode():
            drawn = t.ema(t.grid_z, t.grid_condition)
        samples = drawn.argmax(2).cpu() if drawn.ndim == 3 else to_pixels(drawn)
        for name in (f"step_{t.step:07d}", "latest"):
            show(t, name, samples)
        if samples.ndim == 4:
            track(t, {}, make_grid(samples))


def show(t, name, samples):
    """RUN/grids/NAME.png of uint8 images (n, H, W, C), or NAME.txt of token ids (n, L)."""
    texts = samples.ndim == 2
    with whole_file(t.out / "grids" / f"{name}.{'txt' if texts else 'png'}") as file:
        if texts:
            file.write("".join(line + "\n" for line in to_texts(samples, t.meta)).encode())
        else:
            make_grid(samples).save(file, "PNG")


def to_texts(tokens, meta):
    """Token ids (n, L) as strings, up to the first 0; meta: vocabulary, and level, which is word or char."""
    rows = [row[:row.index(0)] if 0 in row else row for row in tokens.tolist()]
    return [(" " if meta["level"] == "word" else "").join(meta["vocabulary"][i] for i in row) for row in rows]


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
    return (f"finished {t.total} steps ({last['epoch']:.1f} epochs, {last['images']} {t.unit}); {len(ms)} of them "
            f"in {seconds / 60:.1f} min\n"
            f"step     {ms.mean():.1f} ms mean, {ms.min():.1f} min, {ms.max():.1f} max; "
            f"{1000 * t.args.batch_size / ms.mean():.0f} a second\n"
            f"last     {losses}\n"
            f"skipped  {last['skipped_g']} updates of G, {last['skipped_d']} of D (not finite)\n"
            f"files    {t.out}/generator.pt, {f'{t.out}/best.pt, ' if t.best else ''}{t.out}/log.jsonl, {t.out}/grids/")


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


def set_up(args, images, conditions, meta, device, rank, world):
    """Everything that training holds, in one namespace: options, data, networks, optimisers, counters."""
    length, size, labels = meta.get("length"), meta["size"], conditions if args.condition == "label" else None
    if bool(length) != (args.arch == "seq"):
        fail(f"--arch {args.arch}: {args.data} holds {'texts, for --arch seq' if length else 'images'}")
    if not length:
        args.depth = args.depth or default_depth(size)
        if size % 2 ** args.depth or not 2 <= size >> args.depth <= 15:
            fail(f"--data {args.data}: {size} pixels halved {args.depth} times (--depth) do not end at 2 to 15 pixels; "
                 f"sizes like 28, 32, 64 or 128 do")
    if args.batch_size > len(images):
        fail(f"--batch-size {args.batch_size}: {args.data} has only {len(images)} {'texts' if length else 'images'}")
    if args.batch_size % (world * args.grad_accum):
        fail(f"--batch-size {args.batch_size}: not divisible by {world} processes × {args.grad_accum} (--grad-accum)")
    args.width_d = args.width_d or args.width
    model = {k: getattr(args, k) for k in ("arch", "width", "width_d", "depth", "extra_convs", "latent_dim", "norm_d",
                                           "spectral_norm", "attention")}
    kind = "vector" if args.condition == "text" and meta.get("text_encoder") else args.condition
    known = (0 if kind == "none" else conditions.shape[2] if kind == "vector" else
             len(meta["classes"] if kind == "label" else meta["vocabulary"]))
    model |= {"sizes": [length] if length else find_sizes(args, size),
              "channels": len(meta["vocabulary"]) if length else meta["channels"], "condition": kind, "known": known,
              "cond_augment": args.cond_augment > 0}
    steps_per_epoch = len(images) // args.batch_size
    schedule_steps = args.epochs * steps_per_epoch

    torch.manual_seed(args.seed)
    G, D = (net.to(device, memory_format=torch.channels_last) for net in build_networks(model))
    ema = copy.deepcopy(G).eval().requires_grad_(False)
    amp = find_precision(args.amp, device)
    if amp == "fp16" and (args.r1 or args.r2 or args.gp):  # squared gradients leave its range
        amp = "off" if args.amp == "auto" else fail("--amp fp16 does not go with --r1, --r2 or --gp: use bf16 or off")

    def side(net, lr):
        params = list(net.parameters())
        return SimpleNamespace(
            net=net, params=params, lr=lr, scaler=torch.amp.GradScaler(device.type, enabled=amp == "fp16"),
            optimizer=torch.optim.RMSprop(params, lr, args.beta2) if args.optimizer == "rmsprop" else
            {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer](
                params, lr, (args.beta1, args.beta2), fused=True))

    def floats(net):
        return [x for x in net.state_dict().values() if x.is_floating_point()]

    def autocast():
        return torch.autocast(device.type, torch.float16 if amp == "fp16" else torch.bfloat16, enabled=amp != "off")

    rows = np.arange(len(images)) if labels is None else np.argsort(labels, kind="stable")
    t = SimpleNamespace(
        args=args, unit="texts" if length else "images", out=Path(args.out), device=device, rank=rank, world=world,
        amp=amp, autocast=autocast,
        images=images, conditions=conditions, meta=meta, sizes=model["sizes"], model=model, g=side(G, args.lr_g),
        d=side(D, args.lr_d), ema=ema,
        g_buffers=[b for b in G.buffers() if b.is_floating_point()], g_tensors=floats(G), ema_tensors=floats(ema),
        step=0, steps_per_epoch=steps_per_epoch,
        schedule_steps=schedule_steps, pretrain_steps=args.pretrain_epochs * steps_per_epoch,
        total=min(schedule_steps, args.max_steps or schedule_steps),
        sums=torch.zeros(len(STATS), device=device), counts=torch.zeros(len(STATS), device=device),
        skips=torch.zeros(3, 2, device=device),  # in all, in a row, longest row of the interval; of G, of D
        zero=torch.zeros((), device=device), grid_z=latents(args.seed, range(GRID), G.noise_dim).to(device),
        grid_rows=rows[:: max(1, len(rows) // GRID)][:GRID],  # whose conditions the grid shows
        class_counts=None if labels is None else np.bincount(labels, minlength=known).tolist(),
        bar=None, tensorboard=None, wandb=None, ms=[], last=None, begun=0, recent=[], warned={}, best=None)
    t.grid_condition = condition_of(t, conditions, np.resize(t.grid_rows, GRID), np.zeros(GRID))
    return t


def find_sizes(args, size):
    """The image sizes that training goes through; the last is the data's."""
    try:
        sizes = [int(part) for part in args.grow.split(",")] if args.grow else [size]
    except ValueError:
        fail(f"--grow {args.grow}: sizes separated by commas are needed, like 16,32,64")
    smallest = size >> (args.depth - 1)
    if sizes[-1] != size or sizes != sorted(set(sizes)) or any(
            s < smallest or size % s or (size // s).bit_count() != 1 for s in sizes):
        fail(f"--grow {args.grow}: must rise by factors of 2, 4, … from at least {smallest} to the data's {size}")
    return sizes


def describe(t):
    """What config.json holds: options as resolved, versions, hardware, the data's fingerprint."""
    device = torch.cuda.get_device_name(t.device) if t.device.type == "cuda" else platform.processor() or "cpu"
    with contextlib.suppress(OSError, StopIteration):  # Linux keeps the processor's name here alone
        if t.device.type == "cpu":
            device = next(x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name"))
    options = {k: v for k, v in vars(t.args).items() if k != "changed"}
    return {"run_id": t.run_id, "options": options, "changed": t.args.changed, "amp": t.amp,
            "model": t.model, "processes": t.world,
            "parameters": {"G": sum(p.numel() for p in t.g.params), "D": sum(p.numel() for p in t.d.params)},
            "data": {k: t.meta[k] for k in ("name", "count", "size", "channels", "fingerprint")} | {
                "length": t.meta.get("length")},
            "steps": t.total, "steps_per_epoch": t.steps_per_epoch,
            "hardware": {"device": t.device.type, "name": device, "cores": os.cpu_count(),
                         "threads": torch.get_num_threads(), "platform": platform.platform()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}


def main():
    args = parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    images, conditions, meta = load_data(args.data, args.condition)
    device = find_device(args.device)
    t = set_up(args, images, conditions, meta, device, rank, world)
    group = None
    if rank == 0:
        if args.fid_every:
            import evaluate
            evaluate.find_weights()  # or one line why not, before any work
        try:
            (t.out / "grids").mkdir(parents=True, exist_ok=True)
            t.lock = lock(t.out)  # for as long as this file is open
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
        import torch._inductor.config
        torch._inductor.config.fallback_random = True  # the same dropout and noise as without it
        t.g.net.compile()
        if not (args.r1 or args.r2 or args.gp):  # torch.compile has no double backward
            t.d.net.compile()
    if t.step >= t.total or patience_over(t):
        if rank == 0:
            print(f"{t.out} is already trained: {t.step} steps of {t.total}"
                  + (f"; ended by --patience, the best is that of step {t.best['step']}" if patience_over(t) else ""))
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
        names = ["log.jsonl", "fid.jsonl", "best.pt"] + [
            "checkpoint.pt", "checkpoint.prev.pt", "generator.pt", "error.pt"] * (
            t.args.resume == "never")
        for old in [t.out / name for name in names] + list(t.out.glob("grids/step_*")):
            old.unlink(missing_ok=True)
    for name in ("log.jsonl", "fid.jsonl"):
        trim_log(t.out / name, t.step)
    t.run_id = uuid.uuid4().hex
    if path is not None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            t.run_id = json.loads((t.out / "config.json").read_text())["run_id"]
    write_json(t.out / "config.json", describe(t))
    try:
        open_trackers(t)
    except Exception as error:  # no key, no network: each in its own way
        fail(f"--tracker {' '.join(t.args.tracker)}: {type(error).__name__}: {error}")
    show(t, "real", t.images[t.grid_rows])
    write_status(t, "running")
    parameters = [sum(p.numel() for p in side.params) / 1e6 for side in (t.g, t.d)]
    shape = "×".join(str(n) for n in t.images.shape[1:]) if t.images.ndim == 4 else f"{t.images.shape[1]} tokens"
    print(f"{t.out}: {t.args.arch} {shape}, G {parameters[0]:.2f} M "
          f"and D {parameters[1]:.2f} M parameters; {len(t.images)} {t.unit}; "
          f"steps {t.step} to {t.total} of {t.args.batch_size}; {t.device} × {t.world}, "
          f"{'fp32' if t.amp == 'off' else t.amp}" + (f"; going on from {path}" if path else ""), flush=True)


def run(t, signals, path):
    """Train, and leave RUN/ in a state that says how it ended."""
    start = time.perf_counter()
    try:
        if t.rank == 0:
            begin(t, path)
        t.bar = tqdm(total=t.total * t.args.batch_size, initial=t.step * t.args.batch_size, unit=" " + t.unit,
                     mininterval=1, disable=None if t.rank == 0 else True,
                     bar_format="{desc} {percentage:3.0f}% {rate_noinv_fmt}, {remaining} left{postfix}")
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
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            fail(f"out of memory at step {t.step}: try --grad-accum {2 * t.args.grad_accum} (the same batch in smaller "
                 f"parts), --batch-size {max(t.args.batch_size // 2, 1)}, a smaller --width"
                 + (", --amp bf16" if t.amp == "off" else "") + ", in another --out or with --resume never", 1)
        raise
    finally:
        if t.bar is not None:
            t.bar.close()
    if number and t.step < t.total:
        write_status(t, "interrupted", signal=signal.Signals(number).name)
        close_trackers(t)
        if t.world > 1:
            dist.barrier(signals.group)  # the one that writes is not left behind
        fail(f"{signal.Signals(number).name}: saved at step {t.step} of {t.total}; the same command goes on"
             + ("" if t.args.resume == "auto" else " with --resume auto"), TRY_AGAIN)
    write_status(t, "finished", seconds=round(time.perf_counter() - start, 1))
    close_trackers(t)
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
