"""What all tests share: the chapters come from the folder above; `pytest --long` runs all."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # before torch; see unclip.py
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch


def seed(number=0):
    return torch.Generator().manual_seed(number)


def rand(*shape, number=0):
    return torch.randn(*shape, generator=seed(number))


def filled(module):
    """Random weights everywhere, also where training starts at zero; dropout off."""
    torch.manual_seed(0)
    for p in module.parameters():
        noise = torch.randn_like(p)
        p.data = noise / p[0].numel() ** 0.5 if p.ndim > 1 else p.data + noise / 5
    return module.eval()


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the tests that are marked long, too; "
                     "without it they run if their file or name is given")


def pytest_collection_modifyitems(config, items):
    """`pytest` alone takes three minutes, not ten."""
    if not config.getoption("long") and config.args_source is config.ArgsSource.TESTPATHS:
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="session")
def toy():
    """The committed weights, loaded once. Do not change them."""
    import unclip
    return unclip.load(unclip.HERE / "weights/toy.pt")
