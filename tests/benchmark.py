"""How fast the scripts are against what people would write instead. Prints a table, writes JSON; no timed test.

    python tests/benchmark.py                          # everything, about an hour on 2 cores
    python tests/benchmark.py --rows tutorial bare     # these rows alone
    python tests/benchmark.py --repeats 3 --images 512

Each row times A and B in turn, A B A B …, and gives the median of the ratios of neighbours.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import re
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
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402
import train  # noqa: E402

DCGAN = ("--width", "64", "--batch-size", "64")  # the published network at 64×64
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


def networks():
    torch.manual_seed(0)
    return train.build_networks({
        "arch": "dcgan", "sizes": [64], "channels": 3, "width": 64, "width_d": 64, "extra_convs": 0, "norm_d": "batch",
        "depth": 4, "latent_dim": 100, "condition": "none", "known": 0, "spectral_norm": False, "attention": False,
        "cond_augment": False})


def tutorial(images):
    """Images a second of the tutorial's loop: ImageFolder, DataLoader, BCELoss on a sigmoid, .item() as it goes."""
    G, D = networks()
    loader = torch.utils.data.DataLoader(torchvision.datasets.ImageFolder(images, torchvision.transforms.Compose([
        torchvision.transforms.Resize(64), torchvision.transforms.CenterCrop(64), torchvision.transforms.ToTensor(),
        torchvision.transforms.Normalize((0.5,) * 3, (0.5,) * 3)])), 64, shuffle=True, num_workers=2, drop_last=True)
    criterion = nn.BCELoss()
    g_opt, d_opt = (torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in (G, D))
    step, start = 0, 0.0
    while True:
        for real, _ in loader:
            if step == WARM:
                start = time.perf_counter()
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
            step += 1
            if step == WARM + STEPS:
                return 64 * STEPS / (time.perf_counter() - start)


def beside_bare(folder, data, amp):
    """Rate of train.py over that of the networks' passes and updates on one batch in memory, with nothing else.

    In one process, step by step in turn: what is asked of the data is answered after a bare step.
    """
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


def pairs(a, b, repeats):
    """Ratios a/b of neighbours, measured in turn."""
    return [a() / b() for _ in range(repeats)]


def rows(work, args):
    """name: (what, target, function that gives ratios)."""
    r = args.repeats
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
            linalg.sqrtm(a[1] @ b[1])
            return time.perf_counter() - start

        def ours():
            start = time.perf_counter()
            evaluate.frechet_distance(*a, *b)
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
            lambda: rate_of_run(work, data, *DCGAN, "--amp", "off"), lambda: alone(tutorial, photos.parent), r)),
        "amp": ("the same with --amp auto", 2, lambda: pairs(
            lambda: rate_of_run(work, data, *DCGAN), lambda: alone(tutorial, photos.parent), r)),
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
    parser.add_argument("--repeats", type=int, default=5, help="pairs of measurements a row")
    parser.add_argument("--images", type=int, default=2048, help="images a folder in the row fid")
    parser.add_argument("--out", default="benchmark.json", help="where the figures go")
    args = parser.parse_args()
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
