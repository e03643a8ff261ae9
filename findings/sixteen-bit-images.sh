#!/usr/bin/env bash
# One picture of 16 bits becomes four different pictures of 8 bits, by its file format and by the library that reads it.
#
# The picture has the values 0, 100, 255, 256, 1000, 4095, 16384 and 65535, saved without loss, grey or as three equal
# colours, as PNG or TIFF. Read as 8-bit RGB:
#
# - Pillow clips grey values at 255, so that a photo of a 12-bit camera is white nearly everywhere; of colours it keeps
#   the upper 8 bits, so that the same photo is nearly black.
# - OpenCV keeps the upper 8 bits of grey files and of PNG, but rounds the colours of TIFF to the next value.
#
# A model that is trained on files read by one library and used on files read by the other, or on the same photos
# converted to another format, sees other pictures. `jaxuda.data.encoding` therefore takes the 16-bit values and scales
# them itself, and `prepare` warns of images that use few of them.
#
# Output seen (Python 3.11, Pillow 13.0.0, opencv-python-headless 5.0.0.93, NumPy 2.4.6):
#   Pillow grey png:    0 100 255 255 255 255 255 255
#   Pillow grey tif:    0 100 255 255 255 255 255 255
#   Pillow colour png:  0 0 0 1 3 15 64 255
#   Pillow colour tif:  0 0 0 1 3 15 64 255
#   OpenCV grey png:    0 0 0 1 3 15 64 255
#   OpenCV grey tif:    0 0 0 1 3 15 64 255
#   OpenCV colour png:  0 0 0 1 3 15 64 255
#   OpenCV colour tif:  0 0 1 1 4 16 64 255
#
# It exits with 1 if any of these lines changes.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0 opencv-python-headless==5.0.0.93 numpy==2.4.6
"$folder/venv/bin/python" - <<'PROGRAM'
import io
import sys

import cv2
import numpy as np
from PIL import Image

VALUES = np.array([[0, 100, 255, 256, 1000, 4095, 16384, 65535]], np.uint16)
CLIPPED, UPPER, ROUNDED = [0, 100, *[255] * 6], [0, 0, 0, 1, 3, 15, 64, 255], [0, 0, 1, 1, 4, 16, 64, 255]
EXPECTED = {("Pillow", "grey", "png"): CLIPPED, ("Pillow", "grey", "tif"): CLIPPED, ("OpenCV", "colour", "tif"): ROUNDED}

changed = False
for library in ("Pillow", "OpenCV"):
    for kind, array in (("grey", VALUES), ("colour", np.repeat(VALUES[..., None], 3, 2))):
        for ending in ("png", "tif"):
            data = cv2.imencode(f".{ending}", array)[1]
            assert (cv2.imdecode(data, cv2.IMREAD_UNCHANGED) == array).all()  # nothing was lost in the file
            if library == "Pillow":
                image = np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))
            else:
                image = cv2.imdecode(data, cv2.IMREAD_COLOR)
            found = image[0, :, 0].tolist()
            name = f"{library} {kind} {ending}:"
            print(f"{name:<19}", *found)
            changed |= found != EXPECTED.get((library, kind, ending), UPPER)
sys.exit(changed)
PROGRAM
