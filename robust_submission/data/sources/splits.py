"""Parts of a dataset in which every class keeps its share."""

import numpy as np

from robust_submission.cli.errors import UserError


def _stratified(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """`size` sorted indices, stratified where every class has two images or more, else drawn."""
    from sklearn.model_selection import train_test_split

    if not 0 <= seed < 2**32:
        raise UserError(f"seed: expected 0 to 2**32 - 1, found {seed}.")
    counts = np.bincount(labels)
    counts = counts[counts > 0]
    even = counts.min() >= 2 and len(counts) <= min(size, len(labels) - size)
    _, chosen = train_test_split(
        np.arange(len(labels)),
        test_size=size,
        stratify=labels if even else None,
        random_state=seed,
    )
    return np.sort(chosen)


def stratified_subset(labels: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    """Sorted indices of at most `limit` images with the classes' shares kept; None takes all.

    Raises:
        UserError: a limit below 1, or a seed below 0 or of more than 32 bits.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit: expected at least 1 image, found {limit}.")
    if limit is None or limit >= len(labels):
        return np.arange(len(labels))
    return _stratified(labels, limit, seed)


def split_train_validation(
    labels: np.ndarray, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a stratified share of the images for validation.

    At least as many images are held out as there are classes, which stratifying needs. A class of
    very few images may still be missing from them; the only image of a class stays in training.

    Args:
        labels: int64 (N,).
        fraction: The share held out, from 0 (none) to below 1.
        seed: The draw.

    Returns:
        Sorted indices to train on, and sorted indices to validate on.

    Raises:
        UserError: a fraction outside 0..1, nothing left to train or to validate on, or a seed
            below 0 or of more than 32 bits.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"validation_fraction: expected 0 to below 1, found {fraction}.")
    everything = np.arange(len(labels))
    if fraction == 0:
        return everything, everything[:0]
    splittable = np.flatnonzero(np.bincount(labels)[labels] >= 2)
    size = max(round(fraction * len(labels)), len(np.unique(labels[splittable])))
    if not 0 < size < len(splittable):
        raise UserError(
            f"data: expected enough images to hold out {fraction:g} of them over all "
            f"classes, found {len(labels)} images of {len(np.unique(labels))} classes."
        )
    validation = splittable[_stratified(labels[splittable], size, seed)]
    return np.setdiff1d(everything, validation), validation
