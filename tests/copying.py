"""A second device that is only pretended, and copy engines that show when they are used too early."""

import torch

from cache4diffusion.accelerate import attach, choose
from cache4diffusion.copies import Coming, CopyEngine
from cache4diffusion.storage import Storage, Store


class Deferred(CopyEngine):
    """Copies nothing before somebody waits for it; what has not arrived is NaN."""

    def __init__(self, device):
        super().__init__(device)
        self.queue, self.log = [], []

    def offload(self, source, target):
        self.log.append(("offload", target.data_ptr()))
        self.queue.append((target, source, None))

    def prefetch(self, source):
        target = torch.empty_like(source, device=self.device)
        if target.is_floating_point():
            target.fill_(float("nan"))
        ticket = object()
        self.queue.append((target, source, ticket))
        self.log.append(("prefetch", id(ticket)))
        self.bytes += source.numel() * source.element_size()
        return Coming(target, ticket)

    def fetch(self, coming):
        self.log.append(("fetch", id(coming.ticket)))
        while any(ticket is coming.ticket for _, _, ticket in self.queue):
            self._copy()
        return coming.tensor

    def finish(self):
        while self.queue:
            self._copy()

    def _copy(self):
        target, source, _ = self.queue.pop(0)
        target.copy_(source)


class Pretended(Store):
    """A store on a host that is not the denoiser's device, however it looks."""

    def __init__(self, dtype=None, copies=Deferred):
        super().__init__(Storage.of(dtype, "cpu"), copies, pretends=True)


def accelerate(denoiser, name, store, **settings):
    """As `cache4diffusion.accelerate`, with a store of one's own."""
    found = {"denoiser": denoiser}
    choice = choose(denoiser, found, name, {**settings, **store.storage.given})
    return attach(denoiser, found, choice.compositions(found), choice, store=lambda: store)
