"""Draw images from a trained generator: RUN/generator.pt -> RUN/images/*.png, or an .npz; grids and walks.

    python sample.py --run runs/shapes --num 2048
    python sample.py --run runs/digits --num 64 --labels "3,7" --grid
    python sample.py --run runs/shapes --text "a small red circle on a white background" --num 8 --grid
    python sample.py --run runs/shapes --num 0 --interpolate 8
    python sample.py --film runs/shapes

A run with --arch seq has RUN/texts.txt instead, a line a text. Image or text i depends on (seed, i) alone: a larger
--num adds some and leaves the others as they were.
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
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from train import HelpFormatter, advise, latents, load_generator, make_grid, to_pixels, to_texts, whole_file, write_json

BLOCK = 64  # the network always sees so many at once: another batch size would round the last bits in another way
FRAMES = 12  # of the animation, from one point of a walk to the next
FILM = 200  # frames of a film at most


def fail(message):
    """End with one line for the user and status 2."""
    print(f"sample.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.error = lambda message: fail(advise(parser, message))
    add = parser.add_argument_group("run").add_argument
    add("--run", metavar="RUN", help="folder of a run, or a generator's file")
    add("--out", metavar="PATH", help="folder of numbered PNGs, or a file ending in .npz (default: RUN/images)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add = parser.add_argument_group("images").add_argument
    add("--num", type=int, default=64, help="how many images")
    add("--seed", type=int, default=0, help="which images")
    add("--labels", help="classes to draw in turn, by name or number, separated by commas (default: as often as in the "
                         "training data)")
    add("--text", action="append", metavar="CAPTION", help="what to draw; may be given several times, drawn in turn")
    add("--text-file", metavar="FILE", help="the same, a caption a line")
    add("--data", metavar="DATA", help="without --text, whose captions are drawn (default: those of the training data)")
    add("--truncation", type=float, help="largest |z|, from a truncated normal: below 2, safer images that vary less")
    add("--temperature", type=float, default=1.0, help="of texts: below 1, likelier words that vary less")
    add = parser.add_argument_group("pictures, in RUN or in the folder of --out").add_argument
    add("--grid", nargs="?", type=int, const=0, metavar="N", help="grid.png of the first N images (without N: 64, or "
        "as many as --num); where captions are told, captions.png of 32 of them too")
    add("--interpolate", type=int, metavar="POINTS", help="interpolation.png and .webp: a spherical walk through so "
                                                          "many latents and back")
    add("--film", metavar="RUN", help="film.webp in this run: its sample grids, from the first step to the last")
    args = parser.parse_args(argv)
    if not args.run and not args.film:
        fail("--run is missing: the folder of a run")
    if args.grid == 0:
        args.grid = min(64, args.num or 64)
    for name, low, high in (("num", 0, 10 ** 8), ("seed", 0, 2 ** 63), ("grid", 1, 10 ** 4),
                            ("interpolate", 2, 10 ** 3)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            fail(f"--{name} {value}: must lie between {low} and {high}")
    if not 0.01 <= args.temperature <= 100:
        fail(f"--temperature {args.temperature}: must lie between 0.01 and 100")
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


def find_conditions(args, saved, folder):
    """What the images are told: (a function of their numbers -> tensor or None, one of a number -> dict to note)."""
    kind = saved["model"]["condition"]
    if (args.text or args.text_file) and kind not in ("text", "vector"):
        fail("--text: this generator was trained without captions (train.py --condition text)")
    if kind == "none":
        return lambda numbers: None, lambda i: {}
    if kind == "label":
        asked = parse_labels(args.labels, saved["classes"]) if args.labels is not None else None
        share = np.cumsum(saved["class_counts"]) / np.sum(saved["class_counts"])

        def label(i):  # as often as in the training data
            return asked[i % len(asked)] if asked else int(np.searchsorted(
                share, np.random.default_rng([args.seed, i, 1]).random(), side="right"))
        return (lambda numbers: torch.tensor([label(i) for i in numbers]),
                lambda i: {"label": saved["classes"][label(i)]})
    if args.text or args.text_file:
        try:
            lines = Path(args.text_file).read_text(encoding="utf-8", errors="replace") if args.text_file else ""
        except OSError as error:
            fail(f"--text-file {args.text_file}: {error.strerror}")
        args.text = texts = (args.text or []) + [line for line in lines.splitlines() if line.strip()]
        if not all(text.strip() for text in texts):
            fail("--text: an empty caption")
        encoded = encode_texts(texts, saved) if texts else fail(f"--text-file {args.text_file}: no captions in it")
        return lambda numbers: encoded[[i % len(texts) for i in numbers]], lambda i: {"caption": texts[i % len(texts)]}
    try:
        args.data = args.data or json.loads((folder / "config.json").read_text())["options"]["data"]
        data = Path(args.data)
        arrays = np.load(data / ("tokens.npy" if kind == "text" else "embeddings.npy"), mmap_mode="r")
        captions = [json.loads(line)["captions"] for line in open(data / "captions.jsonl", encoding="utf-8")]
        same = json.loads((data / "meta.json").read_text())["vocabulary"] == saved["vocabulary"]
    except (OSError, ValueError, KeyError) as error:
        fail(f"no captions to draw ({error}): name the training data with --data, or captions with --text")
    if not same:
        fail(f"--data {data}: another vocabulary than the generator's")
    order = np.random.default_rng(args.seed).permutation(len(captions))

    def place(i):
        row = int(order[i % len(order)])
        return row, i // len(order) % len(captions[row])
    return (lambda numbers: torch.from_numpy(np.stack([arrays[place(i)] for i in numbers])),
            lambda i: {"row": place(i)[0], "caption": captions[place(i)[0]][place(i)[1]]})


def encode_texts(texts, saved):
    """Captions -> token ids (n, L), or their embeddings (n, d) where the generator was trained on those."""
    if saved["text_encoder"]:
        try:
            from sentence_transformers import SentenceTransformer
            return torch.from_numpy(SentenceTransformer(saved["text_encoder"]).encode(texts)).float()
        except ImportError:
            fail("this generator's captions need a package: pip install sentence-transformers")
        except Exception as error:  # each hub and file fails in its own way
            fail(f"text encoder {saved['text_encoder']}: cannot be loaded ({type(error).__name__}: {error})")
    index = {word: i for i, word in enumerate(saved["vocabulary"])}
    split = [re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower()) for text in texts]  # as prepare_data.py does
    unknown = sorted({word for words in split for word in words if word not in index})
    if unknown:
        print(f"sample.py: not in the training captions: {', '.join(unknown)}", file=sys.stderr)
    tokens = torch.zeros(len(split), max(map(len, split), default=1) or 1, dtype=torch.int64)
    for row, words in zip(tokens, split):
        row[:len(words)] = torch.tensor([index.get(word, 1) for word in words])
    return tokens


def write_captioned(path, notes, pixels, data):
    """A picture of images with what they were told below them, and beside each the real image of that caption."""
    real = np.load(Path(data, "images.npy"), mmap_mode="r") if all("row" in note for note in notes) else None
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
    with whole_file(path) as file:
        page.save(file, "PNG")


def generate(generator, z, conditions, device):
    """uint8 (n, H, W, C) of latents (n, dim) and conditions (n, …) or None."""
    pixels = []
    for i in range(0, len(z), BLOCK):
        block = torch.arange(i, i + BLOCK).clamp(max=len(z) - 1)
        condition = conditions[block].to(device) if conditions is not None else None
        with torch.inference_mode():
            pixels.append(to_pixels(generator(z[block].to(device), condition))[:len(z) - i])
    return np.concatenate(pixels)


def write_texts(args, generator, saved, folder, device):
    """texts.txt, a line each, and texts.json: how they were asked for, and how likely G finds texts it never saw."""
    for name in ("labels", "text", "text_file", "truncation", "grid", "interpolate"):
        if getattr(args, name):
            fail(f"--{name.replace('_', '-')}: not for a generator of texts")
    out, texts = Path(args.out or folder / "texts.txt"), []
    if out.suffix != ".txt":
        fail(f"--out {out}: texts go into a file whose name ends in .txt")
    for first in range(0, args.num, BLOCK):
        z = latents(args.seed, range(first, first + BLOCK), generator.noise_dim).to(device)
        with torch.inference_mode():
            tokens = generator(z, None, args.temperature).argmax(2)
        texts += to_texts(tokens, {"vocabulary": saved["vocabulary"], "level": saved["text_level"]})
    record = {"num": args.num, "seed": args.seed, "temperature": args.temperature, "step": saved["step"]}
    try:
        data = Path(args.data or json.loads((folder / "config.json").read_text())["options"]["data"])
        held_out = torch.from_numpy(np.load(data / "held_out.npy").astype(np.int64))
        if json.loads((data / "meta.json").read_text())["vocabulary"] != saved["vocabulary"]:
            raise ValueError(f"{data} has another vocabulary")
        with torch.inference_mode():
            parts = [generator.likelihood(part.to(device)) for part in held_out.split(BLOCK)]
        losses, counts = (torch.cat(part) for part in zip(*parts))
        record |= {"nll": (losses * counts).sum().item() / counts.sum().item(), "nll_texts": len(held_out)}
    except (OSError, ValueError, KeyError, IndexError) as error:
        print(f"sample.py: no likelihood of held-out texts ({error}): name the training data with --data",
              file=sys.stderr)
    with whole_file(out) as file:
        file.write("".join(text + "\n" for text in texts[:args.num]).encode())
    write_json(out.with_suffix(".json"), record)
    print(f"{out}: {args.num} texts of step {saved['step']}")


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


def write_walk(args, folder, generator, told, device):
    """A closed walk through the first latents: a strip of stills and an animation. One condition all along."""
    z = get_latents(args, generator, range(args.interpolate))
    steps = [slerp(z[i], z[(i + 1) % len(z)], f / FRAMES) for i in range(len(z)) for f in range(FRAMES)]
    first = told(range(1))
    pixels = generate(generator, torch.stack(steps), first.expand(len(steps), *first.shape[1:]) if first is not None
                      else None, device)
    with whole_file(folder / "interpolation.png") as file:
        make_grid(pixels[::FRAMES // 4]).save(file, "PNG")
    scale = max(1, 256 // pixels.shape[1])
    frames = [Image.fromarray(p.squeeze()).resize((p.shape[1] * scale, p.shape[0] * scale), Image.Resampling.NEAREST)
              for p in pixels]
    write_animation(folder / "interpolation.webp", frames, 1000 // FRAMES)
    print(f"{folder / 'interpolation.png'}, {folder / 'interpolation.webp'}: {args.interpolate} latents and between")


def write_animation(path, frames, duration):
    """Pillow images as an animated WebP that repeats; duration: ms, of all or of each."""
    with whole_file(path) as file:
        frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], duration=duration, loop=0, quality=90)


def write_film(run):
    """RUN/film.webp of the grids that train.py drew of the same latents all along, each with its step below."""
    files = sorted((run / "grids").glob("step_*.png"))
    if len(files) < 2:
        fail(f"--film {run}: {len(files)} grids of images in {run / 'grids'}; train.py leaves one every --grid-every "
             f"steps")
    files = [files[round(i)] for i in np.linspace(0, len(files) - 1, min(len(files), FILM))]
    frames, (width, height) = [], Image.open(files[-1]).size
    size = width * max(1, 512 // width), height * max(1, 512 // width)
    for path in files:
        grid = Image.open(path).convert("RGB").resize(size, Image.Resampling.NEAREST)  # --grow begins smaller
        frames.append(Image.new("RGB", (grid.width, grid.height + 14), "white"))
        frames[-1].paste(grid)
        ImageDraw.Draw(frames[-1]).text((4, grid.height + 1), f"step {int(path.stem[5:])}", fill="black")
    write_animation(run / "film.webp", frames, [max(40, 8000 // len(frames))] * (len(frames) - 1) + [2000])
    print(f"{run / 'film.webp'}: {len(frames)} grids")


def get_latents(args, generator, numbers):
    z = latents(args.seed, numbers, generator.noise_dim)
    return truncated(z, args.truncation) if args.truncation else z


def main():
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that `finally` runs
    if args.film:
        try:
            write_film(Path(args.film))
        except OSError as error:
            sys.exit(f"sample.py: {error.strerror or error}: {error.filename or args.film}")
    if not args.run:
        return
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
    if args.temperature != 1 and saved["model"]["arch"] != "seq":
        fail("--temperature: for generators of texts (--arch seq)")
    if saved["model"]["arch"] == "seq":
        try:
            return write_texts(args, generator, saved, folder, device)
        except OSError as error:
            sys.exit(f"sample.py: {error.strerror or error}: {error.filename or args.out}")
    if args.labels is not None and saved["model"]["condition"] != "label":
        fail("--labels: this generator was trained without classes (train.py --condition label)")
    told, note = find_conditions(args, saved, folder)  # a typing error shows before any work
    if out.is_dir() and not all(re.fullmatch(r"\d{6,}\.png", name) for name in os.listdir(out)):
        fail(f"--out {out} holds other files than numbered PNGs: choose another folder")

    if not out.parent.is_dir():
        fail(f"--out {out}: {out.parent} is not a folder")

    # beside images/, so that images/ holds nothing but PNGs
    record = out.with_name(out.name + ".json")
    folder = out.parent
    request = {"num": args.num, "seed": args.seed, "labels": args.labels, "truncation": args.truncation,
               "text": args.text, "data": args.data,
               "generator": digest, "step": saved["step"]}
    try:
        done = out.exists() and json.loads(record.read_text()) == request
    except (OSError, ValueError):
        done = False

    def draw(numbers):
        return generate(generator, get_latents(args, generator, numbers), told(numbers), device)

    def blocks():
        for first in tqdm(range(0, args.num, BLOCK), unit_scale=BLOCK, unit="img", disable=None):
            yield first, draw(range(first, min(first + BLOCK, args.num)))

    try:
        if args.num and done:
            print(f"{out} already holds these {args.num} images")
        elif args.num:
            record.unlink(missing_ok=True)
            write_images(out, blocks())
            with whole_file(out.with_name(out.name + ".jsonl")) as file:  # what each image was told
                file.write("".join(json.dumps({"image": i} | note(i)) + "\n" for i in range(args.num)).encode())
            write_json(record, request)
            print(f"{out}: {args.num} images of step {saved['step']}")
        if args.grid:
            pixels = draw(range(args.grid))
            with whole_file(folder / "grid.png") as file:
                make_grid(pixels, columns=min(math.ceil(math.sqrt(args.grid)), 32)).save(file, "PNG")
            print(f"{folder / 'grid.png'}: the first {args.grid} images")
            if saved["model"]["condition"] in ("text", "vector"):
                pixels = pixels[:32]
                write_captioned(folder / "captions.png", [note(i) for i in range(len(pixels))], pixels, args.data)
                print(f"{folder / 'captions.png'}: what was drawn for each caption"
                      + (", and the real image beside it" if "row" in note(0) else ""))
        if args.interpolate:
            write_walk(args, folder, generator, told, device)
    except OSError as error:
        sys.exit(f"sample.py: {error.strerror or error}: {error.filename or out}")


if __name__ == "__main__":
    main()
