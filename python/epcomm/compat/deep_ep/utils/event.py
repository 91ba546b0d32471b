"""Events of `deep_ep`: `EventHandle` and `EventOverlap`, over `epcomm.Event`."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import torch

from ....events import Event

__all__ = ["EventHandle", "EventOverlap"]


class EventHandle:
    """An event on the current stream; complete at once in a process that has not used a GPU."""

    def __init__(self) -> None:
        cuda_event = None
        if torch.cuda.is_initialized():
            cuda_event = torch.cuda.Event()
            cuda_event.record()
        self._event = Event(cuda_event)

    @classmethod
    def of(cls, event: Event) -> EventHandle:
        """The handle of an event of epcomm. Not part of deep_ep's surface."""
        handle = cls.__new__(cls)
        handle._event = event
        return handle

    @property
    def epcomm_event(self) -> Event:
        """What epcomm's calls take as `previous_event`. Not part of deep_ep's surface."""
        return self._event

    def current_stream_wait(self) -> None:
        """Orders later work of the current stream after the event. No host wait."""
        self._event.wait()


class EventOverlap:
    """What a call returns to order work after it; also usable in `with`, which waits at its end.

    Attributes:
        event: the `EventHandle`, or None if the call was synchronous: then nothing needs to wait.
        extra_tensors: kept alive as long as this object.
    """

    def __init__(
        self,
        event: EventHandle | None = None,
        extra_tensors: tuple[torch.Tensor, ...] | None = None,
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self._hooks: list[Callable[[], None]] = []
        self._release_handle = False

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Orders later work of the current stream after the event, if there is one.

        release_handle: forgets the event and the extra tensors after it.
        """
        if self.event is not None:
            self.event.current_stream_wait()
        hooks, self._hooks = self._hooks, []
        for hook in hooks:
            hook()
        if release_handle:
            self.event = None
            self.extra_tensors = None

    def register_hook_after_wait(self, hook: Callable[[], None]) -> None:
        """hook() is called once, after the next wait."""
        self._hooks.append(hook)

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        """For `with event(release_handle=True):`."""
        self._release_handle = release_handle
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.event is not None:
            self.current_stream_wait(self._release_handle)


def capture() -> EventOverlap:
    """An event on the current stream, for `previous_event`."""
    return EventOverlap(EventHandle())


def result_event(event: Event | None) -> EventOverlap:
    """What a call returns: event is None where it was synchronous."""
    return EventOverlap(None if event is None else EventHandle.of(event))


def epcomm_event(event: EventOverlap | EventHandle | None) -> Event | None:
    """A caller's previous_event in the form that epcomm takes."""
    handle = event.event if isinstance(event, EventOverlap) else event
    return None if handle is None else handle.epcomm_event
