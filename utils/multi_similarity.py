"""The training loss."""

from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
from pytorch_metric_learning.losses import MultiSimilarityLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from torch import Tensor, nn


class MinedMultiSimilarity(nn.Module):
    """The multi-similarity loss on the pairs that its miner finds hard.

    Attributes:
        mined_share: of the newest batch's ordered pairs of images, those that it found hard.

    Source: Wang et al., Multi-Similarity Loss with General Pair Weighting, CVPR 2019; the constants are SuperVLAD's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.miner = MultiSimilarityMiner(epsilon=0.1, distance=CosineSimilarity())
        self.mined_share = 0.0
        self.loss = MultiSimilarityLoss(alpha=1.0, beta=50.0, base=0.0, distance=DotProductSimilarity())

    def forward(self, descriptors: Tensor, labels: Tensor) -> Tensor:
        """The scalar loss of descriptors B x D of unit L2 norm with labels B."""
        pairs = self.miner(descriptors, labels)  # anchors and positives, anchors and negatives
        self.mined_share = (len(pairs[0]) + len(pairs[2])) / (len(labels) * (len(labels) - 1))
        return self.loss(descriptors, labels, pairs)
