import dataclasses

import pytest
import torch
from conftest import CPU, SIGNALS, SMALL, generator, resolved
from hypothesis import given
from hypothesis import strategies as st

import main_MAGIA_sel as magia
from attack import ahead
from attack.prepare import FOLLOWED, START_NOISE, Known, all_labels, start_images
from attack.read.reader import read_layers
from attack.read.signals import Signals
from cli.victim import victim

labels = st.lists(st.integers(0, 5), min_size=1, max_size=8)


def read(*some):
    """Signals of so many images with these labels."""
    label, empty = torch.tensor(some), torch.zeros(len(some))
    values, deltas = torch.zeros(len(some), 4), torch.zeros(len(some), 6)
    return Signals(values, label, deltas, empty, empty, empty, empty, batch_size=len(some))


@given(labels, st.data())
def test_what_was_read_comes_first_and_what_was_granted_follows_once(granted, data):
    found = data.draw(st.lists(st.sampled_from(range(len(granted))), unique=True))
    signals = read(*[granted[i] for i in found])
    known = all_labels(signals, torch.tensor(granted))
    assert known[: len(signals)].tolist() == signals.labels.tolist()
    assert sorted(known.tolist()) == sorted(granted)


def test_labels_of_one_source_alone():
    assert all_labels(None, None) is None
    assert all_labels(read(3, 1), None).tolist() == [3, 1]
    assert all_labels(None, torch.tensor([2, 2])).tolist() == [2, 2]
    assert all_labels(read(5), torch.tensor([0, 1])).tolist() == [5, 0]  # the sources disagree: signals are surer
    assert all_labels(read(2), torch.tensor([0, 2, 2, 1]), (2, 2)).tolist() == [2, 0, 1, 2]  # step by step
    assert all_labels(read(2, 0, 3), torch.tensor([0, 2, 2, 1]), (2, 2)).tolist() == [2, 0, 3, 1]


def test_with_partial_signals_the_other_granted_labels_stay(monkeypatch):
    settings = resolved(*SMALL, *SIGNALS, "--label_strategy", "known", "--labels", "unique")
    update, model, truth = victim(settings, CPU)
    reading = read_layers(update, model, generator=generator())
    whole = reading.signals
    partial = dataclasses.replace(reading, signals=whole.pick(torch.tensor([0])), inputs=reading.inputs[:1])
    monkeypatch.setattr(ahead, "read_layers", lambda *_, **__: partial)
    state, _, known = magia.prepare(update, model, settings, granted=truth.labels)
    assert len(known.signals) == 1
    chosen = state.label_logits[0].argmax(1)
    assert chosen[0] == whole.labels[0]
    assert sorted(chosen.tolist()) == sorted(truth.labels.tolist())


def test_starts():
    shape = (2, 3, 4, 4)
    grey = start_images("grey", shape, 3, generator())
    assert grey.shape == (6, 3, 4, 4)
    assert 0.01 < float((grey - 0.5).abs().mean()) < 0.03
    faint = start_images("grey", shape, 3, generator(), noise=START_NOISE / 100)
    assert torch.allclose(100 * (faint - 0.5), grey - 0.5, atol=1e-5)
    normal = start_images("normal", shape, 1, generator())
    assert (normal == 0).float().mean() > 0.3
    uniform = start_images("uniform", shape, 1, generator())
    assert 0 < uniform.min() < 0.1 < 0.9 < uniform.max() < 1
    given_images = torch.rand(shape)
    assert start_images("photos", shape, 1, generator(), given_images) is given_images
    with pytest.raises(ValueError, match=r"photos: it holds images of shape \(3, 4, 4\).*\(3, 8, 8\)"):
        start_images("photos", (2, 3, 8, 8), 1, generator(), given_images)
    with pytest.raises(ValueError, match="2 restarts"):
        start_images("photos", shape, 2, generator(), given_images)


@pytest.mark.parametrize(("error", "batch_size", "pixels", "followed"), [
    (FOLLOWED / 2, 2, False, True),
    (FOLLOWED * 2, 2, False, False),
    (FOLLOWED * 2, 2, True, True),
    (FOLLOWED / 2, 3, False, False),
])  # fmt: skip
def test_activations_take_the_gradients_place_where_all_are_known_well(error, batch_size, pixels, followed):
    signals = dataclasses.replace(read(0, 1), uncertainty=torch.tensor([0.0, error]))
    inputs = torch.zeros(2, 4)
    known = Known(batch_size, signals, inputs, signals.labels, 1, inputs, pixels=inputs if pixels else None)
    assert known.is_followed == followed
    assert (known.noise < START_NOISE / 100) == followed
    assert not dataclasses.replace(known, says_enough=False, pixels=None).is_followed
    assert known.errors.tolist() == signals.uncertainty.tolist()
