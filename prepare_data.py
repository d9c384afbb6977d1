"""Turn a source of images into DATA/: memory-mapped uint8 arrays and meta.json.

    python prepare_data.py shapes --out data/shapes --size 32
    python prepare_data.py mnist  --out data/mnist  --size 28
    python prepare_data.py folder --out data/faces  --size 64 --root faces.zip

    python prepare_data.py text --out data/captions --root data/shapes/captions.jsonl

DATA/images.npy is (N, H, W, C) uint8; of texts, DATA/tokens.npy (N, L) int32. DATA appears whole or not at all; called
again with the same options, nothing is done.
"""

import argparse
import contextlib
import difflib
import glob
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import sys
import tarfile
import time
import warnings
import zipfile
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageOps
from tqdm import tqdm

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
              ".tga", ".jp2", ".avif"}
# decoders that start no other program: EPS would run Ghostscript on a stranger's file
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF")
MAX_FILE_BYTES = 1 << 29  # a zip member larger than this is a bomb, not a picture or a text
MAX_WORDS, MAX_VOCABULARY = 32, 10_000  # of a caption; of all, the others become <unk>
CHUNK = 32  # images a task: large enough that passing them costs little beside decoding
stopped = []  # signals received; looked at between images, since raising within a process pool can deadlock it

TORCHVISION = ("mnist", "fashion-mnist", "cifar10", "celeba")
SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 70), "blue": (50, 80, 220), "yellow": (240, 205, 40),
           "purple": (145, 60, 180), "orange": (245, 135, 35)}
BACKGROUNDS = {"white": (250, 250, 250), "black": (15, 15, 15), "gray": (128, 128, 128)}
RADII = {"small": (0.15, 0.20), "large": (0.32, 0.40)}  # as a share of the side
PHRASINGS = ("a {size} {colour} {shape} on a {background} background",
             "{size} {colour} {shape}, {background} background",
             "the {colour} {shape} is {size}, the background {background}",
             "on a {background} background there is a {size} {colour} {shape}")


class Item(NamedTuple):
    """One picture to be: `payload` is a path, an encoded file, a pixel array, or the number of a shape to draw."""
    name: str
    payload: str | bytes | np.ndarray | int
    label: str | None = None
    captions: list[str] | None = None


# ---- what all four scripts use ---------------------------------------------------------------------------

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: interrupted or in use, call again


def fail(message, status=2):
    """End with one line for the user; of several processes on a node the first speaks for all."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    raise SystemExit(status)


def flag(name):
    """The option as it is typed: batch_size -> --batch-size."""
    return f"--{name.replace('_', '-')}"


def within(low, high=math.inf, kind=float):
    """An argparse type: a finite number from low to high."""
    def number(text):
        value = kind(text)
        if not (math.isfinite(value) and low <= value <= high):
            limits = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise argparse.ArgumentTypeError(f"{text} must be {limits}")
        return value
    number.__name__ = kind.__name__  # for argparse's "invalid float value"
    return number


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults in the help, the docstring as it stands."""

    def _get_help_string(self, action):
        unsaid = action.default is None or action.default is False or action.default == []
        return action.help if unsaid else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose options say in their declaration what they need; a mistake is one line.

    add = Parser(__doc__).group("data") gives argparse's add_argument with two words more: `needs` names an option,
    or an option and the values of which it needs one ("--schedule linear or cosine"); `excludes` the same of what it
    does not go with. They are held against the options that the call names, not against defaults.
    """

    def __init__(self, description):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
        self.rules, self.named = {}, []  # the rules of each option; the options that the call named

    def group(self, title, **common):
        """A function that declares options under this title; what is in common holds for each of them."""
        group = self.add_argument_group(title)

        def add(name, needs=(), excludes=(), **more):
            needs, excludes = ([r] if isinstance(r, str) else list(r) for r in (needs, excludes))
            if needs:
                more["help"] += f"; needs {' and '.join(needs)}"
            action = group.add_argument(name, **more)
            self.rules[action.dest] = needs + [*common.get("needs", ())], excludes + [*common.get("excludes", ())]
        return add

    def parse_args(self, argv=None):
        argv = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
        options = self._option_string_actions
        words = [w.split("=")[0] for w in argv if re.match(r"--?[a-zA-Z]", w) and " " not in w.split("=")[0]]
        for word in words:
            if word not in options:
                name = f"--{word.lstrip('-')}"
                near = [o for o in options if o.startswith(name)] or difflib.get_close_matches(name, options, 1)
                self.error(f"{word} is no option" + (f": did you mean {' or '.join(near)}?" if near else ""))
        args = super().parse_args(argv)
        self.named = list(dict.fromkeys(options[word].dest for word in words))
        for name in self.named:
            needs, excludes = self.rules.get(name, ((), ()))
            for rule in [r for r in needs if not holds(r, args)]:
                fail(f"{flag(name)} needs {rule}")
            for rule in [r for r in excludes if holds(r, args)]:
                fail(f"{flag(name)} does not go with {rule}")
        return args

    def error(self, message):
        fail(message if message.endswith("?") else f"{message} (--help lists the options)")


def holds(rule, args):
    """Whether the call is as a rule says: "--option", or "--option value or value"."""
    option, _, values = rule.partition(" ")
    value = getattr(args, option.lstrip("-").replace("-", "_"))
    return str(value) in values.split(" or ") if values else bool(value)


def find_device(name, processes=1):
    """torch's device of --device; of several processes on a node each has a GPU of its own."""
    import torch
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
    return device


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


def write_text(path, text):
    with whole_file(path) as file:
        file.write(text.encode("utf-8", "replace"))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path, option=None):
    """What a .json holds; a file that is missing or damaged is the user's to see."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"damaged: {error}"
        fail(f"{f'{option} ' if option else ''}{path}: {reason}")


def read_lines(path):
    """The lines of a .jsonl as dicts, [] where there is none; a line that a kill cut short is left out."""
    with contextlib.suppress(FileNotFoundError):
        lines = Path(path).read_bytes().decode("utf-8", "replace").split("\n")
        return [json.loads(line) for line in lines if line.endswith("}")]
    return []


def lock(folder):
    """Hold a folder for this process alone, or exit 75 and say who does. The kernel drops a dead process's lock."""
    import fcntl
    file = open(Path(folder) / "lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        fail(f"--out {folder} is in use by {file.read().strip() or 'another process'}", TRY_AGAIN)
    except OSError as error:
        print(f"note: {folder} cannot be locked on this file system ({error}): see that nothing else writes to it",
              file=sys.stderr)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    return file


class Trackers:
    """Where --tracker sends numbers and pictures: TensorBoard and Weights & Biases, optional packages.

    A resumed run goes on in the same ones; what is logged again from `step` on replaces what was there.
    """

    def __init__(self, names, folder, run_id, step, config=None):
        self.tensorboard = self.wandb = None
        try:
            if "tensorboard" in names:
                from torch.utils.tensorboard import SummaryWriter
                self.tensorboard = SummaryWriter(Path(folder) / "tensorboard", purge_step=step + 1)
                text = json.dumps(config, indent=1).replace("\n", "\n    ")
                self.tensorboard.add_text("config", f"    {text}", step)
            if "wandb" in names:
                import wandb
                self.wandb = wandb.init(project="gan", name=Path(folder).resolve().name, id=run_id, resume="allow",
                                        dir=folder, config=config)
                self.wandb.define_metric("*", step_metric="step")
        except Exception as error:  # no key, no network: each in its own way
            fail(f"--tracker {' '.join(names)}: {type(error).__name__}: {error}")

    def log(self, values, step, picture=None):
        """Numbers of a dict, and a Pillow image of samples."""
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
        if self.tensorboard:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, step)
            if picture:
                pixels = np.asarray(picture.convert("RGB"))
                self.tensorboard.add_image("grid", pixels, step, dataformats="HWC")
        if self.wandb:
            import wandb  # its own step would refuse what a resumed run repeats
            self.wandb.log(numbers | {"step": step} | ({"grid": wandb.Image(picture)} if picture else {}))

    def close(self):
        try:
            if self.tensorboard:
                self.tensorboard.close()
            if self.wandb:
                self.wandb.finish()
        except Exception as error:  # they only watch
            print(f"note: --tracker: {type(error).__name__}: {error}", file=sys.stderr)


class Data:
    """DATA/ as it was written: `meta`, and arrays (memory maps) that agree with it, or one line that says why not."""

    def __init__(self, folder):
        self.folder = Path(folder)
        if not (self.folder / "meta.json").exists():
            fail(f"--data {folder}: meta.json is not there; make the folder with prepare_data.py")
        self.meta = read_json(self.folder / "meta.json", "--data")
        missing = [key for key in ("name", "count", "size", "channels", "classes", "vocabulary", "fingerprint")
                   if key not in self.meta]
        if missing:
            self.damaged(f"meta.json lacks {', '.join(missing)}")

    def damaged(self, what):
        fail(f"--data {self.folder}: {what}; make it again with prepare_data.py")

    def array(self, name):
        """images (N, H, W, C) uint8; labels (N,); tokens (N, K, L), of texts (N, L); embeddings (N, K, n)."""
        meta = self.meta
        length = meta.get("length")  # of texts without images
        shape = {"images": (meta["count"], meta["size"], meta["size"], meta["channels"]), "labels": (meta["count"],),
                 "tokens": (meta["count"], length) if length else (meta["count"], None, None),
                 "held_out": (meta.get("held_out"), length), "embeddings": (meta["count"], None, None)}[name]
        try:
            array = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        except FileNotFoundError:
            self.damaged(f"{name}.npy is not there")
        except (OSError, ValueError, EOFError) as error:
            self.damaged(f"{name}.npy is damaged ({type(error).__name__}: {error})")
        fits = array.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape))
        if not fits or array.dtype.kind != {"images": "u", "embeddings": "f"}.get(name, "i"):
            self.damaged(f"meta.json says {shape}, {name}.npy is {array.dtype} {array.shape}")
        if name not in ("images", "embeddings"):
            known = len(meta["classes" if name == "labels" else "vocabulary"] or ())
            if not 0 <= array.min() <= array.max() < known:
                what = "classes" if name == "labels" else "words of the vocabulary"
                self.damaged(f"{name}.npy goes beyond the {known} {what} in meta.json")
        return array

    def captions(self):
        """The lines of captions.jsonl, one an image: {"captions": [...], and attributes where the source has them}."""
        return read_lines(self.folder / "captions.jsonl")


# ---- sources: each yields Items -------------------------------------------------------------------------------------

def shapes_source(args):
    return args.num or 10_000, (Item(f"shape {i}", i) for i in range(args.num or 10_000))


def torchvision_source(args):
    from torchvision import datasets
    root = args.root or "downloads"
    dataset_class = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10,
                     "celeba": datasets.CelebA}[args.source]
    options = {"split": "all", "target_type": []} if args.source == "celeba" else {}
    try:
        try:
            dataset = dataset_class(root, download=False, **options)
        except RuntimeError:  # torchvision's word for "not there"
            print(f"{args.source} is not under {root}: downloading", flush=True)
            dataset = dataset_class(root, download=True, **options)
    except Exception as error:  # each mirror fails in its own way
        fail(f"{args.source} is neither under --root {root} nor downloadable "
             f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'})")
    if args.source == "celeba":
        folder = os.path.join(root, "celeba", "img_align_celeba")
        return len(dataset), (Item(name, os.path.join(folder, name)) for name in dataset.filename)
    return len(dataset), (Item(f"{args.source} {i}", np.asarray(pixels), dataset.classes[int(target)])
                          for i, (pixels, target) in enumerate(zip(dataset.data, dataset.targets)))


def open_file(path):
    return open(path, "rb")


def open_root(root):
    """(a function that opens a member to read, {name: member}) of a directory or archive; nothing is unpacked."""
    try:
        if root.is_dir():
            names = {}
            for where, folders, files in os.walk(root):
                folders[:] = sorted(f for f in folders if not f.startswith("."))
                names |= {os.path.relpath(os.path.join(where, f), root): os.path.join(where, f) for f in files}
            return open_file, names
        if zipfile.is_zipfile(root):
            archive = zipfile.ZipFile(root)
            return archive.open, {m.filename: m for m in archive.infolist() if not m.is_dir()}
        archive = tarfile.open(root)
        return archive.extractfile, {m.name: m for m in archive if not m.isdir()}
    except (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        fail(f"--root {root}: neither a directory nor a readable .zip or .tar(.gz) "
             f"({str(error).splitlines()[0].rstrip(':')})")


def folder_source(args):
    """Images of a directory or archive, sorted by name. The first level of folders are classes."""
    root = Path(args.root)
    read, names = open_root(root)
    captions = find_captions(args, root, read, names)
    order = [n for n in names
             if os.path.splitext(n)[1].lower() in EXTENSIONS and not os.path.basename(n).startswith(".")]
    if args.source == "coco":  # the images that the file of captions names
        order = [n for n in order if os.path.basename(n) in captions]
    # a compressed tar has no random access: sorted order would unpack it again for each image
    if not any(isinstance(member, tarfile.TarInfo) for member in names.values()):
        order.sort()
    # a wrapping folder (faces/0001.png …) is not a class
    parts = [re.split(r"[/\\]", n) for n in order]
    while parts and all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    classes = {p[0] for p in parts} if args.source == "folder" and all(len(p) > 1 for p in parts) else set()

    def items():
        for name, part in zip(order, parts):
            payload = names[name] if root.is_dir() else read_member(read, names[name])
            told = captions and (captions.get(name) or captions.get(os.path.basename(name), []))
            yield Item(name, payload, part[0] if classes else None, told)
    return len(order), items()


def find_captions(args, root, read, names):
    """{file: [captions]} of COCO's JSON, of a captions.jsonl inside or beside the source, or of .txt beside images."""
    try:
        if args.source == "coco":
            content = json.loads(Path(args.captions).read_bytes())
            files, captions = {i["id"]: i["file_name"] for i in content["images"]}, {}
            for annotation in content["annotations"]:
                captions.setdefault(files[annotation["image_id"]], []).append(annotation["caption"].strip())
            return captions
        inside = [member for name, member in names.items() if os.path.basename(name) == "captions.jsonl"]
        beside = args.captions or root.resolve().parent / "captions.jsonl"
        if args.captions or not inside and os.path.exists(beside):
            read, inside = open_file, [beside]
        if inside:
            with read(inside[0]) as file:
                lines = file.read().decode("utf-8", "replace").split("\n")
            captions = {}
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                    told = [entry["captions"]] if isinstance(entry["captions"], str) else entry["captions"]
                    captions[entry["file"]] = [str(c) for c in told]
                except (ValueError, KeyError, TypeError):
                    raise ValueError(f'line {number} is not like {{"file": "1.png", "captions": ["a boat"]}}') from None
            return captions
        texts, stems = {}, {os.path.splitext(n)[0]: n for n in names if os.path.splitext(n)[1].lower() in EXTENSIONS}
        for name in names:
            if name.endswith(".txt") and name[:-4] in stems:
                with read(names[name]) as file:
                    lines = file.read(1 << 20).decode("utf-8", "replace").splitlines()
                texts[stems[name[:-4]]] = [line for line in lines if line.strip()]
        return texts or None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, tarfile.TarError, zipfile.BadZipFile) as error:
        fail(f"{'--captions ' + args.captions if args.captions else 'captions of --root ' + args.root}: cannot be read "
             f"as {'COCO captions' if args.source == 'coco' else 'captions'} ("
             + ("no such file)" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error})"))


def read_member(read, member):
    """The bytes of a member of open_root, or the reason (an exception) why they cannot be had."""
    try:
        with read(member) as file:  # a link is followed within the archive; a device is None
            data = file.read(MAX_FILE_BYTES + 1)
        return data if len(data) <= MAX_FILE_BYTES else ValueError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
    except Exception as error:  # damage, encryption, an unknown compression: this member alone is lost
        return error


# ---- one picture -----------------------------------------------------------------------------------------------------

def draw_shape(index, size, seed):
    """Picture number `index` of the embedded set: (RGB image of size × size, class name, attributes)."""
    rng = np.random.default_rng([seed, index])
    shape, colour, background, scale = (str(rng.choice(list(options)))
                                        for options in (SHAPES, COLOURS, BACKGROUNDS, RADII))
    radius = rng.uniform(*RADII[scale])
    x, y = rng.uniform(radius + 0.05, 0.95 - radius, 2)
    side = 4 * size  # drawn large and reduced: smooth edges
    image = Image.new("RGB", (side, side), BACKGROUNDS[background])
    draw, fill = ImageDraw.Draw(image), COLOURS[colour]
    x, y, radius = x * side, y * side, radius * side
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    else:
        corners = {"square": 4, "triangle": 3, "star": 10}[shape]
        turn = rng.uniform(-0.2, 0.2) + (math.pi / 4 if shape == "square" else 0) - math.pi / 2
        radii = [radius * (0.45 if shape == "star" and k % 2 else 1.0) for k in range(corners)]
        draw.polygon([(x + r * math.cos(turn + 2 * math.pi * k / corners),
                       y + r * math.sin(turn + 2 * math.pi * k / corners)) for k, r in enumerate(radii)], fill=fill)
    attributes = {"shape": shape, "colour": colour, "background": background, "size": scale}
    return image.reduce(4), f"{colour} {shape}", attributes


def to_pixels(image, size, channels, crop, background):
    """Any Pillow image -> (size, size, channels) uint8: upright, opaque, centre square, one antialiased resize.

    crop: side in pixels of the centred square that is kept; None keeps the largest.
    """
    side = min(*image.size, crop or sys.maxsize)
    if image.format == "JPEG":  # decode at 1/2, 1/4 or 1/8 where that is still larger than what is kept
        scale = size / side
        before = image.size
        image.draft(None, (math.ceil(before[0] * scale), math.ceil(before[1] * scale)))
        side = max(1, round(side * image.size[0] / before[0]))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    elif image.mode == "F":
        pixels = np.nan_to_num(np.asarray(image))
        image = Image.fromarray((pixels * (255 if pixels.max() <= 1 else 1)).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    image = image.convert("L" if channels == 1 else "RGB")
    left, top = (image.width - side) / 2, (image.height - side) / 2
    if (image.width, image.height) != (size, size) or side != size:
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.asarray(image).reshape(size, size, channels)


def decode(items, args):
    """Worker: a list of Items -> a list of (pixels or None, name, label, captions, attributes, why it was skipped)."""
    warnings.simplefilter("ignore")  # Pillow warns of half-bombs and odd EXIF; what matters raises
    Image.init()
    formats = [f for f in FORMATS if f in Image.OPEN]
    results = []
    for name, payload, label, captions in items:
        attributes = None
        try:
            if isinstance(payload, Exception):
                raise payload
            if isinstance(payload, int):
                image, label, attributes = draw_shape(payload, args.size, args.seed)
                captions = [phrasing.format(**attributes) for phrasing in PHRASINGS]
            elif isinstance(payload, np.ndarray):
                image = Image.fromarray(payload)
            else:
                image = Image.open(io.BytesIO(payload) if isinstance(payload, bytes) else payload, formats=formats)
            with image:
                pixels = to_pixels(image, args.size, args.channels, args.crop, args.background)
            if captions is not None:
                captions = [c for c in captions if words_of(c)]
                if not captions:
                    raise ValueError("no caption")
            results.append((pixels, name, label, captions, attributes, None))
        except Exception as error:  # decoders of hostile files raise anything
            reason = str(error).replace(repr(payload), "file") if isinstance(payload, str) else str(error)
            results.append((None, name, label, None, None, re.sub(r" ?<_io.BytesIO[^>]*>", "", reason)
                            or type(error).__name__))
    return results


def die_by_signals():
    """In a worker: the parent's Ctrl-C is the parent's business, and what ends a worker ends it at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def decode_all(items, args):
    """Results of `decode` in order, from all cores, with a bounded number of images under way."""
    items, window = iter(items), deque()
    with ProcessPoolExecutor(args.workers, initializer=die_by_signals) as pool:
        try:
            while chunk := list(itertools.islice(items, CHUNK)):
                window.append(pool.submit(decode, chunk, args))
                if len(window) >= 4 * args.workers:
                    yield from window.popleft().result()
            while window:
                yield from window.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


# ---- captions --------------------------------------------------------------------------------------------------------

def words_of(caption):
    """Lower-cased words and numbers of a caption."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", caption.lower())


def tokenize(captions):
    """N lists of captions -> (tokens (N, K, L) int32, 0 = padding; vocabulary, most frequent word first)."""
    split = [[words_of(c)[:MAX_WORDS] for c in per_image] for per_image in captions]
    counts = Counter(word for per_image in split for words in per_image for word in words)
    vocabulary = ["<pad>", "<unk>"] + sorted(counts, key=lambda w: (-counts[w], w))[:MAX_VOCABULARY]
    index = {word: i for i, word in enumerate(vocabulary)}
    length = max(len(words) for per_image in split for words in per_image)
    tokens = np.zeros((len(split), max(map(len, split)), length), np.int32)
    for n, per_image in enumerate(split):
        for k, words in enumerate(per_image):
            tokens[n, k, :len(words)] = [index.get(w, 1) for w in words]
    return tokens, vocabulary


def load_text_encoder(name):
    """A sentence-transformers model, by name or folder."""
    try:
        from sentence_transformers import SentenceTransformer
        return SentenceTransformer(name)
    except ImportError:
        fail("--text-encoder needs a package: pip install sentence-transformers")
    except Exception as error:  # each hub and file fails in its own way
        fail(f"--text-encoder {name}: cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0]})")


# ---- DATA ------------------------------------------------------------------------------------------------------------

def write_arrays(results, total, folder, args, text_encoder):
    """Append pictures to images.npy as they come; labels, captions and meta.json after them. Returns the meta."""
    labels, texts, skipped, digest = [], [], [], hashlib.sha256()
    with open(folder / "images.npy", "wb") as file:
        def header(count):  # numpy pads its header so that the first axis can grow in place
            shape = (count, args.size, args.size, args.channels)
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        header(0)
        start = file.tell()
        for pixels, name, label, captions, attributes, reason in tqdm(results, total=total, unit="img", disable=None):
            if stopped:
                sys.exit(128 + stopped[0])
            if pixels is None:
                if args.strict:
                    fail(f"{name!a}: {reason} (--strict)")
                skipped.append({"file": name, "reason": reason})
                continue
            row = pixels.tobytes()
            file.write(row)
            digest.update(row)
            labels.append(label)
            texts.append({"captions": captions} | (attributes or {}))
        file.seek(0)
        header(len(labels))
        assert file.tell() == start, "numpy's header changed its length"
        os.fsync(file.fileno())
    if not labels:
        fail(f"{f'--root {args.root}' if args.root else args.source}: not one usable image"
             + (f"; the first of {len(skipped)} skipped: {skipped[0]['file']!a}: {skipped[0]['reason']}"
                if skipped else f" (looked for {' '.join(sorted(EXTENSIONS))})"))

    meta = {"name": args.source, "count": len(labels), "size": args.size, "channels": args.channels, "classes": None,
            "vocabulary": None, "text_encoder": None, "source": source_options(args), "skipped": skipped}
    if all(label is not None for label in labels):
        meta["classes"] = sorted(set(labels), key=lambda c: (len(c), c) if c.isdigit() else (0, c))
        index = {c: i for i, c in enumerate(meta["classes"])}
        array = np.array([index[label] for label in labels], np.int64)
        save_array(folder / "labels.npy", array, digest)
    if texts[0]["captions"] is not None:
        captions = [text["captions"] for text in texts]
        array, meta["vocabulary"] = tokenize(captions)
        save_array(folder / "tokens.npy", array, digest)
        if args.text_encoder:
            flat = text_encoder.encode([c for each in captions for c in each])
            array = np.zeros((len(captions), max(map(len, captions)), flat.shape[1]), np.float32)
            for row, each in zip(array, captions):
                row[:len(each)], flat = flat[:len(each)], flat[len(each):]
            save_array(folder / "embeddings.npy", array, digest)
            meta["text_encoder"] = args.text_encoder
        write_text(folder / "captions.jsonl", "".join(json.dumps(text) + "\n" for text in texts))
    meta["fingerprint"] = digest.hexdigest()
    write_json(folder / "meta.json", meta)
    return meta


# ---- texts without images --------------------------------------------------------------------------------------------

ORACLE = {"vocabulary": 5000, "length": 20, "hidden": 32}  # Yu et al. 2017


def read_texts(args):
    """The texts of --root, one a line or, in .jsonl, a caption each; a file, a directory or an archive."""
    root = Path(args.root)
    readable = root.is_file() and os.access(root, os.R_OK)  # is_tarfile raises where it may not read
    if readable and not zipfile.is_zipfile(root) and not tarfile.is_tarfile(root):
        read, names, files = open_file, {root.name: root}, [root.name]
    else:
        read, names = open_root(root)
        files = sorted(name for name in names
                       if name.endswith((".txt", ".jsonl")) and not os.path.basename(name).startswith("."))
    texts = []
    for name in files or fail(f"--root {root}: no .txt or .jsonl in it"):
        content = read_member(read, names[name])
        if isinstance(content, Exception) or b"\0" in content:
            reason = content if isinstance(content, Exception) else "not UTF-8 text"
            fail(f"--root {root}: {name}: cannot be read ({reason})")
        lines = content.decode("utf-8", "replace").splitlines()
        try:
            if name.endswith(".jsonl"):
                told = [json.loads(line)["captions"] for line in lines if line.strip()]
                lines = [c for captions in told for c in ([captions] if isinstance(captions, str) else captions)]
            texts += [" ".join("".join(c if c.isprintable() else " " for c in text).split()) for text in lines]
        except (ValueError, KeyError, TypeError) as error:
            fail(f"--root {root}: {name}: not lines like {{\"captions\": [\"a text\"]}} "
                 f"({type(error).__name__}: {error})")
    return [text for text in texts if text][:args.num]


def write_texts(args, folder):
    """tokens.npy and, of a tenth of the different texts that training never sees, held_out.npy; returns meta.

    Ids: 0 padding, 1 <unk>, then the tokens by how often they occur.
    """
    split = [tuple(words_of(text) if args.level == "word" else text) for text in read_texts(args)]
    longest = max(map(len, split), default=0)
    length = args.length or min(longest, MAX_WORDS if args.level == "word" else 4 * MAX_WORDS)
    cut, split = sum(len(text) > length for text in split), [text[:length] for text in split if text]
    different = sorted(set(split))
    if len(different) < 20 or length < 2:
        fail(f"--root {args.root}: {len(different)} different texts of up to {length} tokens; it takes 20 of 2 or more")
    held = random.Random(args.seed).sample(different, len(different) // 10)
    counts = Counter(token for text in split for token in text)
    vocabulary = ["", "<unk>"] + [token for token, _ in counts.most_common(MAX_VOCABULARY - 2)]
    index = {token: i for i, token in enumerate(vocabulary)}

    def to_ids(texts):
        ids = np.zeros((len(texts), length), np.int32)
        for row, text in zip(ids, texts):
            row[:len(text)] = [index.get(token, 1) for token in text]
        return ids
    unseen = set(held)
    tokens = to_ids([text for text in split if text not in unseen])
    return save_texts(args, folder, tokens, to_ids(held), vocabulary, cut)


def write_oracle(args, folder):
    """Texts drawn from a random LSTM with weights N(0, 1), which is kept in oracle.pt."""
    import torch
    torch.manual_seed(args.seed)
    n, length, hidden = ORACLE["vocabulary"], args.length or ORACLE["length"], ORACLE["hidden"]
    oracle = torch.nn.ModuleDict({"embed": torch.nn.Embedding(n + 1, hidden), "cell": torch.nn.LSTMCell(hidden, hidden),
                                  "logits": torch.nn.Linear(hidden, n)})
    for parameter in oracle.parameters():
        torch.nn.init.normal_(parameter)
    count, drawn = args.num or 10_000, []
    with torch.inference_mode():
        token, state = torch.zeros(2 * count, dtype=torch.int64), None  # 0 begins a text
        for _ in range(length):
            state = oracle["cell"](oracle["embed"](token), state)
            below = oracle["logits"](state[0]).softmax(1).cumsum(1)
            token = 1 + torch.searchsorted(below, torch.rand(2 * count, 1)).squeeze(1).clamp(max=n - 1)
            drawn.append(token)
    ids = torch.stack(drawn, 1).numpy().astype(np.int32)
    torch.save(oracle.state_dict(), folder / "oracle.pt")
    return save_texts(args, folder, ids[:count], ids[count:], [""] + [f"w{i}" for i in range(1, n + 1)], 0)


def save_texts(args, folder, tokens, held_out, vocabulary, cut):
    """The arrays and meta.json of texts (n, L), (m, L) int32 of token ids."""
    digest = hashlib.sha256()
    for name, array in (("tokens", tokens), ("held_out", held_out)):
        save_array(folder / f"{name}.npy", array, digest)
    meta = {"name": "oracle" if args.synthetic_oracle else "text", "count": len(tokens), "held_out": len(held_out),
            "length": tokens.shape[1], "level": args.level, "size": None, "channels": None, "classes": None,
            "vocabulary": vocabulary, "source": source_options(args), "skipped": [], "cut": cut,
            "fingerprint": digest.hexdigest()}
    write_json(folder / "meta.json", meta)
    return meta


def save_array(path, array, digest):
    digest.update(array.tobytes())
    with open(path, "wb") as file:
        np.save(file, array)
        os.fsync(file.fileno())


def alive(pid):
    """Whether a process of this number runs here."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


def source_options(args):
    """The options that decide what DATA holds."""
    return {k: v for k, v in vars(args).items() if k not in ("out", "workers", "strict")}


def cores():
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("source", choices=["shapes", *TORCHVISION, "folder", "coco", "text"], help="shapes: drawn "
                        "here, no download; folder: a directory, .zip or .tar(.gz) of images; coco: the same with "
                        "COCO's captions; text: sentences without images")
    files = "source folder or coco"
    add = parser.group("data")
    add("--out", required=True, metavar="DATA", help="folder to make")
    add("--root", metavar="SOURCE", excludes="source shapes", help="folder: where the images are; text: a .txt, a "
        "line a text, a captions.jsonl, or a folder or archive of these; torchvision's sets: where they are or are "
        "downloaded to (then default: downloads)")
    add("--num", type=within(1, kind=int), help="shapes: how many to draw (default 10000); else: the first so many")
    add("--seed", type=within(0, kind=int), default=0, needs="source shapes or text", help="which shapes are "
        "drawn, which texts are held out")
    add = parser.group("images", excludes=["source text"])
    add("--size", type=within(1, kind=int), default=64, help="side of the images made, pixels")
    add("--channels", type=int, choices=[1, 3], help="1 gray, 3 RGB (default: 1 for the MNISTs, else 3)")
    add("--crop", type=within(1, kind=int), metavar="PIXELS", help="side of the centred square kept, in pixels of the "
        "source (default: the largest)")
    add("--background", default="white", help="colour under transparent pixels: a name or #rrggbb")
    add("--strict", action="store_true", help="an unreadable image is an error, not skipped")
    add("--captions", metavar="FILE", needs=files, help="coco: captions_train2017.json or its like; folder: a "
        "captions.jsonl elsewhere than inside or beside --root")
    add("--text-encoder", metavar="NAME", needs=f"{files} or shapes", help="a sentence-transformers model, by name or "
        "folder, whose embeddings of the captions are what the networks are told")
    add = parser.group("texts", needs=["source text"])
    add("--level", choices=["word", "char"], default="word", help="what a token is")
    add("--length", type=within(1, kind=int), help="tokens a text; longer ones are cut (default: the longest text's, "
        "at most 32 words or 128 characters)")
    add("--synthetic-oracle", action="store_true", excludes=["--root", "--level char"], help="draw --num texts of 20 "
        "tokens from a fixed random LSTM over 5000, under which the likelihood of any text is known (SeqGAN's "
        "benchmark)")
    add = parser.group("speed")
    add("--workers", type=within(1, kind=int), default=cores(), excludes="source text", help="decoding processes")
    args = parser.parse_args(argv)
    args.channels = args.channels or (1 if "mnist" in args.source else 3)
    try:
        ImageColor.getrgb(args.background)
    except ValueError:
        fail(f"--background {args.background}: not a colour (a name like white, or #rrggbb)")
    if args.source in ("folder", "coco", "text") and args.root is None and not args.synthetic_oracle:
        fail(f"--root is missing: the {'file of texts' if args.source == 'text' else 'folder or archive of images'}")
    if args.source == "coco" and args.captions is None:
        fail("--captions is missing: the JSON file of COCO's captions")
    if args.source in ("folder", "coco") and not os.path.exists(args.root):
        fail(f"--root {args.root}: no such file or directory")
    return args


def main():
    args = parse_args()
    out = Path(args.out)
    if (out / "meta.json").exists():
        try:
            there = json.loads((out / "meta.json").read_text())
        except (OSError, ValueError) as error:
            fail(f"--out {out}: meta.json cannot be read ({error}): delete the folder or choose another --out")
        asked = source_options(args)
        changed = [f"{flag(k)} {there['source'].get(k)} there, {asked[k]} asked" for k in asked
                   if there["source"].get(k) != asked[k]]
        if changed:
            fail(f"--out {out} holds other data ({'; '.join(changed)}): delete it or choose another --out")
        return print(f"{out} is already prepared: {there['count']} {'texts' if args.source == 'text' else 'images'}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        fail(f"--out {out} exists and is not a data folder: choose another --out")

    if args.source != "text":
        total, items = (shapes_source if args.source == "shapes" else torchvision_source
                        if args.source in TORCHVISION else folder_source)(args)
        total, items = min(total, args.num or total), itertools.islice(items, args.num)
    text_encoder = load_text_encoder(args.text_encoder) if args.text_encoder else None
    for left in out.parent.glob(f"{glob.escape(out.name)}.*.partial"):  # by a process that was killed
        if not alive(left.name.split(".")[-2]):
            shutil.rmtree(left, ignore_errors=True)
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: sys.exit(128 + number) if args.source == "text" else
                      stopped.append(number))
    try:
        partial.mkdir(parents=True)
        if args.source == "text":
            meta = (write_oracle if args.synthetic_oracle else write_texts)(args, partial)
        else:
            meta = write_arrays(decode_all(items, args), total, partial, args, text_encoder)
        os.rename(partial, out)
    except OSError as error:  # a full disk, a folder that may not be written
        if (out / "meta.json").exists():
            fail(f"--out {out} was made by another process meanwhile: call again to compare the options")
        sys.exit(f"prepare_data.py: {error.strerror or error}: {error.filename or out}")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for entry in meta["skipped"][:5]:
        print(f"skipped {entry['file']!a}: {entry['reason']}")
    skipped = f", {len(meta['skipped'])} skipped (named in meta.json)" if meta["skipped"] else ""
    classes = f", {len(meta['classes'])} classes" if meta["classes"] else ""
    what = f"images of {args.size}×{args.size}×{args.channels}"
    if args.source == "text":
        what = (f"texts of {meta['length']} tokens out of {len(meta['vocabulary'])}, {meta['held_out']} others held "
                f"out; {meta['cut']} were cut")
    print(f"{out}: {meta['count']} {what}{classes}{skipped}")


if __name__ == "__main__":
    main()
