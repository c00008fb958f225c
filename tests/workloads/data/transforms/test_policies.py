import pytest
import torch

from workloads.data.transforms import policies
from workloads.data.transforms.image import draw
from workloads.data.transforms.photometry import apply
from workloads.data.views import View

PAIRS = [policies.moco_v1, policies.moco_v2, policies.simclr, policies.byol]


@pytest.mark.parametrize("policy", [*PAIRS, policies.dino])
def test_views_differ_and_survive_json(policy):
    looks = policy(32)
    images = torch.arange(3 * 32 * 32).reshape(1, 3, 32, 32).expand(8, -1, -1, -1).byte()
    keys = torch.arange(8)
    results = [apply(look.photometry, images, keys, name) for name, look in looks.items()]
    assert all(not torch.equal(results[0], other) for other in results[1:])
    assert {name: View.model_validate_json(look.model_dump_json()) for name, look in looks.items()} == looks


@pytest.mark.parametrize("policy", PAIRS)
def test_pairs_see_the_same_geometry_at_the_size_asked_for(policy):
    first, second = policy(48).values()
    assert first.model_copy(update={"photometry": None}) == second.model_copy(update={"photometry": None})
    assert first.size == 48 and first.flip == 0.5


def test_only_byols_pair_is_asymmetric():
    for policy in PAIRS:
        first, second = policy().values()
        assert (first == second) == (policy is not policies.byol)
    first, second = policies.byol().values()
    assert (first.photometry.blur_p, first.photometry.solarize_p) == (1.0, 0.0)
    assert (second.photometry.blur_p, second.photometry.solarize_p) == (0.1, 0.2)


def test_simclr_scales_its_colours_by_the_strength():
    full, half = (policies.simclr(strength=s)["view_1"].photometry for s in (1.0, 0.5))
    assert full.jitter == (0.8, 0.8, 0.8, 0.2) and half.jitter == (0.4, 0.4, 0.4, 0.1)
    assert policies.simclr(32, 0.5, blur_p=0.0)["view_1"].photometry.blur_p == 0


def test_dinos_crops_cover_their_shares():
    looks = policies.dino(local_crops=3)
    assert list(looks) == ["global_1", "global_2", "local_1", "local_2", "local_3"]
    size = torch.tensor([[500, 400]]).expand(1000, 2)
    for name, look in looks.items():
        share = draw(look, size, torch.arange(1000), name).crop[:, 2:].prod(dim=1) / (500 * 400)
        low, high = (0.4, 1.0) if name.startswith("global") else (0.05, 0.4)
        assert low - 0.01 < share.min() < share.max() < high + 0.01
        assert look.size == (224 if name.startswith("global") else 96)
    assert len(policies.dino(local_crops=0)) == 2
