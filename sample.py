"""Draw images from a trained generator: RUN/generator.pt -> RUN/images/*.png, or an .npz; grids and walks.

    python sample.py --run runs/shapes --num 2048
    python sample.py --run runs/digits --num 64 --labels "3,7" --grid
    python sample.py --run runs/shapes --text "a small red circle on a white background" --num 8 --grid
    python sample.py --run runs/shapes --num 0 --interpolate 8
    python sample.py --film runs/shapes
    python sample.py --run runs/shapes --export generator.onnx
    python sample.py --run runs/digits --explore

A run with --arch seq has RUN/texts.txt instead, a line a text. Image or text i depends on (seed, i) alone: a
larger --num adds some and leaves the others as they were.
"""

import argparse
import base64
import hashlib
import html
import io
import json
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import prepare_data

prepare_data.need("torch")
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

from prepare_data import (EXTENSIONS, Data, Parser, fail, find_device, flag, keep_memory, leave, lines_of,
                          load_text_encoder, on_signals, partial_folder, plural, read_json, read_or_empty,
                          status_of, steady_output, text_of, whole_file, within, words_of)
from train import latents, load_generator, make_grid, out_of_memory, to_pixels, to_texts

BLOCK = 64  # images a pass, always: another number would round the last bits another way
FRAMES = 12  # of the animation, from one point of a walk to the next
FILM = 200  # frames of a film at most
PLANE = 9  # images along each side of the plane of --explore
ROWS = 10  # classes or captions of --explore, unless they are named
LEVELS = (None, 2, 1.5, 1, 0.5)  # of --truncation in --explore


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.group("run")
    add("--run", metavar="RUN", help="folder of a run, or a generator's file")
    add("--out", metavar="PATH", needs="--run", help="folder of numbered PNGs, or a file ending in .npz "
        "(default: RUN/images); of texts, a file ending in .txt")
    add("--device", default="auto", excludes="--export", help="auto, cpu, cuda, cuda:1, mps")
    add("--export", metavar="FILE", needs="--run", excludes=["--num", "--out", "--grid", "--interpolate",
        "--seed", "--labels", "--text", "--text-file", "--data", "--held-out", "--truncation", "--at",
        "--temperature"], help="the generator alone for other programs, instead of images: .pt2 for torch, "
        ".onnx for others")
    add("--explore", action="store_true", needs="--run", excludes=["--num", "--out", "--grid",
        "--interpolate", "--export", "--truncation", "--at"], help="instead of images a page to play with, "
        "explore.html in RUN: a plane between four latents for each of the classes or captions (default: "
        f"the first {ROWS}), at several truncations")
    add = parser.group("images", needs=["--run"])
    add("--num", type=within(0, 10 ** 8, int), help="how many images (default: a caption each, where they "
        "are named, one with --at, else 64)")
    add("--seed", type=within(0, 2 ** 63, int), default=0, help="which images")
    add("--labels", help="classes to draw in turn, by name or number, separated by commas (default: as often "
        "as in the training data)")
    add("--text", action="append", default=[], metavar="CAPTION", help="what to draw; given several times, "
        "in turn")
    add("--text-file", metavar="FILE", help="the same, a caption a line")
    add("--data", metavar="DATA", excludes=["--text", "--text-file"], help="whose captions are drawn "
        "(default: those of the training data); of texts: whose held-out ones G's likelihood is of")
    add("--held-out", action="store_true", excludes=["--text", "--text-file"], help="draw the captions "
        "of the images that prepare_data.py --holdout kept out of training")
    add("--truncation", type=within(1e-6, 100), help="largest |z|, from a truncated normal: below 2, safer "
        "images that vary less")
    add("--at", type=point, metavar="X,Y", excludes="--interpolate", help="all of this point of the plane of "
        "--explore: X to the right, Y down, from 0 to 1")
    add("--temperature", type=within(0.01, 100), help="of texts (default: 1): below, likelier words that "
        "vary less")
    add = parser.group("pictures, in RUN; with --out NAME beside it, as NAME-grid.png and so on")
    add("--grid", nargs="?", type=within(1, 10 ** 4, int), const=0, metavar="N", needs="--run",
        help="grid.png of the first N images (without N: 64, or as many as --num); with captions, "
        "captions.png of 32 of them too")
    add("--interpolate", type=within(2, 10 ** 3, int), metavar="POINTS", needs="--run", help=""
        "interpolation.png and .webp: a spherical walk through so many latents and back")
    add("--film", metavar="RUN", help="film.webp in this run: its sample grids, from the first step to the "
        "last")
    args = parser.parse_args(argv)
    if not args.run and not args.film:
        fail("--run is missing: the folder of a run")
    args.told = [(text, "--text") for text in args.text] + lines_told(args.text_file)
    if args.num is None:
        args.num = len(args.told) or (1 if args.at else 64)
    if not args.num and args.grid is None and args.interpolate is None:
        fail("--num 0: of no images only --grid or --interpolate is drawn")
    if args.grid == 0:
        args.grid = min(64, args.num or 64)
    return args


def point(text):
    """'0.25,1' -> [0.25, 1.0]; an argparse type."""
    x, comma, y = text.partition(",")
    if not comma:
        raise argparse.ArgumentTypeError(f"{text} is not X,Y, such as 0.5,0.25")
    return [within(0, 1)(x), within(0, 1)(y)]


def lines_told(file):
    """[(text, where it stands)] of the lines of --text-file that are not empty."""
    if file is None:
        return []
    try:
        lines = lines_of(text_of(Path(file).read_bytes()))
    except (OSError, ValueError) as error:
        fail(f"--text-file {file}: {getattr(error, 'strerror', None) or error}")
    told = [(line, f"--text-file {file}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    return told or fail(f"--text-file {file}: no captions in it")


def note_undrawn(num, count, what):
    """Say what --num leaves out of what the call names."""
    if 0 < num < count:
        print(f"sample.py: --num {num} leaves out {count - num} of {count} {what}", file=sys.stderr)


# ---- latents and conditions ------------------------------------------------------------------------------

def truncated(z, limit):
    """Normal z mapped to the normal distribution truncated at ±limit: by quantiles, so order is kept."""
    low, high = (torch.special.ndtr(torch.tensor(side, dtype=torch.float64)) for side in (-limit, limit))
    share = low + (high - low) * torch.special.ndtr(z.double())
    return torch.special.ndtri(share).clamp(-limit, limit).float()


def slerp(a, b, share):
    """The point `share` of the way from vector a to b along a great circle (Shoemake 1985)."""
    angle = torch.arccos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
    if angle.sin().abs() < 1e-6:
        return torch.lerp(a, b, share)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def in_plane(corners, x, y):
    """The latent at (x, y) between four (4, dim), the first two above: by slerp, first along x."""
    return slerp(slerp(corners[0], corners[1], x), slerp(corners[2], corners[3], x), y)


def parse_labels(text, classes):
    """'red circle,3' -> [class numbers]; refuses what is not a class. Numbers that are names are names."""
    if text in classes:  # its name may have commas
        return [classes.index(text)]
    numbers, named = [], any(name.isdecimal() for name in classes)
    for word in (w.strip() for w in text.strip().removesuffix(",").split(",")):
        if word in classes:
            numbers.append(classes.index(word))
        elif word.isdecimal() and int(word) < len(classes) and not named:
            numbers.append(int(word))
        else:
            fail(f"--labels {word}: not one of the {len(classes)} classes ({', '.join(classes[:30])}"
                 f"{' …' if len(classes) > 30 else ''})")
    return numbers


def label_conditions(args, saved):
    """(numbers of images -> tensor of their classes, number -> what to note of that image)."""
    seed, asked = args.seed, parse_labels(args.labels, saved["classes"]) if args.labels is not None else []
    note_undrawn(args.num, len(asked), "labels")
    share = np.cumsum(saved["class_counts"]) / np.sum(saved["class_counts"])

    def label(i):  # unless asked, as often as in the training data
        return asked[i % len(asked)] if asked else int(
            np.searchsorted(share, np.random.default_rng([seed, i, 1]).random(), side="right"))
    return (lambda numbers: torch.tensor([label(i) for i in numbers]),
            lambda i: {"label": saved["classes"][label(i)]})


def given_captions(args, saved):
    """The same of the captions that the call names, in turn."""
    texts, encoded = [text for text, _ in args.told], encode_texts(args.told, saved)
    note_undrawn(args.num, len(texts), "captions")
    return (lambda numbers: encoded[[i % len(texts) for i in numbers]],
            lambda i: {"caption": texts[i % len(texts)]})


def captions_of_data(seed, saved, data, held_out):
    """The same of the captions of DATA, or of its held-out images, in a seeded order; noted: row, caption."""
    if held_out and not data.meta.get("held_out"):
        fail(f"--held-out: {data.folder} has no images out of training; prepare_data.py --holdout makes some")
    name = "tokens" if saved["model"]["condition"] == "text" else "embeddings"
    arrays = data.array(f"held_out_{name}" if held_out else name)
    captions = [line["captions"] for line in data.captions(held_out)]
    order = np.random.default_rng(seed).permutation(len(captions))

    def place(i):
        row = int(order[i % len(order)])
        return row, i // len(order) % len(captions[row])
    return (lambda numbers: torch.from_numpy(np.stack([arrays[place(i)] for i in numbers])),
            lambda i: {"row": place(i)[0], "caption": captions[place(i)[0]][place(i)[1]]})


def encode_texts(told, saved):
    """[(caption, where it stands)] -> token ids (n, L), or embeddings (n, d) where G was trained on those."""
    texts = [text for text, _ in told]
    if not all(text.strip() for text in texts):
        fail("--text: an empty caption")
    if saved["text_encoder"]:
        return torch.from_numpy(load_text_encoder(saved["text_encoder"], "--text").encode(texts)).float()
    index = {word: i for i, word in enumerate(saved["vocabulary"])}
    split = [words_of(text) for text in texts]
    for (text, place), words in zip(told, split):
        if not any(word in index for word in words):
            fail(f"{place}: {text!r}: no word of it is in the training captions")
    unknown = sorted({word for words in split for word in words if word not in index})
    if unknown:
        print(f"sample.py: not in the training captions: {', '.join(unknown)}", file=sys.stderr)
    tokens = torch.zeros(len(split), max(map(len, split)), dtype=torch.int64)
    for row, words in zip(tokens, split):
        row[:len(words)] = torch.tensor([index.get(word, 1) for word in words])
    return tokens


def check_conditions(args, kind):
    """Refuse what the call asks of a generator of another kind of condition."""
    named = [name for name in ("text", "text_file", "data", "held_out") if getattr(args, name)]
    if named and kind not in ("text", "vector"):
        fail(f"{flag(named[0])}: this generator was trained without captions (train.py --condition text)")
    if args.labels is not None and kind != "label":
        fail("--labels: this generator was trained without classes (train.py --condition label)")
    if args.grid and kind in ("text", "vector"):
        prepare_data.need("matplotlib")  # its font, for the captions


def find_conditions(args, saved, folder):
    """(numbers of images -> conditions or None, number -> what to note, DATA if that names its rows)."""
    kind = saved["model"]["condition"]
    if kind == "none":
        return lambda numbers: None, lambda i: {}, None
    if kind == "label":
        return *label_conditions(args, saved), None
    if args.told:
        return *given_captions(args, saved), None
    data = data_of(args.data, folder, saved)
    if data is None:
        fail("no captions to draw: name the training data with --data, or captions with --text")
    return *captions_of_data(args.seed, saved, data, args.held_out), data


def data_of(named, folder, saved):
    """DATA as named, or that of the config.json beside the generator; None where it is not there any more."""
    place = named
    if named is None and (folder / "config.json").exists():
        place = read_json(folder / "config.json").get("options", {}).get("data", "")
        place = place if (Path(place) / "meta.json").exists() else None
    data = Data(place) if place else None
    if data and any(data.meta.get(key) != saved.get(key) for key in ("vocabulary", "text_encoder")):
        return None if named is None else fail(
            f"--data {named}: another vocabulary or --text-encoder than the generator's")
    return data


# ---- drawing and writing ---------------------------------------------------------------------------------

def generate(generator, z, conditions, dial, device):
    """uint8 (n, H, W, C) of latents (n, dim) and conditions (n, …), one for all (1, …), or None."""
    pixels = []
    if conditions is not None:
        conditions = conditions.expand(len(z), *conditions.shape[1:])
    for i in range(0, len(z), BLOCK):
        block = torch.arange(i, i + BLOCK).clamp(max=len(z) - 1)
        condition = conditions[block].to(device) if conditions is not None else None
        with torch.inference_mode():
            pixels.append(to_pixels(generator(z[block].to(device), condition, dial))[:len(z) - i])
    return np.concatenate(pixels)


class Written:
    """FOLDER/sample.sha256, for `sha256sum -c`: the files that sample.py wrote, and may replace."""

    def __init__(self, folder):
        self.folder, self.path = folder, folder / "sample.sha256"
        self.lines = self.read()

    def read(self):
        return set(os.fsdecode(self.path.read_bytes()).splitlines()) if self.path.exists() else set()

    def line(self, path, data):
        return f"{hashlib.sha256(data).hexdigest()}  {path.relative_to(self.folder)}"

    def holds(self, path):
        """Whether a file is there as sample.py left it."""
        return path.is_file() and self.line(path, path.read_bytes()) in self.lines

    def check(self, *paths):
        """Refuse to go on where a file, or one in a folder, would be replaced that is not sample.py's."""
        for path in paths:
            for file in sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []:
                if not self.holds(file):
                    what = f"{path} would be replaced, and {file.name} in it" if file != path else (
                        f"{file} would be replaced, and")
                    fail(f"{what} is not as sample.py wrote it: move it away, or take another --out")

    def note(self, lines, instead_of=()):
        self.lines = self.read().difference(instead_of).union(lines)  # another call may write meanwhile
        lines = sorted(self.lines, key=lambda line: line[66:])  # its name
        with whole_file(self.path) as file:
            file.write(os.fsencode("".join(line + "\n" for line in lines)))

    def write(self, path, data):
        """A file of these bytes or this text; at no moment does one stand there that is not noted."""
        self.check(path)
        data = data.encode("utf-8", "replace") if isinstance(data, str) else data
        line, before = self.line(path, data), [x for x in self.lines if x.endswith(f"  {path.name}")]
        self.note([line])
        with whole_file(path) as file:
            file.write(data)
        self.note([line], instead_of=before)


def encode(image, kind, **options):
    """A Pillow image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def animate(frames, duration):
    """Pillow images as an animated WebP that repeats; duration: ms, of all or of each."""
    return encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], duration=duration, loop=0,
                  quality=90)


def captioned(notes, pixels, real):
    """A picture of images with their captions below them, and beside each the real image of that caption."""
    import matplotlib  # for its font, which has more letters than Pillow's
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 10)
    side, width, height, columns = 96, 216, 150, min(4, len(notes))
    page = Image.new("RGB", (columns * width, -(-len(notes) // columns) * height), "white")
    for i, (note, own) in enumerate(zip(notes, pixels)):
        left, top = i % columns * width + 8, i // columns * height + 6
        for k, image in enumerate([own] if real is None else [own, real[note["row"]]]):
            large = Image.fromarray(image.squeeze()).resize((side, side), Image.Resampling.NEAREST)
            page.paste(large, (left + k * (side + 4), top))
        text = "\n".join(textwrap.wrap("".join(c for c in note["caption"] if c.isprintable()), 36)[:3])
        ImageDraw.Draw(page).text((left, top + side + 3), text, fill="black", font=font)
    return page


def write_images(out, blocks, written):
    """Blocks of (first number, pixels (n, H, W, C)) as a folder of PNGs or an .npz, whole or not at all."""
    if out.suffix == ".npz":
        buffer = io.BytesIO()
        np.savez(buffer, images=np.concatenate([pixels for _, pixels in blocks]))
        return written.write(out, buffer.getbuffer())
    with partial_folder(out) as partial:
        def write(name, pixels):
            data = encode(Image.fromarray(pixels.squeeze()), "PNG", compress_level=4)
            (partial / name).write_bytes(data)
            return written.line(out / name, data)

        with ThreadPoolExecutor(prepare_data.cores()) as pool:
            waiting, lines = [], []
            for first, pixels in blocks:
                lines += waiting  # a block behind: errors of the disk surface, memory stays bounded
                waiting = pool.map(write, [f"{first + i:06d}.png" for i in range(len(pixels))], pixels)
            lines += waiting
        before = {line for line in written.lines if line[66:].startswith(f"{out.name}/")}
        written.note(lines)  # before they are there: killed in between, both are known
        shutil.rmtree(out, ignore_errors=True)
        os.rename(partial, out)
        written.note(lines, instead_of=before)


def write_walk(written, still, moving, z, condition, draw, told):
    """A closed walk through latents (n, dim) with one condition: stills in one picture, and it moving.

    told: what there is to note of the condition.
    """
    steps = [slerp(z[i], z[(i + 1) % len(z)], f / FRAMES) for i in range(len(z)) for f in range(FRAMES)]
    pixels = draw(torch.stack(steps), condition)
    written.write(still, encode(make_grid(pixels[::FRAMES // 4]), "PNG"))
    side = pixels.shape[1] * max(1, 256 // pixels.shape[1])
    frames = [Image.fromarray(p.squeeze()).resize((side, side), Image.Resampling.NEAREST) for p in pixels]
    written.write(moving, animate(frames, 1000 // FRAMES))
    of = told.get("label") or told.get("caption")
    print(f"{still}, {moving}: {len(z)} latents and between" + (f", of {of!r}" if of else ""))


def write_film(run):
    """RUN/film.webp of the grids that train.py drew of the same latents, each with its step below."""
    files = sorted((run / "grids").glob(f"step_{'[0-9]' * 7}.png"))
    if len(files) < 2:
        fail(f"--film {run}: {plural(len(files), 'grid')} of images in {run / 'grids'}; train.py leaves one "
             f"every --grid-every steps")
    files = [files[round(i)] for i in np.linspace(0, len(files) - 1, min(len(files), FILM))]
    frames, (width, height) = [], Image.open(files[-1]).size
    size = width * max(1, 512 // width), height * max(1, 512 // width)
    for path in files:
        grid = Image.open(path).convert("RGB").resize(size, Image.Resampling.NEAREST)  # --grow begins smaller
        frames.append(Image.new("RGB", (grid.width, grid.height + 14), "white"))
        frames[-1].paste(grid)
        ImageDraw.Draw(frames[-1]).text((4, grid.height + 1), f"step {int(path.stem[5:])}", fill="black")
    durations = [max(40, 8000 // len(frames))] * (len(frames) - 1) + [2000]
    Written(run).write(run / "film.webp", animate(frames, durations))
    print(f"{run / 'film.webp'}: {len(frames)} grids")


# ---- for other programs ----------------------------------------------------------------------------------

class Drawing(nn.Module):
    """z (B, noise_dim), condition -> images (B, H, W, C) in [0, 1]: sample.py's pixels over 255."""

    def __init__(self, generator, dial):
        super().__init__()
        self.generator, self.dial = generator, dial

    def forward(self, z, condition=None):
        images = self.generator(z, condition, self.dial).float()
        return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def inputs_of(drawing, model, n, length):
    """Seeded inputs of a Drawing by name: n latents, and as many conditions, captions of `length` words."""
    made, known = torch.Generator().manual_seed(n), model["known"]
    condition = {"label": lambda: torch.randint(known, (n,), generator=made),
                 "text": lambda: torch.randint(known, (n, length), generator=made),  # 0 is padding
                 "vector": lambda: torch.randn(n, known, generator=made)}.get(model["condition"])
    z = {"z": torch.randn(n, drawing.generator.noise_dim, generator=made)}
    return z | {"condition": condition()} if condition else z


def export_onnx(program, about):
    """(Bytes of an .onnx file, function from inputs by name to its images under onnxruntime)."""
    import onnxruntime
    proto = torch.onnx.export(program, dynamo=True, output_names=["images"], verbose=False).model_proto
    entry = proto.metadata_props.add()
    entry.key, entry.value = "about", about
    data = proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return data, lambda inputs: torch.from_numpy(
        session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


def export_pt2(program, about):
    """(Bytes of a .pt2 file, function from inputs by name to its images, from these bytes)."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"about.json": about})
    loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    return buffer.getvalue(), lambda inputs: loaded(**inputs)


def export(path, generator, saved):
    """The generator as a file that needs none of these scripts, written if it gives the same images."""
    out, model = Path(path), saved["model"]
    if out.suffix not in (".pt2", ".onnx") or not out.parent.is_dir():
        fail(f"--export {out}: name a file that ends in .pt2 or .onnx, in a folder that is there")
    if model["arch"] == "seq":
        fail(f"--export {out}: of generators of images; one of texts (--arch seq) draws word by word")
    packages = prepare_data.missing("onnx", "onnxscript", "onnxruntime")
    if out.suffix == ".onnx" and packages:
        fail(f"--export {out}: needs packages: pip install {' '.join(packages)}")
    written = Written(out.parent)
    written.check(out)
    drawing = Drawing(generator.to(memory_format=torch.contiguous_format), saved["dial"]).eval()
    example, kind = inputs_of(drawing, model, 2, 5), model["condition"]
    axes = {"z": 1, "condition": 2 if kind == "text" else 1}  # how many of them are any length
    shapes = {name: {axis: torch.export.Dim.DYNAMIC for axis in range(axes[name])} for name in example}
    size = model["sizes"][math.ceil(saved["dial"])]
    about = json.dumps({"condition": kind, "size": size, "channels": model["channels"],
                        "noise_dim": generator.noise_dim, "step": saved["step"],
                        **{name: saved[name] for name in ("classes", "vocabulary", "text_encoder")}})
    program = torch.export.export(drawing, (), example, dynamic_shapes=shapes)
    data, draw = (export_onnx if out.suffix == ".onnx" else export_pt2)(program, about)
    for n, length in (1, 3), (5, 8):
        inputs = inputs_of(drawing, model, n, length)
        apart = (drawing(**inputs) - draw(inputs)).abs().max().item()
        if not apart <= 1e-4:
            fail(f"--export {out}: not written, its images differ from the generator's by {apart:.2g}", 1)
    written.write(out, data)
    print(f"{out}: ({', '.join(example)}) -> images in [0, 1], step {saved['step']}")


# ---- a page to play with ---------------------------------------------------------------------------------

EXPLORE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>TITLE</title>
<style>
:root { color-scheme: light dark; --line: #8885; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 1rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; }
main { display: grid; gap: 1rem 1.5rem;
       grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); }
.drawn { image-rendering: pixelated; aspect-ratio: 1; outline: 1px solid var(--line); }
#plane { position: relative; touch-action: none; cursor: crosshair; background-size: 100% 100%; }
#here { position: absolute; outline: 2px solid #000; box-shadow: 0 0 0 4px #fff; pointer-events: none; }
#rows[hidden] { display: none; }
#rows { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(5.5rem, 1fr)); border: 0;
        padding: 0; margin: 1rem 0; font-size: .85rem; line-height: 1.25; }
#rows input { margin-left: 0; } #rows .drawn { margin-bottom: .3rem; }
#rows label:has(:checked) .drawn { outline: 3px solid AccentColor; outline: 3px solid Highlight; }
:focus-visible { outline: 3px solid Highlight; outline-offset: 3px; }
label { overflow-wrap: anywhere; } #level { width: 100%; }
code { display: block; overflow-wrap: anywhere; padding: .6rem; background: #8882; }
button { font: inherit; padding: .4rem 1rem; margin: .6rem 0; }
</style>
<h1>TITLE</h1>
<main>
<div><div id="plane" class="drawn" tabindex="0" role="application"
    aria-label="Plane between four latents: arrow keys move"><div id="here"></div></div>
<p>Four random inputs (latents) in the corners, their mixtures between. Point to look; a click or the arrow
keys choose.</p></div>
<div><div id="large" class="drawn" role="img"></div>
<label>Truncation, to the right more usual and less varied: <output id="cut"></output>
<input id="level" type="range" min="0" step="1"></label></div>
</main>
<fieldset id="rows"></fieldset>
<code id="command"></code>
<button id="copy">Copy the command that draws this image</button> <output id="copied"></output>
<script>
const page = PAGE;
const $ = id => document.getElementById(id);
const last = page.side - 1;
let x = 0, y = 0, row = 0, level = 0, kept = [last / 2, last / 2];
const tiles = page.rows.map((entry, i) => {
    const label = document.createElement("label"), input = document.createElement("input");
    const tile = document.createElement("div");
    Object.assign(input, {type: "radio", name: "row", checked: i == 0});
    input.onchange = () => { row = i; change(); };
    tile.className = "drawn";
    label.append(tile, input, entry.name);
    $("rows").append(label);
    return tile;
});
const images = [...tiles, $("large")];  // each shows one cell of its sheet
images.forEach(image => image.style.backgroundSize = `${100 * page.side}%`);
$("rows").hidden = tiles.length == 1;
$("level").max = page.levels.length - 1;
$("level").value = 0;

function change() {  // another row or truncation: other sheets
    const sheet = i => `url(${page.rows[i].sheets[level]})`;
    tiles.forEach((tile, i) => tile.style.backgroundImage = sheet(i));
    $("large").style.backgroundImage = $("plane").style.backgroundImage = sheet(row);
    $("large").ariaLabel = page.rows[row].name || "generated image";
    $("cut").value = page.levels[level] ?? "none";
    move(x, y);
}

function move(toX, toY) {
    [x, y] = [toX, toY].map(v => Math.min(last, Math.max(0, v)));
    images.forEach(image => image.style.backgroundPosition = `${100 * x / last}% ${100 * y / last}%`);
    const part = 100 / page.side;
    $("here").style = `left: ${x * part}%; top: ${y * part}%; width: ${part}%; height: ${part}%`;
    $("command").textContent = page.rows[row].command + ` --at ${x / last},${y / last}`
        + (page.levels[level] ? ` --truncation ${page.levels[level]}` : "");
    $("copied").value = "";
}

$("plane").onpointermove = $("plane").onpointerdown = event => {
    const box = $("plane").getBoundingClientRect();
    move(Math.floor((event.clientX - box.left) / box.width * page.side),
         Math.floor((event.clientY - box.top) / box.height * page.side));
    if (event.buttons) kept = [x, y];
};
$("plane").onpointerleave = () => move(...kept);
$("plane").onkeydown = event => {
    const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    if (!step) return;
    event.preventDefault();
    move(x + step[0], y + step[1]);
    kept = [x, y];
};
$("level").oninput = () => { level = +$("level").value; change(); };
$("copy").onclick = async () => {
    try {
        await navigator.clipboard.writeText($("command").textContent);
        $("copied").value = "Copied.";
    } catch {
        getSelection().selectAllChildren($("command"));
        $("copied").value = "Selected: copy it with your keys.";
    }
};
move(...kept);
change();
</script>
</html>
"""


def explored(args, saved, folder):
    """[(name, options of sample.py that ask for it, condition (1, …) or None)]: the rows of the page."""
    kind, classes = saved["model"]["condition"], saved["classes"]
    if kind == "none":
        return [("", [], None)]
    if kind == "label":
        numbers = range(min(len(classes), ROWS))
        if args.labels is not None:
            numbers = parse_labels(args.labels, classes)
        elif len(classes) > ROWS:
            print(f"sample.py: the first {ROWS} of {len(classes)} classes; --labels takes others")
        return [(classes[i], [f"--labels={classes[i]}"], torch.tensor([i])) for i in numbers]
    if args.told:
        return [(told[0], [f"--text={told[0]}"], encode_texts([told], saved)) for told in args.told]
    conditions, note, _ = find_conditions(args, saved, folder)
    rows = {note(i)["caption"]: conditions([i]) for i in range(10 * ROWS)}
    if kind == "text":  # as --text has them: whole, no padding, and one of its words is known
        rows = {text: ids[:, :(ids > 0).sum()].long() for text, ids in rows.items()
                if (ids > 1).any() and len(words_of(text)) <= ids.shape[1]}
        if not rows:
            fail("--explore: prepare_data.py has cut all captions looked at: name some with --text")
    return [(text, [f"--text={text}"], condition) for text, condition in list(rows.items())[:ROWS]]


def explore(args, generator, saved, folder, device):
    """FOLDER/explore.html, which needs no other file: sheets of the plane, one a row and a truncation."""
    out, written, rows = folder / "explore.html", Written(folder), []
    written.check(out)
    z = latents(args.seed, range(4), generator.noise_dim)
    shares = [i / (PLANE - 1) for i in range(PLANE)]
    for name, options, condition in tqdm(explored(args, saved, folder), unit="row", disable=None):
        sheets = []
        for level in LEVELS:
            corners = truncated(z, level) if level else z
            points = torch.stack([in_plane(corners, x, y) for y in shares for x in shares])
            pixels = generate(generator, points, condition, saved["dial"], device)
            side = pixels.shape[1]  # over 32 stored lossy, over 128 reduced, or the page is large
            sheet = make_grid(pixels, PLANE).reduce(-(-side // 128))
            sheet = encode(sheet, "WEBP", lossless=side <= 32, quality=90)
            sheets.append(f"data:image/webp;base64,{base64.b64encode(sheet).decode()}")
        command = ["python", "sample.py", "--run", args.run, "--seed", args.seed, *options, "--num", 1]
        rows.append({"name": name, "command": shlex.join(map(str, command)), "sheets": sheets})
    content = json.dumps({"side": PLANE, "levels": LEVELS, "rows": rows}).replace("<", "\\u003c")
    title = html.escape(f"What {folder.resolve().name} draws at step {saved['step']}")
    parts = {"TITLE": title, "PAGE": content}
    written.write(out, re.sub("TITLE|PAGE", lambda match: parts[match[0]], EXPLORE))
    print(f"{out}: {plural(len(rows), 'row')}, {out.stat().st_size / 1e6:.1f} MB; open it in a browser")


# ---- main ------------------------------------------------------------------------------------------------

def write_texts(args, generator, saved, digest, folder, device):
    """texts.txt, a line each, and texts.json: how they were asked for, how likely G finds unseen ones."""
    for name in ("labels", "text", "text_file", "held_out", "truncation", "at", "grid", "interpolate",
                 "explore"):
        if getattr(args, name):
            fail(f"{flag(name)}: not for a generator of texts")
    out, texts, temperature = Path(args.out or folder / "texts.txt"), [], args.temperature or 1.0
    if out.suffix != ".txt" or not out.parent.is_dir():
        fail(f"--out {out}: texts go into a file whose name ends in .txt, in a folder that is there")
    written = Written(out.parent)
    written.check(out, out.with_suffix(".json"))
    for first in range(0, args.num, BLOCK):
        z = latents(args.seed, range(first, first + BLOCK), generator.noise_dim).to(device)
        with torch.inference_mode():
            tokens = generator(z, None, temperature).argmax(2)
        texts += to_texts(tokens, {"vocabulary": saved["vocabulary"], "level": saved["text_level"]})
    record = {"num": args.num, "seed": args.seed, "temperature": temperature, "generator": digest,
              "step": saved["step"]}
    data = data_of(args.data, folder, saved)
    if data:
        held_out = torch.from_numpy(data.array("held_out").astype(np.int64))
        with torch.inference_mode():
            parts = [generator.likelihood(part.to(device), temperature) for part in held_out.split(BLOCK)]
        losses, counts = (torch.cat(part) for part in zip(*parts))
        record |= {"nll": (losses * counts).sum().item() / counts.sum().item(), "nll_texts": len(held_out)}
    else:
        print("sample.py: no likelihood of held-out texts: name the data with --data", file=sys.stderr)
    out.with_suffix(".json").unlink(missing_ok=True)
    written.write(out, "".join(text + "\n" for text in texts[:args.num]))
    written.write(out.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    print(f"{out}: {plural(args.num, 'text')} of step {saved['step']}")


def find_out(args, folder):
    """Where the images go: --out, or into the run's folder, images or, of one point, point."""
    out = Path(args.out or folder / ("point" if args.at else "images"))
    out = out.resolve() if out.is_symlink() else out  # which stays one
    odd = out.suffix.lower() in EXTENSIONS.union((".npy", ".txt", ".zip"))
    odd = odd or out.is_file() and out.suffix != ".npz"
    if odd or args.out is not None and Path.cwd().is_relative_to(os.path.realpath(args.out)):  # ., .., /
        fail(f"--out {out if args.out is None else repr(args.out)}: name a folder to make, or a file ending "
             "in .npz")
    if not out.parent.is_dir():
        fail(f"--out {out}: {out.parent} is not a folder")
    return out


def write_pictures(args, generator, saved, digest, folder, device):
    """The images and pictures that the call asks for; images that are there already are not drawn again."""
    conditions, note, data = find_conditions(args, saved, folder)  # a mistake shows before any work
    out = find_out(args, folder)
    # beside images/, so that images/ holds nothing but PNGs
    record, notes = (out.with_name(out.name + suffix) for suffix in (".json", ".jsonl"))
    if out.suffix != ".npz" and args.num > 10 ** 6:
        fail(f"--num {args.num}: the names of a folder's images end at 999999.png; --out NAME.npz takes more")
    folder, written = out.parent, Written(out.parent)
    request = {"num": args.num, "seed": args.seed, "labels": args.labels, "truncation": args.truncation,
               "at": args.at, "text": [text for text, _ in args.told],
               "data": [str(data.folder), data.meta["fingerprint"]] if data else None,
               "held_out": args.held_out, "generator": digest, "step": saved["step"]}
    files = [out] if out.suffix == ".npz" else [out / f"{i:06d}.png" for i in range(args.num)]
    before = read_or_empty(record)
    done = before == request and all(map(written.holds, [*files, notes]))
    prefix = f"{out.name.removesuffix('.npz')}-" if args.out or args.at else ""
    grid, captions, still, moving = (folder / (prefix + name) for name in (
        "grid.png", "captions.png", "interpolation.png", "interpolation.webp"))
    told = saved["model"]["condition"] in ("text", "vector")
    written.check(*[out, record, notes] * bool(args.num and not done), *[grid] * bool(args.grid),
                  *[captions] * bool(args.grid and told), *[still, moving] * bool(args.interpolate))

    def latents_of(numbers):
        z = latents(args.seed, range(4) if args.at else numbers, generator.noise_dim)
        z = truncated(z, args.truncation) if args.truncation else z
        return in_plane(z, *args.at).expand(len(numbers), -1) if args.at else z

    def draw(z, condition):
        return generate(generator, z, condition, saved["dial"], device)

    def blocks():
        for first in tqdm(range(0, args.num, BLOCK), unit_scale=BLOCK, unit="img", disable=None):
            numbers = range(first, min(first + BLOCK, args.num))
            yield first, draw(latents_of(numbers), conditions(numbers))

    if args.num and done:
        print(f"{out} already holds these {args.num} images")
    elif args.num:
        record.unlink(missing_ok=True)
        write_images(out, blocks(), written)
        written.write(notes, "".join(json.dumps({"image": i} | note(i)) + "\n" for i in range(args.num)))
        written.write(record, json.dumps(request, indent=1) + "\n")
        others = f", instead of {plural(before['num'], 'other')}" if before and before != request else ""
        print(f"{out}: {plural(args.num, 'image')} of step {saved['step']}{others}")
    if args.grid:
        pixels = draw(latents_of(range(args.grid)), conditions(range(args.grid)))
        columns = min(math.ceil(math.sqrt(args.grid)), 32)
        written.write(grid, encode(make_grid(pixels, columns), "PNG"))
        print(f"{grid}: images 0 to {args.grid - 1}")
        if told:
            real = data.array("held_out_images" if args.held_out else "images") if data else None
            page = captioned([note(i) for i in range(min(args.grid, 32))], pixels[:32], real)
            written.write(captions, encode(page, "PNG"))
            print(f"{captions}: what was drawn for each caption"
                  + (", and the real image beside it" if data else ""))
    if args.interpolate:
        write_walk(written, still, moving, latents_of(range(args.interpolate)), conditions(range(1)), draw,
                   note(0))


def main():
    steady_output()
    keep_memory()
    args = parse_args()
    on_signals(leave)
    try:
        if args.film:
            write_film(Path(args.film))
        if not args.run:
            return
        path = Path(args.run)
        path = path / "generator.pt" if path.is_dir() else path
        device = torch.device("cpu") if args.export else find_device(args.device)
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            generator, saved = load_generator(path, device)
        except OSError as error:
            when = "with --fid-every" if path.name == "best.pt" else "at its first checkpoint"
            fail(f"--run {args.run}: {error.strerror}: {path}; train.py writes it {when}")
        except ValueError as error:
            fail(f"--run {error}")
        if args.export:
            export(args.export, generator, saved)
        elif saved["model"]["arch"] == "seq":
            write_texts(args, generator, saved, digest, path.parent, device)
        elif args.temperature:
            fail("--temperature: this generator draws images; it is for texts (train.py --arch seq)")
        else:
            check_conditions(args, saved["model"]["condition"])
            if args.explore:
                explore(args, generator, saved, path.parent, device)
            else:
                write_pictures(args, generator, saved, digest, path.parent, device)
    except OSError as error:
        where = error.filename or args.out or args.export or args.run or args.film
        fail(f"{error.strerror or error}: {where}", status_of(error))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        fail("not enough memory: fewer images where they go into one .npz; of a GPU's, --device cpu", 1)


if __name__ == "__main__":
    main()
