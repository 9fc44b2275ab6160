"""The GRPO example trains, and its rollouts follow the weights."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="it is TRL that trains")

ROOT = Path(__file__).parents[2]


def test_rollouts_follow_each_optimizer_step(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "06_grpo.py"), "--steps", "2", "--layers", "2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"new weights: (\w+)", done.stdout) == ["yes", "yes"]
    assert [*map(int, re.findall(r"rollout: (\d) different", done.stdout))] == [4, 4]
