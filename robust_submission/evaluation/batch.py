"""One job on one chunk of images: a pure function of the seed, the chunk and the job."""

from dataclasses import dataclass

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
    WorstCase,
    image_seeds,
    input_gradient,
)
from robust_submission.attacks.base import correct
from robust_submission.attacks.losses import margin
from robust_submission.data.loader import MicroBatch
from robust_submission.evaluation.cache import Arrays, digest
from robust_submission.evaluation.memory import FittingBatches
from robust_submission.evaluation.plan import Job
from robust_submission.evaluation.schema import Attacker
from robust_submission.evaluation.views import Target

ATTACK_DRAW = 1_000_000
"""The first of the draws that attackers see; those that are scored come from 0 on."""
SPARED_STEPS = 100
"""Of PGD on what AutoAttack spares, as many as its APGD makes."""
SMALL_STEP = 1 / 8
"""The step that is to raise the loss, in units of epsilon."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Images that are always attacked together, padded to one shape."""

    number: int
    rows: np.ndarray
    """(count,), int64: places among all images that are evaluated."""
    images: Tensor
    """(size, 3, H, W), zeros from `count` on."""
    labels: Tensor
    """(size,), int64."""
    indices: np.ndarray
    """(count,), int64: places in the source, which make the seeds."""
    digest: str

    @classmethod
    def of(cls, number: int, rows: np.ndarray, batch: MicroBatch, device: torch.device) -> "Chunk":
        count = batch["count"]
        pixels, labels = batch["images"].numpy(), batch["labels"].numpy()
        return cls(
            number=number,
            rows=rows,
            images=batch["images"].to(device),
            labels=batch["labels"].to(device),
            indices=batch["indices"][:count].numpy(),
            digest=digest([pixels.tobytes(), labels.tobytes()]),
        )

    @property
    def count(self) -> int:
        """Images, without the padding."""
        return len(self.indices)


class Measure:
    """Predicts and attacks.

    Args:
        target: The model and its views.
        ball: Norm and epsilon, an eighth of which is the small step that is to raise the loss.
        seed: Of every draw.
        draws: Draws of a random model that are scored.
        eot: Draws of a random model that an adaptive attack averages over.
        fit: Keeps batches in memory's bounds.
    """

    def __init__(
        self,
        target: Target,
        *,
        ball: tuple[str, float],
        seed: int,
        draws: int,
        eot: int,
        fit: FittingBatches,
    ) -> None:
        self.target = target
        self.ball = ball
        self.seed = seed
        self.draws = draws if target.random else 1
        self.eot = eot
        self.fit = fit

    def clean(self, chunk: Chunk) -> Arrays:
        """Without an attack: predictions, the twin's, and what the gradients look like.

        Returns:
            `predictions` int64 (n, draws), -1 for NaN; `twin` int64 (n,); of a model that autograd
            can differentiate also `gradient` float64 (n,), L1 norms of the margin's gradient, NaN
            where not finite; `margin` float64 (n,); `rises` bool (n,), whether a small step along
            the gradient raises the margin.
        """
        twin = torch.full((chunk.count,), -1)
        if self.target.twin is not None:
            self._seed(chunk, 0)
            twin = self._predict(self.target.twin, chunk.images)[: chunk.count]
        arrays = {"predictions": self._judge(chunk, chunk.images), "twin": twin.numpy()}
        return arrays | (self._gradients(chunk) if self.target.differentiable else {})

    def attacked(
        self, job: Job, chunk: Chunk, right: np.ndarray, shown: np.ndarray, part: int = 0
    ) -> Arrays:
        """Attack the images that are right when clean; the others come back as they were.

        Args:
            job: The attack.
            chunk: The images.
            right: bool (count,), or shorter where the job is for the first images only.
            shown: Places of images to keep for the gallery.
            part: Which of the attacks that make up the job, as `Job.attacks` lists them.

        Returns:
            `predictions` int64 (n, draws), -1 for NaN; `distance` float64 (n,) in the job's norm;
            of a part of several, `fooled` bool (n,) and `loss` float32 (n,) (see
            `WorstCaseResult`), else zeros; `pictures` uint8 (shown, H, W, 3).
        """
        count = len(right)
        rows = torch.from_numpy(right).nonzero().squeeze(1)
        found = chunk.images.clone()
        fooled, losses = torch.zeros(count, dtype=torch.bool), torch.zeros(count)
        if len(rows):
            attacks = job.attacks(early_stop=self.stops_early(job))
            chosen, judged = list(attacks.values())[part], len(attacks) > 1

            def attack(some: Tensor) -> Tensor:
                images, fooled[some], losses[some] = self._attack(job, chosen, judged, chunk, some)
                return images

            self._seed(chunk, 0)
            found[rows] = self.fit(attack, rows)
        moved = (found - chunk.images)[:count]
        pictures = (
            (found[torch.from_numpy(shown)].permute(0, 2, 3, 1) * 255).round().to(torch.uint8)
        )
        return {
            "predictions": self._judge(chunk, found)[:count],
            "distance": NORMS[job.norm].size(moved).double().cpu().numpy(),
            "fooled": fooled.numpy(),
            "loss": losses.numpy(),
            "pictures": pictures.cpu().numpy(),
        }

    def stops_early(self, job: Job) -> bool:
        """Whether fooling what the attacker sees is fooling the model."""
        return not self.target.random and job.attacker != Attacker.TRANSFER

    def _attack(
        self, job: Job, attack: Attack, judged: bool, chunk: Chunk, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Adversarial images (B, 3, H, W), whether each fooled, and its cross-entropy.

        The last two, (B,), on the CPU, are told only if it is to be judged, and are zeros else.
        """
        seen = self._seen(job.attacker)
        images, labels = chunk.images[rows], chunk.labels[rows]
        seeds = image_seeds(self.seed, chunk.indices[rows.numpy()])
        judge = self.target.model
        if self.target.random:
            judge = self._averaged(judge, self.eot)
        if judged:
            outcome = WorstCase(attacks={"fooled": attack}).run(
                seen, images, labels, seeds=seeds, scored_on=judge
            )
            found, losses = outcome.images, outcome.losses.cpu()
            fooled = torch.tensor([name == "fooled" for name in outcome.fooled_by])
        else:
            found, losses = attack(seen, images, labels, seeds=seeds), torch.zeros(len(rows))
            fooled = losses.bool()
        if self.target.random and isinstance(attack, AutoAttack):
            # It spares what its view gets wrong; a draw that is scored may get it right.
            spared = ~(_right(seen, images, labels) & _right(judge, images, labels)).cpu()
            if spared.any():
                images, labels, seeds = images[spared], labels[spared], seeds[spared]
                other = PGD(norm=job.norm, epsilon=job.epsilon, steps=SPARED_STEPS, loss="margin")
                found[spared] = other(seen, images, labels, seeds=seeds)
                fooled[spared] = judged & ~_right(judge, found[spared], labels).cpu()
        return found, fooled, losses

    def _seen(self, attacker: Attacker) -> Model:
        target = self.target
        views: dict[Attacker, Model | None] = {
            Attacker.OBLIVIOUS: target.model,
            Attacker.ADAPTIVE: target.revealed,
            Attacker.ADAPTIVE_BPDA: target.bypassed,
            Attacker.TRANSFER: target.twin,
        }
        view = views[attacker]
        assert view is not None
        if not target.random or attacker == Attacker.TRANSFER:
            return view
        return self._averaged(view, 1 if attacker == Attacker.OBLIVIOUS else self.eot)

    def _averaged(self, model: Model, draws: int) -> Model:
        chosen = range(ATTACK_DRAW, ATTACK_DRAW + draws)
        return EOT(model, chosen, self.target.set_draw)

    def _judge(self, chunk: Chunk, images: Tensor) -> np.ndarray:
        """int64 (count, draws): what the deployed model says, always in the one batch shape."""
        predictions = list[Tensor]()
        for draw in range(self.draws):
            self.target.set_draw(draw)
            self._seed(chunk, 1 + draw)
            predictions.append(self._predict(self.target.model, images)[: chunk.count])
        return torch.stack(predictions, dim=1).numpy()

    def _predict(self, model: Model, images: Tensor) -> Tensor:
        def predict(rows: Tensor) -> Tensor:
            with torch.no_grad():
                logits = model(images[rows]).float()
            predictions = logits.argmax(dim=1)
            return torch.where(correct(logits, predictions), predictions, -1).cpu()

        return self.fit(predict, torch.arange(len(images)))

    def _gradients(self, chunk: Chunk) -> Arrays:
        norm, epsilon = NORMS[self.ball[0]], self.ball[1]
        seen = self._seen(Attacker.OBLIVIOUS)

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

    def _seed(self, chunk: Chunk, purpose: int) -> None:
        """Seed the global generators, for models that draw from them."""
        state = np.random.SeedSequence([self.seed, chunk.number, purpose]).generate_state(1)
        set_seed(int(state[0]))


def _right(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    """(B,) bool."""
    with torch.no_grad():
        return correct(model(images).float(), labels)
