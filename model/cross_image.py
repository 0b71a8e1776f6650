"""The cross-image encoder: a transformer over the images of a batch."""

from torch import nn


class CrossImageEncoder(nn.TransformerEncoder):
    """Lets each of the K cluster vectors of an image attend to the same cluster of the other images in the batch.

    It takes cluster vectors of B images, B x K x D, to B x K x D: the BATCH is the sequence. Reshaped to 1 x B*K x D,
    every image would be encoded as if it were alone in its batch. The attention has no positions, so the order of the
    batch does not matter, but each image's result depends on which images share its batch. Both layers start as equal
    copies, with PyTorch's default initialisation.

    Args:
        dim: channels D of a cluster vector, a multiple of 16.
        dropout: applied in training mode.
    """

    def __init__(self, dim: int, dropout: float = 0.1):
        layer = nn.TransformerEncoderLayer(dim, nhead=16, dim_feedforward=2048, dropout=dropout, activation="gelu")
        super().__init__(layer, num_layers=2, enable_nested_tensor=False)

    def layer_difference(self) -> float:
        """The largest difference between the two layers' weights.

        The layers start equal, so a difference far below the size of the weights means that the encoder was hardly
        trained: one step of Adam moves each weight by at most the learning rate, and the layers apart by twice that.
        """
        first, second = (layer.parameters() for layer in self.layers)
        return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))
