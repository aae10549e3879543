"""What comes in: image files, datasets, augmentation, loaders, and gathering by image index.

Every image here is uint8 (H, W, 3) in RGB until a loader collates it to float32 (B, 3, H, W),
0 to 1. Randomness is a function of (seed, epoch, index of the image) and of nothing else.
"""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import asks the network
