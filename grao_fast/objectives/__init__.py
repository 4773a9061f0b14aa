"""Objectives: from rewards, references and lengths to the coefficient of every token.

`base` says what an objective is. Each has a file, with its formula and its source, or shares one
with its near relatives. They are tensors in and tensors out, for any trainer: N prompts with G
samples each, the reference last, are K = G + 1 sequences a prompt, and a step takes

    from grao_fast.kernels import linear_policy_loss
    from grao_fast.objectives import GRPO, Groups, token_terms

    groups = Groups(rewards_NK, length_NK, max_new_tokens=512)  # of the whole step
    terms_CNK = GRPO().coefficients(groups)
    terms_CT = token_terms(terms_CNK, sequence_T)  # sequence n * K + k of each row, or -1
    loss = linear_policy_loss(hidden_TD, head_VD, target_T, terms_CT).loss

and `loss.backward()`. A micro-batch takes the rows of terms_CNK that are its groups'; the losses
and gradients of a step's micro-batches sum to the step's. `Objective.ratio` and `Objective.shaping`
name the `OffPolicy` and `Shaping` of `linear_policy_loss` that an objective goes with; one that has
`two_passes` needs log-probs first. In the configuration, `objective="grpo"` names an objective, and
`objective="awr(temperature=0.5)"` one with options: see `make_objective`.
"""

from __future__ import annotations

import ast
from dataclasses import fields

from grao_fast.objectives.awr import AWR
from grao_fast.objectives.base import Groups, Objective, Rows, SecondPass, token_terms
from grao_fast.objectives.cispo import CISPO
from grao_fast.objectives.dapo import DAPO
from grao_fast.objectives.dft import DFT
from grao_fast.objectives.dpo import DPO
from grao_fast.objectives.export import WeightedTokens, export
from grao_fast.objectives.grao import GRAO
from grao_fast.objectives.grpo import GRPO, DrGRPO
from grao_fast.objectives.gspo import GSPO
from grao_fast.objectives.luffy import LUFFY
from grao_fast.objectives.mixtures import CHORD, HPT, UFT
from grao_fast.objectives.policy_gradient import REINFORCE, RLOO
from grao_fast.objectives.rft import RFT
from grao_fast.objectives.sft import SFT
from grao_fast.objectives.srft import SRFT
from grao_fast.system.errors import UserError, nearest

__all__ = [
    "AWR",
    "CHORD",
    "CISPO",
    "DAPO",
    "DFT",
    "DPO",
    "GRAO",
    "GRPO",
    "GSPO",
    "HPT",
    "LUFFY",
    "OBJECTIVES",
    "REINFORCE",
    "RFT",
    "RLOO",
    "SFT",
    "SRFT",
    "UFT",
    "DrGRPO",
    "Groups",
    "Objective",
    "Rows",
    "SecondPass",
    "WeightedTokens",
    "export",
    "make_objective",
    "split_objective",
    "token_terms",
]

OBJECTIVES: dict[str, type[Objective]] = {
    "grao": GRAO,
    "sft": SFT,
    "rft": RFT,
    "awr": AWR,
    "reinforce": REINFORCE,
    "rloo": RLOO,
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "dapo": DAPO,
    "cispo": CISPO,
    "gspo": GSPO,
    "luffy": LUFFY,
    "chord": CHORD,
    "uft": UFT,
    "hpt": HPT,
    "srft": SRFT,
    "dft": DFT,
    "dpo": DPO,
}


def make_objective(text: str) -> Objective:
    """The objective that a text names: "grpo", or with options "dpo(beta=0.1)".

    Raises:
        UserError: no such objective or option, or a value that the option does not take.
    """
    name, options = split_objective(text)
    kind = OBJECTIVES[name]
    known = [field.name for field in fields(kind)]
    for option in options:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise UserError(
                f"objective={text!r}: {name} has no option {option!r}{nearest(option, known)}; "
                f"{takes}"
            )
    try:
        return kind(**options)
    except UserError as error:
        raise UserError(f"objective={text!r}: {error}") from error


def split_objective(text: str) -> tuple[str, dict[str, object]]:
    """The name of the objective that a text names, which is known, and the options beside it.

    Raises:
        UserError: no such objective, or options that are no literals by name.
    """
    malformed = UserError(
        f"objective={text!r} is neither a name nor one with options, such as "
        f'"dpo(beta=0.1)"; the names are {", ".join(OBJECTIVES)}'
    )
    try:
        found = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise malformed from None
    call = found if isinstance(found, ast.Call) else None
    name = found if call is None else call.func
    if not isinstance(name, ast.Name) or (call is not None and call.args):
        raise malformed
    if name.id not in OBJECTIVES:
        raise UserError(
            f"there is no objective {name.id!r}{nearest(name.id, list(OBJECTIVES))}; the names are "
            f"{', '.join(OBJECTIVES)}"
        )
    options: dict[str, object] = {}
    for keyword in [] if call is None else call.keywords:
        if keyword.arg is None:
            raise malformed
        try:
            options[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError):
            raise UserError(
                f"objective={text!r}: {keyword.arg} must be a number, a word in quotes, True, "
                f"False or None; got {ast.unparse(keyword.value)}"
            ) from None
    return name.id, options
