"""Every part of the toy trained a few steps, by one process or, under torchrun, by two together.

    python -m torch.distributed.run --standalone --nproc-per-node=2 tests/two_processes.py OUT.pt

test_training.py runs it both ways and compares what it returns.
"""
import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")      # see unclip.py
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import train_toy

STEPS, STOP = 4, 2


def train_all(share):
    """share: (rank, processes) -> {part: losses, "part resumed": losses, "part weights": {...}}"""
    args = argparse.Namespace(preset="toy", data=None, groups=40, seed=0, device="cpu", vocab=None)
    model, data = train_toy.set_up(args)
    data.embed(train_toy.make_part("clip", model, data, 0))
    train_toy.READ_EVERY, result = 1, {}
    cases = {name: (name, 0.0) for name in train_toy.STAGES}
    for case, (name, muon) in (cases | {"decoder by Muon": ("decoder", 3e-3)}).items():
        stage = replace(train_toy.STAGES[name], steps=STEPS, batch=16, muon=muon)

        def train(state, save):
            part = train_toy.make_part(name, model, data, 0)
            if share[1] > 1:
                train_toy.shard(part)
            train_toy.train(name, stage, part, data, 0, state, save, save_seconds=0.0, share=share)
            return state["losses"], train_toy.whole(part)

        result[case], result[f"{case} weights"] = train({}, lambda: None)
        if share[1] > 1:
            result[f"{case} resumed"], result[f"{case} weights resumed"] = stop_and_resume(train)
    return result


def stop_and_resume(train):
    """Two steps, saved; all is forgotten; then the rest, from what was saved."""
    folder = [tempfile.mkdtemp()]                 # the first process's, known to both
    torch.distributed.broadcast_object_list(folder)
    state = {"current": {"part": {}}}

    def save():
        train_toy.save_shards(state, Path(folder[0]), "part")
        if state["current"]["part"]["step"] == STOP:
            raise KeyboardInterrupt
    try:
        train(state["current"]["part"], save)
    except KeyboardInterrupt:
        torch.distributed.barrier()
    saved = train_toy.saved_shards(Path(folder[0]), "part")
    assert saved["folder"].endswith(f"part-{STOP}"), saved
    return train(saved, lambda: None)


if __name__ == "__main__":
    share = train_toy.join("cpu")
    result = train_all(share)
    if share[0] == 0:
        torch.save(result, sys.argv[1])
    torch.distributed.destroy_process_group()
