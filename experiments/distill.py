r"""Learn from the probabilities of a second, frozen model.

    torchrun -m experiments.distill configs/ft.yaml out_dir=out/distill
    torchrun --nproc_per_node 2 -m experiments.distill configs/ft.yaml out_dir=out/distill2

The reference model is reference_model, by default model.init_from: these commands fine-tune
data/base, and the divergence keeps it near what it was. To distill the model that the README has
fine-tuned into a new one of two blocks (the tokenizer must be the reference's):

    torchrun -m experiments.distill configs/ft.yaml reference_model=out/ft/hf \
        model.init_from= model.n_layers=2 data.tokenizer=out/ft/hf \
        model.loss_options.ce_share=0.1 lr=2e-3 epochs=8 out_dir=out/student

It tests whether a model learns more from all probabilities of a reference (knowledge distillation,
arXiv:1503.02531) than from the targets alone. The loss of a token is

    ce_share * cross entropy  +  (1 - ce_share) * temperature^2 * KL(reference || model)

where the KL divergence is between softmax(logits / temperature) of both. The square keeps the size
of its gradient independent of the temperature (section 2 there). The reference's logits are
computed together with the model's, for one chunk of target tokens at a time.
"""
import sys

import torch.nn.functional as F

import configs
import model
import train


def distill(logits, targets, reference_logits, temperature=2.0, ce_share=0.5):
    """Returns [n]. logits, reference_logits [n, V] in fp32; reference_logits have no gradient."""
    log_probs = (logits / temperature).log_softmax(-1)
    reference_log_probs = (reference_logits / temperature).log_softmax(-1)
    divergence = F.kl_div(log_probs, reference_log_probs, log_target=True, reduction="none")
    divergence = temperature ** 2 * divergence.sum(-1)                             # [n]
    nll = model.cross_entropy(logits, targets)
    return ce_share * nll + (1 - ce_share) * divergence


model.LOSSES["distill"] = distill

if __name__ == "__main__":
    configs.exit_with_help(__doc__, sys.argv[1:])
    train.cli(["model.loss=distill", *sys.argv[1:]])
