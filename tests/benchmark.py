"""How fast the scripts are against what people would write instead. Prints a table, writes JSON; no timed test.

    python tests/benchmark.py                          # everything, about an hour on 2 cores
    python tests/benchmark.py --rows tutorial bare     # these rows alone
    python tests/benchmark.py --repeats 3 --images 512
    python tests/benchmark.py --rows quality --fashion DIR --emoji noto-64.zip    # pictures at equal time, two hours

Each row times A and B in turn, A B A B …, and gives the median of the ratios of neighbours.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torchvision
from matplotlib import pyplot as plt
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402
import train  # noqa: E402
from gpu_check import recipes  # noqa: E402

DCGAN = ("--width", "64", "--batch-size", "64")  # the published network at 64×64
# recipes of run_all.sh at constant learning rates, to be stopped by the clock
BY_THE_CLOCK = ("--lr-g", "2e-3", "--lr-d", "1e-3", "--epochs", "1000")
WARM, STEPS = 4, 20  # steps before and in a timing


def call(*command, **environment):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout


def script(name, *options, **environment):
    """Seconds that a script takes as a whole."""
    start = time.perf_counter()
    call(sys.executable, ROOT / name, *options, **environment)
    return time.perf_counter() - start


def rate_of_run(folder, data, *options, launch=(), **environment):
    """Images a second of train.py by the clock of its own log, without the first steps; all but saving included."""
    call(sys.executable, *launch, ROOT / "train.py", "--data", data, "--out", folder / "run", "--resume", "never",
         "--log-every", WARM, "--save-every", WARM + STEPS, "--max-steps", WARM + STEPS, *options, **environment)
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return statistics.harmonic_mean([line["images_per_second"] for line in lines if line["step"] > WARM])


def alone(function, *args):
    """The same in a process of its own, as a script has."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def networks(size=64, channels=3):
    torch.manual_seed(0)
    return train.build_networks({
        "arch": "dcgan", "sizes": [size], "channels": channels, "width": 64, "width_d": 64, "extra_convs": 0,
        "norm_d": "batch", "depth": train.default_depth(size), "latent_dim": 100, "condition": "none", "known": 0,
        "spectral_norm": False, "detail": 0.0, "attention": False, "cond_augment": False, "blocks": None, "width_max": None})


def tutorial(images, size=64, channels=3):
    """The tutorial's loop: ImageFolder, DataLoader, BCELoss on a sigmoid, .item() as it goes. Yields G at each step."""
    G, D = networks(size, channels)
    loader = torch.utils.data.DataLoader(torchvision.datasets.ImageFolder(images, torchvision.transforms.Compose([
        torchvision.transforms.Grayscale(channels) if channels == 1 else nn.Identity(),
        torchvision.transforms.Resize(size), torchvision.transforms.CenterCrop(size), torchvision.transforms.ToTensor(),
        torchvision.transforms.Normalize(0.5, 0.5)])), 64, shuffle=True, num_workers=2, drop_last=True)
    criterion = nn.BCELoss()
    g_opt, d_opt = (torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in (G, D))
    while True:
        for real, _ in loader:
            D.zero_grad()
            output = D(real)[0].sigmoid()
            loss_real = criterion(output, torch.full((64,), 1.0))
            loss_real.backward()
            output.mean().item()
            fake = G(torch.randn(64, 100))
            output = D(fake.detach())[0].sigmoid()
            loss_fake = criterion(output, torch.full((64,), 0.0))
            loss_fake.backward()
            output.mean().item()
            d_opt.step()
            G.zero_grad()
            output = D(fake)[0].sigmoid()
            loss = criterion(output, torch.full((64,), 1.0))
            loss.backward()
            g_opt.step()
            (loss_real + loss_fake).item(), loss.item(), output.mean().item()
            yield G


def rate_of_tutorial(images):
    """Images a second of the tutorial's loop."""
    steps, start = tutorial(images), 0.0
    for step in range(1, WARM + STEPS + 1):
        next(steps)
        if step == WARM:
            start = time.perf_counter()
    return 64 * STEPS / (time.perf_counter() - start)


# ---- pictures at equal time --------------------------------------------------------------------------------

def drawn_by_tutorial(folder, images, meta, minutes, count):
    """Paths of `count` images drawn by the tutorial's G after each of so many minutes of training."""
    steps, trained, paths = tutorial(images, meta["size"], meta["channels"]), 0.0, []
    for minute in minutes:
        start = time.perf_counter() - trained
        while time.perf_counter() - start < 60 * minute:
            G = next(steps)
        trained = time.perf_counter() - start
        with torch.no_grad():  # in training mode, as the tutorial draws
            drawn = np.concatenate([train.to_pixels(G(torch.randn(64, 100))) for _ in range(-(-count // 64))])
        paths.append(folder / f"tutorial-{minute}.npz")
        np.savez(paths[-1], images=drawn[:count])
    return paths


def drawn_by_ours(folder, data, recipe, minutes, count):
    """The same of train.py with a recipe's options, stopped by a signal and called again: starting counts."""
    trained, paths = 0.0, []
    command = [sys.executable, ROOT / "train.py", "--data", data, "--out", folder / "run", *recipes()[recipe][1], *BY_THE_CLOCK]
    for minute in minutes:
        start = time.perf_counter()
        process = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60 * minute - trained)
        process.send_signal(signal.SIGTERM)
        if process.wait() != 75:
            sys.exit(f"train.py ended with {process.returncode}")
        trained += time.perf_counter() - start
        paths.append(folder / f"ours-{minute}.npz")
        call(sys.executable, ROOT / "sample.py", "--run", folder / "run", "--num", count, "--out", paths[-1])
    return paths


def quality(work, name, recipe, source, args):
    """{who: [[minute, FID], …]} of the tutorial and train.py, trained in turn, the floor, and n of all these."""
    data, folder = work / name, work / f"{name}-quality"
    call(sys.executable, ROOT / "prepare_data.py", *source, "--size", "32", "--out", data)
    rows, meta = np.load(data / "images.npy", mmap_mode="r"), json.loads((data / "meta.json").read_text())
    (folder / "png" / "all").mkdir(parents=True)
    for i, row in enumerate(rows):
        Image.fromarray(row.squeeze()).save(folder / "png" / "all" / f"{i:05d}.png")
    minutes = [m for m in (2, 5) if m < args.minutes] + [args.minutes]
    count = min(args.num, len(rows))
    paths = {"tutorial": drawn_by_tutorial(folder, folder / "png", meta, minutes, count),
             "train.py": drawn_by_ours(folder, data, recipe, minutes, count)}

    def curve(paths):
        return [[minute, evaluate.fid_against_data(np.load(path)["images"], data, count, torch.device("cpu"))]
                for minute, path in zip(minutes, paths)]
    weights = evaluate.find_weights()
    network = evaluate.load_inception(weights, torch.device("cpu"))
    real = evaluate.real_statistics(network, evaluate.Data(data), count, True, torch.device("cpu"))
    return {who: curve(p) for who, p in paths.items()} | {"floor": real["floor"], "n": real["floor_n"]}


def plot_quality(curves, path):
    """FID by minute of each set of images, side by side, logarithmic."""
    figure, axes = plt.subplots(1, len(curves), figsize=(5 * len(curves), 3.6), squeeze=False)
    for ax, (name, found) in zip(axes[0], curves.items()):
        for who, colour in (("tutorial", "#b0532a"), ("train.py", "#2a5db0")):
            minutes, fids = zip(*found[who])
            ax.plot(minutes, fids, "o-", color=colour, label=who)
            ax.annotate(f"{fids[-1]:.1f}", (minutes[-1], fids[-1]), (4, 5), textcoords="offset points", color=colour, ha="right")
        ax.axhline(found["floor"], color="#777777", linestyle=":", label="real against real")
        ax.set(title=name, xlabel="minutes of training", ylabel="FID", yscale="log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(plt.LogLocator(subs=(2, 5)))
        ax.yaxis.set_minor_formatter("{x:g}")
        ax.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def beside_bare(folder, data, amp):
    """Rate of train.py over that of the networks' passes and updates on one batch in memory, with nothing else.

    In one process, step by step in turn: what is asked of the data is answered after a bare step.
    """
    train.keep_memory()  # as each process of the scripts
    G, D = (net.to(memory_format=torch.channels_last) for net in networks())
    g_opt, d_opt = (torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999), fused=True) for net in (G, D))
    real = torch.rand(64, 3, 64, 64).to(memory_format=torch.channels_last)
    bce = nn.functional.binary_cross_entropy_with_logits

    def bare():
        with torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16"):
            fake = G(torch.randn(64, 100))
            loss = bce(D(real)[0], torch.ones(64)) + bce(D(fake.detach())[0], torch.zeros(64))
        loss.backward(inputs=list(D.parameters()))
        d_opt.step()
        d_opt.zero_grad()
        D.requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16"):
            loss = bce(D(fake)[0], torch.ones(64))
        loss.backward()
        D.requires_grad_(True)
        g_opt.step()
        g_opt.zero_grad()

    times, batches = [], train.batches

    def in_turn(run, start):
        begin = time.perf_counter()
        for batch in batches(run, start):
            asked = time.perf_counter()
            bare()
            end = time.perf_counter()
            times.append((end - asked, asked - begin))
            begin = end
            yield batch

    train.batches = in_turn
    sys.argv = ["train.py", "--data", str(data), "--out", str(folder / "run"), "--resume", "never", "--amp", amp,
                "--log-every", "5", "--max-steps", str(WARM + STEPS), *DCGAN]
    with contextlib.redirect_stdout(None):
        train.main()
    bare_seconds, ours = np.array(times[WARM:]).sum(0)
    return bare_seconds / ours


def loader_seconds(images):
    """Seconds of ImageFolder, Resize and CenterCrop through a DataLoader of 2 workers."""
    start = time.perf_counter()
    loader = torch.utils.data.DataLoader(torchvision.datasets.ImageFolder(images, torchvision.transforms.Compose([
        torchvision.transforms.Resize(64), torchvision.transforms.CenterCrop(64), torchvision.transforms.PILToTensor()])),
        64, num_workers=2)
    for _ in loader:
        pass
    return time.perf_counter() - start


def sampling_floor(run, count):
    """Seconds of the forward passes plus the encoding spread over the cores."""
    generator, _ = train.load_generator(run / "generator.pt")
    start = time.perf_counter()
    with torch.inference_mode():
        for _ in range(0, count, 64):
            images = generator(torch.randn(64, generator.noise_dim))
    forward = time.perf_counter() - start
    pixels = train.to_pixels(images)
    start = time.perf_counter()
    for image in pixels:
        Image.fromarray(image).save(run / "one.png", compress_level=4)
    return forward + (time.perf_counter() - start) * count / len(pixels) / os.cpu_count()


def make_data(folder, count, size):
    """DATA of so many images; a large one is a sparse file, which reads as zeros."""
    folder.mkdir()
    with open(folder / "images.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False,
                                                    "shape": (count, size, size, 3)})
        file.truncate(file.tell() + count * size * size * 3)
    (folder / "meta.json").write_text(json.dumps({"name": "zeros", "count": count, "size": size, "channels": 3,
                                                  "classes": None, "vocabulary": None, "fingerprint": str(count)}))
    return folder


def anonymous_memory(folder, data):
    """MiB of train.py's own memory at its end; pages of the map belong to the system's cache."""
    said = call(sys.executable, "-c", "import sys, train; train.main(); print(open('/proc/self/status').read())",
                "--data", data, "--out", folder / "run", "--resume", "never", "--max-steps", "300", "--batch-size", "64",
                "--width", "8", PYTHONPATH=str(ROOT))
    return int(re.search(r"RssAnon:\s+(\d+)", said)[1]) / 1024


def pictures(args, work):
    """The tutorial's FID over that of train.py after the same time, a ratio a set of images."""
    curves = {}
    for name, recipe, root in (("fashion-mnist", "fashion-mnist", args.fashion), ("emoji", "folder", args.emoji)):
        if root:
            curves[name] = quality(work, name, recipe, [recipe, "--root", root], args)
            print(name, json.dumps(curves[name]), flush=True)
    plot_quality(curves, ROOT / "docs" / "quality.png")
    Path(args.out).with_suffix(".quality.json").write_text(json.dumps(curves, indent=1) + "\n")
    return [found["tutorial"][-1][1] / found["train.py"][-1][1] for found in curves.values()]


def pairs(a, b, repeats):
    """Ratios a/b of neighbours, measured in turn."""
    return [a() / b() for _ in range(repeats)]


def rows(work, args):
    """name: (what, target, function that gives ratios)."""
    r = args.repeats
    if args.rows == ["quality"]:
        return {"quality": ("FID of the tutorial against the recipe fashion-mnist after the same time", 2,
                            lambda: pictures(args, work))}
    photos = work / "photos" / "all"
    photos.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(3000):  # smooth pictures with some texture, of CelebA's size
        small = Image.fromarray(rng.integers(0, 255, (14, 11, 3), np.uint8)).resize((178, 218), Image.Resampling.BICUBIC)
        grain = np.asarray(small, np.int16) + rng.integers(-6, 7, (218, 178, 1))
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(photos / f"{i:05d}.jpg", quality=90)
    data = work / "data"
    call(sys.executable, ROOT / "prepare_data.py", "folder", "--root", photos.parent, "--size", "64", "--out", data)
    few, many = make_data(work / "few", 1_000, 32), make_data(work / "many", 1_000_000, 32)
    small = ("--width", "16", "--batch-size", "64", "--log-every", "50", "--max-steps", "400")
    bf16 = "bf16" if train.find_precision("auto", torch.device("cpu")) == "bf16" else "off"

    def prepare():
        call("rm", "-rf", work / "made")
        return script("prepare_data.py", "folder", "--root", photos.parent, "--size", "64", "--out", work / "made")

    def folders():
        for name, shift in (("a", 0), ("b", 30)):
            (work / name).mkdir(exist_ok=True)
            for i in range(args.images):
                Image.fromarray(rng.integers(shift, 256, (64, 64, 3), np.uint8)).save(work / name / f"{i:05d}.png")
        return work / "a", work / "b"

    def official_fid():
        cache = work / "torch" / "hub" / "checkpoints"
        cache.mkdir(parents=True, exist_ok=True)
        target = cache / os.path.basename(evaluate.fid_inception.FID_WEIGHTS_URL)
        if not target.exists():
            os.symlink(evaluate.find_weights().resolve(), target)
        start = time.perf_counter()
        call(sys.executable, "-m", "pytorch_fid", work / "a", work / "b", TORCH_HOME=str(work / "torch"))
        return time.perf_counter() - start

    def ours_fid():
        return script("evaluate.py", "--images", work / "a", "--reference", work / "b", "--out", work / "fid.json")

    def distances():
        from scipy import linalg
        a, b = (evaluate.statistics(rng.standard_normal((2100, 2048), np.float32)) for _ in range(2))

        def scipy():
            start = time.perf_counter()
            linalg.sqrtm(a["sigma"] @ b["sigma"])
            return time.perf_counter() - start

        def ours():
            start = time.perf_counter()
            evaluate.frechet_distance(a, b)
            return time.perf_counter() - start
        return pairs(scipy, ours, r)

    def sampling():
        rate_of_run(work, data, *DCGAN)
        return pairs(lambda: alone(sampling_floor, work / "run", 10_000), lambda: script(
            "sample.py", "--run", work / "run", "--num", "10000", "--out", work / f"s{time.time_ns()}"), r)

    def checkpoint_share():
        call(sys.executable, ROOT / "train.py", "--data", data, "--out", work / "save", "--max-steps", "6", *DCGAN)
        files = {name: train.load_file(work / "save" / name) for name in ("checkpoint.pt", "generator.pt")}
        start = time.perf_counter()
        for name, content in files.items():
            train.write_torch(work / "save" / name, content)
        seconds = time.perf_counter() - start
        ms = json.loads((work / "save" / "log.jsonl").read_text().splitlines()[-1])["ms_min"]
        return [seconds / (1000 * ms / 1000)]  # a save every 1,000 steps

    return {
        "tutorial": ("dcgan 64×64 fp32 against the tutorial's loop, images/s", 1.25, lambda: pairs(
            lambda: rate_of_run(work, data, *DCGAN, "--amp", "off"), lambda: alone(rate_of_tutorial, photos.parent), r)),
        "amp": ("the same with --amp auto", 2, lambda: pairs(
            lambda: rate_of_run(work, data, *DCGAN), lambda: alone(rate_of_tutorial, photos.parent), r)),
        "bare": ("images/s against the bare step, fp32", 0.97, lambda: [
            alone(beside_bare, work, data, "off") for _ in range(r)]),
        "bare-amp": ("the same with --amp auto", 0.97, lambda: [
            alone(beside_bare, work, data, bf16) for _ in range(r)]),
        "size": ("1,000,000 images in DATA against 1,000, images/s", 0.97, lambda: pairs(
            lambda: rate_of_run(work, many, *small), lambda: rate_of_run(work, few, *small), r)),
        "memory": ("the same, memory of the process", 1, lambda: pairs(
            lambda: anonymous_memory(work, many), lambda: anonymous_memory(work, few), 1)),
        "log": ("--log-every 1 against 50, images/s", 0.95, lambda: pairs(
            lambda: rate_of_run(work, few, *small, "--log-every", "1"), lambda: rate_of_run(work, few, *small), r)),
        "processes": ("two processes of 1 thread against one of 2, images/s", 0.85, lambda: pairs(
            lambda: rate_of_run(work, data, *DCGAN, launch=("-m", "torch.distributed.run", "--standalone",
                                                            "--nproc_per_node=2"), OMP_NUM_THREADS="1"),
            lambda: rate_of_run(work, data, *DCGAN, OMP_NUM_THREADS="2"), r)),
        "prepare": ("ImageFolder and DataLoader against prepare_data.py on 3,000 JPEGs, seconds", 1.5, lambda: pairs(
            lambda: alone(loader_seconds, photos.parent), prepare, r)),
        "frechet": ("SciPy's sqrtm against the Fréchet distance, seconds", 5, distances),
        "sample": ("passes and encoding against sample.py, 10,000 PNGs, seconds", 0.8, sampling),
        "save": ("share of the time that saving takes at the default interval", 0.01, checkpoint_share),
        "fid": (f"python -m pytorch_fid against evaluate.py on 2 × {args.images} images, seconds", 1.4, lambda: (
            folders(), pairs(official_fid, ours_fid, min(r, 3)))[1])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", help="which rows (default: all)")
    parser.add_argument("--minutes", type=float, default=10, help="of training each in the row quality")
    parser.add_argument("--num", type=int, default=10_000, help="images of each side in the row quality")
    parser.add_argument("--fashion", help="folder of Fashion-MNIST for the row quality, as torchvision keeps it")
    parser.add_argument("--emoji", help="folder or archive of images for the row quality")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of measurements a row")
    parser.add_argument("--images", type=int, default=2048, help="images a folder in the row fid")
    parser.add_argument("--out", default="benchmark.json", help="where the figures go")
    args = parser.parse_args()
    if args.rows == ["quality"] and not (args.fashion or args.emoji):
        parser.error("--rows quality takes --fashion, --emoji or both")
    with tempfile.TemporaryDirectory() as work:
        table = rows(Path(work), args)
        result = {"machine": f"{os.cpu_count()} cores, {platform.machine()}", "python": platform.python_version(),
                  "torch": torch.__version__, "rows": {}}
        print(f"{'what':90} {'median':>8} {'target':>7}   all")
        for name, (what, target, measure) in table.items():
            if not args.rows or name in args.rows:
                ratios = measure()
                result["rows"][name] = {"what": what, "target": target, "median": statistics.median(ratios),
                                        "ratios": ratios}
                print(f"{what:90} {statistics.median(ratios):8.3f} {target:7}   "
                      + " ".join(f"{x:.3f}" for x in ratios), flush=True)
                Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
