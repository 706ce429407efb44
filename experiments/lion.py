"""Train with Lion: the sign of a momentum instead of AdamW's division by a second moment.

    torchrun -m experiments.lion configs/ft.yaml out_dir=out/lion
    torchrun --nproc_per_node 2 -m experiments.lion configs/ft.yaml out_dir=out/lion

Lion (arXiv:2302.06675, Algorithm 2) moves every parameter by the learning rate, up or down, and
keeps one number per parameter where AdamW keeps two. With steps of that size, its learning rate is
a third to a tenth of AdamW's, and its weight decay as many times larger: the defaults below are
those of configs/ft.yaml, divided and multiplied by five.

It works on any layout: every operation is elementwise, so a sharded parameter (a DTensor) needs
nothing else, and a checkpoint of two shards resumes on one rank.
"""
import sys

import torch

import configs
import train


class Lion(torch.optim.Optimizer):
    """lr and weight_decay are those of the param_groups; betas as in the paper."""

    def __init__(self, param_groups, betas):
        super().__init__(param_groups, {"betas": betas})
        for p in train.optimizer_parameters(self):
            self.state[p] = {"momentum": torch.zeros_like(p)}     # a DTensor if p is one

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p]["momentum"]
                update = torch.lerp(p.grad, momentum, beta1).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update, alpha=group["lr"])
                momentum.lerp_(p.grad, 1 - beta2)


def lion(param_groups, cfg):
    return Lion(param_groups, cfg["betas"])


train.OPTIMIZERS["lion"] = lion

if __name__ == "__main__":
    configs.exit_with_help(__doc__, sys.argv[1:])
    train.cli(["optimizer=lion", "lr=1e-4", "weight_decay=0.5", "betas=[0.9,0.99]", *sys.argv[1:]])
