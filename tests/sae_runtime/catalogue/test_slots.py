"""The slots against sorting all candidates."""

import numpy as np

from sae_runtime.catalogue.random_keys import random_bits, random_keys
from sae_runtime.catalogue.slots import Slots


def test_the_highest_priorities_stay_in_whatever_order_they_come() -> None:
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 7, 500)
    rows[rows == 3] = 2  # a row without candidates
    priority = generator.permutation(500).astype(np.float32) + 1
    slots = Slots(7, 4, {"number": (np.int64, ()), "pair": (np.uint8, (2,))})
    for chunk in np.array_split(generator.permutation(500), 9):
        slots.offer(
            rows[chunk],
            priority[chunk],
            lambda c, chunk=chunk: {
                "number": chunk[c],
                "pair": np.stack([chunk[c] % 200, chunk[c] % 100], axis=1),
            },
        )
    for row in range(7):
        of_row = np.flatnonzero(rows == row)
        expected = of_row[np.argsort(-priority[of_row])][:4]
        used = slots.priority[row] > 0
        assert slots.columns["number"][row][used].tolist() == expected.tolist()
        assert slots.columns["pair"][row][used].tolist() == [[n % 200, n % 100] for n in expected]
        assert slots.priority[row][used].tolist() == priority[expected].tolist()


def test_random_keys_are_uniform_and_belong_to_their_numbers() -> None:
    keys = random_keys(5, "test", np.arange(100_000), 3)
    assert (keys > 0).all()
    assert (keys <= 1).all()
    counts = np.histogram(keys, 50, (0, 1))[0]
    assert ((counts - 2_000) ** 2 / 2_000).sum() < 90  # chi-square of 49 degrees of freedom, p = 3e-4
    assert abs(np.corrcoef(keys[:-1], keys[1:])[0, 1]) < 0.02
    assert (random_keys(5, "test", np.array([70, 7]), np.array([3, 3])) == keys[[70, 7]]).all()
    others = [random_keys(6, "test", np.arange(9), 3), random_keys(5, "tests", np.arange(9), 3)]
    assert all((other != keys[:9]).any() for other in others)
    assert len(set(random_bits(0, "", np.arange(10_000)).tolist())) == 10_000
