"""Time from the start of Python to the first finished training step, cold and with JAX's persistent compile cache.

    python experiments/benchmarks/first_step.py
    python experiments/benchmarks/first_step.py --method advent --network resnet101 --width 64 --batch 1

It has the options of train_step.py that describe a step. The cache is JAX's own (JAX_COMPILATION_CACHE_DIR), in a
temporary folder; the cold start also fills it.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Prints both times and their ratio."""
    script = Path(__file__).with_name("train_step.py")
    with tempfile.TemporaryDirectory() as folder:
        keep = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            command = [sys.executable, str(script), *sys.argv[1:], "--alone", "first"]
            subprocess.run(command, check=True, env=os.environ | keep)
            seconds.append(time.perf_counter() - started)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) / 1e6
    print(f"first step after {seconds[0]:.1f} s, from the cache ({size:.1f} MB) after {seconds[1]:.1f} s, ", end="")
    print(f"ratio {seconds[1] / seconds[0]:.2f}")


if __name__ == "__main__":
    main()
