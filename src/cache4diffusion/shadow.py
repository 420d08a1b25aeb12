"""Put something in front of an attribute of *one instance*, and take it away again without a trace.

No class is ever patched. A shadow lives in the instance's ``__dict__`` under the attribute's own name. While an
object carries shadows it also carries a ``__getstate__`` that leaves them out, so ``copy``, ``deepcopy`` and
``pickle`` of an accelerated object give a plain one that shares nothing with the original.
"""

from __future__ import annotations

from typing import Any

_MISSING = object()
_GETSTATE = "__getstate__"


class _PlainState:
    """``__getstate__`` of a shadowed instance: its state as it would be without our shadows."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.shadows: dict[str, Shadow] = {}  # the newest of each attribute

    def __deepcopy__(self, memo: dict[int, Any]) -> _PlainState:
        return self  # a host that copies an instance's ``__dict__`` and puts it back must put back this very object

    def __call__(self) -> Any:
        plain = type(self.owner).__dict__.get(_GETSTATE) or getattr(type(self.owner), _GETSTATE, None)
        state = plain(self.owner) if plain is not None else self.owner.__dict__
        if not isinstance(state, dict):
            return state
        state = dict(state)
        state.pop(_GETSTATE, None)
        for name, front in self.shadows.items():
            shadow: Shadow | None = front
            while shadow is not None:
                if state.get(name, _MISSING) is shadow.value:
                    del state[name]
                    if shadow.found is not _MISSING and shadow.restore_in_copies:
                        state[name] = shadow.found
                shadow = shadow.behind
        return state


class Shadow:
    """One attribute of one instance, shadowed until `remove`.

    Several may lie in front of one another (two denoisers share a block) and leave in any order.

    Args:
        owner: the instance. Its class is not touched.
        name: attribute to shadow.
        value: what lookups of the attribute now find.
        restore_in_copies: whether copies and pickles get back the instance attribute that was found (if there was
            one). False for ``_compiled_call_impl``, which torch itself never copies.
    """

    def __init__(self, owner: Any, name: str, value: Any, *, restore_in_copies: bool = True) -> None:
        self.owner, self.name, self.value = owner, name, value
        self.restore_in_copies = restore_in_copies
        self.found = owner.__dict__.get(name, _MISSING)
        guard = owner.__dict__.get(_GETSTATE)
        if not isinstance(guard, _PlainState):
            guard = _PlainState(owner)
            owner.__dict__[_GETSTATE] = guard
        self.behind: Shadow | None = guard.shadows.get(name)
        guard.shadows[name] = self
        owner.__dict__[name] = value

    @property
    def is_in_front(self) -> bool:
        """Whether lookups still find this shadow (nobody put something else in front, or took it away)."""
        return self.owner.__dict__.get(self.name, _MISSING) is self.value

    @property
    def is_reached(self) -> bool:
        """Whether lookups come to this shadow: through shadows, and through what says what it was put in front of."""
        guard = self.owner.__dict__.get(_GETSTATE)
        shadow = guard.shadows.get(self.name) if isinstance(guard, _PlainState) else None
        behind: dict[int, Any] = {}  # what each shadow was put in front of
        while shadow is not None:
            behind[id(shadow.value)] = shadow.found
            shadow = shadow.behind
        value, seen = self.owner.__dict__.get(self.name), set()
        while value is not None and value is not self.value and id(value) not in seen:
            seen.add(id(value))
            value = behind[id(value)] if id(value) in behind else getattr(value, "__wrapped__", None)
        return value is self.value

    def remove(self) -> None:
        """Restore what was found, if the shadow is still in front; otherwise leave the newcomer alone.

        A newcomer of ours will restore what this one found.
        """
        if self.is_in_front:
            if self.found is _MISSING:
                del self.owner.__dict__[self.name]
            else:
                self.owner.__dict__[self.name] = self.found
        guard = self.owner.__dict__.get(_GETSTATE)
        if not isinstance(guard, _PlainState):
            return
        newer = guard.shadows.get(self.name)
        if newer is self:
            del guard.shadows[self.name]
            if self.behind is not None:
                guard.shadows[self.name] = self.behind
            elif not guard.shadows:
                del self.owner.__dict__[_GETSTATE]
            return
        while newer is not None and newer.behind is not self:
            newer = newer.behind
        if newer is not None:
            newer.behind = self.behind
            if newer.found is self.value:
                newer.found = self.found
