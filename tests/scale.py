"""How many GPUs pay for a batch: a step's time by a model, and what all-reduces take here. A table, half a minute.

    python tests/scale.py

The model: a step of dcgan 64×64 in bf16 takes FIXED + IMAGE × images of a process (from two batches measured on one
H100), and what processes say to each other: a message of G's gradients, one of D's, one for each normalisation that
is passed forward or backward. An all-reduce takes LATENCY + 2 (n-1)/n × bytes / BANDWIDTH; both are assumed.
"""

import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402

FIXED, IMAGE = 1.61e-3, 9.7e-6  # seconds: batches of 64 in 2.23 ms, of 128 in 2.85 ms
GRADIENTS = 3.58e6 * 4, 2.77e6 * 4  # bytes of G and D
NORMS, NORM = 26, 3 * 256 * 4  # 4 in G twice; 3 in D twice for D, real and fake, and twice for G; bytes of each
NODE, NODES = (15e-6, 300e9), (40e-6, 40e9)  # latency, bandwidth: of 8 GPUs by NVLink; between nodes
WORLDS, BATCHES = (1, 2, 4, 8, 16, 32, 64, 128), (128, 1024, 8192)


def schedule(world, batch, row=64 * 64 * 3):
    """Bytes that each process reads a step, having seen that together they read each row of the batch once."""
    rows = [train.Run.own(SimpleNamespace(args=SimpleNamespace(grad_accum=1), world=world, rank=rank), np.arange(batch))
            for rank in range(world)]
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(batch))
    return len(rows[0]) * row


def all_reduce(size, n, latency, bandwidth):
    return latency + 2 * (n - 1) / n * size / bandwidth if n > 1 else 0.0


def step(batch, n):
    """Seconds of a step of so many images on n GPUs."""
    link = NODE if n <= 8 else NODES
    said = sum(all_reduce(size, n, *link) for size in GRADIENTS) + NORMS * all_reduce(NORM, n, *link)
    return FIXED + IMAGE * batch / n + said


def timed(rank, world, meeting, sizes, found):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    for i, size in enumerate(sizes):
        x, times = torch.zeros(int(size) // 4), []
        for _ in range(12):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(x)
            times.append(time.perf_counter() - start)
        found[i] = sorted(times)[6]
    dist.destroy_process_group()


def main():
    print(f"1,000 processes, batch 8,000 of 64×64: {schedule(1000, 8000) / 1e3:.0f} kB a process and step, each row once\n")
    print("all-reduce by gloo on this machine, median of 12")
    sizes = NORM, sum(GRADIENTS)
    for world in (2, 4):
        found = mp.get_context("spawn").Array("d", len(sizes))
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(timed, (world, f"{folder}/meeting", sizes, found), nprocs=world)
        print(f"  {world} processes   " + "   ".join(f"{size / 1e3:.0f} kB {1e3 * t:.2f} ms" for size, t in zip(sizes, found)))
    print("\nthe model's images/s, and of n times that of one GPU\n| GPUs |" + "".join(f" batch {b} |" for b in BATCHES))
    for n in WORLDS:
        cells = (f" {b / step(b, n):,.0f} ({step(b, 1) / step(b, n) / n:.0%}) |" if b >= n else " |" for b in BATCHES)
        print(f"| {n} |" + "".join(cells))


if __name__ == "__main__":
    main()
