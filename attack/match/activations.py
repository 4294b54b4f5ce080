"""From the deepest known layer to the pixels: known activations, and the gradients below them with known delta.

For every image the inputs a of one layer are known, and delta, the derivative of the image's loss by these inputs. The
layers above are not run any more, and only the gradients of the layers below mix the images:

    L(x) = |f(x)|^2 / |f(grey)|^2 + GRADIENTS sum_layers |G(x) - G|^2 / |G(grey) - G|^2 + weight prior(x)

f compares the inputs z(x) of the activation in front of a. Behind a ReLU, f is z(x) - a where a is active and
max(0, z(x)) where a is zero; it has no kink where images are right. Behind a sigmoid or tanh, f is z(x) minus the input
that belongs to a, which is nearly linear in x. G(x) is the mean over images of the weights' gradients in the stages
below, delta taken backward through these stages at x. Every term is divided by its value at grey images: most of the
activations and gradients behind sigmoids is the same for all images and says nothing of them (1 % of it is left on an
untrained LeNet).

Kinks of ReLUs and max-pools stop L-BFGS at 20 to 30 dB. The kinks are softened, softplus and logsumexp(beta z) / beta,
and hardened as the prior's weight falls. The stages below the known layer choose the course of both, see `phases`.

Gradients are added only where they are needed and right. They are needed where not many more activations are known than
there are pixels. They are right where no max-pool lies below: the gradient that delta gives through a soft maximum is
far from the client's (ResNet-18 from its `layer1.0`, B=4: 30.0 dB with the stem's gradient, 35.1 without). There the
pool's windows are matched in the end, and delta takes the way of the entries that may be the largest (`maxima`). The
layers between such a pool and the known activations are read from first pictures instead (`attack.again`): matched by
the loop itself, their gradients brought 0.02 dB (the trained ResNet-18, 24 images, known before `layer2.0`). Where
images were used in several passes these windows cannot be matched, and gradients that are not quite right are better
than none (the trained ResNet-18 from its `layer3.1`, four images in two passes: 20.7 dB with them, 18.5 without).
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from attack.match.below import TrainedBelow
from attack.match.entries import Entries
from attack.match.gradients import Matching
from attack.match.maxima import Maxima
from attack.match.phases import (
    ASSIGNED,
    MEASURED_AT,
    UNITS,
    Course,
    Phase,
    is_pooled,
    least_gain_for,
    max_pools,
    phases_for,
)
from attack.match.softening import softened
from attack.match.strided import quickened
from network.chain import (
    Moments,
    first_layer,
    input_shapes,
    is_walked,
    mixes_images,
    modules,
    parametrised,
    with_moments,
)
from network.kinds import kind_of
from network.stage import Chain, run
from update.loss import CROSS_ENTROPY, Loss

# The gradients' weight. Gradients mix the images, so they are slow to follow. A tenth of the activations' weight was
# best of 0.03, 0.1 and 1 on a trained ConvNet: 58.5 dB at B=1, where 0.03 gave 54.9 and 1 gave 54.1.
GRADIENTS = 0.1

# The same of the layer in front of a max-pool whose largest entries are assigned (`maxima`). ResNet-18, B=4: 28.7 dB
# with none of it, 34.5 with 0.04, 36.8 with 0.4, 29.5 with 4.
STEM = 0.4

# With so many activations for each pixel, gradients below have nothing to add but time.
PLENTY = 2.0

# Below a max-pool there are no gradients to add, and so few activations for each pixel say too little alone. ResNet-18,
# 224 pixels: the 512 features before `fc` (0.003) leave 9 dB of four images, the inputs of `layer3.1` (0.2) 21.7. Below
# BatchNorm in training mode they hold pictures at a wrong place: a small ResNet, 64 features before the head (0.02),
# ends at 11.6 dB after 600 evaluations, where gradients alone have 21.2, and 19.0 where its statistics are kept.
SCARCE = 0.05

# Lower bound on the prior's weight, over the activations' expected term at the true images: activations are matched no
# better than they are known. With noise on an untrained LeNet 1 to 4 are alike and 10 costs 2 dB; on a trained ConvNet
# 3 to 30 are alike.
NOISE_FLOOR = 3.0

# An entry counts as active from so many times its expected error on. Of inputs that pictures have told, half of the
# inactive entries are a little above zero, and matched as active ones they hold pictures at a wrong place: photographs
# of 224 pixels, inputs of `layer2.1` known to 4.5 %, end first pictures at 17.9 dB, and at 24.5 where doubtful entries
# are compared as outputs of the ReLU (24.3 where these end at 3 times the error).
DEAD = 10.0

# A smooth activation says little of its input where its slope is below FLAT, or below SATURATED times the expected
# error of an entry. FLAT bounds the slope because the expected error is that of the reading, and the walk multiplies
# the error by up to 50 on a trained LeNet. SATURATED is for noise: at 1e-4 an untrained LeNet, B=8, ends at 27.1, 29.2,
# 30.4 and 30.8 dB for 10, 30, 100 and 200.
FLAT = 1e-3
SATURATED = 200.0

# Each term is divided by its error at images of this grey, or by LEAST where that error is smaller.
GREY = 0.5
LEAST = 1e-12

# Skip phases whose activations' loss on grey images, through softened kinks, exceeds this. A loss of 4 is still of use
# to a ResNet's stem, 4.4 drives images of 224 pixels to black. Behind several max-pools no more than the 1 of hard
# kinks is of use: two small convolutions, 32 images, end at 10.1 dB where a loss of 4 is heard, and at 15.0 without it.
DROWNED = 4.25
DROWNED_BEHIND_POOLS = 1.0


def says_enough(chain: Chain, image_shape: Sequence[int], inputs: Tensor) -> bool:
    """Whether known outputs (N, ...) of this chain can take the gradient's place.

    Gradients cannot be added to activations behind a part of the model that is run as a whole: these alone must do.
    """
    if not is_walked(chain):
        return int(inputs.count_nonzero()) >= PLENTY * len(inputs) * math.prod(image_shape)
    tells_little = is_pooled(chain) or mixes_images(modules(chain))
    return not tells_little or int(inputs.count_nonzero()) >= SCARCE * len(inputs) * math.prod(image_shape)


class ForwardLoss:
    """The data's part of L at images (B, C, H, W): two scalars, of the activations and of the gradients.

    Args:
        chain: the model's stages, with parameters in the images' dtype and place, as the client ran them.
        image_shape: (C, H, W).
        start: the stage whose inputs are known.
        inputs: the inputs of that stage, (B, ...).
        labels: (B,) class indices, which give delta.
        gradients: of the update, by parameter name; layers that have none are left out.
        uncertainty: relative error of the inputs, as the reading tells it.
        doubt: their largest relative error, as the way to them tells it. Behind a ReLU entries that may be zero are
            compared as its outputs.
        uses_gradients: whether gradients are matched; None: where they are needed and right, see above.
        observed: what the update's entries say of the gradient, if some were left out. Rounded entries are matched as
            they were sent: by the likelihood of their rounding LeNet has 0.6 dB less, in evaluations of twice the time.
        client_loss: of each image, by which delta is told.
        moments: by which BatchNorm in training mode has normalised the client's batch, where they are known. Without
            gradients the images are then run one by one.
        below: how the stages below were trained, where the inputs are those of a client's several steps.
        uses: the image of each of the inputs, where images were used in several passes.

    The attribute `uncertainty` is the square root of the activations' term at the true images, which the error of the
    inputs leaves. `grey` are the images (B, C, H, W) by whose errors all terms are divided.
    """

    def __init__(
        self,
        chain: Chain,
        image_shape: Sequence[int],
        start: int,
        inputs: Tensor,
        labels: Tensor,
        gradients: Mapping[str, Tensor],
        uncertainty: float = 0.0,
        *,
        doubt: float = 0.0,
        uses_gradients: bool | None = None,
        observed: Entries | None = None,
        client_loss: Loss = CROSS_ENTROPY,
        moments: Moments = MappingProxyType({}),
        below: TrainedBelow | None = None,
        uses: Sequence[int] = (),
    ) -> None:
        self.name, end, self.below = first_layer(chain[start:]), start, below
        while end and kind_of(chain[end - 1].module).is_reshape:
            end -= 1
        activation = chain[end - 1].module if end else None
        before = kind_of(activation).before(activation, inputs)
        self.is_rectified = kind_of(activation).is_rectifier
        entry = inputs.flatten(1).square().mean(1).sqrt().view(-1, *[1] * (inputs.dim() - 1))
        error = max(uncertainty, torch.finfo(inputs.dtype).eps) * entry.expand(inputs.shape)
        is_active = inputs > (DEAD * max(uncertainty, doubt) * entry if self.is_rectified else 0.0)
        delta = below.deltas if below is not None else client_loss.delta(partial(run, chain[start:]), inputs, labels)
        end -= self.is_rectified or before is not None
        shape = (len(inputs), *input_shapes(chain, image_shape)[end])
        self.chain, self.active, self.trust = chain[:end], is_active.reshape(shape), None
        if before is not None:
            inputs, slope = before
            floor = (SATURATED * error).clamp(min=FLAT)
            damped = slope / (slope.square() + floor.square())  # 1 / slope, but near zero where the slope is flat
            delta, error, self.trust = slope * delta, damped * error, (slope * damped).reshape(shape)
        self.inputs, self.delta = inputs.reshape(shape), delta.reshape(shape)
        self.size = self.inputs.square().sum()
        if self.is_rectified:
            self.delta = self.delta * self.active
        if uses_gradients is None:
            pixels = len(set(uses) or inputs) * math.prod(image_shape)
            is_right = not is_pooled(self.chain) or bool(uses)
            uses_gradients = is_right and int(self.active.sum()) < PLENTY * pixels
        faintest = torch.finfo(inputs.dtype).tiny  # errors are divided by a gradient's squares, which must not vanish
        audible = (name for name, sent in gradients.items() if sent.to(inputs).square().sum() > faintest)
        matched = set(audible) if uses_gradients else set()
        layers = [stage for stage in parametrised(self.chain) if f"{stage.name}.weight" in matched]
        self.weights = [stage.module.weight for stage in layers]
        if not (self.weights or below):  # gradients of weights would have to be differentiated twice
            self.chain = quickened(with_moments(self.chain, moments))
        sent = tuple(gradients[f"{stage.name}.weight"].to(inputs) for stage in layers)
        self.entries = Entries(sent) if observed is None or observed.is_whole else replace(observed, sent=sent)
        self.sizes = [q.square().sum() for q in sent]
        self.uses = torch.tensor(uses, device=inputs.device) if uses else None
        self.grey = inputs.new_full((len(set(uses) or inputs), *image_shape), GREY)
        self.units = [max(float(unit.detach()), LEAST) for unit in self._errors(self.grey, self.chain)]
        self.uncertainty = float(error.norm() / self.inputs.norm()) / math.sqrt(self.units[0])

    def __call__(self, images: Tensor, chain: Chain | None = None) -> tuple[Tensor, Tensor]:
        """Squared errors in units of those of grey images, through the loss's own chain or a softened one."""
        errors = self._errors(images, self.chain if chain is None else chain)
        activations, *gradients = (error / unit for error, unit in zip(errors, self.units, strict=True))
        return activations, sum(gradients, torch.zeros_like(activations))

    def differences(self, images: Tensor) -> list[Tensor]:
        """What images (B, C, H, W) leave of the activations, and of each layer's gradient, relative to their sizes.

        Gradients are compared entry by entry: they are to be those of an update that is whole.
        """
        z, own = self._outputs(images, self.chain)
        pairs = zip(own, self.entries.sent, self.sizes, strict=True)
        return [self._off(z) / self.size.sqrt(), *((mine - sent) / size.sqrt() for mine, sent, size in pairs)]

    def alone(self, which: Sequence[int], images: Tensor) -> "ForwardLoss":
        """The same of some images alone; what the others of images (B, C, H, W) put into gradients is taken off these.

        For gradients that are whole, images that are used once and layers that do not mix them.
        """
        rest = [i for i in range(len(images)) if i not in which]
        part, others = self._picked(which), self._picked(rest)
        _, own = others._outputs(images[rest], self.chain)
        pairs = zip(self.entries.sent, own, strict=True)
        sent = tuple((len(images) * both - len(rest) * held.detach()) / len(which) for both, held in pairs)
        part.entries, part.sizes = Entries(sent), [q.square().sum() for q in sent]
        part.units = [max(float(unit.detach()), LEAST) for unit in part._errors(part.grey, self.chain)]
        return part

    def _picked(self, which: Sequence[int]) -> "ForwardLoss":
        """Of some images, gradients left as they are."""
        part, at = copy.copy(self), list(which)
        part.inputs, part.active, part.delta, part.grey = (
            each[at] for each in (self.inputs, self.active, self.delta, self.grey)
        )
        part.trust = None if self.trust is None else self.trust[at]
        part.size = part.inputs.square().sum()
        return part

    def _off(self, z: Tensor) -> Tensor:
        """What outputs of the chain leave of the known activations."""
        off = torch.where(self.active, z, z.relu()) - self.inputs if self.is_rectified else z - self.inputs
        return off if self.trust is None else self.trust * off

    def _errors(self, images: Tensor, chain: Chain) -> list[Tensor]:
        """Squared errors of the activations and of each layer's gradient, each relative to its own size."""
        z, own = self._outputs(images, chain)
        errors = [SumOfSquares.apply(self._off(z)) / self.size]
        if self.weights:
            layers = enumerate(zip(own, self.sizes, strict=True))
            errors += (self.entries.of_one(p, at) / size for at, (p, size) in layers)
        return errors

    def _outputs(self, images: Tensor, chain: Chain) -> tuple[Tensor, Sequence[Tensor]]:
        """The chain's outputs at the images, and the update of the weights that is compared."""
        images = images if self.uses is None else images[self.uses]
        if self.below is not None:
            return self.below.run(chain, images, self.delta, self.weights)
        z = run(chain, images)
        if not self.weights:
            return z, ()
        mean = (z * self.delta).sum() / len(images)
        return z, torch.autograd.grad(mean, self.weights, create_graph=True)


class SumOfSquares(torch.autograd.Function):
    """The sum of an x's squared entries; its derivative 2 x takes one pass over memory, and autograd's own three."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        """A scalar."""
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx: FunctionCtx, slope: Tensor) -> Tensor:
        """The derivative by x."""
        (x,) = ctx.saved_tensors
        return 2 * slope * x


def course_for(
    chain: Chain,
    loss: ForwardLoss,
    prior_weight: float = MEASURED_AT,
    maxima: Maxima | None = None,
    *,
    is_begun: bool = False,
) -> Course:
    """The course for the stages between images and known activations, down to the activations' relative error.

    The course's weights of the prior are the measured weights times `prior_weight` / MEASURED_AT.

    Soft kinks change the activations more from layer to layer: eight layers of VGG multiply the error of grey images by
    a million. Phases in which this change drowns the images' own part are left out; where it drowns it in all phases,
    the last one goes without softening. A course `is_begun` that does not begin with grey images.
    """

    def is_heard(phase: Phase) -> bool:
        activations, _ = loss(loss.grey, softened(loss.chain, phase.hardness, loss.grey))
        return float(activations.detach()) < drowned

    drowned = DROWNED_BEHIND_POOLS if max_pools(chain) > 1 else DROWNED
    scale, phases = prior_weight / MEASURED_AT, phases_for(chain, is_begun=is_begun)
    heard = tuple(filter(is_heard, phases)) or (replace(phases[-1], hardness=math.inf),)
    heard += ASSIGNED if maxima else ()
    return Course(heard, NOISE_FLOOR * loss.uncertainty**2, scale, least_gain_for(chain))


def spectral_power_for(chain: Chain) -> float:
    """The power of image frequencies' scaling (`attack.optimise.pixels`) for the stages below the known activations.

    Activations tell fine detail as well as coarse: with half the power that gradients want, a trained ConvNet at B=4
    ends at 49.7 dB and not at 42.6. Below a max-pool it is the gradients' power.
    """
    return 1.0 if is_pooled(chain) else 0.5


class ForwardMatching:
    """`ForwardLoss` as the attack loop takes it, in units of 1 / `UNITS`, its kinks softened phase by phase.

    In phases with a width the `maxima` of the last max-pool are matched in its place.
    """

    def __init__(self, loss: ForwardLoss, course: Course, maxima: Maxima | None = None) -> None:
        self.loss, self.course, self.maxima = loss, course, maxima
        self._phase, self._chain = -1, loss.chain

    def __repr__(self) -> str:
        known = f"activations before {self.loss.name}"
        return f"forward matching ({known}, gradients of {len(self.loss.weights)} layers)"

    def enter(self, phase: int, images: Tensor) -> None:
        """Soften the kinks as this phase asks; the phase's first images (B, C, H, W) set the scale of each kink.

        Behind the course's last phase they are hard.
        """
        if phase != self._phase:
            hardness = self.course.phases[phase].hardness if phase < len(self.course.phases) else math.inf
            self._phase, self._chain = phase, softened(self.loss.chain, hardness, images)

    def __call__(self, images: Tensor, label_logits: Tensor, subset: Tensor) -> Matching:
        """Evaluate at images (B, C, H, W). Label logits and subset are not used: the labels are known."""
        width = self.course.phases[self._phase].width if 0 <= self._phase < len(self.course.phases) else 0.0
        if self.maxima and width:
            activations, gradients = self.maxima(images, width)
            total = activations + STEM * gradients
        else:
            activations, gradients = self.loss(images, self._chain)
            total = activations + GRADIENTS * gradients
        return Matching(UNITS * total, total, gradients)
