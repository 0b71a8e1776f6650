"""A toy city for the tests that read photos."""

import signal

import pytest
import torch

from datasets.toy_city import write_toy_city


@pytest.fixture(scope="session")
def city(tmp_path_factory):
    """A folder with a small `gsv_cities` and a small `toy_city`."""
    folder = tmp_path_factory.mktemp("data")
    write_toy_city(
        folder,
        train_streets=2,
        places=4,
        visits=5,
        test_streets=3,
        val_streets=2,
        cluster_streets=2,
        spots=5,
        workers=2,
    )
    return folder


@pytest.fixture(autouse=True)
def unseeded():
    """Gives each test the same randomness, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def listening():
    """Signals as a terminal sends them: a shell ignores SIGINT for what it starts in the background, nohup SIGHUP."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Reports travel between processes as UTF-8, and some tests log names that are none."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode("utf-8")) for name, text in report.sections
    ]
    return report
