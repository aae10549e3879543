"""Adversarial attacks on any callable model that returns logits.

    adversarial = PGD(epsilon=8 / 255, steps=20)(model, images, labels)

Arguments of an attack that make no sense raise ValueError. `build_attack`, which names an attack
and its options as the command line does, raises UserError.
"""

import difflib
from dataclasses import fields
from typing import Any

from robust_submission.attacks.base import Attack, BallAttack, Model, image_seeds, input_gradient
from robust_submission.attacks.ensemble import EOT, WorstCase, WorstCaseResult
from robust_submission.attacks.external import AutoAttack, CarliniWagner
from robust_submission.attacks.minimum_norm import DDN, FMN, Nearest
from robust_submission.attacks.norms import NORMS
from robust_submission.attacks.pgd import BIM, FFGSM, FGSM, MIM, PGD, UniformNoise
from robust_submission.attacks.screening import Screen
from robust_submission.cli.errors import UserError

__all__ = [
    "ATTACKS",
    "BIM",
    "DDN",
    "EOT",
    "FFGSM",
    "FGSM",
    "FMN",
    "MIM",
    "NORMS",
    "PGD",
    "Attack",
    "AutoAttack",
    "BallAttack",
    "CarliniWagner",
    "Model",
    "Nearest",
    "Screen",
    "UniformNoise",
    "WorstCase",
    "WorstCaseResult",
    "build_attack",
    "image_seeds",
    "input_gradient",
]

ATTACKS: dict[str, type[PGD | CarliniWagner | FMN | DDN | Screen | AutoAttack]] = {
    "fgsm": FGSM,
    "ffgsm": FFGSM,
    "bim": BIM,
    "mim": MIM,
    "pgd": PGD,
    "noise": UniformNoise,
    "cw": CarliniWagner,
    "fmn": FMN,
    "ddn": DDN,
    "screen": Screen,
    "autoattack": AutoAttack,
    **dict.fromkeys(AutoAttack.KNOWN, AutoAttack),
}


def build_attack(name: str, epsilon: float, norm: str | None = None, **options: Any) -> BallAttack:
    """Build an attack from its name, for what a user asks for.

    Args:
        name: A key of `ATTACKS`.
        epsilon: The ball's radius, in units of the 0-to-1 image.
        norm: The ball; None for the attack's default ("linf", but "l2" for "cw" and "ddn").
        options: Any other field of the attack, such as `steps=20`.

    Raises:
        UserError: there is no such attack or option, or the attack refuses the value.
    """
    if not isinstance(name, str) or name not in ATTACKS:
        near = difflib.get_close_matches(str(name), ATTACKS, n=1, cutoff=0.5)
        hint = f" (nearest: {near[0]})" if near else ""
        raise UserError(f"attack: expected one of {', '.join(ATTACKS)}, found {name!r}{hint}.")
    kind = ATTACKS[name]
    known = [each.name for each in fields(kind) if each.init]
    if unknown := [option for option in options if option not in known]:
        raise UserError(f"{name}: expected options {', '.join(known)}, found {unknown[0]}.")
    if norm is not None:
        options["norm"] = norm
    if name in AutoAttack.KNOWN:
        options["attacks"] = (name,)
    try:
        return kind(epsilon=epsilon, **options)
    except ValueError as error:
        raise UserError(str(error)) from error
