"""Clip the gradient of each micro-batch before their weighted mean.

    torchrun -m experiments.clipped configs/ft.yaml grad_clip=0.5 out_dir=out/clipped
    torchrun --nproc_per_node 2 -m experiments.clipped configs/ft.yaml out_dir=out/clipped

It tests whether training is more robust if no micro-batch can have more than its share of an
update: a few bad documents are clipped, and the others are not scaled down with them. Differential
privacy clips in this way (arXiv:1607.00133 each example, arXiv:1812.06210 each micro-batch); here
no noise is added, so this gives no privacy. With micro-batches k of all ranks,

    weight_k    sum of |loss_weight| over the targets of micro-batch k; W = the sum over all k
    mean_k      gradient of its own mean loss, sum(loss_weight * loss) / weight_k
    gradient    sum of weight_k / W * clip(mean_k), where clip() scales a norm above grad_clip to it

Without clipping this is the gradient of the default loss. The norm of the sum is at most grad_clip,
so train_step's own clipping changes nothing. The result depends on how a step is divided into
micro-batches: by micro_tokens (256, unless set) and the number of ranks.
"""
import sys

import torch

import configs
import shard
import train


def forward_backward(model, micro_batches, global_loss_weight, cfg):
    """Replaces train.forward_backward: sums clipped gradients."""
    max_norm = cfg["grad_clip"]
    if not max_norm:
        raise configs.UserError("grad_clip: must be above 0, the norm to which experiments.clipped "
                                "clips the gradient of each micro-batch; got 0")
    params = [p for p in model.parameters() if p.requires_grad]
    sums = [torch.zeros_like(p) for p in params]
    loss = torch.zeros((), device=model.device)
    document_stats = []
    results = train.micro_batch_gradients(model, micro_batches, global_loss_weight)
    for micro_batch, (micro_loss, micro_stats, gradients) in zip(micro_batches, results):
        loss += micro_loss
        document_stats.append(micro_stats)
        # gradients are weight_k / W * mean_k, and so is the norm to which they are clipped
        loss_weights = micro_batch["loss_weights"][micro_batch["target_index"]]
        share = loss_weights.abs().sum() / global_loss_weight
        norm = torch.nn.utils.get_total_norm(gradients)
        scale = (max_norm * share / (norm + 1e-12)).clamp(max=1)
        for total, gradient in zip(sums, gradients):
            total += scale * gradient
    for p, total in zip(params, sums):
        p.grad = total
    shard.all_reduce_gradients(model)             # sums over ranks
    return shard.all_reduce_(loss), document_stats


train.forward_backward = forward_backward

if __name__ == "__main__":
    configs.exit_with_help(__doc__, sys.argv[1:])
    train.cli(["micro_tokens=256", *sys.argv[1:]])
