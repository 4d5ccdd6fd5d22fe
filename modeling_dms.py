"""
A DMS checkpoint in transformers: this engine's model and cache under AutoModelForCausalLM, its
generate() and its pipelines. publish.py puts this file beside the weights, with dms.py, mla.py,
model.py and kv_cache.py. Nothing of it is trained: all is computed in inference mode.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from dms import DMSConfig
from kv_cache import KVCache
from mla import LatentAttention  # noqa: F401, since transformers copies only what is imported here
from model import Model, ModelConfig


class DMSEngineConfig(PretrainedConfig):
    model_type = "dms"  # of its own, so that no other class takes the folder for a dense model


class DMSEngineCache(Cache):
    """A KVCache as generate() handles it."""

    def __init__(self, cache):
        super().__init__(layers=[])
        self.cache = cache
        self.columns = 0  # of input_ids so far, padding included

    def get_seq_length(self, layer_idx=0):
        return self.columns

    def reorder_cache(self, beam_idx):
        self.cache.select(beam_idx.tolist())


class DMSForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = DMSEngineConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        settings = DMSConfig(**config.dms_engine["dms"])
        engine = Model(ModelConfig(**config.dms_engine | {"dms": settings}))
        self.model = engine.model
        self.lm_head = engine.lm_head
        # not registered as a submodule, or its parameters would be listed twice
        self.__dict__["engine"] = engine
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False  # `forward` makes the cache

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        # "cache" is its name since transformers 5.24
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        seen = cache.columns if cache is not None else 0
        return dict(input_ids=input_ids[:, seen:], attention_mask=attention_mask, cache=cache)

    @torch.no_grad()
    def forward(self, input_ids, attention_mask=None, cache=None, logits_to_keep=0,
                past_key_values=None, labels=None, **others):
        """Next-token logits of the new columns, input_ids (B, T). attention_mask: 0 for padding, on
        either side. The tokens of a sequence move to the front, and their states back."""
        engine = self.engine
        cache = past_key_values if cache is None else cache
        # .to(device) has moved the parameters, which are this module's, but not the engine's buffer
        engine.rope_freq = engine.rope_freq.to(input_ids.device)
        B, T = input_ids.shape
        if cache is None:
            cache = DMSEngineCache(KVCache(engine.config, B, input_ids.device, engine.dtype))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        is_token = mask[:, -T:].bool()
        order = is_token.byte().argsort(dim=1, descending=True, stable=True)
        states = engine.states(input_ids.gather(1, order), cache.cache, is_token.sum(1))
        states = torch.zeros_like(states).scatter(1, order[..., None].expand_as(states), states)
        cache.columns += T
        logits = engine.lm_head(states[:, -logits_to_keep:])
        V = engine.config.vocab_size
        loss = None if labels is None else self.loss_function(logits, labels, V)
        return CausalLMOutputWithPast(loss, logits, cache)  # by place: the names changed in 5.24
