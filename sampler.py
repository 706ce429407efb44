"""Which documents make which step, and which rank reads them.

    python sampler.py configs/ft.yaml          steps in an epoch, how full the rows are, how even the ranks

A step's documents are arithmetic: a function of (seed, step, how many documents each source has), with no state and no
list that grows with the data. An epoch's N documents are numbered; a keyed permutation of 0 … N-1, computed number by
number, gives their order. With 7 documents and batch_size 3:

    epoch 0    numbers  0 1 2 | 3 4 5 | 6        steps 0 1 2
    permuted            4 0 6 | 2 5 1 | 3        the documents of each
    epoch 1             1 6 3 | 0 4 2 | 5        steps 3 4 5: another key, another order

Then the documents of a step are laid into rows of at most micro_tokens, as many rows on every rank, row k about equally
costly on all of them: ranks wait for each other row by row.

    lengths 5 4 3 3 2 1, capacity 6, 2 ranks      rank 0: 5 | 4      rank 1: 3 2 | 3 1
"""
import heapq, sys

import numpy as np

import configs


# ---------------------------------------------------------------------------------------------------------------------
# order

def mix(x):
    """uint64 -> uint64 that look random (the finalizer of splitmix64, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*numbers):
    """A few ints -> one uint64 key."""
    out = np.array([0], np.uint64)
    for n in numbers:
        out = mix(out + np.uint64(n % 2**63) + np.uint64(0x9E3779B97F4A7C15))
    return out[0]


def permuted(i, n, k):
    """Where the permutation of 0 … n-1 with key k sends each i [any] -> int64, in O(1) memory for any n.

    A Feistel network over the fewest bits that hold n; what lands at n or beyond walks on until it is below
    (Black and Rogaway 2002).
    """
    bits = max(int(n - 1).bit_length(), 2)
    low, high = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    low_mask, high_mask = (np.uint64(1) << low) - np.uint64(1), (np.uint64(1) << high) - np.uint64(1)

    def once(x):
        a, b = x >> low, x & low_mask                                # high bits, low bits
        for round in range(4):
            a ^= mix(b + k + np.uint64(2 * round)) & high_mask
            b ^= mix(a + k + np.uint64(2 * round + 1)) & low_mask
        return a << low | b

    with np.errstate(over="ignore"):
        x = once(np.asarray(i, np.uint64))
        while (out := x >= n).any():
            x[out] = once(x[out])
    return x.astype(np.int64)


ORDERS = ("random", "sequential", "weighted", "feedback")


def quotas(cfg, sizes):
    """Per source: its number of documents, and how many of them an epoch takes. -> names, n [S], take [S]"""
    if cfg["sampler"]["order"] not in ORDERS:
        raise ValueError(f"sampler.order: {cfg['sampler']['order']} is none of {', '.join(ORDERS)}")
    if not isinstance(sizes, dict):                                  # a list in the sources' order
        sources = list(cfg["data"]["train"])
        sizes = dict(zip(sources if len(sources) == len(sizes) else range(len(sizes)), sizes))
    names = list(sizes)
    n = np.array([sizes[name] for name in names], np.int64)
    said = [cfg["data"]["train"][name] if name in cfg["data"]["train"] else cfg["data"]["source"] for name in names]
    weights = np.array([source["weight"] for source in said])
    if cfg["sampler"]["order"] == "weighted":                  # as many documents as there are, in these proportions
        weights = weights / weights.sum() * n.sum() / np.maximum(n, 1)
    return names, n, np.maximum(np.rint(n * weights).astype(np.int64), (n > 0).astype(np.int64))


def steps_per_epoch(cfg, sizes):
    total, batch = int(quotas(cfg, sizes)[2].sum()), cfg["batch_size"]
    steps = total // batch if cfg["sampler"]["drop_last"] else -(-total // batch)
    if not steps:
        raise ValueError(f"sampler.drop_last: an epoch's {total} documents do not fill one batch_size of {batch}")
    return steps


def documents(step, cfg, sizes, seen=None):
    """Step (from 0), sizes {source: its number of documents} -> indices [<= batch_size] int64, counted through all.

    A source is read pass after pass, each in a new order; an epoch takes weight * size of it, the next goes on there.
    seen  a Seen, by which order=feedback draws instead
    """
    names, n, take = quotas(cfg, sizes)
    if seen is not None:
        return seen.draw(cfg["batch_size"], key(cfg["seed"], 3, step))
    epoch, inside = divmod(int(step), steps_per_epoch(cfg, sizes))
    total, seed, random = int(take.sum()), cfg["seed"], cfg["sampler"]["order"] != "sequential"
    i = np.arange(inside * cfg["batch_size"], min((inside + 1) * cfg["batch_size"], total))
    if random:
        i = permuted(i, total, key(seed, 1, epoch))
    ends = np.cumsum(take)
    source = np.searchsorted(ends, i, "right")
    at = i - (ends - take)[source] + epoch * take[source]            # how far into the source's endless passes
    out, starts = np.empty(len(i), np.int64), np.cumsum(n) - n
    for s, turn in {(int(s), int(t)) for s, t in zip(source, at // n[source])}:
        here = (source == s) & (at // n[source] == turn)
        within = at[here] % n[s]
        out[here] = starts[s] + (permuted(within, int(n[s]), key(seed, 2, s, turn)) if random else within)
    return out


class Seen:
    """order=feedback: documents are drawn in proportion to the loss that training last saw of them, by source weights.

    The exception to "order is arithmetic": it has a state, which a checkpoint keeps, and a draw reads all of it. The
    next step's documents are laid out while this one is computed, so what is told of step s counts from step s + 2 on.
    Another way to draw by what was seen is another draw(), or something else than a loss in tell().
    """

    def __init__(self, cfg, sources):
        _, n, take = quotas(cfg, {name: len(tokens) for name, tokens in sources.items()})
        self.sources, self.rate = list(sources.values()), np.repeat(take / np.maximum(n, 1), n)
        self.loss = np.full(len(self.rate), np.nan, np.float32)      # of each document, per target; nan: not seen yet
        self.documents, self.losses = np.zeros(0, np.int64), np.zeros(0, np.float32)    # told, and not taken in yet

    def tell(self, documents, losses):
        """A step's documents and their summed losses, from all ranks, in any order."""
        order = np.argsort(documents)
        self.documents = np.asarray(documents, np.int64)[order]
        targets = targets_of(self.documents, self.sources)
        self.losses = (np.asarray(losses, np.float64)[order] / targets).astype(np.float32)

    def take_in(self):
        """Let what was told count, once the step behind it is laid out."""
        good = np.isfinite(self.losses)
        self.loss[self.documents[good]] = self.losses[good]
        self.documents, self.losses = self.documents[:0], self.losses[:0]

    def draw(self, count, k):
        """-> indices [count]. Documents in a new order stand end to end, each as long as its weight; equal steps over
        them, from a random start, hit each in proportion. Sums and quotients only: every machine gets the same.
        """
        known = self.loss[np.isfinite(self.loss)]
        usual = np.cumsum(known, dtype=np.float64)[-1] / len(known) if len(known) else 1.0    # for what is not seen yet
        weight = np.where(np.isfinite(self.loss), self.loss, usual).clip(0).astype(np.float64) * self.rate + 1e-6
        order, count = permuted(np.arange(len(weight)), len(weight), k), min(count, len(weight))
        ends = np.cumsum(weight[order])
        start = float(key(int(k)) >> np.uint64(11)) / 2**53
        hit = np.searchsorted(ends, (start + np.arange(count)) * (ends[-1] / count), "right").clip(max=len(order) - 1)
        hit = np.unique(hit)                                         # one that was hit twice leaves room …
        rest = np.setdiff1d(np.arange(len(order)), hit)[:count - len(hit)]    # … for the first that were not
        return order[np.concatenate([hit, rest])]

    def state(self):
        """What a checkpoint keeps."""
        return {"loss": self.loss, "documents": self.documents, "losses": self.losses}

    def load(self, state):
        """Raises ValueError where it is that of other documents."""
        if len(state["loss"]) != len(self.loss):
            raise ValueError(f"sampler.order: feedback was kept of {len(state['loss'])} documents, and there are "
                             f"{len(self.loss)}; the same data.train, or a new run")
        self.loss, self.documents, self.losses = (np.array(state[name]) for name in ("loss", "documents", "losses"))


# ---------------------------------------------------------------------------------------------------------------------
# rows

def cost(lengths, width=24_576):
    """What documents cost, in tokens of a model whose matmuls equal attention at 24,576 tokens: len + len^2 / width."""
    lengths = np.asarray(lengths, np.float64)
    return lengths + lengths ** 2 / width


def pack(lengths, capacity, ranks=1):
    """Documents into rows -> rows[rank][row] = [indices].

    Every index once, no row above `capacity` tokens, equally many rows on every rank (an idle one is []), row k about
    equally costly everywhere. Few rows: longest first, each into the cheapest row it fits in; if that strands one, into
    the fullest it fits in; if that does, too, one more row for every rank. A document that alone costs more than a row
    does on average makes row 0 costly on one rank, so row 0 is given more on all. ValueError: a document longer than a
    row.
    """
    lengths = [int(n) for n in lengths]
    if not lengths:
        return [[] for _ in range(ranks)]
    if max(lengths) > capacity:
        raise ValueError(f"micro_tokens: a row of {capacity} tokens is too short for a document of {max(lengths)}; "
                         f"micro_tokens={max(lengths)} or a smaller data.seq_len")
    order, costs = sorted(range(len(lengths)), key=lambda i: -lengths[i]), cost(lengths)

    def head_starts(rows):
        """How much costlier than the last each row is to be: at least as its longest document, the others level."""
        least, left = [costs[i] for i in order[:rows:ranks]], costs.sum() / ranks
        level, at = left / (rows // ranks), 0
        while at < len(least) - 1 and least[at] > level:
            left, at = left - least[at], at + 1
            level = left / (rows // ranks - at)
        return [max(0.0, b - level) for b in least] + [0.0] * (rows // ranks - len(least))

    def evenly(rows):
        starts = head_starts(rows)
        heap = [(-starts[r // ranks], r, capacity) for r in range(rows)]
        out, full = [[] for _ in range(rows)], []                    # full: too full for this one, maybe not for others
        for i in order:
            while full and -full[0][0] >= lengths[i]:
                room, c, r = heapq.heappop(full)
                heapq.heappush(heap, (c, r, -room))
            while heap and heap[0][2] < lengths[i]:
                c, r, room = heapq.heappop(heap)
                heapq.heappush(full, (-room, c, r))
            if not heap:
                return None
            c, r, room = heapq.heappop(heap)
            out[r].append(i)
            heapq.heappush(heap, (c + costs[i], r, room - lengths[i]))
        return out

    def tightly(rows):
        out, room = [[] for _ in range(rows)], np.full(rows, capacity)
        for i in order:
            fits = np.flatnonzero(room >= lengths[i])
            if not len(fits):
                return None
            r = fits[room[fits].argmin()]
            out[r].append(i)
            room[r] -= lengths[i]
        return out

    rows = -(-sum(lengths) // capacity)
    rows = max(-(-rows // ranks), 1) * ranks
    while not (bins := evenly(rows) or tightly(rows)):
        rows += ranks
    bins.sort(key=lambda b: (-sum(costs[i] for i in b), b))    # neighbours in cost stand side by side on the ranks
    return [[sorted(bins[k * ranks + rank]) for k in range(rows // ranks)] for rank in range(ranks)]


# ---------------------------------------------------------------------------------------------------------------------
# a step's rows, as arrays

def source_of(index, sources):
    """Index through all sources -> (the source's Tokens, document in it)."""
    for tokens in sources:
        if index < len(tokens):
            return tokens, index
        index -= len(tokens)
    raise IndexError(index)


def lengths_of(indices, sources):
    """Targets (and inputs) of documents, by their indices through all sources. -> [n] int64"""
    starts, out = 0, np.zeros(len(indices), np.int64)
    indices = np.asarray(indices)
    for tokens in sources:
        here = (indices >= starts) & (indices < starts + len(tokens))
        out[here] = tokens.lengths(indices[here] - starts)
        starts += len(tokens)
    return out


def targets_of(indices, sources):
    """Target tokens of documents, by their indices through all sources. -> [n]"""
    found = (source_of(int(index), sources) for index in indices)
    return np.array([source.document(i)[1][1:].sum() for source, i in found], np.int64)


def collate(indices, sources, pad_to=1):
    """Documents -> a row as numpy arrays (model.py says what they are), filled up to a multiple of pad_to.

    A document of n tokens is n - 1 inputs, each with the next token as its target; the last token is no input.
    """
    found = [source.document(i) for source, i in (source_of(int(index), sources) for index in indices)]
    lengths = np.array([len(ids) for ids, _ in found], np.int64)
    ids = np.concatenate([ids for ids, _ in found] or [np.zeros(0, np.uint16)])
    mask = np.concatenate([mask for _, mask in found] or [np.zeros(0, np.uint8)])
    inputs = np.ones(len(ids), bool)
    inputs[np.cumsum(lengths) - 1] = False                           # each document's last token
    at = np.flatnonzero(inputs)
    cu = np.concatenate([[0], np.cumsum(lengths - 1)])
    total, n = -(-len(at) // pad_to) * pad_to, len(at)
    tokens, targets = np.zeros(total, np.int64), np.full(total, -100, np.int64)
    weights, positions = np.zeros(total, np.float32), np.zeros(total, np.int64)
    tokens[:n], weights[:n] = ids[at], mask[at + 1]
    targets[:n] = np.where(mask[at + 1], ids[at + 1].astype(np.int64), -100)
    positions[:n] = np.arange(n) - np.repeat(cu[:-1], lengths - 1)
    longest = max(int(np.diff(cu).max(initial=0)), total - int(cu[-1]))      # padding is a document to the kernel
    return {"tokens": tokens, "targets": targets, "loss_weights": weights, "positions": positions, "max_seqlen": longest,
            "cu_seqlens": cu.astype(np.int32), "doc_ids": np.asarray(indices, np.int64),
            "trained": np.flatnonzero(targets >= 0)}


def step_rows(step, cfg, sources, ranks=1, rank=0, pad_to=1, seen=None):
    """Everything one rank needs for a step -> (its rows, what all ranks' rows hold together).

    The latter is {"documents", "tokens", "target_tokens", "weight", "packing", "lengths" [n]}: every rank knows all of
    it without asking the others.
    """
    sizes = {name: len(tokens) for name, tokens in sources.items()}
    return rows_of(documents(step, cfg, sizes, seen), cfg, list(sources.values()), ranks, rank, pad_to)


def rows_of(indices, cfg, sources, ranks=1, rank=0, pad_to=1):
    """The same for a list of documents, whatever chose them."""
    lengths = lengths_of(indices, sources)
    rows = pack(lengths, cfg["micro_tokens"], ranks)
    targets = int(targets_of(indices, sources).sum())
    mine = [collate(np.asarray(indices)[row], sources, pad_to) for row in rows[rank]]
    longest = [max(sum(lengths[i] for i in rows[r][k]) for r in range(ranks)) for k in range(len(rows[0]))]
    packing = float(lengths.sum() / max(1, ranks * sum(-(-n // pad_to) * pad_to for n in longest)))
    return mine, {"documents": len(indices), "tokens": int(lengths.sum()), "target_tokens": targets,
                  "weight": float(targets), "packing": packing, "lengths": lengths}


# ---------------------------------------------------------------------------------------------------------------------

def main(argv):
    import tokenize_data
    options, argv = configs.take(argv, ranks=8)
    if options["ranks"] < 1:
        raise ValueError(f"ranks: expected at least 1, got {options['ranks']}")
    cfg, _, _ = configs.load(argv)
    sources = tokenize_data.load_datasets(cfg)["train"]
    sizes, ranks = {name: len(tokens) for name, tokens in sources.items()}, options["ranks"]
    names, n, take = quotas(cfg, sizes)
    for name, have, used in zip(names, n, take):
        print(f"{name}: {have:,} documents, {used:,} in an epoch")
    steps = steps_per_epoch(cfg, sizes)
    print(f"{int(take.sum()):,} documents / batch_size {cfg['batch_size']} = {steps:,} steps in an epoch")
    seen = Seen(cfg, sources) if cfg["sampler"]["order"] == "feedback" else None
    for ranks in sorted({1, ranks}):
        fill, even, counts = [], [], []
        for step in np.unique(np.linspace(0, steps - 1, 50).astype(int)):
            lengths = lengths_of(documents(step, cfg, sizes, seen), list(sources.values()))
            rows = pack(lengths, cfg["micro_tokens"], ranks)
            costs = np.array([[cost([lengths[i] for i in row]).sum() for row in rank] for rank in rows])  # [R, rows]
            counts.append(len(rows[0]))
            fill.append(lengths.sum() / (ranks * len(rows[0]) * cfg["micro_tokens"]))
            even.append(costs.mean(0).sum() / costs.max(0).sum())
        print(f"{ranks} rank{'s' * (ranks > 1)}: {np.mean(counts):.1f} rows of {cfg['micro_tokens']:,} tokens a step, "
              f"{np.mean(fill):.0%} full, ranks wait {1 - np.mean(even):.1%} of the time for the slowest")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    configs.run(main, sys.argv[1:])
