"""What is counted, measured and compared; and that a GPU's ten minutes survive what goes wrong."""
import json
import re

import pytest
import torch

import decoder
import unclip
from extras import benchmark


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """rows(command, option, ...) -> the rows that it writes."""
    monkeypatch.setattr(benchmark, "matmul_ceiling", lambda *options: 1e11)

    def call(*options):
        file = tmp_path / "rows.json"
        assert not benchmark.main([*options, "--json", str(file)])
        return json.loads(file.read_text())["rows"]
    return call


@pytest.fixture
def run(rows):
    """run(option, ...) -> {part: its row}, the last one."""
    return lambda *options: {row["part"]: row
                             for row in rows("run", "--limit-seconds", "0.01", *options)}


@pytest.mark.parametrize("options", [["--whole"], ["--train", "--batch", "2"]])
def test_every_part_is_measured(run, options):
    found = run(*options)
    for name, part in unclip.build("toy", "meta").parts.items():
        row = found.pop(name)
        assert row["M params"] == sum(w.numel() for w in part.parameters()) / 1e6
        assert row["GFLOP"] > row["M params"] / 1e3 and row["seconds"] > 0
        assert row["steps"] == (12 if name == "decoder" and "--whole" in options else row["steps"])
    if options == ["--whole"]:
        together, drawn = found.values()
        assert together["seconds"] > row["seconds"] and drawn["finite"] and drawn["size"] == 256


def test_the_papers_size_is_counted_without_a_gpu(run):
    """3.03 TFLOP a step, both halves of guidance, and the context's keys and values at each."""
    found = run("--preset", "paper", "--device", "meta", "--dtype", "bf16", "--only", "decoder",
                "diffusion_prior")
    row, unet = found["decoder"], unclip.build_part(
        decoder.Decoder, unclip.paper().decoder, "meta").unet
    context = sum(w.numel() for name, w in unet.named_parameters() if "context.weight" in name)
    assert row["GFLOP"] == pytest.approx(250 * (3030 + 2 * 2 * 260 * context / 1e9), rel=0.01)
    assert "seconds" not in row and row["needs GB"] > 2 * row["M params"] / 1e3

    # the prior: the caption's tokens once, three tokens at each of 64 steps, 2 candidates
    L, W, layers = 257, 2048, 24
    once, step = (2 * n * 12 * W * W * layers / 1e9 for n in (L, 3))
    assert found["diffusion_prior"]["GFLOP"] == pytest.approx(2 * once + 64 * 2 * step, rel=0.15)


def test_recomputing_needs_less_memory_and_is_no_more_work(rows):
    plain, again = rows("run", "--device", "meta", "--train", "--batch", "64", "--only", "decoder",
                        "--switch", "recompute")
    assert again["switches"] == "recompute" and plain["GFLOP"] == again["GFLOP"]
    assert again["needs GB"] < 0.7 * plain["needs GB"]


def test_reranking_draws_four_small_images_for_each_large_one(run, monkeypatch):
    words, s = ["--device", "meta"], unclip.PRESETS["toy"].sampling
    four = run(*words)
    monkeypatch.setattr(s, "rerank", 1)
    one = run(*words)
    for name, times in [("diffusion_prior", 4), ("decoder", 4), ("upsampler1", 1)]:
        assert four[name]["GFLOP"] == pytest.approx(times * one[name]["GFLOP"], rel=1e-12)


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


def test_what_does_not_fit_is_not_tried(run, monkeypatch):
    monkeypatch.setattr(benchmark, "free_memory", lambda device: 1e-3)
    row = run("--preset", "paper", "--only", "clip", "--batch", "2", "1")["clip"]
    assert "seconds" not in row and row["batch"] == 1, "two need more than one"
    size = re.search(r"does not fit: it may take ([0-9.]+) GB", row["note"])[1]
    assert size == f"{row['needs GB']:.1f}"


def test_what_train_toy_does_not_train_in_is_not_measured(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("--train", "--dtype", "fp16", "--only", "clip")
    assert "--train takes --dtype fp32 or bf16" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["decoder", "diffusion_prior"])
@torch.no_grad()
def test_the_ways_to_do_a_sampling_step_agree(name):
    first, *others = [way()[:, :3] for way in benchmark.sampling_ways(name, 2).values()]
    assert all(torch.allclose(first, other, atol=1e-5) for other in others)


def test_ours_is_compared_with_each_other_way(rows, monkeypatch):
    """A share is the counted work by the time and the ceiling, here 1e11."""
    a = torch.randn(256, 256)
    monkeypatch.setattr(benchmark, "COMPARISONS", {"product": lambda: {
        "ours": lambda: a @ a, "five": lambda: [a @ a for _ in range(5)], "none": lambda: None}})
    five, none = rows("compare", "--runs", "3")
    assert five["share"] == pytest.approx(2 * 256 ** 3 / five["ours"] / 1e11)
    assert five["times as fast"] > 2 and none["times as fast"] < 1


@pytest.mark.long
def test_the_device_draws_the_cpus_images(rows, monkeypatch):
    """Here the device is the CPU."""
    setting, fewer = unclip.UnCLIP.setting, {"decoder_steps": 2, "upsampler_steps": (1, 1)}
    monkeypatch.setattr(unclip.UnCLIP, "setting", lambda self, name, given: fewer.get(
        name, setting(self, name, given)))
    found = {row.pop("what"): row for row in rows("machine")}
    assert found["matrix product, fp32"]["TFLOP/s"] == 0.1
    for prior in ("diffusion", "ar"):
        assert found[f"toy, {prior} prior, fp32"]["largest difference"] == 0
        assert 0 < found[f"toy, {prior} prior, bf16"]["mean difference"] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["toy", "paper", "karlo"])
def test_a_whole_stack_has_all_parts_of_its_preset(preset):
    model = benchmark.stack(preset, "meta", torch.bfloat16)
    assert [name for name, part in model.parts.items() if part] == benchmark.parts_of(preset)
    assert {w.dtype for part in model.parts.values() if part for w in part.parameters()} == {
        torch.bfloat16} and not any(part.training for part in model.parts.values() if part)


@pytest.mark.long
def test_the_acceptance_goes_on_behind_what_fails(tmp_path, monkeypatch):
    """On the CPU: a row out of memory, a stage that crashes, that hangs, or has no time left."""
    run, out = benchmark.STAGES["sampling"][0], tmp_path / "gpu"
    stages = {"sampling": (run.replace("--whole", "--only decoder"), 0, 200),
              "crashes": ("-c __import__('os').abort()", 0, 60),
              "hangs": ("-c while(True):pass", 0, 1), "late": ("-V", 999, 999),
              "last": ("-V", 0, 60)}
    for name, row in stages.items():
        monkeypatch.setitem(benchmark.STAGES, name, row)
    assert not benchmark.main(["acceptance", "--device", "cpu", "--preset", "toy", "--batch",
                               "1000000", "--out", str(out), "--only", *stages])
    found = json.loads((out / "acceptance.json").read_text())
    assert {name: re.split("[,:]", stage["status"])[0] for name, stage in found.items()} == {
        "sampling": "done", "crashes": "exit status -6", "hangs": "time limit", "late": "skipped",
        "last": "done"}
    notes = {(row["part"], row["batch"]): row.get("note", "") for row in found["sampling"]["rows"]}
    assert not notes["decoder", 1] and "does not fit" in notes["decoder", 1000000]
    assert "| decoder | 1 | " in (out / "acceptance.md").read_text()
