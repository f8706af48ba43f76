import pytest
import torch

from sae_runtime.model.packed import PackedTokens


def test_rows_lie_one_after_the_other() -> None:
    packed = PackedTokens.from_rows([[5, 6, 7], [8], [9, 9]], past=[0, 4, 2], slots=[2, 0, 5])
    assert packed.ids.tolist() == [5, 6, 7, 8, 9, 9]
    assert packed.positions.tolist() == [0, 1, 2, 4, 2, 3]
    assert packed.row_ends.tolist() == [2, 3, 5]
    assert packed.row_of_token.tolist() == [0, 0, 0, 1, 2, 2]
    assert len(packed) == 6


@pytest.mark.parametrize(
    ("rows", "past", "slots", "message"),
    [
        ([], None, None, "at least one token"),
        ([[1], []], None, None, "at least one token"),
        ([[1]], [3], None, "need cache slots"),
        ([[1]], [1, 2], [0], "past"),
        ([[1]], [-1], [0], "past"),
        ([[1], [2]], None, [1, 1], "different slot"),
        ([[1], [2]], None, [1], "different slot"),
        ([[1], [2]], None, [1, -1], "different slot"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    rows: list[list[int]], past: list[int] | None, slots: list[int] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PackedTokens.from_rows(rows, past=past, slots=slots)


def test_lengths_must_cover_the_ids() -> None:
    with pytest.raises(ValueError, match="sum to 2"):
        PackedTokens(torch.tensor([1, 2, 3]), lengths=(1, 1), past=(0, 0))
    with pytest.raises(ValueError, match="int64"):
        PackedTokens(torch.tensor([1.0]), lengths=(1,), past=(0,))
