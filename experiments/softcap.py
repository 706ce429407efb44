r"""Bound the attention scores smoothly before softmax.

    torchrun -m experiments.softcap configs/ft.yaml out_dir=out/softcap
    torchrun --nproc_per_node 2 -m experiments.softcap configs/ft.yaml \
        model.score_mod_options.cap=20 out_dir=out/softcap2

It tests whether training is more stable if no score can grow without limit, as in Gemma 2
(arXiv:2408.00118, section 2): a score becomes cap * tanh(score / cap). Small scores hardly change,
so a pretrained model starts almost as it was.

On CUDA in bf16, the function is compiled into the kernel of FlexAttention. Elsewhere attention is
then computed without a kernel (see needs_probabilities in model.py), which takes memory for the
scores of all pairs of tokens of a document.

The weights look like those of the base, but other programs would compute another model from them.
So it is saved as model.family=native, which transformers refuses; config.json has score_mod, and
without this file imported our own scripts refuse it by that name. To generate:

    python -c "import experiments.softcap, model; model.main(['out/softcap', 'What is 12 + 30?'])"
"""
import sys

import configs
import model
import train


def softcap(scores, cap=50.0):
    """cap * tanh(scores / cap), between -cap and cap. Any shape."""
    return cap * (scores / cap).tanh()


model.SCORE_MODS["softcap"] = softcap

if __name__ == "__main__":
    configs.exit_with_help(__doc__, sys.argv[1:])
    train.cli(["model.score_mod=softcap", "model.family=native", *sys.argv[1:]])
