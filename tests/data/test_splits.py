"""Stratified parts: shares kept, nothing lost, the same for a seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robust_submission.data.sources import split_train_validation, stratified_subset

LABELS = np.repeat(np.arange(4), [40, 80, 20, 60])


def test_every_class_keeps_its_share() -> None:
    train, validation = split_train_validation(LABELS, 0.25, seed=0)
    assert np.bincount(LABELS[validation]).tolist() == [10, 20, 5, 15]
    assert np.array_equal(np.sort(np.concatenate([train, validation])), np.arange(200))
    assert (np.diff(train) > 0).all()
    assert (np.diff(validation) > 0).all()


def test_the_seed_decides() -> None:
    first, again, other = (split_train_validation(LABELS, 0.25, seed)[1] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_fraction_zero_holds_nothing_out() -> None:
    train, validation = split_train_validation(LABELS, 0, seed=0)
    assert (len(train), len(validation)) == (200, 0)


@given(
    counts=st.lists(st.integers(0, 9), min_size=2, max_size=6).filter(lambda n: max(n) >= 4),
    fraction=st.floats(0.01, 0.4),
)
def test_shares_are_kept_to_an_image_and_no_class_leaves_training(
    counts: list[int], fraction: float
) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    train, validation = split_train_validation(labels, fraction, seed=0)
    assert np.array_equal(np.sort(np.concatenate([train, validation])), np.arange(len(labels)))
    assert {label for label, count in enumerate(counts) if count >= 1} == set(labels[train])
    shared = np.array([count if count >= 2 else 0 for count in counts])
    held_out = np.bincount(labels[validation], minlength=len(counts))
    assert (np.abs(held_out - shared * len(validation) / shared.sum()) < 1).all()


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="validation_fraction: expected 0 to below 1"):
        split_train_validation(LABELS, fraction, seed=0)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="found 3 images of 3 classes"):
        split_train_validation(np.arange(3), 0.5, seed=0)


def test_a_limit_keeps_the_shares() -> None:
    subset = stratified_subset(LABELS, 50, seed=0)
    assert np.bincount(LABELS[subset]).tolist() == [10, 20, 5, 15]
    assert (np.diff(subset) > 0).all()
    assert np.array_equal(subset, stratified_subset(LABELS, 50, seed=0))
    assert not np.array_equal(subset, stratified_subset(LABELS, 50, seed=1))


@pytest.mark.parametrize(
    ("limit", "count"), [(None, 200), (200, 200), (999, 200), (199, 199), (1, 1)]
)
def test_any_limit_is_met_exactly(limit: int | None, count: int) -> None:
    assert len(stratified_subset(LABELS, limit, seed=0)) == count


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="limit: expected at least 1 image, found 0"):
        stratified_subset(LABELS, 0, seed=0)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed: expected 0 to 2\*\*32 - 1, found {seed}"):
        stratified_subset(LABELS, 10, seed)
