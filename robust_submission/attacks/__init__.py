"""The adversaries: they take any callable model, and import none of our other rooms.

images = build_attack("pgd", epsilon=8 / 255, steps=20)(model, images, labels)
"""

import difflib
from dataclasses import fields
from typing import Any

from robust_submission.attacks.base import Attack, Model, image_seeds
from robust_submission.attacks.ensemble import EOT, WorstCase, WorstCaseResult
from robust_submission.attacks.external import AutoAttack, CarliniWagner
from robust_submission.attacks.norms import NORMS
from robust_submission.attacks.pgd import BIM, FFGSM, FGSM, MIM, PGD, UniformNoise, input_gradient
from robust_submission.cli.errors import UserError

__all__ = [
    "ATTACKS",
    "BIM",
    "EOT",
    "FFGSM",
    "FGSM",
    "MIM",
    "NORMS",
    "PGD",
    "Attack",
    "AutoAttack",
    "CarliniWagner",
    "Model",
    "UniformNoise",
    "WorstCase",
    "WorstCaseResult",
    "build_attack",
    "image_seeds",
    "input_gradient",
]

ATTACKS: dict[str, type[PGD | CarliniWagner | AutoAttack]] = {
    "fgsm": FGSM,
    "ffgsm": FFGSM,
    "bim": BIM,
    "mim": MIM,
    "pgd": PGD,
    "noise": UniformNoise,
    "cw": CarliniWagner,
    "autoattack": AutoAttack,
    **dict.fromkeys(AutoAttack.KNOWN, AutoAttack),
}


def build_attack(name: str, epsilon: float, norm: str | None = None, **options: Any) -> Attack:
    """The attack of that name.

    Args:
        name: A key of `ATTACKS`.
        epsilon: The ball's radius, in units of the 0-to-1 image.
        norm: The ball; the attack's own default ("linf", for "cw" "l2") without it.
        options: Any other field of the attack, such as `steps=20`.

    Raises:
        UserError: no attack has that name, it has no such option, or refuses the value.
    """
    if name not in ATTACKS:
        near = difflib.get_close_matches(name, ATTACKS, n=1, cutoff=0.5)
        hint = f" (nearest: {near[0]})" if near else ""
        raise UserError(f"Expected an attack of {', '.join(ATTACKS)}. Received: {name!r}{hint}.")
    kind = ATTACKS[name]
    known = [each.name for each in fields(kind) if each.init]
    if unknown := [option for option in options if option not in known]:
        raise UserError(f"Expected options of {name}: {', '.join(known)}. Received: {unknown[0]}.")
    if norm is not None:
        options["norm"] = norm
    if name in AutoAttack.KNOWN:
        options["attacks"] = (name,)
    return kind(epsilon=epsilon, **options)
