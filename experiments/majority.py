"""Aggregate gradients by majority vote instead of a sum.

    torchrun -m experiments.majority configs/ft.yaml out_dir=out/majority
    torchrun --nproc_per_node 2 -m experiments.majority configs/ft.yaml out_dir=out/majority

Every micro-batch of every rank has one vote on every parameter: the sign of its gradient. The
update moves each parameter by the sign of the sum of votes (signSGD with majority vote,
arXiv:1810.05291, where the voters are workers). The result depends on how a step is divided into
micro-batches, unlike that of the sum: micro_tokens (256, unless set) and the number of ranks decide
how many votes there are.

The optimizer is SGD without momentum, so that a parameter moves by the learning rate or not at all.
Gradients are not clipped, because their norm is the root of the number of parameters.
"""
import sys

import torch

import configs
import shard
import train


def forward_backward(model, micro_batches, global_loss_weight, cfg):
    """Replaces train.forward_backward: leaves +1, -1 or 0 (a tie) in every .grad."""
    params = [p for p in model.parameters() if p.requires_grad]
    votes = [torch.zeros_like(p) for p in params]
    loss = torch.zeros((), device=model.device)
    document_stats = []
    for micro_loss, micro_stats, gradients in train.micro_batch_gradients(
            model, micro_batches, global_loss_weight):
        loss += micro_loss
        document_stats.append(micro_stats)
        for vote, gradient in zip(votes, gradients):
            vote += gradient.sign()
    for p, vote in zip(params, votes):
        p.grad = vote
    shard.all_reduce_gradients(model)             # sums the votes of all ranks
    for p in params:
        p.grad.sign_()
    return shard.all_reduce_(loss), document_stats


train.forward_backward = forward_backward

if __name__ == "__main__":
    configs.exit_with_help(__doc__, sys.argv[1:])
    train.cli(["optimizer=sgd", "momentum=0.0", "weight_decay=0.0", "grad_clip=0.0", "lr=3e-4",
               "micro_tokens=256", *sys.argv[1:]])
