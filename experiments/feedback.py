"""Draw documents in proportion to their last training loss.

    torchrun -m experiments.feedback configs/ft.yaml out_dir=out/feedback
    torchrun --nproc_per_node 2 -m experiments.feedback configs/ft.yaml out_dir=out/feedback

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


class FeedbackSampler(sampler.Sampler):
    """Draws a document with a probability proportional to its source's weight x its last loss.

    The loss is the mean over the document's targets. All ranks receive the losses of all ranks, so
    their samplers have the same state and draw the same documents.
    """
    uses_feedback = True

    def __init__(self, cfg, dataset):
        super().__init__(cfg, dataset)
        sizes = np.array(list(dataset.sizes.values()))
        per_epoch = sampler.documents_per_epoch(cfg, dataset.sizes)
        self.source_weights = np.repeat(per_epoch / np.maximum(sizes, 1), sizes)    # [documents]
        self.loss = np.full(len(dataset), np.nan, np.float32)                       # nan: not seen

    def documents(self, step):
        is_seen = np.isfinite(self.loss)
        seen = self.loss[is_seen].astype(np.float64)
        # cumsum adds in order: unlike sum, it gives the same bits on every machine
        mean = np.cumsum(seen)[-1] / len(seen) if len(seen) else 1.0
        loss = np.where(is_seen, self.loss, mean).astype(np.float64)
        weights = loss.clip(min=0) * self.source_weights + 1e-6
        key = sampler.hash_key(self.cfg["seed"], 3, step)
        return systematic_sample(weights, self.cfg["batch_size"], key)

    def update(self, doc_ids, stats):
        loss = stats["loss"] / self.dataset.n_targets(doc_ids)
        is_finite = np.isfinite(loss)
        self.loss[doc_ids[is_finite]] = loss[is_finite]

    def state_dict(self):
        return {"loss": self.loss}

    def load_state_dict(self, state):
        if len(state["loss"]) != len(self.loss):
            raise configs.UserError(f"sampler.order: the checkpoint has losses of "
                                    f"{len(state['loss'])} documents, data.train has "
                                    f"{len(self.loss)}; the same data, or another out_dir")
        self.loss = np.array(state["loss"])


def systematic_sample(weights, count, key):
    """Return `count` different indices, drawn with probabilities proportional to weights [n].

    All n are placed end to end in a random order, each as long as its weight. Points at equal
    distances, from a random start, select what they fall on:

        weights 3 1 2, order 1 0 2, count 2      |-1-|-----0-----|---2---|
        distance 6 / 2 = 3, start 1.5                  ^           ^          -> 0 and 2
    """
    n = len(weights)
    count = min(count, n)
    order = sampler.permute(np.arange(n), n, key)
    ends = np.cumsum(weights[order])
    start = (int(sampler.hash_key(int(key))) >> 11) / 2**53           # uniform in [0, 1)
    points = (start + np.arange(count)) * (ends[-1] / count)
    selected = np.searchsorted(ends, points, side="right").clip(max=n - 1)
    # what is longer than the distance may be selected twice: others take the place
    selected = np.unique(selected)
    others = np.setdiff1d(np.arange(n), selected)
    selected = np.append(selected, others[:count - len(selected)])
    return order[selected]


sampler.SAMPLERS["feedback"] = FeedbackSampler

if __name__ == "__main__":
    configs.exit_with_help(__doc__, sys.argv[1:])
    train.cli(["sampler.order=feedback", *sys.argv[1:]])
