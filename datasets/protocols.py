"""The known test sets: what counts as correct in them, and how many images they have.

A dataset that is not in the table is evaluated by the defaults of `Protocol`. Figures are those of each set's usual
form; where none is known for certain, there is none.
"""

import logging
from dataclasses import dataclass

from .database_queries import DatabaseQueries

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a test set is evaluated.

    Attributes:
        positive_distance: a database image this near to a query is correct, in metres.
        test_method: how queries are prepared, a name from `transforms.TEST_METHODS`.
        database: images expected; None if any number will do.
        queries: numbers expected, one for each usual selection; empty if any number will do.
        metres_a_frame: between neighbouring frames of a video with made coordinates.
    """

    positive_distance: float = 25.0
    test_method: str = "hard_resize"
    database: int | None = None
    queries: tuple[int, ...] = ()
    metres_a_frame: float | None = None


PROTOCOLS = {
    "pitts30k": Protocol(database=10_000, queries=(6_816,)),
    "pitts250k": Protocol(database=83_952, queries=(8_280,)),
    "msls": Protocol(database=18_871, queries=(11_084, 740)),  # all of them; the official ones, by --query_keys
    "nordland": Protocol(database=27_592, queries=(27_592, 2_760), metres_a_frame=25 / 10.5),
    "tokyo247": Protocol(database=75_984, queries=(315,)),
    "st_lucia": Protocol(database=1_549, queries=(1_464,)),
    "sped": Protocol(database=607, queries=(607,)),
    "amstertime": Protocol(database=1_231, queries=(1_231,)),
    "eynsham": Protocol(database=23_935, queries=(23_935,)),
    "svox": Protocol(database=17_166),  # its conditions differ in their queries
    "sf_xl": Protocol(queries=(1_000,)),
}


def protocol_of(name: str) -> Protocol:
    """The protocol of a dataset; `svox_night` and the like have that of `svox`."""
    return PROTOCOLS.get("svox" if name.startswith("svox_") else name, Protocol())


def warn_of_counts(dataset: DatabaseQueries, protocol: Protocol) -> None:
    """Warns of a test split that has other numbers of images than the published ones."""
    for what, expected, found in (
        ("database images", (protocol.database,) if protocol.database else (), len(dataset.database_paths)),
        ("queries", protocol.queries, len(dataset.queries_paths)),
    ):
        if expected and found not in expected:
            numbers = " or ".join(f"{number:,}" for number in expected)
            logger.warning(
                "%s has %s %s, where published figures are for %s: recalls are not comparable",
                dataset.name,
                f"{found:,}",
                what,
                numbers,
            )
