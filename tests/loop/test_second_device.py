"""On an accelerator nothing is left on the CPU and no number changes, as far as a machine without one can tell.

`support.second_device` stands in for it. torch has that device from then on, so the tests of `support.on_second_device`
have a process to themselves.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import support


def test_models_methods_and_rewards_on_a_second_device():
    tests = Path(support.__file__).with_name("on_second_device.py")
    options = ["-p", "support.second_device", "-p", "no:cacheprovider", "-q", "-x", "--tb=short"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tests)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
