"""Draw documents in proportion to an estimate of their gradient's norm.

    torchrun -m experiments.by_gradient configs/ft.yaml out_dir=out/by_gradient
    torchrun --nproc_per_node 2 -m experiments.by_gradient configs/ft.yaml out_dir=out/by_gradient

It tests whether importance sampling makes the gradient of a step less noisy (Katharopoulos and
Fleuret 2018, arXiv:1803.00942, who show that the gradient at the last layer bounds that of the
whole model, up to a factor). A document that is drawn r times as often as in the default order has
its losses multiplied by 1 / r, so that the gradient is that of the default order on average; only
the denominator, the sum of loss weights, is that of the documents drawn.

The paper computes its estimates with a forward pass of more documents. Here a document's estimate
is from the last step that had it, and half of the probability is that of the default order. So r
is at least 1/2, even if a small estimate is out of date.
"""
import sys

import numpy as np
import torch

import configs
import model
import sampler
import train


def squared_norm(x, dlogits):
    """Return the squared norm of the gradient of the head's weights for each token, [n].

    The gradient is the outer product of dlogits and x, so its norm is the product of their norms.
    """
    x_norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return (x_norm * torch.linalg.vector_norm(dlogits, dim=-1, dtype=torch.float32)) ** 2


class GradientSampler(sampler.Sampler):
    """Draws by source's weight x (1 + norm / mean norm) / 2.

    norm is the root of the sum of squared_norm over a document's targets: the norm of its gradient
    of the head, if the gradients of its tokens are orthogonal.
    """
    uses_feedback = True

    def __init__(self, cfg, dataset):
        super().__init__(cfg, dataset)
        self.times_per_epoch = sampler.times_per_epoch(cfg, dataset.sizes)          # [documents]
        self.norm = np.full(len(dataset), np.nan, np.float32)                       # nan: not seen

    def times_as_often(self):
        """How often each document is drawn, divided by how often it is in the default order."""
        norm = sampler.fill_unknown(self.norm)
        mean = np.cumsum(norm)[-1] / len(norm)
        return 0.5 + 0.5 * norm / (mean + 1e-12)

    def documents(self, step):
        weights = self.times_per_epoch * self.times_as_often()
        key = sampler.hash_key(self.cfg["seed"], sampler.WEIGHTED_ORDER, step)
        return sampler.systematic_sample(weights, self.cfg["batch_size"], key)

    def reweight(self, micro_batch):
        lengths = np.diff(micro_batch["cu_seqlens"])
        factors = 1 / self.times_as_often()[micro_batch["doc_ids"]]
        micro_batch["loss_weights"][:lengths.sum()] *= np.repeat(factors, lengths)

    def update(self, doc_ids, stats):
        norm = np.sqrt(stats["squared_norm"]) * self.times_as_often()[doc_ids]  # undoes reweight()
        self.norm[doc_ids] = np.where(np.isfinite(norm), norm, np.nan)

    def state_dict(self):
        return {"norm": self.norm}


model.TOKEN_STATS["squared_norm"] = squared_norm
sampler.SAMPLERS["by_gradient"] = GradientSampler

if __name__ == "__main__":
    configs.exit_with_help(__doc__, sys.argv[1:])
    train.cli(["sampler.order=by_gradient", *sys.argv[1:]])
