"""What every backbone is: maps of its stages, finest first, one vector per image, and a classifier where one is wanted."""

from collections.abc import Callable

from torch import Tensor, nn

from common.errors import config_error, data_error

AXES = {2: "y, x", 3: "z, y, x"}
Builder = Callable[[int, int, int], "Backbone"]  # of dims, in_channels, num_classes; 0 classes: no classifier


class Backbone(nn.Module):
    """A feature extractor whose weights have torchvision's names and, in 2D, torchvision's shapes.

    feature_channels: of each map of forward_features; the last is also the length of the vector. min_depth, min_edge: the
    least number of slices (in 3D) and of pixels along y and x.
    """

    def __init__(
        self, dims: int, in_channels: int, feature_channels: tuple[int, ...], min_depth: int, min_edge: int
    ) -> None:
        super().__init__()
        self.dims = dims
        self.in_channels = in_channels
        self.feature_channels = feature_channels
        self.min_depth, self.min_edge = min_depth, min_edge

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, [z,] y, x) -> one vector each (B, feature_channels[-1])."""
        return self.pooled(self.forward_features(x)[-1])

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Images (B, in_channels, [z,] y, x) -> maps (B, feature_channels[i], [z,] y, x), finest first."""
        self.check_images(x)
        return self.maps(x)

    def logits(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, [z,] y, x) -> (B, num_classes). Raises a config error where there is no classifier."""
        self.check_classifier()
        return self._classify(self(x))

    def maps(self, x: Tensor) -> list[Tensor]:
        """forward_features of images that were checked; each family's own."""
        raise NotImplementedError

    def keep_stages(self, number: int) -> None:
        """Leave out all stages after the first `number`: for images so small that the last maps are a few cells.

        Raises a config error for a family that cannot, for a number it does not have, and where a classifier reads the last.
        """
        raise config_error(f"{type(self).__name__}: stages cannot be left out; expected all of them, or a ResNet")

    def pooled(self, x: Tensor) -> Tensor:
        """The last map (B, C, [z,] y, x) -> (B, C): the mean, unless a family knows better."""
        return x.flatten(2).mean(2)

    def _classify(self, vector: Tensor) -> Tensor:
        """(B, feature_channels[-1]) -> (B, num_classes); of families whose classifier reads the vector."""
        raise NotImplementedError

    def classifier_names(self) -> tuple[str, ...]:
        """The first words of the classifier's weights."""
        return ("fc", "classifier", "heads", "head")

    def check_classifier(self) -> None:
        if not any(name.split(".")[0] in self.classifier_names() for name, _ in self.named_parameters()):
            raise config_error(f"{type(self).__name__}: has no classifier; make it with create_classifier")

    def check_images(self, x: Tensor) -> None:
        """A data error for images that the network cannot read."""
        name = type(self).__name__
        if x.dim() != self.dims + 2 or x.shape[1] != self.in_channels:
            raise data_error(
                f"{name}: expected {self.dims}D images (B, {self.in_channels}, {AXES[self.dims]}), got {tuple(x.shape)}"
            )
        least = (self.min_edge, self.min_edge) if self.dims == 2 else (self.min_depth, self.min_edge, self.min_edge)
        if any(n < needed for n, needed in zip(x.shape[2:], least, strict=True)):
            raise data_error(
                f"{name}: expected images of at least {least} ({AXES[self.dims]}), got {tuple(x.shape[2:])}; enlarge them"
            )


def maps_of(features: nn.Sequential, ends: tuple[int, ...], x: Tensor) -> list[Tensor]:
    """The outputs of the named places of a sequence."""
    maps = []
    for number, stage in enumerate(features):
        x = stage(x)
        if number in ends:
            maps.append(x)
    return maps
