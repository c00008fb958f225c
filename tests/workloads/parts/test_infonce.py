"""InfoNCE by its golden numbers, and over two ranks as over one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from workloads.parts import infonce
from workloads.parts.gather import first_row, gather, shares
from workloads.parts.infonce import global_info_nce, info_nce, masked_info_nce


@pytest.mark.parametrize(("pairs", "expected"), [(2, 0.006715), (4, 0.020012)])
def test_orthonormal_pairs_golden(pairs: int, expected: float) -> None:
    features = torch.eye(pairs, 8)
    assert info_nce(features, features, 0.2).tolist() == pytest.approx([expected] * pairs, abs=1e-6)
    assert global_info_nce(features, features, 0.2).item() == pytest.approx(expected, abs=1e-6)


def test_equal_features_are_a_guess_among_all() -> None:
    assert info_nce(torch.ones(4, 8), torch.ones(4, 8), 0.2).tolist() == pytest.approx([1.386294] * 4, abs=1e-6)


def test_a_query_belongs_to_the_key_at_its_place() -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(3, 5, 8), torch.randn(3, 7, 8)  # three sets, two keys of each are negatives only
    unit_q, unit_k = queries / queries.norm(dim=-1, keepdim=True), keys / keys.norm(dim=-1, keepdim=True)
    similarity = torch.einsum("snd,smd->snm", unit_q, unit_k) / 0.5
    expected = similarity.logsumexp(dim=-1) - similarity.diagonal(dim1=1, dim2=2)
    assert torch.allclose(info_nce(queries, keys, 0.5), expected, atol=1e-6)


def test_lengths_do_not_matter() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(6, 8), torch.randn(6, 8)
    lengths = torch.rand(6, 1) + 0.1
    assert torch.allclose(info_nce(3 * q * lengths, k / lengths, 0.2), info_nce(q, k, 0.2), atol=1e-6)


def test_keys_of_the_global_loss_get_no_gradient() -> None:
    q, k = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    global_info_nce(q, k, 0.2).backward()
    assert q.grad is not None and k.grad is None


@pytest.mark.parametrize("name", ["info_nce", "global_info_nce", "nt_xent"])
def test_similarities_are_of_float32_also_under_autocast(name: str) -> None:
    torch.manual_seed(0)
    q, k = torch.nn.functional.normalize(torch.randn(2, 6, 8), dim=-1)
    loss = getattr(infonce, name)
    expected = loss(q, k, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(q, k, 0.2)
    pairs = zip(expected, found, strict=True) if isinstance(expected, tuple) else [(expected, found)]
    assert all(torch.equal(one, two) and one.dtype == two.dtype for one, two in pairs)


def test_masked_with_one_positive_is_cross_entropy_over_what_is_left() -> None:
    torch.manual_seed(0)
    logits, right = torch.randn(5, 7), torch.tensor([3, 0, 6, 1, 1])
    positive = torch.nn.functional.one_hot(right, 7).bool()
    nothing = torch.zeros_like(positive)
    expected = torch.nn.functional.cross_entropy(logits, right, reduction="none")
    assert torch.allclose(masked_info_nce(logits, positive, nothing), expected, atol=1e-6)
    excluded = nothing.clone()
    excluded[:, 2] = excluded[:, 5] = True  # never the right one
    left = [0, 1, 3, 4, 6]
    places = torch.tensor([left.index(int(place)) for place in right])
    expected = torch.nn.functional.cross_entropy(logits[:, left], places, reduction="none")
    assert torch.allclose(masked_info_nce(logits, positive, excluded), expected, atol=1e-6)


def test_masked_sums_positives_inside_the_log() -> None:
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
    positive = torch.tensor([[True, False, True]])
    excluded = torch.tensor([[False, False, False]])
    assert masked_info_nce(logits, positive, excluded).exp().item() == pytest.approx(2)
    excluded = torch.tensor([[False, False, True]])  # then it is no positive either
    assert masked_info_nce(logits, positive, excluded).exp().item() == pytest.approx(0.7 / 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_masked_rows_without_positives_say_nothing(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3).to(dtype).requires_grad_()
    positive = torch.tensor([[False, False, False], [True, False, False]])
    loss = masked_info_nce(logits, positive, torch.zeros_like(positive))
    loss.sum().backward()
    assert loss[0] == 0 and loss[1] > 0
    assert logits.grad is not None and not logits.grad[0].any() and logits.grad[1].isfinite().all()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 8, generator=generator), torch.randn(6, 8, generator=generator)


COUNTED = torch.tensor([1.0, 0, 1, 0, 0, 1])


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    q, k = (rows.chunk(2)[rank] for rows in batch())
    q = q.clone().requires_grad_()
    loss = global_info_nce(q, k, 0.2)
    loss.backward()
    seen = {"gathered": gather(k), "first": first_row(len(k)), "loss": loss.detach(), "grad": q.grad}
    seen["share"] = shares(COUNTED.chunk(2)[rank])
    torch.save(seen, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_have_the_loss_of_their_common_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    q, k = batch()
    q.requires_grad_()
    loss = global_info_nce(q, k, 0.2)
    loss.backward()
    assert all(torch.equal(each["gathered"], k) for each in ranks)
    assert [each["first"] for each in ranks] == [0, 3]
    assert torch.allclose(torch.cat([each["share"] for each in ranks]) / 2, COUNTED / 3)  # all that count equally
    assert sum(each["loss"] for each in ranks).item() / 2 == pytest.approx(loss.item(), abs=1e-6)
    assert torch.allclose(torch.cat([each["grad"] for each in ranks]) / 2, q.grad, atol=1e-6)
