#!/usr/bin/env bash
# ml_collections 1.1.0 joins the values of a tuple field that is set twice on the command line; of other fields the last
# value counts, as of most programs' flags.
#
# A wrapper script that sets `--config.size=(1024, 512)` and passes its user's words on turns a user's
# `--config.size=(512, 256)` into (1024, 512, 512, 256). Where the field's length is not checked (class weights, scales
# of test-time augmentation) nothing is reported. `jaxuda.cli` therefore keeps only the last word for each field.
#
# Output seen (Python 3.11, ml_collections 1.1.0, absl-py 2.5.1):
#   size, a tuple: (1, 2, 3, 4)
#   lr, a float:   0.2
#   name, a str:   b
#
# It exits with 1 if a field behaves otherwise.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ml_collections==1.1.0 absl-py==2.5.1
"$folder/venv/bin/python" - <<'PROGRAM'
import sys

from absl import flags
from ml_collections import ConfigDict, config_flags

words = ["program", "--config.size=(1, 2)", "--config.lr=0.1", "--config.name=a"]
words += ["--config.size=(3, 4)", "--config.lr=0.2", "--config.name=b"]
values = flags.FlagValues()
config = ConfigDict({"size": (0, 0), "lr": 0.0, "name": ""})
config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=words)
values(words)
found = values.config
print(f"size, a tuple: {found.size}\nlr, a float:   {found.lr}\nname, a str:   {found.name}")
sys.exit((found.size, found.lr, found.name) != ((1, 2, 3, 4), 0.2, "b"))
PROGRAM
