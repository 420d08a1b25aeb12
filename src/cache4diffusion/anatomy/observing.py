"""Recording one forward: under fake tensors where the class allows, else with the real ones."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.stateless import _reparametrize_module

from cache4diffusion.anatomy.tape import Recording, Tape
from cache4diffusion.anatomy.tree import LeafPath, replace_arguments
from cache4diffusion.anatomy.undisturbed import CallObserver, undisturbed

Change = Callable[[LeafPath, Tensor], Tensor]


def _same(_: LeafPath, tensor: Tensor) -> Tensor:
    return tensor


@contextlib.contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    """torch logs what fake tensors refuse; here that is an answer, not an error."""
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@dataclass
class Stage:
    """Where forwards are observed: one denoiser, one set of arguments, one way to run.

    Args:
        denoiser: the module, out of any ``torch.compile`` wrapper.
        args, kwargs: arguments of a real call. Never changed; containers among them are copied.
        mode: ``fake`` (nothing is computed), ``fake_state`` (parameters too are faked onto the arguments' device and
            dtype: for offloaded or 8-bit weights), or ``real``.
    """

    denoiser: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mode: str = "fake"
    _fake: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))

    def record(self, change: Change = _same, *, calls_only: bool = False) -> Recording:
        """Run one forward with every tensor argument replaced by ``change(path, tensor)`` and return its tape.

        ``calls_only``: note module calls and the shapes they see, not the operations.
        """
        tape = Tape()

        def observer(path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = tape.enter(path, args, kwargs)
            result = forward(*args, **kwargs)
            tape.leave(call, result, args, kwargs)
            return result

        with self.active(observer):
            args, kwargs = self.arguments(change)
            with contextlib.nullcontext() if calls_only else tape:
                self.denoiser(*args, **kwargs)
        return tape.recording

    def arguments(self, change: Change = _same) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments for one forward; only inside `active`."""

        def prepare(path: LeafPath, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            leaf = leaf.detach()
            return change(path, leaf if self.mode == "real" else self._fake.from_tensor(leaf, static_shapes=True))

        return replace_arguments(self.args, self.kwargs, prepare)

    @contextlib.contextmanager
    def active(self, observer: CallObserver) -> Iterator[None]:
        """Everything a forward needs to leave no trace."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # the real call will say it again
            stack.enter_context(_silent(logging.getLogger("torch._subclasses.fake_tensor")))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(undisturbed(self.denoiser, observer))
            if self.mode == "fake_state":
                stack.enter_context(_reparametrize_module(self.denoiser, self._fake_state()))
            if self.mode != "real":
                stack.enter_context(self._fake)
            yield

    def _fake_state(self) -> dict[str, Tensor]:
        tensors = [leaf for leaf in [*self.args, *self.kwargs.values()] if isinstance(leaf, Tensor)]
        floats = [tensor for tensor in tensors if tensor.is_floating_point()]
        device = tensors[0].device if tensors else torch.device("cpu")
        dtype = floats[0].dtype if floats else torch.get_default_dtype()
        state = {}
        with self._fake:
            for name, tensor in [*self.denoiser.named_parameters(), *self.denoiser.named_buffers()]:
                is_small_float = tensor.is_floating_point() and tensor.itemsize == 1
                state[name] = torch.empty(tensor.shape, dtype=dtype if is_small_float else tensor.dtype, device=device)
        return state
