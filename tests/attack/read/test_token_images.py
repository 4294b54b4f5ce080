"""Pixels and tokens of a transformer's images that are nearly known."""

import copy
from pathlib import Path

import pytest
import torch
import transformers

from attack.read.token_images import TokenImages
from attack.read.token_slots import SlottedTokens, TokenSpace
from attack.read.token_span import TokenSpan
from attack.solve.budget import unlimited
from client.victim import share_update
from data import load_batch, open_source
from network.embedding import patch_embedding
from network.perceptrons import perceptrons
from network.zoo import build_model
from update.training import FEDSGD

MODEL, SHAPE = f"{Path(transformers.__file__)}:roomy", (3, 16, 16)


class Client:
    """Two images of a transformer with room for their tokens, and the row spaces of what their client sends."""

    def __init__(self):
        net = build_model(MODEL, image_shape=SHAPE, num_classes=10, generator=torch.Generator().manual_seed(1))
        draw = {"num_classes": 10, "generator": torch.Generator().manual_seed(0), "image_size": 16}
        batch = load_batch(open_source("sample", None), range(5, 7), labels="dataset", **draw)
        pair = (batch.images, batch.labels)
        update = share_update(net, MODEL, *pair, 10, training=FEDSGD, generator=torch.Generator().manual_seed(2))
        exact = copy.deepcopy(net).double().requires_grad_(False)
        self.images, place = batch.images.double(), perceptrons(exact, SHAPE)[0]
        names = (place.first, place.second)
        self.spans = [TokenSpan.of(update.gradients[f"{name}.weight"], 2 * place.tokens) for name in names]
        known = (place, self.spans, patch_embedding(net, SHAPE), SHAPE, unlimited())
        self.pictures, self.space = TokenImages(exact, *known), TokenSpace(place, *self.spans)
        self.tokens = place.inputs(exact, self.images).flatten(0, 1).detach()


@pytest.fixture(scope="module")
def client():
    return Client()


def test_a_picture_that_lacks_a_patch_follows_from_its_tokens_spaces(client):
    truth = client.images[1:]
    found = truth.clone()
    found[:, :, 8:12, 8:12] = 0.5
    begun = (found - truth).square().mean()
    found = client.pictures.by_all(found, 0.03)
    assert (found - truth).square().mean() < 0.3 * begun
    assert (client.pictures.fits(found, 0.003) < 2).sum() >= 15  # of 16


@pytest.mark.long
def test_a_picture_of_other_images_is_not_explained(client):
    others = client.images.flip(3)
    for bluntness in (0.03, 0.01):
        others = client.pictures.by_all(others, bluntness)
    assert (client.pictures.fits(others, 0.003) > 2).double().mean() > 0.5


def test_tokens_that_are_missing_are_found_beside_the_others(client):
    tokens = SlottedTokens(client.space, len(client.tokens), unlimited())
    missing = torch.tensor([3, 17, 30])
    slots = torch.tensor([n for n in range(len(client.tokens)) if n not in missing])
    tokens.put(slots, client.tokens[slots] @ client.space.basis, torch.ones(len(slots), dtype=torch.float64))
    tokens.search_beside(torch.Generator().manual_seed(0))
    found = client.space.tokens(tokens.values)
    apart = torch.cdist(client.tokens[missing], found).min(1).values / client.tokens[missing].norm(dim=1)
    assert apart.max() < 0.02
    assert len(found) == len(client.tokens)


def test_a_token_that_is_put_again_is_kept_once(client):
    tokens, slots = SlottedTokens(client.space, len(client.tokens), unlimited()), torch.arange(4)
    for _ in range(2):
        tokens.put(slots, client.tokens[slots] @ client.space.basis, torch.ones(4, dtype=torch.float64))
    assert len(tokens.values) == 4
    assert torch.allclose(tokens.tokens(slots), client.tokens[slots], atol=1e-3)


def test_a_token_that_is_put_elsewhere_leaves_the_slot_it_was_in(client):
    tokens, one = SlottedTokens(client.space, len(client.tokens), unlimited()), torch.ones(1, dtype=torch.float64)
    for slot in (3, 20):
        tokens.put(torch.tensor([slot]), client.tokens[20:21] @ client.space.basis, one)
    assert tokens.filled.nonzero().tolist() == [[20]]
