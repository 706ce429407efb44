r"""Embed each token together with the token before it.

    torchrun -m experiments.ngram_embeddings configs/ft.yaml out_dir=out/ngram
    torchrun --nproc_per_node 2 -m experiments.ngram_embeddings configs/ft.yaml \
        model.embed_options.rows=65536 out_dir=out/ngram2

It tests whether a larger input vocabulary helps a model that keeps its tokens and its head
(over-tokenized transformer, arXiv:2501.16975): a second table has rows for pairs of neighbouring
tokens, found by a hash. Such rows cost memory, but no computation.

No released family has a name for the table. So the model is saved under our own names
(model.family=native), which transformers refuses, and can be loaded where this file is imported:

    python -c "import experiments.ngram_embeddings, model; model.main(['out/ngram', 'What is 12 + 30?'])"

With model.family=llama checkpoint.export=false it is trained, and only the checkpoints are kept.
"""
import sys

from torch import nn

import configs
import model
import train


class BigramEmbedding(nn.Module):
    """The row of a token plus the row of its bigram (the token before it, the token).

    m     the model section
    rows  of the second table. Bigrams with the same hash share a row
    """
    init_std = 0.0                       # so that a pretrained model starts as it was

    def __init__(self, m, rows=16384):
        super().__init__()
        self.table = model.Embedding(rows, m["d_model"])

    def forward(self, transformer, batch):                                         # -> [T, C]
        # -1 at the start of a document, which has rows of its own
        previous = model.previous_tokens(batch, 1)[:, 0]                           # [T]
        bigrams = model.hash_int32(batch["tokens"].int() ^ model.hash_int32(previous))
        rows = bigrams.long() % self.table.num_embeddings
        return model.plain(transformer, batch) + self.table(rows)


model.EMBEDDINGS["bigram"] = BigramEmbedding

if __name__ == "__main__":
    configs.exit_with_help(__doc__, sys.argv[1:])
    train.cli(["model.embed=bigram", "model.family=native", *sys.argv[1:]])
