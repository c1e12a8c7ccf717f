"""What is counted, measured and compared; and that a GPU's ten minutes survive what goes wrong."""
import argparse
import contextlib
import json
import re
import subprocess

import pytest
import torch

import decoder
import unclip
from extras import acceptance, benchmark

SMALL = decoder.UNetConfig(size=8, channels=32, mults=(1, 2), attention=(8, 4), head_channels=32,
                           context_width=32)


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """rows(option, ...) -> {part: its row} of `benchmark.py run`."""
    monkeypatch.setattr(benchmark, "matmul_ceiling", lambda device, dtype: 1e11)

    def run(*options):
        file = tmp_path / "rows.json"
        benchmark.main(["run", "--limit-seconds", "0.01", "--json", str(file), *options])
        return {row["stage"]: row for row in json.loads(file.read_text())["stages"]}
    return run


@pytest.mark.parametrize("options", [[], ["--train", "--batch", "2"]])
def test_every_part_is_measured(rows, options):
    found = rows(*options)
    assert list(found) == list(unclip.PARTS)
    for name, part in unclip.build("toy", "meta").parts.items():
        row = found[name]
        assert row["parameters"] == sum(w.numel() for w in part.parameters())
        assert row["FLOPs"] > row["parameters"] and row["seconds"] > 0
    assert found["decoder"]["steps"] == (1 if options else 12)


def test_the_papers_size_is_counted_without_a_gpu(rows):
    """3.03 TFLOP a step, both halves of guidance, and the context's keys and values at each."""
    found = rows("--preset", "paper", "--device", "meta", "--dtype", "bf16", "--only", "decoder",
                 "diffusion_prior")
    row, unet = found["decoder"], unclip.build_part(
        decoder.Decoder, unclip.paper().decoder, "meta").unet
    context = sum(w.numel() for name, w in unet.named_parameters() if "context.weight" in name)
    assert row["FLOPs"] == pytest.approx(250 * (3.03e12 + 2 * 2 * 260 * context), rel=0.01)
    assert "seconds" not in row and row["needs"] > 2 * row["parameters"]

    # the prior: the caption's tokens once, three tokens at each of 64 steps, 2 candidates
    L, W, layers = 257, 2048, 24
    once, step = (2 * n * 12 * W * W * layers for n in (L, 3))
    assert found["diffusion_prior"]["FLOPs"] == pytest.approx(2 * once + 64 * 2 * step, rel=0.15)


def test_recomputing_needs_less_memory_and_is_no_more_work(rows):
    words = ["--device", "meta", "--train", "--batch", "64", "--only", "decoder"]
    plain, again = (rows(*words, *more)["decoder"] for more in ([], ["--recompute"]))
    assert plain["FLOPs"] == again["FLOPs"] and again["needs"] < 0.7 * plain["needs"]


def test_reranking_draws_four_small_images_for_each_large_one(rows, monkeypatch):
    words, s = ["--device", "meta"], unclip.PRESETS["toy"].sampling
    four = rows(*words)
    monkeypatch.setattr(s, "rerank", 1)
    one = rows(*words)
    for name, times in [("diffusion_prior", 4), ("decoder", 4), ("upsampler1", 1)]:
        assert four[name]["FLOPs"] == times * one[name]["FLOPs"]


def test_a_tensor_lives_once_until_it_is_dropped():
    part = torch.nn.Linear(100, 50, device="meta")                   # 5050 numbers of 4 bytes
    with torch.no_grad(), benchmark.Living(part) as living:
        x = torch.empty(10, 100, device="meta")
        y = part(x)
        assert living.bytes == 20_200 + 4_000 + 2_000
        del x
        view = y.T[:3]
        del y
        assert living.bytes == 20_200 + 2_000, "a view has no memory of its own, but keeps it"
        del view
        assert living.bytes == 20_200 and living.peak == 26_200


def test_what_does_not_fit_is_not_tried(rows, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "free_memory", lambda device: 1e6)
    found = rows("--preset", "paper", "--only", "clip")
    assert "seconds" not in found["clip"]
    size = re.search(r"does not fit: it may take ([0-9.]+) GB", capsys.readouterr().out)[1]
    assert size == f"{found['clip']['needs'] / 1e9:.1f}"


def test_the_plain_layout_gives_the_same_and_takes_as_much_work(monkeypatch):
    monkeypatch.setattr(benchmark, "SIDE", 4)
    ways = benchmark.unets(SMALL, 2)
    forward, both = benchmark.compare_unets("U-Net", ways, 1)          # raises where outputs differ
    assert forward["FLOPs"] == benchmark.flops(ways["ADM's layout written plainly"][1])
    assert 2.5 < both["FLOPs"] / forward["FLOPs"] <= 3
    with pytest.raises(AssertionError, match="must agree"):
        benchmark.compare_unets("U-Net", ways | {"x": (None, lambda: ways["ours"][1]() + 1)}, 1)


@pytest.mark.parametrize("name", ["decoder", "diffusion_prior"])
@torch.no_grad()
def test_the_ways_to_do_a_sampling_step_agree(name):
    first, *others = [way()[:, :3] for way in benchmark.sampling_ways(name, 2).values()]
    assert all(torch.allclose(first, other, atol=1e-5) for other in others)


def test_a_share_is_the_counted_work_by_the_time_and_the_best_product():
    """A product of 2048 x 2048 in 1 s is 2 * 2048^3 FLOP/s; half of that work in 2 s, a fourth."""
    row = {"what": "U-Net", "passes": "forward", "FLOPs": 2048 ** 3,
           "seconds": {"ours": 2.0, "plain": 3.0, "product": 1.0}}
    busy = row | {"seconds": row["seconds"] | {"product": 2.0}}
    assert "| U-Net: forward | 2.000 | 3.000, plain | 1.50 | 25 % |" in benchmark.compare_table(
        [row, busy])


@pytest.mark.slow
def test_the_acceptance_tries_itself_on_the_cpu(tmp_path):
    out = tmp_path / "gpu"
    assert not benchmark.main(["acceptance", "--device", "cpu", "--preset", "toy", "--batch", "1",
                               "--out", str(out), "--seconds", "60", "--only", "sampling", "karlo"])
    found = json.loads((out / "acceptance.json").read_text())
    assert found["sampling"]["status"] == "done" and "CPU is too slow" in found["karlo"]["status"]
    assert [row["part"] for row in found["sampling"]["rows"]].count("decoder") == 2
    assert found["sampling"]["rows"][-1]["finite"] and found["sampling"]["rows"][-1]["size"] == 256
    assert "| decoder | 1 | 12 |" in (out / "acceptance.md").read_text()


def test_the_acceptance_goes_on_behind_what_fails(tmp_path, monkeypatch):
    """A row out of memory, a stage that raises, one that ends the process, one without time."""
    def rows(report):
        report.row("rows", {"part": "a"}, lambda: torch.empty(2 ** 60))
        report.row("rows", {"part": "b"}, lambda: {"seconds": 1.0})

    def dies(report):
        raise SystemExit                                 # as good as a signal: not an Exception

    def begin(words, **options):
        until = float(words[words.index("--until") + 1])
        args = argparse.Namespace(device="cpu", out=str(tmp_path), only=None, until=until)
        with contextlib.suppress(SystemExit):
            acceptance.acceptance(args)
        return subprocess.CompletedProcess(words, -14)

    monkeypatch.setattr(acceptance, "STAGES", {
        "rows": (rows, 0, 9), "raises": (lambda report: 1 / 0, 0, 9), "dies": (dies, 0, 9),
        "late": (rows, 99, 99), "last": (lambda report: None, 0, 9)})
    monkeypatch.setattr(subprocess, "run", begin)
    assert not benchmark.main(["acceptance", "--device", "cpu", "--preset", "toy", "--seconds", "9",
                               "--out", str(tmp_path)])
    found = json.loads((tmp_path / "acceptance.json").read_text())
    a, b = found["rows"]["rows"]
    assert "note" in a and b == {"part": "b", "seconds": 1.0}
    assert {name: stage["status"].split(":")[0] for name, stage in found.items()} == {
        "rows": "done", "raises": "ZeroDivisionError", "late": "skipped", "last": "done",
        "dies": "its process ended, exit status -14"}
