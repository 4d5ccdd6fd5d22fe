"""bench/gpu.sh, at sizes for a CPU: what will be run on a GPU runs, and leaves its results."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from checkpoint import read_json


@pytest.mark.parametrize(
    "what, rows",
    [
        ("decode", {"decode.json": ["kernel", "steps"]}),
        ("long", {"retrofit-step.json": ["rows"], "prefill.json": ["rows"]}),
        ("beside", {"transformers.json": ["transformers"], "toy/results.json": ["results"]}),
    ],
)
def test_what_is_run_on_a_gpu(what, rows, tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "SMALL": "1", "PATH": path, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", REPOSITORY / "bench" / "gpu.sh", what, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for file, keys in rows.items():
        data = read_json(tmp_path / file)
        assert all(data[key] for key in keys)
