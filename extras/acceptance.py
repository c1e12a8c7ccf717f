"""A GPU's ten minutes: all that only a GPU can show, the most informative first.

    python extras/benchmark.py acceptance --device cuda --out FOLDER [--seconds 500]

Stages run in a process of their own. One that raises is noted and the next begins; one that hangs
or breaks the GPU's context ends that process, and another goes on behind it. Every number is at
once on disk, in FOLDER/acceptance.json; FOLDER/acceptance.md has the tables.
"""
import functools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import clip
import train_toy
import unclip
from extras import benchmark, karlo

CAPTIONS = ["a small red circle above a large blue square", "a large orange square"]


class Report:
    """What was measured so far, and until when the stage may run."""

    def __init__(self, args):
        self.args, self.device = args, torch.device(args.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.path, self.end = Path(args.out) / "acceptance.json", math.inf
        with clip.reading(self.path, "a report"):
            self.found = json.loads(self.path.read_bytes()) if self.path.exists() else {}

    def left(self):
        """Seconds until the stage must be over."""
        return self.end - time.time()

    def put(self, stage, **values):
        self.found.setdefault(stage, {"rows": []}).update(values)
        unclip.write_json(self.path, self.found)

    def row(self, stage, about, work, least=2.0):
        """One more row of a stage: about, and what work() returns, or a note why it does not.

        If an error broke the GPU's context, `synchronize` raises again and the process ends.
        """
        row = {"note": "skipped: no time left"}
        if self.left() >= least:
            try:
                row = work()
            except Exception as error:
                row = {"note": first_line(error)}
        self.put(stage, rows=[*self.found[stage]["rows"], about | row])
        print(stage, about | row, flush=True)
        benchmark.free_memory(self.device)
        benchmark.synchronize(self.device)
        return row

    def measure(self, step, steps, work, images, limit=2.0):
        """Of `steps` calls of step, `work` FLOPs each, that make or train on so many images."""
        limit = limit if self.device.type == "cuda" else 0.1     # a CPU only tries the program
        seconds = benchmark.seconds_of(step, self.device, min(limit, self.left()), most=20)
        ceiling = self.found.get("machine", {}).get("ceiling")
        return {"steps": steps, "seconds a step": seconds, "seconds": seconds * steps,
                "images/s": images / (seconds * steps), "TFLOP a step": work / 1e12,
                "share": ceiling and work / seconds / ceiling,
                "peak GB": benchmark.peak_memory(self.device) / 1e9}


def first_line(error):
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def fresh(report, name, dtype):
    """One part of the preset with random weights, none of them zero."""
    torch.manual_seed(0)
    config = getattr(unclip.PRESETS[report.args.preset], name)
    return benchmark.fill_zeros(
        unclip.build_part(unclip.PARTS[name], config, report.device, dtype))


# ---------------------------------------------------------------- the stages


def on_machine(report):
    """What it is, and how fast it multiplies and copies."""
    device, cuda = report.device, report.device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory / 1e9 if cuda else None
    report.put("machine", **benchmark.about(device), cuda=torch.version.cuda,
               python=platform.python_version(), cores=os.cpu_count(), memory=memory,
               dtype=str(report.dtype)[6:], preset=report.args.preset)

    for dtype, tf32 in [(report.dtype, False), (torch.float32, True), (torch.float32, False)]:
        kind = "tf32" if tf32 else str(dtype)[6:]
        row = report.row("machine", {"what": f"matrix product, {kind}, TFLOP/s"}, lambda: {
            "value": benchmark.matmul_ceiling(device, dtype, tf32) / 1e12})
        if "ceiling" not in report.found["machine"] and "value" in row:
            report.put("machine", ceiling=row["value"] * 1e12)

    def copy():
        x = torch.randn(2 ** 30 if cuda else 2 ** 24, device=device)
        y = torch.empty_like(x)
        seconds = benchmark.seconds_of(lambda: y.copy_(x), device, limit=1, most=20)
        return {"value": 2 * 4 * len(x) / seconds / 1e9}

    report.row("machine", {"what": "copy, GB/s read and written"}, copy)


def on_toy(report):
    """The committed weights: the device's images against the CPU's, for one seed."""
    def images(device, dtype, prior):
        model = unclip.load(benchmark.ROOT / "weights/toy.pt", device, dtype)
        start = time.perf_counter()
        x = model.sample(CAPTIONS, prior=prior, generator=torch.Generator().manual_seed(0),
                         progress=False)
        return x.cpu().float(), time.perf_counter() - start

    def compared(prior, dtype, tf32):
        with benchmark.float32_as_tf32(tf32):
            images(report.device, dtype, prior)                  # warms up
            x, seconds = images(report.device, dtype, prior)
        apart, right = (x - reference).abs(), 0
        for caption, image in zip(CAPTIONS, x):
            right += train_toy.agrees(train_toy.parse(caption), train_toy.read(image))
        return {"largest difference": apart.max().item(), "mean difference": apart.mean().item(),
                "captions right": right, "seconds": seconds, "seconds on the CPU": on_cpu}

    for prior in ("diffusion", "ar"):
        reference, on_cpu = images("cpu", torch.float32, prior)
        for kind, dtype, tf32 in [("float32", torch.float32, False), ("tf32", torch.float32, True),
                                  ("bfloat16", torch.bfloat16, True)]:
            report.row("toy", {"prior": prior, "numbers": kind},
                       lambda: compared(prior, dtype, tf32))


def on_tests(report):
    """The tests that need CUDA."""
    if report.device.type != "cuda":
        raise ValueError("these tests need CUDA")
    command_row(report, "tests", ["-m", "pytest", "-v", "-rfEs", "--tb=short", "--color=no", "-p",
                                  "no:cacheprovider", "tests/extras/test_cuda.py"])


def command_row(report, stage, words):
    """A command of ours in its own process: its exit status, its seconds, the end of its output."""
    def run():
        start = time.perf_counter()
        try:
            done = subprocess.run([sys.executable, *words], cwd=benchmark.ROOT,
                                  timeout=report.left(), stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT)
            status, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as late:
            status, output = "time limit", late.stdout or b""
        lines = output.decode("utf-8", "replace").replace("\r", "\n").strip().splitlines() or [""]
        return {"status": status, "seconds": time.perf_counter() - start, "last line": lines[-1],
                "output": lines[-200:]}

    return report.row(stage, {"what": " ".join(words[-4:])}, run, least=10)


def on_sampling(report):
    """The whole stack: a step of every part for one image and for a batch, then whole images."""
    sampling_rows(report, "sampling",
                  unclip.build(report.args.preset, report.device, report.dtype))


def on_karlo(report):
    """The public unCLIP's sizes, with random weights."""
    if report.device.type == "cpu":
        raise ValueError("Karlo has one size, for which a CPU is too slow here")
    parts = dict.fromkeys(unclip.PARTS)
    for name, kind, config in benchmark.stages("karlo")[1]:
        parts[name] = unclip.build_part(kind, config, report.device, report.dtype)
    sampling_rows(report, "karlo", unclip.UnCLIP(karlo.PRESET, parts))


@torch.no_grad()
def sampling_rows(report, stage, model):
    parts = {name: part for name, part in model.parts.items() if part is not None}
    s, expected = model.config.sampling, {}
    model.tokenizer = unclip.load(benchmark.ROOT / "weights/toy.pt").tokenizer
    for part in parts.values():
        benchmark.fill_zeros(part)

    def one(name, part, B):
        benchmark.reset_peak_memory(report.device)
        step, steps = benchmark.sampling_step(name, part, s, B)
        step()                                           # warms up, and may fill a cache
        counted = benchmark.parallel(part, B * s.rerank) if name == "ar_prior" else step
        return report.measure(step, steps, benchmark.flops(counted), B)

    def whole(B):
        benchmark.reset_peak_memory(report.device)
        start = time.perf_counter()
        x = model.sample(CAPTIONS[:1] * B, generator=torch.Generator().manual_seed(0),
                         progress=False)
        benchmark.synchronize(report.device)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "images/s": B / seconds, "size": x.shape[3],
                "finite": bool(x.isfinite().all()), "standard deviation": x.float().std().item(),
                "peak GB": benchmark.peak_memory(report.device) / 1e9}

    for B in (1, report.args.batch):
        rows = {name: report.row(stage, {"part": name, "batch": B}, lambda: one(name, part, B))
                for name, part in parts.items()}
        expected[B] = sum(row.get("seconds", 0.0) for name, row in rows.items()
                          if name != "ar_prior")
    for B in (1, report.args.batch):
        report.row(stage, {"part": "whole images, measured", "batch": B}, lambda: whole(B),
                   least=1.3 * expected[B] + 2)


def on_training(report):
    """A step of every part: batches of 1, 8, 64 and the largest that fits."""
    jobs, end = [("decoder", True), ("decoder", False)], report.end
    jobs += [(name, False) for name in ("upsampler1", "upsampler2", "diffusion_prior", "clip",
                                        "ar_prior")]
    for i, (name, again) in enumerate(jobs):
        share = 2 if name == "decoder" else 1            # the decoder may take twice as long
        report.end = time.time() + (end - time.time()) * share / (len(jobs) - i + 1)
        if not training_rows(report, name, again, ema=True):
            training_rows(report, name, again, ema=False)
    report.end = end


def training_rows(report, name, again, ema):
    """-> whether one image fits. Between a batch that fits and one that does not it halves."""
    benchmark.free_memory(report.device)                 # the part before, tied up in itself
    made, fits = {}, 0

    def one(B):
        if not made:
            made["part"] = fresh(report, name, torch.float32).train()
            benchmark.switched(made["part"], report.dtype, recompute=again)
            with torch.no_grad():                        # backward: twice as much as forward
                made["work"] = 3 * benchmark.flops(benchmark.training_loss(name, made["part"], 1))
            made["step"] = benchmark.trainer(made["part"], ema=ema)
        benchmark.reset_peak_memory(report.device)
        loss = benchmark.training_loss(name, made["part"], B)
        made["step"](loss)
        return report.measure(lambda: made["step"](loss), 1, B * made["work"], B, limit=1.0)

    def out_of_memory(B):
        about = {"part": name, "recompute": again, "EMA": ema, "batch": B}
        row = report.row("training", about, lambda: one(B))
        return "OutOfMemory" in row.get("note", "")

    for B in (1, 8, 64, 512) if report.device.type == "cuda" else (1, 2):
        if out_of_memory(B):
            while B // 2 > fits and out_of_memory(B // 2):
                B //= 2
            break
        fits = B
    return fits > 0


def on_switches(report):
    """A guided sampling step of the decoder, each switch alone; "differs" from the first row."""
    s, part, reference = unclip.PRESETS[report.args.preset].sampling, None, []
    part = fresh(report, "decoder", torch.float32)

    @torch.no_grad()
    def one(dtype, around=nullcontext(), layout=torch.channels_last):
        part.to(dtype=dtype, memory_format=layout)
        benchmark.reset_peak_memory(report.device)
        torch.manual_seed(1)                             # the same inputs
        step, steps = benchmark.sampling_step("decoder", part, replace(s, rerank=1), B)
        with around:
            out = step()[:, :3].float()
            if not reference:
                reference.extend([out, benchmark.flops(step)])
            differs = (out - reference[0]).norm() / reference[0].norm()
            row = report.measure(step, steps, reference[1], B, limit=1.0)
        return row | {"differs": differs.item()}

    half, full, B = report.dtype, torch.float32, report.args.batch
    autocast = torch.autocast(report.device.type, half, enabled=half != full)
    ways = [("float32", full, {}), (str(half)[6:], half, {}),
            ("weights contiguous", half, {"layout": torch.contiguous_format}),
            ("autocast, weights float32", full, {"around": autocast})]
    if report.device.type == "cuda":
        ways += [(f"attention by {backend.name.lower()}", half, {"around": sdpa_kernel(backend)})
                 for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                                 SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)]
        fastest = torch.backends.cudnn.flags(enabled=True, benchmark=True)
        ways += [("cudnn.benchmark", half, {"around": fastest}),
                 ("float16", torch.half, {}),
                 ("tf32", full, {"around": benchmark.float32_as_tf32(True)})]
    for what, dtype, options in ways:
        report.row("switches", {"what": what, "batch": B}, lambda: one(dtype, **options))


def on_toy_training(report):
    """A step of each toy part here and on the CPU; and the whole of train_toy.py, shortened."""
    def seconds(name, device, batch):
        part = unclip.build_part(unclip.PARTS[name], getattr(unclip.PRESETS["toy"], name), device)
        step = benchmark.trainer(benchmark.switched(part).train())
        loss = benchmark.training_loss(name, part, batch)
        step(loss)
        return benchmark.seconds_of(lambda: step(loss), device, 0.5, 20)

    for name, recipe in train_toy.TOY.items():
        report.row("toy training", {"part": name, "batch": recipe.batch}, lambda: {
            "seconds": seconds(name, report.device, recipe.batch),
            "seconds on the CPU": seconds(name, "cpu", recipe.batch)})
    if report.device.type == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            command_row(report, "toy training", ["train_toy.py", "--device", str(report.device),
                                                 "--out", folder, "--steps-scale", "0.02"])


def on_compile(report, name):
    """A sampling step of one part, eager and compiled; "first": the call that compiles."""
    s, part = unclip.PRESETS[report.args.preset].sampling, fresh(report, name, report.dtype)

    @torch.no_grad()
    def one(B):
        benchmark.reset_peak_memory(report.device)
        step, steps = benchmark.sampling_step(name, part, s, B)
        start = time.perf_counter()
        step()
        benchmark.synchronize(report.device)
        first = time.perf_counter() - start
        work.setdefault(B, 0 if compiled else benchmark.flops(step))
        return {"first": first} | report.measure(step, steps, work[B], B)

    work = {}
    for compiled in (False, True):
        if compiled:
            benchmark.switched(part, compile=True)
        for B in (1, report.args.batch):
            report.row(f"compile {name}", {"compiled": compiled, "batch": B}, lambda: one(B))


# name: (what to do, seconds it needs at least, seconds it may take); the most informative first
STAGES = {
    "machine": (on_machine, 2, 30),
    "toy": (on_toy, 3, 60),
    "tests": (on_tests, 60, 120),
    "sampling": (on_sampling, 5, 120),
    "training": (on_training, 5, 120),
    "karlo": (on_karlo, 10, 50),
    "switches": (on_switches, 5, 50),
    "compile decoder": (functools.partial(on_compile, name="decoder"), 30, 110),
    "toy training": (on_toy_training, 5, 80),
    "compile upsampler2": (functools.partial(on_compile, name="upsampler2"), 30, 110),
    "compile diffusion_prior": (functools.partial(on_compile, name="diffusion_prior"), 30, 110)}


# ---------------------------------------------------------------- the two processes


def acceptance(args):
    """Start the working process, again if it dies, until all stages were tried; then the tables."""
    args.only = args.only or list(STAGES)
    if unknown := [name for name in args.only if name not in STAGES]:
        raise ValueError(f"expected stages out of {', '.join(STAGES)}; got {', '.join(unknown)}")
    if args.until:
        return work(args)
    unclip.pick_device(args.device)
    report = Report(args)
    if report.found:
        raise ValueError(f"{report.path} is there already; choose another --out")
    Path(args.out).mkdir(parents=True, exist_ok=True)

    words = [sys.executable, benchmark.__file__, "acceptance", "--until",
             str(time.time() + args.seconds), "--out", args.out, "--device", args.device,
             "--preset", args.preset, "--batch", str(args.batch), "--only", *args.only]
    while set(args.only) - set(report.found):
        tried = len(report.found)
        status = subprocess.run(words, cwd=benchmark.ROOT).returncode
        report = Report(args)
        for name, stage in report.found.items():
            if stage["status"] == "begun":
                report.put(name, status=f"its process ended, exit status {status}: time or memory")
        if len(report.found) == tried:                   # it dies before it begins
            raise RuntimeError(f"the working process ended at once, exit status {status}")

    text = tables(report.found) + "\n"
    unclip.write_atomically(Path(args.out) / "acceptance.md", lambda f: f.write(text.encode()))
    print(text, end="")


def work(args):
    """The stages that were not tried yet, one after the other, until the time args.until."""
    report = Report(args)
    for name in args.only:
        if name in report.found:
            continue
        do, least, most = STAGES[name]
        left = args.until - time.time()
        if left < least:
            report.put(name, status=f"skipped: {max(0.0, left):.0f} s left, it needs {least}")
            continue

        report.put(name, status="begun")
        start, report.end = time.time(), time.time() + min(most, left)
        if hasattr(signal, "alarm"):                     # ends this process; Windows has none
            signal.alarm(math.ceil(report.left()) + 10)
        try:
            do(report)
            status = "done"
        except Exception as error:
            traceback.print_exc()
            status = first_line(error)
        if hasattr(signal, "alarm"):
            signal.alarm(0)
        report.put(name, status=status, seconds=time.time() - start)
        benchmark.free_memory(report.device)
        benchmark.synchronize(report.device)             # raises if the GPU's context is broken


# ---------------------------------------------------------------- tables

def tables(found):
    """What was measured, as Markdown."""
    about = found.get("machine", {})
    ceiling = (about.get("ceiling") or math.nan) / 1e12
    text = [f"{about.get('machine')}, torch {about.get('torch')}, CUDA {about.get('cuda')}, "
            f"{about.get('date')}; preset {about.get('preset')}, {about.get('dtype')}. A share is "
            f"of {ceiling:.3g} TFLOP/s, a large matrix product of that type. One step is measured; "
            "seconds are its steps' number times that, but for whole images, which are measured."]
    for name, stage in found.items():
        text.append(f"### {name}\n\n{stage['status']}; {stage.get('seconds', 0.0):.0f} s")
        if stage["rows"]:
            text.append(benchmark.markdown(stage["rows"]))
    return "\n\n".join(text)
