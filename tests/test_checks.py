"""Numbers of numpy are numbers, bools and texts are not, and messages say which argument it is."""

import math
from fractions import Fraction

import numpy as np
import pytest

from fasterai.core.checks import number, whole


@pytest.mark.parametrize("value", [2, np.int64(2), np.uint8(2)])
def test_whole_numbers(value):
    assert whole(value, "n", 2) == 2 and type(whole(value, "n", 2)) is int
    with pytest.raises(ValueError, match=r"^n must be a whole number >= 3 or None, got .*2"):
        whole(value, "n", 3, " or None")


@pytest.mark.parametrize("value", [True, np.True_, 2.0, "2", None, math.nan])
def test_what_is_no_whole_number(value):
    with pytest.raises(ValueError, match="n must be a whole number >= 0, got "):
        whole(value, "n", 0)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), Fraction(1, 2)])
def test_numbers(value):
    assert number(value, "x") == 0.5 and type(number(value, "x", most=0.5)) is float
    with pytest.raises(ValueError, match=r"^x must be a number in \[0, 0.25\], got .*"):
        number(value, "x", most=0.25)


@pytest.mark.parametrize("value", [True, np.False_, "1", None, -1, math.nan, math.inf, 1j])
def test_what_is_no_number(value):
    with pytest.raises(ValueError, match="x must be a number >= 0, such as 1e-4, got "):
        number(value, "x", hint=", such as 1e-4")
    assert number(math.inf, "x", most=math.inf) == math.inf
