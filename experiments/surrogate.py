"""
A surrogate of KVzip: adapters that are fitted to what a copy of the text would attend to.

    python experiments/real_model.py; python experiments/text.py        # once
    python experiments/surrogate.py                                     # about 15 minutes
    python experiments/real_quality.py --retrofit out/experiments/surrogate --out FILE

KVzip (Kim et al., 2025) repeats the context, and keeps the pairs that the copy attends to. KVzap
(NVIDIA, 2026) predicts the logarithm of such a score from a token's hidden state, by one linear
model for each layer, and a pair with a low one is evicted when it leaves a window. In use this is
DMS: the adapters are only fitted to something else. The score of pair j is KVzip+, as in KVzap,

    max over queries i of the copy, and query heads of its KV head, of  a_ij |W_o v_j| / |x_i|

where x is the residual. The documents, the regression and the settling of offsets are those of
retrofit.py, and no step follows. The copy comes at once, without the request to repeat.

The first token draws much attention and has small values, so its score is low where it is a sink.
KVzip never evicts the first tokens. With --keep-first adapters learn a score of 1 for the first.
"""

import itertools
from pathlib import Path

import torch
from real_methods import MODEL
from shared import RETROFITS, ROOT, parser
from tqdm import tqdm

from checkpoint import base_keys, copy_tokenizer, save_model
from common import run_script
from data import long_documents
from evaluate import settle_offsets
from retrofit import Options, complete, load_pair, make_data
from warm_start import fit_adapters

TRAINING = ROOT / "out" / "text" / "train.jsonl"


def copy_scores(q, k, v, residual, R, block=128):
    """The score of every pair (Hkv, T) of a document that is read twice, 2T tokens.

    q: (Hq, 2T, D); k, v: (Hkv, 2T, D); residual: x (2T, C); R: of small_output. It takes `block`
    queries at a time, so that T x 2T never exists."""
    Hkv, length, D = k.shape
    T = length // 2
    q = q.unflatten(0, (Hkv, -1))  # (Hkv, G, 2T, D)
    q = q * D**-0.5
    keys = k[:, None]
    norm = residual.norm(dim=-1, keepdim=True)  # (2T, 1)
    position = torch.arange(length, device=q.device)
    shares = []  # the highest a_ij / |x_i| of each block
    for query in position[T:].split(block):
        score = q[:, :, query] @ keys.mT  # (Hkv, G, n, 2T)
        score = score.masked_fill(position > query[:, None], float("-inf"))
        a = score.softmax(-1)[..., :T]
        share = a / norm[query]
        shares.append(share.amax(2))
    outputs = v[:, None, :T] @ R.mT  # (Hkv, G, T, D), as long as what it would add to the residual
    scores = torch.stack(shares).amax(0) * outputs.norm(dim=-1)  # (Hkv, G, T)
    return scores.amax(1)


def fit(model, data, documents, keep_first=False):
    """Fit a model's fresh adapters to the logarithms of scores, as warm_start does to needs."""
    settings = model.config.dms
    least = (settings.window + 1) * settings.target_cr  # tokens, as in warm_start
    chosen = itertools.islice(long_documents(data, least), documents)
    twice = (ids.repeat(1, 2) for ids in chosen)

    def log_scores(*inputs):
        score = copy_scores(*inputs) + 1e-12  # it may be 0
        if keep_first:
            score[:, 0] = 1  # as if it added as much as all that is there
        return score.log().T  # (T, Hkv)

    fit_adapters(model, tqdm(twice, total=documents), log_scores)


def main():
    p = parser(__doc__)
    p.add_argument("--out", type=Path, default=RETROFITS / "surrogate")
    p.add_argument("--keep-first", action="store_true", help="as KVzip does")
    args = p.parse_args()
    options = Options(str(MODEL), str(TRAINING), device="cpu")
    complete(options)  # with retrofit.py's defaults for a CPU
    data = make_data(options)
    model, _ = load_pair(options)
    fit(model, data, options.warm_start, args.keep_first)
    settle_offsets(model, data)
    save_model(model, args.out, torch.float32, base_keys(MODEL, args.out))
    copy_tokenizer(MODEL, args.out)


if __name__ == "__main__":
    run_script(main)
