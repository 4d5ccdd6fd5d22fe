"""
The training step of the retrofit, in one process or in several.

    loss = KL(teacher || student) + max(1 - 1/CR(step) - fraction let go, 0)

A step follows from (seed, step, its sequences, weights, optimizer state, the fraction that the step
before let go) alone. Processes share its sequences out among themselves, each takes its own a few
at a time, and gradients are summed: with any number of processes the result is the same, up to the
order of sums. Knows nothing of where sequences come from, nor of the command line.
"""
import json
import math
from functools import cache, partial

import torch
import torch.distributed as distributed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.attention import sdpa_kernel

import dms
from checkpoint import load_model, refusing, require, torchrun_place, write_atomic
from estimate import recomputes, rows_at_a_time
from kernels.block import BACKENDS
from kernels.choose import choose_training_attention


def load_pair(options):
    """The student, ready to be trained, and its teacher: one model where it serves as both."""
    train_all = options.train == "all"
    device = "cpu" if options.shard else options.device  # whence shard() takes it, piece by piece
    teacher = load_model(options.model, device, options.torch_dtype)
    student = load_model(options.model, device) if train_all else teacher
    settings = dms.DMSConfig(options.window, options.decision, options.shift, per=options.per,
                             target_cr=options.target_cr)
    settings.borrowed_weight = float(options.fade_steps > 0)
    if train_all:
        dms.start_retrofit(student, settings)
    if options.shard:
        for model in {student, teacher}:
            shard(model)
    if not train_all:  # adapters are small: every process has them
        dms.start_retrofit(student, settings)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(train_all or "dms_proj_alpha" in name)
    if options.compile:
        student.compile()
    return student, teacher


def shard(model):
    """Spread a model's weights over all processes, whose gradients are summed."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for module in (*model.model.layers, model):
        fully_shard(module)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden")


def learning_rate(step, steps, peak):
    """Linear from 0 over the first 20 steps, constant, linear to 0 over the last 40 %."""
    return peak * min(1.0, (step + 1) / 20, (steps - step) / max(0.4 * steps, 1))


def all_reduce(tensor):
    """The sum over all processes, in place."""
    if distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


def is_spread(tensor):
    """Has FSDP spread it over processes?"""
    return hasattr(tensor, "full_tensor")


def whole(tensor):
    """A tensor that may be spread over processes, as one."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def spread(tensor, parameter):
    """The inverse: on the parameter's device, and spread as that is."""
    tensor = tensor.to(parameter.device)
    if is_spread(parameter):
        from torch.distributed.tensor import distribute_tensor

        tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor


def settling_rows(seq_len):
    """The held-out sequences by which the offset is settled: some 16,000 tokens, but 8 to 32."""
    return max(8, min(2**14 // seq_len, 32))


STATE = ("weight", "exp_avg", "exp_avg_sq")  # what is saved of a parameter, beside AdamW's "step"


class Distillation:
    """A student, its teacher, which may be the student itself, asked not to evict, and AdamW."""

    def __init__(self, student, teacher, options):
        self.student = student
        self.teacher = teacher
        self.options = options
        self.parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
        trained = self.parameters.values()
        self.optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0.0)
        self.fraction_let_go = 0.0  # of its pairs, by the last step

    def step(self, step, ids, documents):
        """Step number `step`, on ids (B, T) and the lengths of each row's documents, the same in all
        processes. Returns its metrics. Raises InputError, before weights change, if it diverges."""
        options = self.options
        self.fade(step)
        cr = dms.scheduled_cr(step + 1 - options.fade_steps, options.steps, options.target_cr)
        sums = all_reduce(self.differentiate(step, ids, documents, cr))
        kl, self.fraction_let_go = sums.tolist()
        for parameter in self.parameters.values():
            if not is_spread(parameter.grad):  # FSDP has summed what it spreads
                all_reduce(parameter.grad)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)).item()
        require(math.isfinite(kl + norm) and kl <= options.max_kl,
                f"step {step + 1} diverged, with a KL of {kl:.3g} and a gradient of {norm:.3g}; the "
                "last saved state is kept; begin anew with a lower --lr")
        steps = options.fade_steps + options.steps
        self.optimizer.param_groups[0]["lr"] = learning_rate(step, steps, options.lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        compression = dms.compression_loss(torch.tensor(self.fraction_let_go), cr).item()
        held = 1 - min(self.fraction_let_go, 1 - 1e-6)
        return {"step": step + 1, "kl": kl, "compression_loss": compression,
                "target_cr": round(cr, 4), "cr": 1 / held, "grad_norm": norm}

    def differentiate(self, step, ids, documents, cr):
        """Gradients of this process's share of a step's loss, rows of some 4,096 tokens at a time.
        Returns its share of KL and of the fraction let go, (2,)."""
        rank, world = torchrun_place()
        tokens = sum(map(sum, documents))
        predictions = tokens - sum(map(len, documents))
        sums = torch.zeros(2, device=self.student.device)
        mine = list(range(rank, len(ids), world))
        at_a_time = rows_at_a_time(ids.shape[1])
        for begin in range(0, len(mine), at_a_time):
            rows = mine[begin : begin + at_a_time]
            seeds = [f"{self.options.seed} {step} {row}" for row in rows]
            kl, let_go = self.compare(ids[rows], [documents[row] for row in rows], seeds)
            parts = torch.stack((kl / predictions, let_go / tokens))
            # The fraction of the whole step is known only after its last row. So the compression
            # loss is that of the step before, with the gradient of these rows.
            fraction = self.fraction_let_go + (parts[1] - parts[1].detach())
            compression = dms.compression_loss(fraction, cr)
            (parts[0] + self.options.compression_weight * compression).backward()
            sums += parts.detach()
        return sums

    def compare(self, ids, documents, seeds):
        """Of some rows the KL, summed over tokens, and the pairs let go, the mean over heads, both
        with their graphs."""
        student = self.student
        teacher = self.teacher
        ids = ids.to(student.device)
        packing = dms.Packing.of(documents, ids.shape[1], ids.device)
        with torch.no_grad(), sdpa_kernel(BACKENDS):
            # positions count from 0 in each document, so the row's first token is at -packing.first
            target = teacher.hidden(ids, dms.document_attention(documents), start=-packing.first)
        states, let_go = self.student_states(ids, packing, seeds)
        heads = (student.lm_head.weight, teacher.lm_head.weight)
        reverse = self.options.reverse_kl
        return dms.distillation_loss(states, target, *heads, packing.predicts(), reverse), let_go

    def student_states(self, ids, packing, seeds):
        """Final states (B, T, C) and pairs let go. seeds: of the noise; None: hard decisions."""
        attention = choose_training_attention(ids.device)
        relaxed = dms.RelaxedAttention(self.student.config.dms, packing, attention, seeds)
        recompute = self.options.recompute or recomputes(ids.shape[1])
        states = self.student.hidden(ids, relaxed, start=-packing.first, recompute=recompute)
        return states, relaxed.pairs_let_go()

    def fade(self, step):
        """The borrowed channel's weight at this step; once it is gone, it begins to decide."""
        fade_steps = self.options.fade_steps
        weight = max(1 - step / fade_steps, 0.0) if fade_steps else 0.0
        self.student.config.dms.borrowed_weight = weight
        if fade_steps and step == fade_steps:
            for parameter in dms.clear_borrowed(self.student):
                del self.optimizer.state[parameter]  # or the old momentum would decide at once

    @torch.no_grad()
    def let_go_with(self, offset, ids, documents):
        """The fraction of their pairs that hard decisions let go with this offset, which is set."""
        self.student.config.dms.offset = offset
        at_a_time = rows_at_a_time(ids.shape[1])
        pairs = 0
        for row in range(0, len(ids), at_a_time):
            some = slice(row, row + at_a_time)
            packing = dms.Packing.of(documents[some], ids.shape[1], ids.device)
            pairs += self.student_states(ids[some], packing, None)[1].item()
        return pairs / sum(map(sum, documents))

    def settle_offset(self, data):
        """Set the offset of the decisions so that, without noise, they compress by 2 to 4 % more
        than the target: the one-sided loss overshoots by much more, which costs quality. Not
        lower than by 1, less than the noise in training was. Judged by held-out sequences, others
        than those that the KL is measured on. Returns the compression ratio."""
        settings = self.student.config.dms
        settings.borrowed_weight = 0.0
        ids, documents = data.held_out(settling_rows(self.options.seq_len))
        # asked once for each offset
        let_go = cache(partial(
            self.let_go_with, ids=ids.to(self.student.device), documents=documents))
        least = 1 - 1 / (1.02 * self.options.target_cr)  # other texts may be compressed by less
        most = 1 - 1 / (1.04 * self.options.target_cr)
        trained = settings.offset
        low = trained - 1
        if let_go(low) < least:  # the target is not reached even so: leave it as it was trained
            settings.offset = trained
            return 1 / (1 - let_go(trained))
        # The higher the offset, the less is let go: `low` lets go of enough or too much, `high`,
        # once it has been found, of no more than `most`.
        high = trained
        while let_go(high) > most:
            low, high = high, high + 2 * (high - low)
        for _ in range(12):
            if let_go(high) >= least:
                break
            middle = (low + high) / 2
            if let_go(middle) > most:
                low = middle
            else:
                high = middle
        # with few texts there may be nothing between `least` and `most`
        settings.offset = high if let_go(high) >= least else low
        return 1 / (1 - let_go(settings.offset))

    def save(self, file, step, place):
        """Weights in training, AdamW's state and the place in the data, one safetensors file,
        replaced atomically. To be called in all processes."""
        tensors = {}
        for name, parameter in self.parameters.items():
            for key, tensor in {"weight": parameter, **self.optimizer.state[parameter]}.items():
                tensors[f"{key}.{name}"] = whole(tensor.detach()).cpu().contiguous()
        notes = {"step": step, "place": place, "fraction_let_go": self.fraction_let_go}
        notes = {key: json.dumps(value) for key, value in notes.items()}
        if torchrun_place()[0] == 0:
            write_atomic(file, lambda temporary: save_file(tensors, temporary, notes))

    def load(self, file):
        """The inverse of save: (steps done, place in the data). Raises InputError."""
        problem = f"{file}: does not belong to this run; start anew in another --out"
        bad = (SafetensorError, OSError, ValueError, LookupError, RuntimeError, TypeError)
        with refusing(problem, *bad), safe_open(file, "pt") as saved:
            for name, parameter in self.parameters.items():
                state = {key: saved.get_tensor(f"{key}.{name}") for key in STATE}
                require(all(tensor.shape == parameter.shape for tensor in state.values()), problem)
                state = {key: spread(tensor, parameter) for key, tensor in state.items()}
                parameter.data.copy_(state.pop("weight"))
                state["step"] = saved.get_tensor(f"step.{name}")
                self.optimizer.state[parameter] = state
            notes = {key: json.loads(text) for key, text in saved.metadata().items()}
            self.fraction_let_go = float(notes["fraction_let_go"])
            place = notes["place"] and [int(number) for number in notes["place"]]
            return int(notes["step"]), place
