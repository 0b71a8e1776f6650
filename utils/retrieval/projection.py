"""A PCA of descriptors: fitted by scikit-learn, applied by an evaluation, stored in a map."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .search import to_unit_norm

FLAT = 1e-8  # below this fraction of the largest variance, a direction has none in single precision


@dataclass(frozen=True)
class Projection:
    """A fitted PCA from D' to D dimensions."""

    mean: NDArray[np.float32]  # D'
    components: NDArray[np.float32]  # D x D'
    deviations: NDArray[np.float32] | None = None  # D, if it is whitened; descriptors then get unit norm again
    images: int | None = None  # that it was fitted on; None for that of a map

    @classmethod
    def fit(cls, rows: NDArray[np.float32], dim: int, *, whiten: bool, seed: int) -> "Projection":
        """Fits it to n x D' descriptors; raises ValueError if whitening would amplify noise."""
        from sklearn.decomposition import PCA  # takes nearly a second to import and is seldom needed

        pca = PCA(dim, random_state=seed).fit(rows)
        lively = int((pca.explained_variance_ > FLAT * pca.explained_variance_[0]).sum())
        if whiten and lively < dim:
            problem = f"pca_whiten would amplify noise: of {dim} dimensions only {lively} vary over the images"
            raise ValueError(f"{problem}; use pca_dim {lively} at most, or more varied images")
        deviations = np.sqrt(pca.explained_variance_) if whiten else None
        return cls(pca.mean_, pca.components_, deviations, len(rows))

    @property
    def whiten(self) -> bool:
        return self.deviations is not None

    def transform(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """From n x D' to n x D, computed as in scikit-learn, to the last bit."""
        projected = rows @ self.components.T
        projected -= self.mean[None] @ self.components.T
        if self.deviations is not None:
            projected /= self.deviations
            to_unit_norm(projected)
        return projected

    def tensors(self) -> dict[str, Tensor]:
        """The PCA as a linear map: subtract `mean`, D', then multiply by `components`, D x D'."""
        components = self.components if self.deviations is None else self.components / self.deviations[:, None]
        arrays = {"mean": self.mean, "components": components}
        return {name: torch.tensor(array) for name, array in arrays.items()}  # copies: of a view, all would be saved
