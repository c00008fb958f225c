"""k-means of a data set batch by batch, no cluster of which stays empty (Qian et al. 2022, arXiv 2105.11527)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LABEL_TEMPERATURE = 0.5  # of the labels of the second stage, code


class OnlineKMeans(nn.Module):
    """One clustering of N instances into K clusters; given the batch of all ranks, it is equal on all of them.

    In each pass the centres M move with the features, while C, those of the pass before, stay for whoever learns from
    them. An instance goes to the cluster of the largest <x, M_k> + rho_k, where the dual rho_k grows as long as the
    cluster gets less than ratio / K of the instances.

    In the second stage centres and labels are averages over passes, and C assigns. `averaged` says, wherever it is
    asked, how many passes of that stage are done; None: the first stage.

    Attributes:
        C: [K, D], centres of the pass before.
        M: [K, D], centres.
        rho: [K], dual variables of the least size.
        count: [K], instances of each cluster in this pass so far.
        sizes: [K], in the last whole pass.
        labels: int64 [N, S], the last labels of each instance; -1 where there is none yet.
        weights: [N, S], their shares.
    """

    C: Tensor
    M: Tensor
    rho: Tensor
    count: Tensor
    sizes: Tensor
    labels: Tensor
    weights: Tensor

    def __init__(self, clusters: int, dim: int, instances: int, *, ratio: float, eta: float, slots: int = 1) -> None:
        """Centres are random.

        Args:
            clusters: K.
            dim: D.
            instances: N.
            ratio: of instances / K that each cluster gets at least; 0: any, 1: exactly so many.
            eta: step of the duals.
            slots: S, labels that are kept of an instance; more than one is for the second stage.
        """
        super().__init__()
        self.ratio, self.eta = ratio, eta
        self.register_buffer("C", F.normalize(torch.randn(clusters, dim), dim=1))
        self.register_buffer("M", self.C.clone())
        for name in ("rho", "count", "sizes"):
            self.register_buffer(name, torch.zeros(clusters))
        self.register_buffer("labels", torch.full((instances, slots), -1))
        self.register_buffer("weights", torch.zeros(instances, slots))

    def targets(self, index: Tensor) -> Tensor:
        """What instances int64 [B] were assigned to, [B, K]: rows sum to 1, or are 0 of what was not assigned yet.

        Labels of several passes have a share of softmax(weights / 0.5) each.
        """
        labels, weights = self.labels[index], self.weights[index]
        kept = weights > 0
        share = (weights / LABEL_TEMPERATURE).exp() * kept
        share = share / share.sum(dim=1, keepdim=True).clamp(min=1)
        return share.new_zeros(len(index), len(self.rho)).scatter_add_(1, labels.clamp(min=0), share)

    def assign(self, x: Tensor, averaged: int | None = None) -> Tensor:
        """Features [B, D] -> the cluster of each, int64 [B]."""
        return (x @ (self.M if averaged is None else self.C).T + self.rho).argmax(dim=1)

    @torch.no_grad()
    def update(self, x: Tensor, index: Tensor, averaged: int | None = None) -> None:
        """Assigns a batch, then moves duals and centres; to be called in `after_step`.

        Args:
            x: [B, D] in float32, about of unit length, of all ranks.
            index: int64 [B], which instances they are.
            averaged: see the class.
        """
        label = self.assign(x, averaged)
        A = x.new_zeros(len(x), len(self.rho)).scatter_(1, label[:, None], 1.0)  # its products add in a fixed order
        n = A.sum(dim=0)
        self.rho += self.eta * (self.ratio / len(n) - n / len(x))
        if self.ratio < 1:  # at 1 a cluster that is too large is pushed away
            self.rho.clamp_(min=0)
        total = self.count + n
        M = (self.count[:, None] * self.M + A.T @ x) / total.clamp(min=1)[:, None]
        if averaged is None:
            M = F.normalize(M, dim=1)
        self.M.copy_(torch.where(n[:, None] > 0, M, self.M))
        self.count.copy_(total)
        self._remember(index, label, 1.0 if averaged is None else 1 / (averaged + 1))

    def _remember(self, index: Tensor, label: Tensor, f: float) -> None:
        """Weights <- (1 - f) weights + f of the new label, in the slot that has it, else in that of least weight."""
        labels, weights = self.labels[index], self.weights[index]  # [B, S]
        same = (labels == label[:, None]) & (weights > 0)
        slot = torch.where(same.any(dim=1), same.int().argmax(dim=1), weights.argmin(dim=1))[:, None]
        new = torch.zeros_like(weights).scatter_(1, slot, 1.0)
        kept = weights * torch.where(same.any(dim=1, keepdim=True), 1.0, 1 - new)
        kept = kept / kept.sum(dim=1, keepdim=True).clamp(min=torch.finfo(kept.dtype).tiny)
        self.weights[index] = (1 - f) * kept + f * new
        self.labels[index] = labels.scatter(1, slot, label[:, None])

    @torch.no_grad()
    def turn(self, averaged: int | None = None) -> None:
        """The pass is over; to be called in `after_epoch`."""
        if averaged is None:
            self.C.copy_(self.M)
        else:
            self.C.copy_(F.normalize(self.C.lerp(F.normalize(self.M, dim=1), 1 / (averaged + 1)), dim=1))
            self.M.copy_(self.C)
        self.sizes.copy_(self.count)
        self.count.zero_()
