"""Texts: --arch seq from prepare_data.py to evaluate.py."""

import json
import math
import random
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, call, log_of, refused

import evaluate
import sample
import train

WORDS = ("red", "green", "blue", "small", "large", "circle", "square", "star")
OPTIONS = ("--arch", "seq", "--width", "16", "--width-d", "16", "--batch-size", "16", "--log-every", "2",
           "--save-every", "2", "--grid-every", "4", "--device", "cpu", "--loss", "relativistic")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    rng, file = random.Random(0), tmp_path_factory.mktemp("corpus") / "texts.txt"
    file.write_text("".join(" ".join(rng.choices(WORDS, k=rng.randint(2, 6))) + "\n" for _ in range(200)) + "\n\x07 \n")
    return file


@pytest.fixture(scope="module")
def data(corpus):
    call("prepare_data.py", "text", "--root", corpus, "--out", corpus.parent / "data")
    return corpus.parent / "data"


@pytest.fixture(scope="module")
def run(data):
    call("train.py", "--data", data, "--out", data.parent / "run", *OPTIONS, "--epochs", "2", "--pretrain-epochs", "1",
         "--amp", "fp16", "--r1", "0", "--r2", "0")
    return data.parent / "run"


def arrays(data):
    return (json.loads((data / "meta.json").read_text()), *(np.load(data / f"{n}.npy") for n in ("tokens", "held_out")))


def test_words(data, corpus):
    meta, tokens, held_out = arrays(data)
    assert tokens.dtype == np.int32 and tokens.shape == (meta["count"], 6) and meta["length"] == 6
    assert sorted(meta["vocabulary"]) == sorted(["", "<unk>", *WORDS])
    texts, held = (train.to_texts(torch.from_numpy(ids), meta) for ids in (tokens, held_out))
    assert not set(texts) & set(held) and len(held) == len(set(texts) | set(held)) // 10
    lines = [line for line in corpus.read_text().splitlines() if line.strip("\x07 ")]
    assert [line for line in lines if line not in held] == texts
    assert "already prepared" in call("prepare_data.py", "text", "--root", corpus, "--out", data).stdout


def test_characters_captions_and_folders(tmp_path, data):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.jsonl").write_text("".join(json.dumps({"captions": [f"Nr {i}", f"\ud800{i}<b>"]}) + "\n" for i in range(20)))
    (texts / "b.txt").write_text("a\ttext far\u00a0longer than all the others\n")
    said = call("prepare_data.py", "text", "--root", texts, "--level", "char", "--length", "5", "--out", tmp_path / "d").stdout
    meta, tokens, held_out = arrays(tmp_path / "d")
    assert tokens.shape[1] == 5 and len(tokens) + len(held_out) == 41 and "; 1 cut" in said
    assert {"N", "<", "7"} < set(meta["vocabulary"]) and all(c.isprintable() for c in meta["vocabulary"])
    back = train.to_texts(torch.from_numpy(np.concatenate([tokens, held_out])), meta)
    assert "a tex" in back and "Nr 7" in back and "7<b>" in back and "r" in meta["vocabulary"] and "f" not in meta["vocabulary"]
    (texts / "._a.txt").write_bytes(b"\0\5\x16")  # what a Mac adds to its archives
    packed = shutil.make_archive(tmp_path / "packed", "zip", texts)
    call("prepare_data.py", "text", "--root", packed, "--level", "char", "--length", "5", "--out", tmp_path / "z")
    assert np.array_equal(arrays(tmp_path / "z")[1], tokens), "an archive is read like the folder"
    refused("prepare_data.py", "text", "--root", data / "tokens.npy", "--out", tmp_path / "x", naming="not UTF-8 text")
    refused("prepare_data.py", "text", "--out", tmp_path / "x", naming="--root")
    refused("prepare_data.py", "text", "--root", texts / "b.txt", "--out", tmp_path / "x", naming=["b.txt", "20"])
    refused("prepare_data.py", "text", "--root", texts / "a.jsonl", "--length", "1", "--out", tmp_path / "x",
            naming=["--length", "at least 2"])
    (tmp_path / "words.txt").write_text("".join(f"word{i}\n" for i in range(30)))
    refused("prepare_data.py", "text", "--root", tmp_path / "words.txt", "--out", tmp_path / "x", naming="2 or more")
    (texts / "c.jsonl").write_text("[]\n")
    refused("prepare_data.py", "text", "--root", texts, "--out", tmp_path / "x", naming="c.jsonl")
    refused("prepare_data.py", "shapes", "--length", "5", "--out", tmp_path / "x", naming="--length")
    assert not (tmp_path / "x").exists()


def test_oracle(tmp_path):
    for name in ("a", "b"):
        call("prepare_data.py", "text", "--synthetic-oracle", "--num", "300", "--out", tmp_path / name)
    _, tokens, held_out = arrays(tmp_path / "a")
    assert np.array_equal(tokens, arrays(tmp_path / "b")[1])
    oracle = tmp_path / "a" / "oracle.pt"
    # the published figure for real data is 5.75, for an LSTM of other random numbers
    assert evaluate.oracle_nll(oracle, tokens) == pytest.approx(5.75, abs=0.3)
    assert evaluate.oracle_nll(oracle, held_out) == pytest.approx(evaluate.oracle_nll(oracle, tokens), abs=0.1)
    noise = np.random.default_rng(0).integers(1, 5001, (300, 20))
    assert evaluate.oracle_nll(oracle, noise) > math.log(5000), "any text is likelier to itself than to chance"


def networks(vocabulary=5, length=4):
    torch.manual_seed(0)
    return train.build_networks({"arch": "seq", "sizes": [length], "channels": vocabulary, "width": 8, "width_d": 8})


def test_networks():
    G, D = networks()
    torch.nn.init.normal_(G.logits.weight, 0, 3)
    soft = G(torch.randn(64, 4), None, 0.7)
    assert soft.shape == (64, 4, 5) and torch.allclose(soft.sum(2), torch.ones(64, 4), atol=1e-5)
    assert ((soft - soft.round()).abs() < 1e-5).all(), "straight through: tokens, not mixtures"
    ended = soft.argmax(2) == 0
    assert (ended[:, :-1] <= ended[:, 1:]).all() and ended.any() and not ended.all(), "after the end nothing is written"
    logits, features = D(soft)
    assert logits.shape == (64,) and features.shape == (64, 24)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in G.parameters())
    G.eval()
    z = torch.randn(64, 4)
    assert torch.equal(G(z)[:10], G(z[:10])), "the noise alone decides"
    assert (G(z, None, 1e-4) == G(z[:1], None, 1e-4)).all(), "cold: the likeliest text, whatever the noise"


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_likelihood_is_that_of_what_is_drawn(temperature):
    G, _ = networks(vocabulary=3, length=2)
    torch.nn.init.normal_(G.logits.weight, 0, 3)
    G.eval()
    with torch.no_grad():
        side = (torch.arange(400) + 0.5) / 400  # quantiles, evenly
        drawn = G(torch.special.ndtri(torch.cartesian_prod(side, side)), None, temperature).argmax(2)
        for text in ([1, 2], [2, 1], [1, 0], [2, 2], [0, 0]):
            loss, counts = G.likelihood(torch.tensor([text]), temperature)
            assert counts.tolist() == [[True, text[0] > 0]]
            share = (drawn == torch.tensor(text)).all(1).float().mean().item()
            assert math.exp(-(loss * counts).sum().item()) == pytest.approx(share, abs=0.005)


def test_temperatures():
    def at(step, *options):
        args = train.parse_args(["--data", "d", "--out", "r", "--arch", "seq", *options])
        texts = train.Texts.__new__(train.Texts)
        texts.lead_in = 100
        return texts.dial(train.Run(args, texts, {}, None, "off", 10, 1100, 1100, None, 0, 1), step)
    assert [at(s) for s in (0, 100, 600, 1100)] == pytest.approx([2, 2, 1, 0.5]), "evenly in the logarithm"
    assert at(350) == pytest.approx(0.5 * 4 ** ((1 + math.cos(math.pi / 4)) / 2))
    relgan = ("--temperature", "1:0.01", "--schedule", "linear")
    assert [at(s, *relgan) for s in (100, 600, 1100)] == pytest.approx([1, 0.1, 0.01])
    assert [at(s, *relgan, "--burn-in", "6400") for s in (0, 150, 200, 900)] == pytest.approx([1, 0.1, 0.01, 0.01])
    assert [at(s, "--temperature", "3") for s in (0, 700)] == pytest.approx([3, 3])


def test_what_a_run_leaves(run, data):
    lines = log_of(run)
    steps = json.loads((run / "config.json").read_text())["steps_per_epoch"]
    first, second = ([line for line in lines if (line["step"] <= steps) == early] for early in (True, False))
    assert all(line["loss_d"] is None and line["grad_norm_g"] > 0 for line in first)
    assert first[-1]["loss_g"] < math.log(10) and first[-1]["lr_g"] == 5e-3
    assert all(0 <= line["acc_real"] <= 1 and 0 < line["reward"] < 1 and 0.5 < line["temperature"] < 2 for line in second[1:])
    assert second[-1]["lr_g"] == 2e-4
    latest = (run / "grids" / "latest.txt").read_text().splitlines()
    assert len(latest) == 64 and {w for line in latest for w in line.split()} <= {*WORDS, "<unk>"}
    assert (run / "grids" / "real.txt").exists() and not list((run / "grids").glob("*.png"))


def test_resumed_it_is_the_same_run(data, tmp_path):
    """Stopped in the likelihood's part and in the other, with penalties, accumulation, clipping, D's own rhythm."""
    options = ("train.py", "--data", data, *OPTIONS, "--gp", "1", "--epochs", "2", "--pretrain-epochs", "1",
               "--grad-accum", "2", "--clip-grad", "1", "--d-steps", "2", "--amp", "bf16", "--likelihood-weight", "0.5")
    for steps in (3, 20):
        call(*options, "--out", tmp_path / "parts", "--max-steps", steps)
    call(*options, "--out", tmp_path / "whole", "--max-steps", "20")
    parts, whole = (train.load_file(tmp_path / name / "checkpoint.pt") for name in ("parts", "whole"))
    for name in ("G", "D", "ema"):
        assert all(torch.equal(value, whole[name]["net"][key]) for key, value in parts[name]["net"].items())
    assert whole["G"]["skips"].sum() == whole["D"]["skips"].sum() == 0


def test_likelihood_beside_d(data, tmp_path, monkeypatch):
    """G's gradient is that of the game and so many times that of the texts' likelihood; D's own steps have neither."""
    update, found = train.Player.update, []

    def noted(player, run):
        if player.name == "g":
            found.append([p.grad.clone() for p in player.params])
        return update(player, run)

    monkeypatch.setattr(train.Player, "update", noted)

    def one_step(*options):
        run = train.make_run(train.parse_args(["--data", str(data), "--out", str(tmp_path), *OPTIONS, "--r1", "0", "--r2", "0",
                                               "--amp", "off", "--grad-accum", "2", *options]))
        state, (tokens, _) = train.make_state(run), next(train.batches(run, 0))
        run.data.step(run, state, *train.prepare_step(run, state), tokens, None)
        return run, state, tokens

    one_step()
    run, _, tokens = one_step("--likelihood-weight", "0.3")
    G = train.make_state(run).G
    loss, counts = G.net.likelihood(tokens.long())
    by_hand = torch.autograd.grad(0.3 * loss[counts].mean(), G.params)
    for alone, both, term in zip(*found, by_hand):
        assert torch.allclose(both - alone, term, atol=1e-6) and term.abs().max() > 1e-4
    _, state, _ = one_step("--likelihood-weight", "0.3", "--d-steps", "2")
    assert len(found) == 2 and all(p.grad is None for p in state.G.params)
    refused("train.py", "--data", data, "--out", tmp_path / "r", "--likelihood-weight", "1", naming="--likelihood-weight")


def test_texts_depend_on_seed_and_number_alone(run, tmp_path, capsys):
    for name, more in (("a", ("--num", "100")), ("b", ("--num", "70")), ("c", ("--num", "70", "--seed", "1")),
                       ("cold", ("--num", "70", "--temperature", "0.01"))):
        call("sample.py", "--run", run, "--out", tmp_path / f"{name}.txt", "--device", "cpu", *more)
    a, b, c, cold = ((tmp_path / f"{name}.txt").read_text().splitlines() for name in ("a", "b", "c", "cold"))
    assert len(a) == 100 and a[:70] == b and b != c
    assert len(set(cold)) < len(set(b))
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["temperature"] == 1 and 0 < record["nll"] < math.log(10) and record["nll_texts"] > 0
    assert json.loads((tmp_path / "cold.json").read_text())["nll"] > record["nll"], "of what is drawn, which is colder"
    refused("sample.py", "--run", run, "--grid", "4", naming="--grid")
    refused("sample.py", "--run", run, "--temperature", "0", naming="--temperature")
    with pytest.raises(SystemExit, match="2"):
        sample.parse_args(["--run", str(run), "--export", "g.pt2", "--temperature", "2"])
    assert "--temperature" in capsys.readouterr().err


def test_bleu_and_the_other_figures(run, data, tmp_path):
    texts = ["a b c d e f".split(), "f e d c b a".split()]
    assert evaluate.bleu(texts, lambda i: [texts[i]]) == pytest.approx({n: 1 for n in (2, 3, 4, 5)})
    # three of four words and two of three pairs are there; as long as the reference
    assert evaluate.bleu([list("abcx")], lambda i: [list("abcd")])[2] == pytest.approx(math.sqrt(3 / 4 * 2 / 3))
    copy = shutil.copytree(run, tmp_path / "run")
    meta, tokens, held_out = arrays(data)
    known, unseen = train.to_texts(torch.from_numpy(tokens), meta)[0], train.to_texts(torch.from_numpy(held_out), meta)
    lines = [known, known, *unseen[:2]]
    (copy / "texts.txt").write_text("\n".join(lines) + "\n")
    (copy / "texts.json").write_text(json.dumps({"generator": "0", "num": 4, "nll": 1.5, "nll_texts": 7}))
    said = call("evaluate.py", "--run", copy).stdout
    metrics = json.loads((copy / "metrics.json").read_text())
    words = [word for line in lines for word in line.split()]
    expected = {"novelty": 0.5, "different": 0.75, "nll": 1.5, "distinct_1": len(set(words)) / len(words)}
    assert {name: metrics[name]["value"] for name in expected} == pytest.approx(expected)
    assert metrics["self_bleu_2"]["value"] >= 0.5 <= metrics["bleu_2"]["value"] < 1 and "novelty" in said
    page = (copy / "report.html").read_text()
    assert unseen[0] in page and "Real texts" in page and "texts of 6 tokens" in page
    refused("evaluate.py", "--run", run, naming=["texts.txt", "sample.py"])
    refused("evaluate.py", "--run", copy, "--floor", naming="--floor")


def test_oracle_in_the_chain(tmp_path):
    call("prepare_data.py", "text", "--synthetic-oracle", "--num", "64", "--out", tmp_path / "data")
    call("train.py", "--data", tmp_path / "data", "--out", tmp_path / "run", *OPTIONS, "--max-steps", "2")
    call("sample.py", "--run", tmp_path / "run", "--num", "20", "--device", "cpu")
    call("evaluate.py", "--run", tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["nll_oracle"]["value"] > metrics["nll_oracle_real"]["value"] + 2, "an untrained G writes noise"
    assert metrics["nll"]["value"] == pytest.approx(math.log(5001), abs=0.5)


def test_two_processes(data, run, tmp_path):
    """gloo: the likelihood of the same texts as one process sees; then both learn against D."""
    call(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py", "--data", data,
         "--out", tmp_path / "two", *OPTIONS, "--epochs", "2", "--pretrain-epochs", "1", "--amp", "off")
    one, two = log_of(run), log_of(tmp_path / "two")
    assert [line["step"] for line in two] == [line["step"] for line in one]
    before = [[line["loss_g"] for line in lines if line["loss_d"] is None] for lines in (one, two)]
    assert len(before[0]) > 2 and np.allclose(*before, rtol=0.02) and before[1][0] > before[1][-1]
    assert two[-1]["loss_d"] > 0 and 0 < two[-1]["acc_real"] <= 1 and two[-1]["skipped_g"] == 0


def test_refusals(data, shapes, tmp_path):
    for options, naming in ((("--flip",), "--flip"), (("--condition", "text"), "--condition"), (("--latent-dim", "9"), "--latent-dim"),
                            (("--fid-every", "1"), "--fid-every"), (("--grow", "2,4"), "--grow"),
                            (("--temperature", "0"), "--temperature")):
        refused("train.py", "--data", data, "--out", tmp_path / "r", *OPTIONS, *options, naming=naming)
    refused("train.py", "--data", data, "--out", tmp_path / "r", naming=["--arch", "seq"])
    refused("train.py", "--data", shapes, "--out", tmp_path / "r", *OPTIONS, naming=["--arch", "texts", "dcgan"])
    refused("train.py", "--data", shapes, "--out", tmp_path / "r", "--pretrain-epochs", "1", naming="--pretrain-epochs")
    broken = shutil.copytree(data, tmp_path / "broken")
    np.save(broken / "tokens.npy", np.load(data / "tokens.npy") + 100)
    refused("train.py", "--data", broken, "--out", tmp_path / "r", *OPTIONS, naming="vocabulary")
    assert not (tmp_path / "r").exists()
