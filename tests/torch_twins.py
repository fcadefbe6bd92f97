"""A model of diffusers or transformers and its twin here (only for tests that have torch)."""

from __future__ import annotations

import numpy as np

from jaxunlearn.models import convert
from jaxunlearn.models.parameters import abstract_params


def perturb(model, spread):
    """Adds normal noise to all parameters, so that none is at a value that hides a mistake (zero, one)."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn_like(parameter)


def twin_params(model, config):
    """The parameter tree of a torch model; the way back must give its tensors bit for bit."""
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    params = convert.to_flax(tensors, abstract_params(config))
    back = convert.to_diffusers(params)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)
    return params
