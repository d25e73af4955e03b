import pytest

from brqat.grid import SIGN_GRID, Grid, uniform_grid


@pytest.mark.parametrize(
    "bits, signed, expected",
    [
        (2, True, (-2, 1)),
        (4, True, (-8, 7)),
        (8, True, (-128, 127)),
        (1, False, (0, 1)),
        (2, False, (0, 3)),
        (8, False, (0, 255)),
    ],
)
def test_codes_of_the_paper(bits, signed, expected):
    grid = uniform_grid(bits, signed)
    assert grid == Grid(*expected) == expected
    assert grid.num_levels == 2**bits == len(grid.codes)


def test_sign_grid_has_no_zero():
    assert list(SIGN_GRID.codes) == [-1, 1]
    assert SIGN_GRID.num_levels == 2


def test_one_signed_bit_is_refused_with_advice():
    with pytest.raises(ValueError, match="quantizer=sign"):
        uniform_grid(1, signed=True)


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5, "2", True])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match="whole number from 1 to 8"):
        uniform_grid(bits, signed=False)
