"""bench/gpu.sh at sizes for a CPU: what will run on a GPU runs, and leaves its rows."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY


@pytest.mark.parametrize("part, kinds", [
    ("decode", {"copy", "step", "last step's kernels"}), ("transformers", {"step"}),
    ("training", {"large products", "training step", "last step's kernels"}),
    ("prefill", {"prefill", "last prefill's kernels"})])
def test_what_is_run_on_a_gpu(part, kinds, tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "SMALL": "1", "PATH": path, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", REPOSITORY / "bench" / "gpu.sh", tmp_path, part]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = (tmp_path / "gpu.jsonl").read_text().splitlines()
    assert {json.loads(row)["row"] for row in rows} == {"settings", *kinds}
