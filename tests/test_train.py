"""train.py: networks, objective, what a run leaves behind, precision, processes, and refusals."""

import ast
import contextlib
import copy
import errno
import io
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
import weakref
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import scale
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, call, log_of, refused
from PIL import Image

import evaluate
import train

LOG_KEYS = {"step", "epoch", "images", "loss_g", "loss_d", "acc_real", "acc_fake", "reward", "grad_norm_g",
            "grad_norm_d", "lr_g", "lr_d", "temperature", "skipped_g", "skipped_d", "ms_per_step", "ms_min", "ms_max",
            "images_per_second", "diversity", "clipped_g", "clipped_d"}


IMAGE_ARCHITECTURES = train.architectures_of(train.Images)  # see test_text.py for the others
D_LOSS, G_LOSS = ({name: entry[i] for name, entry in train.LOSSES.items()} for i in (0, 1))


def networks(arch="dcgan", size=64, channels=3, width=64, **more):
    model = {"arch": arch, "sizes": [size], "channels": channels, "width": width, "width_d": width, "extra_convs": 0,
             "norm_d": "batch", "depth": train.default_depth(size), "latent_dim": 100, "condition": "none", "known": 0,
             "spectral_norm": False, "detail": 0.0, "attention": False, "cond_augment": False, "width_max": None,
             "blocks": 1 if arch == "resnet" else None}
    return train.build_networks(model | more)


def count(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("arch", IMAGE_ARCHITECTURES)
@pytest.mark.parametrize("size, channels, classes", [(28, 1, 10), (32, 3, 0), (64, 3, 4), (128, 1, 0), (48, 3, 0)])
def test_shapes_of_networks(arch, size, channels, classes):
    G, D = networks(arch, size, channels, width=4, latent_dim=7, condition="label" if classes else "none", known=classes)
    c = torch.arange(3) % classes if classes else None
    images = G(torch.randn(3, 7), c)
    assert images.shape == (3, channels, size, size) and (arch == "resnet" or images.abs().max() <= 1)
    logits, features = D(images, None if c is None else D.told(c))
    assert logits.shape == (3,) and logits.dtype == torch.float32 and features.shape[0] == 3


def test_dcgan_is_the_papers():
    G, D = networks()  # the counts of pytorch/examples' dcgan at 64×64, ngf = ndf = 64, nz = 100
    assert (count(G), count(D)) == (3_576_704, 2_765_568)
    weights = [m.weight for m in (*G.modules(), *D.modules())
               if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))]
    assert all(abs(w.std().item() - 0.02) < 0.002 for w in weights)


def test_upsample_is_as_described():
    G, D = networks("upsample")
    linear = G.stages[0][0]
    assert isinstance(linear, torch.nn.Linear) and linear.out_features == 512 * 4 * 4
    convolutions = [m for m in G.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(m.in_channels, m.out_channels) for m in convolutions] == [(512, 256), (256, 128), (128, 64), (64, 3)]
    assert all(m.kernel_size == (3, 3) for m in convolutions)
    assert {m.momentum for m in G.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.8}
    first = ["Conv2d", "LeakyReLU", "Dropout2d"]
    kinds = [[type(m).__name__ for m in part] for part in (*D.stems, *D.stages)]
    assert kinds == [first] + [[*first, "BatchNorm"]] * 3
    assert {m.p for m in D.modules() if isinstance(m, torch.nn.Dropout2d)} == {0.25}


def test_bce_against_plain_algebra():
    real, fake = torch.tensor([2.0, -1.0, 0.3]), torch.tensor([-0.5, 1.5, 0.0])
    args = SimpleNamespace(real_label=0.9, fake_label=0.1)
    log_p, log_q = (lambda x: -math.log(1 + math.exp(-x))), (lambda x: -math.log(1 + math.exp(x)))
    expected = (sum(-0.9 * log_p(x) - 0.1 * log_q(x) for x in real.tolist()) / 3
                + sum(-0.1 * log_p(x) - 0.9 * log_q(x) for x in fake.tolist()) / 3)
    assert D_LOSS["bce"](real, fake, args).item() == pytest.approx(expected, rel=1e-5)
    assert G_LOSS["bce"](fake, None).item() == pytest.approx(sum(-log_p(x) for x in fake.tolist()) / 3, rel=1e-5)


def test_relativistic_and_penalties_against_plain_algebra(tmp_path):
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([-0.5, 1.5])
    expected = (math.log(1 + math.exp(-2.5)) + math.log(1 + math.exp(2.5))) / 2
    assert D_LOSS["relativistic"](real, fake, None).item() == pytest.approx(expected, rel=1e-5)
    assert G_LOSS["relativistic"](fake, real).item() == pytest.approx(
        (math.log(1 + math.exp(2.5)) + math.log(1 + math.exp(-2.5))) / 2, rel=1e-5)
    x, w = torch.randn(4, 3, 8, 8, requires_grad=True), torch.randn(3, 8, 8)
    assert torch.allclose(train.squared_gradient((w * x).sum((1, 2, 3)), x), w.square().sum(), rtol=1e-5)
    D = networks(size=16, width=4, norm_d="none")[1]
    assert not [m for m in D.modules() if isinstance(m, torch.nn.BatchNorm2d)]


def test_hinge_least_squares_and_wasserstein_against_plain_algebra():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([-0.5, 1.5])
    args = SimpleNamespace(real_label=0.9, fake_label=0.1)
    assert D_LOSS["hinge"](real, fake, args).item() == pytest.approx((0 + 2) / 2 + (0.5 + 2.5) / 2)
    assert D_LOSS["lsgan"](real, fake, args).item() == pytest.approx((1.1**2 + 1.9**2 + 0.6**2 + 1.4**2) / 4)
    assert G_LOSS["lsgan"](fake, None).item() == pytest.approx((1.5**2 + 0.5**2) / 4)
    assert D_LOSS["wgan-gp"](real, fake, args).item() == pytest.approx(0.5 - 0.5)
    assert G_LOSS["wgan-gp"](fake, None).item() == G_LOSS["hinge"](fake, None).item() == pytest.approx(-0.5)


class Plane(torch.nn.Module):
    """D(x) = <w, x> + the condition: its gradient is w everywhere."""

    def __init__(self, w):
        super().__init__()
        self.w = w

    def forward(self, x, told, dial=None):
        return (self.w * x).sum((1, 2, 3)) + (0 if told is None else told), x.mean((2, 3))

    def told(self, c):
        return c.float()

    def match(self, features, told):
        return told


def losses(*options, condition=None, wrong=()):
    """(loss of D, loss of G) on a plane, with ones as real and minus ones as fakes."""
    args = train.parse_args(["--data", "-", "--out", "-", *options])
    run = SimpleNamespace(args=args, autocast=contextlib.nullcontext, world=1, sum=lambda tensor: tensor)
    amounts = {name: torch.tensor(getattr(args, name)) for name in ("r1", "r2") if getattr(args, name)}
    D, G = Plane(torch.full((3, 4, 4), 0.1)), SimpleNamespace(divergence=lambda c: torch.tensor(7.0))
    x, fake = torch.ones(2, 3, 4, 4), -torch.ones(2, 3, 4, 4)
    return (train.loss_of_d(run, D, amounts, x, condition, fake, None, *wrong)[0].item(),
            train.loss_of_g(run, G, D, amounts, x, condition, fake)[0].item())


def test_penalties_and_terms_against_plain_algebra():
    """On D(x) = <w, x>, |w|² = 48 · 0.01 = 0.48, logits of ones are 4.8."""
    plain_d, plain_g = losses("--loss", "hinge")
    assert (plain_d, plain_g) == (pytest.approx(0), pytest.approx(4.8))
    assert losses("--loss", "hinge", "--r1", "3")[0] == pytest.approx(1.5 * 0.48, rel=1e-4)
    assert losses("--loss", "hinge", "--r2", "5")[0] == pytest.approx(2.5 * 0.48, rel=1e-4)
    assert losses("--loss", "wgan-gp")[0] == pytest.approx(-9.6 + 10 * (0.48**0.5 - 1) ** 2, rel=1e-4)
    assert losses("--loss", "wgan-gp", "--gp", "1")[0] == pytest.approx(-9.6 + (0.48**0.5 - 1) ** 2, rel=1e-4)
    assert losses("--loss", "relativistic")[0] == pytest.approx(math.log1p(math.exp(-9.6)) + 0.05 * 0.48, rel=1e-3)
    assert losses("--loss", "hinge", "--feature-matching", "0.5")[1] == pytest.approx(4.8 + 0.5 * 4, rel=1e-4)
    told = torch.tensor([0, 2])
    mismatch = ("--loss", "hinge", "--condition", "label", "--mismatch-weight", "0.25")
    both = losses(*mismatch, condition=told, wrong=(told.flip(0), torch.tensor([True, True])))[0]
    own, wrong = F.relu(1 + torch.tensor([-4.8, -2.8])).mean(), F.relu(1 + torch.tensor([6.8, 4.8])).mean()
    assert both == pytest.approx((0.75 * own + 0.25 * wrong).item(), rel=1e-4)
    none = losses(*mismatch, condition=told, wrong=(told, torch.tensor([False, False])))[0]
    assert none == pytest.approx(own.item(), rel=1e-4), "where there is no other condition the term is left out"
    assert losses("--loss", "hinge", "--condition", "label", "--cond-augment", "2", condition=told)[1] == pytest.approx(
        losses("--loss", "hinge", "--condition", "label", condition=told)[1] + 14, rel=1e-4)


@pytest.mark.parametrize("arch", ["dcgan", "resnet"])
@pytest.mark.parametrize("kind", ["label", "text", "vector"])
def test_conditions_reach_both_networks(kind, arch):
    G, D = networks(arch, size=16, width=4, condition=kind, known=9)
    z, x = torch.randn(2, 100), torch.randn(2, 3, 16, 16)
    one, other = {"label": (torch.tensor([0, 1]), torch.tensor([2, 1])), "vector": (torch.zeros(2, 9), torch.eye(9)[:2]),
                  "text": (torch.tensor([[1, 2, 0], [3, 4, 0]]), torch.tensor([[2, 2, 0], [3, 4, 0]]))}[kind]
    assert not torch.equal(G.eval()(z, one)[0], G(z, other)[0])
    told, else_told = D.eval().told(one), D.told(other)
    logits, features = D(x, told)
    assert torch.allclose(D(x, else_told)[0] - logits, D.match(features, else_told) - D.match(features, told), atol=1e-5)
    assert not torch.equal(D.match(features, else_told), D.match(features, told))
    if kind == "text":  # padding says nothing
        for tokens in ([[1, 2], [3, 4]], [[1, 2, 0, 0, 0], [3, 4, 0, 0, 0]]):
            assert torch.allclose(D(x, D.told(torch.tensor(tokens)))[0], logits, atol=1e-5)


def published_block(w, x):
    """R3GAN's residual block on a state_dict's weights, as the paper's code has it: three convolutions, two biases."""
    groups = w["mix.weight"].shape[0] // w["mix.weight"].shape[1]
    for name, padding, n in (("wide", 0, 1), ("mix", 1, groups)):
        h = F.conv2d(x if name == "wide" else h, w[f"{name}.weight"], padding=padding, groups=n)
        h = F.leaky_relu(h + w[f"{name}.bias"][:, None, None], 0.2)
    return x + F.conv2d(h, w["last.weight"])


def published_resampling(x, up):
    kernel = torch.tensor([[1, 3, 3, 1], [3, 9, 9, 3], [3, 9, 9, 3], [1, 3, 3, 1]]) / 64
    kernel = kernel.repeat(x.shape[1], 1, 1, 1)
    if up:
        return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=1, groups=x.shape[1])
    return F.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1])


def below(weights, prefix):
    return {k.removeprefix(f"{prefix}."): v for k, v in weights.items() if k.startswith(f"{prefix}.")}


def published_networks(G, D, widths, blocks, z, x, classes=None):
    """(images, logits) of R3GAN's forward passes, written out (Huang et al. 2024); widths from the smallest map upwards."""
    g, d = G.state_dict(), D.state_dict()
    z = z if classes is None else torch.cat([z, F.one_hot(classes, 10).float() @ g["encode.weight"]], 1)
    h = g["stages.0.0.patterns"] * (z @ g["stages.0.0.linear.weight"].T)[:, :, None, None]
    for stage in range(len(widths)):
        first = 1  # of the blocks, after the basis or the resampling, and a convolution where widths differ
        if stage:
            if widths[stage] != widths[stage - 1]:
                h, first = F.conv2d(h, g[f"stages.{stage}.0.weight"]), 2
            h = published_resampling(h, True)
        for i in range(blocks):
            h = published_block(below(g, f"stages.{stage}.{first + i}"), h)
    images = F.conv2d(h, g["heads.0.weight"])
    h, down = F.conv2d(x, d["stems.0.weight"]), widths[::-1]
    for stage in range(len(down) - 1):
        for i in range(blocks):
            h = published_block(below(d, f"stages.{stage}.{i}"), h)
        h = published_resampling(h, False)
        if down[stage] != down[stage + 1]:
            h = F.conv2d(h, d[f"stages.{stage}.{blocks + 1}.weight"])
    for i in range(blocks):
        h = published_block(below(d, f"head.{i}"), h)
    h = (h * d[f"head.{blocks}.weight"][:, 0]).sum((2, 3)) @ d["linear.weight"].T
    return images, h[:, 0] if classes is None else (h * (F.one_hot(classes, 10).float() @ d["encode.weight"])).sum(1)


@pytest.mark.parametrize("classes", [None, torch.tensor([3, 0, 9, 3])])
@pytest.mark.parametrize("size, width, widths", [(32, 16, [16] * 4), (64, 8, [16, 16, 16, 16, 8]), (32, 6, [16, 16, 12, 6])])
def test_resnet_is_the_published_network(size, width, widths, classes):
    told = {"condition": "label", "known": 10} if classes is not None else {}
    G, D = networks("resnet", size, width=width, width_max=16, blocks=2, latent_dim=5, **told)
    torch.manual_seed(0)
    for p in (*G.parameters(), *D.parameters()):  # the last of a block and the biases begin at 0
        p.data += 0.1 * torch.randn_like(p)
    z, x = torch.randn(4, 5), torch.randn(4, 3, size, size)
    images, logits = published_networks(G, D, widths, 2, z, x, classes)
    assert torch.allclose(G(z, classes), images, atol=1e-5) and images.std() > 0.1
    told = None if classes is None else D.told(classes)
    assert torch.allclose(D(x, told)[0], logits, atol=1e-5) and logits.std() > 1e-3


def test_resnet_has_the_published_size_and_start():
    G, D = networks("resnet", width=384, width_max=768, blocks=2, latent_dim=64)  # FFHQ-64: 22.4 M each
    assert (count(G), count(D)) == (22_429_824, 22_381_440)
    G, D = networks("resnet", width=32, width_max=64, blocks=2, latent_dim=64, condition="label", known=10)
    for net in (G, D):
        found = [m for m in net.modules() if isinstance(m, train.Residual)]
        assert len(found) == 10 and not any(m.last.weight.any() or m.wide.bias.any() or m.mix.bias.any() for m in found)
        gain = (2 / 1.04) ** 0.5 * 10 ** -0.25
        for name, fan_in in (("wide", 64), ("mix", 16 * 9)):
            stds = [getattr(m, name).weight.std().item() for m in found if m.wide.in_channels == 64]
            assert np.mean(stds) == pytest.approx(gain / fan_in ** 0.5, rel=0.05)
        assert sum(m.mix.groups for m in found) == 8 * 8 + 2 * 4, "groups of 16 channels"
    assert G.encode.weight.std().item() == pytest.approx(10 ** -0.5, rel=0.1)
    assert D.encode.weight.std().item() == pytest.approx(640 ** -0.5, rel=0.1)
    torch.manual_seed(0)
    assert 0.2 < G(torch.randn(64, 64), torch.arange(64) % 10).std() < 2


@pytest.mark.parametrize("fast, plain, size", [
    (train.UpConv(5, 7), torch.nn.Conv2d(5, 7, 3, 1, 1), (6, 3)),
    (train.UpConv(5, 7, padding_mode="replicate"), torch.nn.Conv2d(5, 7, 3, 1, 1, padding_mode="replicate"), (6, 3)),
    (train.ReplicateConv(5, 7, 3), torch.nn.Conv2d(5, 7, 3, 1, 1, padding_mode="replicate"), (6, 3)),
    (train.FromPoint(5, 7, 4), torch.nn.ConvTranspose2d(5, 7, 4, bias=False), (1, 1)),
    (train.ToPoint(5, 1, (6, 3)), torch.nn.Conv2d(5, 1, (6, 3), bias=False), (6, 3))])
def test_convolutions_of_few_operations_are_the_plain_ones(fast, plain, size):
    fast = fast.double().to(memory_format=torch.channels_last)
    plain = plain.double()
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(2, 5, *size, dtype=torch.double, requires_grad=True)
    one = fast(x)
    two = plain(F.interpolate(x, scale_factor=2) if isinstance(fast, train.UpConv) else x).reshape(one.shape)
    torch.testing.assert_close(one, two)
    for a, b in zip(torch.autograd.grad(one.square().sum(), [x, *fast.parameters()]),
                    torch.autograd.grad(two.square().sum(), [x, *plain.parameters()])):
        torch.testing.assert_close(a, b)


def test_edges_are_repeated_in_the_type_of_the_map():
    x = torch.randn(1, 2, 4, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        padded = train.replicate(x)
    assert padded.dtype == torch.bfloat16 and torch.equal(padded[..., 1:-1, 0], x[..., 0])


def test_d_reads_a_condition_once_for_all_images():
    G, D = networks("sngan", size=16, width=4, condition="text", known=9)
    read = []
    D.encode.register_forward_hook(lambda module, given, result: read.append(given[0]))
    args = train.parse_args(["--data", "-", "--out", "-", "--condition", "text", "--mismatch-weight", "0.5",
                             "--loss", "relativistic", "--gp", "1"])
    run = SimpleNamespace(args=args, autocast=contextlib.nullcontext, world=1)
    x, c, wrong = torch.randn(2, 3, 16, 16), torch.tensor([[1, 2], [3, 4]]), torch.tensor([[3, 4], [1, 2]])
    train.loss_of_d(run, D, {}, x, c, x, None, wrong, torch.tensor([True, True]))
    assert [one.tolist() for one in read] == [c.tolist(), wrong.tolist()]
    read.clear()
    train.loss_of_g(run, G, D, {}, x, c, x)
    assert [one.tolist() for one in read] == [c.tolist()]


def test_words_attend_to_places():
    attention = train.WordAttention(6)
    x, words, mask = torch.randn(2, 6, 3, 3), torch.randn(2, 4, train.EMBEDDING), torch.tensor([[1, 1, 0, 0], [0] * 4]) > 0
    query = attention.query(x)[0].flatten(1).T
    weight = (query @ words[0, :2].T / train.EMBEDDING**0.5).softmax(1)
    expected = x[0] + (weight @ attention.value(words[0, :2])).T.reshape(6, 3, 3)
    out = attention(x, words, mask)
    assert torch.allclose(out[0], expected, atol=1e-5) and torch.isfinite(out).all()


def test_spectral_norm_bounds_every_layer():
    D = networks(size=16, width=4, spectral_norm=True)[1]
    for _ in range(30):
        D(torch.randn(2, 3, 16, 16))
    for module in D.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            assert torch.linalg.matrix_norm(module.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("arch", IMAGE_ARCHITECTURES)
def test_growing_fades_from_size_to_size(arch):
    G, D = networks(arch, sizes=[16, 64], width=4, channels=1)
    z, seen = torch.randn(2, 100), {}
    G.eval(), D.eval()
    for level in (0, 1e-6, 0.5, 1):
        seen[level] = G(z, None, level)
        assert seen[level].shape[2] == (64 if level else 16) and D(seen[level], None, level)[0].shape == (2,)
    assert torch.equal(G(z), seen[1]), "without a dial the last size"
    assert torch.allclose(seen[1e-6], F.interpolate(seen[0], size=64), atol=1e-4), "the new size starts as the old one"
    assert not torch.allclose(seen[0.5], seen[1], atol=1e-3)
    image = torch.randn(2, 1, 64, 64)
    assert torch.allclose(D(image, None, 1e-6)[0], D(F.avg_pool2d(image, 4), None, 0)[0], atol=1e-4)
    run = SimpleNamespace(model={"sizes": [16, 64]}, schedule_steps=8)
    assert [train.Images.dial(None, run, step) for step in range(9)] == [0, 0, 0, 0, 0, 0.5, 1, 1, 1]


def test_augmentation(tmp_path):
    x = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16).repeat(64, 1, 1, 1).requires_grad_()
    torch.manual_seed(0)
    moved = train.shift(x, 1 / 8, "constant")
    offsets = {(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)}
    padded = F.pad(x[0], [2] * 4)
    for image in moved[:8]:
        assert any(torch.equal(image, padded[:, 2 + dy:18 + dy, 2 + dx:18 + dx]) for dy, dx in offsets)
    cut = train.cut_out(torch.ones(64, 1, 16, 16))
    assert cut.unique().tolist() == [0, 1] and cut.sum((1, 2, 3)).min() == 16 * 16 - 8 * 8
    bright = train.colour(torch.zeros(64, 3, 16, 16), 0.5)
    assert bright.abs().max() <= 0.5 and bright.flatten(1).std(1).max() < 1e-6 < bright.std()
    assert torch.autograd.grad(train.diffaug(x, 1).sum(), x)[0].abs().sum() > 0


def test_diffaug_takes_its_share_image_by_image():
    torch.manual_seed(0)
    x = torch.rand(4000, 1, 8, 8)
    for share in (0, 0.3, 1):
        varied = (train.diffaug(x, torch.tensor(share)) != x).flatten(1).any(1).float().mean().item()
        assert varied == pytest.approx(share, abs=0.03 if share == 0.3 else 0)


def test_auto_precision_with_penalties_avoids_fp16(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "find_precision", lambda name, device: "fp16")
    assert trainer(tmp_path).run.amp == "fp16" and trainer(tmp_path, "--r1", "1").run.amp == "off"


def at(steps, *options, total=100):
    """What holds at these steps of a run of so many, of 4 images each."""
    args = train.parse_args(["--data", "d", "--out", "r", "--batch-size", "4", *options])
    data = SimpleNamespace(lead_in=0, lr_g=lambda run, step: run.args.lr_g, dial=lambda run, step: 0)
    run = train.Run(args, data, {}, None, "off", total, total, total, None, 0, 1)
    return [run.at(step) for step in steps]


def test_schedules():
    def rates(steps, *options):
        return [now.lr_g for now in at(steps, "--lr-g", "2e-4:1e-5", *options)]
    half = 1.05e-4
    assert [2e-4] * 2 == [now.lr_d for now in at((0, 70), "--lr-g", "1:0.1")], "who has one value keeps it"
    assert rates((0, 50, 100)) == rates((0, 50, 100), "--schedule", "cosine") == pytest.approx([2e-4, half, 1e-5])
    assert rates((25,)) == pytest.approx([1e-5 + 1.9e-4 * (1 + math.cos(math.pi / 4)) / 2])
    quarter = 2e-4 - 1.9e-4 / 4
    assert rates((0, 25, 50, 100), "--schedule", "linear") == pytest.approx([2e-4, quarter, half, 1e-5])
    again = ("--schedule", "cosine-restarts", "--restarts", "2")
    assert rates((0, 25, 50, 75, 100), *again) == pytest.approx([2e-4, half, 2e-4, half, 1e-5])
    burn_in = ("--burn-in", "80")  # images: 20 steps
    assert rates((0, 10, 20, 21, 99), *burn_in) == pytest.approx([2e-4, half, 1e-5, 1e-5, 1e-5])
    assert rates((0, 5, 20), *burn_in, "--schedule", "linear") == pytest.approx([2e-4, quarter, 1e-5])
    assert rates((0, 5, 10, 15, 20, 50), *burn_in, *again) == pytest.approx([2e-4, half, 2e-4, half, 1e-5, 1e-5])
    assert [now.lr_g for now in at((0, 9, 19, 20, 60), "--lr-g", "2e-4", "--warmup", "20")] == pytest.approx(
        [1e-5, 1e-4, 2e-4, 2e-4, 2e-4])
    assert rates((0, 9, 50), "--schedule", "linear", "--warmup", "20") == pytest.approx(
        [1e-5, (2e-4 - 0.09 * 1.9e-4) / 2, half])


def test_all_that_may_change_does_so_together():
    """R3GAN's recipe at its beginning, in the middle of the burn-in, at its end and after."""
    steps = at((0, 5000, 10_000, 50_000), "--r1", "2:0.2", "--r2", "1:0.1", "--beta2", "0.9:0.99", "--diffaug", "0:0.3",
               "--ema-images", "0:800", "--burn-in", "4e4", total=60_000)
    middle_and_end = {"r1": (2, 1.1, 0.2), "r2": (1, 0.55, 0.1), "diffaug": (0, 0.15, 0.3)}
    for name, (first, middle, end) in middle_and_end.items():
        assert [now.amounts[name] for now in steps] == pytest.approx([first, middle, end, end])
    assert [now.beta2 for now in steps] == pytest.approx([0.9, 0.945, 0.99, 0.99])
    # half-lives of 0, 400 and 800 images; the first steps forget faster in any case
    assert [now.share for now in steps] == pytest.approx([1, 1 - 0.5 ** 0.01, 1 - 0.5 ** 0.005, 1 - 0.5 ** 0.005])
    assert [now.share for now in at((0, 9, 99_999), "--ema-images", "4")] == pytest.approx([0.9, 0.5, 0.5])
    assert at((7,), "--ema-images", "0")[0].share == 1
    assert [now.share for now in at((0, 9000, 10_000), "--ema", "0.5:0.9", total=10_000)] == pytest.approx(
        [0.9, 1 - (0.9 - 0.4 * (1 + math.cos(0.9 * math.pi)) / 2), 0.1])


def test_penalties_now_and_then(tmp_path):
    """In one of so many steps of D, so many times as strong; in the others it learns as without them."""
    turns = at(range(4), "--r1", "2", "--r2", "1", "--penalty-interval", "2")
    assert [now.turn.penalise for now in turns] == [True, False, True, False]
    assert (turns[0].amounts["r1"], turns[0].amounts["r2"]) == (4, 2)

    def weights(step, *options):
        t = trainer(tmp_path, "--amp", "off", "--norm-d", "none", *options)
        t.state.step = step
        return steps_of(t, 1).state.D.weights
    lazy = "--r1", "0.5", "--penalty-interval", "4"
    assert torch.equal(weights(0, *lazy), weights(0, "--r1", "2")) and torch.equal(weights(1, *lazy), weights(1))
    assert not torch.equal(weights(0, *lazy), weights(0))


def test_a_value_that_is_not_to_change_is_a_number(capsys):
    args = train.parse_args(["--data", "d", "--out", "r", "--lr-g", "2e-4:2e-4", "--diffaug", "--r1", "0:0"])
    assert (args.lr_g, args.diffaug, args.r1, args.schedule, args.ema) == (2e-4, 1, 0, "constant", 0.999)
    args = train.parse_args(["--data", "d", "--out", "r", "--lr-g", "2e-4:5e-5", "--diffaug", "0:.3", "--ema-images", "0"])
    assert (args.lr_g, args.diffaug, args.schedule, args.ema) == ("0.0002:5e-05", "0.0:0.3", "cosine", None)


def test_what_a_run_leaves(trained):
    lines = log_of(trained)
    assert [line["step"] for line in lines] == list(range(4, 49, 4))
    for line in lines:
        assert set(line) == LOG_KEYS
        assert all(math.isfinite(v) for k, v in line.items() if k != "temperature")
        assert line["images"] == 16 * line["step"] and line["ms_min"] <= line["ms_per_step"] <= line["ms_max"]
    config = json.loads((trained / "config.json").read_text())
    assert config["options"]["width"] == 8 and config["versions"]["torch"] == torch.__version__
    status = json.loads((trained / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 48)
    assert sorted(p.name for p in (trained / "grids").iterdir()) == ["latest.png", "real.png"] + [
        f"step_{s:07d}.png" for s in range(0, 49, 8)]
    assert Image.open(trained / "grids" / "step_0000048.png").size == (128, 128)
    for name in ("checkpoint.pt", "checkpoint.prev.pt", "generator.pt"):
        torch.load(trained / name, weights_only=True)
    said = (trained / "stdout.txt").read_text()
    assert "step 4/48" in said and "images/s" in said and "skipped  0 updates of G" in said and "ms mean" in said
    assert not list(trained.rglob("*.tmp"))


def test_called_again_it_does_nothing_and_more_epochs_go_on(trained, shapes, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    options = ("--data", shapes, "--out", run, "--condition", "label", *TINY)
    before = (run / "checkpoint.pt").read_bytes()
    (run / "status.json").write_text('{"state": "failed"}')  # in what came after the last save
    assert "already" in call("train.py", *options, "--epochs", "3").stdout
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert (run / "checkpoint.pt").read_bytes() == before
    assert "going on" in call("train.py", *options, "--epochs", "4").stdout
    assert log_of(run)[-1]["step"] == 64 and json.loads((run / "status.json").read_text())["state"] == "finished"


class Trainer(NamedTuple):
    run: train.Run
    state: train.State


def trainer(tmp_path, *options, size=16):
    """A run in this process on 64 black images with captions of ids 1 to 5."""
    data = tmp_path / f"data{size}"
    if not data.exists():
        data.mkdir()
        np.save(data / "images.npy", np.zeros((64, size, size, 3), np.uint8))
        np.save(data / "tokens.npy", np.random.default_rng(0).integers(1, 6, (64, 2, 4)))
        (data / "meta.json").write_text(json.dumps({
            "size": size, "channels": 3, "classes": None, "vocabulary": [*"-?abcd"], "count": 64, "name": "zeros",
            "fingerprint": ""}))
    run = train.make_run(train.parse_args(["--data", str(data), "--out", str(tmp_path / "out"), "--width", "8",
                                           "--batch-size", "16", "--device", "cpu", *options]))
    return Trainer(run, train.make_state(run))


def steps_of(t, n, step=train.train_step):
    """n steps on random images, in this process."""
    rng = torch.Generator().manual_seed(1)
    for _ in range(n):
        images = torch.randint(0, 256, (16, *t.run.data.rows.shape[1:]), dtype=torch.uint8, generator=rng)
        condition = train.condition_of(t.run.data.conditions, np.arange(16), np.zeros(16), t.run.device)
        step(t.run, t.state, *train.prepare_step(t.run, t.state), images, condition)
        t.state.step += 1
    return t


def floats(net):
    return [x for x in net.state_dict().values() if x.is_floating_point()]


def skips(t):
    """Updates of G and of D that were skipped: in all, in a row, longest row."""
    return torch.stack([t.state.G.skips, t.state.D.skips], 1).tolist()


def test_the_step_is_the_algorithm(tmp_path):
    """Two steps in fp32 equal the textbook's loop on the same networks, noise and images."""
    t = trainer(tmp_path, "--amp", "off", "--real-label", "0.9")
    mine = trainer(tmp_path, "--amp", "off")
    G, D = mine.state.G.net, mine.state.D.net
    g_opt, d_opt = (torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in (G, D))
    rng = torch.Generator().manual_seed(1)
    for step in range(2):
        images = torch.randint(0, 256, (16, 16, 16, 3), dtype=torch.uint8, generator=rng).permute(0, 3, 1, 2)
        torch.manual_seed(train.seed_of(0, step, 0))
        z = torch.randn(16, 100)
        fake = G(z)
        real_logits, fake_logits = D(images.float() / 127.5 - 1)[0], D(fake.detach())[0]
        loss = F.binary_cross_entropy(real_logits.sigmoid(), torch.full((16,), 0.9)) + F.binary_cross_entropy(
            fake_logits.sigmoid(), torch.zeros(16))
        d_opt.zero_grad()
        loss.backward()
        d_opt.step()
        g_opt.zero_grad()
        F.binary_cross_entropy(D(fake)[0].sigmoid(), torch.ones(16)).backward()
        g_opt.step()
    steps_of(t, 2)
    for net, other in ((t.state.G.net, G), (t.state.D.net, D)):
        for (name, a), b in zip(net.state_dict().items(), other.state_dict().values()):
            assert torch.allclose(a, b, atol=2e-5), name


def test_average_generator(tmp_path):
    t = trainer(tmp_path, "--amp", "off", "--ema", "0.6")
    expected = t.state.G.net.stages[0][1].weight.detach().clone()
    for step in range(3):
        steps_of(t, 1)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * t.state.G.net.stages[0][1].weight.detach()
    assert torch.allclose(t.state.ema.net.stages[0][1].weight, expected, atol=1e-6)


@pytest.mark.parametrize("option", [("--real-label", "0.9"), ("--fake-label", "0.1"), ("--lr-g", "1e-3"),
                                    ("--lr-d", "1e-3"), ("--beta1", "0"), ("--clip-grad", "0.01"), ("--flip",),
                                    ("--grad-accum", "2"), ("--seed", "1"), ("--amp", "bf16"), ("--amp", "fp16"),
                                    ("--lr-g", "1e-3:0"), ("--latent-dim", "99"), ("--loss", "relativistic"), ("--r1", "1"),
                                    ("--r2", "1"), ("--norm-d", "none"), ("--extra-convs", "1"),
                                    ("--width-d", "4"), ("--ema", "0.01"), ("--loss", "hinge"), ("--loss", "lsgan"),
                                    ("--loss", "wgan-gp"), ("--gp", "1"), ("--spectral-norm",), ("--detail", "10"), ("--arch", "sngan"), ("--diffaug",),
                                    ("--diffaug", "1:0.5"), ("--r1", "0:1"), ("--beta2", "0.9:0.99"), ("--ema", "0:0.9"),
                                    ("--ema-images", "1"), ("--burn-in", "32"), ("--blocks", "1"), ("--width-max", "8"),
                                    ("--crop-shift", "0.1"), ("--jitter", "0.3"), ("--feature-matching", "1"),
                                    ("--optimizer", "adamw"), ("--optimizer", "rmsprop"), ("--beta2", "0.9"),
                                    ("--d-steps", "2"), ("--schedule", "linear"),
                                    ("--schedule", "cosine-restarts"), ("--warmup", "5"),
                                    ("--restarts", "9"), ("--grow", "8,16"), ("--arch", "resnet"),
                                    ("--mismatch-weight", "0.5"), ("--attention",), ("--cond-augment", "1")])
def test_each_option_does_something(option, tmp_path):
    changing = ("--lr-g", "1e-3:0", "--lr-d", "1e-3:0")
    base = ("--amp", "off", *{"--schedule": changing, "--restarts": (*changing, "--schedule", "cosine-restarts"),
                              "--burn-in": changing, "--blocks": ("--arch", "resnet"),
                              "--mismatch-weight": ("--condition", "text"), "--attention": ("--condition", "text"),
                              "--cond-augment": ("--condition", "text")}.get(option[0], ()))
    plain, other = (steps_of(trainer(tmp_path, *base, *o), 3) for o in ((), option))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(floats(plain.state.ema.net), floats(other.state.ema.net)))
    assert sum(skips(other)[0]) == 0 and all(torch.isfinite(x).all() for x in floats(other.state.ema.net))


def test_detail_is_shown_to_d(tmp_path):
    """Beside the image ten times its difference from the mean of the pixels around, of which edges have fewer."""
    t, told = trainer(tmp_path, "--amp", "off", "--detail", "10"), []
    t.state.D.net.stems[0].register_forward_pre_hook(lambda module, args: told.append(args[0].detach()))
    image = torch.rand(2, 3, 16, 16)
    t.state.D.net(image)
    assert torch.equal(told[0][:, :3], image) and told[0].shape[1] == 6
    for i, j in ((0, 0), (0, 7), (5, 9), (15, 15)):
        around = image[..., max(i - 1, 0):i + 2, max(j - 1, 0):j + 2].mean((2, 3))
        assert torch.allclose(told[0][:, 3:, i, j], 10 * (image[..., i, j] - around), atol=1e-5)


def test_files_from_before_an_option_are_read(tmp_path):
    """What a checkpoint of the same format does not name stood at its default."""
    t = trainer(tmp_path)
    saved = {"format": train.FORMAT, "options": dict(vars(t.run.args)), "model": dict(t.run.model), "best": None,
             "fingerprint": t.run.data.meta["fingerprint"], "generator": t.state.G.net.state_dict()}
    del saved["options"]["detail"], saved["model"]["detail"]
    train.check_same(t.run, saved, "checkpoint.pt")
    torch.save(saved, tmp_path / "generator.pt")
    assert train.load_generator(tmp_path / "generator.pt")[0].noise_dim == 100
    saved["options"]["detail"] = 10.0
    with pytest.raises(SystemExit):
        train.check_same(t.run, saved, "checkpoint.pt")


def test_a_longer_run_says_that_its_courses_are_others(tmp_path, capsys):
    t = trainer(tmp_path, "--lr-g", "2e-4:2e-5", "--epochs", "9")
    saved = {"format": train.FORMAT, "options": dict(vars(t.run.args)), "model": t.run.model, "best": None, "fingerprint": ""}
    train.check_same(t.run, saved, "x.pt")
    assert not capsys.readouterr().err
    saved["options"]["epochs"] = 2
    train.check_same(t.run, saved, "x.pt")
    said = capsys.readouterr().err
    assert said == "note: x.pt was to end after 2 epochs: --lr-g 0.0002:2e-05 goes on from where "\
                   "a run of 9 epochs has it at this step, not from END\n"
    for more in (("--lr-g", "2e-4"), ("--lr-g", "2e-4:2e-5", "--burn-in", "100")):
        t = trainer(tmp_path, "--epochs", "9", *more)
        train.check_same(t.run, saved | {"options": vars(t.run.args) | {"epochs": 2}}, "x.pt")
        assert not capsys.readouterr().err


def test_words_that_are_not_there_are_not_attended_to(tmp_path, capsys):
    trainer(tmp_path)
    meta = tmp_path / "data16" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"text_encoder": "some-model"}))
    np.save(tmp_path / "data16" / "embeddings.npy", np.zeros((64, 2, 8), np.float32))
    trainer(tmp_path, "--condition", "text")
    with pytest.raises(SystemExit, match="2"):
        trainer(tmp_path, "--condition", "text", "--attention")
    assert "--attention: " in capsys.readouterr().err


@pytest.mark.parametrize("capability, precision", [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_precision_is_that_of_the_gpu_asked_for(capability, precision, monkeypatch):
    asked = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {asked: capability}[device])
    assert train.find_precision("auto", asked) == precision


def test_a_full_disk_at_the_start(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(train, "lock", full)
    with pytest.raises(SystemExit, match="1"):
        train.Watch(trainer(tmp_path).run).open()


def test_clipping_bounds_the_gradient(tmp_path, monkeypatch):
    t = trainer(tmp_path, "--amp", "off", "--clip-grad", "0.01")
    seen = []
    monkeypatch.setattr(t.state.G.optimizer, "step", lambda: seen.append(
        torch.nn.utils.get_total_norm([p.grad for p in t.state.G.params]).item()))
    steps_of(t, 1)
    assert seen[0] == pytest.approx(0.01, rel=1e-3)


def test_accumulation_without_batch_statistics_equals_one_batch(tmp_path):
    whole, parts = (trainer(tmp_path, "--amp", "off", "--grad-accum", n) for n in ("1", "4"))
    for t in (whole, parts):
        for net in (t.state.G.net, t.state.D.net):
            for m in net.modules():
                if isinstance(m, torch.nn.BatchNorm2d):
                    m.eval()
        steps_of(t, 2)
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(floats(whole.state.G.net), floats(parts.state.G.net)))


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("arch", IMAGE_ARCHITECTURES)
def test_half_precision_with_everything(arch, amp, tmp_path):
    penalties = ("--r1", "0.1", "--r2", "0.1", "--gp", "1") if amp == "bf16" else ("--r1", "0", "--r2", "0", "--gp", "0")
    t = steps_of(trainer(tmp_path, "--amp", amp, "--arch", arch, "--condition", "text", "--attention", "--cond-augment",
                         "1", "--mismatch-weight", "0.5", "--grow", "8,16", "--diffaug", "--jitter", "0.1", "--loss",
                         "wgan-gp", "--feature-matching", "0.1", *penalties), 3)
    assert max(skips(t)[0]) <= (0 if amp == "bf16" else 3), "fp16's scale comes down in the first steps"
    assert all(torch.isfinite(x).all() for x in floats(t.state.ema.net))


def test_rmsprop_skips_leave_its_moments(tmp_path, monkeypatch):
    t = steps_of(trainer(tmp_path, "--optimizer", "rmsprop"), 2)
    before = [(p.clone(), t.state.D.optimizer.state[p]["square_avg"].clone()) for p in t.state.D.params]
    monkeypatch.setitem(train.LOSSES, "bce", (lambda r, f, a: D_LOSS["bce"](r, f, a) * math.nan, G_LOSS["bce"], {}))
    steps_of(t, 1)
    assert skips(t)[0] == [0, 1]
    assert all(torch.equal(p, w) and torch.equal(t.state.D.optimizer.state[p]["square_avg"], m)
               for p, (w, m) in zip(t.state.D.params, before))


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("where", ["loss of D", "gradient of G"])
def test_bad_numbers_skip_that_network_alone(amp, where, tmp_path, monkeypatch):
    t = steps_of(trainer(tmp_path, "--amp", amp), 2)
    before = [x.clone() for net in (t.state.G.net, t.state.D.net) for x in net.parameters()]
    moments = [{k: v.clone() for k, v in t.state.D.optimizer.state[p].items()} for p in t.state.D.params]
    if where == "loss of D":
        monkeypatch.setitem(train.LOSSES, "bce", (lambda r, f, a: D_LOSS["bce"](r, f, a) + math.inf, G_LOSS["bce"], {}))
        bad = t.state.D
    else:
        hook = t.state.G.params[0].register_hook(lambda grad: grad * math.nan)
        bad = t.state.G
    steps_of(t, 1)
    now = {"g": t.state.G, "d": t.state.D}
    half = len(t.state.G.params)
    same = {name: all(torch.equal(a, b) for a, b in zip(part, now[name].params))
            for name, part in (("g", before[:half]), ("d", before[half:]))}
    assert same == {"g": bad is t.state.G, "d": bad is t.state.D}
    if bad is t.state.D:
        assert all(torch.equal(v, t.state.D.optimizer.state[p][k]) for p, m in zip(t.state.D.params, moments) for k, v in m.items())
    assert skips(t)[0] == [float(bad is t.state.G), float(bad is t.state.D)]
    sums, counts = t.state.meter.sums[:, :8]  # without the clipped ones
    assert torch.isfinite(sums).all() and counts.min() == 2
    if where == "gradient of G":
        hook.remove()
        steps_of(t, 1)
        assert skips(t)[1:] == [[0, 0], [1, 0]]


@pytest.mark.parametrize("d_steps", ["1", "2"])
def test_a_bad_forward_pass_leaves_no_trace_in_the_average(d_steps, tmp_path):
    t = steps_of(trainer(tmp_path, "--amp", "off", "--d-steps", d_steps), 2)
    before = [x.clone() for x in floats(t.state.G.net)]
    hook = t.state.G.net.stages[0][1].register_forward_hook(lambda module, inputs, output: output * math.nan)
    steps_of(t, 1)
    hook.remove()
    assert skips(t)[0] == [d_steps == "1", 1]
    assert all(torch.equal(a, b) for a, b in zip(before, floats(t.state.G.net)))
    assert all(torch.isfinite(x).all() for x in floats(steps_of(t, 1).state.ema.net))


def test_steps_wait_for_nothing(tmp_path, monkeypatch):
    """No value is read back in the step: reading would make the host wait for a GPU."""
    t = steps_of(trainer(tmp_path), 1)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *a, n=name: pytest.fail(f"{n} in the step"))
    steps_of(t, 1)


@pytest.mark.parametrize("options", [("--arch", "upsample", "--amp", "fp16", "--grad-accum", "2"),
                                     ("--compile", "--amp", "off")])
def test_whole_runs(options, shapes, tmp_path):
    call("train.py", "--data", shapes, "--out", tmp_path, "--max-steps", "6", *TINY, *options,
         OMP_NUM_THREADS="2")
    assert log_of(tmp_path)[-1]["step"] == 6 and log_of(tmp_path)[-1]["skipped_d"] < 3


@pytest.mark.skipif("RUN_SLOW" not in os.environ, reason="minutes of compiling: RUN_SLOW=1 runs it")
@pytest.mark.parametrize("arch, loss", [
    ("dcgan", ("bce",)), ("dcgan", ("wgan-gp",)), ("upsample", ("hinge", "--spectral-norm")), ("upsample", ("lsgan",)),
    ("resnet", ("relativistic",)),
    ("resnet", ("relativistic", "--r1", "0", "--r2", "0", "--feature-matching", "0.1")),
    ("seq", ("bce",)), ("seq", ("relativistic",))])
def test_compiled_it_is_the_same_run(arch, loss, shapes, tmp_path):
    data = shapes
    if arch == "seq":
        data = tmp_path / "texts"
        call("prepare_data.py", "text", "--root", shapes / "captions.jsonl", "--out", data)
    losses = []
    for name, more in (("eager", ()), ("compiled", ("--compile",))):
        call("train.py", "--data", data, "--out", tmp_path / name, *TINY, "--arch", arch, "--loss", *loss, "--amp", "off",
             "--max-steps", "4", "--log-every", "1", *more)
        losses.append([[line[k] for k in ("loss_d", "loss_g", "grad_norm_g")] for line in log_of(tmp_path / name)])
    assert np.allclose(*losses, rtol=1e-3, atol=1e-4)


def test_two_processes(shapes, tmp_path):
    """gloo, batch normalisation in both networks, accumulation: one model, trained on the same images in the same order."""
    watched = tmp_path / "watched.py"
    watched.write_text(f"""import sys; sys.path.insert(0, {str(ROOT)!r})
import torch, train
if train.os.environ["RANK"] == "1":  # of another kind of node
    train.find_precision = lambda name, device: "bf16"
    make = train.make_state
    def make_state(run):
        state = make(run)
        for part in (state.G, state.D, state.ema):
            part.weights.mul_(1.001)
        return state
    train.make_state = make_state
save = train.save
def saved(run, state):
    mine = torch.cat([state.G.weights, state.D.weights])
    both = [torch.empty_like(mine) for _ in range(2)]
    train.dist.all_gather(both, mine)
    (run.out / "same").write_text(str(torch.equal(*both)))
    (run.out / f"amp{{run.rank}}").write_text(run.amp)
    save(run, state)
train.save = saved
train.main()
""")
    call(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", watched, "--data", shapes, "--out", tmp_path / "two",
         "--condition", "label", "--arch", "upsample", "--grad-accum", "2", "--amp", "off", "--max-steps", "12", *TINY)
    lines = log_of(tmp_path / "two")
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert (tmp_path / "two" / "same").read_text() == "True", "both processes hold the same weights"
    assert [(tmp_path / "two" / f"amp{rank}").read_text() for rank in (0, 1)] == ["off", "off"], "those of the first"
    assert json.loads((tmp_path / "two" / "config.json").read_text())["processes"] == 2
    assert 0 < lines[-1]["acc_real"] <= 1


def test_a_thousand_processes_read_each_row_once():
    assert scale.schedule(1000, 8000) == 8 * 64 * 64 * 3


def test_no_import_within_a_function_hides_a_module():
    """`import torch.x` there makes torch a local name, unbound on every path that does not pass the line."""
    for script in ("train.py", "prepare_data.py", "sample.py", "evaluate.py"):
        tree = ast.parse((ROOT / script).read_text())
        tops = {(name.asname or name.name).split(".")[0] for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
                for name in node.names}
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            inner = {(name.asname or name.name).split(".")[0] for node in ast.walk(function)
                     if isinstance(node, ast.Import | ast.ImportFrom) for name in node.names}
            assert not inner & tops, (script, function.name)


@pytest.mark.parametrize("processes, accumulate", [(2, 1), (4, 2)])
def test_the_result_does_not_hang_on_the_number_of_processes(processes, accumulate, shapes, tmp_path):
    """Normalised over the whole batch, in G and D; the same images and the same z in the same parts."""
    options = ("--data", shapes, "--batch-size", "16", "--grad-accum", accumulate, "--amp", "off", "--max-steps", "5", "--width", "4",
               "--log-every", "1", "--device", "cpu", "--feature-matching", "1")
    call("train.py", *options, "--out", tmp_path / "one")
    call(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", ROOT / "train.py", *options,
         "--out", tmp_path / "many")
    one, many = (train.load_file(tmp_path / name / "checkpoint.pt") for name in ("one", "many"))
    for player in ("G", "D"):
        for a, b in zip(one[player]["net"].values(), many[player]["net"].values(), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-5)
    losses = [[line["loss_d"] for line in log_of(tmp_path / name)] for name in ("one", "many")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_fid_while_training(weights, shapes, tmp_path):
    """The best is kept, and a resumed run has each FID once."""
    options = ("--data", shapes, "--out", tmp_path / "run", *TINY, "--save-every", "16", "--fid-every", "1", "--fid-num", "8")
    call("train.py", *options, "--epochs", "2")
    call("train.py", *options, "--epochs", "3")
    lines = [json.loads(line) for line in (tmp_path / "run" / "fid.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [16, 32, 48]
    assert all(line["n_generated"] == line["n_real"] == 8 and line["seconds"] > 0 for line in lines)
    best = min(lines, key=lambda line: line["fid"])
    assert train.load_file(tmp_path / "run" / "best.pt")["step"] == best["step"]
    # another run that goes on from it has a best of its own, from the step that it starts at
    call("train.py", *options, "--epochs", "4", "--out", tmp_path / "other", "--resume", tmp_path / "run" / "checkpoint.pt")
    scored = {line["step"]: line["fid"] for line in map(json.loads, (tmp_path / "other" / "fid.jsonl").read_text().splitlines())}
    assert list(scored) == [48, 64] and scored[48] == lines[-1]["fid"]
    assert scored[train.load_file(tmp_path / "other" / "best.pt")["step"]] == min(scored.values())
    # the best is compared with FIDs of as many images, whatever a call without --fid-every says
    call("train.py", *options[:-4], "--epochs", "4")
    refused("train.py", *options[:-2], "--epochs", "5", naming="--fid-num 8 there, 2048 asked")
    assert "already trained" not in call("train.py", *options, "--epochs", "5").stdout


def test_grids_show_all_of_data_alike(tmp_path):
    """Of 100 images in four classes, each one colour, the grid of the real ones has as many of each."""
    for i in range(100):
        (tmp_path / "src" / f"{i % 4}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (60 * (i % 4), 0, 0)).save(tmp_path / "src" / f"{i % 4}" / f"{i}.png")
    call("prepare_data.py", "folder", "--root", tmp_path / "src", "--size", "16", "--out", tmp_path / "data")
    call("train.py", "--data", tmp_path / "data", "--out", tmp_path / "run", *TINY, "--condition", "label", "--max-steps", "1")
    shown = np.asarray(Image.open(tmp_path / "run" / "grids" / "real.png"))[::16, ::16, 0]
    assert np.unique(shown, return_counts=True)[1].tolist() == [16, 16, 16, 16]


def test_begun_from_a_named_checkpoint_it_says_how_to_go_on(trained, shapes, tmp_path):
    """The same command would begin there once more."""
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.copy(run / "checkpoint.pt", run / "mine.pt")
    with subprocess.Popen([sys.executable, ROOT / "train.py", "--data", shapes, "--out", run, *TINY, "--epochs", "9999",
                           "--condition", "label", "--resume", run / "mine.pt"], stderr=subprocess.PIPE, text=True) as process:
        while log_of(run)[-1]["step"] < 52 and process.poll() is None:
            time.sleep(0.1)
        process.terminate()
        assert process.communicate(timeout=60)[1].endswith("the same command goes on with --resume auto\n")


FIDS = """
import json, os, sys
sys.path.insert(0, sys.argv.pop(1))
fids = json.loads(sys.argv.pop(1))
import evaluate, train
evaluate.find_weights = lambda: None
evaluate.fid_against_data = lambda *args: fids.pop(0) or os.kill(os.getpid(), 9)
train.main()
"""


def test_patience_ends_a_run(shapes, tmp_path):
    still = (sys.executable, "-c", FIDS, ROOT, "[50, 50]", "--data", shapes, "--out", tmp_path / "still", *TINY, "--fid-every", "1",
             "--epochs", "9", "--patience", "1")
    done = call(*still)
    status = json.loads((tmp_path / "still" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 32) and "--patience" in done.stdout
    assert "already" in call(*still).stdout


def test_run_killed_at_the_fid_that_uses_up_its_patience(shapes, tmp_path):
    """Called again it scores that step, trains no further, and draws its last grid."""
    command = (sys.executable, "-c", FIDS, ROOT)
    options = ("--data", shapes, "--out", tmp_path / "run", *TINY, "--fid-every", "1", "--epochs", "9", "--patience", "1")
    call(*command, "[50, 0]", *options, status=-9)
    grids = len(list((tmp_path / "run" / "grids").glob("step_*.png")))
    assert log_of(tmp_path / "run")[-1]["step"] == 32, "logged before it was scored"
    call(*command, "[60]", *options)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"], grids) == ("finished", 32, 5) and log_of(tmp_path / "run")[-1]["step"] == 32
    call(*command, "[50, 0]", *options, "--resume", "never", "--grid-every", "100", status=-9)
    call(*command, "[60]", *options, "--grid-every", "100")
    assert (tmp_path / "run" / "grids" / "step_0000032.png").exists()


def test_time_left_is_of_what_is_alike(tmp_path):
    """While G learns by likelihood, steps take another time: the end of that is what can be told."""
    call("prepare_data.py", "text", "--synthetic-oracle", "--num", "160", "--level", "word", "--out", tmp_path / "data")
    done = call("train.py", "--data", tmp_path / "data", "--out", tmp_path / "run", "--arch", "seq", "--epochs", "4",
                "--pretrain-epochs", "2", *TINY)
    lines = [line.endswith("left of the lead-in") for line in done.stdout.splitlines() if line.endswith("lead-in")
             or line.endswith(" left")]
    assert lines == [True] * 4 + [False] * 6, done.stdout


def diagnosed(tmp_path, *options, epochs=2, lead_in=-200, **values):
    t = trainer(tmp_path, *options)
    t.run.data.lead_in = lead_in
    watch = train.Watch(t.run)
    watch.first_step = -200
    for t.state.step in range(1, 4 * epochs + 1):  # 4 steps an epoch
        watch.diagnose(t.state, {"step": t.state.step, "loss_g": t.state.step / 10, "acc_real": 0.8, "acc_fake": 0.8,
                                 "diversity": 1.0, "clipped_g": 0.0, "clipped_d": 0.0} | values)
    return t.state.notes


def test_diagnosis_in_words_once_each(tmp_path, capsys):
    assert diagnosed(tmp_path) == {}
    assert list(diagnosed(tmp_path, acc_real=0.99, acc_fake=0.98)) == ["D wins"]
    assert capsys.readouterr().err.count("--lr-d") == 1
    assert list(diagnosed(tmp_path, acc_real=0.5, acc_fake=0.52)) == ["D loses"]
    assert list(diagnosed(tmp_path, "--loss", "relativistic", acc_real=0.5, acc_fake=0.52)) == []
    assert list(diagnosed(tmp_path, loss_g=0.7)) == ["no motion"]
    assert list(diagnosed(tmp_path, diversity=0.1)) == ["collapse"]
    assert list(diagnosed(tmp_path, diversity=0.1, lead_in=4)) == []  # D's first steps, as of any run
    assert list(diagnosed(tmp_path, "--clip-grad", "1", clipped_d=1.0)) == ["clipped"]


def test_order_does_not_depend_on_processes(tmp_path):
    run = trainer(tmp_path, "--epochs", "2").run
    run.data.rows = np.arange(64, dtype=np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8)
    alone = [batch[:, 0, 0, 0].tolist() for batch, _ in train.batches(run, 0)]
    assert sorted(sum(alone[:4], [])) == list(range(64)) != sum(alone[:4], [])
    assert alone[:4] != alone[4:]
    shares = [[batch[:, 0, 0, 0].tolist() for batch, _ in train.batches(replace(run, world=2, rank=rank), 3)]
              for rank in (0, 1)]
    assert [a + b for a, b in zip(*shares)] == alone[3:]


def test_the_first_process_sends_a_checkpoint_once(tmp_path, monkeypatch):
    """Each weight is a view of one tensor, which pickle would send anew with each of them."""
    t, sent = trainer(tmp_path, "--width", "32"), []
    monkeypatch.setattr(train.dist, "broadcast_object_list", lambda objects, *_: sent.append(len(pickle.dumps(objects))))
    saved, file = train.checkpoint(t.run, t.state), io.BytesIO()
    torch.save(saved, file)
    found = replace(t.run, world=2).on_first(lambda: saved)
    assert sent[0] < 1.1 * len(file.getvalue())
    for name, x in saved["G"]["net"].items():
        assert torch.equal(found["G"]["net"][name], x)


def test_what_a_step_recorded_is_gone_before_the_processes_part(tmp_path, monkeypatch):
    """NCCL waits for CUDA graphs that hold its messages: the frames of an error would keep them."""
    t, graphs, alive = trainer(tmp_path), [], []
    t.run.out.mkdir()
    monkeypatch.setattr(train.dist, "barrier", lambda group: None)
    monkeypatch.setattr(train.dist, "destroy_process_group", lambda: alive.append(graphs[-1]() is not None))

    def training(error):
        graph = torch.zeros(1)
        graphs.append(weakref.ref(graph))
        raise error
    for error in (FloatingPointError("updates were not finite"), SystemExit(2)):
        with pytest.raises(SystemExit), train.post_mortem(replace(t.run, world=2), t.state):
            training(error)
    assert alive == [False, False]


def test_the_host_is_at_most_two_steps_ahead(monkeypatch):
    class Event:
        def __init__(self, blocking):
            made.append(self)

        def record(self):
            pass

        def synchronize(self):
            waited.append(made.index(self))
    made, waited, queue = [], [], train.deque()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for step in range(5):
        train.follow(queue)
        assert waited == list(range(step - 1)), "after a step, for the end of the one before the last"


def test_a_gpu_that_was_given_and_is_not_there(monkeypatch, capsys):
    for module in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(module, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("SLURM_JOB_GPUS", raising=False)
    assert train.find_device("auto").type == "cpu"
    monkeypatch.setenv("SLURM_JOB_GPUS", "0,1")
    with pytest.raises(SystemExit, match="2"):
        train.find_device("auto")
    assert "GPU 0,1 is given" in capsys.readouterr().err and train.find_device("cpu").type == "cpu"
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert train.find_device("auto").type == "cpu"


def test_fid_on_the_cpu_where_the_gpu_is_full(tmp_path, monkeypatch, capsys):
    t, devices = trainer(tmp_path, "--fid-every", "1", "--condition", "text"), []
    t.run.out.mkdir()

    def scored(pixels, data, n, device):
        devices.append(device.type)
        if device.type != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 7.0
    monkeypatch.setattr(evaluate, "fid_against_data", scored)
    monkeypatch.setattr(train, "draw", lambda *args: None)
    watch = train.Watch(replace(t.run, device=torch.device("meta")))
    watch.trackers = SimpleNamespace(log=lambda *args: None)
    watch.logged = 0
    assert watch.score(t.state) == 7 and devices == ["meta", "cpu"]
    said = capsys.readouterr()
    assert "FID 7.00" in said.out and "FID on the CPU" in said.err


def test_a_process_that_lost_another_ends_at_once(tmp_path):
    """Without error.pt, whose copy a GPU might never finish, and without the end of Python, which waits for it too."""
    script = tmp_path / "orphan.py"
    script.write_text(f"""import atexit, sys; sys.path.insert(0, {str(ROOT)!r})
import train
from pathlib import Path
from types import SimpleNamespace
atexit.register(print, "the usual end")
train.checkpoint = lambda *args: print("a copy")
out = Path({str(tmp_path)!r})
run, state = SimpleNamespace(out=out, rank=1, total=9), SimpleNamespace(step=7, notes={{}})
with train.post_mortem(run, state):
    raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")
""")
    done = call(sys.executable, script, status=1)
    assert done.stdout == "" and "another process ended at step 7" in done.stderr and len(done.stderr.splitlines()) == 1
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed" and not (tmp_path / "error.pt").exists()


def test_refusals(shapes, trained, tmp_path, capsys):
    out = tmp_path / "out"
    base = ("train.py", "--data", shapes, "--out", out, "--device", "cpu")
    refused("train.py", "--data", tmp_path / "none", "--out", out, naming=["--data", "prepare_data.py"])
    refused(*base, "--batch-size", "15", "--grad-accum", "2", naming="--batch-size")
    refused(*base, "--batch-size", "1000", naming="--batch-size")
    for option, value in (("--batch-sise", "3"), ("--lr-g", "-1"), ("--loss", "hope"), ("--save-every", "0")):
        with pytest.raises(SystemExit, match="2"):
            train.parse_args(["--data", "-", "--out", "-", option, value])
        assert option in (said := capsys.readouterr().err) and len(said.splitlines()) == 1
    refused(*base, "--depth", "5", naming="--depth")
    t = trainer(tmp_path)
    for size in (1, 2, 3, 7, 9, 15):
        t.run.data.meta = t.run.data.meta | {"size": size}
        with pytest.raises(SystemExit, match="2"):
            t.run.data.model(t.run.args)
        assert f"{size} pixels halved" in capsys.readouterr().err
    refused(*base, "--lr-g", "1e-3:0", "--epochs", "2", "--burn-in", "513", naming=["--burn-in 513", "512 images", "--epochs"])
    refused(*base, "--grow", "12,16", naming="--grow")
    refused(*base, "--grow", "8,16", "--compile", naming=["--grow", "--compile"])
    refused(*base, "--attention", naming=["--attention", "--condition text"])
    refused(*base, "--mismatch-weight", "0.5", naming=["--mismatch-weight", "--condition"])
    refused(*base, "--condition", "label", "--mismatch-weight", "0.5", "--batch-size", "1", naming=["--mismatch-weight", "two images"])
    refused(*base, "--arch", "resnet", "--spectral-norm", naming="--spectral-norm")
    refused(*base, "--fid-every", "1", naming="weights", XDG_CACHE_HOME=str(tmp_path), TORCH_HOME=str(tmp_path), PIP_NO_INDEX="1",
            http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
    refused(*base, "--patience", "3", naming=["--patience", "--fid-every"])
    refused(*base, "--amp", "fp16", "--r1", "1", naming=["--amp", "--r1"])
    refused(*base, "--device", "cuda:0", LOCAL_WORLD_SIZE="2", naming="--device")
    refused(*base, "--device", "cuda:7", naming="--device")
    refused(*base, "--resume", tmp_path / "none.pt", naming="--resume")
    refused(*base, "--epochs", "2", "--batch-size", "64", "--warmup", "8", naming=["--warmup 8", "8 steps"])
    for place in ("", shapes, f"{shapes}/."):
        refused("train.py", "--data", shapes, "--out", place, naming="--out", cwd=tmp_path)
    assert not out.exists(), "a refusal leaves nothing"
    for name, content in (("log.jsonl", "mine"), ("lock", "a canal's")):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / name).write_text(content)
        refused(*base, "--out", tmp_path / "mine", *TINY, naming=["--out", name])
        assert [path.name for path in (tmp_path / "mine").iterdir()] == [name]
        shutil.rmtree(tmp_path / "mine")
    other = tmp_path / "other"
    call("prepare_data.py", "shapes", "--out", other, "--size", "32", "--num", "64")
    run = shutil.copytree(trained, tmp_path / "run")
    refused("train.py", "--data", other, "--out", run, "--condition", "label", "--epochs", "9", *TINY,
            naming=["sizes [16] there, [32] asked", "--out"])
    refused("train.py", "--data", shapes, "--out", run, "--condition", "label", "--epochs", "9", "--lr-g", "1e-3", *TINY,
            naming="--lr-g 0.0002 there, 0.001 asked")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "log.jsonl").write_text("mine")
    base = ("train.py", "--data", shapes, "--condition", "label", *TINY)
    refused(*base, "--out", mine, "--resume", run / "checkpoint.pt", naming=["--out", "log.jsonl"])
    assert [path.read_text() for path in mine.iterdir()] == ["mine"]
    refused(*base, "--out", run, "--epochs", "9", "--resume", trained / "checkpoint.pt", naming="a checkpoint of its own")
    begun = (*base, "--out", tmp_path / "begun", "--resume", trained / "checkpoint.pt", "--epochs", "4", "--max-steps")
    refused(*begun, "48", naming=["has made 48 steps", "--max-steps"])
    dead = tmp_path / "begun"  # of a run that was killed before its first checkpoint
    assert not dead.exists()
    (dead / "grids").mkdir(parents=True)
    (dead / "config.json").write_text(json.dumps({"run_id": "dead", "first_step": 0}))
    (dead / "log.jsonl").write_text('{"step": 7, "ms_per_step": 1e9}\n')
    (dead / "grids" / "step_0000007.png").write_text("")
    assert "steps 48 to 50" in call(*begun, "50").stdout
    assert "steps 50 to 52" in call(*begun, "52").stdout, "the same command goes on"
    config, log = json.loads((dead / "config.json").read_text()), log_of(dead)
    assert not (dead / "grids" / "step_0000007.png").exists() and config["run_id"] != "dead"
    assert config["first_step"] == 48 and evaluate.minutes_of(config, log)[0].tolist() == [48, 50, 52]
    assert evaluate.minutes_of(config, log)[1][-1] == pytest.approx(2 / 60_000 * sum(line["ms_per_step"] for line in log))
    refused(*base, "--out", out, "--resume", trained, naming=["not a file", "checkpoint.pt"])
    refused(*base, "--out", out, "--resume", run / "generator.pt", naming="generator.pt: no checkpoint")
    assert not out.exists()
    (tmp_path / "file").write_text("")
    refused("train.py", "--data", shapes, "--out", tmp_path / "file", naming="--out")
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"count": 65}))
    refused("train.py", "--data", other, "--out", out, naming=["meta.json", "65"])


@pytest.mark.parametrize("options, naming", [
    (("--restarts", "4"), "--restarts needs --schedule cosine-restarts"), (("--lr-g", "1:2:3"), "--lr-g"),
    (("--lr-g", "a:b"), "invalid number or START:END value: 'a:b'"), (("--r1", "1:"), "--r1"), (("--r1", ":1"), "--r1"),
    (("--beta2", "0.9:1"), "--beta2: 1 must be between 0 and 0.999999"), (("--lr-d", "1e-3:nan"), "--lr-d"),
    (("--schedule", "linear"), "--schedule needs a value START:END"), (("--burn-in", "64"), "--burn-in needs a value START:END"),
    (("--schedule", "constant", "--r2", "1:0"), "--schedule constant: --r2 1.0:0.0 changes: give it one value"),
    (("--ema", "0.9", "--ema-images", "99"), "--ema-images does not go with --ema"), (("--diffaug", "1.5"), "--diffaug"),
    (("--width-max", "32"), "--width-max 32: below --width 64"), (("--width", "8", "--width-d", "9", "--width-max", "8"), "--width-d 9"),
    (("--blocks", "2"), "--blocks needs --arch resnet"),
    (("--extra-convs", "1", "--arch", "resnet"), "--extra-convs does not go with --arch resnet"),
    (("--beta1", "0.5", "--optimizer", "rmsprop"), "--beta1 needs --optimizer adam"), (("--fid-num", "9"), "--fid-num needs"),
    (("--patience", "3"), "--patience needs --fid-every"), (("--attention",), "--attention needs --condition text"),
    (("--cond-augment", "1"), "--cond-augment needs --condition"), (("--real-label", "0.9", "--loss", "hinge"), "--real-label needs"),
    (("--norm-d", "none", "--arch", "resnet"), "--norm-d does not go with --arch resnet"),
    (("--pretrain-lr", "0.1", "--arch", "seq"), "--pretrain-lr needs --pretrain-epochs"),
    (("--temperature", "1"), "--temperature needs --arch seq"), (("--flip", "--arch", "seq"), "--flip needs --arch dcgan"),
    (("--temperature", "0:1", "--arch", "seq"), "--temperature: 0 must be between"),
    (("--grow", "8,16", "--compile"), "--grow does not go with --compile"),
    (("--arch", "sngan", "--compile"), "--compile does not go with --arch sngan"),
    (("--batch", "3"), "did you mean --batch-size?"), (("--lr", "1"), "did you mean --lr-g or --lr-d?"),
    (("--lr-g", "nan"), "--lr-g"), (("--r1", "inf"), "--r1"), (("--ema", "1"), "between 0 and 0.999999")])
def test_options_without_effect_and_out_of_range_are_refused_by_name(options, naming, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.parse_args(["--data", "d", "--out", "r", *options])
    said = capsys.readouterr().err
    assert naming in said and len(said.splitlines()) == 1


def test_a_checkpoint_holds_every_field_of_the_state(tmp_path):
    """Whatever State has is written and read back; all of a player but its parts that are made anew."""
    t = steps_of(trainer(tmp_path, "--amp", "fp16", "--optimizer", "adamw"), 2)
    t.state.best, t.state.notes = {"fid": 7.5, "step": 1, "since": 0, "last": 2}, {"collapse": "step 2: …"}
    other, tree = trainer(tmp_path, "--amp", "fp16", "--optimizer", "adamw", "--seed", "1"), t.state.state_dict()
    fresh = other.state
    assert list(tree) == [f.name for f in fields(train.State)]
    torch.save(tree, tmp_path / "tree.pt")
    fresh.load_state_dict(torch.load(tmp_path / "tree.pt", weights_only=True))
    train.prepare_step(other.run, fresh)  # learning rates are of the step
    assert json.dumps(fresh.state_dict(), default=str) == json.dumps(tree, default=str)
    for one, other in ((fresh.G, t.state.G), (fresh.D, t.state.D), (fresh.ema, t.state.ema)):
        assert torch.equal(one.weights, other.weights) and torch.equal(one.statistics, other.statistics)
    assert fresh.G.optimizer.param_groups[0]["lr"] is fresh.G.lr, "the step's own learning rate, not the checkpoint's"

    @dataclass
    class More(train.State):
        extra: int = 3
    more, less = (More(*(getattr(t.state, f.name) for f in fields(train.State)), extra) for extra in (5, 3))
    less.load_state_dict(more.state_dict())
    assert less.extra == 5


def test_checkpoints_of_another_version_are_refused(trained, shapes, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    for name in ("checkpoint.pt", "generator.pt"):
        saved = train.load_file(run / name)
        del saved["format"]
        train.write_torch(run / name, saved)
    refused("train.py", "--data", shapes, "--out", run, "--condition", "label", "--epochs", "9", *TINY,
            naming=["checkpoint.pt", "another version", "--resume never"])
    refused("sample.py", "--run", run, naming=["generator.pt", "another version"])
    train.write_torch(run / "generator.pt", saved | {"format": train.FORMAT, "model": saved["model"] | {"arch": "resnet"}})
    refused("sample.py", "--run", run, naming=["generator.pt", "no generator.pt or best.pt of train.py"])


def test_the_loss_that_the_readme_adds(tmp_path, monkeypatch):
    """The example of "Changing the code" as it is printed there."""
    entry = re.search(r"`--loss margin`, .*?```python\n(.*?)```", (ROOT / "docs" / "code.md").read_text(), re.S)[1]
    for name, loss in eval(f"{{{entry}}}", vars(train)).items():
        monkeypatch.setitem(train.LOSSES, name, loss)
    t = steps_of(trainer(tmp_path, "--loss", "margin", "--amp", "off"), 2)
    assert t.run.args.r1 == 0.1 and skips(t)[0] == [0, 0]
    assert train.LOSSES["margin"][0](torch.tensor([1.0]), torch.tensor([-3.0]), None).item() == 1


def test_images_need_nothing_of_texts(shapes, tmp_path):
    """Without the section of texts and its line in the registry the rest trains images."""
    source = (ROOT / "train.py").read_text()
    section = source[source.index("# ---- texts"):source.index("# ---- what can be trained")]
    entry = re.search(r'    "seq": .*\n', source)[0]
    (tmp_path / "train.py").write_text(source.replace(section, "").replace(entry, ""))
    shutil.copy(ROOT / "prepare_data.py", tmp_path)
    call(sys.executable, tmp_path / "train.py", "--data", shapes, "--out", tmp_path / "run", "--condition", "text",
         "--max-steps", "2", *TINY)
    rest = (tmp_path / "train.py").read_text()
    assert not re.search(r"\b(seq|Texts|likelihood|pretrain\w*|length)\b", rest.replace("of texts", ""))


def test_wrong_conditions_are_wrong_and_drawn_evenly(tmp_path):
    torch.manual_seed(0)
    two = torch.tensor([0, 1, 1, 0, 1])
    for _ in range(20):
        wrong, differs = train.another(two)
        assert torch.equal(wrong, 1 - two) and differs.all(), "of two classes the other"
    three, drawn = torch.tensor([0, 1, 2, 2, 2, 0]), torch.zeros(3)
    for _ in range(2000):
        drawn[train.another(three)[0][0]] += 1
    assert torch.allclose(drawn / 2000, torch.tensor([0, 1 / 4, 3 / 4]), atol=0.03), "as often as the others have it"
    same, differs = train.another(torch.tensor([[3, 4, 0], [3, 4, 0], [3, 4, 0]]))
    assert not differs.any() and torch.equal(same[0], torch.tensor([3, 4, 0]))
    captions = torch.tensor([[3, 4, 0], [3, 5, 0], [3, 4, 0]])
    assert torch.equal(train.another(captions)[0], captions[[1, 0, 1]]) or torch.equal(train.another(captions)[0], captions[[1, 2, 1]])


def test_wrong_conditions_come_from_the_whole_batch_under_accumulation(tmp_path, monkeypatch):
    """One image a part: each is judged with another image's caption, and never with its own."""
    t = trainer(tmp_path, "--condition", "text", "--mismatch-weight", "0.5", "--grad-accum", "16", "--amp", "off")
    pairs, loss_of_d = [], train.loss_of_d

    def watched(run, D, amounts, x, c, fake, dial, wrong, differs):
        pairs.append((c, wrong, differs))
        return loss_of_d(run, D, amounts, x, c, fake, dial, wrong, differs)
    monkeypatch.setattr(train, "loss_of_d", watched)
    steps_of(t, 1)
    assert len(pairs) == 16 and all(len(c) == 1 and differs.all() for c, _, differs in pairs)
    assert not any(torch.equal(c, wrong) for c, wrong, _ in pairs)


def test_a_resumed_optimiser_keeps_what_is_of_its_device(tmp_path):
    """A checkpoint of a CPU says capturable=False and has a learning rate of its own: neither is taken over."""
    t = steps_of(trainer(tmp_path), 1)
    tree = t.state.state_dict()
    group, = tree["G"]["optimizer"]["param_groups"]
    group |= {"capturable": True, "lr": 7.0}
    t.state.load_state_dict(tree)
    group, = t.state.G.optimizer.param_groups
    assert group["capturable"] is False and group["lr"] is t.state.G.lr and group["params"] == t.state.G.params


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_an_optimiser_of_a_cpu_goes_on_counting_on_the_device(tmp_path, optimizer):
    """A captured step counts on the GPU, which the meta device stands for here, wherever the run came from."""
    t = steps_of(trainer(tmp_path, "--optimizer", optimizer), 1)
    player = copy.copy(t.state.G)
    weights = copy.deepcopy(player.net).to("meta").parameters()
    player.net = SimpleNamespace(load_state_dict=lambda values: None)
    player.optimizer = train.OPTIMIZERS[optimizer](weights, player.lr, (0.5, 0.9), fused=True, capturable=True)
    player.load_state_dict(t.state.G.state_dict())
    assert player.optimizer.param_groups[0]["capturable"] and player.optimizer.param_groups[0]["lr"] is player.lr
    assert {s["step"].device.type for s in player.optimizer.state.values()} == {"meta"}


def test_killed_in_its_last_fid_a_run_is_scored_when_called_again(weights, shapes, tmp_path):
    options = ("--data", shapes, "--out", tmp_path / "run", *TINY, "--epochs", "1", "--fid-every", "1", "--fid-num", "4")
    code = "import train\ntrain.Watch.score = lambda *a: train.os.kill(train.os.getpid(), 9)\ntrain.main()"
    call(sys.executable, "-c", code, *options, status=-9, cwd=ROOT)
    assert train.load_file(tmp_path / "run" / "checkpoint.pt")["step"] == 16 and not (tmp_path / "run" / "fid.jsonl").exists()
    for _ in range(2):
        call("train.py", *options)
    assert len((tmp_path / "run" / "fid.jsonl").read_text().splitlines()) == 1 and (tmp_path / "run" / "best.pt").exists()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"


def test_one_visible_gpu_a_process(monkeypatch):
    """Shown a GPU each (--gpus-per-task, --virtual-local-rank), all call it cuda:0; one for all is refused."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "empty", lambda *args, **more: None)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(SystemExit, match="2"):
        train.find_device("cuda", 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert train.find_device("cuda", 8) == torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert train.find_device("cuda", 8) == torch.device("cuda:3")


def test_data_move_in_slices(tmp_path):
    """The host's memory holds no copy of them, and they arrive whole."""
    rows = np.lib.format.open_memmap(tmp_path / "rows.npy", "w+", np.uint8, (130, 2 ** 20))
    rows[:] = np.arange(130)[:, None]
    tracemalloc.start()
    moved = train.in_slices(rows, torch.device("cpu"))
    assert tracemalloc.get_traced_memory()[1] < 1.1 * 2 ** 26
    tracemalloc.stop()
    assert moved.dtype == torch.uint8 and np.array_equal(moved.numpy(), rows)


def test_deterministic_and_tf32(tmp_path):
    t = trainer(tmp_path, "--amp", "off", "--deterministic", "--tf32", "off")
    try:
        train.settle(t.run.args, t.run.device)
        assert torch.are_deterministic_algorithms_enabled() and os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    assert train.precision(t.run) == "fp32"
    assert not {"tf32", "deterministic"} - train.FREE, "a run may go on with another"


def test_mps_where_torch_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "find_device", lambda *asked: torch.device("mps"))
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.12.1"))
    with pytest.raises(SystemExit, match="2"):
        trainer(tmp_path)
    assert "--device cpu" in capsys.readouterr().err
