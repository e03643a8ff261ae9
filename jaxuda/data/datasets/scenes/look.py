"""How the two domains look: colours, textures, light and sensor, and what sets the distance between them."""

import functools
import random
from typing import NamedTuple

import cv2
import numpy as np

from jaxuda.data.datasets.scenes.canvas import CLASS, SUPER, Canvas, Colour

# The distance between the domains: 0 gives `camera` the colours (or the light, texture and sensor) of `game`,
# 1 those written below; values between mix them. Measured: with 1 a small network trained on `game` stays near chance.
PALETTE_SHIFT = 0.5
LOOK_SHIFT = 0.5

Range = tuple[float, float]


class Look(NamedTuple):
    """A value is drawn from each range once per scene. Grey levels are 0..255."""

    exposure: Range  # gain
    white_balance: Range  # gain of red; blue gets its inverse
    saturation: Range
    contrast: Range
    gamma: Range
    haze: Range  # extinction per metre
    haze_level: Range  # grey level of the haze
    noise: Range  # standard deviation in grey levels
    blur: Range  # standard deviation in pixels of a picture 256 wide
    vignette: Range  # share of light lost in the corners
    shadow: Range  # darkness of cast shadows; below 0.1 the sky is overcast and there are none
    direct: Range  # share of direct light: contrast between faces
    clouds: Range
    tiles: float  # strength of the joints in the pavement
    colour_spread: float  # variation of a colour from thing to thing, in grey levels


_LOOKS = {
    "game": Look(
        exposure=(1.0, 1.1), white_balance=(0.98, 1.02), saturation=(1.1, 1.25), contrast=(1.05, 1.15),
        gamma=(0.95, 1.05), haze=(0.0, 0.0012), haze_level=(215, 225), noise=(0.5, 2.0), blur=(0.0, 0.0),
        vignette=(0.0, 0.04), shadow=(0.2, 0.4), direct=(0.25, 0.35), clouds=(0.0, 0.25), tiles=0.14,
        colour_spread=8.0,
    ),
    "camera": Look(
        exposure=(0.78, 1.3), white_balance=(0.9, 1.15), saturation=(0.6, 0.95), contrast=(0.78, 1.02),
        gamma=(0.75, 1.1), haze=(0.002, 0.012), haze_level=(185, 215), noise=(3.0, 8.0), blur=(0.4, 0.8),
        vignette=(0.1, 0.35), shadow=(-0.25, 0.6), direct=(0.1, 0.4), clouds=(0.2, 0.9), tiles=0.0,
        colour_spread=14.0,
    ),
}  # fmt: skip

# Name -> colours (R, G, B) in game, in camera; the same number of each, so that they can be mixed.
_PALETTES = {
    "road": ([(84, 86, 98), (100, 100, 110)], [(122, 116, 106), (88, 86, 84)]),
    "patch": ([(74, 76, 86)], [(98, 94, 88)]),
    "marking": ([(245, 245, 238), (246, 206, 60)], [(208, 206, 198), (214, 208, 190)]),
    "rail": ([(160, 165, 175)], [(96, 88, 82)]),
    "sidewalk": ([(202, 186, 166), (178, 176, 186)], [(148, 138, 130), (166, 150, 138)]),
    "curb": ([(225, 222, 214)], [(172, 168, 162)]),
    "building": (
        [(222, 128, 88), (240, 212, 150), (150, 176, 210), (208, 96, 84), (238, 230, 212), (176, 200, 160)],
        [(148, 126, 108), (182, 170, 150), (116, 102, 96), (192, 178, 144), (136, 138, 142), (160, 118, 96)],
    ),
    "window": ([(96, 150, 205), (58, 92, 136)], [(58, 62, 70), (104, 112, 118)]),
    "frame": ([(245, 245, 245)], [(196, 190, 180)]),
    "shop": ([(60, 130, 160), (190, 60, 90), (80, 90, 100)], [(70, 62, 60), (110, 84, 70), (88, 96, 98)]),
    "roof": ([(170, 70, 56), (90, 96, 116)], [(108, 72, 62), (82, 80, 82)]),
    "wall": ([(186, 116, 92), (214, 202, 176)], [(134, 110, 96), (150, 148, 140)]),
    "joint": ([(150, 88, 70)], [(112, 100, 92)]),
    "fence": ([(236, 236, 232), (40, 110, 80)], [(118, 100, 82), (72, 78, 76)]),
    "mesh": ([(150, 170, 150)], [(96, 96, 86)]),
    "pole": ([(62, 68, 76), (150, 158, 168)], [(98, 96, 92), (126, 122, 114)]),
    "case": ([(34, 34, 38), (238, 190, 40)], [(40, 48, 44), (56, 54, 52)]),
    "sign": (
        [(226, 28, 40), (28, 88, 214), (252, 204, 36), (20, 146, 84)],
        [(178, 58, 54), (58, 86, 146), (196, 166, 76), (70, 110, 88)],
    ),
    "field": ([(250, 250, 250)], [(214, 212, 206)]),
    "leaves": ([(58, 156, 50), (92, 176, 60), (36, 124, 54)], [(86, 96, 56), (64, 80, 52), (116, 108, 62)]),
    "trunk": ([(118, 78, 46)], [(82, 72, 62)]),
    "terrain": ([(112, 190, 72), (160, 190, 84)], [(128, 128, 82), (108, 116, 72)]),
    "sky": ([(66, 138, 238), (90, 164, 248)], [(150, 168, 190), (176, 182, 190)]),
    "skyline": ([(190, 226, 255)], [(212, 212, 208)]),
    "skin": ([(236, 188, 150), (150, 100, 70)], [(206, 164, 140), (128, 94, 76)]),
    "clothes": (
        [(230, 60, 60), (50, 100, 220), (250, 220, 80), (60, 180, 110), (240, 240, 240)],
        [(96, 56, 56), (56, 66, 92), (148, 136, 116), (70, 78, 72), (44, 44, 48)],
    ),
    "trousers": ([(40, 60, 130), (70, 70, 80)], [(52, 56, 72), (58, 54, 52)]),
    "hair": ([(70, 45, 25), (30, 26, 26)], [(62, 50, 42), (40, 38, 38)]),
    "helmet": ([(250, 240, 240), (230, 40, 40)], [(60, 60, 62), (168, 160, 150)]),
    "car": (
        [(218, 40, 40), (40, 90, 220), (246, 210, 50), (245, 245, 248), (40, 40, 46)],
        [(96, 46, 46), (52, 64, 92), (160, 156, 150), (206, 206, 206), (48, 50, 52)],
    ),
    "truck": ([(240, 150, 40), (50, 140, 200)], [(120, 100, 84), (84, 98, 116)]),
    "cargo": ([(242, 242, 244), (60, 150, 200)], [(178, 174, 166), (118, 122, 110)]),
    "bus": ([(236, 60, 50), (250, 190, 40)], [(170, 150, 70), (122, 66, 60)]),
    "train": ([(40, 160, 140), (90, 80, 190)], [(150, 140, 110), (84, 106, 104)]),
    "stripe": ([(250, 250, 250), (60, 60, 80)], [(196, 190, 176), (86, 82, 80)]),
    "glass": ([(120, 170, 210)], [(62, 70, 76)]),
    "tyre": ([(28, 28, 32)], [(44, 42, 42)]),
    "hub": ([(190, 194, 202)], [(120, 118, 116)]),
    "tail": ([(240, 30, 30)], [(150, 50, 46)]),
    "lamp": ([(255, 250, 225)], [(212, 210, 200)]),
    "cycle": ([(230, 50, 60), (40, 160, 210), (60, 60, 66)], [(92, 62, 58), (66, 76, 84), (46, 46, 46)]),
    "spokes": ([(170, 172, 178)], [(112, 108, 102)]),
    "engine": ([(190, 30, 36), (40, 50, 60)], [(84, 52, 50), (52, 54, 56)]),
}

# Strength of the surface texture by class in (game, camera): fine grain, clumps, large patches.
_TEXTURE = {
    "road": ((0.03, 0.02, 0.02), (0.07, 0.04, 0.09)),
    "sidewalk": ((0.02, 0.02, 0.02), (0.06, 0.05, 0.08)),
    "building": ((0.01, 0.02, 0.02), (0.05, 0.05, 0.09)),
    "wall": ((0.03, 0.05, 0.02), (0.06, 0.06, 0.08)),
    "fence": ((0.01, 0.01, 0.0), (0.06, 0.05, 0.05)),
    "vegetation": ((0.08, 0.14, 0.05), (0.16, 0.12, 0.10)),
    "terrain": ((0.08, 0.06, 0.05), (0.12, 0.10, 0.10)),
    "sky": ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
}
_PLAIN = ((0.0, 0.0, 0.0), (0.03, 0.03, 0.03))


def _mix(game, camera, share: float):
    """game + share (camera - game), on nested tuples and lists."""
    if isinstance(game, list | tuple):
        return tuple(_mix(g, c, share) for g, c in zip(game, camera, strict=True))
    return game + share * (camera - game)


@functools.lru_cache(maxsize=2)
def look(domain: str) -> Look:
    """Light, texture and sensor of a domain."""
    return Look(*_mix(_LOOKS["game"], _LOOKS[domain], LOOK_SHIFT))


@functools.lru_cache(maxsize=2)
def palette(domain: str) -> dict[str, tuple[Colour, ...]]:
    """Colours of a domain by name."""
    share = PALETTE_SHIFT if domain == "camera" else 0.0
    return {name: _mix(game, camera, share) for name, (game, camera) in _PALETTES.items()}


@functools.lru_cache(maxsize=2)
def _texture_strength(domain: str) -> np.ndarray:
    """(19, 3): class -> strength of grain, clumps and patches."""
    share = LOOK_SHIFT if domain == "camera" else 0.0
    return np.array([_mix(*_TEXTURE.get(name, _PLAIN), share) for name in CLASS], np.float32)


class Paint:
    """Draws the colours of one scene: each is a colour of the palette with a small random change."""

    def __init__(self, domain: str, rng: random.Random):
        self.palette, self.rng, self.spread = palette(domain), rng, look(domain).colour_spread

    def __call__(self, name: str) -> Colour:
        # called hundreds of times per scene: plain arithmetic; values outside 0..255 are clipped at the end
        colours, draw, spread = self.palette[name], self.rng.random, self.spread
        red, green, blue = colours[int(draw() * len(colours))]
        light = spread * (2 * draw() - 1.6)
        return red + light + spread * 1.2 * draw(), green + light, blue + light + spread * 1.2 * draw()


_TILE = 512


@functools.lru_cache(maxsize=1)
def _noise_tiles() -> tuple[np.ndarray, ...]:
    """Periodic noise of unit variance: grain, clumps, patches, clouds (_TILE x _TILE), sensor noise (x 3)."""
    rng = np.random.default_rng(20)
    tiles = []
    for sigma in (0.6, 1.6, 7.0, 16.0):
        white = rng.standard_normal((_TILE, _TILE)).astype(np.float32)
        margin = 64
        wrapped = cv2.copyMakeBorder(white, margin, margin, margin, margin, cv2.BORDER_WRAP)
        tile = cv2.GaussianBlur(wrapped, (0, 0), sigma)[margin:-margin, margin:-margin]
        tiles.append((tile - tile.mean()) / tile.std())
    sensor = rng.standard_normal((_TILE, _TILE, 3)).astype(np.float32)
    # noise of a colour sensor is mostly common to the channels once it has been demosaiced
    tiles.append(0.6 * sensor + 0.8 * sensor[::-1, :, :1])
    return tuple(tiles)


def _crop(tile: np.ndarray, rng: random.Random, width: int, height: int) -> np.ndarray:
    """A random part of a tile, which is repeated where the picture is larger."""
    if height <= _TILE and width <= _TILE:
        y, x = int(rng.random() * (_TILE - height + 1)), int(rng.random() * (_TILE - width + 1))
        return tile[y : y + height, x : x + width]
    return tile[np.arange(height)[:, None] % _TILE, np.arange(width) % _TILE]


@functools.lru_cache(maxsize=4)
def _radius(width: int, height: int) -> np.ndarray:
    """Squared distance from the middle, 1 in the corners, (H, W)."""
    y, x = np.linspace(-1, 1, height, dtype=np.float32), np.linspace(-1, 1, width, dtype=np.float32)
    return (y[:, None] ** 2 + x[None] ** 2) / 2


def _texture(canvas: Canvas, domain: str, rng: random.Random, label: np.ndarray) -> np.ndarray:
    """Factor of the surface colours, (H, W) float32."""
    width, height = canvas.size
    grain, clumps, patches, clouds, _ = _noise_tiles()
    strength = _texture_strength(domain)
    # The ground has its own clumps in perspective, so that they are narrower far away.
    factor = 1 + strength[:, 0][label] * _crop(grain, rng, width, height)
    factor += strength[:, 1][label] * _crop(clumps, rng, width, height)
    factor += strength[:, 2][label] * _crop(patches, rng, width, height)
    top = max(int(canvas.view.v0 / SUPER) + 2, 0)
    if top < height:
        rows = np.arange(top, height, dtype=np.float32)
        depth = canvas.view.focal * canvas.view.height / (rows * SUPER - canvas.view.v0)
        across = (np.arange(width, dtype=np.float32) * SUPER - canvas.view.u0) / canvas.view.focal
        x = (across[None] * depth[:, None] * 8).astype(np.int32)
        z = (depth * 8).astype(np.int32)
        near = np.minimum(depth[:, None] ** -0.5 * 2.5, 1.0)
        ground = label[top:] <= CLASS["sidewalk"]
        laid = 0.5 * clumps[z[:, None] & (_TILE - 1), x & (_TILE - 1)] * strength[0, 0] * 2
        tiles = look(domain).tiles
        if tiles:
            joints = ((x & 7) == 0) | ((z & 7) == 0)[:, None]
            laid -= tiles * joints * (label[top:] == CLASS["sidewalk"])
        factor[top:] += ground * near * laid
    cover = rng.uniform(*look(domain).clouds)
    if cover > 0:
        rows = np.linspace(0, 2.0, height, dtype=np.float32)[:, None]
        white = np.clip(_crop(clouds, rng, width, height) + cover * 2 - 1, 0, 1.2) * rows
        factor += (label == CLASS["sky"]) * white * (0.3 * cover)
    return factor


def finish(canvas: Canvas, domain: str, rng: random.Random) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turns a painted canvas into image (H, W, 3) uint8 RGB, label (H, W) uint8 and depth (H, W) uint16."""
    width, height = canvas.size
    style = look(domain)
    surface = canvas.pixels[::SUPER, ::SUPER, 3]
    label = np.array(canvas.labels, np.uint8)[surface]
    planes = np.array(canvas.planes, np.float32)
    columns, rows = np.arange(width, dtype=np.float32) * SUPER, np.arange(height, dtype=np.float32) * SUPER
    inverse = planes[:, 0][surface] * columns + planes[:, 1][surface] * rows[:, None] + planes[:, 2][surface]
    inverse = np.maximum(inverse, 1 / 655.36)  # 1/m; the smallest that the stored depth can hold: sky
    # stored: centimetres minus one, so that 65536 / (depth + 1) is an inverse depth
    depth = np.clip(np.rint(100 / inverse) - 1, 0, 65535).astype(np.uint16)

    averaged = cv2.resize(canvas.pixels, (width, height), interpolation=cv2.INTER_AREA)
    image = averaged[..., :3].astype(np.float32)
    light = cv2.GaussianBlur(canvas.shade, (3, 3), 0).astype(np.float32) / 255
    on_ground = (label <= CLASS["sidewalk"]) | (label == CLASS["terrain"])
    factor = _texture(canvas, domain, rng, label) * np.where(on_ground, light, 1)
    image *= factor[..., None]

    haze = rng.uniform(*style.haze)
    level = rng.uniform(*style.haze_level)
    # the sky keeps half of its colour in haze
    seen = np.exp(-haze / np.maximum(inverse, np.float32(1 / 120)))
    gain = rng.uniform(*style.exposure) * rng.uniform(0.97, 1.03)
    balance = rng.uniform(*style.white_balance)
    gains = gain * np.array([balance, 1.0, 1 / balance])
    mix = rng.uniform(*style.saturation)
    contrast = rng.uniform(*style.contrast)
    to_grey = np.tile(np.array([0.3, 0.59, 0.11]), (3, 1))
    matrix = np.empty((3, 4), np.float32)
    matrix[:, :3] = gains[:, None] * contrast * (mix * np.eye(3) + (1 - mix) * to_grey)
    matrix[:, 3] = 118 * (1 - contrast)
    lost = 1 - rng.uniform(*style.vignette) * _radius(width, height)
    image = cv2.transform((image - level) * seen[..., None] + level, matrix) * lost[..., None]
    blur = rng.uniform(*style.blur) * width / 256
    if blur > 0.2:
        image = cv2.GaussianBlur(image, (0, 0), blur)
    image += rng.uniform(*style.noise) * _crop(_noise_tiles()[4], rng, width, height)
    gamma = rng.uniform(*style.gamma)
    curve = (255 * (np.arange(256) / 255) ** gamma + 0.5).astype(np.uint8)
    return cv2.LUT(np.clip(image, 0, 255).astype(np.uint8), curve), label, depth
