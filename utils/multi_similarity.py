"""The training loss."""

from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
from pytorch_metric_learning.losses import MultiSimilarityLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from torch import Tensor, nn


class MinedMultiSimilarity(nn.Module):
    """The multi-similarity loss on the pairs that its miner finds hard.

    Source: Wang et al., Multi-Similarity Loss with General Pair Weighting, CVPR 2019; the constants are SuperVLAD's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.miner = MultiSimilarityMiner(epsilon=0.1, distance=CosineSimilarity())
        self.loss = MultiSimilarityLoss(alpha=1.0, beta=50.0, base=0.0, distance=DotProductSimilarity())

    def forward(self, descriptors: Tensor, labels: Tensor) -> Tensor:
        """The scalar loss of descriptors B x D of unit L2 norm with labels B."""
        return self.loss(descriptors, labels, self.miner(descriptors, labels))
