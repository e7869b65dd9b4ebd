"""The order in which transfers wait for each other suffices: on streams that run as late as they may, states stay
right."""

from types import SimpleNamespace

import pytest
import torch

from finetrainers.optimizers import host_states
from tests.optimizers.tensors import differing, make_optimizer, make_tensors, take_steps


class LateStream:
    """Does nothing until somebody waits for it, and then in order."""

    def __init__(self):
        self.queue = []

    def run_until(self, event):
        while event in self.queue:
            first = self.queue.pop(0)
            for awaited in first.after:
                awaited.happen()
            for target, source in first.pairs:
                target.copy_(source)

    def synchronize(self):
        if self.queue:
            self.run_until(self.queue[-1])


class LateEvent:
    def __init__(self, stream, pairs, after):
        self.stream, self.pairs, self.after = stream, pairs, after

    def happen(self):
        self.stream.run_until(self)


def late_copy(stream, pairs, *, after):
    event = LateEvent(stream, pairs, [awaited for awaited in after if awaited is not None])
    stream.queue.append(event)
    return event


NOW = SimpleNamespace(happen=lambda: None)


@pytest.fixture
def late(monkeypatch, all_moved):
    """Makes the transfers of an optimizer late."""
    compute = SimpleNamespace(wait_event=lambda event: event.happen(), record_event=lambda: NOW)
    monkeypatch.setattr(host_states, "_copy", late_copy)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)

    def delay(optimizer):
        host = optimizer._host
        host._inward, host._outward = LateStream(), LateStream()
        streams = (host._inward, host._outward)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: [stream.synchronize() for stream in streams])
        return optimizer

    return delay


@pytest.mark.parametrize("way", [{}, {"in_backward": True}], ids=["step", "in_backward"])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon"])
def test_late_transfers_change_no_number(late, name, way):
    plain = make_tensors()
    optimizer = make_optimizer(name, plain)
    take_steps(optimizer, plain, range(8))
    tensors = make_tensors()
    delayed = late(make_optimizer(name, tensors, offload=True, **way))
    take_steps(delayed, tensors, range(8))
    assert differing(plain, tensors) == []
    assert delayed._host._outward.queue, "something is still on its way"
    kept = delayed.state_dict()["state"]
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert not isinstance(value, torch.Tensor) or torch.equal(kept[index][key], value), key


def test_a_tensor_alone_and_a_guess_that_fails(late):
    """One that follows itself, and an order that changes from step to step."""
    for chosen in (["layer.7"], ["layer.0", "layer.1"], list(make_tensors())):
        results = []
        for options in ({}, {"offload": True}):
            tensors = {name: tensor for name, tensor in make_tensors().items() if name in chosen}
            optimizer = make_optimizer("adamw_8bit", tensors, **options)
            if options:
                late(optimizer)
            for step in range(8):
                for name in sorted(tensors, reverse=step % 3 == 0):
                    tensors[name].grad = torch.full_like(tensors[name], 1.0 + step)
                    optimizer.update(tensors[name])
            results.append(tensors)
        assert differing(*results) == []
