"""The known test sets: what counts as correct in them, and how many images they have.

A dataset that is not in the table is evaluated with the defaults of `Protocol`. Figures are those of each set's usual
form, each with its source.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports torch, which takes seconds, and the tables of the pages need only the figures
    from .database_queries import DatabaseQueries

logger = logging.getLogger(__name__)


DOWNLOADER = "VPR-datasets-downloader"  # github.com/gmberton/VPR-datasets-downloader
FRAME = 25 / 10.5  # metres between consecutive Nordland frames in the positions that the downloader makes up


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a test set is evaluated.

    Attributes:
        positive_distance: a database image within this many metres of a query is correct.
        test_method: how queries are prepared, a name from `transforms.TEST_METHODS`.
        database: expected number of images; None for any.
        queries: expected numbers in the folder `queries`, one for each usual selection; empty for any.
        query_sets: expected numbers in other query folders, by name.
        metres_a_frame: metres between consecutive frames of a video with made-up coordinates.
        frames: a database image within this many frames is correct, instead of the distance.
        source: where the numbers come from, and what is unchecked.
    """

    positive_distance: float = 25.0
    test_method: str = "hard_resize"
    database: int | None = None
    queries: tuple[int, ...] = ()
    query_sets: Mapping[str, int] = field(default_factory=dict)
    metres_a_frame: float | None = None
    frames: int | None = None
    source: str = ""


PROTOCOLS = {
    "pitts30k": Protocol(
        database=10_000, queries=(6_816,), source=f"Torii et al. 2013's split, as {DOWNLOADER} has it"
    ),
    "pitts250k": Protocol(database=83_952, queries=(8_280,), source=f"likewise, {DOWNLOADER}"),
    "msls": Protocol(
        database=18_871,
        queries=(11_084, 740),  # all of them; the official ones, by --query_keys
        source="val of Warburg et al. 2020; the 740 keys: key_mslsval.txt of github.com/Lu-Feng/MSLS-val, counted",
    ),
    "nordland": Protocol(
        database=27_592,
        queries=(27_592,),
        metres_a_frame=FRAME,
        source=f"winter in summer within 10 frames: {DOWNLOADER}, download_nordland.py, read",
    ),
    "nordland_subset": Protocol(
        database=27_592,
        queries=(2_760,),
        metres_a_frame=25 / 1.5,
        source=f"every tenth winter frame in summer within 1 frame: {DOWNLOADER}, download_nordland_subset.py, read",
    ),
    "nordland_swapped": Protocol(
        database=27_592,
        queries=(2_760,),
        metres_a_frame=FRAME,
        frames=1,
        source="every tenth summer frame in winter within 1 frame, as SALAD and BoQ report; positions taken to be "
        "those of the downloader's nordland, unchecked",
    ),
    "nordland_3450": Protocol(
        database=3_450,
        queries=(3_450,),
        metres_a_frame=FRAME,
        frames=2,
        source="3,450 frames of each side within 2 frames; positions taken to count these frames as nordland's count "
        "theirs, unchecked",
    ),
    "tokyo247": Protocol(
        database=75_984,
        queries=(315,),
        source=f"Torii et al. 2018; {DOWNLOADER} stores queries with a shorter side of 480 (format_tokyo247.py, read); "
        "hard_resize as the authors",
    ),
    "st_lucia": Protocol(database=1_549, queries=(1_464,), source="general knowledge, unchecked"),
    "sped": Protocol(database=607, queries=(607,), source="general knowledge, unchecked"),
    "amstertime": Protocol(database=1_231, queries=(1_231,), source="general knowledge, unchecked"),
    "eynsham": Protocol(database=23_935, queries=(23_935,), source="general knowledge, unchecked"),
    "svox": Protocol(
        database=17_166,
        query_sets={
            "queries_sun": 854,
            "queries_night": 823,
            "queries_rain": 937,
            "queries_snow": 870,
            "queries_overcast": 872,
        },
        source="from memory, consistent with published recalls of one decimal; its database folder is gallery",
    ),
    "sf_xl": Protocol(
        queries=(1_000,),
        query_sets={"queries_v1": 1_000, "queries_v2": 598, "queries_night": 466, "queries_occlusion": 76},
        source="Berton et al. 2022 and 2023, from memory; the database, some 2.8 million images, is not counted",
    ),
    "baidu": Protocol(source="indoor; nobody here has its numbers"),
}


def protocol_of(name: str) -> Protocol:
    """The protocol of a dataset; `svox_night` and similar names have that of `svox`."""
    return PROTOCOLS.get("svox" if name.startswith("svox_") else name, Protocol())


def warn_of_counts(dataset: "DatabaseQueries", protocol: Protocol, queries: str | None = "queries") -> None:
    """Warns if a test split does not have the published numbers of images.

    Args:
        dataset: the split, with one query set.
        protocol: protocol of the dataset.
        queries: name of the set; None for only the database, which several sets share.
    """
    of_set = protocol.queries if queries == "queries" else tuple(filter(None, [protocol.query_sets.get(queries or "")]))
    of_database = (protocol.database,) if protocol.database and queries in ("queries", None) else ()
    for what, expected, found in (
        ("database images", of_database, len(dataset.database_paths)),
        ("queries", of_set, len(dataset.queries_paths)),
    ):
        if expected and found not in expected:
            numbers = " or ".join(f"{number:,}" for number in expected)
            logger.warning(
                "%s has %s %s, but published figures are for %s: recalls are not comparable",
                dataset.name,
                f"{found:,}",
                what,
                numbers,
            )
