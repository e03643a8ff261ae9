"""Nothing is fetched at run time: data are prepared, networks trained and reports written without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json, sys

tried = []

def watch(event, arguments):
    inner = event == "socket.connect" and not isinstance(arguments[1], tuple)  # between processes of this machine
    if not inner and event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto",
                               "http.client.connect", "urllib.Request", "ftplib.connect"):
        tried.append(f"{event} {arguments}")
        raise OSError("there is no network")

sys.addaudithook(watch)
from jaxuda import main, prepare

words, folders, data_dir, images = json.loads(sys.argv[1])
for folder in folders:
    prepare.prepare("folder", path=folder, data_dir=data_dir)
code = main.main(["jaxuda", *words])
checkpoint = words[1].partition("=")[2] + "/self_train"
code = code or main.main(["jaxuda", *words, "--mode=predict", f"--checkpoint={checkpoint}", f"--images={images}"])
print("tried:", tried)
sys.exit(code or bool(tried))
"""


@pytest.mark.slow
def test_a_run_needs_no_network(tmp_path: Path) -> None:
    folders = [
        tiny.draw_folder(tmp_path / name, f"tiny_{name}", shift) for name, shift in (("source", 0), ("target", 30))
    ]
    workdir = tmp_path / "run"
    words = ["--config=tests/faults/recipe.py:folder", f"--workdir={workdir}", f"--config.data_dir={tmp_path / 'data'}"]
    words += [f"--config.{folder.name}.path={folder}" for folder in folders]
    orders = json.dumps([words, [*map(str, folders)], str(tmp_path / "data"), str(folders[1] / "images" / "val")])
    command = [sys.executable, "-c", PROGRAM, orders]
    # If the system allows it, run without any network, so that other than Python code cannot use it either.
    alone = ["unshare", "--net"]
    if os.geteuid() == 0 and not subprocess.run([*alone, "true"], capture_output=True).returncode:
        command = alone + command
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tried: []" in done.stdout
    assert (workdir / "report.html").exists() and len(list((workdir / "predictions" / "ids").iterdir())) == 6
