"""Every part of the toy trained for a few steps, by two processes together or by one that adds up
the shares of both.

    torchrun --standalone --nproc-per-node=2 tests/extras/two_processes.py FOLDER
    python tests/extras/two_processes.py FOLDER

Each writes its losses into FOLDER; the second, run in the folder of the first, also goes on where
the two processes stopped. test_train_toy.py compares.
"""
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import unclip                                     # first: it sets how idle threads wait

import torch

import clip
import train_toy

STEPS, STOP, BATCH = 4, 2, 16


def both_shares(name, part, data, recipe):
    """batch_loss(progress) of one process for the rows that two would have drawn."""
    half = replace(recipe, batch=recipe.batch // 2)
    own, step = train_toy.losses_of(name, part, data, half), iter(range(recipe.steps))
    groups = data.groups

    def seeded(draw, step, rank):
        torch.manual_seed((step * 10_007 + rank) % 2 ** 63)
        return draw()

    def batch_loss(progress):
        at = next(step)
        if name == "clip":                        # its loss compares the rows of all processes
            rows = torch.cat([seeded(lambda: groups(half.batch, data.curriculum(progress)), at, r)
                              for r in (0, 1)])
            data.groups = lambda *options: rows
            loss = own(progress)
            del data.groups
            return loss
        return sum(seeded(lambda: own(progress), at, rank) for rank in (0, 1)) / 2
    return batch_loss


def main(folder):
    rank, world = train_toy.join("cpu")
    source = train_toy.World(40)
    tokenizer = clip.Tokenizer.train(source.captions, 1024)
    config = unclip.toy()
    for part in (config.clip, config.diffusion_prior, config.ar_prior, config.decoder):
        part.vocab_size = len(tokenizer)
    data, results = train_toy.Data(source, tokenizer, config, torch.device("cpu")), {}

    for name in unclip.PARTS:
        recipe = replace(train_toy.TOY[name], steps=STEPS, batch=BATCH, warmup=0)

        def train(state=None, save=None):
            part = train_toy.fresh_part(name, recipe, data, config, 0)
            if world > 1:
                batch_loss = train_toy.losses_of(name, part, data, recipe)
            else:
                batch_loss = both_shares(name, part, data, recipe)
                for _ in range(len(state["losses"]) if state else 0):
                    batch_loss(0.0)               # steps that were taken already
            losses = train_toy.train(part, recipe, batch_loss, 0, state, save,
                                     save_seconds=0)
            return losses, part.state_dict()

        def save(state):
            if rank == 0 and len(state["losses"]) == STOP:
                torch.save(state, folder / f"{name}.{world}.pt")

        results[name], results[f"{name} weights"] = train(save=save)
        if world > 1:
            torch.distributed.barrier()
        stopped = torch.load(folder / f"{name}.2.pt", weights_only=True)
        results[f"{name} resumed"], results[f"{name} resumed weights"] = train(stopped)
        if name == "clip":
            data.embed(train_toy.fresh_part(name, recipe, data, config, 0))

    if rank == 0:
        torch.save(results, folder / f"results{world}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
