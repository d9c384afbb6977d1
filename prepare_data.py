"""Turn a source of images into DATA/: memory-mapped uint8 arrays and meta.json.

    python prepare_data.py shapes --out data/shapes --size 32
    python prepare_data.py mnist  --out data/mnist  --size 28
    python prepare_data.py stacked-mnist --out data/stacked
    python prepare_data.py folder --out data/faces  --size 64 --root faces.zip

    python prepare_data.py text --out data/captions --root data/shapes/captions.jsonl

DATA/images.npy is (N, H, W, C) uint8; of texts, DATA/tokens.npy (N, L) int32. DATA appears whole or not at
all; called again with the same options, nothing is done.
"""

import argparse
import codecs
import contextlib
import ctypes
import difflib
import errno
import functools
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing.connection
import os
import random
import re
import shutil
import signal
import struct
import socket
import stat
import sys
import tarfile
import tempfile
import time
import unicodedata
import warnings
import zipfile
from collections import Counter, defaultdict, deque
from pathlib import Path
from typing import NamedTuple

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: interrupted or in use, call again


def missing(*packages):
    """Those of these packages that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def fail(message, status=2):
    """End with one line: of a failure each process's own, of a mistake one a node, of an interruption one."""
    speaker = "RANK" if status == TRY_AGAIN else "LOCAL_RANK"
    if status == 1 or os.environ.get(speaker, "0") == "0":
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    raise SystemExit(status)


def need(*packages):
    """One line and status 2 where a package is missing; the scripts call it before they import any."""
    if names := ", ".join(missing(*packages)):
        fail(f"{names} not installed: pip install -r requirements.txt")


need("numpy", "PIL", "tqdm")
import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageDraw, ImageOps
from tqdm import tqdm

EXTENSIONS = set(""".apng .avif .avifs .bmp .dib .gif .ico .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx
    .mpo .pbm .pcx .pfm .pgm .png .pnm .ppm .psd .qoi .sgi .tga .tif .tiff .webp""".split())
# decoders that start no other program: EPS would run Ghostscript on a stranger's file
FORMATS = "JPEG MPO PNG WEBP BMP DIB GIF TIFF PPM TGA JPEG2000 AVIF ICO PCX PSD QOI SGI".split()
# what lies beside pictures and is none: counted, no reason to warn
ACCOMPANYING = set(""".cfg .csv .db .ds_store .html .ini .ipynb .json .jsonl .lock .log .mat .md .md5 .npy
    .npz .parquet .pkl .pt .pth .py .sh .toml .tsv .txt .url .xml .yaml .yml license readme""".split())
REASONS = {"uncaptioned image": "no caption", "stray image": "lies beside the folders that are the classes",
           "repeated folder": "read under another name", "special file": "a pipe, a socket or a device",
           "repeated name": "a later member of the archive has it",
           "null caption": "null is no caption", "wordless caption": "a caption without a word",
           "wordless text": "no word in it",
           "unmatched caption": "the image of a caption is not there"}  # of others: "LABEL is not read"
MAX_NAMED = 20_000  # files left out by the listing that meta.json names; beyond, they are counted
MAX_FILE_BYTES = 1 << 29  # a member of an archive larger than this is a bomb, not a picture or a text
MAX_WORDS, MAX_VOCABULARY = 32, 10_000  # of a caption; of all, the others become <unk>
CHUNK = 32  # images a task at most: so many that passing them costs little beside decoding
CHUNK_BYTES = 1 << 22  # of the pixels, or of the files, of a task: the most, by which memory is bounded
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATHS = ("root", "captions")  # options
LISTS = ("captions.jsonl", "metadata.jsonl")  # captions among the images; the second as Hugging Face has it
FILE_KEYS, CAPTION_KEYS = ("file", "file_name"), ("captions", "caption", "text")

TORCHVISION = ("mnist", "fashion-mnist", "cifar10", "celeba")
DRAWN = {"shapes": 10_000, "stacked-mnist": 60_000}  # by --seed; how many without --num
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
    """One picture to be: `payload` is a path, an encoded file, an array of pixels, or a shape's number."""
    name: str
    payload: str | bytes | np.ndarray | int
    label: str | None = None
    captions: list[str] | None = None


# ---- what the scripts share --------------------------------------------------------------------------------

LATER = {"detail": 0.0, "likelihood_weight": 0.0}  # train.py's options that older runs lack, and meant


def in_a_line(error):
    """What an exception is and says, in one line; many say nothing."""
    return f"{type(error).__name__}: {error}".strip(": \n").splitlines()[0]


def steady_output():
    """Before anything is printed: where a reader leaves (`| head`), what is written then is dropped."""
    def kept(stream, method):
        def call(*args):
            try:
                return method(*args)
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return call

    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(AttributeError):  # where it cannot show a letter, it shows the code
            stream.reconfigure(errors="backslashreplace")
        stream.write, stream.flush = kept(stream, stream.write), kept(stream, stream.flush)


def keep_memory():
    """What is freed stays with the process: to ask for it anew costs a CPU a tenth of each step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc, see mallopt(3)
    if mallopt:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, -1)  # never
        mallopt(mmap_threshold, 2 ** 30)


def on_signals(handler, numbers=SIGNALS):
    for number in numbers:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, handler)


def leave(number, frame=None):
    """End at a signal with a line and its status, so that `finally` runs."""
    # Ctrl-C reaches this process and its parent, which passes it on; SIG_IGN fails while one is pending
    on_signals(lambda *more: None)
    name, bar = os.path.basename(sys.argv[0]), "\n" * os.isatty(2)  # which stands in the line
    with contextlib.suppress(OSError):  # print() may be what was interrupted
        os.write(2, f"{bar}{name}: {signal.Signals(number).name}: what was half done is dropped\n".encode())
    sys.exit(128 + number)


def check_writable(option, folder):
    """One line where a folder takes no file, before the work whose results it is to hold."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        fail(f"{option} {folder}: {error.strerror}", status_of(error))


def status_of(error):
    """1 of a full or failing disk, 2 of any other OSError: a place that another call would not name."""
    return 1 if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO) else 2


def plural(n, noun):
    return f"{n:,} {noun}{'s' * (n != 1)}"


def flag(name):
    """The option as it is typed: batch_size -> --batch-size."""
    return f"--{name.replace('_', '-')}"


def within(low, high=math.inf, kind=float):
    """An argparse type: a finite number from low to high."""
    def number(text):
        value = kind(text)
        if not abs(value) <= sys.maxsize:  # NaN neither
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if not low <= value <= high:
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

    add = Parser(__doc__).group("data") gives argparse's add_argument with two words more: `needs` names an
    option, or an option and the values of which it needs one ("--schedule linear or cosine"); `excludes` the
    same of what it does not go with. They are held against the options that the call names, not defaults.
    Options before a bare -- are a recipe's: those after it may make them needless, which is said.
    """

    def __init__(self, description):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
        self.rules = {}  # of each option
        self.named, self.own = [], set()  # the options that the call named; without those of a recipe

    def group(self, title, **common):
        """A function that declares options under this title; what is in common holds for each of them."""
        group = self.add_argument_group(title)

        def add(name, needs=(), excludes=(), **more):
            needs, excludes = ([r] if isinstance(r, str) else list(r) for r in (needs, excludes))
            if needs:
                more["help"] += f"; needs {' and '.join(needs)}"
            action = group.add_argument(name, **more)
            self.rules[action.dest] = (needs + [*common.get("needs", ())],
                                       excludes + [*common.get("excludes", ())])
        return add

    def parse_args(self, argv=None):
        argv = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
        options = self._option_string_actions
        words = [w.split("=")[0] for w in argv if re.match(r"--?[a-zA-Z][^ =]*(=|$)", w)]
        for word in words:
            if word not in options:
                name = f"--{word.lstrip('-')}"
                near = [o for o in options if o.startswith(name)]
                near = near or difflib.get_close_matches(name, options, 1, 0.765)  # below: strangers
                self.error(f"{word} is no option" + (f": did you mean {' or '.join(near)}?" if near else ""))
        args = super().parse_args([word for word in argv if word != "--"])
        self.named = list(dict.fromkeys(options[word].dest for word in words))
        own = argv[argv.index("--"):] if "--" in argv else argv
        self.own = {options[word].dest for word in words if any(w.split("=")[0] == word for w in own)}
        for name in self.named:
            if getattr(args, name) == "":  # as "$OUT" is where nobody has set it
                fail(f"{flag(name)} is empty: give it a value, or leave it out")
            needs, excludes = self.rules.get(name, ((), ()))
            wrong = [f"needs {rule}" for rule in needs if not holds(rule, args)]
            wrong += [f"does not go with {rule}" for rule in excludes if holds(rule, args)]
            if wrong:
                self.needless(args, name, wrong[0])
        return args

    def needless(self, args, name, reason):
        """Refuse an option that has no effect, or leave it out where it is a recipe's."""
        if name in self.own:
            fail(f"{flag(name)} {reason}")
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"note: {flag(name)} of the recipe is left out: it {reason}", file=sys.stderr)
        setattr(args, name, self.get_default(name))

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
        given = os.environ.get("CUDA_VISIBLE_DEVICES", os.environ.get("SLURM_JOB_GPUS", ""))
        if name == "cpu" and given not in ("", "-1", "NoDevFiles"):
            fail(f"--device auto: GPU {given} is given (CUDA_VISIBLE_DEVICES or SLURM), and torch "
                 f"{torch.__version__} can use none: see nvidia-smi, or take --device cpu")
    if name == "cuda":
        count = torch.cuda.device_count()
        own = count == 1 and "CUDA_VISIBLE_DEVICES" in os.environ  # each process is shown another
        if 0 < count < processes and not own:
            fail(f"{processes} processes (--nproc_per_node) for {count} GPUs")
        name = "cuda:0" if own else f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name}: not usable here ({in_a_line(error)})")
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


def alive(pid):
    """Whether a process of this number runs here."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


@contextlib.contextmanager
def partial_folder(path):
    """A folder to fill and rename to `path`; gone at the end, as is what a kill left on this machine."""
    own = f"{path.name}.{socket.gethostname()}"
    for left in path.parent.glob(f"{glob.escape(own)}.[0-9]*.partial"):
        pid = left.name.split(".")[-2]
        if pid == str(os.getpid()) or pid.isdecimal() and not alive(int(pid)):  # numbers come again
            shutil.rmtree(left, ignore_errors=True)
    partial = path.with_name(f"{own}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        fail(f"--out {path}: {error.strerror}", status_of(error))
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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


def read_or_empty(path):
    """What a .json holds, {} where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    return {}


def read_lines(path):
    """The lines of a .jsonl as dicts, [] where there is none; a line that a kill cut short is left out."""
    with contextlib.suppress(FileNotFoundError):
        lines = Path(path).read_bytes().decode("utf-8", "replace").split("\n")
        return [json.loads(line) for line in lines if line.endswith("}")]
    return []


def lock(folder):
    """Hold a folder for this process alone, or exit 75 and say who does; a dead process's lock is none."""
    import fcntl
    file = open(Path(folder) / "lock", "a+")
    file.seek(0)
    if file.read(8) not in ("", "process "):
        fail(f"--out {folder} holds a file of another's called lock: choose another folder")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        fail(f"--out {folder} is in use by {file.read().strip() or 'another process'}", TRY_AGAIN)
    except OSError as error:
        print(f"note: {folder} cannot be locked on this file system ({error}): let nothing else write there",
              file=sys.stderr)
    file.truncate(0)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
    file.flush()
    return file


class Trackers:
    """Where --tracker sends numbers and pictures: TensorBoard and Weights & Biases, optional packages.

    A resumed run goes on in the same ones; what is logged again from `step` on replaces what was there.
    """

    def __init__(self, names, folder, run_id, step, config):
        self.tensorboard = self.wandb = None
        try:
            if "tensorboard" in names:
                from torch.utils.tensorboard import SummaryWriter
                self.tensorboard = SummaryWriter(Path(folder) / "tensorboard", purge_step=step + 1)
                text = json.dumps(config, indent=1).replace("\n", "\n    ")
                self.tensorboard.add_text("config", f"    {text}", step)
            if "wandb" in names:
                import wandb
                name = Path(folder).resolve().name
                self.wandb = wandb.init(project="gan", name=name, id=run_id, resume="allow", dir=folder,
                                        config=config)
                self.wandb.define_metric("*", step_metric="step")
        except Exception as error:  # no key, no network: each in its own way
            fail(f"--tracker {' '.join(names)}: {in_a_line(error)}")

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
            print(f"note: --tracker: {in_a_line(error)}", file=sys.stderr)


class Data:
    """DATA/ as it was written: `meta`, and arrays (memory maps) that agree with it, or a line why not."""

    def __init__(self, folder, option="--data"):
        self.folder, self.option = Path(folder), option
        if not os.path.exists(self.folder / "meta.json"):
            fail(f"{option} {folder}: meta.json is not there; make the folder with prepare_data.py")
        self.meta = read_json(self.folder / "meta.json", option)
        keys = ("name", "count", "size", "channels", "classes", "vocabulary", "fingerprint")
        missing = [key for key in keys if not isinstance(self.meta, dict) or key not in self.meta]
        if missing:
            self.damaged(f"meta.json lacks {', '.join(missing)}")

    def damaged(self, what):
        fail(f"{self.option} {self.folder}: {what}; make it again with prepare_data.py")

    def array(self, name):
        """images (N, H, W, C) uint8; labels (N,); tokens (N, K, L), of texts (N, L); embeddings (N, K, n).

        held_out_images and so on: the same of the images held out; of texts, held_out (N, L).
        """
        meta, what = self.meta, name.removeprefix("held_out_")
        count, size, length = meta["count"], meta["size"], meta.get("length")  # the last of texts alone
        count = count if what == name else meta.get("held_out")
        shape = {"images": (count, size, size, meta["channels"]), "labels": (count,),
                 "tokens": (count, length) if length else (count, None, None),
                 "held_out": (meta.get("held_out"), length), "embeddings": (count, None, None)}[what]
        try:
            array = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        except FileNotFoundError:
            self.damaged(f"{name}.npy is not there")
        except (OSError, ValueError, EOFError) as error:
            self.damaged(f"{name}.npy is damaged ({in_a_line(error)})")
        fits = array.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape))
        if not fits or array.dtype.kind != {"images": "u", "embeddings": "f"}.get(what, "i"):
            self.damaged(f"meta.json says {shape}, {name}.npy is {array.dtype} {array.shape}")
        if what not in ("images", "embeddings"):
            known = len(meta["classes" if what == "labels" else "vocabulary"] or ())
            if not 0 <= array.min() <= array.max() < known:
                what = "classes" if what == "labels" else "words of the vocabulary"
                self.damaged(f"{name}.npy goes beyond the {known} {what} in meta.json")
        return array

    def captions(self, held_out=False):
        """The lines of captions.jsonl, one an image: {"captions": [...], and attributes, if any}."""
        name, count = "captions.jsonl", self.meta["count"]
        if held_out:
            name, count = "held_out_captions.jsonl", self.meta["held_out"]
        try:
            lines = read_lines(self.folder / name)
        except ValueError as error:
            self.damaged(f"{name} is damaged ({error})")
        return lines if len(lines) == count else self.damaged(
            f"{name} has {len(lines)} whole lines for {count} images")

    def fingerprint(self):
        """A hash of all arrays, in this order."""
        meta, digest = self.meta, hashlib.sha256()
        names = {"images": not meta.get("length"), "labels": meta["classes"], "tokens": meta["vocabulary"],
                 "held_out": meta.get("length"), "embeddings": meta.get("text_encoder")}
        parts = ("", "held_out_") if meta.get("held_out") and not meta.get("length") else ("",)
        for array in [self.array(part + name) for name, there in names.items() if there for part in parts]:
            for i in range(0, len(array), 1024):
                digest.update(array[i:i + 1024].tobytes())
        return digest.hexdigest()

    def verify(self):
        """End with a line unless the arrays are those that meta.json was written for; reads all of them."""
        if self.fingerprint() != self.meta["fingerprint"]:
            self.damaged("the arrays have changed since meta.json was written")
        if self.meta["vocabulary"] and not self.meta.get("length"):
            self.captions()
            if self.meta.get("held_out"):
                self.captions(held_out=True)


# ---- sources: each gives how many pictures, their Items, and [(name, label)] of what it leaves out ---------

def shapes_source(args):
    return args.num, (Item(f"shape {i}", i) for i in range(args.num)), []


def load_torchvision(name, root):
    """One of torchvision's sets, read from the folder root or downloaded to it."""
    need("torchvision")
    from torchvision import datasets
    dataset_class, place = {
        "mnist": (datasets.MNIST, "MNIST/raw"), "fashion-mnist": (datasets.FashionMNIST, "FashionMNIST/raw"),
        "cifar10": (datasets.CIFAR10, "cifar-10-batches-py"), "celeba": (datasets.CelebA, "celeba")}[name]
    options = {"split": "all", "target_type": []} if name == "celeba" else {}
    place = Path(root, place)
    missing_folders = [folder for folder in (place, *place.parents) if not folder.exists()]
    try:
        return dataset_class(root, download=True, **options)  # unless it is there
    except Exception as error:  # each mirror fails in its own way
        for folder in missing_folders:
            with contextlib.suppress(OSError):  # not there, or holds what was downloaded
                folder.rmdir()
        fail(f"{name} is neither in {place} (--root {root}) nor downloadable ({in_a_line(error)})")


def stacked_source(args):
    """Three digits, drawn with replacement, as red, green and blue: 1,000 classes (Metz et al. 2017)."""
    dataset = load_torchvision("mnist", args.root or "downloads")
    digits, values = np.asarray(dataset.data), dataset.targets.tolist()
    drawn = np.random.default_rng(args.seed).integers(len(digits), size=(args.num, 3))
    return args.num, (Item(f"digits {' '.join(map(str, three))}", np.stack(digits[three], axis=2),
                        "".join(str(values[i]) for i in three)) for three in drawn), []


def torchvision_source(args):
    root = args.root or "downloads"
    dataset = load_torchvision(args.source, root)
    if args.source == "celeba":
        folder = os.path.join(root, "celeba", "img_align_celeba")
        return len(dataset), (Item(name, os.path.join(folder, name)) for name in dataset.filename), []
    return len(dataset), (Item(f"{args.source} {i}", np.asarray(pixels), dataset.classes[int(target)])
                          for i, (pixels, target) in enumerate(zip(dataset.data, dataset.targets))), []


def normal(path):
    """A path within a source in the one spelling that is compared: a/b.png, NFC."""
    path = unicodedata.normalize("NFC", path).replace("\\", "/")
    return os.path.normpath(path).lstrip("/")


open_file = functools.partial(open, mode="rb")


def open_root(root):
    """What a directory or archive holds, with nothing unpacked: (a function that opens a member to read,
    {name: member}, [(name, label)] of what is left out)."""
    try:
        if root.is_dir():
            return open_file, *list_folder(root)
        if not root.is_file():
            raise OSError("a pipe, a socket or a device" if root.exists() else "no such file")
        if zipfile.is_zipfile(root) and not tarfile.is_tarfile(root):  # whose last member may be a .zip
            archive = zipfile.ZipFile(root)
            members = [(m.filename, m, target_of(archive, m)) for m in archive.infolist() if not m.is_dir()]
            return archive.open, *list_archive(members)
        archive = tarfile.open(root)
        members = [(m.name, m, m.linkname if m.issym() else m.isdev()) for m in archive if not m.isdir()]
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(1 << 15).strip(b"\0"):  # tarfile takes a broken member for the end
            raise OSError(f"damaged after the first {len(archive.members)} members, or two archives in one")
        return archive.extractfile, *list_archive(members)
    except Exception as error:  # damage: each decompressor has its own
        reason = str(error).partition("\n")[0].rstrip(":") or type(error).__name__
        fail(f"--root {root}: neither a directory nor a readable .zip or .tar(.gz) ({reason})")


def list_folder(root):
    """({name: path} of the files below, [(name, label)] of the rest); follows links, reads a folder once."""
    names, left, seen, folders = {}, [], set(), deque([""])
    while folders:
        folder = folders.popleft()
        path = os.path.join(root, folder)
        try:
            place, entries = os.stat(path), sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError:
            left.append((folder or ".", "unreadable folder"))
            continue
        hidden = os.path.basename(folder).startswith(".")
        repeated = (place.st_dev, place.st_ino) in seen
        there = {entry.name for entry in entries}
        prepared = folder and "meta.json" in there and there & {"images.npy", "tokens.npy"}
        if hidden or repeated or prepared:
            left.append((folder, f"{'hidden' if hidden else 'repeated' if repeated else 'prepared'} folder"))
            continue
        seen.add((place.st_dev, place.st_ino))
        for entry in entries:
            name, link = os.path.join(folder, entry.name), entry.is_symlink()
            if os.path.isdir(entry.path) if link else entry.is_dir():
                (folders.append if link else folders.appendleft)(name)  # the place itself before links to it
            elif os.path.isfile(entry.path) if link else entry.is_file():
                names[name] = entry.path
            else:
                left.append((name, "special file" if os.path.exists(entry.path) else "broken link"))
    return names, left


def target_of(archive, member):
    """Where a member of a .zip that is a link leads to; False of a file."""
    if not stat.S_ISLNK(member.external_attr >> 16) or member.file_size > 4096:
        return False
    target = read_member(archive.open, member)
    return os.fsdecode(target) if isinstance(target, bytes) else False


def list_archive(members):
    """The same of an archive's members, (name, member, False of a file, True of a device, or a target)."""
    names, left, hidden, links = {}, [], {}, {}
    for name, member, odd in members:
        parts = normal(name).split("/")
        at = next((i for i, part in enumerate(parts[:-1], 1) if part.startswith(".") and part != ".."), None)
        if at:
            hidden["/".join(parts[:at])] = "hidden folder"
        elif odd is True:
            left.append((name, "special file"))
        elif odd:
            links["/".join(parts)] = name, odd
        else:
            if name in names:
                left.append((name, "repeated name"))
            names[name] = member
    whole = {normal(name): name for name in names}
    folders = {"."}.union(*(itertools.accumulate(name.split("/")[:-1], "{}/{}".format) for name in whole))
    for link, (name, target) in links.items():  # within the archive
        place, passed = link, []
        while place in links and place not in passed:
            passed.append(place)
            place = normal(os.path.join(os.path.dirname(place), links[place][1]))
        if place in whole:
            names[name] = names[whole[place]]
        else:
            what = "a link to itself" if place in links else f"a link to {target!r}"
            what += ", a folder" if place in folders else ", which is not there" * (place not in links)
            left.append((name, "link", what))
    return names, left + list(hidden.items())


def why_left(name):
    """None for the name of a picture that is read, else its label; and whether the name is worth keeping."""
    base = os.path.basename(normal(name)).lower()
    ending = os.path.splitext(base)[1]
    if base.startswith("._") or base in ACCOMPANYING or ending in ACCOMPANYING:
        return "._*" if base.startswith("._") else ending or base, False
    if base.startswith("."):
        return "hidden file", ending in EXTENSIONS
    return None if ending in EXTENSIONS else ending or "extensionless file", True


def folder_source(args):
    """Images of a directory or archive, sorted by name. The first level of folders are classes."""
    root = Path(args.root)
    read, names, left = open_root(root)
    labels = {name: why_left(name) for name in names}
    images = [name for name, (label, _) in labels.items() if not label]
    # a compressed tar has no random access: sorted order would unpack it again for each image
    if not any(isinstance(member, tarfile.TarInfo) for member in names.values()):
        images.sort()
    captions, used, more = find_captions(args, read, names, images) if images else (None, (), [])
    left += [(name if named else None, label) for name, (label, named) in labels.items()
             if label and name not in used]
    left += more
    if captions is not None:
        images = [name for name in images if name in captions]
    classes = classes_of(images, args.classes) if args.source == "folder" else {}
    if classes:
        left += [(name, "stray image") for name in images if name not in classes]
        images = [name for name in images if name in classes]

    def items():
        for name in images:
            payload = names[name] if root.is_dir() else read_member(read, names[name])
            yield Item(name, payload, classes.get(name), captions and captions[name])
    return len(images), items(), left


def classes_of(images, choice=None):
    """{image: class}, the first folders that differ, said aloud; {} where there are none.

    Images beside those folders are no part of it. Where they are more than the smallest class has, there are
    no classes, unless choice is "folders"; with "none" there never are.
    """
    folders, first = {name: normal(name).split("/")[:-1] for name in images}, {}
    while choice != "none" and folders and len(first) < 2:  # a folder that wraps all others is no class
        folders = {name: parts[len(first):] for name, parts in folders.items()}
        folders = {name: parts for name, parts in folders.items() if parts}
        first = Counter(parts[0] for parts in folders.values())
    beside = len(images) - len(folders)
    if choice == "folders" and len(first) < 2:
        fail("--classes folders: the images do not lie in two folders or more")
    if len(first) < 2 or choice is None and beside > min(first.values()):
        if len(first) > 1:
            print(f"classes: none; {beside} images lie beside folders (--classes folders leaves them out)")
        return {}
    some = repr(sorted(first)[:5])[1:-1]
    print(f"classes: {len(first)}, the folders {some}{' …' if len(first) > 5 else ''}")
    return {name: parts[0] for name, parts in folders.items()}


def read_member(read, member):
    """The bytes of a member of open_root, or the reason (an exception) why they cannot be had."""
    try:
        with read(member) as file:  # a link is followed within the archive
            data = file.read(-1 if read is open_file else MAX_FILE_BYTES + 1)
        if read is open_file or len(data) <= MAX_FILE_BYTES:
            return data
        return ValueError(f"larger than {MAX_FILE_BYTES >> 20} MiB: unpack the archive")
    except Exception as error:  # damage, encryption, an unknown compression: this member alone is lost
        return error


def source_state(args):
    """A hash of the names, sizes and times of the files that the source is; None where it is none."""
    if args.source not in ("folder", "coco", "text") or not args.root:
        return None
    digest = hashlib.sha256()
    for path in (args.root, args.captions or ""):
        for name, file in sorted((list_folder(path)[0] if os.path.isdir(path) else {"": path}).items()):
            with contextlib.suppress(OSError):  # reading it will say so
                entry = os.stat(file)
                digest.update(f"{name!a} {entry.st_size} {entry.st_mtime_ns}\n".encode())
    return digest.hexdigest()


# ---- captions and words ------------------------------------------------------------------------------------

def text_of(data):
    """Bytes as text: UTF-8, or what a byte order mark says. ValueError names the first line that is not."""
    if isinstance(data, Exception):
        raise ValueError(f"cannot be read ({data})")
    marks = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
             codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # UTF-16's begins UTF-32's
    try:
        text = data.decode(next((marks[mark] for mark in marks if data.startswith(mark)), "utf-8"))
        place = text.find("\0")
        line = text.count("\n", 0, place) + 1
    except UnicodeDecodeError as error:
        place, line = error.start, data.count(b"\n", 0, error.start) + 1
    if place >= 0:
        raise ValueError(f"line {line} is not UTF-8 text")
    return text


def json_lines(data, with_file=False):
    """(file or "", its captions) of each line {"file": …, "captions": a text or a list} of a .jsonl's bytes.

    null, which is no caption, is handed on.
    """
    for number, line in enumerate(text_of(data).split("\n"), 1):  # all other ends of lines are text in JSON
        try:
            if line := line.strip(" \t\r\ufeff"):
                entry = json.loads(line)
                told = entry[next(key for key in CAPTION_KEYS if key in entry)]
                told = told if isinstance(told, list) else [told]
                file = entry[next(key for key in FILE_KEYS if key in entry)] if with_file else ""
                if not all(isinstance(text, str) for text in [file, *(x for x in told if x is not None)]):
                    raise ValueError
                yield file, told
        except (ValueError, KeyError, TypeError, StopIteration, RecursionError):
            example = '{"file": "1.png", "captions": ["a boat"]}'
            raise ValueError(f"line {number} is not like {example}, an image a line") from None


def coco_captions(path):
    """({file: captions}, [(annotation, label)] of what is left out) of COCO's JSON."""
    files, told, left = {}, {}, []
    try:
        content = json.loads(text_of(Path(path).read_bytes()))
        if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
            raise ValueError('not as COCO\'s captions are: {"images": […], "annotations": […]}')
        for image in content["images"]:
            number, file = str(image["id"]), normal(image["file_name"])
            if number in files:
                raise ValueError(f"image {number} is there twice: {files[number]!r} and {file!r}")
            if file in told:
                other = next(number for number in files if files[number] == file)
                raise ValueError(f"{file!r} is there twice: as image {other} and image {number}")
            files[number], told[file] = file, []
        if not any("caption" in annotation for annotation in content["annotations"]):
            raise ValueError("no captions in its annotations: COCO's are in captions_*.json")
        for i, annotation in enumerate(content["annotations"]):
            number, text = str(annotation["image_id"]), annotation["caption"]
            name = f"annotation {annotation.get('id', f'number {i}')}, of image {number}"
            if number not in files:
                raise ValueError(f"{name}: there is no such image")
            if text is None:
                left.append((name, "null caption"))
            else:
                told[files[number]].append(text.strip())
        return told, left
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not as COCO's captions are ({in_a_line(error)})") from None


def listed_captions(files, root=None):
    """({folder: {path: captions}}, [(name, label)] of what is left out) of .jsonl files, {name: bytes}.

    Paths are relative to the file that names them; in one from outside (root: the source), also to root.
    Lines of one image add up.
    """
    listed, left = defaultdict(dict), []
    for name, data in files.items():
        folder = os.path.dirname(os.path.realpath(name) if root else normal(name))
        told = listed["" if root else folder]
        try:
            for file, texts in json_lines(data, with_file=True):
                path = os.path.join(folder, file.replace("\\", "/"))
                if root:
                    path = os.path.relpath(path, root)
                    path = file if path.startswith("../") else path
                told.setdefault(normal(path), []).extend(text for text in texts if text is not None)
                left += [(f"{file}, in {name}", "null caption")] * texts.count(None)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return listed, left


def texts_beside(read, names, images, needed):
    """({image: captions}, {image: why it has none}, names) of .txt beside images, a line a caption; no boxes.
    Where they are needed, ValueError if half of the images would be lost to unreadable ones."""
    stems, told, why, taken, broken = defaultdict(list), defaultdict(list), {}, [], []
    for image in images:
        stems[os.path.splitext(normal(image))[0]].append(image)
    for name, member in names.items():
        stem, ending = os.path.splitext(normal(name))
        if ending.lower() != ".txt" or stem not in stems:
            continue
        try:
            text = text_of(read_member(read, member))
            if len(stems[stem]) > 1:
                raise ValueError("could be of {!r} as well as {!r}".format(*stems[stem]))
            parts = re.split(r"[\s,;]+", text.strip())
            if 2 * sum(not any(map(str.isalpha, part)) for part in parts) > len(parts):
                why[stems[stem][0]] = f"{name} holds {'numbers' if text.strip() else 'nothing'}, no caption"
            else:
                told[stems[stem][0]] += lines_of(text)
                taken.append(name)
        except ValueError as error:
            broken.append(f"{name}: {error}")
            why |= dict.fromkeys(stems[stem], broken[-1])
    if needed and broken and 2 * (len(broken) + len(told)) >= len(images):
        raise ValueError(broken[0])
    return told, why, taken


def lines_of(text):
    return re.split(r"\r\n?|\n", text)


def by_path(entries, images):
    """[(entry, image)] of {path: entry} and {path: image} whose paths are the same; where there are none,
    below folders that wrap all of one side."""
    def below(paths, depth):
        return {path.split("/", depth)[depth]: whole for path, whole in paths.items()}

    def depths(paths):
        return range(1 + len(os.path.commonprefix([path.split("/")[:-1] for path in paths])))
    ways = [(below(entries, depth), images) for depth in depths(entries)]
    ways += [(entries, below(images, depth)) for depth in depths(images)]
    same = [len(named.keys() & there.keys()) for named, there in ways]
    named, there = ways[same.index(max(same))]
    return [(named[path], there[path]) for path in named.keys() & there.keys()]


def by_name(entries, images):
    """The same of file names alone, which must be unique on both sides: ValueError names two that are not."""
    names = defaultdict(lambda: ([], []))
    for side, paths in enumerate((entries, images)):
        for path, whole in paths.items():
            names[os.path.basename(path)][side].append(whole)
    for ours, theirs in names.values():
        if ours and theirs:
            few, many = sorted((ours, theirs), key=len)
            if len(many) > 1:
                raise ValueError(f"{few[0]!r} could be {many[0]!r} or {many[1]!r}: captions must name paths")
            yield ours[0], theirs[0]


def pair(listed, images):
    """({image: captions}, entries of no image, [(entry, image)] found by file name alone) of {folder: {path:
    captions}} and the images of the source.

    A path counts as it is, anywhere. Only for images below the folder whose file names them, one of another
    root may do (by_path), and in the end a file name: that of an entry without folders, or of any if not
    one path of its file was found. An image found by its path takes no other's.
    """
    spelled, below, pairs, lost, alone = {}, {folder: {} for folder in listed}, {}, [], []
    for image in images:
        if spelled.setdefault(normal(image), image) != image:
            raise ValueError(f"{spelled[normal(image)]!r} and {image!r} are one path, spelled twice")
    for path in spelled:
        parts = path.split("/")
        for depth in range(len(parts)):
            if (folder := "/".join(parts[:depth])) in below:
                below[folder]["/".join(parts[depth:])] = path
    inside = {folder: {path.removeprefix(f"{folder}/"): path for path in told}
              for folder, told in listed.items()}
    for folder, told in listed.items():
        same = [(path, path) for path in told.keys() & spelled.keys()]
        pairs[folder] = dict(same or by_path(inside[folder], below[folder]))
    found = {path for found in pairs.values() for path in found.values()}
    for folder in listed:
        barred = {os.path.basename(path) for path, whole in inside[folder].items()
                  if whole in pairs[folder] or "/" in path and pairs[folder]}
        free = {path: whole for path, whole in inside[folder].items() if os.path.basename(path) not in barred}
        more = [(entry, path) for entry, path in by_name(free, below[folder]) if path not in found]
        pairs[folder] |= more
        alone += [(entry, spelled[path]) for entry, path in more]
    captions = defaultdict(list)
    for folder, told in listed.items():
        for entry, texts in told.items():
            if entry in pairs[folder]:
                captions[spelled[pairs[folder][entry]]] += texts
            else:
                lost.append(entry)
    return dict(captions), lost, alone


def read_captions(args, read, names):
    """({folder: {path: captions}} as listed, [(name, label)] left out, names of the files inside)."""
    if args.source == "coco":
        told, left = coco_captions(args.captions)
        return {"": told}, left, []
    if args.captions not in (None, "inside"):
        data = Path(args.captions).read_bytes()
        return *listed_captions({args.captions: data}, os.path.realpath(args.root)), []
    files = {name: read_member(read, names[name]) for name in names
             if os.path.basename(normal(name)).lower() in LISTS}
    key = re.compile('"({})"\\s*:'.format("|".join(CAPTION_KEYS)).encode())  # metadata need not hold any
    files = {name: data for name, data in files.items() if not isinstance(data, bytes)
             or os.path.basename(name).lower() == LISTS[0] or key.search(data)}
    return *listed_captions(files), list(files)


def why_none(lost, left, why, images):
    """Why no image has a caption, in words."""
    near = {Path(normal(image)).stem.lower(): image for image in images}
    for entry in lost:
        if image := near.get(Path(normal(entry)).stem.lower()):
            return f"{entry!r} and the image {image!r} differ in folder, case or ending"
    if lost:
        return f"the first is of {lost[0]!r}, an image is {images[0]!r}"
    return "; ".join([f"{name}: {REASONS[label]}" for name, label in left[:1]] or [*why.values()][:1])


def find_captions(args, read, names, images):
    """({image: [captions]} or None, names of the files they are in, [(name, label)] of what is left out);
    says what it takes for captions."""
    if args.captions == "none":
        return None, (), []
    inside = args.captions in (None, "inside")
    try:
        listed, left, files = read_captions(args, read, names)
        found, lost, alone = pair(listed, images) if listed else ({}, [], [])
        rest = [image for image in images if not any(found.get(image, ()))] if inside else []
        told, why, texts = texts_beside(read, names, rest, not listed)
    except (OSError, ValueError) as error:
        option = f"--captions {args.captions}" if args.captions else f"captions of --root {args.root}"
        fail(f"{option}: {error.strerror if isinstance(error, OSError) else error}")
    captions = {}
    for image, several in (found | told).items():
        different = [text for text in dict.fromkeys(several) if text.strip()]
        captions[image] = [text for text in different if words_of(text)]
        left += [(image, "wordless caption")] * (len(different) - len(captions[image]))
    captions = {image: several for image, several in captions.items() if several}
    where = os.path.join(args.root, files[0]) if files else "" if inside else args.captions
    where += f" and {len(files) - 1} more" if len(files) > 1 else ""
    where += f" and {len(texts)} .txt" if where and texts else ""
    where = where or f"the .txt beside the images of {args.root}"
    few = 2 * len(captions) < len(images) and not args.captions
    reason = "" if captions else why_none(lost, left, why, images)
    beside = Path(args.root).resolve().parent / LISTS[0]
    if few and (captions or reason):
        print(f"captions: none; {where}: only {len(captions)} of {plural(len(images), 'image')} "
              + ("have one (--captions inside keeps those)" if captions else f"have one; {reason}"))
    elif few and beside.exists():
        print(f"captions: none; {beside} lies outside --root (--captions takes it)")
    if few:
        return None, (), []
    if not captions:
        fail(f"--captions {args.captions}: no caption of any image; {reason or 'there are none'}")
    if alone:
        alike = f"{plural(len(alone), 'image')} found by file name alone, such as "
        alike += "{!r} for {!r}".format(*alone[0])
    if alone and args.strict:
        fail(f"captions: {alike} (--strict)")
    count = sum(map(len, captions.values()))
    print(f"captions: {count:,} from {where}, {count / len(captions):.1f} an image"
          + (f"; {alike}" if alone else ""))
    left += [(entry, "unmatched caption") for entry in lost]
    left += [(image, "uncaptioned image", why.get(image, "no caption"))
             for image in images if image not in captions]
    return captions, {*files, *texts, os.path.relpath(args.captions or ".", args.root)}, left


# a letter of a script without spaces: Thai, Lao, Myanmar, Khmer, kana, Han
UNSPACED = (r"(?=\w)[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
            r"\u3400-\u9fff\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]")
LETTER = rf"(?!{UNSPACED})\w[^\w\s']*"
WORD = re.compile(rf"{UNSPACED}[^\w\s']*|(?:{LETTER})+(?:'(?:{LETTER})+)?")


@functools.cache
def sign(c):
    """A character as words_of sees it: letters, digits, marks stay, format characters go, others are gaps."""
    kind = unicodedata.category(c)
    if c in "'\u2018\u2019\u02bc\uff07":
        return "'"
    if kind == "Cf" and c != "\u200b" or "\ufe00" <= c <= "\ufe0f":  # joiners; whether a sign is an emoji
        return ""
    return c if c.isalnum() or kind[0] == "M" else " "


def words_of(caption):
    """Words and numbers of a text, lower-cased, NFC, with their marks; of scripts without spaces letters."""
    if caption.isascii():  # the same, sooner
        return re.findall(r"[^\W_]+(?:'[^\W_]+)?", caption.lower())
    return WORD.findall("".join(map(sign, unicodedata.normalize("NFC", caption.lower()))))


def tokenize(captions, max_words=MAX_WORDS, known=None):
    """N lists of captions -> (tokens (N, K, L) int32, 0 = padding; vocabulary, most frequent word first;
    how many captions were cut; how many words are beyond the vocabulary).

    known: how many of the N, from the first, the vocabulary is of (None: all).
    """
    split = [[words_of(c) for c in per_image] for per_image in captions]
    cut = sum(len(words) > max_words for per_image in split for words in per_image)
    split = [[words[:max_words] for words in per_image] for per_image in split]
    counts = Counter(word for per_image in split[:known] for words in per_image for word in words)
    vocabulary = ["<pad>", "<unk>"] + sorted(counts, key=lambda w: (-counts[w], w))[:MAX_VOCABULARY]
    index = {word: i for i, word in enumerate(vocabulary)}
    length = max(len(words) for per_image in split for words in per_image)
    tokens = np.zeros((len(split), max(map(len, split)), length), np.int32)
    for n, per_image in enumerate(split):
        for k, words in enumerate(per_image):
            tokens[n, k, :len(words)] = [index.get(w, 1) for w in words]
    return tokens, vocabulary, cut, max(0, len(counts) - MAX_VOCABULARY)


@functools.cache
def load_text_encoder(name, option="--text-encoder"):
    """A sentence-transformers model, by name or folder."""
    try:
        from huggingface_hub import model_info
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        fail(f"{option} needs a package: pip install sentence-transformers ({error})")
    try:
        try:
            return SentenceTransformer(name, local_files_only=True)
        except Exception:
            if os.path.exists(name):
                raise
            # asks once, where the download itself would ask for over a minute
            model_info(name if "/" in name else f"sentence-transformers/{name}", timeout=10)
            return SentenceTransformer(name)
    except Exception as error:  # each hub and file fails in its own way
        fail(f"{option} {name}: cannot be loaded ({in_a_line(error)})")


# ---- one picture -------------------------------------------------------------------------------------------

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
        angles = [turn + 2 * math.pi * k / corners for k in range(corners)]
        draw.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(radii, angles)], fill=fill)
    attributes = {"shape": shape, "colour": colour, "background": background, "size": scale}
    return image.reduce(4), f"{colour} {shape}", attributes


@functools.lru_cache(64)
def colours_of(profile):
    """(Pillow mode, transform from it to sRGB) of an ICC profile (bytes); (None, None): sRGB, or damaged."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (OSError, KeyError, ImageCms.PyCMSError):
        return None, None
    if mode != "CMYK":  # sRGB under any name changes nothing but by rounding
        colours = np.array(list(itertools.product(range(0, 256, 15), repeat=len(mode))), np.uint8)
        seen = ImageCms.applyTransform(Image.frombytes(mode, (len(colours), 1), colours.tobytes()), transform)
        if np.abs(np.asarray(seen)[0].astype(int) - colours).max() <= 2:
            return None, None
    return mode, transform


def gray_of(image):
    """A picture of floats, 16 or 32 bits -> mode L, LA if it has a transparent value, by the range that it
    declares; else ValueError."""
    tags, pixels = getattr(image, "tag_v2", {}), np.asarray(image).astype(np.float32)
    bits, signed = tags.get(258, (16,))[0], tags.get(339, (1,))[0] == 2
    low, high = tags.get(340), tags.get(341)  # TIFF's own words for the range
    if low is None or high is None:
        if image.mode != "F" and (bits > 16 or signed):
            raise ValueError(f"{bits}-bit integers that declare no range: save them as 8 or 16 bits")
        low, high = 0, 1 if image.mode == "F" else 2 ** bits - 1
    low, high = (float(np.ravel(value)[0]) for value in (low, high))
    if not (low < high and ((low <= pixels) & (pixels <= high)).all()):  # NaN is nowhere
        raise ValueError(f"values from {pixels.min():g} to {pixels.max():g}, not {low:g} (black) to {high:g}")
    opaque = pixels != image.info.get("transparency")
    pixels = ((pixels - low) * (255 / (high - low))).round().astype(np.uint8)
    gray = Image.fromarray(255 - pixels if tags.get(262) == 0 else pixels)  # white is 0: left to us
    if not np.all(opaque):
        gray.putalpha(Image.fromarray(np.uint8(255 * opaque)))
    return gray


def open_picture(file):
    """A Pillow image, not decoded yet, of a path or open file."""
    Image.init()
    return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


def read_picture(file, background="white", reduce=1):
    """A picture as a viewer shows it: upright, opaque, sRGB; a Pillow image of mode L or RGB.

    file: a path, an open file or what open_picture gives; background: the colour under transparent pixels;
    reduce: how many times smaller a JPEG may be decoded. Raises what decoders raise, and ValueError.
    """
    image = file if isinstance(file, Image.Image) else open_picture(file)
    profile = image.info.get("icc_profile")
    if image.format == "JPEG":
        image.draft(None, [math.ceil(side / reduce) for side in image.size])
    image.load()  # damaged pixels raise here
    with contextlib.suppress(SyntaxError, struct.error):  # a damaged note of how it is turned
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode.startswith("I"):
        image = gray_of(image)
    clear = image.convert("RGBA") if image.has_transparency_data else None
    mode, transform = colours_of(profile) if profile else (None, None)
    gray, inks = image.mode in ("1", "L", "LA"), image.mode == "CMYK"
    if mode == "L" and gray or mode == "CMYK" and inks or mode == "RGB" and not inks:  # else not of this
        image = ImageCms.applyTransform(image.convert(mode), transform)
        if clear:
            image.putalpha(clear.getchannel("A"))
            clear = image
    if clear:
        image = Image.alpha_composite(Image.new("RGBA", clear.size, background), clear)
    return in_mode(image, "L" if image.mode in ("1", "L") else "RGB")


def in_mode(image, mode):
    return image if image.mode == mode else image.convert(mode)  # which copies where nothing is to change


def square_pixels(image, size, channels, crop, background):
    """What open_picture gives -> (size, size, channels) uint8: the centred square, by one antialiased resize.

    crop: side in pixels of the square that is kept; None keeps the largest.
    """
    side, before = min(*image.size, crop or sys.maxsize), max(image.size)
    image = read_picture(image, background, side / (2.75 * size))  # coarser shows beside a whole decoding
    side = max(1, round(side * max(image.size) / before))
    image = in_mode(image, "L" if channels == 1 else "RGB")
    left, top = (image.width - side) / 2, (image.height - side) / 2
    if image.size != (size, size) or side != size:
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.asarray(image).reshape(size, size, channels)


def why_unread(error, file):
    """What a decoder says, without the file's name."""
    reason = getattr(error, "strerror", None) or str(error)
    if not isinstance(file, bytes):
        reason = reason.replace(f" {str(file)!r}", "")
    return re.sub(r" ?<_io.BytesIO[^>]*>", "", reason) or type(error).__name__


def decode(items, args):
    """Worker: a list of Items -> a list of (pixels or None, name, label, captions, attributes, and its
    oddities or the reason why it is None)."""
    warnings.simplefilter("ignore")  # Pillow warns of half-bombs and odd EXIF; what matters raises
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
                image = open_picture(io.BytesIO(payload) if isinstance(payload, bytes) else payload)
            with image:
                pixels = square_pixels(image, args.size, args.channels, args.crop, args.background)
                odd = ["enlarged"] * (2 * min(*image.size, args.crop or sys.maxsize) < args.size)
                with contextlib.suppress(Exception):  # what lies behind the first picture may be damaged
                    odd += ["animated"] * (image.format != "MPO" and image.is_animated)
            results.append((pixels, name, label, captions, attributes, odd))
        except Exception as error:  # decoders of hostile files raise anything
            results.append((None, name, label, None, None, why_unread(error, payload)))
    return results


def take(items, count):
    """A list of the next items: so many, or fewer where the files that they hold are large."""
    chunk, held = [], 0
    while len(chunk) < count and held < CHUNK_BYTES and (item := next(items, None)):
        chunk.append(item)
        held += len(item.payload) if isinstance(item.payload, bytes) else 0
    return chunk


def serve(connection, inherited, args):
    """A worker: lists of Items come in, what `decode` makes of them goes out, until the other end is gone."""
    for end in inherited:  # of the parent, which would never be gone
        end.close()
    for number in SIGNALS:  # the parent's Ctrl-C is the parent's business; what ends a worker ends it at once
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send(decode(connection.recv(), args))


def decode_all(items, args):
    """Results of `decode` in order, from all cores, with a bounded number of images under way."""
    count = max(1, min(CHUNK, CHUNK_BYTES // (args.size ** 2 * args.channels)))
    workers, pipes, busy, window = [], [], {}, deque()  # busy: {pipe: its results to be, in window}
    for _ in range(args.workers):  # a pipe each: it ends with its worker; a shared one would not
        ours, theirs = multiprocessing.Pipe()
        pipes.append(ours)
        workers.append(multiprocessing.Process(target=serve, args=(theirs, pipes, args), daemon=True))
        workers[-1].start()
        theirs.close()
    idle = list(pipes)
    try:
        while True:
            while idle and len(window) < 4 * args.workers and (chunk := take(items, count)):
                window.append([])
                busy[idle[-1]] = window[-1]
                idle.pop().send(chunk)
            if not window:
                return
            for pipe in multiprocessing.connection.wait(busy):
                busy.pop(pipe).extend(pipe.recv())
                idle.append(pipe)
            while window and window[0]:
                yield from window.popleft()
    except (EOFError, OSError):
        fail("a decoding process was killed, as systems do for want of memory: call again with fewer "
             f"--workers ({args.workers} here)", status=1)
    finally:
        for worker in workers:
            worker.kill()  # SIGTERM would be told by one that has only just begun


# ---- DATA --------------------------------------------------------------------------------------------------

def write_images(results, total, folder, args):
    """Append pictures to images.npy, or held_out_images.npy, as they come.

    Returns [(label, line of captions.jsonl)] of the first, the same of the second, what was skipped, and how
    many had which oddity.
    """
    rows, skipped, odd, count = ([], []), [], Counter(), round(total * (args.holdout or 0))
    if args.holdout and total and not 0 < count < total:
        fail(f"--holdout {args.holdout:g}: that is {count} of {total} images; it takes one or more, and "
             "leaves as many")
    held = set(random.Random(args.seed).sample(range(total), count))  # kept out of training

    def header(file, count):  # numpy pads its header so that the first axis can grow in place
        shape = (count, args.size, args.size, args.channels)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        return file.tell()
    with contextlib.ExitStack() as stack:
        names = ("images", "held_out_images")[:2 if held else 1]
        files = [stack.enter_context(open(folder / f"{name}.npy", "wb")) for name in names]
        starts = [header(file, 0) for file in files]
        results = tqdm(results, total=total, unit="img", disable=None)
        for i, (pixels, name, label, captions, attributes, reason) in enumerate(results):
            if pixels is None:
                if args.strict:
                    fail(f"{name!r}: {reason} (--strict)")
                skipped.append({"file": name, "reason": reason})
                continue
            odd.update(reason)
            part = int(i in held)
            files[part].write(pixels.tobytes())
            rows[part].append((label, {"captions": captions} | (attributes or {})))
        for file, start, those in zip(files, starts, rows):
            assert header(file, len(those)) == start, "numpy's header changed its length"
            file.flush()
            os.fsync(file.fileno())
    return *rows, skipped, odd


def write_arrays(results, total, left, folder, args, text_encoder):
    """images.npy, then labels and captions; returns meta.json's content. left: what the listing left out."""
    meta = left_out(left)
    if args.strict and meta["skipped"]:
        fail("{file!r}: {reason} (--strict)".format(**meta["skipped"][0]))
    rows, held, skipped, meta["odd"] = write_images(results, total, folder, args)
    meta["left_out"] |= {"unreadable image": len(skipped)} if skipped else {}
    skipped = meta["skipped"] = meta["skipped"] + skipped
    if not rows or args.holdout and not held:
        kind = "image that is held out (--holdout)" if rows else "image"
        fail(f"{f'--root {args.root}' if args.root else args.source}: not one usable {kind}"
             + (f"; the first of {len(skipped)} skipped: {skipped[0]['file']!r}: {skipped[0]['reason']}"
                if skipped else f" (looked for {' '.join(sorted(EXTENSIONS))})"))
    meta |= {"name": args.source, "count": len(rows), "size": args.size, "channels": args.channels,
             "classes": None, "vocabulary": None, "text_encoder": None}
    if held:
        meta["held_out"] = len(held)
    labels, texts = zip(*rows, *held)
    if all(label is not None for label in labels):
        meta["classes"] = sorted(set(labels), key=lambda c: (len(c), c) if c.isdigit() else (0, c))
        if args.source == "stacked-mnist":  # all of them, whether drawn or not
            meta |= {"classes": [f"{i:03}" for i in range(1000)], "stacked": 10}
        index = {c: i for i, c in enumerate(meta["classes"])}
        save_parts(folder, "labels", np.array([index[label] for label in labels], np.int64), meta)
    if texts[0]["captions"] is not None:
        captions = [text["captions"] for text in texts]
        array, meta["vocabulary"], meta["cut"], meta["rare"] = tokenize(
            captions, args.max_words or MAX_WORDS, len(rows))
        save_parts(folder, "tokens", array, meta)
        if args.text_encoder:
            flat = text_encoder.encode([c for each in captions for c in each])
            array = np.zeros((len(captions), max(map(len, captions)), flat.shape[1]), np.float32)
            for row, each in zip(array, captions):
                row[:len(each)], flat = flat[:len(each)], flat[len(each):]
            save_parts(folder, "embeddings", array, meta)
            meta["text_encoder"] = args.text_encoder
        for name, part in (("captions", rows), ("held_out_captions", held)):
            if part:
                write_text(folder / f"{name}.jsonl", "".join(json.dumps(text) + "\n" for _, text in part))
    return meta


def save_parts(folder, name, array, meta):
    """An array of all images, those held out last, as NAME.npy and, if there are any, held_out_NAME.npy."""
    save_array(folder / f"{name}.npy", array[:meta["count"]])
    if len(array) > meta["count"]:
        save_array(folder / f"held_out_{name}.npy", array[meta["count"]:])


def left_out(left):
    """meta.json's words on what the listing left out, [(name or None for what merely accompanies, label, and
    perhaps a reason)]."""
    named = [entry for entry in left if entry[0] is not None]
    return {"left_out": Counter(label for _, label, *_ in named),
            "other_files": Counter(label for name, label, *_ in left if name is None),
            "skipped": [{"file": name, "reason": (*why, REASONS.get(label, f"{label} is not read"))[0]}
                        for name, label, *why in named[:MAX_NAMED]]}


# ---- texts without images ----------------------------------------------------------------------------------

ORACLE = {"vocabulary": 5000, "length": 20, "hidden": 32, "num": 10_000}  # Yu et al. 2017


def read_texts(args):
    """(the texts of --root, a line each or, in .jsonl, a caption each; [(name, label)] of the rest)."""
    root, texts = Path(args.root), []
    read, names, left = open_file, {root.name: root}, []
    readable = root.is_file() and os.access(root, os.R_OK)  # is_tarfile raises where it may not read
    if not readable or zipfile.is_zipfile(root) or tarfile.is_tarfile(root):
        read, names, left = open_root(root)
        endings = {name: "._*" if os.path.basename(normal(name)).startswith(".") else
                   os.path.splitext(name)[1].lower() for name in names}
        left += [(None, ending or "extensionless file") for ending in endings.values()
                 if ending not in (".txt", ".jsonl")]
        names = {name: names[name] for name in sorted(names) if endings[name] in (".txt", ".jsonl")}
    for name in names or fail(f"--root {root}: no .txt or .jsonl in it"):
        try:
            data = read_member(read, names[name])
            lines = lines_of(text_of(data)) if not name.lower().endswith(".jsonl") else [
                text for _, told in json_lines(data) for text in told]
            left += [(name, "null caption")] * lines.count(None)
            texts += [text for text in lines if text is not None]
        except ValueError as error:
            fail(f"--root {root}: {name}: {error}")

    def plain(c):
        return c if c.isprintable() else sign(c)
    texts = [" ".join("".join(map(plain, unicodedata.normalize("NFC", text))).split()) for text in texts]
    return [text for text in texts if text][:args.num], left


def write_texts(args, folder):
    """tokens.npy and, of a tenth of the different texts that training never sees, held_out.npy; returns meta.

    Ids: 0 padding, 1 <unk>, then the tokens by how often they occur.
    """
    texts, left = read_texts(args)
    if len(texts) < (args.num or 0):
        print(f"note: {len(texts):,} of the {args.num:,} that --num asks for")
    split = [tuple(words_of(text) if args.level == "word" else text) for text in texts]
    left += [(text, "wordless text") for text, tokens in zip(texts, split) if not tokens]
    longest = max(map(len, split), default=0)
    length = args.length or min(longest, MAX_WORDS if args.level == "word" else 4 * MAX_WORDS)
    cut, split = sum(len(text) > length for text in split), [text[:length] for text in split if text]
    different = sorted(set(split))
    if len(different) < 20 or length < 2:
        fail(f"--root {args.root}: {len(different)} different texts of up to {length} tokens; it takes 20, "
             "of 2 or more")
    held = random.Random(args.seed).sample(different, len(different) // 10)
    counts = Counter(token for text in split for token in text)
    vocabulary = ["", "<unk>"] + [token for token, _ in counts.most_common(MAX_VOCABULARY - 2)]
    index = {token: i for i, token in enumerate(vocabulary)}
    unspaced = sum(n for token, n in counts.items() if re.match(UNSPACED, token))
    if args.level == "word" and 2 * unspaced > counts.total():
        print("note: these texts are in a script without spaces, each letter is a word: use --level char")

    def to_ids(texts):
        ids = np.zeros((len(texts), length), np.int32)
        for row, text in zip(ids, texts):
            row[:len(text)] = [index.get(token, 1) for token in text]
        return ids
    unseen = set(held)
    tokens = to_ids([text for text in split if text not in unseen])
    return left_out(left) | {"rare": max(0, len(counts) - MAX_VOCABULARY + 2)} | save_texts(
        args, folder, tokens, to_ids(held), vocabulary, cut)


def write_oracle(args, folder):
    """Texts drawn from a random LSTM with weights N(0, 1), which is kept in oracle.pt."""
    need("torch")
    import torch
    torch.manual_seed(args.seed)
    n, length, hidden = ORACLE["vocabulary"], args.length or ORACLE["length"], ORACLE["hidden"]
    oracle = torch.nn.ModuleDict({"embed": torch.nn.Embedding(n + 1, hidden),
                                  "cell": torch.nn.LSTMCell(hidden, hidden),
                                  "logits": torch.nn.Linear(hidden, n)})
    for parameter in oracle.parameters():
        torch.nn.init.normal_(parameter)
    count, drawn = args.num or ORACLE["num"], []
    with torch.inference_mode():
        token, state = torch.zeros(2 * count, dtype=torch.int64), None  # 0 begins a text
        for _ in range(length):
            state = oracle["cell"](oracle["embed"](token), state)
            below = oracle["logits"](state[0]).softmax(1).cumsum(1)
            token = 1 + torch.searchsorted(below, torch.rand(2 * count, 1)).squeeze(1).clamp(max=n - 1)
            drawn.append(token)
    ids = torch.stack(drawn, 1).numpy().astype(np.int32)
    torch.save(oracle.state_dict(), folder / "oracle.pt")
    words = [""] + [f"w{i}" for i in range(1, n + 1)]
    return left_out([]) | save_texts(args, folder, ids[:count], ids[count:], words, 0)


def save_texts(args, folder, tokens, held_out, vocabulary, cut):
    """The arrays of texts (n, L), (m, L) int32 of token ids; returns their part of meta.json."""
    save_array(folder / "tokens.npy", tokens)
    save_array(folder / "held_out.npy", held_out)
    return {"name": "oracle" if args.synthetic_oracle else "text", "count": len(tokens),
            "length": tokens.shape[1], "held_out": len(held_out), "level": args.level,
            "size": None, "channels": None, "classes": None, "vocabulary": vocabulary, "cut": cut}


def save_array(path, array):
    with open(path, "wb") as file:
        np.save(file, array)
        os.fsync(file.fileno())


def source_options(args):
    """The options that decide what DATA holds, paths in one spelling."""
    options = {k: v for k, v in vars(args).items() if k not in ("out", "workers", "strict")}
    return options | {k: os.path.realpath(options[k]) for k in PATHS
                      if options[k] not in (None, "", "inside", "none")}


def cores():
    """CPUs that this process may use; a queue gives fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("source", choices=[*DRAWN, *TORCHVISION, "folder", "coco", "text"], help="shapes: "
                        "drawn here, no download; stacked-mnist: three digits as red, green and blue, 1,000 "
                        "classes; folder: a directory, .zip or .tar(.gz) of images; coco: the same with "
                        "COCO's captions; text: sentences without images")
    files = "source folder or coco"
    add = parser.group("data")
    add("--out", required=True, metavar="DATA", help="folder to make")
    add("--root", metavar="SOURCE", excludes="source shapes", help="folder: where the images are; text: a "
        ".txt, a line a text, a captions.jsonl, or a folder or archive of these; torchvision's sets: where "
        "they are or are downloaded to (then default: downloads)")
    add("--num", type=within(1, kind=int), help="how many shapes (default 10000) or stacked digits (60000) "
        "to draw; else: the first so many")
    add("--seed", type=within(0, kind=int), default=0, help="which shapes or digits are drawn, "
        "which texts or images are held out")
    add = parser.group("images", excludes=["source text"])
    add("--size", type=within(1, 4096, int), help="side of the images made, pixels (default: 32 for "
        "stacked-mnist, else 64)")
    add("--channels", type=int, choices=[1, 3], excludes="source stacked-mnist", help="1 gray, 3 RGB "
        "(default: 1 for mnist and fashion-mnist, else 3)")
    add("--crop", type=within(1, kind=int), metavar="PIXELS", help="side of the centred square kept, in "
        "pixels of the source (default: the largest)")
    add("--background", default="white", help="colour under transparent pixels: a name or #rrggbb")
    add("--holdout", type=within(1e-6, 0.5), metavar="SHARE", help="share of the images, 0.05 say, that "
        "is kept out of training, with captions and classes: held_out_*")
    add("--strict", action="store_true", help="a file or folder that cannot be used is an error, not skipped")
    add("--classes", choices=["folders", "none"], needs="source folder", help="whether the first folders are "
        "classes (default: they are, unless more images lie beside them than the smallest class has)")
    add("--captions", metavar="FILE", needs=files, help="coco: captions_train2017.json or its like; folder: "
        "a captions.jsonl; inside: the captions.jsonl or .txt files among the images; none (default: inside, "
        "where at least half of the images have one)")
    add("--max-words", type=within(1, kind=int), needs=f"{files} or shapes", help="words of a caption that "
        f"are kept (default: {MAX_WORDS})")
    add("--text-encoder", metavar="NAME", needs=f"{files} or shapes", help="a sentence-transformers model, "
        "by name or folder, whose embeddings of the captions are what the networks are told")
    add = parser.group("texts", needs=["source text"])
    add("--level", choices=["word", "char"], default="word", help="what a token is")
    add("--length", type=within(2, kind=int), help="tokens a text; longer ones are cut (default: the longest "
        "text's, at most 32 words or 128 characters)")
    add("--synthetic-oracle", action="store_true", excludes=["--root", "--level char"], help="draw --num "
        "texts of 20 tokens from a fixed random LSTM over 5000, under which the likelihood of any text is "
        "known (SeqGAN's benchmark)")
    add = parser.group("speed")
    add("--workers", type=within(1, kind=int), default=cores(), excludes="source text", help="decoding "
        "processes")
    args = parser.parse_args(argv)
    args.size = args.size or (32 if args.source == "stacked-mnist" else 64)
    args.num = args.num or DRAWN.get(args.source)
    args.channels = args.channels or (1 if args.source in ("mnist", "fashion-mnist") else 3)
    if "seed" in parser.named and args.source not in (*DRAWN, "text") and not args.holdout:
        fail("--seed needs source shapes or stacked-mnist or text, or --holdout")
    check(args)
    return args


def check(args):
    """What one option cannot say of itself."""
    try:
        ImageColor.getrgb(args.background)
    except ValueError:
        fail(f"--background {args.background}: not a colour (a name like white, or #rrggbb)")
    if args.source in ("folder", "coco", "text") and not args.root and not args.synthetic_oracle:
        what = "file of texts" if args.source == "text" else "folder or archive of images"
        fail(f"--root is missing: the {what}")
    if args.source == "coco" and args.captions in (None, "none", "inside"):
        fail("--captions is missing: the JSON file of COCO's captions")
    if args.source in ("folder", "coco") and not os.path.exists(args.root):
        fail(f"--root {args.root}: no such file or directory")


def already(args, out, state):
    """Say that DATA is there and whole; other options, another source or damage are refused."""
    there = Data(out, "--out")
    asked, before = source_options(args), there.meta.get("source", {})
    usual = {"num": DRAWN.get(args.source), "max_words": MAX_WORDS}  # a default may be spelled out
    usual |= {k: ORACLE[k] for k in ("num", "length")} if args.synthetic_oracle else {}
    for options in (asked, before):
        options |= {k: v for k, v in usual.items() if options.get(k) is None}
    if state in (None, there.meta.get("source_state")):  # the same files, moved or not; "inside" is no file
        asked |= {k: before.get(k) for k in PATHS if k == "root" or
                  all(os.path.isabs(o.get(k) or "") for o in (asked, before))}
    changed = [f"{flag(k)} {before.get(k)} there, {'not given' if v is None else f'{v} asked'}"
               for k, v in asked.items() if v != before.get(k)]
    if changed:
        fail(f"--out {args.out} holds other data ({'; '.join(changed)}): delete it, or choose another --out "
             "(of run_all.sh DATA=)")
    if args.strict and (there.meta["skipped"] or there.meta.get("left_out")):
        fail(f"--out {args.out} was made without --strict and lacks files (meta.json): delete it to retry")
    there.verify()
    what = f"{there.meta['count']} {'texts' if args.source == 'text' else 'images'}"
    if state != there.meta.get("source_state", state):
        return print(f"note: {args.root} is not as {args.out} was made of it ({what}): delete it to redo it")
    print(f"{args.out} is already prepared: {what}")


def make(args, out, state):
    """Build DATA beside its place and rename it there; returns its meta. state: that of the source."""
    if args.source != "text":
        sources = {"shapes": shapes_source, "stacked-mnist": stacked_source}
        sources |= dict.fromkeys(TORCHVISION, torchvision_source)
        total, items, left = sources.get(args.source, folder_source)(args)
        total, items = min(total, args.num or total), itertools.islice(items, args.num)
    text_encoder = load_text_encoder(args.text_encoder) if args.text_encoder else None
    with partial_folder(out) as partial:
        if args.source == "text":
            meta = (write_oracle if args.synthetic_oracle else write_texts)(args, partial)
        else:
            meta = write_arrays(decode_all(items, args), total, left, partial, args, text_encoder)
        meta |= {"source": source_options(args), "source_state": state, "fingerprint": None}
        write_json(partial / "meta.json", meta)
        meta["fingerprint"] = Data(partial).fingerprint()
        write_json(partial / "meta.json", meta)
        os.rename(partial, out)
        return meta


def main():
    steady_output()
    args = parse_args()
    on_signals(leave)
    out, state = Path(os.path.realpath(args.out)), source_state(args)  # a link to a folder is that folder
    there = os.path.exists(out / "meta.json")
    try:
        if there:
            return already(args, out, state)
        if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir()) or os.path.ismount(out)):
            fail(f"--out {args.out} exists and is not a data folder, or is a mount: choose another --out")
        report(args, make(args, out, state))
    except OSError as error:  # a full disk, a folder that may not be written
        if not there and os.path.exists(out / "meta.json"):
            fail(f"--out {args.out} was made by another process meanwhile: call again to compare the options")
        fail(f"{error.strerror or error}: {error.filename or out}", status_of(error))
    except MemoryError as error:
        fail(f"not enough memory ({error})", status=1)


def report(args, meta):
    """What was made, and what was left out of it."""
    text, skipped = args.source == "text", meta["skipped"]
    first = {entry["reason"]: entry for entry in reversed(skipped)}  # each reason once, then others
    for entry in [*reversed(first.values()), *(e for e in skipped if e is not first[e["reason"]])][:5]:
        print(f"skipped {entry['file']!r}: {entry['reason']}")
    for said, counts in (("left out", meta["left_out"]), ("beside them, not read", meta["other_files"])):
        several = [f"{n:,} {what}" if what[0] == "." else plural(n, what) for what, n in counts.items()]
        if several:
            print(f"{said}: {', '.join(several)}")
    for odd, what in {"animated": "animated: the first frame was taken",
                      "enlarged": f"smaller than half of --size {args.size}: enlarged"}.items():
        if meta.get("odd", {}).get(odd):
            print(f"note: {meta['odd'][odd]:,} {what}")
    for name in ("max_words", "text_encoder"):
        if getattr(args, name) and not meta["vocabulary"]:
            print(f"note: {flag(name)} has no effect: there are no captions")
    found = meta["count"] + meta.get("held_out", 0)
    if not text and found < (args.num or 0):
        print(f"note: {found:,} of the {args.num:,} that --num asks for")
    if meta.get("rare"):
        print(f"{plural(meta['rare'], 'rarer word')} became <unk>: the vocabulary holds {MAX_VOCABULARY:,}")
    if text:
        what = (f"{plural(meta['count'], 'text')} of {meta['length']} tokens out of "
                f"{len(meta['vocabulary'])}, {meta['held_out']} others held out; {meta['cut']} cut")
    else:
        what = f"{plural(meta['count'], 'image')} of {args.size}×{args.size}×{args.channels}"
        if meta.get("cut"):
            limit = args.max_words or MAX_WORDS
            print(f"{plural(meta['cut'], 'caption')} cut to {limit} words (--max-words)")
    what += f", {len(meta['classes'])} classes" if meta["classes"] else ""
    what += f", {meta['held_out']} others held out" if args.holdout else ""
    count = sum(meta["left_out"].values())
    what += f", {count:,} skipped (named in meta.json)" if count else ""
    print(f"{args.out}: {what}")


if __name__ == "__main__":
    main()
