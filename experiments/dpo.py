"""Learn from preference pairs: direct preference optimization.

    torchrun -m experiments.dpo configs/ft.yaml model.init_from=out/ft/hf out_dir=out/dpo
    torchrun --nproc_per_node 2 -m experiments.dpo configs/ft.yaml model.init_from=out/ft/hf ...
    torchrun -m experiments.dpo configs/ft.yaml data.train.chats.path=MY_PAIRS.jsonl ...

DPO (arXiv:2305.18290) makes chosen answers more likely than rejected ones, compared with a frozen
reference: model.init_from. With reward = BETA * (log p - log p_reference) of an answer, and the
margin = reward of the chosen - reward of the rejected answer, loss and gradient of a pair are

    -log sigmoid(margin)    and    BETA * sigmoid(-margin) * (grad nll_chosen - grad nll_rejected)

So a first forward pass measures the margins, and then train.forward_backward runs with loss weights
that have a signed factor per document. The loss of the first step is ln 2. metrics.jsonl also has
reward_margin and reward_accuracy, the share of margins above 0.

A record is {"prompt", "chosen", "rejected"}: texts or lists of messages. Answers that are whole
chats need no prompt. It becomes documents 2i and 2i + 1, and batch_size counts both.
"""
import functools
import sys

import numpy as np
import torch

import configs
import sampler
import tokenize_data
import train

BETA = 0.1
encode_record = tokenize_data.encode_record
forward_backward = train.forward_backward
train_loop = train.train


def encode_pair(record, place, *args):
    """Replaces tokenize_data.encode_record. A record that is no pair remains one document."""
    with tokenize_data.error_context(place):
        pair = tokenize_data.parse_record(record)
    if not ("chosen" in pair and "rejected" in pair):
        return encode_record(record, place, *args)
    others = {key: value for key, value in pair.items() if key not in ("prompt", "messages")}
    documents = []
    for answer in (others.pop("chosen"), others.pop("rejected")):
        chat = {"prompt": pair.get("prompt"), "completion": answer}
        if isinstance(answer, list):
            first_roles = [turn.get("role", "assistant") for turn in answer[:1]]
            if first_roles != ["assistant"]:             # a whole chat
                chat = {"messages": answer}
        documents += encode_record(others | chat, place, *args)
    return documents


class PairSampler(sampler.Sampler):
    """Draws pairs of documents as Sampler draws documents."""

    def __init__(self, cfg, dataset):
        super().__init__(cfg | {"batch_size": cfg["batch_size"] // 2}, dataset)
        self.n_pairs = {name: size // 2 for name, size in dataset.sizes.items()}
        if cfg["batch_size"] % 2:
            raise configs.UserError("batch_size: must be even, it counts both documents of a pair")
        for name, tokens in dataset.sources.items():
            counts = tokens.header
            n_pairs = counts["records"] - counts["skipped"]
            if counts["documents"] != 2 * n_pairs or counts["truncated"] or len(tokens) % 2:
                raise configs.UserError(
                    f"data.train.{name}: its {n_pairs} records must be pairs of whole answers; "
                    f"there are {counts['documents']} documents, {counts['truncated']} cut off by "
                    f"data.seq_len, and {len(tokens)} remain after data.validation_split")

    def documents(self, step):
        pairs = sampler.documents(step, self.cfg, self.n_pairs)
        return np.stack([2 * pairs, 2 * pairs + 1], axis=1).ravel()


def dpo_forward_backward(run, reference, model, micro_batches, _global_loss_weight, cfg):
    """Replaces train.forward_backward. reference: nll of all training documents [n]"""
    with torch.no_grad():
        document_stats = [(micro_batch["doc_ids"], model(micro_batch)[2])
                          for micro_batch in micro_batches]
    doc_ids, stats = train.gather_document_stats(document_stats)                   # of all ranks
    order = doc_ids.argsort()                            # chosen, rejected, chosen, ...
    rewards = BETA * (reference[doc_ids] - stats["loss"])                          # [D]
    chosen, rejected = torch.from_numpy(rewards[order]).view(-1, 2).unbind(1)      # [pairs] each
    margins = chosen - rejected

    pair_factors = BETA * torch.sigmoid(-margins)
    signed = torch.stack([pair_factors, -pair_factors], 1).flatten()               # [D]
    factors = dict(zip(doc_ids[order].tolist(), signed.tolist()))
    weighted = [train.weight_documents(micro_batch, factors) for micro_batch in micro_batches]
    forward_backward(model, weighted, len(margins), cfg)

    run.step_metrics["reward_margin"] = margins.mean()
    run.step_metrics["reward_accuracy"] = (margins > 0).float().mean()
    loss = torch.nn.functional.softplus(-margins).mean()
    return loss.to(run.device), document_stats


def train_on_pairs(run):
    """Replaces train.train."""
    reference = train.reference_losses(run)
    train.forward_backward = functools.partial(dpo_forward_backward, run, reference)
    train_loop(run)


sampler.SAMPLERS["pairs"] = PairSampler
tokenize_data.encode_record = encode_pair
tokenize_data.FORMAT = f"{tokenize_data.FORMAT}, pairs"          # gives pairs their own token files
train.train = train_on_pairs

if __name__ == "__main__":
    configs.exit_with_help(__doc__, sys.argv[1:])
    argv = ["sampler.order=pairs", "data.train_on=last", "lr=5e-5", "log_every=10", *sys.argv[1:]]
    cfg, _, _ = configs.load_or_exit(argv)
    for name, source in cfg["data"]["train"].items():
        if source["path"] == "data/chats.jsonl":         # of configs/ft.yaml: these are no pairs
            argv.insert(0, f"data.train.{name}.path=data/pairs.jsonl")
    train.cli(argv)
