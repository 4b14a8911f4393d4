"""Messages count things in words that fit the number."""

import pytest

from pipeline.runtime.errors import counted


@pytest.mark.parametrize(
    ("number", "words", "text"),
    [
        (0, ["student"], "0 students"),
        (1, ["student"], "1 student"),
        (2, ["test image"], "2 test images"),
        (1_200, ["class"], "1,200 classes"),
        (3, ["batch"], "3 batches"),
        (12, ["epoch"], "12 epochs"),
        (1, ["row is", "rows are"], "1 row is"),
        (5, ["row is", "rows are"], "5 rows are"),
    ],
)
def test_one_thing_is_singular_and_any_other_number_plural(number, words, text):
    assert counted(number, *words) == text
