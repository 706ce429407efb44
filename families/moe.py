"""Mixture of experts: a block has many MLPs, the experts, and a router sends each token to a few.

    router     p = softmax(W x), one probability per expert, of which the k largest are chosen
               (Shazeer et al., arXiv:1701.06538; without their noise, as in OLMoE,
               arXiv:2409.02060, and Qwen3, arXiv:2505.09388)
    experts    y = sum of p_e MLP_e(x) over the chosen e. With model.norm_topk_prob the k
               probabilities are divided by their sum
    balance    a loss that is smallest if all experts get equally many tokens: see router_loss()

This file is a section of model.py, which imports it if model.n_experts is above 0. More letters for
shapes:

    X experts (n_experts)    k experts of a token (n_experts_per_token)    F width of one (d_expert)
    R = T k rows: each token once per expert that it is sent to, sorted by expert

The weights of a projection are one matrix for all experts of a block, expert after expert: [X F, C]
for gate and up, [X C, F] for down. So whatever works on rows of matrices takes them as they are:
FSDP's shards, slices of Hugging Face's files, quantization, LoRA, checkpoints. With a parameter per
expert, 48 blocks of 128 experts would be 18,432 parameters, each with its own calls in optimizer
and clipping. A parameter [X, F, C] would be a special case in each of these places.
"""
import contextlib

import torch
import torch.nn.functional as F
from torch import nn

import model as transformer


def grouped_linear(x, weight, ends, bias=None):
    """F.linear() of the rows of each expert with its weight and bias. Returns [R, out].

    x       [R, in], sorted by expert
    weight  [X out, in], in the dtype of x
    ends    int32 [X]: the rows of expert e are ends[e - 1] ... ends[e] - 1
    bias    [X out] or None
    """
    y = grouped_matmul(x, weight.unflatten(0, (len(ends), -1)).mT, ends)
    if bias is None:
        return y
    rows = torch.arange(len(x), device=x.device)
    experts = torch.bucketize(rows, ends, right=True)                              # [R]
    return y + bias.view(len(ends), -1).index_select(0, experts)


def grouped_matmul(x, matrices, ends):
    """Multiply the rows of x [R, in] by the matrix of their expert, [X, in, out]: [R, out]."""
    if all(n * x.element_size() % 16 == 0 for n in matrices.shape[1:]):
        # One kernel on CUDA, which takes rows of a multiple of 16 bytes. Unlike the loop below, it
        # does not wait for the device. On a CPU it is such a loop.
        return F.grouped_mm(x, matrices, offs=ends)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([rows @ matrix for rows, matrix in zip(x.split(sizes), matrices.unbind())])


class ExpertLinear(transformer.Linear):
    """The same linear layer of all experts, whose weights are one matrix: [X out, in]."""

    def __init__(self, n_experts, in_features, out_features, bias):
        super().__init__(in_features, n_experts * out_features, bias=bias)
        self.n_experts = n_experts

    def forward(self, x, seeds=None, ends=None):                                   # [R, in]
        """seeds  not used here, see transformer.Linear;  ends  see grouped_linear()"""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return grouped_linear(x, self.weight.to(x.dtype), ends, bias)              # [R, out]


class Experts(nn.Module):
    """The gated MLPs of a block: down(activation(gate(x)) * up(x)) of each row's expert.

    With model.swiglu_limit, gpt-oss's variant (arXiv:2508.10925).
    """

    def __init__(self, m):
        super().__init__()
        X = m["n_experts"]
        C = m["d_model"]
        d_expert = m["d_expert"]
        self.activation = transformer.ACTIVATIONS[m["activation"]]
        bias = m["mlp_bias"]
        self.limit = m["swiglu_limit"]
        self.gate_proj = ExpertLinear(X, C, d_expert, bias)
        self.up_proj = ExpertLinear(X, C, d_expert, bias)
        self.down_proj = ExpertLinear(X, d_expert, C, bias)

    def forward(self, x, seeds, ends):                                             # [R, C]
        gate = self.gate_proj(x, seeds, ends)                                      # [R, F]
        up = self.up_proj(x, seeds, ends)
        if self.limit is None:
            h = self.activation(gate) * up
        else:
            gate = gate.clamp(max=self.limit)
            h = gate * (1.702 * gate).sigmoid() * (up.clamp(-self.limit, self.limit) + 1)
        return self.down_proj(h, seeds, ends)


class Router(nn.Module):
    """The probability of each expert, in fp32. Not a Linear: it gets no adapter and is never
    quantized, because a small error would send tokens to other experts."""

    def __init__(self, m):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(m["n_experts"], m["d_model"]))
        self.bias = nn.Parameter(torch.empty(m["n_experts"])) if m["mlp_bias"] else None

    def forward(self, x):                                                          # [T, C]
        weight = self.weight.to(x.dtype)     # FSDP gathers it in this dtype; without FSDP the same
        bias = None if self.bias is None else self.bias.to(x.dtype).float()
        return F.linear(x.float(), weight.float(), bias).softmax(-1)               # [T, X]


class MixtureOfExperts(nn.Module):
    """What replaces a block's MLP. seeds: int32 [T], of the adapters' dropout."""

    def __init__(self, m):
        super().__init__()
        self.n_experts = m["n_experts"]
        self.n_experts_per_token = m["n_experts_per_token"]
        self.norm_topk_prob = m["norm_topk_prob"]
        self.router = Router(m)
        self.experts = Experts(m)
        self.routing = None                  # a list, within record_routing()

    def forward(self, x, seeds=None):                                              # [T, C]
        T, C = x.shape
        k = self.n_experts_per_token
        probs = self.router(x)                                                     # [T, X]
        weights, experts = probs.topk(k, -1)                                       # [T, k]
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.routing is not None:
            self.routing.append((probs, experts))

        sorted_experts, order = experts.flatten().sort(stable=True)                # [R]
        all_experts = torch.arange(self.n_experts, device=x.device)
        ends = torch.searchsorted(sorted_experts, all_experts, right=True).int()   # [X]
        token_index = order // k
        rows = x.index_select(0, token_index)                                      # [R, C]
        row_seeds = None if seeds is None else seeds[token_index]
        y = self.experts(rows, row_seeds, ends)                                    # [R, C]
        y = y.index_select(0, order.argsort()).view(T, k, C)
        return (weights.to(y.dtype)[:, None] @ y).squeeze(1)                       # [T, C]


# --------------------------------------------------------------------------------------------------
# the loss that balances experts

@contextlib.contextmanager
def record_routing(blocks):
    """Yield a list to which each block appends (probs [T, X], experts [T, k]) in its forward pass.

    Blocks do not return them instead: FSDP gathers a block's weights for the backward pass when the
    gradient of one of its outputs arrives, and that of the router's loss arrives at all blocks
    first. In the backward pass, recomputed blocks record nothing, because `routing` is None again.
    """
    routing = []
    for block in blocks:
        block.mlp.routing = routing
    try:
        yield routing
    finally:
        for block in blocks:
            block.mlp.routing = None


def hidden_and_router_loss(model, batch):
    """Return (the final hidden states [T, C], router_loss()), and count tokens.

    The tokens of each expert are added to model.expert_tokens: 0 before the first, then [L, X].
    """
    with record_routing(model.blocks) as routing:
        x = model.compute_hidden(batch)
    m = model.cfg
    coef = m["router_aux_loss_coef"] if m["router_aux_loss"] else 0.0
    loss, expert_tokens = router_loss(routing, batch, coef)
    model.expert_tokens = model.expert_tokens + expert_tokens
    return x, loss


def router_loss(routing, batch, coef):
    """Return (the loss that balances the experts, a number; tokens of each expert, int64 [L, X]).

    For a document and a block, it is X * sum_e f_e P_e (Switch, arXiv:2101.03961, equations 4
    to 6): f_e is the fraction of its tokens that are sent to expert e, and P_e the mean probability
    of e over its tokens. As in transformers, f sums to k, so that the loss of balanced experts is
    k. Documents are summed with the weight that they have in the loss of the targets, the sum of
    their |loss_weight|, and blocks are averaged.

    Why per document, as DeepSeek-V3 has it (arXiv:2412.19437, equations 17 to 20): the loss is a
    product of two means. Means over a micro-batch would make the gradient depend on micro_tokens,
    packing and ranks. Means over the global batch would need a pass over all micro-batches before
    the first backward pass. A document is in one micro-batch, whatever the layout is.

    coef  model.router_aux_loss_coef, or 0 without model.router_aux_loss. Padding is not counted
    """
    documents = transformer.document_index(batch)                                  # [T]
    n_documents = len(batch["cu_seqlens"]) - 1
    lengths = batch["cu_seqlens"].diff().clamp(min=1)[:, None]                     # [D, 1]
    is_target = batch["targets"] != transformer.IGNORE_INDEX
    token_weights = batch["loss_weights"].abs() * is_target                        # [T]
    weights = sum_per_document(token_weights, documents, n_documents)              # [D]
    loss = 0.0
    tokens_of_experts = []
    for probs, experts in routing:
        is_chosen = torch.zeros_like(probs).scatter_(1, experts, 1.0)              # [T, X]
        n_tokens = sum_per_document(is_chosen, documents, n_documents)             # [D, X]
        mean_probs = sum_per_document(probs, documents, n_documents) / lengths
        balance = probs.shape[1] * (n_tokens / lengths * mean_probs).sum(1)        # [D]
        loss = loss + (balance * weights).sum()
        tokens_of_experts.append(n_tokens.sum(0).long())
    return coef / len(routing) * loss, torch.stack(tokens_of_experts)


def sum_per_document(x, documents, n_documents):
    """[T, ...] -> [D, ...], without padding"""
    sums = x.new_zeros(n_documents + 1, *x.shape[1:])
    return sums.index_add_(0, documents, x)[:n_documents]
