"""Which documents make which step, and how they are packed into micro-batches.

    python sampler.py configs/ft.yaml              steps per epoch; packing on 1 and on 8 ranks
    python sampler.py configs/ft.yaml ranks=64     ... on 1 and on 64 ranks

The order is a function of (seed, step, number of documents): there is no iterator state, and no
list that grows with the data. An epoch's N documents are numbered, and a pseudorandom permutation
of 0 ... N-1, evaluated one number at a time, shuffles them. With 7 documents and batch_size 3:

    epoch 0    numbers    0 1 2 | 3 4 5 | 6       steps 0, 1, 2
               documents  3 2 6 | 4 5 1 | 0
    epoch 1    documents  3 5 0 | 2 6 1 | 4       steps 3, 4, 5: another key, another order

The documents of a step are then packed into micro-batches of at most micro_tokens tokens. Every
rank gets the same number of them, and micro-batch k costs about the same on all ranks, because
ranks wait for each other after each micro-batch:

    lengths 5 4 3 3 2 1, micro_tokens 6, 2 ranks      rank 0    4 2 | 3 1
                                                      rank 1    5   | 3
"""
import heapq
import itertools
import math
import sys

import numpy as np

import configs

IGNORE_INDEX = -100          # the target of a token without a loss
# hashed into the keys of the kinds of permutation
EPOCH_ORDER = 1              # shuffles the numbers of an epoch, so that sources are mixed
PASS_ORDER = 2               # shuffles the documents of a source in one pass over it
WEIGHTED_ORDER = 3           # shuffles all documents for systematic_sample


# --------------------------------------------------------------------------------------------------
# order: a permutation that needs no list

def splitmix64(x):
    """Scramble an array of uint64 (the finalizer of splitmix64, Steele et al. 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


def hash_key(*numbers):
    """Hash a few ints, such as (seed, epoch), to one np.uint64."""
    key = np.zeros(1, np.uint64)         # an array, because numpy warns when a scalar overflows
    for number in numbers:
        number = number % 2**63          # an int of any size, such as a seed, has to fit a uint64
        key = splitmix64(key + number + 0x9E3779B97F4A7C15)
    return key[0]


def permute(numbers, n, key):
    """Return permutation[numbers] for the pseudorandom permutation of 0 ... n-1 that `key` selects.

    numbers is an int array [k] of numbers below n; the result is int64 [k]. No list of n numbers is
    made: a Feistel network permutes 0 ... 2^bits - 1, where 2^bits is at least n, and a result of n
    or more is permuted again until it is less than n (cycle walking, Black and Rogaway 2002).
    """
    n = int(n)
    bits = max((n - 1).bit_length(), 2)  # at least one bit in each half
    out = _feistel(np.asarray(numbers, np.uint64), bits, key)
    too_large = out >= n
    while too_large.any():
        out[too_large] = _feistel(out[too_large], bits, key)
        too_large = out >= n
    return out.astype(np.int64)


def _feistel(x, bits, key):
    """Permute 0 ... 2^bits - 1: each half of the bits is scrambled by the other, four times."""
    n_low = bits // 2
    low_mask = 2**n_low - 1
    high_mask = 2**(bits - n_low) - 1
    low = x & low_mask
    high = x >> n_low
    for i in range(4):
        high = high ^ (splitmix64(low + key + 2 * i) & high_mask)
        low = low ^ (splitmix64(high + key + 2 * i + 1) & low_mask)
    return (high << n_low) | low


# --------------------------------------------------------------------------------------------------
# order: the documents of a step

def documents_per_epoch(cfg, sizes):
    """Return how many documents of each source an epoch takes: int64 [S].

    random, sequential    weight * size: a weight of 2 is two passes over a source per epoch
    weighted              as many documents as there are in all, divided among the sources in
                          proportion to their weights

    sizes  {source: its number of documents}; a list is for calls without named sources
    """
    sizes = _with_names(cfg, sizes)
    counts = np.array(list(sizes.values()), np.int64)
    data = cfg["data"]
    # a source that is not in data.train has the defaults, data.source
    sections = [data["train"].get(name, data["source"]) for name in sizes]
    weights = np.array([section["weight"] for section in sections])
    weights[counts == 0] = 0                             # the other sources share its part
    if cfg["sampler"]["order"] == "weighted" and counts.any():
        per_epoch = counts.sum() * weights / weights.sum()
    else:
        per_epoch = counts * weights
    at_least = np.minimum(counts, 1)                     # one document of every non-empty source
    return np.maximum(np.rint(per_epoch).astype(np.int64), at_least)


def _with_names(cfg, sizes):
    """sizes as a dict. A list has the order of data.train.

    A list of another length has other sources than data.train. They get numbers as names, and the
    weight of data.source.
    """
    if isinstance(sizes, dict):
        return sizes
    names = list(cfg["data"]["train"])
    if len(names) != len(sizes):
        names = range(len(sizes))
    return dict(zip(names, sizes))


def steps_per_epoch(cfg, sizes):
    """Return the number of steps of an epoch. Raises UserError if there would be none."""
    total = int(documents_per_epoch(cfg, sizes).sum())
    if total == 0:
        raise configs.UserError("data.train: the sources have no documents")
    batch_size = cfg["batch_size"]
    steps = math.ceil(total / batch_size)
    if cfg["sampler"]["drop_last"]:
        steps = total // batch_size
    if steps == 0:
        raise configs.UserError(f"sampler.drop_last: the {total} documents of an epoch do not fill "
                                f"one step; sampler.drop_last=false or batch_size={total}")
    return steps


def documents(step, cfg, sizes):
    """Return the documents of a step (counted from 0): int64 indices [<= batch_size].

    An index counts through all sources: with sizes {"a": 4, "b": 3}, documents 0-3 are those of a
    and 4-6 those of b. Each source is read pass after pass, every pass in a new order (unless
    sampler.order is sequential). An epoch takes documents_per_epoch of a source, and the next epoch
    continues where it stopped:

        weight 0.5 for b    epoch 0: 2 of b's 3 documents (first pass)
                            epoch 1: the third, and 1 of the second pass

    sizes  {source: its number of documents}; a list is for calls without named sources
    """
    seed = cfg["seed"]
    batch_size = cfg["batch_size"]
    shuffle = cfg["sampler"]["order"] != "sequential"
    counts = np.array(list(_with_names(cfg, sizes).values()), np.int64)
    per_epoch = documents_per_epoch(cfg, sizes)
    total = int(per_epoch.sum())

    # the step's part of the epoch's numbers 0 ... total - 1
    epoch, step_in_epoch = divmod(int(step), steps_per_epoch(cfg, sizes))
    start = step_in_epoch * batch_size
    numbers = np.arange(start, min(start + batch_size, total))
    if shuffle:
        numbers = permute(numbers, total, hash_key(seed, EPOCH_ORDER, epoch))

    # a number -> its source: the first per_epoch[0] numbers belong to source 0, and so on
    ends = np.cumsum(per_epoch)
    sources = np.searchsorted(ends, numbers, side="right")
    numbers_in_source = numbers - (ends - per_epoch)[sources]

    # -> the pass over that source, and the position in the pass
    documents_read = epoch * per_epoch[sources] + numbers_in_source
    passes = documents_read // counts[sources]
    positions = documents_read % counts[sources]
    if shuffle:
        for source, source_pass in set(zip(sources.tolist(), passes.tolist())):
            chosen = (sources == source) & (passes == source_pass)
            key = hash_key(seed, PASS_ORDER, source, source_pass)
            positions[chosen] = permute(positions[chosen], counts[source], key)

    first_index = np.cumsum(counts) - counts
    return first_index[sources] + positions


# --------------------------------------------------------------------------------------------------
# samplers: subclass Sampler and add it to SAMPLERS for another order (experiments/by_loss.py)

class Sampler:
    """Chooses the documents of each step. This one has no state: see documents()."""

    # True: update() is called for a step before documents() is called for the next one.
    # False: documents(step + 1) may be called, from another thread, while step is computed.
    uses_feedback = False

    def __init__(self, cfg, dataset):
        self.cfg = cfg
        self.dataset = dataset

    def documents(self, step):
        """Return the documents of a step (counted from 0): int64 indices, the same on all ranks.

        Must not change the state: a checkpoint may be saved at the same time.
        """
        return documents(step, self.cfg, self.dataset.sizes)

    def update(self, doc_ids, stats):
        """Receive what training saw of a step's documents, those of all ranks.

        doc_ids  int64 [D]
        stats    {"loss": [D], ...}: per document the sum of loss_weight * loss over its target
                 tokens, and those of model.TOKEN_STATS
        """

    def reweight(self, micro_batch):
        """Change the loss_weights of a micro-batch that collate() made, in place, for training.

        Called after documents(), with the same state. A weight that is not 0 must not become 0.
        """

    def state_dict(self):
        """Return {name: numpy array}: the arrays themselves, which a checkpoint stores."""
        return {}

    def load_state_dict(self, state):
        """Copy the arrays of a checkpoint into those of state_dict().

        Raises UserError if a name or shape differs, as with other data or another sampler.
        """
        for name, array in self.state_dict().items():
            if name not in state or state[name].shape != array.shape:
                found = f"{name} of shape {state[name].shape}" if name in state else f"no {name}"
                raise configs.UserError(
                    f"sampler.order: the checkpoint has {found}, this sampler with data.train has "
                    f"{name} of shape {array.shape}; resume with the same sampler and data, or "
                    "choose another out_dir")
            array[...] = state[name]


# By sampler.order. These three are one class: documents() and documents_per_epoch() read the order.
SAMPLERS = {"random": Sampler, "sequential": Sampler, "weighted": Sampler}


def make_sampler(cfg, dataset):
    """Return the sampler that sampler.order names. Raises UserError for an unknown name."""
    order = cfg["sampler"]["order"]
    if order not in SAMPLERS:
        raise configs.UserError(f"sampler.order: must be one of {', '.join(SAMPLERS)}; got {order}")
    return SAMPLERS[order](cfg, dataset)


def times_per_epoch(cfg, sizes):
    """Return how often each document is in an epoch, by the weights of sources: [documents]."""
    counts = np.array(list(sizes.values()))
    return np.repeat(documents_per_epoch(cfg, sizes) / np.maximum(counts, 1), counts)


def fill_unknown(values):
    """Return values [n] as float64, with the mean of the others for each nan (1 if all are nan)."""
    is_known = ~np.isnan(values)
    known = values[is_known].astype(np.float64)
    # cumsum adds in order: unlike sum, it gives the same bits on every machine
    mean = np.cumsum(known)[-1] / len(known) if len(known) else 1.0
    return np.where(is_known, values, mean).astype(np.float64)


def systematic_sample(weights, count, key):
    """Return `count` different indices, drawn with probabilities proportional to weights [n].

    The weights are at least 0. All n are placed end to end in a random order, each as long as its
    weight. Points at equal distances, from a random start, select what they fall on (Madow 1949):

        weights 3 1 2, order 1 0 2, count 2      |-1-|-----0-----|---2---|
        distance 6 / 2 = 3, start 1.5                  ^           ^          -> 0 and 2
    """
    n = len(weights)
    count = min(count, n)
    order = permute(np.arange(n), n, key)
    ends = np.cumsum(weights[order])
    start = (int(hash_key(int(key))) >> 11) / 2**53                   # uniform in [0, 1)
    points = (start + np.arange(count)) * (ends[-1] / count)
    selected = np.searchsorted(ends, points, side="right").clip(max=n - 1)
    # what is longer than the distance may be selected twice: others take the place
    selected = np.unique(selected)
    others = np.setdiff1d(np.arange(n), selected)
    selected = np.append(selected, others[:count - len(selected)])
    return order[selected]


# --------------------------------------------------------------------------------------------------
# packing

def cost(lengths, crossover=24_576):
    """Return what documents of these lengths cost, in tokens: length + length^2 / crossover.

    The second term is attention. In a document of `crossover` tokens it costs as much as a block's
    matmuls: these take 24 T C^2 FLOPs and causal attention 2 T^2 C, so T = 12 C, with C = 2,048.
    The cost only balances ranks, so it need not match the model.
    """
    lengths = np.asarray(lengths, np.float64)
    return lengths + lengths ** 2 / crossover


def pack(lengths, capacity, world_size=1):
    """Pack documents into micro-batches: [rank][micro-batch] -> list of indices into `lengths`.

    Each document is packed once, and no micro-batch exceeds `capacity` tokens. All ranks get the
    same number of micro-batches ([] is an idle one), the smallest with which one of two heuristics
    finds room for all, and micro-batch k costs about the same on all ranks. Raises UserError for a
    document longer than the capacity.
    """
    lengths = np.asarray(lengths, np.int64)
    if not len(lengths):
        return [[] for _ in range(world_size)]
    longest = int(lengths.max())
    if longest > capacity:
        raise configs.UserError(f"micro_tokens: {capacity} tokens are too few for a document of "
                                f"{longest}; micro_tokens={longest} or a smaller data.seq_len")

    costs = cost(lengths)
    longest_first = np.argsort(-lengths, kind="stable").tolist()
    fewest = max(1, math.ceil(lengths.sum() / (capacity * world_size)))
    # ends at the latest when every document has a micro-batch of its own
    for per_rank in itertools.count(fewest):
        allowances = _allowances(costs, longest_first, per_rank, world_size)
        packed = _pack_balanced(lengths, costs, longest_first, capacity, allowances)
        if packed is None:
            packed = _pack_best_fit(lengths, longest_first, capacity, per_rank * world_size)
        if packed is not None:
            break

    # Costliest first, dealt to the ranks in turn: micro-batch k of all ranks costs about the same.
    by_cost = sorted((-sum(costs[i] for i in members), members) for members in packed)
    return [[sorted(members) for _, members in by_cost[rank::world_size]]
            for rank in range(world_size)]


def _pack_balanced(lengths, costs, longest_first, capacity, allowances):
    """Put each document into the micro-batch with the least cost minus allowance that has room.

    None if one fits nowhere.

    allowances  [micro-batches]: by how much each one may cost more than others, see _allowances

    Documents come longest first. A micro-batch without room for one moves to the heap `too_full`,
    and returns to `cheapest` when the documents have become short enough. (Searching all
    micro-batches for each document takes 5 times as long with many of them.)
    """
    packed = [[] for _ in allowances]
    room = [capacity] * len(packed)
    # heap of (excess: cost so far - allowance, micro-batch)
    cheapest = [(-allowance, k) for k, allowance in enumerate(allowances)]
    heapq.heapify(cheapest)
    too_full = []                        # heap of (-room, excess, micro-batch)
    for i in longest_first:
        while too_full and -too_full[0][0] >= lengths[i]:
            _, excess, k = heapq.heappop(too_full)
            heapq.heappush(cheapest, (excess, k))
        while cheapest and room[cheapest[0][1]] < lengths[i]:
            excess, k = heapq.heappop(cheapest)
            heapq.heappush(too_full, (-room[k], excess, k))
        if not cheapest:
            return None
        excess, k = heapq.heappop(cheapest)
        packed[k].append(i)
        room[k] -= lengths[i]
        heapq.heappush(cheapest, (excess + costs[i], k))
    return packed


def _pack_best_fit(lengths, longest_first, capacity, count):
    """Put each document into the fullest micro-batch that has room; None if one fits nowhere."""
    packed = [[] for _ in range(count)]
    room = np.full(count, capacity)
    for i in longest_first:
        room_if_fits = np.where(room >= lengths[i], room, capacity + 1)
        fullest = room_if_fits.argmin()
        if room[fullest] < lengths[i]:
            return None
        packed[fullest].append(i)
        room[fullest] -= lengths[i]
    return packed


def _allowances(costs, longest_first, per_rank, world_size):
    """Return by how much each micro-batch may cost more than the cheapest: [micro-batches].

    A document may cost more than an average micro-batch. Then micro-batch 0 of its rank costs at
    least that much, and micro-batch 0 of all other ranks may cost as much, because they wait:

        costs 9 2 2 2 2 2 2 2 1, 2 ranks, 2 micro-batches each
        cost of a rank            24 / 2 = 12, an even share for each micro-batch is 6
        at_least                  9 for micro-batch 0 (the longest document), 2 for micro-batch 1
        remaining for 1           12 - 9 = 3, the even share from here on
        allowances                9 - 3 = 6 for micro-batch 0 of both ranks, 0 for micro-batch 1

    pack() sorts the micro-batches by cost and deals them to the ranks again, so that only the
    number of micro-batches with each allowance matters.
    """
    # Give each of the longest documents a micro-batch of its own, world_size at a time. at_least[k]
    # is then the cost of the longest document in micro-batch k of any rank, and these micro-batches
    # cost at least that much. It falls with k, so the loop stops at the first that is no larger
    # than an even share of the remaining cost.
    at_least = costs[longest_first[:per_rank * world_size:world_size]]
    remaining_cost = costs.sum() / world_size            # of micro-batches k, k + 1, ... of a rank
    even_share = remaining_cost / per_rank
    for k, longest_cost in enumerate(at_least):
        is_last = k == per_rank - 1                      # no micro-batch is left to share the rest
        if longest_cost <= even_share or is_last:
            break
        remaining_cost -= longest_cost
        even_share = remaining_cost / (per_rank - k - 1)
    allowances = np.zeros(per_rank)
    allowances[:len(at_least)] = np.maximum(at_least - even_share, 0)
    return np.repeat(allowances, world_size)


# --------------------------------------------------------------------------------------------------
# a step's micro-batches

class Dataset:
    """Several sources under one index: with 4 documents of a and 3 of b, 4-6 are those of b.

    sources  {name: tokenize_data.Tokens}
    """

    def __init__(self, sources):
        self.sources = sources
        self.sizes = {name: len(tokens) for name, tokens in sources.items()}
        sizes = np.array(list(self.sizes.values()), np.int64)
        self.ends = np.cumsum(sizes)                     # one past each source's last index [S]
        self.starts = self.ends - sizes

    def __len__(self):
        return sum(self.sizes.values())

    def mean_length(self):
        """The mean number of inputs of a document (one less than its tokens)."""
        n_tokens = sum(int(tokens.offsets[-1] - tokens.offsets[0])
                       for tokens in self.sources.values())
        return n_tokens / max(1, len(self)) - 1

    def locate(self, indices):
        """Return (number of the source [n], index within that source [n])."""
        indices = np.asarray(indices, np.int64)
        source = self.ends.searchsorted(indices, side="right")
        return source, indices - self.starts[source]

    def lengths(self, indices):
        """Return the number of inputs of each document (one less than its tokens): int64 [n]."""
        out = np.zeros(len(indices), np.int64)
        for tokens, chosen, within in self._by_source(indices):
            out[chosen] = tokens.n_inputs(within)
        return out

    def n_targets(self, indices):
        """Return the number of target tokens of each document: int64 [n]."""
        out = np.zeros(len(indices), np.int64)
        for tokens, chosen, within in self._by_source(indices):
            out[chosen] = tokens.n_targets[within]
        return out

    def _by_source(self, indices):
        """Yield (Tokens of a source, chosen, within): indices[chosen] are documents `within` it."""
        source, within = self.locate(indices)
        for number, tokens in enumerate(self.sources.values()):
            chosen = source == number
            yield tokens, chosen, within[chosen]

    def document(self, index):
        """Return (token ids [n], loss weights [n]: uint8 or float16). 0: the token is no target."""
        source, within = self.locate(index)
        return list(self.sources.values())[source].document(within)

    def describe(self, indices, limit=8):
        """Return documents as text: "chats 17, chats 3 and 5 more"."""
        names = list(self.sources)
        source, within = self.locate(indices[:limit])
        text = ", ".join(f"{names[s]} {i}" for s, i in zip(source, within))
        more = len(indices) - limit
        return f"{text} and {more} more" if more > 0 else text


def collate(indices, dataset, pad_to=1):
    """Return documents as one micro-batch of numpy arrays, padded to a multiple of pad_to tokens.

    A document of n tokens has n - 1 inputs. The target of each is the next token:

        tokens        token ids, int64 [T]
        targets       int64 [T]; -100: no loss
        loss_weights  float32 [T]; the weight of each target's loss, 0 if it has none
        positions     int64 [T]; within the document
        cu_seqlens    int32 [D+1]; document d is tokens[cu_seqlens[d]:cu_seqlens[d + 1]]
        max_seqlen    int; the longest document, or the padding if that is longer, because an
                      attention kernel computes the padding as one more document
        doc_ids       int64 [D], the indices

    Tokens after the last document are padding and belong to no document. To weight losses in
    another way, change loss_weights here (negative weights are allowed; 0 removes the target):
    sum_loss_weights(), the denominator of the loss, reads the same array. train.py adds
    target_index (pin_tensors) and noise_seed (train).
    """
    cu_seqlens = np.cumsum([0, *dataset.lengths(indices)])
    n_tokens = int(cu_seqlens[-1])
    padded = math.ceil(n_tokens / pad_to) * pad_to
    tokens = np.zeros(padded, np.int64)
    targets = np.zeros(padded, np.int64)
    loss_weights = np.zeros(padded, np.float32)
    positions = np.zeros(padded, np.int64)
    for index, start, end in zip(indices, cu_seqlens, cu_seqlens[1:]):
        ids, weights = dataset.document(index)
        tokens[start:end] = ids[:-1]
        targets[start:end] = ids[1:]
        loss_weights[start:end] = weights[1:]
        positions[start:end] = np.arange(end - start)
    targets[loss_weights == 0] = IGNORE_INDEX

    longest = int(np.diff(cu_seqlens).max(initial=0))
    return {
        "tokens": tokens,
        "targets": targets,
        "loss_weights": loss_weights,
        "positions": positions,
        "cu_seqlens": cu_seqlens.astype(np.int32),
        "max_seqlen": max(longest, padded - n_tokens),
        "doc_ids": np.asarray(indices, np.int64),
    }


def load_micro_batches(indices, cfg, dataset, world_size=1, rank=0, pad_to=1):
    """Return (the micro-batches of one rank, info about those of all ranks).

    info  {"documents", "tokens", "target_tokens": counts; "lengths": of each document, int64 [n];
          "packing": tokens / (world_size * the sum over k of the longest micro-batch k, padded)}
    """
    indices = np.asarray(indices, np.int64)
    lengths = dataset.lengths(indices)
    packed = pack(lengths, cfg["micro_tokens"], world_size)
    micro_batches = [collate(indices[members], dataset, pad_to) for members in packed[rank]]

    # a rank with a shorter micro-batch waits for the longest one
    sizes = [[lengths[members].sum() for members in of_rank] for of_rank in packed]
    longest = np.max(sizes, axis=0)
    space = world_size * pad_to * np.ceil(longest / pad_to).sum()
    n_tokens = int(lengths.sum())
    info = {
        "documents": len(indices),
        "tokens": n_tokens,
        "target_tokens": int(dataset.n_targets(indices).sum()),
        "packing": float(n_tokens / max(1, space)),
        "lengths": lengths,
    }
    return micro_batches, info


def sum_loss_weights(micro_batches):
    """Return the sum of |loss_weights| over all targets: this rank's part of the denominator."""
    total = 0.0
    for micro_batch in micro_batches:
        is_target = micro_batch["targets"] != IGNORE_INDEX
        weights = micro_batch["loss_weights"][is_target]
        total += float(np.abs(weights).sum(dtype=np.float64))
    return total


# --------------------------------------------------------------------------------------------------
# python sampler.py

def packing_report(sampler, n_steps, world_size):
    """Pack up to 50 steps, spread over an epoch; return a line with means over them.

    "full" compares with micro_tokens. "packing" in metrics.jsonl compares with the longest
    micro-batch instead, so it is larger.
    """
    capacity = sampler.cfg["micro_tokens"]
    figures = []
    for step in np.unique(np.linspace(0, n_steps - 1, 50).astype(int)).tolist():
        lengths = sampler.dataset.lengths(sampler.documents(step))
        packed = pack(lengths, capacity, world_size)
        costs = [[cost(lengths[members]).sum() for members in of_rank] for of_rank in packed]
        count = len(packed[0])
        efficiency = lengths.sum() / (world_size * count * capacity)
        balance = np.mean(costs, axis=0).sum() / np.max(costs, axis=0).sum()
        figures.append((count, efficiency, balance))
    count, efficiency, balance = np.mean(figures, axis=0)
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    return (f"{ranks}: {count:.1f} micro-batches of {capacity:,} tokens per step and rank, "
            f"{efficiency:.0%} full; ranks wait for the slowest {1 - balance:.1%} of the time")


def main(argv):
    import tokenize_data
    options, argv = configs.pop_options(argv, ranks=8)
    world_size = options["ranks"]
    if world_size < 1:
        raise configs.UserError(f"ranks: must be at least 1; got {world_size}")
    cfg, _, _ = configs.load(argv)
    dataset = Dataset(tokenize_data.load_datasets(cfg)["train"])
    sampler = make_sampler(cfg, dataset)
    per_epoch = documents_per_epoch(cfg, dataset.sizes)
    for (name, size), used in zip(dataset.sizes.items(), per_epoch):
        print(f"{name}: {size:,} documents, {used:,} per epoch")
    n_steps = steps_per_epoch(cfg, dataset.sizes)
    print(f"{per_epoch.sum():,} documents / batch_size {cfg['batch_size']} = {n_steps:,} steps "
          "per epoch")
    print(packing_report(sampler, n_steps, 1))
    if world_size > 1:
        print(packing_report(sampler, n_steps, world_size))


if __name__ == "__main__":
    configs.exit_with_help(__doc__, sys.argv[1:])
    configs.run(main, sys.argv[1:])
