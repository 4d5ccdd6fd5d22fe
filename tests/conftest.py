"""What the test files share: small random models, dense and DMS, that decide at random but reproducibly."""
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dms import DMSConfig
from model import Model, ModelConfig

torch.set_num_threads(1)  # the models are tiny


def small_config(**changes):
    settings = dict(model_type="qwen3", vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
                    tie_word_embeddings=True)
    return ModelConfig(**{**settings, **changes})


def small_model(seed=0, dms=None, keep=0.5, **changes):
    """A random model in float32. keep: about this fraction of tokens is kept, through the decisions' offset."""
    torch.manual_seed(seed)
    model = Model(small_config(dms=dms, **changes))
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, 1.0, 0.1)
        else:
            torch.nn.init.normal_(p, 0.0, 0.4 if "proj" in name else 1.0)
    if dms is not None:
        dms.scale, dms.offset = 1.0, {0.1: -2.0, 0.5: 0.0, 0.9: 2.0}[keep]
    return model.requires_grad_(False).eval()


@pytest.fixture
def rng(request):
    return random.Random(request.node.name)


def random_dms(rng):
    return DMSConfig(window=rng.choice([0, 1, 2, 3, 7, 16, 40]), shift=rng.choice([0, 1]),
                     source=rng.choice(["adapter", "neuron"]), per=rng.choice(["head", "head", "layer"]))
