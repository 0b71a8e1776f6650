"""Own photos to GSV-Cities' format."""

from dataclasses import dataclass

from utils.system.command_line import option

Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class Settings:
    """What is made of the photos: places, and what is held out to evaluate on."""

    name: str = option("Mine", "name of the city and of the evaluation dataset")
    copy: bool = option(False, "copy photos instead of linking to them")
    cell: float = option(10.0, "largest extent of a place in metres", least=0.01)
    min_images: int = option(4, "fewest photos per place", least=2)
    heading_bins: int = option(1, "split places into so many directions", least=1)
    gap: float = option(50.0, "metres between places, and around what is held out", least=0)
    val_area: Corners | None = option(
        None, "hold out the area between two corners, given as positions in the source are", metavar=tuple("ABCD")
    )
    test_area: Corners | None = option(None, "the same for the test", metavar=tuple("ABCD"))
    val_share: float = option(0.0, "or hold out connected cells with this share of the photos", least=0)
    test_share: float = option(0.0, "the same for the test", least=0)
    queries: str | None = option(
        None, "the later half of what is held out, or a random half; time if all photos have one",
        choices=("time", "random"),
    )  # fmt: skip
    seed: int = option(0, "seed of all random choices", least=0)
