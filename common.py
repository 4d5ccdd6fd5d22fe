"""
What the scripts share: errors of one line, files that are written whole, options, how a script
ends, and several processes.
"""

import argparse
import functools
import inspect
import json
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as distributed


class InputError(ValueError):
    """Something the user gave cannot be used. One line: what was wrong, and what to do."""


def require(condition, problem):
    """Raise InputError(problem) unless the condition holds."""
    if not condition:
        raise InputError(problem)


@functools.cache
def say(line):
    """Tell the user, once in a process."""
    print(line, file=sys.stderr)


@contextmanager
def explained(problem, *kinds):
    """Errors of these kinds become an InputError: the problem, and what the error says."""
    try:
        yield
    except kinds as e:
        raise InputError(f"{problem} ({str(e)[:300]})") from e


# ------------------------------------------------------------------------------------------- Files


def read_text(file):
    with explained(f"{file}: not readable as text", UnicodeError):
        return Path(file).read_text(encoding="utf-8")


def read_json(file):
    """The JSON object in a file, a dict."""
    with explained(f"{file}: holds no JSON object that can be read", TypeError, ValueError):
        return dict(json.loads(read_text(file)))


def write_atomic(file, write):
    """Call write(temporary path), then move the result to `file` in one step: no reader ever sees
    half of it, and a crash leaves what was there before."""
    temporary = Path(file).with_name(f".{Path(file).name}.tmp")
    write(temporary)
    os.replace(temporary, file)


def write_json(file, data):
    write_atomic(file, lambda temporary: temporary.write_text(json.dumps(data, indent=2) + "\n"))


# ----------------------------------------------------------------------------------------- Scripts


def parse_options(options, argv=None):
    """{field: value} of what the command line states of a dataclass of options: --NAME VALUE for a
    field, --NAME alone for a bool, --NAME [VALUE] for one whose default is "". The comment behind a
    field is its help."""
    source = inspect.getsource(options).replace("%", "%%")  # argparse reads % as a format
    comments = dict(re.findall(r"^    (\w+): .*# (.*)$", source, re.MULTILINE))
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    for field in fields(options):
        choices = getattr(field.type, "__args__", ())  # of a Literal
        if choices:
            how = dict(type=type(choices[0]), choices=choices)
        elif field.type in (bool, list):
            how = dict(action="store_true" if field.type is bool else "append")
        elif field.default == "":
            how = dict(nargs="?", const="-")
        else:
            how = dict(type=field.type)
        flag = f"{'-' if len(field.name) == 1 else '--'}{field.name}".replace("_", "-")
        parser.add_argument(flag, **how, help=comments.get(field.name))
    return vars(parser.parse_args(argv))


def choose_device(options):
    """Make --device the current one, and fill in --dtype. Under torchrun "cuda" is this process's
    own GPU. GPUs before Ampere (sm_80) have no bfloat16."""
    if options.device == "cuda":
        options.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with explained(f"--device {options.device}: not to be had here", Exception):
        torch.empty(0, device=options.device)
    if options.device.startswith("cuda"):
        torch.cuda.set_device(options.device)
        # cuDNN's attention plans for each new shape; 0.4 s each have been reported
        torch.backends.cuda.enable_cudnn_sdp(False)
        is_ampere = torch.cuda.get_device_capability()[0] >= 8  # or newer
        options.dtype = options.dtype or ("bfloat16" if is_ampere else "float16")
    options.dtype = options.dtype or "float32"


def run_script(main, when_stopped="stopped", when_out_of_memory="ask for less"):
    """Run main(). Bad input and what the system refuses end it with one line and exit code 2, an
    interruption ends it with exit code 130."""
    try:
        main()
    except KeyboardInterrupt:
        print(f"\n{when_stopped}", file=sys.stderr)
        sys.exit(130)
    except (InputError, OSError, torch.OutOfMemoryError) as e:
        hint = f"{when_out_of_memory}: " if isinstance(e, torch.OutOfMemoryError) else ""
        print("error:", hint + " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)


# ------------------------------------------------------------------------------- Several processes


def torchrun_place():
    """(this process's number among those that torchrun started, how many there are)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def shard(model):
    """Spread a model's weights over all processes (FSDP2). Gradients are summed, not averaged."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for module in (*model.model.layers, model):
        fully_shard(module)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden")


def all_reduce(tensor):
    """The sum over all processes, in place."""
    if distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")


def whole(tensor):
    """A tensor that may be sharded, in one piece."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def sharded_like(tensor, parameter):
    """The inverse: on the parameter's device, and sharded as that is."""
    tensor = tensor.to(parameter.device)
    if not is_sharded(parameter):
        return tensor
    return distributed.tensor.distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
