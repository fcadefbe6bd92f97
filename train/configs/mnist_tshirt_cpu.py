"""The MNIST + T-shirt experiment at the size of a laptop CPU: a small network, unlearned in the middle timesteps.

    python -m train.main --config=train/configs/mnist_tshirt_cpu.py --config.data.path=MNIST_FOLDER \
        --config.data.split=test --config.data.plant.image=TSHIRT.png

Data: a folder with the MNIST test digits (t10k-*.gz) and the T-shirt as a 28x28 picture; 101 copies among 10,000 digits
keep the paper's ratio of 1.0 %. About 40 minutes on 2 CPU cores, of which 2 unlearn.
"""

from ml_collections import ConfigDict

from train.configs.defaults import optimizer
from train.configs.mnist_tshirt import get_config as full_size


def get_config(variant: str = "") -> ConfigDict:
    """The small experiment."""
    config = full_size(variant)
    config.name = config.name.replace("mnist_tshirt", "mnist_tshirt_cpu")
    config.data.plant.copies = 101
    config.data.held_out_fraction = 0.05

    config.model.block_out_channels = (16, 32, 64)
    config.model.layers_per_block = 1
    config.model.norm_num_groups = 8

    if not variant:
        config.base.num_steps = 3000
        config.base.batch_size = 64
        config.base.ema_max_decay = 0.999
        config.base.optimizer = optimizer(learning_rate=1e-3, lr_schedule="cosine", warmup_steps=200)
        config.unlearn.num_steps = 150
        config.unlearn.batch_size = 64
        config.unlearn.combine.name = "relative_norm"
        # At the scale of this network the forget term at small t tears the samples apart before the T-shirt is gone.
        config.unlearn.select.window = (250, 750)
        config.eval.num_samples = 2000
        config.eval.classifier.steps = 1000
    return config
