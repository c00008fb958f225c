import pytest
from pydantic import ValidationError

from workloads.data.views import View


def test_a_plain_view_draws_nothing():
    assert not View(size=32).draws
    for options in ({"flip": 0.5}, {"rotate_deg": 5}, {"crop_scale": (0.2, 1)}):
        assert View(size=32, **options).draws


@pytest.mark.parametrize(
    "options",
    [
        {"size": 0},
        {"crop_scale": (0.5, 0.2)},
        {"crop_scale": (0, 1)},
        {"crop_scale": (0.5, 1.5)},
        {"crop_ratio": (0, 1)},
        {"crop_ratio": (2, 1)},
        {"std": (0, 1, 1)},
        {"interpolation": "cubic"},
        {"flipp": 0.5},
    ],
)
def test_nonsense_is_refused(options):
    with pytest.raises(ValidationError):
        View(**{"size": 32, **options})
