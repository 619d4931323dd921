"""Learning rates as functions of the step, so that a resumed run goes on where it stopped."""

import math

SCHEDULES = ("cosine", "linear", "inverse-sqrt", "epoch-decay", "constant")


def learning_rate(
    kind: str, step: int, steps: int, *, lr: float, final_lr: float, warmup: float, epoch: float
) -> float:
    """The rate of step 0 <= step < steps: a linear rise over the first `warmup` share of the steps, times

    cosine: half a cosine from lr to final_lr; linear: a line from lr to final_lr; inverse-sqrt: lr sqrt(w / max(step, w)), w the
    steps of the rise (PaLM section 5: 10,000); epoch-decay: lr (final_lr / lr)^epoch, where epoch is e / (E - 1) for epoch e of E (0
    for a single one); constant: lr.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule: {kind!r} is none of {', '.join(SCHEDULES)}")
    rise = round(warmup * steps)
    factor = min(1.0, (step + 1) / max(1, rise))
    done = step / max(1, steps)
    if kind == "cosine":
        return factor * (final_lr + (lr - final_lr) * 0.5 * (1 + math.cos(math.pi * done)))
    if kind == "linear":
        return factor * (lr + (final_lr - lr) * done)
    if kind == "inverse-sqrt":
        return factor * lr * math.sqrt(max(1, rise) / max(step + 1, rise, 1))
    if kind == "epoch-decay":
        return factor * lr * (final_lr / lr) ** epoch
    return factor * lr
