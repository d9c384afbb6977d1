"""The step as a recording: what one call does, done again on the same memory, is what Python would have done."""

import gpu_check
import pytest
import torch
from test_train import floats, steps_of, trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train


class Recorder(TorchDispatchMode):
    """The operations of a call, as a CUDA graph holds its launches: functions and the memory they work on."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, result in self.calls:
                places = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
                for x, new in zip(tensors(result), tensors(function(*args, **kwargs)), strict=True):
                    if x.untyped_storage().data_ptr() not in places:  # else a view, or written in place
                        x.copy_(new)


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def record(function):
    """In the place of train.capture, which records without running: here the call itself is the first replay."""
    recorder, ran = Recorder(), [True]
    with recorder:
        function()
    assert not any("_local_scalar_dense" in str(call[0]) for call in recorder.calls), "a value was read back"
    return lambda: ran.pop() if ran else recorder.replay()


@pytest.mark.parametrize("options", [
    ("--lr-g", "1e-3:1e-4", "--warmup", "3", "--ema-images", "0:64"),
    ("--amp", "fp16", "--clip-grad", "1"),
    ("--arch", "resnet", "--loss", "relativistic", "--r1", "1:0.1", "--r2", "0:1", "--penalty-interval", "2", "--diffaug", "0:0.9", "--flip", "--crop-shift", "0.1", "--jitter", "0.1"),
    ("--arch", "upsample", "--spectral-norm", "--loss", "hinge"),
    ("--arch", "sngan", "--condition", "text", "--detail", "10", "--gp", "1", "--amp", "bf16"),
    ("--loss", "wgan-gp", "--d-steps", "2"),
    ("--grad-accum", "2", "--amp", "bf16"),
    ("--feature-matching", "0.1", "--loss", "lsgan"),
    ("--condition", "text", "--mismatch-weight", "0.5", "--attention", "--cond-augment", "0.1", "--amp", "bf16")],
    ids=lambda options: " ".join(options))
def test_replayed_it_is_the_same_run(options, tmp_path):
    options = options if "--amp" in options else (*options, "--amp", "off")
    eager, replayed = trainer(tmp_path, *options), trainer(tmp_path, *options)
    kinds = 2 if {"--d-steps", "--penalty-interval"} & {*options} else 1
    count, captured = 4 + 6 * kinds, []
    step = train.graphed(train.train_step, aside=lambda call: call(), warm_up=2,
                         capture=lambda call: captured.append(call) or record(call))
    for t, way in ((eager, train.train_step), (replayed, step)):
        steps_of(t, count - 3, way)
        t.state.meter.read(t.run)  # a line of the log in between
        t.state.D.skips[2] = 0
        steps_of(t, 3, way)
    assert len(captured) == kinds, "once for each way of learning"
    for one, other in zip(tensors(eager.state.state_dict()), tensors(replayed.state.state_dict()), strict=True):
        assert torch.equal(one, other)
    assert eager.state.meter.sums[1].max() == 3 and floats(eager.state.G.net)[0].std() > 0


class Counter(TorchDispatchMode):
    """Names of the operations of a call that cost a launch on a GPU: no views, no allocations, no profiler's marks."""

    def __init__(self):
        super().__init__()
        self.launches = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not (function.is_view or function.namespace == "profiler" or "empty" in function.name()):
            self.launches.append(function.name())
        return function(*args, **kwargs or {})


def test_few_launches_a_step(tmp_path):
    """dcgan at 64×64 in bf16: on a fast GPU a step of small batches takes as long as its launches do."""
    t, counter = steps_of(trainer(tmp_path, "--amp", "bf16", size=64), 1), Counter()
    images = torch.zeros(16, 64, 64, 3, dtype=torch.uint8)
    with counter:
        train.train_step(t.run, t.state, *train.prepare_step(t.run, t.state), images, None)
    assert len(counter.launches) <= 230, counter.launches


def test_the_check_of_the_gpu_compares_fid(weights):
    said, good = gpu_check.check_fid("cpu", 8)
    assert good and said.startswith("FID ")


def test_the_check_of_the_gpu_takes_every_recipe(tmp_path, monkeypatch):
    """Its data and options fit; on this machine the networks that are small run."""
    monkeypatch.setattr(gpu_check, "STEPS", 4)
    known = gpu_check.recipes()
    assert {"shapes", "mnist", "captions", "celeba64-r3", "folder"} <= known.keys()
    for name, (prepare, options) in known.items():
        folder = tmp_path / name
        folder.mkdir()
        gpu_check.make_data(folder, prepare, 1024)
        train.make_run(train.parse_args(["--data", str(folder), "--out", str(folder / "run"), *options,
                                         *(["--burn-in", "1e4"] if "--burn-in" in options else [])]))
        if name in ("mnist", "captions"):
            said, good = gpu_check.check_recipe(folder, options, "bf16")
            assert "images/s" in said and good
