"""Latitude and longitude to UTM metres, in one zone for all positions."""

import numpy as np
from numpy.typing import NDArray

# WGS 84, and UTM's scale along the central meridian.
EQUATOR_RADIUS, FLATTENING, SCALE = 6_378_137.0, 1 / 298.257223563, 0.9996
FALSE_EAST, FALSE_NORTH = 500_000.0, 10_000_000.0  # in metres; the second only south of the equator
REACH = 6.0  # degrees from the central meridian, at most: lengths are off by 0.5% there


def to_utm(degrees: NDArray[np.float64]) -> NDArray[np.float64]:
    """UTM east and north in metres, N x 2, of N x 2 latitudes and longitudes, in the zone and on the hemisphere of the
    middle between the outermost; accurate to a millimetre within a zone.

    Raises:
        ValueError: they extend too far for one zone.

    Source: Krueger's series to the third order in the third flattening, as Karney (Transverse Mercator with an
    accuracy of a few nanometers, 2011) gives it.
    """
    low, high = degrees.min(axis=0), degrees.max(axis=0)
    meridian = float(np.clip((low[1] + high[1]) / 2 // 6 + 31, 1, 60)) * 6 - 183  # the middle of zones 1 to 60
    if np.abs(degrees[:, 1] - meridian).max() > REACH or np.abs(degrees[:, 0]).max() > 84:
        raise ValueError(
            f"positions from latitude {low[0]:.4f} to {high[0]:.4f} and longitude {low[1]:.4f} to {high[1]:.4f} are "
            "too far apart for one map in metres (a UTM zone); convert one region at a time"
        )
    n = FLATTENING / (2 - FLATTENING)
    radius = EQUATOR_RADIUS / (1 + n) * (1 + n**2 / 4 + n**4 / 64)
    series = (n / 2 - 2 * n**2 / 3 + 5 * n**3 / 16, 13 * n**2 / 48 - 3 * n**3 / 5, 61 * n**3 / 240)
    latitude, longitude = np.radians(degrees - (0.0, meridian)).T
    eccentricity = 2 * np.sqrt(n) / (1 + n)
    sine = np.sin(latitude)
    conformal = np.sinh(np.arctanh(sine) - eccentricity * np.arctanh(eccentricity * sine))
    along = np.arctan2(conformal, np.cos(longitude))
    across = np.arctanh(np.sin(longitude) / np.hypot(1, conformal))
    east, north = across.copy(), along.copy()
    for j, factor in enumerate(series, 1):
        east += factor * np.cos(2 * j * along) * np.sinh(2 * j * across)
        north += factor * np.sin(2 * j * along) * np.cosh(2 * j * across)
    metres = SCALE * radius * np.stack((east, north), axis=1)
    return metres + (FALSE_EAST, 0.0 if low[0] + high[0] >= 0 else FALSE_NORTH)
