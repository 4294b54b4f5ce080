"""The walk through stages that join channels, take them apart, and put them in another order."""

import pytest
import torch
from passes import generator, sample_images
from torch import nn

from attack.read.reader import read_layers
from client.victim import share_update
from network.stage import run
from network.tracing import stages


class Dense(nn.Module):
    """Two dense layers: each takes all that is before it, and adds channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.one, self.two = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(24, 12, 3, padding=1)
        self.down = nn.Conv2d(36, 64, 3, stride=2, padding=1)
        self.fc = nn.Linear(64 * 16, 10)

    def forward(self, x):
        features = [self.stem(x).relu()]
        for layer in (self.one, self.two):
            features.append(layer(torch.cat(features, 1)).relu())
        return self.fc(self.down(torch.cat(features, 1)).relu().flatten(1))


class Shuffled(nn.Module):
    """Half of the channels pass a layer; then halves are shuffled, as in ShuffleNet."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        self.one = nn.Conv2d(12, 12, 3, padding=1)
        self.down = nn.Conv2d(24, 64, 3, stride=2, padding=1)
        self.fc = nn.Linear(64 * 16, 10)

    def forward(self, x):
        first, second = self.stem(x).relu().chunk(2, dim=1)
        x = torch.cat((first, self.one(second).relu()), 1)
        count, channels, height, width = x.shape
        x = x.view(count, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return self.fc(self.down(x.view(count, channels, height, width)).relu().flatten(1))


@pytest.mark.parametrize(("make", "count"), [(Dense, 2), (Shuffled, 1)])
def test_the_walk_leads_through_stages_that_join_channels(make, count):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
    batch = sample_images(range(count))
    update = share_update(model, "own", batch.images, batch.labels, 10)
    reading = read_layers(update, model, generator=generator(3))
    assert len(reading) == count
    notes = {row["layer"]: row["note"] for row in reading.layers}
    assert notes["one"] == "known from above"
    chain = stages(model.double())
    truth = run(chain[: reading.start], batch.images.double()).flatten(1)
    errors, which = torch.cdist(reading.inputs.flatten(1), truth).min(1)
    assert sorted(which.tolist()) == list(range(count))
    assert (errors / truth[which].norm(dim=1)).max() < 1e-3
