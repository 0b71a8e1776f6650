"""The released code's recalls on the corridor photos, at 1, 5, 10 and 20, with the weights of `formula`."""

RECALLS = {
    "--supervlad_clusters=4 --crossimage_encoder": (27.0, 42.3, 55.9, 88.3),
    "--supervlad_clusters=4": (25.2, 48.6, 69.4, 84.7),
    "--supervlad_clusters=1 --ghost_clusters=2": (25.2, 49.5, 70.3, 82.9),
}
