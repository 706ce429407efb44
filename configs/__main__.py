"""Print every value of a config and the layer it comes from.

    python -m configs configs/ft.yaml lr=1e-4
    python -m configs configs/defaults.yaml           the defaults

Layers: default, imported (the pretrained model's config.json), a file, cli, derived.
configs/defaults.yaml explains all keys, docs/config.md the layers and errors.
"""
import sys

import configs


def as_yaml(value):
    """A value as it is written in a config file, on one line."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return str(value)
    return configs.dump(value).removesuffix("...\n").strip()


configs.exit_with_help(__doc__, sys.argv[1:])
cfg, source, _ = configs.load_or_exit(sys.argv[1:])
values = configs.flat(cfg)
key_width = max(len(key) for key in values)
layer_width = max(len(source[key]) for key in values)
for key, value in values.items():
    print(f"{key:<{key_width}}  {source[key]:<{layer_width}}  {as_yaml(value)}")
