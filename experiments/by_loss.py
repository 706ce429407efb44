"""Draw documents in proportion to their last training loss.

    torchrun -m experiments.by_loss configs/ft.yaml out_dir=out/by_loss
    torchrun --nproc_per_node 2 -m experiments.by_loss configs/ft.yaml out_dir=out/by_loss

It tests whether a model learns faster from the documents that it predicts worst. The idea is that
of online batch selection (Loshchilov and Hutter 2015, arXiv:1511.06343), which draws by the rank of
the last loss; here its size counts. The losses are not reweighted, so hard documents have more
influence on the model than in the default order.
"""
import sys

import numpy as np

import configs
import sampler
import train


class LossSampler(sampler.Sampler):
    """Draws a document with a probability proportional to its source's weight x its last loss.

    The loss is the mean over the document's targets. All ranks receive the losses of all ranks, so
    their samplers have the same state and draw the same documents.
    """
    uses_feedback = True

    def __init__(self, cfg, dataset):
        super().__init__(cfg, dataset)
        self.times_per_epoch = sampler.times_per_epoch(cfg, dataset.sizes)          # [documents]
        self.loss = np.full(len(dataset), np.nan, np.float32)                       # nan: not seen

    def documents(self, step):
        loss = sampler.fill_unknown(self.loss)
        weights = loss.clip(min=0) * self.times_per_epoch + 1e-6
        key = sampler.hash_key(self.cfg["seed"], sampler.WEIGHTED_ORDER, step)
        return sampler.systematic_sample(weights, self.cfg["batch_size"], key)

    def update(self, doc_ids, stats):
        loss = stats["loss"] / self.dataset.n_targets(doc_ids)
        self.loss[doc_ids] = np.where(np.isfinite(loss), loss, np.nan)

    def state_dict(self):
        return {"loss": self.loss}


sampler.SAMPLERS["by_loss"] = LossSampler

if __name__ == "__main__":
    configs.exit_with_help(__doc__, sys.argv[1:])
    train.cli(["sampler.order=by_loss", *sys.argv[1:]])
