"""Aggregate gradients by majority vote instead of a sum.

    torchrun -m experiments.majority_vote configs/ft.yaml optimizer=sgd momentum=0.0 lr=1e-3 out_dir=out/vote
    torchrun --nproc_per_node 2 -m experiments.majority_vote configs/ft.yaml optimizer=sgd ...

Every micro-batch of every rank has one vote on every parameter: the sign of its gradient. The
update moves each parameter by the sign of the sum of votes (signSGD with majority vote,
arXiv:1810.05291, where the voters are workers). The result depends on how a step is divided into
micro-batches, unlike that of the sum.
"""
import torch

import shard
import train


def forward_backward(model, micro_batches, global_loss_weight, cfg):
    """Replaces train.forward_backward: leaves +1, -1 or 0 (a tie) in every .grad."""
    params = [p for p in model.parameters() if p.requires_grad]
    votes = [torch.zeros_like(p) for p in params]
    loss = torch.zeros((), device=model.embed.weight.device)
    documents = []
    for micro_loss, micro_documents, gradients in train.micro_batch_gradients(
            model, micro_batches, global_loss_weight):
        loss += micro_loss
        documents.append(micro_documents)
        for vote, gradient in zip(votes, gradients):
            vote += gradient.sign()
    for p, vote in zip(params, votes):
        p.grad = vote
    shard.all_reduce_gradients(model)             # sums the votes of all ranks
    for p in params:
        p.grad.sign_()
    return shard.all_reduce_(loss), documents


train.forward_backward = forward_backward

if __name__ == "__main__":
    train.cli()
