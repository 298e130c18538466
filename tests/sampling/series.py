"""Images that `sample` starts from and writes."""

import numpy as np
from PIL import Image

from dit_hf.data.avatars import choose_face, render_face


def pixels(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]).astype(int)


def save_faces(folder):
    """Save two avatars of 16 px as `face-0.png` and `face-1.png`, and return the folder."""
    for i in range(2):
        render_face(choose_face(0, i), 16).save(folder / f"face-{i}.png")
    return folder
