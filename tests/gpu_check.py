"""Does train.py on this machine's GPUs what it does on a CPU? A table, five minutes on one fast GPU.

    bash run_all.sh gpu-check                          # every recipe's network, status 1 where a check fails
    python tests/gpu_check.py --recipes shapes mnist   # these alone

Each recipe of run_all.sh is trained on random images in fp32, bf16 and fp16, as written and as a CUDA graph, with
every wait for the GPU an error; then a run is interrupted and resumed, made by two processes, and FID compared with
the CPU's. Without a GPU the small networks run as they are written, and the rest is said to be left out.
"""

import argparse
import contextlib
import gc
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402
import train  # noqa: E402

GPU = torch.cuda.is_available()
SMALL = "shapes", "mnist", "mnist-deep", "captions"  # what a CPU steps through in seconds
STEPS = 24  # timed


def recipes():
    """{name: (what is prepared, train.py's options)} of run_all.sh."""
    text = (ROOT / "run_all.sh").read_text()
    cases = text[text.index("small=("):text.index("\nesac\n") + 6]
    names = [name for name in re.findall(r"^    ([a-z0-9-]+)\)", cases, re.M) if name not in ("tests", "gpu-check")]
    found = {}
    for name in names:
        said = subprocess.run(["bash", "-c", f'recipe={name}\n{cases}\nprintf "%s\\n" "${{prepare[*]}}" "${{train[*]}}"'],
                              capture_output=True, text=True, check=True).stdout
        found[name] = tuple(shlex.split(line) for line in said.splitlines())
    return found


def make_data(folder, prepare, count):
    """DATA of random images, or texts, as the recipe's own would be."""
    rng, size = np.random.default_rng(0), int((prepare + ["32"])[prepare.index("--size") + 1 if "--size" in prepare else -1])
    meta = {"name": "random", "count": count, "size": None, "channels": None, "classes": None,
            "vocabulary": ["", "?", *"abcdefgh"], "fingerprint": "", "level": "word"}
    if prepare[0] == "text":
        meta |= {"length": 16}
        np.save(folder / "tokens.npy", rng.integers(2, 10, (count, 16)))
    else:
        channels = 1 if "mnist" in prepare[0] and prepare[0] != "stacked-mnist" else 3
        meta |= {"size": size, "channels": channels, "classes": [str(i) for i in range(10)]}
        np.save(folder / "images.npy", rng.integers(0, 256, (count, size, size, channels), dtype=np.uint8))
        np.save(folder / "labels.npy", rng.integers(0, 10, count))
        np.save(folder / "tokens.npy", rng.integers(2, 10, (count, 2, 8)))
    (folder / "meta.json").write_text(json.dumps(meta))


def make(data, options, amp, parts):
    """Run and State of a recipe on these data, its batch in so many parts."""
    short = ["--burn-in", "1e4"] if "--burn-in" in options else []  # these data are few
    args = train.parse_args(["--data", str(data), "--out", str(data / "run"), *options, "--amp", amp, *short,
                             "--grad-accum", str(parts),
                             *([] if GPU else ["--batch-size", "16", "--device", "cpu"])])
    run = train.make_run(args)
    return run, train.make_state(run)


def warm(run):
    """Steps after which each kind of step is replayed: the fourth of a kind is recorded."""
    return 4 * run.args.penalty_interval + 2


def steps(run, state, count, graphs, forbid=False):
    """Train until all is warm, and so many steps more; returns seconds a step of these.

    forbid: there waiting for the GPU is an error.
    """
    step, data, began = run.data.step, train.batches(run, 0), time.perf_counter()
    step = train.graphed(step) if graphs else step
    for i in range(warm(run) + count):
        if i == warm(run):
            if GPU:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error" if forbid else "default")
            began = time.perf_counter()
        step(run, state, *train.prepare_step(run, state), *next(data))
        state.step += 1
    if GPU:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / count


def fastest(run, state, graphs):
    """Images a second, and the most memory (GiB) that it took, with kernels chosen by trial as train.py does."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=True):
        rate = run.args.batch_size / steps(run, state, STEPS, graphs, forbid=True)
    return rate, torch.cuda.max_memory_allocated() / 2**30 if GPU else 0


def difference(one, other):
    """The largest between two generators' weights, as a share of the largest weight."""
    a, b = one.G.weights.float(), other.G.weights.float()
    return float((a - b).abs().max() / a.abs().max())


def check_recipe(folder, options, amp):
    """One row of the table, of the batch as a whole or in as few parts as fit: what to print, whether it holds."""
    if amp == "fp16" and {"--r1", "--gp", "relativistic"} & {*options}:
        return "left out: squared gradients leave the range of fp16", True
    for parts in (1, 4, 16):
        try:
            said, good = check_parts(folder, options, amp, parts)
            return said + (f"   in {parts} parts" if parts > 1 else ""), good
        except torch.OutOfMemoryError:
            pass
        gc.collect()
        torch.cuda.empty_cache()
    return "left out: does not fit into this GPU's memory", True


def check_parts(folder, options, amp, parts):
    run, state = make(folder, options, amp, parts)
    eager, memory = fastest(run, state, graphs=False)
    finite, graphs = bool(torch.isfinite(state.G.weights).all()), state.G.optimizer.defaults["capturable"]
    if not GPU:
        return f"{eager:7.0f} images/s", finite
    row = f"{eager:8.0f} images/s {memory:5.1f} GiB"
    if graphs:
        run, state = make(folder, options, amp, parts)
        rate, memory = fastest(run, state, graphs=True)
        row += f"   graphs {rate:8.0f} images/s {memory:5.1f} GiB"
    states = []
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True):
        for graph in (False, False, graphs):
            run, state = make(folder, options, amp, parts)
            steps(run, state, 2, graph)
            states.append(state)
    noise, apart = difference(*states[:2]), difference(*states[1:])
    return f"{row}   apart by {apart:.0e}, two eager ones by {noise:.0e}", finite and apart <= 3 * noise


def check_resume(folder, options):
    """Interrupted by SIGTERM and called again, a run ends as if it never had been."""
    base = [sys.executable, str(ROOT / "train.py"), "--data", str(folder), *options, "--max-steps", "400", "--log-every", "20",
            "--save-every", "100"]
    subprocess.run([*base, "--out", str(folder / "whole")], check=True, capture_output=True)
    process = subprocess.Popen([*base, "--out", str(folder / "cut")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folder / "cut" / "log.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    status = process.wait()
    at = json.loads((folder / "cut" / "status.json").read_text())["step"]
    subprocess.run([*base, "--out", str(folder / "cut")], check=True, capture_output=True)
    one, other = (train.load_file(folder / name / "checkpoint.pt")["G"]["net"] for name in ("whole", "cut"))
    apart = max(float((one[k].float() - other[k].float()).abs().max()) for k in one)
    return f"status {status} at step {at} of 400, apart by {apart:.0e} in the end", status == train.TRY_AGAIN and apart < 0.05


def check_processes(folder, options):
    """Two processes on two GPUs against one: the same weights up to rounding, after five steps in fp32."""
    base = [str(ROOT / "train.py"), "--data", str(folder), *options, "--max-steps", "5", "--amp", "off"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    if not GPU:
        base += ["--device", "cpu"]
    subprocess.run([sys.executable, *base, "--out", str(folder / "one")], check=True, capture_output=True)
    subprocess.run([*two, *base, "--out", str(folder / "two")], check=True, capture_output=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})
    one, other = (train.load_file(folder / name / "checkpoint.pt")["G"]["net"] for name in ("one", "two"))
    apart = max(float((one[k].float() - other[k].float()).abs().max()) for k in one)
    return f"apart by {apart:.0e}", apart < 1e-3


def check_fid(device="cuda", count=64):
    """The FID of so many images to as many others, by this device and by the CPU."""
    images, fids = np.random.default_rng(0).integers(0, 256, (2 * count, 32, 32, 3), dtype=np.uint8), []
    images[count:] //= 2
    for kind in map(torch.device, ("cpu", device)):
        network = evaluate.load_inception(evaluate.find_weights(), kind)
        x = evaluate.inception_features(network, images, kind, np.arange(2 * count))
        fids.append(evaluate.frechet_distance(*map(evaluate.statistics, (x[:count], x[count:]))))
    return f"FID {fids[1]:.4f}, on the CPU {fids[0]:.4f}", abs(fids[1] / fids[0] - 1) < 1e-3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", help="names of run_all.sh's (default: all that the device can run)")
    args, known, failed = parser.parse_args(), recipes(), []
    wrong = [name for name in args.recipes or () if name not in known]
    if wrong:
        parser.error(f"--recipes {wrong[0]}: not a recipe of run_all.sh: {' '.join(known)}")
    names = args.recipes or (known if GPU else SMALL)
    torch.set_float32_matmul_precision("high")
    print(f"torch {torch.__version__}, "
          + (f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}" if GPU else "no GPU: small networks on the CPU"))

    def report(name, check, *arguments):
        began = time.perf_counter()
        try:
            said, good = check(*arguments)
        except (Exception, SystemExit) as error:
            torch.cuda.set_sync_debug_mode("default") if GPU else None
            cause = error.__cause__ or error
            said, good = f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else ''}", False
            said += f" {error.stderr.decode()[-600:]}" if isinstance(error, subprocess.CalledProcessError) else ""
        failed.extend([] if good else [name])
        print(f"{name:26} {'pass' if good else 'FAIL'}  {said}  ({time.perf_counter() - began:.0f} s)", flush=True)
        if GPU:
            torch.cuda.empty_cache()

    with tempfile.TemporaryDirectory() as place, contextlib.suppress(KeyboardInterrupt):
        for name in names:
            prepare, options = known[name]
            folder = Path(place, name)
            folder.mkdir()
            make_data(folder, prepare, 1024)
            for amp in ("fp32", "bf16", "fp16"):
                report(f"{name} {amp}", check_recipe, folder, options, "off" if amp == "fp32" else amp)
        small = Path(place, "small")
        small.mkdir()
        make_data(small, ["shapes", "--size", "32"], 1024)
        options = ["--width", "8", "--batch-size", "32", "--epochs", "20"]
        report("interrupt and resume", check_resume, small, options)
        if GPU and torch.cuda.device_count() < 2:
            print("two processes              left out: one GPU")
        else:
            report("two processes", check_processes, small, options)
        report("FID", check_fid) if GPU else print("CUDA graphs, FID by GPU    left out: no GPU")
    print(f"{len(failed)} failed: {', '.join(failed)}" if failed else "all passed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
