"""
A decode step: one token for every sequence, forward pass and sampling, as one launch on a GPU.

    tokens and random numbers -> hidden states, through the cache -> logits -> sample -> tokens

`run` is the step as PyTorch code. On a GPU it is captured as a CUDA graph the second time that it
runs on the same tensors, and replayed from then on; nothing in it waits for the GPU. At a few rows a
launch takes longer than its work: there the layers are run here, in as few launches as can be, with
products that have the same input as one.

Here, as in generate.py, a row is a sequence: its place in the cache's batch.
"""

import torch
import torch.nn.functional as F


def sample(logits, uniform, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0):
    """Draw one token per row: logits (B, V), uniform (B,) in [0, 1) -> (B,) int64.

    At a temperature below 1e-5 the likeliest. Otherwise the distribution is cut to the top_k
    likeliest tokens (0: all), then to the fewest that hold top_p of the mass, then to those at
    least min_p times as likely as the first; the token is where the sum of what is left, in order
    of likelihood if it was sorted, else of token ids, passes `uniform`.
    """
    if temperature < 1e-5:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    order = None  # the token ids of sorted logits
    if 0 < top_k < logits.shape[-1]:
        logits, order = logits.topk(top_k)
    elif top_p < 1:
        logits, order = logits.sort(descending=True, stable=True)
    p = logits.softmax(-1)
    if top_p < 1:
        drop = p.cumsum(-1) - p >= top_p  # the mass before it suffices...
        drop[:, 0] = False  # ...but never the first
        p = p.masked_fill(drop, 0)
    p = p.where(p >= min_p * p.amax(-1, keepdim=True), 0)
    mass = p.double().cumsum(-1)
    point = uniform.double()[:, None] * mass[:, -1:]
    drawn = torch.searchsorted(mass, point, right=True)
    return (drawn if order is None else order.gather(1, drawn))[:, 0]


def join(*linears):
    """The weights of linear layers of one input as one tensor, and their biases, None where there
    are none: what F.linear takes to compute them all. The layers' own are views of these from now
    on."""
    names = ("weight", "bias")
    return [join_tensors([getattr(linear, name) for linear in linears]) for name in names]


def join_tensors(parts):
    """parts: Parameters, or Nones."""
    if parts[0] is None:
        return None
    with torch.inference_mode(False), torch.no_grad():  # they can be trained afterwards
        rows = [len(part) for part in parts]
        shape = (sum(rows), *parts[0].shape[1:])
        ends = [part.data_ptr() + part.nbytes for part in parts]
        storages = {part.untyped_storage().data_ptr() for part in parts}
        if len(storages) == 1 and ends[:-1] == [part.data_ptr() for part in parts[1:]]:
            return parts[0].detach().as_strided(shape, parts[0].stride())  # they were joined before
        whole = torch.cat([part.detach() for part in parts])
        for part, view in zip(parts, whole.split(rows)):
            part.data = view
        return whole


class FusedLayers:
    """Model.hidden for one token a sequence: the same, but for how sums are rounded."""

    def __init__(self, model):
        self.model = model
        self.products = []  # of each layer: those of its input, and of the MLP's
        for layer in model.model.layers:
            of, mlp = layer.self_attn, layer.mlp
            self.products.append(
                (join(of.q_proj, of.k_proj, of.v_proj), join(mlp.gate_proj, mlp.up_proj)))

    def hidden(self, token, feed):
        """token: (B,) int64; feed: the Feed (kv_cache.py) of one token -> (B, C)."""
        kernels = feed.cache.kernels
        pool = feed.cache.pool
        x = self.model.model.embed_tokens(token)
        cos, sin = (t.flatten(1) for t in self.model.rope(1, feed.start, x.dtype))
        for number, (layer, products) in enumerate(zip(self.model.model.layers, self.products)):
            rows = feed.rows.layer(number)
            qkv, gate_up = products
            product = F.linear(layer.input_layernorm(x), *qkv)
            q = kernels.feed_token(product, x, cos, sin, layer.self_attn, feed.new, rows, pool)
            y = kernels.decode_attention(q, pool.keys, pool.values, rows.table, rows.length)
            x = x + layer.self_attn.o_proj(y.view(len(x), -1))
            gate, up = F.linear(layer.post_attention_layernorm(x), *gate_up).chunk(2, dim=1)
            x = x + layer.mlp.down_proj(F.silu(gate) * up)
        return self.model.model.norm(x)


class DecodeStep:
    """The step of a Model over a KVCache. sampling: the arguments of `sample`. With Triton's kernels
    it joins the model's weights (FusedLayers), which stay usable as they were."""

    def __init__(self, model, cache, sampling):
        self.model = model
        self.cache = cache
        self.sampling = sampling
        # of every row: token id, random number, 1 if it runs else 0; written on the host, in memory
        # from which a GPU can copy while the host goes on
        shape = (cache.batch_size, 3)
        on_gpu = cache.device.type == "cuda"
        self.inputs = torch.zeros(shape, dtype=torch.float64, pin_memory=on_gpu)
        self.buffer = torch.zeros(shape, dtype=torch.float64, device=cache.device)
        self.layers = FusedLayers(model) if cache.kernels.feed_token else None
        # the plain functions wait for the GPU, so only Triton's can be captured
        self.captures = on_gpu and self.layers is not None
        self.graph = None
        self.table = None  # the page table that the last run used: the cache may replace it

    @torch.inference_mode()
    def __call__(self, inputs):
        """inputs: {row: (token id, random number in [0, 1))} for the rows of the batch that run ->
        {row: next token id}. Raises CacheFull, before anything has changed."""
        values = [(*inputs.get(row, (0, 0.0)), row in inputs) for row in range(len(self.inputs))]
        self.inputs.copy_(torch.tensor(values, dtype=torch.float64))
        self.buffer.copy_(self.inputs, non_blocking=True)
        self.cache.reserve(self.buffer[:, 2].long())
        # run on new tensors, then captured on the same ones, then replayed, until they are replaced
        if not self.captures or self.table is not self.cache.rows.table:
            self.table = self.cache.rows.table
            self.graph = None
            self.run()
        else:
            self.graph = self.graph or self.capture()
            self.graph.replay()
        drawn = self.next.tolist()
        return {row: drawn[row] for row in inputs}

    def run(self):
        token, uniform, count = self.buffer.unbind(1)
        with self.cache.append(count.long(), 1, reserve=False) as feed:
            if self.layers:
                x = self.layers.hidden(token.long(), feed)
            else:
                x = self.model.hidden(token.long()[:, None], feed, feed.start)[:, 0]
        self.next = sample(self.model.lm_head(x), uniform, **self.sampling)

    def capture(self):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # records, and runs nothing
            self.run()
        return graph
