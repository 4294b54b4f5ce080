"""All images of a head whose features have no zeros, by several methods, the likeliest first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from attack.read.head.by_random_images import recover_signals
from attack.read.head.by_trial import unmix_head
from attack.read.random_images import SAMPLE, random_features, varies
from attack.read.signals import Signals
from attack.read.span import Span
from attack.solve.budget import OutOfTimeError, WorkBudget
from network.head import Head, feature_range
from network.kinds import UNKNOWN, Kind
from network.work import multiplications
from update.shared import SharedUpdate

QUICK = 2e11  # multiplications that random images may take where other methods have failed: about ten seconds of a core

Method = Callable[[], Signals]


@dataclass(frozen=True)
class WholeHead:
    """A head's gradient, for all images of the batch together.

    Args:
        update: the client's.
        model: that the update was computed on.
        head: the model's last layer, in float64.
        span: of the head's gradient.
        generator: what starts and random images are drawn from (on the CPU).
        budget: of work and time.
    """

    update: SharedUpdate
    model: nn.Module
    head: nn.Linear
    span: Span
    generator: torch.Generator
    budget: WorkBudget

    def told_apart(self, inputs: Kind, peeled: Method) -> Signals:
        """What the first method finds that finds all images, or else the one that finds most.

        Args:
            inputs: the kind of activation that the features come out of; unknown where something hides the kind.
            peeled: takes out one image after the other.

        Raises:
            ValueError: no method can be tried; the last one's reason.
            OutOfTimeError: the budget's clock has run out before any image was found.
        """
        methods, best = self._methods(inputs, peeled), None
        for method in methods:
            try:
                found = method()
            except ValueError as error:
                if best is None and method is methods[-1]:
                    raise ValueError(str(error)) from None
                continue
            except OutOfTimeError:
                if best is None:
                    raise
                break
            if best is None or len(found) > len(best):
                best = found
            if best.complete:
                break
        return best

    def _methods(self, inputs: Kind, peeled: Method) -> Sequence[Method]:
        """The likeliest method first.

        Behind a smooth activation random images resemble the batch, unless the network is trained. Where the kind of
        the features is hidden, as behind a part of the model that is only run, trial is surest and costs least: heads
        of a small vision transformer of 10, 20, 100 and 1,000 classes were told apart up to B = 9, 16, 16 and 8 at
        least. Peeling gave 4, 8, 16 and 24 images there, the last in a minute. So random images are last, and only if
        they are quick.
        """
        if inputs.is_smooth:
            features = random_features(self.model, self.update.image_shape, SAMPLE, self.generator)
            logits = self.head(features.to(self.head.weight))
            both = [self._by_random_images, self._by_trial]
            return both[::-1] if varies(logits.softmax(1)) else both
        first = [self._by_trial, peeled] if inputs is UNKNOWN else [peeled, self._by_trial]
        is_quick = SAMPLE * multiplications(self.model, self.update.image_shape) < QUICK
        return [*first, self._by_random_images] if is_quick else first

    def _by_random_images(self) -> Signals:
        return recover_signals(self.update, self.model, generator=self.generator, budget=self.budget)

    def _by_trial(self) -> Signals:
        gradient, bias_gradient = Head.of(self.model).among(self.update.gradients)
        weight, bias = self.head.weight, self.head.bias
        return unmix_head(
            self.span,
            weight,
            weight.new_zeros(len(weight)) if bias is None else bias,
            gradient,
            bias_gradient,
            loss=self.update.training.loss,
            non_negative=feature_range(self.model)[0] >= 0,
            generator=self.generator,
            budget=self.budget,
        )
