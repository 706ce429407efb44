r"""Focal loss: tokens that the model already predicts well count less.

    torchrun -m experiments.focal configs/ft.yaml out_dir=out/focal
    torchrun --nproc_per_node 2 -m experiments.focal configs/ft.yaml \
        model.loss_options.gamma=1 out_dir=out/focal2

It tests whether a model learns faster if the gradient is not spent on tokens that it knows. Focal
loss (arXiv:1708.02002, section 3.2) multiplies cross entropy by (1 - p)^gamma, where p is the
probability of the target; gamma=0 is cross entropy. The validation also logs plain cross entropy as
`nll`, which is comparable with that of other losses.
"""
import sys

import configs
import model
import train


def focal(logits, targets, gamma=2.0):
    """(1 - p)^gamma * -log p of the target's probability p. Returns [n]."""
    nll = model.cross_entropy(logits, targets)
    p = (-nll).exp()
    # at p = 1, a power below 1 would have an infinite gradient
    factor = (1 - p).clamp(min=1e-6) ** gamma
    return factor * nll


model.LOSSES["focal"] = focal

if __name__ == "__main__":
    configs.exit_with_help(__doc__, sys.argv[1:])
    train.cli(["model.loss=focal", *sys.argv[1:]])
