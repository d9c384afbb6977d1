"""Draw images from a trained generator: RUN/generator.pt -> RUN/images/*.png, or an .npz; grids and walks.

    python sample.py --run runs/shapes --num 2048
    python sample.py --run runs/shapes --num 64 --labels "red circle,blue star" --grid
    python sample.py --run runs/shapes --num 0 --interpolate 8

Image i depends on (seed, i) alone: a larger --num adds images and leaves the others as they were.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from train import HelpFormatter, latents, load_generator, make_grid, to_pixels, whole_file, write_json

BLOCK = 64  # the network always sees so many at once: another batch size would round the last bits in another way
FRAMES = 12  # of the animation, from one point of a walk to the next


def fail(message):
    """End with one line for the user and status 2."""
    print(f"sample.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (--help lists the options)")
    add = parser.add_argument_group("run").add_argument
    add("--run", required=True, metavar="RUN", help="folder of a run, or a generator's file")
    add("--out", metavar="PATH", help="folder of numbered PNGs, or a file ending in .npz (default: RUN/images)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add = parser.add_argument_group("images").add_argument
    add("--num", type=int, default=64, help="how many images")
    add("--seed", type=int, default=0, help="which images")
    add("--labels", help="classes to draw in turn, by name or number, separated by commas (default: as often as in the "
                         "training data)")
    add("--truncation", type=float, help="largest |z|, from a truncated normal: below 2, safer images that vary less")
    add = parser.add_argument_group("pictures, beside the images").add_argument
    add("--grid", nargs="?", type=int, const=64, help="grid.png of the first so many images (64 without a number)")
    add("--interpolate", type=int, metavar="POINTS", help="interpolation.png and .webp: a spherical walk through so "
                                                          "many latents and back")
    args = parser.parse_args(argv)
    for name, low, high in (("num", 0, 10 ** 8), ("seed", 0, 2 ** 63), ("grid", 1, 10 ** 4),
                            ("interpolate", 2, 10 ** 3)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            fail(f"--{name} {value}: must lie between {low} and {high}")
    if args.truncation is not None and not 0 < args.truncation <= 100:
        fail(f"--truncation {args.truncation}: must lie between 0 and 100")
    return args


def truncated(z, limit):
    """Map normal z to the normal distribution truncated at ±limit: by its quantiles, so that order is kept."""
    low, high = (torch.special.ndtr(torch.tensor(side, dtype=torch.float64)) for side in (-limit, limit))
    return torch.special.ndtri(low + (high - low) * torch.special.ndtr(z.double())).clamp(-limit, limit).float()


def slerp(a, b, share):
    """The point `share` of the way from vector a to b along a great circle (Shoemake 1985)."""
    angle = torch.arccos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
    if angle.sin().abs() < 1e-6:
        return torch.lerp(a, b, share)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def parse_labels(text, classes):
    """'red circle,3' -> [class numbers]; refuses what is not a class."""
    if not classes:
        fail("--labels: this generator was trained without classes (train.py --condition label)")
    numbers = []
    for word in (w.strip() for w in text.split(",")):
        if word in classes:
            numbers.append(classes.index(word))
        elif word.isdigit() and int(word) < len(classes):
            numbers.append(int(word))
        else:
            fail(f"--labels {word}: not one of the {len(classes)} classes ({', '.join(classes[:30])}"
                 f"{' …' if len(classes) > 30 else ''})")
    return numbers


def draw_labels(args, saved, numbers):
    """A class for each image number, or None: --labels in turn, else drawn as often as in the training data."""
    if not saved["model"]["classes"]:
        return None
    if args.labels is not None:
        asked = parse_labels(args.labels, saved["classes"])
        return torch.tensor([asked[i % len(asked)] for i in numbers])
    share = np.cumsum(saved["class_counts"]) / np.sum(saved["class_counts"])
    draws = [np.random.default_rng([args.seed, i, 1]).random() for i in numbers]
    return torch.from_numpy(np.searchsorted(share, draws, side="right"))


def generate(generator, z, labels, device):
    """uint8 (n, H, W, C) of latents (n, dim) and classes (n,) or None."""
    pixels = []
    for i in range(0, len(z), BLOCK):
        block = torch.arange(i, i + BLOCK).clamp(max=len(z) - 1)
        condition = labels[block].to(device) if labels is not None else None
        with torch.inference_mode():
            pixels.append(to_pixels(generator(z[block].to(device), condition))[:len(z) - i])
    return np.concatenate(pixels)


def write_png(path, pixels):
    Image.fromarray(pixels.squeeze()).save(path, compress_level=4)


def write_images(out, blocks):
    """Blocks of (first number, pixels (n, H, W, C)) into a folder of PNGs or an .npz; appears whole or not at all."""
    if out.suffix == ".npz":
        with whole_file(out) as file:
            np.savez(file, images=np.concatenate([pixels for _, pixels in blocks]))
        return
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            waiting = []
            for first, pixels in blocks:
                list(waiting)  # a block behind: errors of the disk surface, memory stays bounded
                waiting = pool.map(write_png, [partial / f"{first + i:06d}.png" for i in range(len(pixels))], pixels)
            list(waiting)
        shutil.rmtree(out, ignore_errors=True)
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_walk(args, folder, generator, saved, device):
    """A closed walk through the first latents: a strip of stills and an animation. One class all along."""
    z = get_latents(args, saved, range(args.interpolate))
    steps = [slerp(z[i], z[(i + 1) % len(z)], f / FRAMES) for i in range(len(z)) for f in range(FRAMES)]
    labels = draw_labels(args, saved, range(1))
    pixels = generate(generator, torch.stack(steps), labels.expand(len(steps)) if labels is not None else None, device)
    with whole_file(folder / "interpolation.png") as file:
        make_grid(pixels[::FRAMES // 4]).save(file, "PNG")
    scale = max(1, 256 // pixels.shape[1])
    frames = [Image.fromarray(p.squeeze()).resize((p.shape[1] * scale, p.shape[0] * scale), Image.Resampling.NEAREST)
              for p in pixels]
    with whole_file(folder / "interpolation.webp") as file:
        frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], duration=1000 // FRAMES, loop=0,
                       quality=90)
    print(f"{folder / 'interpolation.png'}, {folder / 'interpolation.webp'}: {args.interpolate} latents and between")


def get_latents(args, saved, numbers):
    z = latents(args.seed, numbers, saved["model"]["latent_dim"])
    return truncated(z, args.truncation) if args.truncation else z


def main():
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that `finally` runs
    path = Path(args.run)
    path = path / "generator.pt" if path.is_dir() else path
    folder = path.parent
    out = Path(args.out) if args.out else folder / "images"
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else
                              "mps" if torch.backends.mps.is_available() else "cpu")
        generator, saved = load_generator(path, device)
    except OSError as error:
        fail(f"--run {args.run}: {error.strerror}: {path}; train.py writes it at its first checkpoint")
    except ValueError as error:
        fail(f"--run {error}")
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device}: not usable here ({str(error).splitlines()[0]})")
    if args.labels is not None:
        parse_labels(args.labels, saved["classes"])  # a typing error before any work
    if out.is_dir() and not all(re.fullmatch(r"\d{6,}\.png", name) for name in os.listdir(out)):
        fail(f"--out {out} holds other files than numbered PNGs: choose another folder")

    if not out.parent.is_dir():
        fail(f"--out {out}: {out.parent} is not a folder")

    # beside images/, so that images/ holds nothing but PNGs
    record = out.with_name(out.name + ".json")
    request = {"num": args.num, "seed": args.seed, "labels": args.labels, "truncation": args.truncation,
               "generator": digest, "step": saved["step"]}
    try:
        done = out.exists() and json.loads(record.read_text()) == request
    except (OSError, ValueError):
        done = False

    def draw(numbers):
        return generate(generator, get_latents(args, saved, numbers), draw_labels(args, saved, numbers), device)

    def blocks():
        for first in tqdm(range(0, args.num, BLOCK), unit_scale=BLOCK, unit="img", disable=None):
            yield first, draw(range(first, min(first + BLOCK, args.num)))

    try:
        if args.num and done:
            print(f"{out} already holds these {args.num} images")
        elif args.num:
            record.unlink(missing_ok=True)
            write_images(out, blocks())
            write_json(record, request)
            print(f"{out}: {args.num} images of step {saved['step']}")
        if args.grid:
            with whole_file(folder / "grid.png") as file:
                make_grid(draw(range(args.grid)), columns=min(math.ceil(math.sqrt(args.grid)), 32)).save(file, "PNG")
            print(f"{folder / 'grid.png'}: the first {args.grid} images")
        if args.interpolate:
            write_walk(args, folder, generator, saved, device)
    except OSError as error:
        sys.exit(f"sample.py: {error.strerror or error}: {error.filename or out}")


if __name__ == "__main__":
    main()
