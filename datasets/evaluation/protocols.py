"""The known test sets: what is correct in them, and how many images their usual form has, each with its source."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports torch, which takes seconds, and the tables of the pages need only the figures
    from .tree import DatabaseQueries

logger = logging.getLogger(__name__)

DOWNLOADER = "VPR-datasets-downloader"  # github.com/gmberton/VPR-datasets-downloader; read at 2f886d5
# It removed some of its scripts in 3aa6613, and they are as before in the commit above it.
REMOVED = f"of {DOWNLOADER} at 3250f89, before it was removed"
EIGENPLACES = "dataset tables of EigenPlaces, arxiv.org/abs/2308.10832"
SALAD = "github.com/serizba/salad at e593005, datasets"  # the paths of photos and their positives, counted
REVISIT = "github.com/AnyLoc/Revisit-Anything at 89cade5, VLAD-BuFF/datasets"  # the paths of photos, counted
FRAME = 25 / 10.5  # metres between consecutive Nordland frames in the positions that the downloader makes up


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a test set is evaluated."""

    positive_distance: float = 25.0  # a database image within this many metres of a query is correct
    test_method: str = "hard_resize"  # how queries are prepared, a name from `transforms.TEST_METHODS`
    database: int | None = None  # expected number of images; None for any
    queries: tuple[int, ...] = ()  # expected numbers in the folder `queries`, one for each usual selection
    query_sets: Mapping[str, int] = field(default_factory=dict)  # expected numbers in other query folders, by name
    source: str = ""  # where the numbers come from, and what is unchecked


PROTOCOLS = {
    "pitts30k": Protocol(
        database=10_000, queries=(6_816,), source=f"{SALAD}/Pittsburgh, counted; Torii et al. 2013's split"
    ),
    "pitts250k": Protocol(
        database=83_952, queries=(8_280,), source=f"8,280 queries: {SALAD}/Pittsburgh, counted; 84k: {EIGENPLACES}"
    ),
    "msls": Protocol(
        database=18_871,
        queries=(11_084, 740),  # all of them; the official ones, by --query_keys
        source="val of Warburg et al. 2020; 18,871: dataloaders/MapillaryDatasetVal.py of "
        "github.com/AnyLoc/Revisit-Anything at 89cade5; the 740 keys: key_mslsval.txt of github.com/Lu-Feng/MSLS-val, "
        "counted",
    ),
    "nordland": Protocol(
        database=27_592,
        queries=(27_592,),
        source=f"winter in summer within 10 frames: download_nordland.py {REMOVED}",
    ),
    "nordland_subset": Protocol(
        database=27_592,
        queries=(2_760,),
        source="every tenth winter frame in summer within 1 frame: download_nordland_subset.py in pull request 16 of "
        f"{DOWNLOADER}, never merged",
    ),
    "nordland_swapped": Protocol(
        database=27_592,
        queries=(2_760,),
        positive_distance=1.5 * FRAME,  # half-way to the second frame
        source=f"every tenth summer frame in winter within 1 frame: {SALAD}/Nordland, counted; positions are taken to "
        "be those of the downloader's nordland",
    ),
    "nordland_3450": Protocol(
        positive_distance=2.5 * FRAME,
        source="3,450 frames of each side, as the name says, within 2 frames; positions are taken to count these "
        "frames as nordland's count theirs",
    ),
    "tokyo247": Protocol(
        database=75_984,
        queries=(315,),
        source=f"315 queries: {REVISIT}/tokyo247, counted; 76k: {EIGENPLACES}; {DOWNLOADER} stores queries "
        "with a shorter side of 480 (format_tokyo247.py); hard_resize as the authors",
    ),
    "st_lucia": Protocol(database=1_549, queries=(1_464,), source=f"{REVISIT}/st_lucia, counted"),
    "sped": Protocol(database=607, queries=(607,), source=f"{SALAD}/SPED, counted"),
    "amstertime": Protocol(database=1_231, queries=(1_231,), source=f"{REVISIT}/amstertime, counted"),
    "eynsham": Protocol(
        database=23_935, source=f"4,787 panoramas of 5 photos: download_eynsham.py {REMOVED}; the queries not counted"
    ),
    "svox": Protocol(
        database=17_166,
        queries=(14_278,),
        query_sets=dict(queries_sun=854, queries_night=823, queries_rain=937, queries_snow=870, queries_overcast=872),
        source="as a public evaluation script demands them (GitHub code search: svox_inventory 17166 14278); gallery "
        "is its database folder",
    ),
    "sf_xl": Protocol(
        query_sets={"queries_v1": 1_000, "queries_v2": 598, "queries_night": 466, "queries_occlusion": 76},
        source="README.md in rsync://vandaldata.polito.it/sf_xl; the database, some 2.8 million images, is not counted",
    ),
    "baidu": Protocol(database=689, queries=(2_292,), source=f"indoor; {REVISIT}/baidu, counted"),
}


def protocol_of(name: str) -> Protocol:
    """The protocol of a dataset, the defaults if it is unknown; `svox_night` and similar names have that of `svox`."""
    return PROTOCOLS.get("svox" if name.startswith("svox_") else name, Protocol())


def warn_of_counts(dataset: "DatabaseQueries", protocol: Protocol, queries: str | None = "queries") -> None:
    """Warns if a test split with one query set does not have the published numbers of images.

    `queries` names the set; None is for only the database, which several sets share.
    """
    set_count = protocol.query_sets.get(queries or "")
    query_counts = protocol.queries if queries == "queries" else (set_count,) if set_count else ()
    database_counts = (protocol.database,) if protocol.database and queries in ("queries", None) else ()
    for what, expected, count in (
        ("database images", database_counts, len(dataset.database_paths)),
        ("queries", query_counts, len(dataset.queries_paths)),
    ):
        if expected and count not in expected:
            has, published = f"{count:,} {what}", " or ".join(f"{number:,}" for number in expected)
            wording = "%s has %s, but published figures are for %s: recalls are not comparable"
            logger.warning(wording, dataset.name, has, published)
