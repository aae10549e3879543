"""Predicts and attacks one chunk of images: a function of the seed, the chunk and the job alone."""

import time
from collections.abc import Callable, Set
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor

from robust_submission.attacks import (
    EOT,
    NORMS,
    PGD,
    Attack,
    AutoAttack,
    Model,
    UniformNoise,
    WorstCase,
    image_seeds,
    input_gradient,
)
from robust_submission.attacks.base import correct
from robust_submission.attacks.losses import LOSSES, margin
from robust_submission.attacks.trajectory import Trajectory
from robust_submission.data.corruptions import SEVERITIES, Corruption
from robust_submission.evaluation.cache import Arrays
from robust_submission.evaluation.chunks import FittingBatches, ImageChunk
from robust_submission.evaluation.jobs import ADAPTIVE, BLACK_BOX, Attacker, Job
from robust_submission.evaluation.planted import LONGER, QUERIES, PlantedTest, Planter
from robust_submission.evaluation.views import Views
from robust_submission.settings import EvaluationSettings

ATTACK_DRAW = 1_000_000
"""The first of the draws that attackers see; the scored draws start at 0."""
ENOUGH = 4
"""Draws that attackers average over on images whose decision is clear after them."""
CURVE_EOT = 2
"""Draws that attackers average over on the curves."""
NOISES = 5
"""Random points of the ball with which watched PGD is compared."""
SPARED_STEPS = 100
"""Steps of PGD on the images that AutoAttack skips, as many as its APGD makes."""
SMALL_STEP = 1 / 8
"""The step that should raise the loss, in units of epsilon."""


class ChunkEvaluator:
    """Predicts and attacks chunks of images.

    Counts passes: a forward pass of one image, and a backward pass as much.

    Args:
        views: The model and what each attacker differentiates.
        settings: Norm, epsilon, seed and draws.
        fit: Splits batches that do not fit in memory.
        tick: Called with a number of passes whenever they have been made.
        kept: Jobs of which the images that fool the model are returned.
    """

    def __init__(
        self,
        views: Views,
        settings: EvaluationSettings,
        fit: FittingBatches,
        tick: Callable[[int], None] = lambda passes: None,
        kept: Set[Job] = frozenset(),
    ) -> None:
        self.views = views
        self.settings = settings
        self.fit = fit
        self.tick = tick
        self.kept = kept
        self.draws = settings.draws if views.random else 1

    def passes(self, job: Job | None, part: int = 0) -> int:
        """At most about so many passes per image make a part of a job, or a prediction (None)."""
        if job is None:
            return self.draws
        attacks = list(job.attacks(early_stop=False).values())
        scored = 2 * (self.settings.eot if self.views.random else 1) if job.compares else 0
        seen = attacks[part].passes(self.views.num_classes) * self._draws_seen(
            job.attacker, job.few_draws
        )
        return seen + scored + self.draws

    def planted_passes(self, job: Job) -> int:
        """About so many passes per image plant an example and look for it."""
        gradients = LONGER + 1 + self.views.hides
        return QUERIES + (job.steps or 1) * (1 + 2 * gradients)

    def seconds_per_pass(self, images: Tensor) -> float:
        """The time of a pass as the adaptive attacker makes it, measured on a few images (B, …).

        On a GPU, where a few take as long as many, they are repeated to fill a batch.
        """
        device, view = self.views.device, self.views.seen_by[Attacker.ADAPTIVE]
        rows = torch.arange(len(images) if device.type == "cpu" else self.fit.limit) % len(images)

        def work(some: Tensor) -> Tensor:
            batch = images[some].to(device)
            with torch.set_grad_enabled(self.views.differentiable):
                if self.views.differentiable:
                    labels = torch.zeros(len(some), dtype=torch.int64, device=device)
                    return input_gradient(view, batch, labels, margin)[1].cpu()
                return view(batch).cpu()

        start = time.perf_counter()
        FittingBatches(self.fit.limit)(work, rows)
        return (time.perf_counter() - start) / (1 + self.views.differentiable) / len(rows)

    def clean(self, chunk: ImageChunk) -> Arrays:
        """Predict without an attack, and examine the gradients.

        Returns:
            `predictions` int64 (n, draws), -1 for NaN; `twin` int64 (n,), the twin's; of two
            classes `scores` float64 (n, draws), the second's logit minus the first's. If autograd
            can differentiate the model, also `gradient` float64 (n,), L1 norms of the margin's
            gradient, NaN where not finite; `margin` float64 (n,); `rises` bool (n,), whether a
            small step along the gradient raises the margin. `adaptive_gradient` is that of what
            the strongest adaptive attacker sees.
        """
        twin = torch.full((chunk.count,), -1)
        if (model := self.views.seen_by.get(Attacker.TRANSFER)) is not None:
            self._seed(chunk, 0)
            twin = self._predict(model, chunk.images)[0][: chunk.count]
        arrays = {**self._scored(chunk, chunk.images), "twin": twin.numpy()}
        strongest = self.views.strongest
        if self.views.has_gradient(Attacker.OBLIVIOUS):
            arrays |= self._gradients(chunk, Attacker.OBLIVIOUS)
        if self.views.has_gradient(strongest):
            arrays["adaptive_gradient"] = self._gradients(chunk, strongest)["gradient"]
        return arrays

    def corrupted(self, kind: str, chunk: ImageChunk) -> Arrays:
        """Predict the images corrupted by one of `CORRUPTIONS` at each severity, without an attack.

        Returns:
            `predictions` int64 (n, severities, draws), -1 for NaN; `scores` of two classes.
        """
        scored = list[Arrays]()
        for severity in SEVERITIES:
            corruption = Corruption(name=kind, severity=severity)
            seeds = corruption.seeds(self.settings.seed, chunk.indices)
            images = chunk.images.clone()
            images[: chunk.count] = corruption.batch(images[: chunk.count], seeds)
            scored.append(self._scored(chunk, images))
        return {name: np.stack([each[name] for each in scored], axis=1) for name in scored[0]}

    def fixed(self, job: Job, chunk: ImageChunk) -> Arrays:
        """Attack and score a random model that makes the same draw in every call.

        Its own stages draw by the image's seed alone, not by its pixels. The global generators are
        seeded anew before each call; where they fill a tensor of the whole batch, the noise of an
        image depends on its place there, so that it is attacked and scored in one batch.

        Args:
            job: PGD.
            chunk: The images.

        Returns:
            `robust` bool (n,): which are correct both before the attack and after it.
        """
        (attack,) = job.attacks(early_stop=False).values()
        seen = self._held(chunk, self.views.seen_by[job.attacker])
        model = self._held(chunk, self.views.model)

        def robust(rows: Tensor) -> Tensor:
            images, labels = chunk.images[rows], chunk.labels[rows]
            seeds = image_seeds(self.settings.seed, chunk.indices[rows.numpy()])
            with self.views.held(seeds.to(self.views.device)):
                right = _is_correct(model, images, labels)
                found = attack(seen, images, labels, seeds=seeds)
                return (right & _is_correct(model, found, labels)).cpu()

        return {"robust": self.fit(robust, torch.arange(chunk.count)).numpy()}

    def watched(self, job: Job, limit: int, chunk: ImageChunk) -> Arrays:
        """Watch PGD, which continues after it fools, and compare it with noise.

        Args:
            job: PGD.
            limit: How many of all images, from the first on, the job is for.
            chunk: The images.

        Returns:
            float64 (n,) each: `fooled`, whether the first point that fools the attacker's view, or
            the last, fools the model; `unstable`, whether one of `NOISES` random points does;
            `silent`, `rise` and `cosine` as in `Trajectory`; `view_only`, whether a point fools the
            view and `fooled` is false.
        """
        seen, model = self._seen_by(job.attacker, job.few_draws), self.views.model
        if self.views.random:
            model = self._averaged(model, self.settings.eot)
        noise = UniformNoise(norm=job.norm, epsilon=job.epsilon)
        options: dict[str, Any] = {"norm": job.norm, "epsilon": job.epsilon, "steps": job.steps}

        def examine(rows: Tensor) -> Tensor:
            images, labels = chunk.images[rows], chunk.labels[rows]
            seeds = image_seeds(self.settings.seed, chunk.indices[rows.numpy()])
            path = Trajectory(labels, LOSSES[job.loss])
            last = PGD(**options, loss=job.loss, observe=path)(seen, images, labels, seeds=seeds)
            with torch.no_grad():
                path.end(last, seen(last).float())
            right = _is_correct(model, path.first, labels) & _is_correct(model, last, labels)
            stable = torch.ones_like(right)
            for k in range(1, 1 + NOISES):
                points = noise(seen, images, labels, seeds=seeds ^ k)
                stable &= _is_correct(model, points, labels)
            flags = (~right, ~stable, path.silent, path.fooled & right)
            return torch.stack([*(f.double() for f in flags), path.rise, path.cosine], dim=1).cpu()

        self._seed(chunk, 0)
        count = int((chunk.rows < limit).sum())
        names = ("fooled", "unstable", "silent", "view_only", "rise", "cosine")
        found = self.fit(examine, torch.arange(count)).numpy()
        return dict(zip(names, found.T, strict=True))

    def _held(self, chunk: ImageChunk, model: Model) -> Model:
        def call(images: Tensor) -> Tensor:
            self.views.set_draw(0)
            self._seed(chunk, 1)
            return model(images)

        return self._counted(call)

    def planted(self, job: Job, chunk: ImageChunk) -> Arrays:
        """Plant an adversarial example in the ball around each image, and look for it.

        A random model makes the same draw in every call.

        Args:
            job: PGD of the strongest adaptive attacker.
            chunk: The images.

        Returns:
            bool (n,) each: `planted`, whether there is one; and who found it: `adaptive` (the job),
            `oblivious` (PGD too), `fgsm` (adaptive) and `random`, as many random points as PGD has
            steps.
        """
        views = self.views
        deployed, seen = (
            replace(
                readout,
                model=self._held(chunk, readout.model)
                if views.random
                else self._counted(readout.model),
            )
            for readout in (views.readouts[Attacker.OBLIVIOUS], views.readouts[job.attacker])
        )
        jobs = {"adaptive": (seen, job), "fgsm": (seen, replace(job, attack="fgsm", steps=None))}
        if views.hides and views.has_gradient(Attacker.OBLIVIOUS):
            loss = views.loss(Attacker.OBLIVIOUS)
            jobs["oblivious"] = deployed, replace(job, attacker=Attacker.OBLIVIOUS, loss=loss)
        attacks = {
            name: (sees, one.attacks(early_stop=False)[one.attack])
            for name, (sees, one) in jobs.items()
        }
        planter = Planter(
            deployed=deployed,
            seen=seen,
            norm=job.norm,
            epsilon=job.epsilon,
            steps=job.steps or 1,
        )
        test = PlantedTest(planter, attacks)

        def found(rows: Tensor) -> Tensor:
            seeds = image_seeds(self.settings.seed, chunk.indices[rows.numpy()])
            with views.held(seeds.to(views.device)):
                return test.run(chunk.images[rows], seeds)

        columns = self.fit(found, torch.arange(chunk.count)).numpy().T
        arrays = dict(zip(test.names, columns, strict=True))
        same = np.zeros(chunk.count, dtype=bool) if views.hides else arrays["adaptive"]
        return {"oblivious": same} | arrays

    def attacked(
        self, job: Job, chunk: ImageChunk, right: np.ndarray, shown: np.ndarray, part: int = 0
    ) -> Arrays:
        """Attack the images that are correct when clean; the others stay unchanged.

        Args:
            job: The attack.
            chunk: The images.
            right: bool (count,), which images are correct when clean; shorter if the job is for
                the first images only.
            shown: Places of the images whose pictures are kept.
            part: Which of the job's parts to run, as `Job.attacks` lists them.

        Returns:
            `predictions` int64 (n, draws), -1 for NaN; `distance` float64 (n,) in the job's norm;
            `fooled` bool (n,) and `loss` float32 (n,), zeros unless the job `compares` (see
            `WorstCase`); `pictures` uint8 (shown, H, W, 3). Of a kept job also `images` float32
            (k, 3, H, W): those of `right` that fool the model in its first draw.
        """
        count = len(right)
        rows = torch.from_numpy(right).nonzero().squeeze(1)
        found = chunk.images.clone()
        fooled, losses = torch.zeros(count, dtype=torch.bool), torch.zeros(count)
        if len(rows):
            attacks = list(job.attacks(early_stop=self.views.stops_early(job.attacker)).values())

            def attack(some: Tensor) -> Tensor:
                images, fooled[some], losses[some] = self._attack(job, attacks[part], chunk, some)
                return images

            self._seed(chunk, 0)
            found[rows] = self.fit(attack, rows)
        moved = (found - chunk.images)[:count]
        pictures = (255 * found[torch.from_numpy(shown)].permute(0, 2, 3, 1)).round()
        predictions = self._scored(chunk, found, job.few_draws)["predictions"][:count]
        images = dict[str, np.ndarray]()
        if job in self.kept:
            fooling = right & (predictions[:, 0] != chunk.labels[:count].cpu().numpy())
            images["images"] = found[:count][torch.from_numpy(fooling)].cpu().numpy()
        return images | {
            "predictions": predictions,
            "distance": NORMS[job.norm].size(moved).double().cpu().numpy(),
            "fooled": fooled.numpy(),
            "loss": losses.numpy(),
            "pictures": pictures.to(torch.uint8).cpu().numpy(),
        }

    def _attack(
        self, job: Job, attack: Attack, chunk: ImageChunk, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Adversarial images (B, 3, H, W), whether each fooled the model, and its cross-entropy.

        The last two, (B,), on the CPU, are zeros unless the job `compares`.
        """
        seen = self._seen_by(job.attacker, job.few_draws)
        images, labels = chunk.images[rows], chunk.labels[rows]
        seeds = image_seeds(self.settings.seed, chunk.indices[rows.numpy()])
        model = self._counted(self.views.model)
        if self.views.random:
            model = self._averaged(self.views.model, self.settings.eot)
        if job.compares:
            result = WorstCase(attacks={"fooled": attack}).run(
                seen, images, labels, seeds=seeds, scored_on=model
            )
            found, losses = result.images, result.losses.cpu()
            fooled = torch.tensor([name == "fooled" for name in result.fooled_by])
        else:
            found, losses = attack(seen, images, labels, seeds=seeds), torch.zeros(len(rows))
            fooled = losses.bool()
        if self.views.random and isinstance(attack, AutoAttack) and job.attack not in BLACK_BOX:
            # It skips images that its view gets wrong; a scored draw may get them right.
            spared = ~(_is_correct(seen, images, labels) & _is_correct(model, images, labels)).cpu()
            if spared.any():
                images, labels, seeds = images[spared], labels[spared], seeds[spared]
                other = PGD(norm=job.norm, epsilon=job.epsilon, steps=SPARED_STEPS, loss="margin")
                found[spared] = other(seen, images, labels, seeds=seeds)
                fooled[spared] = job.compares & ~_is_correct(model, found[spared], labels).cpu()
        return found, fooled, losses

    def _seen_by(self, attacker: Attacker, few_draws: bool = False) -> Model:
        """What an attacker differentiates; of a random model the average over draws."""
        view = self.views.seen_by[attacker]
        if not self.views.random or attacker == Attacker.TRANSFER:
            return self._counted(view)
        return self._averaged(view, self._draws_seen(attacker, few_draws))

    def _draws_seen(self, attacker: Attacker, few_draws: bool) -> int:
        if not self.views.random or attacker not in ADAPTIVE:
            return 1
        return min(CURVE_EOT, self.settings.eot) if few_draws else self.settings.eot

    def _counted(self, model: Model) -> Model:
        """The same model, whose calls tick."""

        def call(images: Tensor) -> Tensor:
            outputs = model(images)
            backward = torch.is_grad_enabled() and images.requires_grad
            self.tick(len(images) * (2 if backward else 1))
            return outputs

        return call

    def _averaged(self, model: Model, draws: int) -> Model:
        seen = range(ATTACK_DRAW, ATTACK_DRAW + draws)
        return EOT(self._counted(model), seen, self.views.set_draw, enough=ENOUGH)

    def _scored(self, chunk: ImageChunk, images: Tensor, one_draw: bool = False) -> Arrays:
        """(count, draws) each: `predictions` of the deployed model, int64, always in the one batch
        shape; and of two classes `scores`."""
        predictions, scores = list[Tensor](), list[Tensor]()
        for draw in range(1 if one_draw else self.draws):
            self.views.set_draw(draw)
            self._seed(chunk, 1 + draw)
            predicted, score = self._predict(self.views.model, images)
            predictions.append(predicted[: chunk.count])
            scores.append(score[: chunk.count])
        arrays = {"predictions": torch.stack(predictions, dim=1).numpy()}
        if self.views.num_classes == 2:
            arrays["scores"] = torch.stack(scores, dim=1).numpy()
        return arrays

    def _predict(self, model: Model, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) each: the predictions, -1 for NaN, and by how much the second of two logits is
        larger."""

        def predict(rows: Tensor) -> Tensor:
            with torch.no_grad():
                logits = self._counted(model)(images[rows]).float()
            predictions = logits.argmax(dim=1)
            predictions = torch.where(correct(logits, predictions), predictions, -1)
            first, last = logits[:, [0, -1]].cpu().double().T
            return torch.stack([predictions.cpu().double(), last - first], dim=1)

        predictions, scores = self.fit(predict, torch.arange(len(images))).T
        return predictions.long(), scores

    def _gradients(self, chunk: ImageChunk, attacker: Attacker) -> Arrays:
        norm, epsilon = NORMS[self.settings.norm], self.settings.epsilon[0]
        seen = self._seen_by(attacker)

        def examine(rows: Tensor) -> Tensor:
            images, labels = chunk.images[rows], chunk.labels[rows]
            with torch.enable_grad():
                gradient, logits = input_gradient(seen, images, labels, margin)
            points = images + SMALL_STEP * epsilon * norm.direction(gradient.nan_to_num(), images)
            with torch.no_grad():
                moved = margin(seen(norm.project(points, images, epsilon)).float(), labels)
            size = gradient.double().flatten(1).abs().sum(dim=1)
            before = margin(logits, labels)
            return torch.stack([size, before.double(), (moved > before).double()], dim=1).cpu()

        self._seed(chunk, 0)
        size, before, rises = self.fit(examine, torch.arange(chunk.count)).numpy().T
        size = np.where(np.isfinite(size), size, np.nan)
        return {"gradient": size, "margin": before, "rises": rises > 0}

    def _seed(self, chunk: ImageChunk, purpose: int) -> None:
        """Seed the global generators, for models that draw from them."""
        entropy = [self.settings.seed, chunk.number, purpose]
        set_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


def _is_correct(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    """(B,) bool."""
    with torch.no_grad():
        return correct(model(images).float(), labels)
