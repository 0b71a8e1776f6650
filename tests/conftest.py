"""A toy city for the tests that read photos."""

import signal

import pytest
import torch

from datasets.toy_city import write_toy_city
from utils.outputs import assignments, report

# They start processes or build a ViT-B; `make test-fast` leaves them out.
SLOW = {"distributed", "end_to_end", "export", "golden_model", "golden_training", "real_photos", "resume", "signals"}
SLOW_TESTS = {
    "test_a_loss_that_is_not_finite",
    "test_a_repeated_training_is_the_same",
    "test_all_processes_search_what_one_finds",
    "test_compiled_blocks_compute_the_same",
    "test_killed_five_times_and_resumed",
    "test_odd_names_and_shapes_lose_nothing",
    "test_onnx",
    "test_pictures_of_assignments",
    "test_runs_are_made_once_and_gone_on_with",
    "test_the_layer_compiled_by_itself",
    "test_the_models_of_torch_hub_take_no_metric_learning",
    "test_the_scripts_start_without_what_only_some_runs_need",
    "test_two_processes_find_what_one_finds",
}
# They take ten seconds or more, or are of a fixture that does; the longest first.
LONGEST = [
    "test_a_preempted_and_a_killed_process_change_nothing",
    "test_recalls_of_the_released_code",
    "test_killed_at_ten_points",
    "test_three_steps",
    "test_one_process_that_stops_in_validation_ends_the_others_without_a_traceback",
    "test_torchrun_alone_is_signalled",
    "test_two_processes_find_what_one_finds",
    "test_every_precision_ends_near_the_loss_of_fp32",
]


def pytest_collection_modifyitems(items):
    """Marks the slow ones, and puts them first: of short tests at the end each process finds its share."""
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW or item.originalname in SLOW_TESTS:
            item.add_marker(pytest.mark.slow)

    def turn(item):
        if item.originalname in LONGEST:
            return LONGEST.index(item.originalname)
        return len(LONGEST) + (item.get_closest_marker("slow") is None)

    items.sort(key=turn)


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


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Figures are made, and drawn in tests marked `drawn` alone: that takes two thirds of a small evaluation's time."""
    if not request.node.get_closest_marker("drawn"):
        for module in (report, assignments):
            monkeypatch.setattr(module, "save_figure", lambda figure, path, dpi: path.touch())


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
