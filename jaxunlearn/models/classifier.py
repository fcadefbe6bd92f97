"""A small image classifier, trained in the run on the keep images, whose features and logits serve quality metrics.

It is named as what it is: numbers from it are ``fd_classifier`` and "Inception score of the run's classifier", never
FID.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.types import Array


class Classifier(nn.Module):
    """Three 3x3 convolutions that halve images above 8 pixels, then a dense layer of features and one of logits.

    Attributes:
      classes: number of classes.
      width: channels of the first convolution; the next two have twice as many.
      features: length of the penultimate layer, the features of the Frechet distance.
    """

    classes: int
    width: int = 24
    features: int = 64

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Images [B,H,W,C] in [-1, 1] -> (logits [B, classes], features [B, features])."""
        for index, channels in enumerate((self.width, 2 * self.width, 2 * self.width)):
            stride = 2 if min(x.shape[1:3]) > 8 or index == 2 else 1
            x = nn.relu(nn.Conv(channels, (3, 3), (stride, stride), name=f"conv_{index}")(x))
        while min(x.shape[1:3]) > 8:  # large images: keep the dense layer small
            x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(self.features, name="features")(x.reshape(len(x), -1)))
        return nn.Dense(self.classes, name="logits")(x), x


def init_params(classifier: Classifier, shape: tuple[int, int, int], seed: int) -> dict:
    """He-normal kernels and zero biases for images of shape (H, W, C), drawn with numpy, deterministic in the seed.

    Numpy values over ``jax.eval_shape`` cost no compilation.
    """
    abstract = jax.eval_shape(classifier.init, jax.random.key(0), jnp.zeros((1, *shape)))["params"]
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if len(leaf.shape) == 1:
            return jnp.zeros(leaf.shape, leaf.dtype)
        scale = np.sqrt(2.0 / np.prod(leaf.shape[:-1]))
        return jnp.asarray(rng.standard_normal(leaf.shape) * scale, leaf.dtype)

    return jax.tree.map(draw, abstract)
