import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from attack.published.ica import unmixed_features
from attack.solve.ica import fast_ica
from client.victim import share_update
from network.head import features_of
from network.zoo import build_model


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def matched(a, b):
    """Absolute correlations of the rows of a with those of b, matched one to one."""
    correlation = torch.corrcoef(torch.cat([a, b]))[: len(a), len(a) :].abs()
    return correlation[linear_sum_assignment(-correlation.numpy())]


@pytest.mark.parametrize("seed", range(3))
def test_independent_tracks_are_unmixed(seed):
    tracks = torch.randn(5, 4000, generator=generator(seed)).double() ** 3
    mixed = torch.randn(5, 5, generator=generator(seed + 10)).double() @ tracks
    unmixed = fast_ica(mixed, generator()) @ mixed
    assert matched(unmixed, tracks).min() > 0.98
    assert torch.allclose(unmixed.var(1, correction=0), torch.ones(5).double())


class Sparse(nn.Module):
    """Features that are independent and sparse, as ICA wants them: a few of the pixels themselves."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(768, 20)
        with torch.no_grad():
            self.head.weight.uniform_(-0.02, 0.02, generator=generator(3))
            self.head.bias.zero_()

    def forward(self, images):
        return self.head(images.flatten(1) ** 6)


def test_features_that_suit_ica_are_found_with_sign_and_scale():
    model, images = Sparse(), torch.rand(4, 3, 16, 16, generator=generator(1))
    update = share_update(model, "sparse", images, torch.tensor([2, 5, 11, 17]), 20)
    found, true = unmixed_features(update, model, generator=generator(2)), features_of(model, images).double()
    distance = torch.cdist(found, true) / true.norm(dim=1)
    assert distance[linear_sum_assignment(distance.numpy())].max() < 0.25
    assert torch.equal(found, unmixed_features(update, model, generator=generator(2)))


def test_what_cannot_be_unmixed_is_an_error():
    model = build_model("lenet", image_shape=(3, 16, 16), num_classes=3, generator=generator())
    update = share_update(model, "lenet", torch.rand(3, 3, 16, 16), torch.tensor([0, 1, 2]), 3)
    with pytest.raises(ValueError, match="at most 2 tracks"):
        unmixed_features(update, model, generator=generator())
    del update.gradients["head.bias"]
    with pytest.raises(ValueError, match="no gradient of the head"):
        unmixed_features(update, model, generator=generator())
