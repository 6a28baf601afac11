import matplotlib
import matplotlib.pyplot as plt
import pytest

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def own_figures():
    """What a test draws is closed behind it: matplotlib warns at 20 figures."""
    yield
    plt.close("all")
