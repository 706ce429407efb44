"""Evaluate with pass@k: is one of k sampled answers right?

    torchrun -m experiments.pass_at_k configs/ft.yaml out_dir=out/pass
    torchrun --nproc_per_node 2 -m experiments.pass_at_k configs/ft.yaml out_dir=out/pass
    torchrun -m experiments.pass_at_k configs/ft.yaml best="max val/chats/pass_at_4" out_dir=out/pass

exact_match, which is logged beside it, looks at one greedy answer. pass@k (arXiv:2107.03374)
samples n >= k answers to every prompt and, if c of them are right, estimates without bias how often
k answers contain a right one. Both show in every evaluation as val/LABEL/exact_match and
val/LABEL/pass_at_4. It costs N_SAMPLES times as much as exact_match; eval_prompts=100 looks at
fewer prompts.

The noise of a sample is a function of (seed, step, sample, prompt). A resumed run draws the same
answers, and another number of ranks draws the same up to rounding, which may rarely tip a token.
"""
import math
import sys

import numpy as np

import configs
import sampler
import train

K = 4
N_SAMPLES = 8                # per prompt, at least K
TEMPERATURE = 0.8


def estimate(n, c, k):
    """The probability that k of n answers, c of which are right, contain a right one."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_at_k(run, prompts):
    """The mean of pass@k over prompts: [(prompt ids, reference ids)]. On every rank the same."""
    eval_answer = run.cfg["eval_answer"]
    n_right = np.zeros(len(prompts), int)
    for sample in range(N_SAMPLES):
        seed = int(sampler.hash_key(run.cfg["seed"], run.state.step, sample))
        answers = train.generate_answers(run, prompts, seed, temperature=TEMPERATURE)
        if run.stop_signal:                              # answers are missing; nothing is logged
            return math.nan
        for i, (_, answer, reference) in enumerate(answers):
            parts = [train.compared_part(text, eval_answer) for text in (answer, reference)]
            n_right[i] += train.exact_match(*parts)
    return float(np.mean([estimate(N_SAMPLES, c, K) for c in n_right.tolist()]))


train.EVALUATIONS[f"pass_at_{K}"] = pass_at_k

if __name__ == "__main__":
    configs.exit_with_help(__doc__, sys.argv[1:])
    train.cli()
